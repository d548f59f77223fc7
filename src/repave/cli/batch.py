"""Batches: ls, show, watch, cancel, pause, resume, retry. Equal runs share a row; watching owns nothing, so Ctrl-C stops only the watching."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from cyclopts import App

from repave.cli.client import Client
from repave.cli.output import Exit, Json, check_known, confirm, count, may_redraw, say, show, show_json, show_list, unfold
from repave.domain.waves import Waves
from repave.errors import RepaveError, RequestError
from repave.folding import CANCEL_ROWS, GLYPHS, cancel_kind, duration, fold, fold_failures, folded_rows, headline, size, took

app = App(name="batch")
_POLL_S = 1.0
_HEARTBEAT_S = 60.0
_LOST_S = 600.0  # a service that restarts is back long before; a watcher that gives up loses nothing
_LIST = {
    "ID": "id", "STATE": "state", "IMAGE": "image", "RUNNING": "counts.running", "WORKING": "counts.working", "WAITING": "counts.waiting",
    "FAILED": "counts.failed", "CREATED": "created_at", "BY": "created_by",
}  # fmt: skip


@app.command(name="ls")
def list_batches(*, limit: int = 20, project: str | None = None, json: bool = False) -> None:
    """List batches, newest first."""
    show_list(Client(project).items("/batches", limit=limit), _LIST, as_json=json)


@app.command(name="show")
def show_batch(batch_id: str | None = None, /, *, project: str | None = None, json: bool = False) -> None:
    """One batch (default: the newest) and its runs, folded; each run whole with --json."""
    client = Client(project)
    batch = client.get(f"/batches/{batch_id or _newest(client)}")
    if json:
        show_json(batch)
    elif batch["state"] == "working":
        show("\n  ".join([headline(batch), *("  ".join(filter(None, row)) for row in folded_rows(batch["runs"]))]))
        say(f"Next: repave watch {batch['id']}")
    else:
        show_summary(batch)


@app.command
def watch(batch_id: str | None = None, /, *, timeout: float | None = None, project: str | None = None, json: bool = False) -> int:
    """Follow a batch (default: the newest) until it ends.

    Exit code: 0 all run, 10 some failed, 11 all failed, 12 stopped by its limit, 13 cancelled, 124 --timeout, 130 Ctrl-C.

    Parameters
    ----------
    timeout
        Seconds after which to stop watching; the batch goes on.
    json
        One event a line.
    """
    client = Client(project)
    batch_id = batch_id or _newest(client)
    if may_redraw() and not json:
        say("Ctrl-C stops the watching, not the batch.")
    return follow(client, batch_id, timeout_s=timeout, as_json=json)


# ---- what may still be done to it ----


@app.command
def cancel(batch_id: str | None = None, nodeset: str | None = None, /, *, yes: bool = False, project: str | None = None, json: bool = False) -> int:
    """Cancel what has not crossed the line of a batch (default: the newest), or of some of its servers: their old OS runs again.

    Says what will happen to each server before it asks. What is past the line finishes.
    """
    client = Client(project)
    batch = client.get(f"/batches/{batch_id or _newest(client)}")
    names = unfold(nodeset) if nodeset else [r["server"] for r in batch["runs"]]
    check_known(names, [r["server"] for r in batch["runs"]])
    kinds = {r["server"]: cancel_kind(r) for r in batch["runs"] if r["server"] in names}
    for kind, what, then in CANCEL_ROWS:
        if same := [name for name, k in kinds.items() if k == kind]:
            say(f"  {fold(same):24}  {kind:16}  {what:48}  {then}".rstrip())
    number = sum(k in ("before the line", "not started") for k in kinds.values())
    if number:
        confirm(f"Cancel {number}? [y/N] ", "y", yes=yes)
    items = client.post(f"/batches/{batch['id']}/cancel", {"servers": names if nodeset else []})["items"]
    if json:
        show_json({"items": items, "next": None})
    for meaning in () if json else dict.fromkeys(i["meaning"] for i in items):
        show(f"{fold(i['server'] for i in items if i['meaning'] == meaning)}  {meaning}")
    say(f"Next: repave watch {batch['id']}")
    return Exit.FAILED if any(i["result"] == "past-the-line" for i in items) else Exit.OK


@app.command
def pause(batch_id: str | None = None, /, *, project: str | None = None) -> None:
    """Begin nothing more of a batch (default: the newest); what is under way goes on."""
    client = Client(project)
    batch = client.post(f"/batches/{batch_id or _newest(client)}/pause", {})
    say(f"{batch['id']}: {batch['counts']['waiting']} wait, {batch['counts']['working']} under way go on.  Next: repave batch resume {batch['id']}")


@app.command
def resume(batch_id: str | None = None, /, *, project: str | None = None) -> None:
    """Let a paused batch (default: the newest) go on."""
    client = Client(project)
    batch = client.post(f"/batches/{batch_id or _newest(client)}/resume", {})
    say(f"{batch['id']} goes on.  Next: repave watch {batch['id']}")


@app.command
def retry(
    batch_id: str | None = None, /, *, rehearse: bool = False, canary: int | None = None, at_once: int | None = None, max_failed: int | None = None,
    yes: bool = False, expect: int | None = None, password_stdin: bool = False, detach: bool = False, timeout: float | None = None,
    project: str | None = None, json: bool = False,
) -> int:  # fmt: skip
    """Reinstall again what did not end well in a batch (default: the newest), each with its image: a new batch, after plan and confirmation.

    A rehearsal's retry is a rehearsal.
    The password is asked for again: the old one was destroyed when its run ended.
    """
    from repave.cli.reinstall import begin, refuse_unconfirmed

    refuse_unconfirmed(yes=yes, expect=expect)
    client = Client(project)
    target: Json = {"retry": batch_id or _newest(client)}
    rehearse = rehearse or bool(client.get(f"/batches/{target['retry']}")["rehearse"])
    waves = Waves(canary, at_once, max_failed)
    return begin(
        client, target, {}, waves=waves, rehearse=rehearse, yes=yes, expect=expect, password_stdin=password_stdin, detach=detach, timeout=timeout, json=json
    )


def _newest(client: Client) -> str:
    batches = client.items("/batches", limit=1)
    if not batches:
        raise RequestError("not-found", "There is no batch yet.")
    return str(batches[0]["id"])


# ---- following ----


def follow(client: Client, batch_id: str, *, timeout_s: float | None = None, as_json: bool = False) -> int:
    """The exit code of a batch followed to its end."""
    give_up_at = time.monotonic() + timeout_s if timeout_s is not None else None
    try:
        if as_json:
            batch = _follow_json(client, batch_id, give_up_at)
        elif sys.stdout.isatty() and may_redraw():
            batch = _follow_live(client, batch_id, give_up_at)
        else:
            batch = _follow_lines(client, batch_id, give_up_at)
    except KeyboardInterrupt:
        say(f"\nThe batch goes on.  Next: repave watch {batch_id}")
        return Exit.CTRL_C
    if batch is None:
        say(f"--timeout has passed; the batch goes on.  Next: repave watch {batch_id}")
        return Exit.TIMEOUT
    if not as_json:
        show_summary(batch)
    failed, total = batch["counts"]["failed"], len(batch["runs"])
    if batch["stopped"]:
        return Exit.STOPPED
    if batch["counts"]["cancelled"] and not failed:
        return Exit.CANCELLED
    return Exit.OK if not failed else Exit.ALL_FAILED if failed == total else Exit.FAILED


def _states(client: Client, batch_id: str, give_up_at: float | None) -> Iterator[Json]:
    """The batch again and again, the last time when it has ended. Survives a service that restarts. Ends early at `give_up_at`."""
    lost_at: float | None = None
    while give_up_at is None or time.monotonic() < give_up_at:
        try:
            batch = client.get(f"/batches/{batch_id}")
            if lost_at is not None:
                say("The service is back.")
            lost_at = None
            yield batch
            if batch["state"] != "working":
                return
        except RepaveError as error:
            if error.slug != "service-unreachable" or (lost_at is not None and time.monotonic() - lost_at > _LOST_S):
                raise
            if lost_at is None:
                lost_at = time.monotonic()
                say(f"Not live since {_clock()}: {error.detail} Trying again; the batch goes on when the service does.")
        time.sleep(_POLL_S)


def _follow_lines(client: Client, batch_id: str, give_up_at: float | None) -> Json | None:
    """One line a change, equal changes on one line, and a heartbeat: silence means we are gone."""
    seen: dict[str, tuple[str, ...]] = {}
    batch, spoke = None, time.monotonic()
    for batch in _states(client, batch_id, give_up_at):
        if batch["state"] != "working" and not seen:  # it ended before we looked: nothing changes now, the summary says it all
            break
        changed: dict[tuple[str, ...], list[Json]] = {}
        for run in batch["runs"]:
            what = _change(run)
            if seen.get(run["id"]) != what:
                seen[run["id"]] = what
                changed.setdefault(what, []).append(run)
        for what, runs in changed.items():
            show(" ".join([_clock(), fold(r["server"] for r in runs), *what, *([took(runs)] if what[0] == "running" else [])]))
            spoke = time.monotonic()
        if time.monotonic() - spoke >= _HEARTBEAT_S:
            show(f"{_clock()} {batch_id} " + " ".join(f"{name}={number}" for name, number in batch["counts"].items()))
            spoke = time.monotonic()
    return batch if batch and batch["state"] != "working" else None


def _change(run: Json) -> tuple[str, ...]:
    if run["state"] in ("running", "rehearsed"):
        return (run["state"],)
    if run["state"] == "waiting":
        return ("waiting", *((f"({run['waits_for']})",) if run["waits_for"] else ()))
    side = "past-the-line" if run["past_the_line"] else "before-the-line"
    code = (run["error"]["code"],) if run["error"] else ()
    late = (f"late (usual {duration(run['usual_s'])})",) if run["late"] else ()
    return (run["state"], f"{run['step_index']}/{run['steps']}", run["step"], *code, side, *late)


def _follow_live(client: Client, batch_id: str, give_up_at: float | None) -> Json | None:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    batch = None
    with Live(auto_refresh=False) as live:
        for batch in _states(client, batch_id, give_up_at):
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            for row in folded_rows(batch["runs"]):
                table.add_row(*(Text(cell) for cell in row))
            live.update(Group(Text(headline(batch), no_wrap=True, overflow="ellipsis"), table), refresh=True)
    return batch if batch and batch["state"] != "working" else None


def _follow_json(client: Client, batch_id: str, give_up_at: float | None) -> Json | None:
    """Events, one a line; the stream is taken up again where it broke off."""
    after = 0
    for batch in _states(client, batch_id, give_up_at):
        try:
            for event in client.follow(after, batch=batch_id):
                after = event["seq"]
                show(jsonlib.dumps(event, ensure_ascii=False))
                if give_up_at is not None and time.monotonic() > give_up_at:
                    return None
        except RepaveError as error:
            if error.slug != "service-unreachable":
                raise
        if batch["state"] != "working":
            return batch
    return None


# ---- what is shown ----


def show_summary(batch: Json) -> None:
    """Failures first, one block a cause, then what runs now, then the next command."""
    bad = [run for run in batch["runs"] if run["state"] in ("failed", "cancelled")]
    good = [run for run in batch["runs"] if run["state"] == "running"]
    show(f"{headline(batch)} · ended")
    for same in fold_failures(bad):
        error, step = same[0]["error"], f"{same[0]['step_index']}/{same[0]['steps']} {same[0]['step']}"
        side = "past the line" if same[0]["past_the_line"] else "before the line"
        where = f"{step} · {side}" if same[0]["started_at"] else "not started"
        show(f"  {GLYPHS[same[0]['state']]} {fold(r['server'] for r in same)}  {where} · {error['code']} {error['title']}")
        show(f"      cause      {error['cause']}\n      untouched  {error['untouched']}\n      do         {error['do']}")
    for image in dict.fromkeys(r["os_now"] for r in good):
        same = [r for r in good if r["os_now"] == image]
        show(f"  ✓ {fold(r['server'] for r in same)}  runs {image or 'the image'} after {took(same)} · proved: root-disk serial and one-time key matched")
    rehearsed = [run for run in batch["runs"] if run["state"] == "rehearsed"]
    for run in rehearsed:
        show(_rehearsed_line(run))
    if bad:
        show(f"Next: repave explain {bad[0]['error']['code'] if bad[0]['error'] else 'internal'}; then repave batch retry {batch['id']}")
    elif rehearsed:
        image = f" --image {batch['image']}" if batch["image"] else ""
        show(f"Next: repave reinstall '{fold(r['server'] for r in rehearsed)}'{image}")


def _rehearsed_line(run: Json) -> str:
    """What one rehearsal learnt: where it would write, how much, how long; and that nothing was written."""
    learnt = run["rehearsal"]
    disk, took = learnt["disk"], learnt["durations_s"]
    others = count(max(0, learnt["disks"] - 1), "other disk")
    rate = f" at {size(learnt['fetched_bytes'] / learnt['fetch_s'])}/s" if learnt.get("fetch_s") and learnt.get("fetched_bytes") else ""
    times = " · ".join(f"{name} {duration(took[name])}" for name in ("power-off", "insert-media", "boot-ramdisk") if name in took)
    return (
        f"  ✓ {run['server']}  rehearsed: nothing written, what was there runs again after {took([run])}\n"
        f"      disk       {disk['path']}, serial {disk['serial']}, {size(disk['size_bytes'] or 0)}; {others}, left alone\n"
        f"      to write   {size(learnt.get('data_bytes', 0))}, fetched as {size(learnt.get('stored_bytes', 0))}{rate}\n"
        f"      times      {times}; a reinstall should take about {duration(learnt['expected_s'])}"
    )


def _clock() -> str:
    return datetime.now(UTC).strftime("%H:%M:%SZ")
