"""Batches: ls, show, watch, wait, report, case, cancel, pause, resume, retry. Equal runs share a row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from cyclopts import App

from repave.cli.case import case
from repave.cli.client import Client
from repave.cli.following import ended_code, follow, is_batch_id, wait_for_runs
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import AsJson, PasswordStdin, Project, Yes
from repave.cli.output import Exit, Json, check_known, confirm, may_redraw, say, show, show_json, unfold, warn
from repave.cli.summary import show_summary
from repave.domain.waves import Waves
from repave.errors import RequestError
from repave.folding import CANCEL_ROWS, cancel_kind, fold, folded_rows, headline

app = App(name="batch")
app.command(case, name="case")
_LIST = {
    "ID": "id", "STATE": "state", "IMAGE": "image", "RUNNING": "counts.running", "WORKING": "counts.working", "WAITING": "counts.waiting",
    "FAILED": "counts.failed", "CREATED": "created_at", "BY": "created_by",
}  # fmt: skip
_REPORT = {
    "SERVER": "server", "STATE": "state", "STEP": "step", "PAST THE LINE": "past_the_line", "OS NOW": "os_now", "SECONDS": "took_s", "DISK": "disk_serial",
    "ERROR": "error_code", "CAUSE": "cause",
}  # fmt: skip


@app.command(name="ls")
def list_batches(*, limit: int = 20, project: Project = None, form: Form = TABLE) -> None:
    """List batches, newest first."""
    show_list(Client(project).items("/batches", limit=limit), _LIST, form)


@app.command(name="show")
def show_batch(batch_id: str | None = None, /, *, project: Project = None, json: AsJson = False) -> None:
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
def watch(batch_id: str | None = None, /, *, timeout: float | None = None, project: Project = None, json: bool = False) -> int:
    """Follow a batch (default: the newest) until it ends. On a terminal with keys: f failed runs only, u a row for each server, p pause or resume, ? the keys.

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


@app.command
def wait(*what: str, timeout: float | None = None, project: Project = None, json: bool = False) -> int:
    """Wait, silently, until batches or the newest runs of servers have ended (default: the newest batch). Then says how.

    Exit code: as of `watch`. After --timeout it names the servers that have not ended, their steps and why they wait.

    Parameters
    ----------
    what
        Ids of batches, or nodesets of servers: 'web[01-12]'. A server that was never reinstalled by Repave counts as ended.
    timeout
        Seconds to wait at most; the batches go on.
    json
        {items, next}: the runs that were waited for, as they are at the end.
    """
    client = Client(project)
    awaited = _runs_awaited(client, what)
    give_up_at = time.monotonic() + timeout if timeout is not None else None
    batches, in_time = [], True
    for batch_id, run_ids in awaited.items():
        batch, is_over = wait_for_runs(client, batch_id, run_ids, give_up_at)
        batches.append(batch | {"runs": [r for r in batch["runs"] if not run_ids or r["id"] in run_ids]})
        in_time = in_time and is_over
    runs = [run for batch in batches for run in batch["runs"]]
    open_ = [run for run in runs if not run["ended_at"]]
    if json:
        show_json({"items": runs, "next": None})
    else:
        for row in folded_rows(open_ or runs):
            show("  ".join(filter(None, row)))
    if not in_time:
        say(f"--timeout has passed: {fold(r['server'] for r in open_)} not ended; all goes on.  Next: repave watch {batches[-1]['id']}")
        return Exit.TIMEOUT
    failed = [run for run in runs if run["state"] == "failed"]
    if len(failed) == len(runs) > 0:
        return Exit.ALL_FAILED
    codes = [ended_code(batch | {"counts": Counter(r["state"] for r in batch["runs"])}) for batch in batches]
    return Exit.FAILED if failed else max(codes, default=Exit.OK)


def _runs_awaited(client: Client, what: Sequence[str]) -> dict[str, set[str]]:
    """By batch, the runs to wait for; an empty set: all of it."""
    awaited: dict[str, set[str]] = {} if what else {_newest(client): set()}
    known = [s["name"] for s in client.items("/servers")] if what else []
    for word in what:
        if is_batch_id(word):
            awaited[client.get(f"/batches/{word}")["id"]] = set()
            continue
        names = unfold(word)
        check_known(names, known)
        for name in names:
            for run in client.items("/runs", server=name, limit=1):
                if run["batch"] not in awaited or awaited[run["batch"]]:
                    awaited.setdefault(run["batch"], set()).add(run["id"])
    return awaited


@app.command
def report(batch_id: str | None = None, /, *, project: Project = None, form: Form = TABLE) -> int:
    """What became of each server of a batch (default: the newest): what it runs, how that was proved, or why not. Exit code: as of `watch`.

    As it is now, where the batch has not ended. With -o json the batch is beside the items.
    """
    client = Client(project)
    batch = client.get(f"/batches/{batch_id or _newest(client)}")
    rows = [_report_row(run) for run in batch["runs"]]
    if form.is_json:
        show_json({"items": rows, "next": None, "batch": {k: v for k, v in batch.items() if k != "runs"}})
    else:
        if form == TABLE:
            show(headline(batch) + (f" · {batch['state']}" if batch["state"] == "working" else " · ended"))
        show_list(rows, _REPORT, form)
    return Exit.OK if batch["state"] == "working" else ended_code(batch)


def _report_row(run: Json) -> Json:
    error, proof = run["error"] or {}, run["proof"] or {}
    return {
        "server": run["server"], "state": run["state"], "step": run["step"], "past_the_line": run["past_the_line"], "os_now": run["os_now"],
        "took_s": round(sum(run["durations_s"].values())) or None, "disk_serial": run["disk_serial"], "proved_disk_serial": proof.get("root_disk_serial"),
        "bytes_written": run["bytes_written"] or None, "error_code": error.get("code"), "cause": error.get("cause"), "untouched": error.get("untouched"),
        "started_at": run["started_at"], "ended_at": run["ended_at"], "run": run["id"],
    }  # fmt: skip


# ---- what may still be done to it ----


@app.command
def cancel(batch_id: str | None = None, nodeset: str | None = None, /, *, yes: Yes = False, project: Project = None, json: AsJson = False) -> int:
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
            warn(f"  {fold(same):24}  {kind:16}  {what:48}  {then}".rstrip())
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
def pause(batch_id: str | None = None, /, *, project: Project = None) -> None:
    """Begin nothing more of a batch (default: the newest); what is under way goes on."""
    client = Client(project)
    batch = client.post(f"/batches/{batch_id or _newest(client)}/pause", {})
    say(f"{batch['id']}: {batch['counts']['waiting']} wait, {batch['counts']['working']} under way go on.  Next: repave batch resume {batch['id']}")


@app.command
def resume(batch_id: str | None = None, /, *, project: Project = None) -> None:
    """Let a paused batch (default: the newest) go on."""
    client = Client(project)
    batch = client.post(f"/batches/{batch_id or _newest(client)}/resume", {})
    say(f"{batch['id']} goes on.  Next: repave watch {batch['id']}")


@app.command
def retry(
    batch_id: str | None = None, /, *, rehearse: bool = False, canary: int | None = None, at_once: int | None = None, max_failed: int | None = None,
    yes: Yes = False, expect: int | None = None, password_stdin: PasswordStdin = False, detach: bool = False, timeout: float | None = None,
    project: Project = None, json: AsJson = False,
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
