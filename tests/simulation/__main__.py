"""`python tests/simulation --seeds 2000`: so many worlds on all cores; `--seed N` plays one again and tells what happened in it."""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import acts
import observers
from virtual_time import Stuck
from world import World

from repave.domain.timing import ALIKE_ENOUGH

CALM_SHARE = 0.45  # of the worlds: nothing goes wrong in them
SHARED_SHARE = 0.2  # two workers with leases
BLOCK = 20
LAST_LINE = {"cancel": "cancels", "rehearsal": "rehearsals", "retries": "retries", "pause": "pauses", "stopped batch": "stopped batches",
             "takeover": "takeovers", "stale": "stale workers that ended themselves", "learnt": "learnt limits"}  # fmt: skip


@dataclass
class Count:
    seeds: int = 0
    reinstalls: int = 0
    faulty: int = 0
    most_kinds: int = 0
    events: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Count) -> None:
        for name in ("seeds", "reinstalls", "faulty", "events"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.most_kinds = max(self.most_kinds, other.most_kinds)
        self.outcomes += other.outcomes
        self.kinds += other.kinds
        self.acts += other.acts
        self.broken += other.broken


def play_seed(seed: int, *, tell: bool = False) -> tuple[Count, str]:
    """One world; what is broken in it and its fingerprint."""
    draws = random.Random(f"site {seed}")
    calm, workers, limits = draws.random() < CALM_SHARE, 2 if draws.random() < SHARED_SHARE else 1, acts.draw_limits(draws)
    past = random.Random(f"past {seed}").choice((0, 0, 7, 12))
    world, found = World(seed, workers=workers, limits=limits, past=past), Count(seeds=1)
    if tell:
        world.time.lines = []
    try:
        try:
            world.play(chance=0.0 if calm else 0.75)
        except Stuck as stuck:
            found.broken.append((seed, f"I4 the world does not come to rest: {stuck}"))
        except Exception as error:  # of the simulator's own: told with its seed, as any other
            found.broken.append((seed, f"I0 {type(error).__name__}: {error}"))
        found.broken += [(seed, b) for b in observers.observe(world)]
        for this in world.rounds:
            around = {k for k, on in (("crash", this.crashes), ("database-busy", this.busy), ("worker-stopped", this.stops)) if on}
            for fired in (t.fired | around for t in this.troubles.values()):
                found.reinstalls += 1
                found.faulty += bool(fired)
                found.kinds.update(fired)
            found.most_kinds = max(found.most_kinds, len(set().union(around, *(t.fired for t in this.troubles.values()))))
        found.outcomes.update(str(row[0]) for row in world.disk.rows("SELECT outcome FROM runs WHERE epoch > 0"))
        found.events = world.time.events
        found.acts.update(_acts(world))
        if tell:
            print(*world.time.lines or (), sep="\n")
            for n, this in enumerate(world.rounds):
                print(f"round {n}:", {k: t.faults for k, t in this.troubles.items() if t.faults}, f"crashes {this.crashes}, busy {this.busy}")
            print(*world.disk.rows("SELECT server_id, epoch, outcome, error FROM runs"), sep="\n")
        return found, world.time.fingerprint()
    finally:
        world.close()


def _acts(world: World) -> Counter[str]:
    """What was asked and happened besides reinstalls."""
    counted: Counter[str] = Counter(takeovers=world.service.takeovers, **{"stale workers that ended themselves": world.service.ended_themselves})
    counted["worlds with two workers"] = len(world.service.workers) - 1
    counted["worlds with a past to learn from"] = world.past >= ALIKE_ENOUGH
    counted["learnt limits that ended a run"] = world.disk.rows("SELECT count(*) FROM runs WHERE error LIKE '% like it took %'")[0][0]
    counted["worlds with limits"] = bool(world.service.limits.runs_at_once or world.service.limits.rack_at_once)
    counted["stopped batches"] = world.disk.rows("SELECT count(*) FROM batches WHERE stop_reason IS NOT NULL")[0][0]
    counted["runs not started"] = world.disk.rows("SELECT count(*) FROM runs WHERE released_at IS NULL")[0][0]
    for this in world.rounds:
        asked, waves = this.asked, this.asked.waves
        counted["retries"] += bool(asked.retry)
        counted["rehearsals"] += asked.rehearse
        counted["pauses"] += len(asked.paused)
        for name in ("canary", "at_once", "max_failed"):
            counted[name] += getattr(waves, name) is not None
        counted.update(f"cancel: {what}" for _, _, what in asked.cancelled.values())
    return counted


def rest() -> None:
    """What a process has imported is never looked through for garbage again, and what worlds leave behind seldom."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def play_block(seeds: list[int]) -> Count:
    total = Count()
    for seed in seeds:
        total.add(play_seed(seed)[0])
    gc.collect()
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--at-most-s", type=float, default=1e9, help="begin no more seeds after so many seconds")
    parser.add_argument("--until-broken", action="store_true", help="begin no more seeds once something is broken")
    args = parser.parse_args()
    if args.seed is not None:
        found, fingerprint = play_seed(args.seed, tell=True)
        print(f"fingerprint {fingerprint}", *(b for _, b in found.broken), sep="\n")
        sys.exit(bool(found.broken))
    began, total = time.monotonic(), Count()
    blocks = [list(range(s, min(s + BLOCK, args.first + args.seeds))) for s in range(args.first, args.first + args.seeds, BLOCK)]
    with ProcessPoolExecutor(args.jobs, initializer=rest) as pool:
        for start in range(0, len(blocks), 2 * args.jobs):
            if time.monotonic() - began > args.at_most_s or (args.until_broken and total.broken):
                break
            for count in pool.map(play_block, blocks[start : start + 2 * args.jobs]):
                total.add(count)
    for seed, what in total.broken if args.until_broken else total.broken[:20]:
        print(f"seed {seed}: {what}\n    again: .venv/bin/python tests/simulation --seed {seed}")
    print("endings:", dict(total.outcomes.most_common()))
    print("faults:", dict(total.kinds.most_common()))
    print("acts:", dict(total.acts.most_common()))
    print(f"most kinds of fault in one world: {total.most_kinds}; {total.events:,} events; {time.monotonic() - began:.0f} s on {args.jobs} cores")
    share = round(100 * total.faulty / max(1, total.reinstalls))
    acted = ", ".join(f"{sum(n for k, n in total.acts.items() if k.startswith(what)):,} {name}" for what, name in LAST_LINE.items())
    print(f"simulation: {total.seeds:,} seeds, {total.reinstalls:,} reinstalls, {share} % with faults, {acted}, {len(total.broken)} violations")
    sys.exit(bool(total.broken))


if __name__ == "__main__":
    main()
