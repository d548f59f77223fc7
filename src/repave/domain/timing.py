"""How long steps take: how long they took, what is usual, what is late. No estimate without history, and none that has stopped being true."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime

from repave.domain.model import Step

ENOUGH = 5  # runs of one model; with fewer a median says little
LATE_FACTOR, LATE_S = 1.5, 15.0  # late: half as long again as usual, and not for a few seconds
REAP_GRACE_S = 20 * 60.0  # a return may take four tries with a minute between them, each with a BMC at its slowest (90 s) and a graceful shutdown (60 s)

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
    by_step: dict[str, list[float]] = {}
    for durations in history:
        for name, seconds in durations.items():
            by_step.setdefault(name, []).append(seconds)
    return {name: round(statistics.median(values), 1) for name, values in by_step.items() if len(values) >= ENOUGH}


def is_late(seconds: float, usual_s: float | None) -> bool:
    return usual_s is not None and seconds > max(usual_s * LATE_FACTOR, usual_s + LATE_S)


def eta_s(step: Step, seconds: float, usual: Mapping[str, float]) -> float | None:
    """Seconds until a run in this step, there for so long, should be at its end. None where that is not known, or the step is late."""
    if step.value not in usual or is_late(seconds, usual[step.value]):
        return None
    rest = [usual.get(s.value, 0.0) for s in Step if s.number > step.number]
    return round(max(0.0, usual[step.value] - seconds) + sum(rest), 1)
