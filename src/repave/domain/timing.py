"""How long steps take: how long they took, what is usual, what is late, how long to wait. No estimate without history, and none that is no longer true."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from repave.domain.model import RunRow, Step

ENOUGH = 5  # runs of one model; with fewer a median says little
LATE_FACTOR, LATE_S = 1.5, 15.0  # late: half as long again as usual, and not for a few seconds
REAP_GRACE_S = 20 * 60.0  # a return may take four tries with a minute between them, each with a BMC at its slowest (90 s) and a graceful shutdown (60 s)

# How long to wait is learnt from this many proved runs alike (docs/adr/0003). Three times the slowest, for a firmware update doubles a boot; and ten minutes
# more at least, for one that was staged is applied at the next boot and takes so long by itself, however fast the server is.
ALIKE_ENOUGH, ALIKE_NEWEST = 8, 50
PATIENCE, PATIENCE_S = 3.0, 10 * 60.0

# Before the line a run turns back so long before its deadline: a return with a BMC at its slowest is a shutdown (60 + 80 s), override, eject and power on
# (80 s each), with a pause and a second try in reserve. What takes longer still has REAP_GRACE_S.
WAY_BACK_S = 10 * 60.0

# From the last byte of a write that moves, the run has at least so long: the read-back's longest pause, a restart of 12 minutes, the first boot's 30.
MOVED_S = 60 * 60.0


def step_durations(begun: Sequence[tuple[str, datetime]], end: datetime) -> dict[str, float]:
    """Seconds in each step. A step lasts until the next one begins; of one that began twice the first beginning counts."""
    first: dict[str, datetime] = {}
    for name, at in begun:
        first.setdefault(name, at)
    steps = sorted(first.items(), key=lambda item: item[1])
    ends = ([at for _, at in steps] + [end])[1:]
    return {name: round((until - at).total_seconds(), 1) for (name, at), until in zip(steps, ends, strict=True)}


def usual_durations(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median seconds of each step that enough of these runs have."""
    return {name: round(statistics.median(values), 1) for name, values in _by_step(history).items()}


def slow_durations(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """As `usual_durations`, but nine of ten were faster: the far end of an estimate."""
    return {name: round(statistics.quantiles(values, n=10, method="inclusive")[-1], 1) for name, values in _by_step(history).items()}


def _by_step(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    by_step: dict[str, list[float]] = {}
    for durations in history:
        for name, seconds in durations.items():
            by_step.setdefault(name, []).append(seconds)
    return {name: values for name, values in by_step.items() if len(values) >= ENOUGH}


def done_share(step: Step, seconds: float, usual: Mapping[str, float], *, written: float | None = None) -> float:
    """How much of its usual time a run in this step, there for so long, has behind it; 0 to 1, and a step that is late holds at its end.

    Without history each step counts the same. `written` is the share of the image that is on the disk: it knows more of that step than a clock.
    """
    whole = {s: usual.get(s.value, 0.0) for s in Step} if usual else {s: 1.0 for s in Step}
    before = sum(of for s, of in whole.items() if s.number < step.number)
    inside = written if written is not None else min(1.0, seconds / whole[step]) if usual and whole[step] else 0.0
    return (before + inside * whole[step]) / (sum(whole.values()) or 1.0)


def is_late(seconds: float, usual_s: float | None) -> bool:
    return usual_s is not None and seconds > max(usual_s * LATE_FACTOR, usual_s + LATE_S)


def eta_s(step: Step, seconds: float, usual: Mapping[str, float]) -> float | None:
    """Seconds until a run in this step, there for so long, should be at its end. None where that is not known, or the step is late."""
    if step.value not in usual or is_late(seconds, usual[step.value]):
        return None
    rest = [usual.get(s.value, 0.0) for s in Step if s.number > step.number]
    return round(max(0.0, usual[step.value] - seconds) + sum(rest), 1)


def learn_wait(took: Sequence[float]) -> dict[str, Any]:
    """How long to wait for what took so many seconds in the newest runs alike, and from what that is known. Empty where they are too few."""
    if len(took) < ALIKE_ENOUGH:
        return {}
    slowest_s = max(took)
    return {"learnt_s": max(slowest_s * PATIENCE, slowest_s + PATIENCE_S), "alike": len(took), "slowest_s": slowest_s}


def choose_wait(setting: str, setting_s: float, known: Mapping[str, Any] | None) -> tuple[float, str]:
    """Seconds to wait, and in words whose limit that is. The setting is the ceiling; `known` may say less: what was learnt, what the run's deadline leaves."""
    known = known or {}  # a step that an older version did tells nothing
    limits = [(setting_s, f"that is the setting {setting}")]
    if "learnt_s" in known:
        limits.append((known["learnt_s"], f"the slowest of {known['alike']} like it took {known['slowest_s'] / 60:.1f}"))
    if "left_s" in known:
        limits.append((known["left_s"], "the run's deadline left no more"))
    return min(limits, key=lambda limit: limit[0])


def way_back_at(run: RunRow) -> datetime:
    """When a run before the line turns back at the latest, so that what it found is there again by its deadline. Of a short time it keeps a quarter."""
    return run.deadline_at - min(timedelta(seconds=WAY_BACK_S), (run.deadline_at - (run.released_at or run.created_at)) / 4)
