"""Which waiting runs may begin. A batch may say: canaries first, so many at once, no more after so many failures; a site: so many at once, so many a rack.

A run that waits is only a row: it costs nothing, and what ends or frees a run lets the next ones begin in the same transaction.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waves:
    """What one batch asks for. None: no such rule."""

    canary: int | None = None  # so many go first, in the order of the request; the others begin when all of them went well
    at_once: int | None = None  # so many runs of this batch are under way at once
    max_failed: int | None = None  # one more failure than this stops the batch


@dataclass(frozen=True)
class Limits:
    """What the site allows. 0: no limit."""

    runs_at_once: int = 0
    rack_at_once: int = 0


class Phase(enum.StrEnum):
    """Where a run of a batch stands, as these rules see it."""

    WAITING = "waiting"
    UNDER_WAY = "under-way"
    GOOD = "good"
    BAD = "bad"
    ASIDE = "aside"  # cancelled, or stopped with its batch: no failure of its own


@dataclass(frozen=True)
class Place:
    """One run of a batch."""

    run_id: str
    batch_id: str
    number: int  # in the order of the request, from 1
    rack: str
    phase: Phase


@dataclass(frozen=True)
class Standing:
    """One batch: its rules, and all of its runs."""

    waves: Waves
    paused: bool
    places: Sequence[Place]


def find_stop_reason(batch: Standing) -> str | None:
    """Why this batch stops now; None: it goes on. A canary that did not go well stops it, whatever `max_failed` says."""
    waves, places = batch.waves, batch.places
    failed = sum(p.phase is Phase.BAD for p in places)
    if waves.max_failed is not None and failed > waves.max_failed:
        return f"{failed} of {len(places)} failed, max-failed {waves.max_failed}"
    lost = [p for p in places if waves.canary and p.number <= waves.canary and p.phase in (Phase.BAD, Phase.ASIDE)]
    return f"{len(lost)} of {waves.canary} canaries did not go well" if lost else None


def judge_waiting(batches: Mapping[str, Standing], under_way: Mapping[str, int], limits: Limits) -> dict[str, str]:
    """Why each waiting run waits; "" = it may begin now. Those that may are counted as begun for those after them.

    Args: under_way: runs of the whole site that are under way, by rack.
    """
    racks = Counter(under_way)
    verdicts: dict[str, str] = {}
    for batch in batches.values():
        at_once = sum(p.phase is Phase.UNDER_WAY for p in batch.places)
        canaries_open = any(_is_canary(batch, p) and p.phase is not Phase.GOOD for p in batch.places)
        for place in sorted(batch.places, key=lambda p: p.number):
            if place.phase is not Phase.WAITING:
                continue
            why = _why_waiting(batch, place, canaries_open, at_once, racks, limits)
            if not why:
                at_once += 1
                racks[place.rack] += 1
            verdicts[place.run_id] = why
    return verdicts


def _is_canary(batch: Standing, place: Place) -> bool:
    return batch.waves.canary is not None and place.number <= batch.waves.canary


def _why_waiting(batch: Standing, place: Place, canaries_open: bool, at_once: int, racks: Counter[str], limits: Limits) -> str:
    waves = batch.waves
    if batch.paused:
        return "the batch is paused"
    if canaries_open and not _is_canary(batch, place):
        return f"the {waves.canary} canaries go first"
    if waves.at_once is not None and at_once >= waves.at_once:
        return f"{waves.at_once} of this batch at once"
    if limits.runs_at_once and racks.total() >= limits.runs_at_once:
        return f"{limits.runs_at_once} at once in the whole site"
    if limits.rack_at_once and place.rack and racks[place.rack] >= limits.rack_at_once:
        return f"{limits.rack_at_once} at once in rack {place.rack}"
    return ""
