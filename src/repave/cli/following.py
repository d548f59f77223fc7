"""A batch followed to its end: a table on a terminal, lines in a pipe, events as JSON, or nothing. Watching owns nothing: Ctrl-C stops only the watching."""

from __future__ import annotations

import json as jsonlib
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from repave.cli.client import Client
from repave.cli.output import Exit, Json, may_redraw, progress_mode, say, show
from repave.cli.summary import show_summary
from repave.errors import RepaveError
from repave.folding import duration, fold, took

_POLL_S = 1.0
_HEARTBEAT_S = 60.0
_LOST_S = 600.0  # a service that restarts is back long before; a watcher that gives up loses nothing


def follow(client: Client, batch_id: str, *, timeout_s: float | None = None, as_json: bool = False) -> int:
    """The exit code of a batch followed to its end."""
    as_json = as_json or progress_mode() == "json"
    give_up_at = time.monotonic() + timeout_s if timeout_s is not None else None
    try:
        batch = _follower(as_json)(client, batch_id, give_up_at)
    except KeyboardInterrupt:
        say(f"\nThe batch goes on.  Next: repave watch {batch_id}")
        return Exit.CTRL_C
    if batch is None:
        say(f"--timeout has passed; the batch goes on.  Next: repave watch {batch_id}")
        return Exit.TIMEOUT
    if not as_json:
        show_summary(batch)
    return ended_code(batch)


def ended_code(batch: Json) -> Exit:
    failed, total = batch["counts"]["failed"], len(batch["runs"])
    if batch["stopped"]:
        return Exit.STOPPED
    if batch["counts"]["cancelled"] and not failed:
        return Exit.CANCELLED
    return Exit.OK if not failed else Exit.ALL_FAILED if failed == total else Exit.FAILED


def is_batch_id(word: str) -> bool:
    """Ids are UUIDs of version 7; no server's name looks so."""
    return re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", word) is not None


def wait_for_runs(client: Client, batch_id: str, run_ids: set[str], give_up_at: float | None) -> tuple[Json, bool]:
    """The batch as last seen, and whether these runs of it (none: all) have ended. Looked at least once."""
    batch = client.get(f"/batches/{batch_id}")
    for batch in batch_states(client, batch_id, give_up_at):
        if all(run["ended_at"] for run in batch["runs"] if not run_ids or run["id"] in run_ids):
            return batch, True
    return batch, batch["state"] != "working"


def _follower(as_json: bool) -> Callable[[Client, str, float | None], Json | None]:
    if as_json:
        return _follow_json
    if progress_mode() == "none":
        return _follow_silently
    return _follow_live if sys.stdout.isatty() and may_redraw() else follow_lines


def batch_states(client: Client, batch_id: str, give_up_at: float | None, *, pause: Callable[[float], None] = time.sleep) -> Iterator[Json]:
    """The batch again and again, the last time when it has ended. Survives a service that restarts. Ends early at `give_up_at`.

    `pause`: what is done between, for so many seconds.
    """
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
                say(f"Not live since {clock()}: {error.detail} Trying again; the batch goes on when the service does.")
        pause(_POLL_S)


def follow_lines(client: Client, batch_id: str, give_up_at: float | None, *, heartbeat_s: float = _HEARTBEAT_S) -> Json | None:
    """One line a change, equal changes on one line, and a heartbeat: silence means we are gone."""
    seen: dict[str, tuple[str, ...]] = {}
    batch, spoke = None, time.monotonic()
    for batch in batch_states(client, batch_id, give_up_at):
        if batch["state"] != "working" and not seen:  # it ended before we looked: nothing changes now, the summary says it all
            break
        changed: dict[tuple[str, ...], list[Json]] = {}
        for run in batch["runs"]:
            what = _change(run)
            if seen.get(run["id"]) != what:
                seen[run["id"]] = what
                changed.setdefault(what, []).append(run)
        for what, runs in changed.items():
            show(" ".join([clock(), fold(r["server"] for r in runs), *what, *([took(runs)] if what[0] == "running" else [])]))
            spoke = time.monotonic()
        if time.monotonic() - spoke >= heartbeat_s:
            show(f"{clock()} {_heartbeat(batch)}")
            spoke = time.monotonic()
    return batch if batch and batch["state"] != "working" else None


def _heartbeat(batch: Json) -> str:
    left = [f"left={duration(batch['eta_s'])}"] if batch.get("eta_s") is not None else []
    percent = [f"{batch['percent']}%"] if batch.get("percent") is not None else []
    return " ".join([batch["id"], *percent, *(f"{name}={number}" for name, number in batch["counts"].items()), *left])


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
    from rich.console import Console
    from rich.live import Live

    from repave.cli.keys import open_keys
    from repave.cli.live_table import LiveTable

    batch, console = None, Console()
    with open_keys() as keys, Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        table = LiveTable(client, live, console, keys)
        try:
            for batch in batch_states(client, batch_id, give_up_at, pause=table.wait):
                table.show(batch)
        finally:
            table.leave()
    return batch if batch and batch["state"] != "working" else None


def _follow_silently(client: Client, batch_id: str, give_up_at: float | None) -> Json | None:
    last = deque(batch_states(client, batch_id, give_up_at), maxlen=1)
    batch = last[0] if last else None
    return batch if batch and batch["state"] != "working" else None


def _follow_json(client: Client, batch_id: str, give_up_at: float | None) -> Json | None:
    """Events, one a line. Asked for again and again: a stream that is silent could not be left when the time is over."""
    after = 0
    for batch in batch_states(client, batch_id, give_up_at):
        try:
            # Read after the batch: what is there when it has ended is all there will be.
            while events := client.items("/events", batch=batch_id, after=after):
                for event in events:
                    after = event["seq"]
                    show(jsonlib.dumps(event, ensure_ascii=False))
        except RepaveError as error:
            if error.slug != "service-unreachable" or batch["state"] != "working":
                raise
        if batch["state"] != "working":
            return batch
    return None


def clock() -> str:
    return datetime.now(UTC).strftime("%H:%M:%SZ")
