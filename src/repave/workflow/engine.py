"""The `Run` port on DBOS, and what DBOS leaves to us. Only this module imports dbos.

Rules (engines.md 4): JSON serializer that keeps error classes; the run id is the only input; fixed `application_version`; started through
the queue only; its own event loop in its own thread; one worker process on SQLite, several on PostgreSQL, each with a lease (lease.py); a
reconciler outside the engine ends runs whose workflow died and finds silent agents. It runs in every worker: what it writes is compare-and-set.

Runs of a dead worker go on in one with the same `APPLICATION_VERSION`. Where that changes, workers of both run side by side until no run of
the old one is left (docs/operations.md); runs begun without a version go to the newest that was ever seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import structlog
from dbos import DBOS, DBOSClient, Serializer, _sys_db
from dbos._dbos import _get_dbos_instance

from repave.domain.model import RunRow, Step
from repave.domain.states import Ending
from repave.domain.timing import way_back_at
from repave.errors import DeadlinePassed, RepaveError, RunFailed
from repave.store import NewRun, Store
from repave.store.database import is_unavailable
from repave.workflow.lease import Lease, LeaseGiven, LeaseLapsed, LeaseTimes
from repave.workflow.reinstall import DEFAULT_WAITS, Effects, Waits, reinstall
from repave.workflow.run import Json, Run, open_message

QUEUE = "reinstalls"
APPLICATION_VERSION = "3"  # changes with the order or names of the workflow's steps, and with which errors (errors.py) it tries again after
CONCURRENT_RUNS = 200
RECONCILE_S = 15.0
SILENCE_S = 120.0  # past the lease: the agent renews every few seconds, so this is no slow network
_DATABASE_PAUSES_S = (1, 5, 15, 60)  # a locked file or a failover is no reason to end a run; effects may be repeated
_OVER = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")

DEFAULT_TIMES = LeaseTimes()

log = structlog.get_logger()


class RecordedBug(Exception):
    """What an unforeseen error becomes when it is replayed: not a RunFailed, so it takes the same way as the first time."""


class NotRecorded(BaseException):
    """The engine's own record failed with the database. Past DBOS, which takes an Exception for the workflow's outcome: it is no such thing."""


class JsonSerializer(Serializer):
    """All that the engine stores is JSON, and an error replayed after a crash has the class it had before."""

    def name(self) -> str:
        return "repave_json"

    def serialize(self, data: Any) -> str:
        return json.dumps(data, default=_encode)

    def deserialize(self, serialized_data: str) -> Any:
        return json.loads(serialized_data, object_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, RunFailed):
        return {"!error": type(value).__name__, "value": value.as_json(), "detail": value.detail}
    if isinstance(value, BaseException):
        return {"!error": "RecordedBug", "value": type(value).__name__}
    raise TypeError(f"{type(value).__name__} is not JSON: steps pass ids, numbers, texts, lists and dicts")


def _decode(value: dict[str, Any]) -> Any:
    if "!error" not in value:
        return {"args": tuple(value["args"]), "kwargs": value["kwargs"]} if value.keys() == {"args", "kwargs"} else value
    if value["!error"] == "RecordedBug":
        return RecordedBug(value["value"])
    kind = DeadlinePassed if value["!error"] == "DeadlinePassed" else RunFailed
    return kind(value["value"]["class"], value["detail"], **value["value"].get("context", {}))


def _keep_time(now: Callable[[], datetime]) -> None:
    """DBOS's waits end by the service's clock, which nobody can set (steady_clock.py); by its own, a clock that is set ends them all at once."""
    _sys_db.time = SimpleNamespace(**vars(time) | {"time": lambda: now().timestamp()})  # type: ignore[assignment, attr-defined]


@contextlib.contextmanager
def _apart(part: str, **about: str) -> Iterator[None]:
    """What goes wrong in here is not the others' trouble, and the next round may do better; a reconciler that died would be silence."""
    try:
        yield
    except Exception as error:
        log.error("reconcile failed", part=part, error=type(error).__name__, **about)


