"""The service as one process of virtual time: the product's admission, routes, effects, workflow and reconciler. It may die anywhere.

The far end speaks to the very functions that FastAPI would call, so every rule of the server is run; HTTP itself is not.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import structlog
from durable import Disk
from far_end import Machine, SimBmc
from fastapi import HTTPException
from fastapi.responses import FileResponse, JSONResponse, Response
from sim_run import Meddling, Overtaken, SimRun
from virtual_time import Life, Signal, VirtualTime
from wire import Answer
from worker import SimLease, Worker

from repave.api import media
from repave.api.agent import ChunkPlaces, build_agent_router
from repave.domain.model import Credential, RunRow, Server
from repave.domain.waves import Limits
from repave.errors import RepaveError
from repave.images.chunk_token import find_token_run
from repave.images.store import ImageStore
from repave.store import Store
from repave.workflow.effects import Places, ServerEffects, verify_system
from repave.workflow.engine import Engine
from repave.workflow.fleet import NO_LIMITS, Fleet
from repave.workflow.media_sweep import MediaSweep
from repave.workflow.reinstall import DEFAULT_WAITS, reinstall

RUN_TIMEOUT_S = 3 * 3600 + 1800  # config.py
RECONCILE_S = 120.0  # the real one is 15 s: fewer looks, the same rule
MEDIA_SWEEP_S = 300.0  # config.py
PLACES = Places(("http://media.invalid",), "https://agents.invalid", "https://chunks.invalid/chunks", "CA", 60.0)
CHUNKS = ChunkPlaces(b"the chunks' key", PLACES.chunks_url)
HASH = "$6$rounds=300000$saltsaltsaltsalt$" + "h" * 86


class OneHash(Fleet):
    """Admission, with a hash that was made once: 0.1 s of a core each would be all that the simulator does."""

    def _secret(self, os_type: str, password: str) -> str:
        return HASH


class Reconciler(Engine):
    """The engine's reconciler without the engine."""

    def __init__(self, store: Store, disk: Disk) -> None:
        self.store, self._disk, self._waits, self.when_idle = store, disk, DEFAULT_WAITS, lambda: None

    def _workflow_statuses(self, run_ids: Collection[str]) -> dict[str, str]:
        return {run_id: self._disk.queued[run_id] for run_id in run_ids if run_id in self._disk.queued}


class _Request:
    """As much of a request as the routes read."""

    __slots__ = ("headers",)

    def __init__(self, token: str) -> None:
        self.headers = {"authorization": f"Bearer {token}"}


@dataclass
class Crashes:
    """Where the process dies: `at` names points as they are counted ("step end after #1"), each used once."""

    at: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    points: list[str] | None = None  # filled while they are discovered
    down_s: float = 5.0


structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # the reconciler's errors are this world's daily bread


class _Living:
    """The store of this world's site. One router a process is enough: making it takes as long as half a reinstall."""

    store: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(_Living.store, name)


@functools.cache
def _routes(images: ImageStore) -> dict[tuple[str, str], Callable[..., Any]]:
    router = build_agent_router(_Living(), images, CHUNKS)  # type: ignore[arg-type]
    return {(next(iter(r.methods)), r.path): r.endpoint for r in router.routes}  # type: ignore[attr-defined]


