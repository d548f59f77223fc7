"""Crash at every point: one reinstall for each way a run may end, its points discovered by playing it once, then a death of the process at each.

Points: before and after the effect of each step and after its record, at each wait, before and after each commit of the store, before and after
each call to the BMC. `python tests/simulation/crash_points.py [--pairs N]` counts them all.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import observers
from acts import Asked
from sim_run import Meddling
from trouble import Trouble
from virtual_time import Stuck
from world import World

SEED = 4711
ENDINGS: dict[str, dict[str, dict[str, Any]]] = {
    "proved": {},
    "returned: preflight": {"other-machine": {}},
    "returned: power-off": {"bmc-refuses": {"action": "power_off"}},
    "returned: insert": {"insert-empty": {"times": 99}},
    "returned: no hello": {"no-hello": {}},
    "returned: override ignored": {"override-ignored": {}},
    "returned: disk swapped": {"disk-swapped": {}},
    "return-failed": {"bmc-refuses": {"action": "eject_media"}, "no-hello": {}},
    "write-failed: disk": {"disk-error": {"stage": "body-2", "times": 1}},
    "write-failed: silent": {"agent-dies": {"stage": "body-0", "times": 1}},
    "write-failed: other disk": {"other-disk": {}},
    "unproved": {"no-proof": {}},
    "unproved: password": {"password-unusable": {}},
    "late-proof": {"late-proof": {"late_s": 1900.0}},
    "rehearsed": {},
    "returned: an old proof comes": {"other-machine": {}},
    "proved: at the fourth tries": {"insert-empty": {"times": 3}, "bmc-busy": {"action": "power_on", "times": 3}},
    "return-failed: login refused": {"login-refused": {"action": "insert_media"}},
    "returned: no hello, learnt": {"no-hello": {}},
    "unproved: learnt": {"no-proof": {}},
    "proved: slow, learnt": {"slow-boot": {"slow_s": 550.0}},
}
PAST = dict.fromkeys((e for e in ENDINGS if e.endswith("learnt")), 12)
ASKED = {"rehearsed": Asked(rehearse=True)}
BEFORE = {"returned: an old proof comes": {"late-proof": {"late_s": 1900.0}}}  # a round that ended just before, in the same world


def play(
    ending: str, *, at: tuple[str, ...] = (), points: list[str] | None = None, meddling: Meddling | None = None, down_s: float = 5.0
) -> tuple[str, list[str]]:
    """The run's outcome and what is broken."""
    world = World(SEED, servers=1, blank_share=0.0, past=PAST.get(ending, 0))
    world.service.crashes.at, world.service.crashes.points = list(at), points
    world.service.crashes.down_s = down_s
    world.service.meddling = meddling or Meddling()
    try:
        try:
            if ending in BEFORE:
                world.play_round(["m0"], {"m0": _trouble(BEFORE[ending])}, settles=False)
            world.play_round(["m0"], {"m0": _trouble(ENDINGS[ending])}, asked=ASKED.get(ending))
        except Stuck as stuck:
            return "stuck", [f"I4 {stuck}"]
        outcome = world.disk.rows("SELECT outcome FROM runs WHERE epoch > 0 ORDER BY epoch DESC")
        missed = [f"the point {p} was not met" for p in world.service.crashes.at[: len(at) == 1]]
        return str(outcome[0][0]) if outcome else "none", observers.observe(world) + missed
    finally:
        world.close()


def _trouble(faults: dict[str, dict[str, Any]]) -> Trouble:
    return Trouble({name: dict(parameters) for name, parameters in faults.items()})


def discover(ending: str) -> list[str]:
    points: list[str] = []
    play(ending, points=points)
    return points


def judge(case: tuple[str, tuple[str, ...], float]) -> list[str]:
    """A run that was cut comes to the end it would have had, and nothing is broken."""
    ending, at, down_s = case
    outcome, broken = play(ending, at=at, down_s=down_s)
    wanted = ending.partition(":")[0]
    if outcome != wanted:
        broken.append(f"ended {outcome}, not {wanted}")
    return [f"{ending}, dead at {' and '.join(at)}: {b}" for b in broken]


def judge_steps(ending: str) -> tuple[Counter[str], list[str]]:
    """Played undisturbed; each step run twice; each failing for good; each wait timing out."""
    steps = list(dict.fromkeys(p.split()[1].rstrip("-1234") for p in discover(ending) if p.startswith("step ")))
    waits = list(dict.fromkeys(p.split()[1] for p in discover(ending) if p.startswith("wait ")))
    cases = [("twice", Meddling(twice=True)), *(("fails", Meddling(fails=s)) for s in steps if s not in ("end", "close-before-line"))]
    cases += [("times out", Meddling(silent=w)) for w in waits]
    counted: Counter[str] = Counter()
    outcome, found = play(ending)
    broken = [f"{ending}: {b}" for b in found]
    if outcome != ending.partition(":")[0]:
        broken.append(f"{ending}: ended {outcome}")
    for kind, meddling in cases:
        outcome, found = play(ending, meddling=meddling)
        counted["twice" if kind == "twice" else kind] += len(steps) if kind == "twice" else 1
        broken += [f"{ending}, {meddling}: {b}" for b in found]
        if kind == "twice" and outcome != ending.partition(":")[0]:
            broken.append(f"{ending}, each step twice: ended {outcome}")
    return counted, broken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200, help="double crashes, sampled")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=ENDINGS, help="this ending alone")
    parser.add_argument("--down", type=float, default=5.0, help="seconds until the next process is there; an agent's lease is 60")
    args = parser.parse_args()
    if args.only:
        for other in set(ENDINGS) - {args.only}:
            del ENDINGS[other]
    rng = random.Random(SEED)
    with ProcessPoolExecutor(args.jobs) as pool:
        points = dict(zip(ENDINGS, pool.map(discover, ENDINGS), strict=True))
        single = [(ending, (p,), args.down) for ending, found in points.items() for p in found]
        pairs = []
        for _ in range(args.pairs):
            ending = rng.choice(list(ENDINGS))
            pairs.append((ending, tuple(sorted(rng.sample(points[ending], 2), key=points[ending].index)), args.down))
        broken = [b for found in pool.map(judge, [*single, *pairs], chunksize=20) for b in found]
        counted: Counter[str] = Counter()
        for count, found in pool.map(judge_steps, ENDINGS):
            counted += count
            broken += found
    print(*broken[:200], sep="\n")
    kinds = Counter(p.split()[0] for _, (p,), _ in single)
    tries = sorted({p.split()[1] for _, (p,), _ in single if p.startswith("step ") and p.split()[1][-2:] in ("-2", "-3", "-4")})
    print(f"tries that were met: {' '.join(tries)}")
    print(f"points by kind: {dict(kinds)}; steps: {dict(counted)}")
    print(f"crash points: {len(single)} discovered, {len(single)} crashed at, {len(pairs)} double crashes, {len(broken)} violations")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