class DbosRun:
    """One run's port to time and effects."""

    def __init__(self, run_id: str, pool: ThreadPoolExecutor, lease: Lease) -> None:
        self.run_id, self._pool, self._lease = run_id, pool, lease

    async def step(self, name: str, effect: Callable[[str], Json]) -> Json:
        def act() -> Json:
            while True:
                try:
                    self._lease.require()
                    return effect(self.run_id)
                except LeaseLapsed:  # nobody took the run over: the effect is begun anew
                    continue
                except RunFailed as error:
                    if self._lease.is_given():  # our listeners are closed, so this may be our own doing: the step is done again in the next life
                        raise LeaseGiven from None
                    log.warning("step failed", run_id=self.run_id, step=name, error=error.slug)
                    raise

        async def call() -> Json:
            for pause_s in (*_DATABASE_PAUSES_S, None):
                try:
                    return await asyncio.get_running_loop().run_in_executor(self._pool, act)
                except LeaseGiven:  # we are stopping, and the run goes on elsewhere: nothing of this try may be recorded
                    await asyncio.Future[None]()
                except Exception as error:
                    if not is_unavailable(error):
                        raise
                    if pause_s is None:  # no end of the run: `_revive` has the step done again
                        log.warning("workflow stands still: the database or a disk", run_id=self.run_id, step=name, error=type(error).__name__)
                        raise NotRecorded from None
                    await asyncio.sleep(pause_s)

        return await DBOS.run_step_async({"name": name}, call)

    async def wait_for(self, event: str, deadline_s: float, why: str = "") -> dict[str, Json]:
        return open_message(event, await DBOS.recv_async(event, timeout_seconds=deadline_s), deadline_s, why)

    async def sleep(self, seconds: float) -> None:
        await DBOS.sleep_async(seconds)

    async def now(self) -> datetime:
        async def read() -> str:
            return datetime.now(UTC).isoformat()

        return datetime.fromisoformat(await DBOS.run_step_async({"name": "now"}, read))


