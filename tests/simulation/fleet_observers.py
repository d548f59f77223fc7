"""What fleets promise beyond I1-I15: I16 one worker acts for a run, I17 waves, limits, pauses and stops, I18 cancel, I19 rehearsals.

From outside: the calls that reached BMCs, the disks, what the client was answered and when; of the database the rows a client may read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

from far_end import CHANGES
from world import Round, World

from repave.domain.states import Ending

FORWARD = ("insert_media", "boot_from_media_once")  # what no run does on its way back
ASIDE = ("cancelled", "batch-stopped")
TICK_S = 0.001  # the database keeps microseconds
GOOD = (Ending.PROVED, Ending.LATE_PROOF, Ending.REHEARSED)
Runs = list[dict[str, Any]]
Seconds = Callable[[str], float]


def observe_fleet(world: World, runs: Runs, seconds: Seconds) -> list[str]:
    broken = one_hand(world, runs) + limits(world, runs, seconds) + calm(world, runs)
    for this in world.rounds:
        mine = [r for r in runs if r["batch_id"] == this.batch_id and this.batch_id]
        for check in (waves, stops, pauses, cancels, rehearsals):
            broken += check(world, this, mine, seconds)
    return broken


def one_hand(world: World, runs: Runs) -> list[str]:
    """I16: every change was asked for by the live run of its server, the newest; and once another worker has acted for a run, the old one never does."""
    broken, epochs = [], {r["id"]: r["epoch"] for r in runs}
    for name, machine in world.machines.items():
        changes = [c for c in machine.calls if c.action in CHANGES and c.action != "withdraw_media"]  # which belongs to no run: I11
        broken += [f"I16 {name}: {c.action} at {c.at:.0f} s by {c.executor_id} for a run that is not the live one" for c in changes if c.live - {c.run_id}]
        if any(epochs.get(a.run_id, 0) > epochs.get(b.run_id, 0) for a, b in itertools.pairwise(changes)):
            broken.append(f"I16 {name}: an older run acted after a newer one")
        for run_id in dict.fromkeys(c.run_id for c in changes):
            hands = [executor for executor, _ in itertools.groupby(c.executor_id for c in changes if c.run_id == run_id)]
            if len(set(hands)) < len(hands):
                broken.append(f"I16 {name}: workers acted by turns for one run: {hands}")
    return broken


def _most(runs: Iterable[dict[str, Any]], seconds: Seconds) -> int:
    """How many were under way at once. Who ends makes room for who begins in the same transaction."""
    edges = []
    for run in runs:
        if run["released_at"]:
            edges += [(seconds(run["released_at"]), 1), (seconds(run["ended_at"]) if run["ended_at"] else float("inf"), -1)]
    now = most = 0
    for _, change in sorted(edges):
        now += change
        most = max(most, now)
    return most


def limits(world: World, runs: Runs, seconds: Seconds) -> list[str]:
    """I17: never more under way than the site allows, in all and in one rack; and no run waits for ever."""
    allowed, broken = world.service.limits, []
    if allowed.runs_at_once and _most(runs, seconds) > allowed.runs_at_once:
        broken.append(f"I17 {_most(runs, seconds)} runs at once, {allowed.runs_at_once} allowed")
    racks = {world.instances[n].id: f"r{number % 2}" for number, n in enumerate(world.machines)}
    for rack in ("r0", "r1"):
        if allowed.rack_at_once and (most := _most((r for r in runs if racks[r["instance_id"]] == rack), seconds)) > allowed.rack_at_once:
            broken.append(f"I17 {most} runs at once in rack {rack}, {allowed.rack_at_once} allowed")
    return broken


def _class(run: dict[str, Any]) -> str:
    return str((json.loads(run["error"]) if run["error"] else {}).get("class", ""))


def waves(world: World, this: Round, runs: Runs, seconds: Seconds) -> list[str]:
    """I17: the canaries first and alone, so many at once, and one failure too many stops the batch."""
    asked, broken = this.asked.waves, []
    if asked.at_once and _most(runs, seconds) > asked.at_once:
        broken.append(f"I17 {_most(runs, seconds)} runs of a batch at once, {asked.at_once} asked for")
    first = [r for r in runs if asked.canary and r["number"] <= asked.canary]
    if first:
        went_well = max(seconds(r["ended_at"]) if r["ended_at"] and r["outcome"] in GOOD else float("inf") for r in first)
        if any(r["released_at"] and seconds(r["released_at"]) < went_well for r in runs if r not in first):
            broken.append("I17 a run began before all canaries went well")
    failed = [r for r in runs if r["outcome"] and r["outcome"] not in GOOD and _class(r) not in ASIDE]
    reason = world.disk.rows("SELECT stop_reason FROM batches WHERE id = ?", this.batch_id)
    too_many = sorted(r["ended_at"] for r in failed)[asked.max_failed or 0 :] if asked.max_failed is not None else []
    if too_many and any((r["ended_at"] or "z") > too_many[0] for r in runs) and not reason[0][0]:
        broken.append(f"I17 {len(failed)} failed, max_failed {asked.max_failed}, and the batch was not stopped")
    return broken


def stops(world: World, this: Round, runs: Runs, seconds: Seconds) -> list[str]:
    """I17: what was not started says so, and was not touched; after a batch was stopped nothing of it begins."""
    broken, touched = [], {c.run_id for m in world.machines.values() for c in m.calls}
    for run in runs:
        if run["released_at"]:
            continue
        cause = str((json.loads(run["error"]) if run["error"] else {}).get("cause", ""))
        if run["outcome"] != Ending.RETURNED or "not started" not in cause or run["id"] in touched:
            broken.append(f"I17 a run that was not started ended {run['outcome']}, saying {cause!r}, its server touched: {run['id'] in touched}")
    stopped = [seconds(at) for (at,) in world.disk.rows("SELECT at FROM events WHERE batch_id = ? AND type = 'batch.stopped'", this.batch_id)]
    if stopped and any(r["released_at"] and seconds(r["released_at"]) > stopped[0] for r in runs):
        broken.append("I17 a run began after its batch was stopped")
    return broken


def pauses(world: World, this: Round, runs: Runs, seconds: Seconds) -> list[str]:
    """I17: nothing of a paused batch begins."""
    began = [seconds(r["released_at"]) for r in runs if r["released_at"]]
    return [f"I17 a run began at {b:.0f} s, paused from {a:.0f} to {z:.0f} s" for a, z in this.asked.paused for b in began if a < b < z - TICK_S]


def cancels(world: World, this: Round, runs: Runs, seconds: Seconds) -> list[str]:
    """I18: a cancel is true to what it answered, and refused past the line. That what was found is there again is I6."""
    broken = [f"I18 cancelled, and the line was crossed (ended {r['outcome']})" for r in runs if _class(r) == "cancelled" and r["crossed_at"]]
    for run in runs:
        asked_at, answered_at, what = this.asked.cancelled.get(run["id"], (0.0, 0.0, ""))
        crossed = seconds(run["crossed_at"]) if run["crossed_at"] else None
        kept = {
            "": True,
            "ended": bool(run["ended_at"]) and seconds(run["ended_at"]) <= answered_at + 0.001,  # facts are whole microseconds
            "not-started": run["released_at"] is None and _class(run) == "cancelled",
            # A rehearsal that had learnt everything returns anyway.
            "returning": crossed is None and run["outcome"] in (Ending.RETURNED, Ending.RETURN_FAILED, Ending.REHEARSED),
            "past-the-line": crossed is not None and crossed <= answered_at,
        }[what]
        if what == "returning":
            calls = [c for m in world.machines.values() for c in m.calls if c.run_id == run["id"] and c.at > answered_at + TICK_S]
            broken += [f"I18 {c.action} at {c.at:.0f} s, after a cancel was answered" for c in calls if c.action in FORWARD]
        if not kept:
            broken.append(f"I18 a cancel said {what}, and the run ended {run['outcome']}, crossed {run['crossed_at']}")
        if (
            what
            and crossed is not None
            and crossed < asked_at - TICK_S
            and (run["ended_at"] is None or seconds(run["ended_at"]) > answered_at)
            and what != "past-the-line"
        ):
            broken.append(f"I18 a cancel past the line said {what}")
    return broken


def rehearsals(world: World, this: Round, runs: Runs, seconds: Seconds) -> list[str]:
    """I19: a rehearsal never crosses. That the disk is as it was, and the old system runs again, is I6."""
    if not this.asked.rehearse:
        return [f"I19 ended {r['outcome']}, and it was no rehearsal" for r in runs if r["outcome"] == Ending.REHEARSED]
    return [f"I19 a rehearsal crossed the line and ended {r['outcome']}" for r in runs if r["crossed_at"] or r["outcome"] in (Ending.PROVED, Ending.LATE_PROOF)]


def calm(world: World, runs: Runs) -> list[str]:
    """I4: where nothing goes wrong, every run ends well."""
    by_batch = {this.batch_id: this for this in world.rounds}
    stormy = any(t.faults for this in world.rounds for t in this.troubles.values()) or any(this.crashes or this.busy or this.stops for this in world.rounds)
    if stormy or world.service.meddling.stopped or any(this.asked.cancel for this in world.rounds):
        return []
    wanted = {r["id"]: Ending.REHEARSED if by_batch[r["batch_id"]].asked.rehearse else Ending.PROVED for r in runs if r["batch_id"] in by_batch}
    return [f"I4 nothing went wrong, and a run ended {r['outcome']}, not {wanted.get(r['id'])}" for r in runs if r["outcome"] != wanted.get(r["id"])]
