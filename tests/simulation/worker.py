"""One process of the service, and its lease: the product's own lease.py in virtual time, where several work on one database."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from virtual_time import Life, VirtualTime

from repave.store.tables import WORKERS
from repave.workflow import lease as product
from repave.workflow.lease import Lease, LeaseTimes

if TYPE_CHECKING:
    from service import Service

# The real ones are 5, 20 and 30 s: eight times fewer looks, the same rules.
TIMES = LeaseTimes(beat_s=40.0, fence_s=160.0, lease_s=240.0)


class Worker:
    """A place for a process: it dies, is stopped for a while and goes on, and is started again."""

    def __init__(self, name: str) -> None:
        self.name, self.executor_id, self.life = name, "", Life("not started")
        self.life.ended = True
        self.begun = False  # it takes work
        self.lease: SimLease | None = None
        self.effects: Any = None
        self.reconciler: Any = None
        self.media_sweep: Any = None

    def works(self, now: float) -> bool:
        return self.begun and not self.life.ended and self.life.stopped_until <= now

    def require(self) -> None:
        """What the driver asks before each request that changes something."""
        if self.lease is not None:
            self.lease.require()


class _NeverStops:
    """`threading.Event` of a worker that is never asked to stop: it is killed."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time

    def wait(self, seconds: float) -> bool:
        self._time.sleep(seconds)
        return False

    def is_set(self) -> bool:
        return False


class LeaseClock:
    """What lease.py knows of time."""

    CLOCK_BOOTTIME = 0

    def __init__(self, time: VirtualTime) -> None:
        self.sleep = time.sleep
        self._time = time

    def clock_gettime(self, _: int) -> float:
        return self._time.now


class SimLease(Lease):
    """Beats, fences, reaps and ends as the product does; only lock files and threads are left out."""

    def __init__(self, service: Service, worker: Worker) -> None:
        self._service, self._worker, self._clock = service, worker, service.time
        self._times, self._slot, self.alone = TIMES, worker.name, False
        self.executor_id = worker.executor_id
        self._stop = _NeverStops(service.time)  # type: ignore[assignment]
        self._engine = service.disk.engine  # type: ignore[assignment]
        self._renewed_at, self._steady_since = service.time.now, 0.0

    def take(self) -> None:
        asked_at = self._clock.now
        row = {"executor_id": self.executor_id, "slot": self._slot, "host": "h", "application_version": "1", "reaped": False}
        with self._engine.connect().execution_options(repave_write=True) as conn, conn.begin():
            conn.execute(sa.insert(WORKERS).values(**row, beat_at_ms=self._now_ms()))
            conn.execute(self._reap_others[self._may_judge()])
        self._renewed_at = asked_at

    def start(self, take_over: Callable[[], None]) -> None:
        self._take_over = take_over
        self._reap()
        for loop in (self._beat, self._reap_forever):
            self._clock.spawn(f"{self.executor_id} {loop.__name__}", loop, life=self._worker.life)

    def _now_ms(self) -> sa.ColumnElement[int]:
        return sa.func.virtual_now_ms(type_=sa.BigInteger)  # the database's clock, as the product's: see durable.py

    def _end(self, why: str, code: int) -> None:
        self._clock.note(f"{self.executor_id} ends itself: {why}")
        if code != product.REAPED:
            self._service.errors.append(why)
        self._service.ended_themselves += 1
        self._service.die(self._worker, 5)
