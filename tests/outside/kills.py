"""`make kills`: SIGKILLs of the real service at random moments of running batches of scripted machines, half on SQLite, half on PostgreSQL with two workers.

A moment is drawn from the process's start on: some deaths fall into its start, where it takes up what the life before left. No fault is planted, so
every run must end `running`; after each batch all observers judge.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from places import place_of_rack, place_of_workers
from watch import Watch

from repave.lab.demo import send_reinstall
from repave.lab.processes import end_on_sigterm, is_alive, start_detached
from repave.lab.rack import find_service, rack_down, rack_up, start_service_again
from repave.lab.workers import Workers, start_workers

PASSWORD = "Kills-7!canary"
MACHINES = 12
LIVES_S = (0.3, 5.0)  # a start takes 1.5 s on a quiet core, a batch of twelve some 12 s
KILLS_A_BATCH = 15


@dataclass
class Count:
    kills: int = 0
    runs: int = 0
    violations: int = 0


class Site(Protocol):
    """What a batch of kills needs of either half."""

    watch: Watch
    folder: Path

    def reinstall(self, password: str) -> None: ...
    def kill(self, rng: random.Random) -> int: ...
    def spawn(self) -> None: ...
    def start(self) -> None: ...


class OnSqlite:
    """One service on SQLite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lab = rack_up(MACHINES, scripted=True, folder=folder, debian=False)
        self.watch = Watch(place_of_rack(folder, self.lab, [PASSWORD]))
        service = find_service(folder)
        assert service is not None
        self.process = service

    def reinstall(self, password: str) -> None:
        sent_at = time.time()
        ids = send_reinstall(self.lab, self.lab["images"][0]["id"], password, [i["id"] for i in self.lab["instances"] if i["name"] != f"lab{MACHINES + 1:02}"])
        self.watch.accepted.append((sent_at, time.time(), ids))

    def kill(self, rng: random.Random) -> int:
        os.kill(self.process.pid, signal.SIGKILL)
        while is_alive(self.process):
            time.sleep(0.01)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process.pid, 0)
        return 1

    def spawn(self) -> None:
        command = [sys.executable, "-m", "repave.cli.main", "serve", str(self.folder / "site")]
        self.process = start_detached("repave-serve", command, log=self.folder / "service.log")

    def start(self) -> None:
        if find_service(self.folder) is None and not is_alive(self.process):
            self.process = start_service_again(self.folder)
            return
        self.kill(random.Random())
        self.process = start_service_again(self.folder)


class OnPostgres:
    """Two workers on PostgreSQL; one of them is killed, or in one of four cases both before either is started again."""

    def __init__(self, site: Workers) -> None:
        self.site, self.folder = site, site.folder
        self.watch = Watch(place_of_workers(site, [PASSWORD]))

    def reinstall(self, password: str) -> None:
        sent_at = time.time()
        self.site.reinstall([m.name for m in self.site.machines], password)
        self.watch.accepted.append((sent_at, time.time(), list(self.site.ids.values())))

    def kill(self, rng: random.Random) -> int:
        dying = self.site.workers if rng.random() < 0.25 else [rng.choice(self.site.workers)]
        for worker in dying:
            worker.kill()
        self.site.balance()
        return len(dying)

    def spawn(self) -> None:
        for worker in self.site.workers:
            if worker.process is None or worker.process.poll() is not None:
                self.site.spawn(worker)
        self.site.balance()

    def start(self) -> None:
        """Both answer. A worker whose process lives is given the time to."""
        deadline = time.monotonic() + 60
        for worker in self.site.workers:
            while True:
                if worker.process is None or worker.process.poll() is not None:
                    self.site.start(worker)
                with contextlib.suppress(Exception):
                    self.site.client(worker).get("/batches?limit=1")
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError(worker.log.read_text()[-2000:])
                time.sleep(0.1)
        self.site.balance()


@contextlib.contextmanager
def open_site(kind: str) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="rpk-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    os.environ["HUAWEICLOUD_SDK_HOME"] = str(folder)
    site: OnSqlite | OnPostgres
    try:
        if kind == "sqlite":
            try:
                site = OnSqlite(folder)
                yield site
                site.watch.close()
            finally:
                rack_down(folder)
        else:
            with start_workers(folder, machines=MACHINES, worker_beat_s=0.5, worker_fence_s=4.0, worker_lease_s=6.0) as workers:
                site = OnPostgres(workers)
                yield site
                site.watch.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kill_in_a_batch(site: Site, rng: random.Random, number: int, at_most: int) -> tuple[int, int, list[str]]:
    """SIGKILLs, reinstalls, and what is broken after the end."""
    watch, kills = site.watch, 0
    watch.begin()
    site.reinstall(f"{PASSWORD}-{number}")
    while kills < min(at_most, KILLS_A_BATCH):
        time.sleep(rng.uniform(*LIVES_S))
        if not watch.rows("SELECT id FROM runs WHERE ended_at IS NULL"):
            break
        kills += site.kill(rng)
        site.spawn()
    site.start()
    broken = watch.judge()
    runs = watch.rows(f"SELECT outcome, error FROM runs WHERE created_at > '{watch.began_at}'")
    broken += [f"I0 a run ended {run['outcome']}: {run['error']}" for run in runs if run["outcome"] != "proved"]
    return kills, len(runs), broken


def kill_on(kind: str, wanted: int, seed: int, *, at_most_s: float = 7200) -> Count:
    """At least `wanted` SIGKILLs on that database, over as many batches as it takes."""
    done, began = Count(), time.monotonic()
    with open_site(kind) as site:
        for number in range(1, 10_000):
            if done.kills >= wanted or time.monotonic() - began > at_most_s:
                break
            started = time.monotonic()
            kills, runs, broken = kill_in_a_batch(site, random.Random(f"{seed} {kind} {number}"), number, wanted - done.kills)
            done.kills, done.runs, done.violations = done.kills + kills, done.runs + runs, done.violations + len(broken)
            print(f"{kind} seed {seed} batch {number}: {kills} SIGKILLs, {runs} reinstalls, {time.monotonic() - started:.0f} s", flush=True)
            for line in broken:
                print(f"  {line}", flush=True)
            if broken and (keep := os.environ.get("REPAVE_KEEP")):
                shutil.copytree(site.folder, Path(keep) / f"{kind}-{number}", ignore=shutil.ignore_patterns("*.img", "pg", "*.raw", "chunks"))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    args = parser.parse_args()
    kinds = (args.only,) if args.only else ("sqlite", "postgresql")
    done = {kind: kill_on(kind, args.kills // len(kinds), args.seed) if kind in kinds else Count() for kind in ("sqlite", "postgresql")}
    kills, runs, violations = (sum(getattr(d, what) for d in done.values()) for what in ("kills", "runs", "violations"))
    print(f"kills: {kills} SIGKILLs ({done['sqlite'].kills} on SQLite, {done['postgresql'].kills} on PostgreSQL), {runs} reinstalls, {violations} violations")
    sys.exit(violations > 0 or kills < args.kills)


if __name__ == "__main__":
    end_on_sigterm()
    main()
