"""`repave bmc`: one BMC by hand, without a server: probe, boot-media, eject, power.

Credentials come from the environment only (REPAVE_BMC_USERNAME, REPAVE_BMC_PASSWORD, REPAVE_BMC_TLS_VERIFY = true, false or
the path of a CA bundle). Every command ends within `COMMAND_S` + `GRACE_S`, 90 s at most, whatever the BMC does.

Wire: with --json the last line on stdout is one object, `{"result": "ok", ...}` and exit 0, or
`{"result": "error", "error": {"class", "message", "step"}}` and exit 10; the classes are errors.BMC_CLASSES.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from repave.cli.output import Exit
from repave.domain.urls import find_address_fault
from repave.errors import BmcError

if TYPE_CHECKING:
    from repave.bmc.redfish import RedfishBmc

COMMAND_S = 80.0
GRACE_S = 6.0  # for one answer that is under way when the deadline passes
GRACEFUL_S = 45.0  # leaves 35 s of COMMAND_S for ForceOff
MEDIA_SCHEMES = ("http", "https", "nfs", "cifs", "smb", "ftp", "sftp", "scp", "tftp")  # TransferProtocolType of VirtualMedia; SMB is CIFS

app = App(name="bmc", help="Talk to one BMC: REPAVE_BMC_USERNAME, REPAVE_BMC_PASSWORD, REPAVE_BMC_TLS_VERIFY.")

Url = Annotated[str, Parameter(help="https://BMC, or with the path of one of its systems.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object as the last line.")]


@dataclass
class _Command:
    """One command under its deadline; `step` is what it is doing, for the error."""

    url: str
    step: str = "connect"
    end: float = field(default_factory=lambda: time.monotonic() + COMMAND_S)

    def run(self, do: Callable[[_Command, RedfishBmc], dict[str, Any]]) -> dict[str, Any]:
        from repave.bmc.redfish import RedfishBmc  # sushy takes a third of a second to import; --help does not need it

        logging.getLogger("sushy").setLevel(logging.CRITICAL)
        with RedfishBmc(_address(self.url), deadline_s=COMMAND_S) as bmc:
            return do(self, bmc)

    def begin(self, step: str, bmc: RedfishBmc) -> None:
        """What follows is `step`, and has what is left of the time."""
        self.step = step
        bmc.deadline_s = self.end - time.monotonic()
        if bmc.deadline_s <= 0:
            raise BmcError("timeout", "The command took too long.")


def _address(url: str) -> Any:
    from repave.bmc import BmcAddress

    verify: bool | str = os.environ.get("REPAVE_BMC_TLS_VERIFY") or "true"
    verify = {"true": True, "1": True, "false": False, "0": False}.get(str(verify).lower(), verify)
    if isinstance(verify, str) and not os.path.exists(verify):
        raise BmcError("tls", "REPAVE_BMC_TLS_VERIFY names a file that is not there.")
    username, password = (os.environ.get(f"REPAVE_BMC_{name}", "") for name in ("USERNAME", "PASSWORD"))
    return BmcAddress(url if "://" in url else f"https://{url}", username, password, tls_verify=verify)


def _run(url: str, as_json: bool, do: Callable[[_Command, RedfishBmc], dict[str, Any]]) -> None:
    """Do it, print the outcome, exit 10 on failure. In a thread, so that not even a name server can hold us past the end."""
    command = _Command(url)
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome.update({"result": "ok", **command.run(do)})
        except BmcError as e:
            outcome.update(_failure(e.slug, str(e), command.step))
        except Exception as e:  # whatever it is, the promise of the last line holds
            outcome.update(_failure("protocol", f"Unforeseen {type(e).__name__}.", command.step))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(COMMAND_S + GRACE_S)
    late = thread.is_alive()
    shown = _failure("timeout", "The command took too long.", command.step) if late else outcome
    print(json.dumps(shown) if as_json else _plain(shown), flush=True)
    if late:
        os._exit(Exit.FAILED)  # the thread cannot be stopped
    if shown["result"] != "ok":
        sys.exit(Exit.FAILED)


def _failure(slug: str, message: str, step: str) -> dict[str, Any]:
    return {"result": "error", "error": {"class": slug, "message": message, "step": step}}


def _plain(outcome: dict[str, Any]) -> str:
    if outcome["result"] == "error":
        error = outcome["error"]
        return f"error: {error['message']} ({error['class']}, at {error['step']})"
    lines = []
    for key, value in outcome.items():
        if isinstance(value, dict):
            lines += [f"{key} {inner}: {text}" for inner, text in value.items() if text]
        elif key != "result" and value not in (None, "", []):
            lines.append(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines) or "ok"


@app.command
def probe(url: Url, *, as_json: Json = False) -> None:
    """What the BMC says of itself and its server. Touches nothing."""

    def do(command: _Command, bmc: RedfishBmc) -> dict[str, Any]:
        command.begin("probe", bmc)
        facts = bmc.probe()
        return {
            "system": {
                "uri": facts.system_uri, "manufacturer": facts.manufacturer, "model": facts.model,
                "serial": facts.serial, "uuid": facts.uuid,
            },
            "power": facts.power.value,
            "virtual_media": list(facts.virtual_media),
            "boot_targets": list(facts.boot_targets),
            "macs": list(facts.macs),
            "arch": facts.arch,
            "certificate_sha256": facts.certificate_sha256,
        }  # fmt: skip

    _run(url, as_json, do)


def _refuse_no_urls(urls: Sequence[str]) -> None:
    """A BMC that names no protocols would be asked for anything, and its server is off by then. Raises media_protocol."""
    for number, url in enumerate(urls, 1):
        if fault := find_address_fault(url, schemes=MEDIA_SCHEMES):
            raise BmcError("media_protocol", f"ISO URL {number} {fault}.")


@app.command(name="boot-media")
def boot_media(url: Url, iso_url: str, *more_iso_urls: str, as_json: Json = False) -> None:
    """Power off, insert the image (one of several URLs of the same), boot it once.

    What can be known to fail is found before the server is touched. After power-off, a failure leaves it off:
    it never boots without the media.
    """

    def do(command: _Command, bmc: RedfishBmc) -> dict[str, Any]:
        urls = [iso_url, *more_iso_urls]
        command.begin("probe", bmc)
        _refuse_no_urls(urls)
        bmc.check_media(urls)
        command.begin("power-off", bmc)
        bmc.power_off()
        command.begin("insert-media", bmc)
        taken = bmc.insert_media(urls)
        command.begin("boot-override", bmc)
        bmc.boot_from_media_once()
        command.begin("power-on", bmc)
        bmc.power_on()
        return {"power": "on", "media": taken}

    _run(url, as_json, do)


@app.command
def eject(url: Url, *, as_json: Json = False) -> None:
    """Take the media out of every CD slot. Succeeds when there are none."""

    def do(command: _Command, bmc: RedfishBmc) -> dict[str, Any]:
        command.begin("eject", bmc)
        bmc.eject_media()
        return {}

    _run(url, as_json, do)


@app.command
def power(state: Literal["on", "off"], url: Url, *, graceful: Annotated[bool, Parameter(negative="")] = False, as_json: Json = False) -> None:
    """Switch the server on or off. Succeeds when it is so already. --graceful asks the OS first."""

    def do(command: _Command, bmc: RedfishBmc) -> dict[str, Any]:
        command.begin(f"power-{state}", bmc)
        if state == "on":
            bmc.power_on()
            return {"power": "on"}
        asked_s = GRACEFUL_S if graceful else 0.0
        bmc.deadline_s -= asked_s  # the driver adds it again
        return {"power": "off", "forced": bmc.power_off(graceful_s=asked_s)}

    _run(url, as_json, do)


if __name__ == "__main__":
    app()
