"""Ten thousand reinstalls in one simulated site: does a reinstall cost more when the database remembers many?

The world is that of tests/simulation: the real workflow, admission, rules and store on a virtual clock, fifty servers, a client that polls.
All CPU time is counted, the simulated machines' and the client's too, so only the growth says something of the service.
"""

from __future__ import annotations

import importlib
import sys
import time
from datetime import datetime
from pathlib import Path

from bench.plot import Series, render_plot
from bench.scripted_batch import describe_machine

SERVERS = 50
LAST = 10  # rounds of 50: what a mark is the mean of
PLOT = Path("docs/simulated.svg")


def main(reinstalls: int = 10_000) -> None:
    """Prints one table and draws docs/simulated.svg. 5 minutes of one core."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests/simulation"))
    world_module = importlib.import_module("world")
    trouble = importlib.import_module("trouble")
    warm = world_module.World(1)
    warm.play(chance=0.0)
    warm.close()
    world = world_module.World(20261124, servers=SERVERS, blank_share=0.0)
    world._ask_again = lambda this: None  # it compares whole databases: the cost would be its own
    costs, marks = list[float](), list[tuple[float, float]]()
    try:
        for number in range(1, reinstalls // SERVERS + 1):
            began = time.process_time()
            this = world.play_round(list(world.machines), {name: trouble.Trouble() for name in world.machines})
            costs.append(1000 * (time.process_time() - began) / SERVERS)
            if len(this.ended) != SERVERS:
                raise RuntimeError(f"round {number}: {len(this.ended)} of {SERVERS} ended")
            if number in (LAST, 2 * LAST, 5 * LAST, 10 * LAST, 20 * LAST) or number * SERVERS == reinstalls:
                marks.append((number * SERVERS, sum(costs[-LAST:]) / len(costs[-LAST:])))
                print(f"{number * SERVERS} reinstalls: {marks[-1][1]:.1f} ms each in the last {SERVERS * min(LAST, number)}", flush=True)
        outcomes = dict(world.disk.rows("SELECT outcome, count(*) FROM runs GROUP BY outcome"))
    finally:
        world.close()
    print(f"\n{reinstalls} simulated reinstalls, ended {outcomes}; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}")
    print(f"\n  the last {SERVERS * LAST} cost {marks[-1][1] / marks[0][1]:.2f} x the first {SERVERS * LAST}", flush=True)
    said = f"{describe_machine()}, {datetime.now():%Y-%m-%d}"
    title = "CPU of one simulated reinstall by reinstalls in the database"
    PLOT.write_text(render_plot(title, "reinstalls so far", "ms of CPU per reinstall, the simulated world included", [Series("simulator", marks)], note=said))
