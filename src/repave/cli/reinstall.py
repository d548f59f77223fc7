"""Reinstall: the plan, the password, the typed confirmation, then the batch to its end. Nothing is sent before all of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from repave.cli.client import Client
from repave.cli.following import follow
from repave.cli.options import Project
from repave.cli.output import Exit, Json, Refused, Usage, check_known, confirm, count, input_line, is_terminal, read_secret, say, show, show_json, unfold, warn
from repave.domain.password import find_password_fault, user_for
from repave.domain.waves import Waves
from repave.folding import ALL_AT_ONCE, plan_headline, plan_lines


def reinstall(
    nodeset: str,
    /,
    *,
    image: str | None = None,
    rehearse: bool = False,
    canary: int | None = None,
    at_once: int | None = None,
    max_failed: int | None = None,
    ssh_key: list[Path] | None = None,
    user_data: Path | None = None,
    plan_only: bool = False,
    plan: str | None = None,
    skip_unready: bool = False,
    yes: bool = False,
    expect: int | None = None,
    password_stdin: bool = False,
    detach: bool = False,
    timeout: float | None = None,
    project: Project = None,
    json: bool = False,
) -> int:
    """Erase the root disk of each server and install an image on it.

    Shows the plan, asks for the new password and a typed confirmation, then follows the batch.

    Parameters
    ----------
    nodeset
        Names: web01, 'web[01-12]', 'web[01-14]!web13'.
    image
        Name or id; default: the image each server has now.
    rehearse
        Do everything up to the line on these servers, write nothing, boot what was there again, and tell what was learnt. They are down for
        about as long as two of their boots. No password is asked for.
    canary
        So many servers first, in the order of their names; the others begin when all of them run. One that fails stops the batch.
    at_once
        So many of them under way at once.
    max_failed
        One more failure than this stops the batch: what waits does not start, what is before the line goes back.
    ssh_key
        A public key file for the new OS's administrator; may be given several times.
    user_data
        A cloud-init file for the new OS.
    plan_only
        Show what would be erased and kept; touch nothing.
    plan
        The id of a plan that was looked at (--plan-only): exactly that, or nothing. So a second person can confirm it.
    skip_unready
        Leave out the servers that the plan has problems with, and say which.
    yes
        Do not ask; wants --expect.
    expect
        How many servers these must be. Another number is refused: a nodeset may have grown.
    password_stdin
        The new administrator password is the first line of stdin.
    detach
        Do not follow the batch.
    timeout
        Seconds after which to stop following; the batch goes on.
    json
        The plan, or the batch's events one a line, as JSON.
    """
    if not plan_only:
        refuse_unconfirmed(yes=yes, expect=expect)
    names = unfold(nodeset)
    if expect is not None and expect != len(names) and not skip_unready:
        raise Refused(f"{nodeset}: {count(len(names), 'server')}, not the {expect} expected; nothing was sent.")
    keys, data = [_read(path).strip() for path in ssh_key or ()], _read(user_data) if user_data else ""
    client = Client(project)
    check_known(names, [s["name"] for s in client.items("/servers")])
    target: Json = {"servers": names, "image": image}
    planned, waves = client.post("/plans", target), Waves(canary, at_once, max_failed)
    if skip_unready and planned["problems"]:
        target, planned = _without_unready(client, target, planned)
    if plan is not None and plan != planned["id"]:
        raise Refused(
            f"The plan is out of date: servers, disks, states or image changed, it is {planned['id']} now. Look again: --plan-only. Nothing was sent."
        )
    if plan_only:
        show_json(planned) if json else show(render_plan(planned, waves, rehearse=rehearse))
        return Exit.REFUSED if planned["problems"] else Exit.OK
    return begin(
        client, target, {"ssh_keys": keys, "user_data": data}, plan=planned, waves=waves, rehearse=rehearse, yes=yes, expect=expect,
        password_stdin=password_stdin, detach=detach, timeout=timeout, json=json,
    )  # fmt: skip


def _without_unready(client: Client, target: Json, plan: Json) -> tuple[Json, Json]:
    """The same for the servers that nothing stands in the way of. Raises Refused where there is none."""
    unready = {p["server"] for p in plan["problems"]}
    rest = [name for name in target["servers"] if name not in unready]
    for label, text in plan_lines(plan):
        if label == "PROBLEM":
            warn(f"  LEFT OUT {text}")
    if not rest:
        raise Refused("None of these servers is ready; nothing was sent.")
    target = target | {"servers": rest}
    return target, client.post("/plans", target)


def begin(
    client: Client, target: Json, extras: Json, *, plan: Json | None = None, waves: Waves = ALL_AT_ONCE, rehearse: bool, yes: bool, expect: int | None,
    password_stdin: bool, detach: bool, timeout: float | None, json: bool,
) -> int:  # fmt: skip
    """Plan, password and confirmation, then the batch to its end. Its exit code."""
    plan = plan or client.post("/plans", target)
    number = len(plan["erased"])
    if expect is not None and expect != number:
        raise Refused(f"{count(number, 'server')}, not the {expect} expected; nothing was sent.")
    (say if yes else warn)(render_plan(plan, waves, rehearse=rehearse))
    if running := _running_batch(plan):
        return _attach(client, running, timeout=timeout, json=json)
    if plan["problems"]:
        raise Refused("The plan has problems; nothing was sent. With --skip-unready the other servers go without these.")
    if not rehearse and not yes:
        say("Not sure? --rehearse does all up to the line, writes nothing and boots what is there again.")
    password = "" if rehearse else read_secret("New administrator password", from_stdin=password_stdin, variable="REPAVE_NEW_PASSWORD", twice=True)
    for os_type in sorted({e["os_type"] for e in plan["erased"]}) if not rehearse else ():
        if fault := find_password_fault(password, user=user_for(os_type)):
            raise Refused(f"The password {fault}; nothing was sent.")
    words = f"{'rehearse' if rehearse else 'erase'} {number}"
    confirm(f"Type  {words}  to start: ", words, yes=yes)
    batch = client.begin("/reinstall", target | extras | asdict(waves) | {"password": password, "plan": plan["id"], "rehearse": rehearse})
    if detach:
        show_json(batch) if json else show(batch["id"])
        say("Next: repave watch")
        return Exit.OK
    say(f"Batch {batch['id']} has begun. Ctrl-C leaves it running.")
    return follow(client, batch["id"], timeout_s=timeout, as_json=json)


def _running_batch(plan: Json) -> str | None:
    """The one batch that reinstalls all of these servers already: the same was asked for before."""
    batches = {(p.get("context") or {}).get("batch") for p in plan["problems"]}
    busy = {p["server"] for p in plan["problems"] if p["class"] == "in-progress"}
    return batches.pop() if len(batches) == 1 and busy == {e["server"] for e in plan["erased"]} else None


def _attach(client: Client, batch_id: str, *, timeout: float | None, json: bool) -> int:
    """A person may watch what runs; a script is refused, with the command that watches."""
    if not is_terminal():
        raise Refused(f"They are being reinstalled already, by batch {batch_id}; nothing was sent.  Next: repave watch {batch_id}")
    if input_line(f"They are being reinstalled already, by batch {batch_id}. Watch it? [Y/n] ").lower() not in ("", "y", "yes"):
        raise Refused(f"Nothing was sent.  Next: repave watch {batch_id}")
    return follow(client, batch_id, timeout_s=timeout, as_json=json)


def refuse_unconfirmed(*, yes: bool, expect: int | None) -> None:
    """Before anything is sent: a script says yes and how many, a person has a terminal to type on."""
    if yes and expect is None:
        raise Refused("--yes wants --expect N, the number of servers; nothing was sent.")
    if not yes and not is_terminal():
        raise Refused("There is no terminal to confirm on: give --yes --expect N. Nothing was sent.")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{path}: {error}.") from None


def render_plan(plan: Json, waves: Waves = ALL_AT_ONCE, *, rehearse: bool = False) -> str:
    """Erased, kept, problems; equal servers share a line."""
    return "\n".join([plan_headline(plan, rehearse=rehearse), *(f"  {label:7}  {text}" for label, text in plan_lines(plan, waves, rehearse=rehearse))])
