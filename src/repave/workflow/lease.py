"""A worker's lease: a dead worker's runs are taken over, and a slow one does nothing more before that.

Each process has an executor id that is never used again, a row in `workers` whose `beat_at_ms` it renews, and a lock file of its own.
Whoever has not beaten for `lease_s` by the database's clock is marked reaped, by any other worker, and its runs go back to the queue. A
worker that finds itself reaped ends at once, without any cleaning up: a clean-up is an effect too. One that has not been able to renew for
`fence_s` by its own clock does nothing on a server until it has renewed again: the database may be away, or it was stopped and goes on.

The kernel frees the lock file when its process dies, and `slot` names that very file on this very kernel: the next process with the same
slot need not wait for the lease of its predecessor. SQLite has one worker: the lock lies beside the database and there is nothing to renew.

What no check closes: the gap between `require` and the effect. So effects ask for a state, and the disk has the agent's own lease (engines.md 5).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import structlog

from repave.errors import RepaveError
from repave.store.tables import WORKERS

LOCK_S = 10.0
REAPED = 76  # exit codes, for a supervisor's log
BROKEN = 77
_FORGOTTEN_MS = 24 * 3600 * 1000

# Made once: see store/database.py. The others hold their worker's clock, and are made once a lease.
_LIVE = sa.select(WORKERS.c.executor_id).where(~WORKERS.c.reaped)

log = structlog.get_logger()


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds. `fence_s` well under `lease_s`; a request to a BMC that was sent in time should be over in the difference."""

    beat_s: float = 5.0
    fence_s: float = 20.0
    lease_s: float = 30.0


class LeaseLapsed(Exception):
    """The lease could not be renewed for a while, and is held again: what was under way is begun anew."""


class LeaseGiven(Exception):
    """This worker is stopping; another one may own its runs."""