class Engine:
    """Durable reinstalls in this process. One per process: DBOS is a singleton (pitfall 15)."""

    def __init__(
        self, store: Store, url: str, lock_path: Path, *, waits: Waits = DEFAULT_WAITS, times: LeaseTimes = DEFAULT_TIMES, shared: Sequence[Path] = (),
        workflow: Callable[[Run, Effects, Waits], Coroutine[Any, Any, str]] = reinstall,
    ) -> None:  # fmt: skip
        """`lock_path`: on a local disk. `shared`: folders that all workers of the database have in common."""
        self.store, self._url, self._waits, self._workflow = store, url, waits, workflow
        self._idle_s = times.fence_s  # a worker that is stopped inside a transaction of DBOS's loses its locks before its lease
        self.lease = Lease(store.engine, lock_path, version=APPLICATION_VERSION, times=times, shared=shared)
        self.when_idle: Callable[[], None] = lambda: None  # asked at each look while no run is under way
        self._client: DBOSClient | None = None
        self._lost: set[str] = set()  # workflows that nothing ran when we looked last
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="effect")

    def start(self, effects: Effects, *, first: Callable[[], object] = lambda: None) -> None:
        """Workflows run, those of dead workers go on. Raises RepaveError: see `Lease.take`. `first` is asked when the lock is held and nothing runs yet."""
        self.lease.take()
        try:
            first()
            self._refuse_orphans()
        except BaseException:
            self.lease.give()
            raise
        launched = threading.Event()
        failure: list[BaseException] = []

        def run_loop() -> None:
            try:
                self._launch(effects)
            except BaseException as error:
                failure.append(error)
            launched.set()

        # Launched outside any event loop, DBOS makes its own loop in its own thread: a slow step never stops the API (pitfall 16).
        thread = threading.Thread(target=run_loop, name="engine", daemon=True)
        thread.start()
        launched.wait()
        if failure:
            raise failure[0]
        self._client = DBOSClient(
            system_database_url=self._url, serializer=JsonSerializer(), application_name="repave", sys_db_idle_transaction_timeout_sec=self._idle_s
        )  # fmt: skip
        self.store.tell = self._tell
        self.lease.start(self._take_over)
        reconciler = threading.Thread(target=self._reconcile_forever, name="reconciler", daemon=True)
        reconciler.start()
        self._threads = [thread, reconciler]

    def _refuse_orphans(self) -> None:
        """Raises upgrade-unfinished where live runs were begun in a version that no worker has: nothing would go on with them until their deadline."""
        table, engine = self._workflow_status, self.store.engine
        if not sa.inspect(engine).has_table(table.name, schema=table.schema):
            return
        begun = sa.select(table.c.workflow_uuid, table.c.application_version).where(table.c.status.in_(("PENDING", "ENQUEUED")))
        with engine.connect() as conn:
            versions: dict[str, str | None] = {run_id: version for run_id, version in conn.execute(begun)}
        begun_by = [versions.get(run.id) for run in self.store.runs.list_runs(live=True)]
        others = {version for version in begun_by if version is not None} - {APPLICATION_VERSION}
        known = self.lease.find_versions(others)
        if orphans := [version for version in begun_by if version in others - known]:
            said = ", ".join(sorted(set(orphans)))
            raise RepaveError("upgrade-unfinished", f"{len(orphans)} runs were begun by version {said} of the workflow; this one has {APPLICATION_VERSION}.")

    def _launch(self, effects: Effects) -> None:
        _keep_time(self.store.now)
        DBOS(
            config={
                "name": "repave",
                "system_database_url": self._url,
                "executor_id": self.lease.executor_id,
                "application_version": APPLICATION_VERSION,
                "serializer": JsonSerializer(),
                "max_executor_threads": 32,
                "sys_db_idle_transaction_timeout_sec": self._idle_s,
                "log_level": "WARNING",
                "notification_listener_polling_interval_sec": 0.25,
                "db_engine_kwargs": {"pool_use_lifo": True},  # as store/database.py
            }
        )
        pool, waits, lease, workflow = self._pool, self._waits, self.lease, self._workflow

        @DBOS.workflow(name="reinstall", max_recovery_attempts=1000)
        async def reinstall_workflow(run_id: str) -> str:
            try:
                return await workflow(DbosRun(run_id, pool, lease), effects, waits)
            except sa.exc.DBAPIError as error:
                if is_unavailable(error):
                    log.warning("workflow stands still: the database", run_id=run_id)
                    raise NotRecorded from None  # its row stays as it is, and `_revive` finds it
                raise

        DBOS.launch()
        DBOS.register_queue(QUEUE, global_concurrency=CONCURRENT_RUNS, polling_interval_sec=0.1)

    def stop_effects(self) -> None:
        """No effect begins any more, and one that fails from now on is not recorded: it is done again in the next life."""
        self.lease.stop_effects()

    def stop(self) -> None:
        """Nothing of the engine runs any more; what was under way goes on at the next start."""
        self._stop.set()
        DBOS.destroy()  # from here on a fact can not be told: its transaction fails, and who reported it asks again
        self.lease.stop_effects()
        if self._client is not None:
            self._client.destroy()
        self._pool.shutdown(wait=False, cancel_futures=True)
        ending = threading.Thread(target=self._pool.shutdown, daemon=True)
        ending.start()
        for thread in (*self._threads, ending):
            thread.join(timeout=5)
        self.lease.give(idle=not ending.is_alive())

    def _take_over(self) -> None:
        """Runs whose worker is dead are back in the queue, before all that have not begun. Harmless to repeat, also from several workers."""
        table = self._workflow_status
        c = table.c
        ours = sa.and_(c.status == "PENDING", c.application_version == APPLICATION_VERSION)  # runs of another go on in a worker of it alone
        with self.store.engine.connect() as conn:
            owners = set(conn.execute(sa.select(c.executor_id).where(ours).distinct()).scalars())
        dead = sorted(owners - set(self.lease.list_live()))  # in this order: who owned a run then has its row in `workers` by now
        if not dead:
            return
        with self.store.write() as conn:
            conn.execute(sa.update(table).where(c.executor_id.in_(dead), ours).values(priority=0))
        taken = DBOS._recover_pending_workflows(dead)  # private in 3.4: touches only rows that these ids still own, and of our version
        log.warning("took over", runs=len(taken), workers=dead)

    def enqueue(self, conn: sa.Connection, runs: Sequence[NewRun]) -> None:
        """The runs' workflows are queued when the caller's transaction commits. A run's id is its workflow's id."""
        assert self._client is not None
        for run in runs:
            self._client.enqueue_in_transaction(
                conn,
                {
                    "workflow_name": "reinstall",
                    "queue_name": QUEUE,
                    "workflow_id": run.id,
                    "workflow_id_reuse_policy": "reject",
                    "priority": 10,
                },
                run.id,
            )

    def _tell(self, conn: sa.Connection, run_id: str, event: str, message: dict[str, Any]) -> None:
        assert self._client is not None
        self._client.send_in_transaction(conn, run_id, message, topic=event, idempotency_key=f"{run_id}:{event}")

    def _reconcile_forever(self) -> None:
        while not self._stop.wait(RECONCILE_S):
            for part in (self._revive, self.reconcile):
                with _apart(part.__name__):
                    part()

    def _revive(self) -> None:
        """Workflows of ours that nothing runs any more go on: DBOS waits for a locked database, a full one ends them (NotRecorded), or they never began.

        Only what was lost in the round before too: between its dequeuing and its begin a workflow is not active yet. One that is running after all
        loses its claim by this and stops at its next record (DBOS's `owner_xid`).
        """
        table, dbos = self._workflow_status, _get_dbos_instance()  # private in 3.4, as is all of this
        c = table.c
        mine = sa.and_(c.status == "PENDING", c.executor_id == self.lease.executor_id)
        with self.store.engine.connect() as conn:
            lost = set(conn.execute(sa.select(c.workflow_uuid).where(mine)).scalars()) - set(dbos._active_workflows_set.activeList())
        again = lost & self._lost
        if again:
            with self.store.write() as conn:  # before all that have not begun, as in a takeover
                conn.execute(sa.update(table).where(c.workflow_uuid.in_(again), mine).values(priority=0))
        for run_id in again:
            if self.lease.holds() and dbos._sys_db.reenqueue_for_recovery(run_id, [self.lease.executor_id], QUEUE):
                log.warning("workflow goes on", run_id=run_id)
        self._lost = lost

    def reconcile(self) -> None:
        """Runs whose workflow died or never was get an end and a cause; silent agents are found; keys without a live run are destroyed."""
        for run_id in self.store.runs.list_overdue():  # first: the reaper does not depend on DBOS's tables
            with _apart("reap", run_id=run_id):
                if self.store.runs.reap(run_id):
                    log.error("run ended past its deadline", run_id=run_id)
        with _apart("let begin"):
            self.store.runs.let_begin()
        with _apart("tell late"):
            self.store.runs.tell_late({Step.BOOT_RAMDISK: self._waits.agent_ready_s, Step.FIRST_BOOT: self._waits.proof_s})
        now = self.store.now()
        live = {run.id: run for run in self.store.runs.list_runs(live=True)}
        if not live:
            self.when_idle()
        statuses = self._workflow_statuses(live)
        for run in live.values():
            with _apart("run", run_id=run.id):
                self._reconcile_run(run, statuses.get(run.id), now)
        hour_ago = (now - timedelta(hours=1)).timestamp()  # an admission makes keys before its transaction commits
        old = self.store.sealer.list_keyed_runs(before=hour_ago)
        for orphan in self.store.sealer.list_keyed_runs() - live.keys():
            of = self.store.runs.find_run(orphan)
            if (orphan in old) if of is None else (of.ended_at is not None):  # who ended it died before its keys
                self.store.sealer.destroy_run(orphan)

    def _reconcile_run(self, run: RunRow, status: str | None, now: datetime) -> None:
        if run.released_at is None:  # it waits, and has no workflow yet
            return
        never_was = status is None and run.released_at < now - timedelta(seconds=60)
        if status in _OVER or never_was:
            if self.store.runs.get_run(run.id).ended_at is not None:  # it ended while we looked
                return
            ending = Ending.WRITE_FAILED if run.past_the_line else Ending.RETURN_FAILED
            cause = RepaveError("internal", "The run's workflow died; its server was left as it was.")
            if self.store.runs.record_ending(run.id, ending, cause.as_json()):
                log.error("run ended by the reconciler", run_id=run.id, status=status)
        elif run.ready_at and run.report is None and run.seen_at and run.seen_at < now - timedelta(seconds=SILENCE_S):
            self.store.runs.tell_silence(run)
        elif run.report is None and now > (run.deadline_at if run.past_the_line else way_back_at(run)):
            self.store.runs.tell_overdue(run)

    def _workflow_statuses(self, run_ids: Collection[str]) -> dict[str, str]:
        c = self._workflow_status.c
        with self.store.engine.connect() as conn:
            return {r.workflow_uuid: r.status for r in conn.execute(sa.select(c.workflow_uuid, c.status).where(c.workflow_uuid.in_(run_ids)))}

    @property
    def _workflow_status(self) -> sa.TableClause:
        """DBOS's table of workflows, as much of it as we read."""
        schema = "dbos" if self.store.engine.dialect.name == "postgresql" else None
        return sa.table("workflow_status", *map(sa.column, ("workflow_uuid", "status", "executor_id", "priority", "application_version")), schema=schema)