class Service:
    """The site: one worker, or several with leases, on one disk."""

    def __init__(
        self, time: VirtualTime, disk: Disk, machines: dict[str, Machine], images: ImageStore, *, waits: Any = DEFAULT_WAITS,
        workers: int = 1, limits: Limits = NO_LIMITS,
    ) -> None:  # fmt: skip
        self.time, self.disk, self.machines, self.images, self.waits, self.limits = time, disk, machines, images, waits, limits
        self.crashes, self.meddling = Crashes(), Meddling()
        self.workers = [Worker(f"w{n}") for n in range(workers)]
        self.lives = self.takeovers = self.ended_themselves = 0
        self.news = Signal()
        self.busy_until = 0.0
        self.busy_count = self.refusals = 0
        self.stop_in_call_s = 0.0  # the next worker that calls a BMC is stopped for so long, in the middle of the call
        self.yields = False  # tasks may be overtaken before each transaction
        self.errors: list[str] = []  # what nobody foresaw
        self.broken: list[str] = []  # what can only be seen at its moment
        disk.before_begin, disk.at_commit, disk.told = self._before_begin, self._at_commit, self._dispatch
        self.store = _Living.store = disk.open_store()  # it keeps nothing that a process could lose
        self.fleet = OneHash(self.store, disk.enqueue, run_timeout_s=RUN_TIMEOUT_S, limits=limits)
        self.routes = _routes(images)

    # ---- life and death ----

    def start(self, worker: Worker) -> None:
        """A new process: everything is made again from what the disk holds."""
        if not worker.life.ended:
            return
        self.lives += 1
        worker.life = life = Life(f"service {self.lives}")
        worker.executor_id, worker.begun, worker.lease = f"{worker.name}-{self.lives}", False, None
        self.time.note(f"service starts, life {self.lives}")
        open_bmc = functools.partial(self._open_bmc, worker)
        worker.effects = ServerEffects(self.store, self.images, open_bmc, PLACES)
        worker.media_sweep = MediaSweep(self.store, open_bmc, every_s=MEDIA_SWEEP_S)
        worker.reconciler = Reconciler(self.store, self.disk)
        self.time.spawn(f"{worker.name} begins", lambda: self._begin(worker), life=life)

    def _begin(self, worker: Worker) -> None:
        if len(self.workers) > 1:
            worker.lease = SimLease(self, worker)
            while True:  # a supervisor starts it again
                try:
                    worker.lease.take()
                    worker.lease.start(self._take_over)
                    break
                except sa.exc.OperationalError:
                    self.time.sleep(1)
        else:
            self._put_back(set(self.disk.owners.values()))
        worker.begun = True
        self._dispatch()
        self.time.spawn(f"{worker.name} sweeps", lambda: self._sweep_forever(worker), life=worker.life)
        self.time.sleep(RECONCILE_S)
        self._reconcile_forever(worker)

    def _take_over(self) -> None:
        """As Engine._take_over: the owners are read first, then who is alive."""
        owners = {self.disk.owners[run_id] for run_id, status in self.disk.queued.items() if status == "PENDING"}
        dead = owners - set(next(w.lease for w in self.workers if w.life is self.time.life).list_live())  # type: ignore[union-attr]
        if self._put_back(dead):
            self.takeovers += 1
            self._dispatch()

    def _put_back(self, dead: set[str]) -> bool:
        """What DBOS's recovery does: what these executors had is in the queue again."""
        mine = [run_id for run_id, status in self.disk.queued.items() if status == "PENDING" and self.disk.owners[run_id] in dead]
        for run_id in mine:
            self.disk.queued[run_id] = "ENQUEUED"
        return bool(mine)

    def die(self, worker: Worker, down_s: float) -> None:
        """SIGKILL; a new process is there `down_s` later."""
        if worker.life.ended:
            return
        worker.life.ended = True
        self.disk.roll_back()
        self.time.note(f"{worker.name} dies")
        self.time.spawn("restart", lambda: self.start(worker), after=down_s)
        if self.time.life is worker.life:
            self.time.leave()

    def stop_for(self, worker: Worker, seconds: float) -> None:
        """SIGSTOP, and SIGCONT `seconds` later: it knows nothing of the time between."""
        if not worker.life.ended:
            self.time.note(f"{worker.name} is stopped for {seconds:.0f} s")
            worker.life.stopped_until = self.time.now + seconds
            self.time.spawn("goes on", self._dispatch, after=seconds)

    def find_worker(self) -> Worker | None:
        """The one whose task runs now."""
        life = self.time.life
        for worker in self.workers:
            if worker.life is life:
                return worker
        return None

    def at(self, point: str) -> None:
        """The process may die here."""
        worker = self.find_worker()
        if worker is None:
            return
        if self.stop_in_call_s and point.startswith("bmc"):
            self.stop_for(worker, self.stop_in_call_s)
            self.stop_in_call_s = 0.0
        crashes = self.crashes
        crashes.seen[point] += 1
        if not crashes.at and crashes.points is None:
            return
        name = f"{point} #{crashes.seen[point]}"
        if crashes.points is not None:
            crashes.points.append(name)
        if name in crashes.at:
            crashes.at.remove(name)
            self.die(worker, crashes.down_s)

    def _at_commit(self, edge: str) -> None:
        self.at(f"commit {edge}")

    def _before_begin(self) -> None:
        if self.time.atomic or self.find_worker() is None:
            return
        if self.yields and self.time.rng.random() < 0.3:
            self.time.sleep(self.time.rng.uniform(0, 0.2))
        if self.busy_count > 0 and self.time.now < self.busy_until:
            self.busy_count -= 1
            self.refusals += 1
            raise sa.exc.OperationalError("BEGIN", {}, Exception("database is locked"))

    # ---- the engine ----

    def _dispatch(self) -> None:
        """What was queued runs in any worker that works; who waits for news looks."""
        self.time.give(self.news)
        working = [w for w in self.workers if w.works(self.time.now)]
        for run_id, status in self.disk.queued.items():
            if status == "ENQUEUED" and working:
                worker = working[0] if len(working) == 1 else self.time.rng.choice(working)
                self.disk.queued[run_id], self.disk.owners[run_id] = "PENDING", worker.executor_id
                self.time.spawn(f"workflow {run_id[-4:]}", lambda run_id=run_id, w=worker: self._workflow(run_id, w), life=worker.life, after=0.1, about=run_id)

    def _workflow(self, run_id: str, worker: Worker) -> None:
        port = SimRun(run_id, self.disk, self.time, self.at, news=self.news, meddling=self.meddling, owner=worker.executor_id, require=worker.require)
        workflow = reinstall(port, worker.effects, self.waits)
        try:
            workflow.send(None)
            raise AssertionError("the workflow waits for something that is not the port")
        except StopIteration as end:
            self.disk.queued[run_id] = "SUCCESS"
            if run_id in self.disk.sealer.salts:  # the reconciler would find them, but is there for those who die
                self.broken.append(f"I13 the keys of run {run_id} are still there when its workflow ends")
            self.time.note(f"workflow ends {end.value}")
        except Overtaken:
            self.time.note("a workflow was given to another worker")
        except Exception as error:
            self.disk.queued[run_id] = "ERROR"
            if not isinstance(error, sa.exc.OperationalError):
                self.errors.append(f"{type(error).__name__}: {error}")

    def _reconcile_forever(self, worker: Worker) -> None:
        while True:
            if any(status == "PENDING" or status == "ERROR" for status in self.disk.queued.values()) or self.disk.sealer.salts:
                with contextlib.suppress(sa.exc.OperationalError):
                    worker.reconciler.reconcile()
            self.time.sleep(RECONCILE_S)

    def _sweep_forever(self, worker: Worker) -> None:
        while True:
            with contextlib.suppress(sa.exc.OperationalError):
                worker.media_sweep.look()
            self.time.sleep(MEDIA_SWEEP_S)

    @contextlib.contextmanager
    def _open_bmc(self, worker: Worker, server: Server, before_write: Callable[[], None] = lambda: None, run_id: str = "") -> Iterator[SimBmc]:
        def may_write() -> None:
            before_write()
            worker.require()

        recognize = functools.partial(verify_system, server)
        yield SimBmc(self.machines[server.name], self.at, before_write=may_write, recognize=recognize, executor_id=worker.executor_id)

    def _listener(self) -> Worker | None:
        """A worker that takes a connection: also one that is stopped, which answers when it goes on."""
        living = [w for w in self.workers if not w.life.ended]
        if len(living) > 1:
            return self.time.rng.choice(living)
        return living[0] if living else None

    # ---- requests ----

    def deliver(self, token: str, method: str, path: str, body: dict[str, Any] | None, answer: Answer) -> bool:
        """The request reached the process, which will answer it if it lives. False: nobody listens."""
        worker = self._listener()
        if worker is None:
            return False
        self.time.spawn(path, lambda: self._handle(token, method, path, body, answer), life=worker.life)
        return True

    def _handle(self, token: str, method: str, path: str, body: dict[str, Any] | None, answer: Answer) -> None:
        try:
            answer.status, answer.body = 200, _plain(self._route(token, method, path, body))
        except HTTPException as error:
            answer.status = error.status_code
        except sa.exc.OperationalError:
            answer.status = 503
        except Exception as error:
            answer.status = 500
            self.errors.append(f"{path}: {type(error).__name__}: {error}")
        self.time.give(answer.signal)

    def _route(self, token: str, method: str, path: str, body: dict[str, Any] | None) -> Any:
        if method == "MEDIA":
            return self._media(path)
        request, extra = _Request(token), {} if body is None else {"body": body}
        if path.startswith("/chunks/"):  # the chunk server: no database
            if find_token_run(CHUNKS.key, token, now_s=self.store.now().timestamp()) is None:
                raise HTTPException(401)
            return self.images.chunk_path(path.rpartition("/")[2]).stat().st_size
        if path.startswith("/home/"):
            return self.routes[method, "/home/v1/{run_id}"](request, run_id=path.rpartition("/")[2], **extra)
        return self.routes[method, path](request, **extra)

    def _media(self, url: str) -> Any:
        """api/media.py's rules: the slot of a live run, nothing for one that is over."""
        _, run_id, key, _ = url.removeprefix(PLACES.media_urls[0]).strip("/").split("/")
        run: RunRow | None = self.store.runs.find_run(run_id)
        if run is None or not media._is_key(self.store, run, key):
            raise HTTPException(404)
        return media._slot(self.store, run, PLACES) if media._is_live(self.store, run) else None

    def ask(self, what: Callable[[Any], Any], credential: Credential, answer: Answer) -> bool:
        """A client's request, as the routes get it: `answer` has 202 and the body, or a status and the error. False: nobody listens."""
        worker = self._listener()
        if worker is None:
            return False
        self.time.spawn("client's request", lambda: self.answer(what, credential, answer), life=worker.life)
        return True

    def answer(self, what: Callable[[Any], Any], credential: Credential, answer: Answer) -> None:
        scope = SimpleNamespace(
            store=self.store,
            credential=credential,
            project_id=credential.project_id,
            actor=credential.name,
            desk=SimpleNamespace(fleet=self.fleet, waits_s={}),
        )
        try:
            answer.body = what(scope)
            answer.status = 202
        except RepaveError as error:
            answer.status, answer.body = 409, error
        except sa.exc.OperationalError:
            answer.status = 503
        self.time.give(answer.signal)


def _plain(value: Any) -> Any:
    """What the client would read."""
    if isinstance(value, FileResponse):
        return b""
    if isinstance(value, JSONResponse):
        return json.loads(value.body)
    if isinstance(value, Response):
        return bytes(value.body) if value.status_code == 200 else None
    return value
