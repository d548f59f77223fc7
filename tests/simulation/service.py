"""The service as one process of virtual time: the product's admission, routes, effects, workflow and reconciler. It may die anywhere.

The far end speaks to the very functions that FastAPI would call, so every rule of the server is run; HTTP itself is not.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import structlog
from durable import Disk
from far_end import Machine, SimBmc
from fastapi import HTTPException
from fastapi.responses import FileResponse, JSONResponse, Response
from sim_run import Meddling, SimRun
from virtual_time import Life, Signal, VirtualTime
from wire import Answer

from repave.api import media
from repave.api.agent import build_agent_router
from repave.domain.model import Credential, RunRow, Server
from repave.errors import RepaveError
from repave.images.store import ImageStore
from repave.store import Store
from repave.workflow.effects import Places, ServerEffects
from repave.workflow.engine import Engine
from repave.workflow.fleet import Admitted, Fleet
from repave.workflow.reinstall import DEFAULT_WAITS, reinstall

RUN_TIMEOUT_S = 3 * 3600 + 1800  # config.py
RECONCILE_S = 120.0  # the real one is 15 s: fewer looks, the same rule
PLACES = Places(("http://media.invalid",), "https://agents.invalid", "CA", 60.0)
HASH = "$6$rounds=300000$saltsaltsaltsalt$" + "h" * 86


class OneHash(Fleet):
    """Admission, with a hash that was made once: 0.1 s of a core each would be all that the simulator does."""

    def _secret(self, os_type: str, password: str) -> str:
        return HASH


class Reconciler(Engine):
    """The engine's reconciler without the engine."""

    def __init__(self, store: Store, disk: Disk) -> None:
        self.store, self._disk = store, disk

    def _workflow_statuses(self) -> dict[str, str]:
        return dict(self._disk.queued)


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


class Service:
    def __init__(self, time: VirtualTime, disk: Disk, machines: dict[str, Machine], images: ImageStore, *, waits: Any = DEFAULT_WAITS) -> None:
        self.time, self.disk, self.machines, self.images, self.waits = time, disk, machines, images, waits
        self.crashes, self.meddling = Crashes(), Meddling()
        self.life = Life("not started")
        self.life.ended = True
        self.lives = 0
        self.news = Signal()
        self.busy_until = 0.0
        self.busy_count = self.refusals = 0
        self.yields = False  # tasks may be overtaken before each transaction
        self.errors: list[str] = []  # what nobody foresaw
        disk.before_begin, disk.at_commit, disk.told = self._before_begin, self._at_commit, self._dispatch

    # ---- life and death ----

    def start(self) -> None:
        """A new process: everything is made again from what the disk holds."""
        if not self.life.ended:
            return
        self.lives += 1
        self.life = Life(f"service {self.lives}")
        self.time.note(f"service starts, life {self.lives}")
        store = self.store = self.disk.open_store()
        self.effects = ServerEffects(store, self.images, self._open_bmc, PLACES)
        self.fleet = OneHash(store, self.disk.enqueue, run_timeout_s=RUN_TIMEOUT_S)
        self.routes: dict[tuple[str, str], Callable[..., Any]] = {}
        for route in build_agent_router(store, self.images).routes:
            self.routes[next(iter(route.methods)), route.path] = route.endpoint  # type: ignore[attr-defined]
        self.reconciler = Reconciler(store, self.disk)
        for run_id, status in self.disk.queued.items():
            if status == "PENDING":
                self.disk.queued[run_id] = "ENQUEUED"
        self._dispatch()
        self.time.spawn("reconciler", self._reconcile_forever, life=self.life, after=RECONCILE_S)

    def die(self, down_s: float) -> None:
        """SIGKILL; a new process is there `down_s` later."""
        if self.life.ended:
            return
        self.life.ended = True
        self.disk.roll_back()
        self.time.note("service dies")
        self.time.spawn("restart", self.start, after=down_s)
        if self.time.is_within(self.life):
            self.time.leave()

    def at(self, point: str) -> None:
        """The process may die here."""
        if not self.time.is_within(self.life):
            return
        crashes = self.crashes
        crashes.seen[point] += 1
        name = f"{point} #{crashes.seen[point]}"
        if crashes.points is not None:
            crashes.points.append(name)
        if name in crashes.at:
            crashes.at.remove(name)
            self.die(crashes.down_s)

    def _at_commit(self, edge: str) -> None:
        self.at(f"commit {edge}")

    def _before_begin(self) -> None:
        if self.time.atomic:
            return
        if self.time.is_within(self.life):
            if self.yields and self.time.rng.random() < 0.3:
                self.time.sleep(self.time.rng.uniform(0, 0.2))
            if self.busy_count > 0 and self.time.now < self.busy_until:
                self.busy_count -= 1
                self.refusals += 1
                raise sa.exc.OperationalError("BEGIN", {}, Exception("database is locked"))

    # ---- the engine ----

    def _dispatch(self) -> None:
        """What was queued runs; who waits for news looks."""
        self.time.give(self.news)
        for run_id, status in self.disk.queued.items():
            if status == "ENQUEUED":
                self.disk.queued[run_id] = "PENDING"
                self.time.spawn(f"workflow {run_id[-4:]}", lambda run_id=run_id: self._workflow(run_id), life=self.life, after=0.1)

    def _workflow(self, run_id: str) -> None:
        port = SimRun(run_id, self.disk, self.time, self.at, news=self.news, meddling=self.meddling)
        workflow = reinstall(port, self.effects, self.waits)
        try:
            workflow.send(None)
            raise AssertionError("the workflow waits for something that is not the port")
        except StopIteration as end:
            self.disk.queued[run_id] = "SUCCESS"
            self.time.note(f"workflow ends {end.value}")
        except Exception as error:
            self.disk.queued[run_id] = "ERROR"
            if not isinstance(error, sa.exc.OperationalError):
                self.errors.append(f"{type(error).__name__}: {error}")

    def _reconcile_forever(self) -> None:
        while True:
            if any(status == "PENDING" or status == "ERROR" for status in self.disk.queued.values()) or self.disk.sealer.salts:
                with contextlib.suppress(sa.exc.OperationalError):
                    self.reconciler.reconcile()
            self.time.sleep(RECONCILE_S)

    @contextlib.contextmanager
    def _open_bmc(self, server: Server) -> Iterator[SimBmc]:
        yield SimBmc(self.machines[server.name], self.at)

    # ---- requests ----

    def deliver(self, token: str, method: str, path: str, body: dict[str, Any] | None, answer: Answer) -> bool:
        """The request reached the process, which will answer it if it lives. False: nobody listens."""
        if self.life.ended:
            return False
        self.time.spawn(path, lambda: self._handle(token, method, path, body, answer), life=self.life)
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
        if path.startswith("/agent/v1/chunks/"):
            return self.routes[method, "/agent/v1/chunks/{sha256}"](request, sha256=path.rpartition("/")[2])
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

    def admit(self, credential: Credential, instance_ids: Sequence[str], image_id: str, answer: Answer) -> bool:
        """PUT /instances/reinstall: `answer` has 202 and an Admitted, or a status and the error."""
        if self.life.ended:
            return False
        self.time.spawn("PUT", lambda: self._admit(credential, instance_ids, image_id, answer), life=self.life)
        return True

    def _admit(self, credential: Credential, instance_ids: Sequence[str], image_id: str, answer: Answer) -> None:
        try:
            admitted: Admitted = self.fleet.admit(credential=credential, instance_ids=instance_ids, image_id=image_id, password="Canary-7!canary")
            answer.status, answer.body = 202, admitted
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
