"""A thousand scripted machines in batches of 50, on PostgreSQL with two workers, beside one batch of 50 in the same run.

The machines' work (an agent's process, a BMC's answers, a disk) shares the cores with the service, so the makespan says what this one machine
can play; what a reinstall costs the service and its database is counted from their processes and from PostgreSQL's own counters.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import requests
import sqlalchemy as sa

from bench.plot import Series, render_plot
from bench.scripted_batch import POLL_S, describe_machine, percentile, read_rss_bytes, send_put
from repave.lab.workers import Worker, Workers, start_workers

BATCH = 50
DEADLINE_S = 1500
SERVICE_LEASE = {"worker_beat_s": 5.0, "worker_fence_s": 20.0, "worker_lease_s": 30.0}  # as in service: nobody is to be taken over here
PLOT = Path("docs/fleet.svg")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    """What `count` reinstalls took. CPU in seconds, of the workers and of the whole PostgreSQL."""

    count: int
    makespan_s: float
    worker_cpu_s: float
    database_cpu_s: float
    wal_bytes: int
    rows: int
    commits: int
    rss_bytes: int
    puts_s: list[float]
    statuses_s: list[float]


@dataclass
class Reading:
    at: float
    worker_cpu_s: float
    database_cpu_s: float
    wal_bytes: int
    rows: int
    commits: int


def main(machines: int = 1000) -> None:
    """Prints one table and draws docs/fleet.svg. A thousand machines take 10 minutes on 2 cores."""
    folder = Path(tempfile.mkdtemp(prefix="rpf-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    try:
        began = time.monotonic()
        with start_workers(folder, machines=machines, watch_bmcs=False, **SERVICE_LEASE) as site:
            print(f"{machines} machines registered in {time.monotonic() - began:.0f} s", flush=True)
            names = [m.name for m in site.machines]
            reinstall(site, names[:1])
            sizes = [n for n in (BATCH, 4 * BATCH) if n < machines] + [machines]
            costs = [tell(reinstall(site, names[:n])) for n in sizes]
        report(costs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(cost: Cost) -> Cost:
    print(f"{cost.count} reinstalls: {cost.makespan_s:.1f} s", flush=True)
    return cost


def report(costs: list[Cost]) -> None:
    first, last = costs[0], costs[-1]
    batches = last.count // BATCH
    print(f"\nfleet on one box, 2 workers on PostgreSQL; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n")
    rows = [("reinstalls", *(str(c.count) for c in costs))]
    rows.append(("PUT to the last `running`", *(f"{c.makespan_s:.1f} s" for c in costs)))
    rows.append(
        ("PUT answered, p50 and slowest", *(f"{1000 * statistics.median(c.puts_s):.0f}, {1000 * max(c.puts_s):.0f} ms of {len(c.puts_s)}" for c in costs))
    )
    rows.append(("GET status meanwhile, p50", *(f"{1000 * statistics.median(c.statuses_s):.1f} ms of {len(c.statuses_s)}" for c in costs)))
    rows.append(("GET status meanwhile, p99", *(f"{1000 * percentile(c.statuses_s, 99):.1f} ms" for c in costs)))
    rows.append(("workers' CPU per reinstall", *(f"{1000 * c.worker_cpu_s / c.count:.0f} ms" for c in costs)))
    rows.append(("PostgreSQL's CPU per reinstall", *(f"{1000 * c.database_cpu_s / c.count:.0f} ms" for c in costs)))
    rows.append(("rows written per reinstall", *(f"{c.rows / c.count:.0f}" for c in costs)))
    rows.append(("WAL per reinstall", *(f"{c.wal_bytes / c.count / 1024:.0f} KiB" for c in costs)))
    rows.append(("transactions per reinstall, reads too", *(f"{c.commits / c.count:.0f}" for c in costs)))
    rows.append(("RSS of the larger worker, at most", *(f"{c.rss_bytes / 1e6:.0f} MB" for c in costs)))
    print_table(rows)
    print(f"\n  {batches} batches of {BATCH} took {last.makespan_s / first.makespan_s:.1f} x one of them", flush=True)
    counts = [c.count for c in costs]
    series = [
        Series("workers' CPU", [(n, 1000 * c.worker_cpu_s / n) for n, c in zip(counts, costs, strict=True)]),
        Series("PostgreSQL's CPU", [(n, 1000 * c.database_cpu_s / n) for n, c in zip(counts, costs, strict=True)]),
        Series("wall clock, machines included", [(n, 1000 * c.makespan_s / n) for n, c in zip(counts, costs, strict=True)]),
    ]
    said = f"{describe_machine()}, {datetime.now():%Y-%m-%d}"
    PLOT.write_text(render_plot("Cost of one reinstall by reinstalls at once", "reinstalls at once", "ms per reinstall", series, note=said))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  " + row[0].ljust(widths[0]) + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True)), flush=True)


@dataclass
class Watch:
    """Asks each worker for the status of instances, as busy clients would, and looks at the workers' memory."""

    site: Workers
    ids: list[str]
    over: threading.Event = field(default_factory=threading.Event)
    took: list[float] = field(default_factory=list)
    rss_bytes: int = 0

    def ask(self, worker: Worker) -> None:
        with open_session(self.site) as session:
            number = 0
            while not self.over.wait(POLL_S):
                url = f"http://127.0.0.1:{worker.api}/v1/{self.site.project_id}/instances/{self.ids[number % len(self.ids)]}/status"
                began, number = time.monotonic(), number + 1
                session.get(url, timeout=60).raise_for_status()
                self.took.append(time.monotonic() - began)
                if worker.process is not None and number % 20 == 0:
                    self.rss_bytes = max(self.rss_bytes, read_rss_bytes(worker.process.pid))


