"""Runs as bars on one axis of time, which begins when the batch was accepted. Positions are percents of the axis's length. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from repave.domain.model import Step
from repave.folding import duration, fold, fold_runs, glyph, parse_time, row_cells

Json = dict[str, Any]
FOLD_ABOVE = 12  # rows: a screen (ux.md 3)
_NICE_S = (15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800)
_TICKS = 7
_BEFORE = (Step.PREFLIGHT.value, Step.POWER_OFF.value, Step.INSERT_MEDIA.value)


@dataclass(frozen=True)
class Bar:
    """`kind` is its class in the style sheet: prepare, ramdisk, write, first-boot; late, failed; usual (pale, behind)."""

    x: str
    width: str
    kind: str
    title: str


@dataclass(frozen=True)
class Row:
    """One run, or equal ones. `crossed`: where the line was crossed."""

    id: str
    names: str
    servers: list[str]
    glyph: str
    state: str
    text: str
    bars: list[Bar]
    usual: list[Bar]
    crossed: str | None


@dataclass(frozen=True)
class Axis:
    length_s: float
    ticks: list[tuple[str, str]]  # position, label
    now: str | None

    def at(self, seconds: float) -> str:
        return f"{min(100.0, 100 * seconds / self.length_s):.1f}%"


def draw(batch: Json, *, now: datetime, unfold: bool) -> tuple[Axis, list[Row]]:
    """The axis and the rows: failed first, then late, then by name."""
    now_s = (now - parse_time(batch["created_at"])).total_seconds()
    runs = batch["runs"]
    groups = [[run] for run in sorted(runs, key=_order)] if unfold or len(runs) <= FOLD_ABOVE else fold_runs(runs)
    axis = _axis(batch, now_s)
    return axis, [_row(batch, axis, group, now) for group in groups]


def _order(run: Json) -> tuple[int, bool, str]:
    first = ("failed", "working", "waiting", "cancelled", "rehearsed", "running")
    return first.index(run["state"]), not run["late"], run["server"]


def _began_s(batch: Json, run: Json) -> float:
    began = (parse_time(run["started_at"]) - parse_time(batch["created_at"])).total_seconds() if run["started_at"] else 0.0
    return max(0.0, began)


def _axis(batch: Json, now_s: float) -> Axis:
    """As long as the longest run, or as the longest usually is; its end is a round number, so that it seldom moves."""
    live = batch["ended_at"] is None
    longest = max([60.0, *(_began_s(batch, r) + max(sum(r["durations_s"].values()), _usual_s(r) if live else 0.0) for r in batch["runs"] if r["started_at"])])
    longest = max(longest, now_s) if live else longest
    tick = next((s for s in _NICE_S if longest / s <= _TICKS), _NICE_S[-1])
    length = tick * math.ceil(longest * 1.02 / tick)
    ticks = [(f"{100 * s / length:.1f}%", duration(s)) for s in range(0, length, tick)]
    return Axis(float(length), ticks, f"{100 * now_s / length:.1f}%" if live else None)


def _usual_s(run: Json) -> float:
    return sum(run["usual_durations_s"].get(s.value, 0.0) for s in Step) if run["state"] == "working" else 0.0


def _row(batch: Json, axis: Axis, group: Sequence[Json], now: datetime) -> Row:
    slowest = max(group, key=lambda run: sum(run["durations_s"].values()))
    began, first = _began_s(batch, slowest), group[0]
    at, bars, crossed = began, list[Bar](), None
    steps = [s.value for s in Step if s.value in slowest["durations_s"]]
    for step in steps:
        seconds = slowest["durations_s"][step]
        if step == Step.WRITE_IMAGE.value and slowest["past_the_line"]:
            crossed = axis.at(at)
        last = step == steps[-1]
        kind = "failed" if last and slowest["state"] == "failed" else "late" if last and slowest["late"] else _kind(step)
        bars.append(Bar(axis.at(at), axis.at(seconds), kind, f"{step} {duration(seconds)}"))
        at += seconds
    cells = row_cells(group, now)
    identity = (
        first["server"] if len(group) == 1 else f"{first['state']}-{first['step_index']}-{first['error']['code'] if first['error'] else ''}-{cells[-1][:20]}"
    )
    row_id = "row-" + "".join(c if c.isalnum() else "-" for c in identity)
    state = "late" if first["late"] else first["state"]
    names = sorted(run["server"] for run in group)
    return Row(row_id, fold(names), names, glyph(first), state, " · ".join(filter(None, cells)), bars, _usual(axis, slowest, began), crossed)


def _kind(step: str) -> str:
    if step in _BEFORE:
        return "prepare"
    return {Step.BOOT_RAMDISK.value: "ramdisk", Step.WRITE_IMAGE.value: "write"}.get(step, "first-boot")


def _usual(axis: Axis, run: Json, began: float) -> list[Bar]:
    """What is usual for its model, from where it began."""
    bars, at = list[Bar](), began
    for step in Step:
        seconds = run["usual_durations_s"].get(step.value)
        if seconds:
            bars.append(Bar(axis.at(at), axis.at(seconds), "usual", f"usual: {step.value} {duration(seconds)}"))
            at += seconds
    return bars
