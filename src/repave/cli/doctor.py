"""What is wrong here and what to do: the verdict first and last, details only where something is not well. Nothing is powered, written or changed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from repave.cli.client import Client
from repave.cli.options import AsJson, Project
from repave.cli.output import Exit, Json, check_known, say, show, show_json, unfold
from repave.errors import RepaveError
from repave.folding import count, fold, size

_AT_ONCE = 8  # BMCs are slow, and we wait, not compute
_LEAST_ROOM_BYTES = 2 * 10**9  # a small image, stored


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `do` is empty where it is well."""

    level: Literal["ok", "warning", "problem"]
    about: str
    text: str = ""
    do: str = ""


def doctor(nodeset: str | None = None, /, *, project: Project = None, json: AsJson = False) -> int:
    """Whether reinstalls can be taken, and whether these servers' BMCs (default: all) answer as the servers we know.

    Exit code: 0 nothing stands in the way, 10 something does, 5 no service.

    Parameters
    ----------
    nodeset
        Only these servers' BMCs are asked.
    """
    client = Client(project)
    health = client.get_health()
    findings = [*_of_service(health)]
    if health["status"] == "ok":
        servers = client.items("/servers")
        names = unfold(nodeset) if nodeset else [s["name"] for s in servers]
        check_known(names, [s["name"] for s in servers])
        findings += [*_of_images(client), *_of_servers([s for s in servers if s["name"] in names]), *_of_bmcs(client, names)]
    problems, warnings, well = ([f for f in findings if f.level == level] for level in ("problem", "warning", "ok"))
    if json:
        show_json({"ready": not problems, "items": [asdict(f) for f in findings], "next": None})
    else:
        bad = [count(len(of), noun) for of, noun in ((problems, "problem"), (warnings, "warning")) if of]
        passed = f"{count(len(well), 'check')} passed"
        show(f"{'✗' if problems else '▲' if warnings else '✓'} {', '.join([*bad, passed])}.")
        for finding in [*problems, *warnings]:
            show(f"{'✗' if finding.level == 'problem' else '▲'} {finding.about}: {finding.text}" + (f"  → {finding.do}" if finding.do else ""))
        show("Not ready: see above." if problems else "Ready for reinstalls.")
    return Exit.FAILED if problems else Exit.OK


def _of_service(health: Json) -> Iterator[Finding]:
    for name, part in health["parts"].items():
        yield (
            Finding("ok", name) if part["ok"] else Finding("problem", name, f"{part['text']}, since {part['since']}", "docs/operations.md, then repave health")
        )


def _of_images(client: Client) -> Iterator[Finding]:
    images, room = client.items("/images"), client.get("/room")["image_bytes"]
    if not images:
        yield Finding("warning", "images", "there are none", "repave image import FILE")
    wanted = max([_LEAST_ROOM_BYTES, *(i["stored_bytes"] for i in images)])
    unused = [i["name"] for i in images if not i.get("servers", True)]
    do = f"repave image rm {unused[0]}" if unused else "repave image ls; repave image rm IMAGE; or raise images_quota_bytes"
    if room < wanted:
        yield Finding("warning", "image store", f"room for {size(max(0, room))} more, the next image may need {size(wanted)}", do)
    else:
        yield Finding("ok", "image store")


def _of_servers(servers: list[Json]) -> Iterator[Finding]:
    if not servers:
        yield Finding("warning", "servers", "there are none", "repave server add NAME --bmc https://ADDRESS --user USER")
    ended_badly = [s for s in servers if s["instance"]["state"] == "error" and s["instance"]["error"]]
    for code in dict.fromkeys(s["instance"]["error"]["code"] for s in ended_badly):
        same = [s for s in ended_badly if s["instance"]["error"]["code"] == code]
        yield Finding(
            "warning", fold(s["name"] for s in same), f"no OS that is proved: {code} {same[0]['instance']['error']['title']}", f"repave explain {code}"
        )
    for reason in dict.fromkeys(s["lock"]["reason"] for s in servers if s["lock"]):
        same = [s for s in servers if s["lock"] and s["lock"]["reason"] == reason]
        yield Finding("warning", fold(s["name"] for s in same), f"locked by {same[0]['lock']['by']}: {reason}", "leave it out, or repave server unlock")


def _of_bmcs(client: Client, names: list[str]) -> Iterator[Finding]:
    """Each BMC is asked once; those with the same answer are one finding."""

    def probe(name: str) -> Json | RepaveError:
        try:
            return client.post(f"/servers/{name}/probe", {})
        except RepaveError as error:
            return error

    if len(names) > _AT_ONCE:
        say(f"Asking {len(names)} BMCs, {_AT_ONCE} at a time.")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(names, pool.map(probe, names), strict=True))
    found = [(name, judge_bmc(answer)) for name, answer in answers.items()]
    for finding in dict.fromkeys(f for _, f in found if f.level != "ok"):
        yield Finding(finding.level, fold(name for name, f in found if f == finding), finding.text, finding.do)
    yield from (finding for _, finding in found if finding.level == "ok")


def judge_bmc(answer: Json | RepaveError) -> Finding:
    """What a probe's answer, or its failure, means for a reinstall."""
    if isinstance(answer, RepaveError):
        level: Literal["warning", "problem"] = "warning" if answer.slug == "not-allowed" else "problem"
        return Finding(level, "BMC", f"{answer.code} {answer.problem.title} {answer.detail}".rstrip(), answer.problem.do)
    if not answer["same"]:
        return Finding("problem", "BMC", "another server answers than the one we know", "check cabling and address; repave server replace after a board swap")
    if answer["unreachable"]:
        return Finding("problem", "BMC", f"it can not reach us: {answer['unreachable']} is a loopback address", f"set {answer['unreachable']} in repave.toml")
    if not answer["carrier"]:
        return Finding("warning", "BMC", "no virtual CD, and no HTTP boot", "a licence may be needed; or uefi_http_boot in the settings")
    if not answer["pinned"]:
        return Finding("warning", "BMC", "its certificate is not pinned", "repave server set NAME --repin")
    return Finding("ok", "BMC")
