"""What /repave/v1 shows of batches and runs (ux.md 2): the same objects in API, CLI and pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from repave.domain.model import Batch, Event, RunRow, Step
from repave.domain.states import Ending
from repave.domain.timing import done_share, eta_s, is_late, learn_wait, step_durations, way_back_at

Json = dict[str, Any]
STATES = ("running", "working", "waiting", "failed", "rehearsed", "cancelled")
_PROVED = (Ending.PROVED.value, Ending.LATE_PROOF.value)
_CANCELLED = ("cancelled", "batch-stopped")


def run_state(run: RunRow) -> str:
    """One of STATES: the words of CLI and pages."""
    if run.ended_at is None:
        return "working" if run.started_at else "waiting"
    if run.outcome in _PROVED:
        return "running"
    if run.outcome == Ending.REHEARSED.value:
        return "rehearsed"
    return "cancelled" if run.outcome == Ending.RETURNED.value and (run.error or {}).get("class") in _CANCELLED else "failed"


def run_durations(run: RunRow, events: Sequence[Event], now: datetime) -> dict[str, float]:
    """Seconds in each step so far; write-image begins at the line."""
    if run.durations_s is not None:
        return run.durations_s
    mine = [e for e in events if e.run_id == run.id and e.type in ("run.step", "run.crossed")]
    return step_durations([(e.data.get("step", Step.WRITE_IMAGE.value), e.at) for e in mine], run.ended_at or now)


@dataclass(frozen=True)
class Beside:
    """What is shown with a run and not in its row."""

    server: str
    os_now: str | None
    durations_s: dict[str, float]
    usual: Mapping[str, float] = field(default_factory=dict)  # of its model, by step; empty with too little history
    slow: Mapping[str, float] = field(default_factory=dict)  # the same, slower than nine of ten
    why_waiting: str | None = None
    gives_up_at: datetime | None = None  # of a run under way: when its step, or the run, is ended


def when_given_up(run: RunRow, in_step_s: float, now: datetime, *, waits_s: Mapping[Step, float], alike_s: Sequence[float]) -> datetime:
    """When what this run waits for is given up: the site's setting, what was learnt of runs alike, and the run's deadline; whichever is first."""
    ends = [run.deadline_at if run.past_the_line else way_back_at(run)]
    waits = [waits_s[run.step]] if run.step in waits_s else []
    began = now - timedelta(seconds=in_step_s)
    ends += [began + timedelta(seconds=s) for s in [*waits, *([learn_wait(alike_s)["learnt_s"]] if learn_wait(alike_s) else [])]]
    return min(ends)


def run_json(run: RunRow, beside: Beside) -> Json:
    progress: dict[str, Any] = run.progress or {}
    # A small image is written between two progress messages; then only the report knows.
    done, total = (run.report or {}).get("bytes_written") or progress.get("bytes_done", 0), progress.get("bytes_total")
    writing_s = (run.seen_at - run.crossed_at).total_seconds() if run.seen_at and run.crossed_at else 0.0
    writing = run.step is Step.WRITE_IMAGE and run.ended_at is None and total
    working = run_state(run) == "working"
    in_step_s, usual_s = beside.durations_s.get(run.step.value, 0.0), beside.usual.get(run.step.value)
    late = working and is_late(in_step_s, usual_s)
    share = done_share(run.step, in_step_s, beside.usual, written=done / total if writing and total else None) if working else float(run.ended_at is not None)
    return {
        "id": run.id, "batch": run.batch_id, "server": beside.server, "instance_id": run.instance_id, "state": run_state(run), "step": run.step.value,
        "step_index": run.step.number, "steps": len(Step), "past_the_line": run.past_the_line, "stage": progress.get("stage"),
        "percent": round(100 * done / total) if writing else None, "bytes_written": done, "bytes_total": total,
        "rate_bytes_per_s": round(done / writing_s) if writing and writing_s > 0 else None, "attempt": 1, "created_at": run.created_at,
        "started_at": run.started_at, "deadline_at": run.deadline_at, "ended_at": run.ended_at, "outcome": run.outcome, "os_now": beside.os_now,
        "disk_serial": (run.plan or {}).get("disk_serial"), "error": run.error, "proof": run.proof, "durations_s": beside.durations_s,
        "write_stages_s": (run.report or {}).get("stages_s"), "waits_for": beside.why_waiting if run_state(run) == "waiting" else None,
        "usual_s": usual_s if working else None, "late": late, "done_percent": round(100 * share),
        "eta_s": eta_s(run.step, in_step_s, beside.usual) if working else None,
        "eta_high_s": eta_s(run.step, in_step_s, beside.slow) if working and not late else None,
        "gives_up_at": beside.gives_up_at if working else None, "cancelling": run.cancel is not None and run.ended_at is None,
        "usual_durations_s": dict(beside.usual), "rehearse": run.rehearse,
        "rehearsal": _rehearsal_json(run, beside.usual) if run.outcome == Ending.REHEARSED.value else None,
    }  # fmt: skip


def _rehearsal_json(run: RunRow, usual: Mapping[str, float]) -> Json:
    """What a rehearsal learnt: which disk, what else is in the server, how much there is to write and how long it should take."""
    learnt: Json = dict((run.report or {}).get("rehearsal") or {})
    inventory, plan = run.inventory or {}, run.plan or {}
    disk: Json = next((d for d in inventory.get("disks", []) if d["path"] == plan.get("disk_path")), {})
    took = run.durations_s or {}
    before_s = sum(took.get(s.value, 0.0) for s in Step if s.number < Step.WRITE_IMAGE.number)
    after_s = sum(usual.get(s.value, 0.0) for s in Step if s.number > Step.WRITE_IMAGE.number)
    # Without history: the new OS needs as long from power-on as the ramdisk did, at least.
    write_s = usual.get(Step.WRITE_IMAGE.value) or learnt.get("expected_fetch_s", 0.0)
    return learnt | {
        "disk": {name: disk.get(name) for name in ("path", "serial", "wwn", "model", "size_bytes")},
        "disks": len(inventory.get("disks", [])), "macs": inventory.get("macs"), "memory_bytes": inventory.get("memory_bytes"),
        "firmware": inventory.get("firmware"), "durations_s": took,
        "expected_s": round(before_s + write_s + (after_s or took.get(Step.BOOT_RAMDISK.value, 0.0))),
    }  # fmt: skip


def batch_json(batch: Batch, runs: Sequence[RunRow], image: str | None) -> Json:
    states = [run_state(r) for r in runs]
    counts = {name: states.count(name) for name in STATES}
    ended = "failed" if counts["failed"] else "cancelled" if counts["cancelled"] else "succeeded"
    return {
        "id": batch.id, "state": "working" if batch.ended_at is None else ended, "image_id": batch.image_id, "image": image,
        "created_at": batch.created_at, "created_by": batch.created_by, "ended_at": batch.ended_at, "counts": counts, "rehearse": batch.rehearse,
        "canary": batch.canary, "at_once": batch.at_once, "max_failed": batch.max_failed, "paused_at": batch.paused_at, "stopped": batch.stop_reason,
    }  # fmt: skip


def estimate_json(runs: Sequence[Json]) -> Json:
    """How far a batch is and how long it may take. No estimate while runs wait or one is late: one that stopped being true is not stretched."""
    open_ = [r for r in runs if r["state"] in ("working", "waiting")]
    etas, highs = [r["eta_s"] for r in open_], [r["eta_high_s"] for r in open_]
    known = bool(open_) and None not in etas
    return {
        "percent": round(sum(r["done_percent"] for r in runs) / len(runs)) if runs else 100,
        "eta_s": max(etas) if known else None, "eta_high_s": max(e or 0.0 for e in [*etas, *highs]) if known else None,
    }  # fmt: skip