def open_session(site: Workers) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.headers["X-Auth-Token"] = site.token
    return session


def reinstall(site: Workers, names: Sequence[str]) -> Cost:
    """All of them at once, 50 a PUT, the workers in turn. Raises RuntimeError where one does not run in the end."""
    watch = Watch(site, [site.ids[n] for n in names])
    askers = [threading.Thread(target=watch.ask, args=(worker,)) for worker in site.workers]
    before = read(site)
    for asker in askers:
        asker.start()
    try:
        puts, batches = [], []
        image = next(i["id"] for i in site.client().items("/images") if i["name"] == "tiny-1")
        for number, first in enumerate(range(0, len(names), BATCH)):
            worker = site.workers[number % len(site.workers)]
            with open_session(site) as session:
                url = f"http://127.0.0.1:{worker.api}/v1/{site.project_id}/instances"
                batch, took = send_put(session, url, image, watch.ids[first : first + BATCH])
            batches.append(batch)
            puts.append(took)
        wait_for(site, batches, before.at + DEADLINE_S)
        ended = time.monotonic()
    finally:
        watch.over.set()
        for asker in askers:
            asker.join()
    after = read(site)
    return Cost(
        len(names), ended - before.at, after.worker_cpu_s - before.worker_cpu_s, after.database_cpu_s - before.database_cpu_s,
        after.wal_bytes - before.wal_bytes, after.rows - before.rows, after.commits - before.commits, watch.rss_bytes, puts, watch.took,
    )  # fmt: skip


def wait_for(site: Workers, batches: Sequence[str], deadline: float) -> None:
    """The batches have ended. One is asked at a time: asking is load too."""
    for batch in batches:
        while (said := site.client().get(f"/batches/{batch}"))["state"] == "working":
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all run: {said['counts']}")
            time.sleep(0.5)
        if said["counts"]["running"] != sum(said["counts"].values()):
            raise RuntimeError(f"not all run: {said['counts']}")


def read(site: Workers) -> Reading:
    """PostgreSQL's counters are a second behind what its sessions did."""
    at = time.monotonic()
    time.sleep(1.5)
    with site.engine.connect() as conn:
        sums = "sum(tup_inserted + tup_updated + tup_deleted), sum(xact_commit)"
        rows, commits = conn.execute(sa.text(f"SELECT {sums} FROM pg_stat_database")).one()  # noqa: S608
        wal = conn.execute(sa.text("SELECT pg_current_wal_lsn() - '0/0'")).scalar_one()
    pids = [w.process.pid for w in site.workers if w.process is not None]
    postmaster = int((site.folder / "pg/data/postmaster.pid").read_text().splitlines()[0])
    return Reading(at, sum(map(read_cpu_s, pids)), read_family_cpu_s(postmaster), int(wal), int(rows), int(commits))


def read_cpu_s(pid: int, *, ended_children: bool = False) -> float:
    """User and system time of all its threads. (proc(5), fields 14 to 17 of stat)"""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11 : 15 if ended_children else 13]) / _TICKS_PER_S


def read_family_cpu_s(parent: int) -> float:
    """Of a process, its children and those that ended."""
    total = read_cpu_s(parent, ended_children=True)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                total += read_cpu_s(int(path.parent.name))
        except OSError:  # it has just ended: its time is its parent's now
            continue
    return total
