"""A worker dies with runs under way: how long until each of them goes on in another worker. And whether a busy machine ever loses a living one.

Two workers on one PostgreSQL, scripted machines. The lease is 6 s here and 30 s in service: what comes on top of the lease is what is
measured, and stays the same. The load of the second part is four busy processes a core beside batches that run.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from bench.scripted_batch import describe_machine, percentile
from repave.lab.workers import Worker, Workers, start_workers

MACHINES = 6
LEASE = {"worker_beat_s": 0.5, "worker_fence_s": 4.0, "worker_lease_s": 6.0}
LOAD_S = 60.0
PASSWORD = "Bench-7!takeover"  # noqa: S105  of scripted machines
DEADLINE_S = 300


def main(kills: int = 20) -> None:
    """Prints one table. About 20 s a kill on 2 cores, and 1 to 2 minutes of load."""
    folder = Path(tempfile.mkdtemp(prefix="rpt-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    try:
        with start_workers(folder, machines=MACHINES, **LEASE) as site:
            measure(site, kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(site: Workers, kills: int) -> None:
    rng, took, ended = random.Random(20261124), list[float](), 0  # noqa: S311  moments, not secrets
    killed: set[str] = set()
    for number in range(1, kills + 1):
        times = kill_once(site, rng.uniform(0.2, 3.0), killed)
        took += times
        ended += MACHINES
        print(f"kill {number}/{kills}: {len(times)} runs went on after {max(times, default=0):.1f} s", flush=True)
    print(f"\n{kills} kills, {len(took)} runs under way; lease {LEASE['worker_lease_s']:.0f} s; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n")
    lease = LEASE["worker_lease_s"]
    batches, false = under_load(site, killed)
    rows = [
        ("death to the run going on, p50", f"{statistics.median(took):.1f} s ({statistics.median(took) - lease:+.1f} s to the lease)"),
        ("death to the run going on, p99", f"{percentile(took, 99):.1f} s ({percentile(took, 99) - lease:+.1f} s to the lease)"),
        ("runs that ended `running`", f"{ended} of {kills * MACHINES}"),
        (f"false takeovers in {LOAD_S:.0f} s of load, {batches} batches", str(false)),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows), flush=True)


def kill_once(site: Workers, after_s: float, killed: set[str]) -> list[float]:
    """Seconds from the kill until each run of the dead worker was another's, or over. Raises RuntimeError where a run did not end `running`."""
    batch = site.reinstall([m.name for m in site.machines], PASSWORD)
    time.sleep(after_s)
    owned = list(site.owners().values())
    dead = max(site.workers, key=lambda w: owned.count(w.executor_id))
    dead.kill()
    killed.add(dead.executor_id)
    began, left, took = time.monotonic(), {r for r, owner in site.owners().items() if owner == dead.executor_id}, list[float]()
    site.balance()
    while left:
        owners = site.owners()
        queued = site.queued()
        for run in [r for r in left if owners.get(r) != dead.executor_id and r not in queued]:
            left.discard(run)
            took.append(time.monotonic() - began)
        if time.monotonic() - began > DEADLINE_S:
            raise RuntimeError(f"{len(left)} runs were not taken over")
        time.sleep(0.02)
    wait_for_end(site, next(w for w in site.workers if w is not dead), batch)
    site.start(dead)
    return took


def wait_for_end(site: Workers, worker: Worker, batch: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while (said := site.client(worker).get(f"/batches/{batch}"))["state"] == "working" and time.monotonic() < deadline:
        time.sleep(0.2)
    if said["counts"]["running"] != MACHINES:
        raise RuntimeError(f"not all run: {said['counts']}")


def under_load(site: Workers, killed: set[str]) -> tuple[int, int]:
    """Batches that ran, and living workers that were declared dead meanwhile."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
    batches, deadline = 0, time.monotonic() + LOAD_S
    try:
        while time.monotonic() < deadline:
            wait_for_end(site, site.workers[0], site.reinstall([m.name for m in site.machines], PASSWORD))
            batches += 1
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    return batches, len(set(site.reaped()) - killed)
