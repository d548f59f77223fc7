"""`repave server power`: orders about servers' power, by hand. What takes the power from a running OS is confirmed by typing."""

from __future__ import annotations

from typing import Literal

from repave.cli.client import Client
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import Project
from repave.cli.output import Json, Refused, confirm, count, exit_code, fold, warn
from repave.cli.reinstall import refuse_unconfirmed
from repave.cli.server import code_of, find_named, on_each, tell_errors
from repave.errors import RepaveError

_POWER = {"SERVER": "server", "POWER": "power", "ERROR": "error.code", "CAUSE": "error.cause"}


def power(
    nodeset: str, order: Literal["on", "off", "restart", "show"], /, *, force: bool = False, yes: bool = False, expect: int | None = None,
    project: Project = None, form: Form = TABLE,
) -> int:  # fmt: skip
    """Switch servers on or off, restart them, or show their power as their BMCs say it. The OS is asked to shut down before its power is cut.

    Refused while a run of the server is live, since a run owns its server's power; off and restart also where the server is locked or Repave runs on it.

    Parameters
    ----------
    order
        on, off, restart (off, then on: a server that is off is switched on), or show.
    force
        Cut the power at once; what the OS had not written is lost.
    yes
        Do not ask; wants --expect.
    expect
        How many servers these must be. Another number is refused: a nodeset may have grown.
    """
    takes_power = order in ("off", "restart")
    if takes_power:
        refuse_unconfirmed(yes=yes, expect=expect)
    client, servers = find_named(nodeset, project)
    if expect is not None and expect != len(servers):
        raise Refused(f"{nodeset}: {count(len(servers), 'server')}, not the {expect} expected; nothing was sent.")
    if takes_power and not yes:
        _confirm(client, servers, order, force=force)

    def send(name: str) -> Json:
        if order == "show":
            return _probe(client, name)
        return client.order(f"/servers/{name}/power", {"order": order, "force": force}, {})  # an OS may take its time to shut down

    done = on_each(servers, send)
    bad = {name: answer for name, answer in done.items() if isinstance(answer, RepaveError)}
    show_list([{"server": name} | ({"error": a.as_json()} if isinstance(a, RepaveError) else a | {"error": None}) for name, a in done.items()], _POWER, form)
    tell_errors(bad)
    return exit_code(next(iter(bad.values()))) if len(bad) == len(servers) == 1 else code_of(len(bad), len(servers))


def _probe(client: Client, name: str) -> Json:
    """What its BMC shows. Raises RepaveError, wrong-server where that is another server's: its power says nothing of ours."""
    found = client.post(f"/servers/{name}/probe", {})
    if not found["same"]:
        raise RepaveError("wrong-server", "The BMC shows another serial number or UUID than the one recorded.")
    return found


def _confirm(client: Client, servers: dict[str, Json], order: str, *, force: bool) -> None:
    """Returns when it was typed, or when nothing runs that could lose its power. A BMC that does not answer may have a running OS behind it.

    Raises Refused where it was not typed, or a BMC is another server's.
    """
    seen = on_each(servers, lambda name: _probe(client, name))
    if others := [name for name, answer in seen.items() if isinstance(answer, RepaveError) and answer.slug == "wrong-server"]:
        raise Refused(f"{fold(others)}: the BMC is another server's than the one we know; nothing was sent.")
    running = [name for name, answer in seen.items() if isinstance(answer, RepaveError) or answer["power"] != "off"]
    if not running:
        return
    image_of = {name: servers[name]["instance"]["image"] for name in running}
    how = "power is cut at once" if force else "shut down, and cut where they do not follow"
    for image in dict.fromkeys(image_of.values()):
        warn(f"  {fold(name for name in running if image_of[name] == image)}  {how}; installed: {image or 'an OS we did not install'}")
    words = f"{order} {len(running)}"
    confirm(f"Type  {words}  to start: ", words, yes=False)