class Lease:
    """This process's claim to run workflows. `shared`: folders that all workers of this database must have in common."""

    def __init__(self, engine: sa.Engine, lock_path: Path, *, version: str, times: LeaseTimes, shared: Sequence[Path] = ()) -> None:
        self._times, self._shared, self._version = times, shared, version
        self.alone = engine.dialect.name == "sqlite"
        self._lock_path = Path(f"{engine.url.database}.worker") if self.alone else lock_path
        self.executor_id = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self._stop, self._renewed_at = threading.Event(), _boot_s()
        self._steady_since = 0.0  # the database was there for us from then on: others had the chance to renew too
        self._threads: list[threading.Thread] = []
        self._engine = engine if self.alone else _own_connections(engine, times)

    def take(self) -> None:
        """The lock and a row are ours. Raises RepaveError conflict (the lock is held), not-this-site (a folder is not the other workers')."""
        self._lock = self._lock_path.open("a")
        if not _take_lock(self._lock.fileno()):
            raise RepaveError("conflict", "Another repave serve works on this database.")
        found, boot = os.fstat(self._lock.fileno()), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._slot = f"{boot}/{found.st_dev}/{found.st_ino}"
        for folder in self._shared:
            (folder / "workers").mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / "workers" / self.executor_id).touch()
        row = {"executor_id": self.executor_id, "slot": self._slot, "host": socket.gethostname(), "application_version": self._version}
        asked_at = _boot_s()
        with self._engine.connect().execution_options(repave_write=True) as conn, conn.begin():
            conn.execute(sa.insert(WORKERS).values(**row, beat_at_ms=self._now_ms(), reaped=False))
            conn.execute(self._reap_others[self._may_judge()])
        self._renewed_at = asked_at
        try:
            self._refuse_strangers()
        except RepaveError:
            self.give()
            raise

    def start(self, take_over: Callable[[], None]) -> None:
        """From here on it is renewed, and dead workers' runs are taken over."""
        self._take_over = take_over
        self._reap()
        if not self.alone:
            for loop in (self._beat, self._reap_forever):
                thread = threading.Thread(target=loop, daemon=True, name=f"lease{loop.__name__}")
                thread.start()
                self._threads.append(thread)

    def holds(self) -> bool:
        """No other worker can own our runs yet."""
        return not self._stop.is_set() and (self.alone or _boot_s() - self._renewed_at < self._times.fence_s)

    def require(self) -> None:
        """Returns at once where the lease is held: ask before every effect on a server.

        Blocks: until it was renewed. Then, or when we are stopping, raises LeaseLapsed or LeaseGiven: the effect must not go on.
        """
        if self.holds():
            return
        while not self._stop.is_set():
            if self.holds():
                raise LeaseLapsed
            time.sleep(0.05)
        raise LeaseGiven

    def stop_effects(self) -> None:
        """No effect begins any more."""
        self._stop.set()

    def is_given(self) -> bool:
        """We are stopping."""
        return self._stop.is_set()

    def give(self, *, idle: bool = True) -> None:
        """`idle`: nothing of ours acts on a server any more, so others take our runs at once; else when the lease has run out."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=5)
        for folder in self._shared:
            (folder / "workers" / self.executor_id).unlink(missing_ok=True)
        with contextlib.suppress(sa.exc.SQLAlchemyError):
            if idle:
                self._write(sa.update(WORKERS).where(WORKERS.c.executor_id == self.executor_id).values(reaped=True))
        if not self.alone:
            self._engine.dispose()
        self._lock.close()

    def sweep_markers(self, *, before: float) -> int:
        """Files of dead workers in the shared folders are gone; returns how many. One without a row may be starting, if it is not older than `before`."""
        count = 0
        with self._engine.connect() as conn:
            reaped = {executor: is_reaped for executor, is_reaped in conn.execute(sa.select(WORKERS.c.executor_id, WORKERS.c.reaped))}
        for marker in [path for folder in self._shared for path in (folder / "workers").iterdir()]:
            with contextlib.suppress(FileNotFoundError):  # another worker sweeps too
                if reaped.get(marker.name, marker.stat().st_mtime < before):
                    marker.unlink()
                    count += 1
        return count

    def list_live(self) -> list[str]:
        with self._engine.connect() as conn:
            return list(conn.execute(_LIVE).scalars())

    def find_versions(self, wanted: Collection[str]) -> set[str]:
        """Those versions of the workflow that another worker has which is surely alive. On SQLite there are no others.

        Blocks: a worker that is not known to be dead is waited for, until it renews (a beat) or its lease runs out. Ours is renewed meanwhile.
        """
        alive: set[str] = set()
        seen: dict[str, int] = {}
        others = sa.select(WORKERS).where(~WORKERS.c.reaped, ~self._lapsed(), WORKERS.c.executor_id != self.executor_id)
        while not self.alone:
            with self._engine.connect() as conn:
                found = [row for row in conn.execute(others) if row.application_version in wanted]
            alive |= {row.application_version for row in found if row.beat_at_ms > seen.setdefault(row.executor_id, row.beat_at_ms)}
            if {row.application_version for row in found} <= alive:
                break
            time.sleep(self._times.beat_s / 4)
            asked_at = _boot_s()
            if self._write(self._renew):
                self._renewed_at = asked_at
        return alive

    def _beat(self) -> None:
        while not self._stop.wait(self._times.beat_s):
            asked_at = _boot_s()
            try:
                if not self._write(self._renew):
                    self._end("another worker owns our runs now", REAPED)
                if asked_at - self._renewed_at > self._times.fence_s:
                    self._steady_since = _boot_s()
                self._renewed_at = asked_at  # when we asked, not when the answer came
            except sa.exc.SQLAlchemyError as error:
                log.warning("lease not renewed", error=type(error).__name__)

    def _reap_forever(self) -> None:  # apart from _beat: putting back 500 runs takes seconds
        while not self._stop.wait(self._times.beat_s):
            try:
                self._reap()
            except sa.exc.SQLAlchemyError as error:
                log.warning("takeover not possible", error=type(error).__name__)
            except Exception as error:
                self._end(f"takeover is broken: {type(error).__name__}", BROKEN)  # it must not look healthy

    def _reap(self) -> None:
        self._write(self._reap_others[self._may_judge()])
        self._write(self._forget)
        if self.executor_id in self.list_live():  # reaped ourselves, we have no say; _beat ends us
            self._take_over()

    def _may_judge(self) -> bool:
        """After an absence of the database, whoever is back first must not judge the others."""
        return self.holds() and _boot_s() - self._steady_since >= self._times.lease_s

    @functools.cached_property
    def _renew(self) -> sa.Update:
        return sa.update(WORKERS).where(WORKERS.c.executor_id == self.executor_id, ~WORKERS.c.reaped).values(beat_at_ms=self._now_ms())

    @functools.cached_property
    def _reap_others(self) -> dict[bool, sa.Update]:
        """Other workers that are dead are reaped: their lease ran out (by whether we may judge that), or we hold the lock that was theirs."""
        late, ours = self._lapsed(), WORKERS.c.slot == self._slot
        others = sa.update(WORKERS).where(WORKERS.c.executor_id != self.executor_id, ~WORKERS.c.reaped).values(reaped=True)
        return {True: others if self.alone else others.where(sa.or_(late, ours)), False: others if self.alone else others.where(ours)}

    def _lapsed(self) -> sa.ColumnElement[bool]:
        return WORKERS.c.beat_at_ms < self._now_ms() - int(self._times.lease_s * 1000)

    @functools.cached_property
    def _forget(self) -> sa.Delete:
        return sa.delete(WORKERS).where(WORKERS.c.reaped, WORKERS.c.beat_at_ms < self._now_ms() - _FORGOTTEN_MS)

    def _refuse_strangers(self) -> None:
        """Our row and files are there already, so of two that start at once, one sees the other."""
        for other in self.list_live():
            for folder in self._shared:
                if not (folder / "workers" / other).exists():
                    raise RepaveError("not-this-site", f"The worker {other} has another folder {folder.name!r}: all workers of a database share it.")

    def _write(self, statement: sa.Update | sa.Delete) -> int:
        with self._engine.connect().execution_options(repave_write=True) as conn, conn.begin():
            return conn.execute(statement).rowcount

    def _now_ms(self) -> sa.ColumnElement[int]:
        """The database's clock: the machines' clocks need not agree."""
        text = "CAST((julianday('now') - 2440587.5) * 86400000 AS integer)"
        return sa.literal_column(text if self.alone else "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)", sa.BigInteger)

    def _end(self, why: str, code: int) -> None:
        log.error("worker ends itself", why=why, executor=self.executor_id)
        os._exit(code)


def _own_connections(engine: sa.Engine, times: LeaseTimes) -> sa.Engine:
    """A beat never waits for a connection that requests hold, nor for a server that has gone without a word."""
    wait_ms = max(1000, int(times.fence_s * 500))
    options = {"connect_timeout": max(2, wait_ms // 1000), "tcp_user_timeout": wait_ms, "options": f"-c statement_timeout={wait_ms}"}
    return sa.create_engine(engine.url, pool_size=3, hide_parameters=True, pool_pre_ping=True, connect_args=options)


def _take_lock(descriptor: int) -> bool:
    """The kernel frees the lock when its holder is gone; a killed process may take seconds to finish its last fsync."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # counts suspend, which CLOCK_MONOTONIC does not
