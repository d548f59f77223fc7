"""Several workers on one PostgreSQL, as a site with two hosts has them, and scripted machines for them to reinstall.

    FOLDER/pg the database · secret key file, CA and live runs' keys · images, both shared · w1, w2 ... a settings file and data for each worker
    FOLDER/rack machines

In front of the workers a balancer: machines and BMCs know one address, which outlives each worker (a site has keepalived or HAProxy there).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from repave.app import init_site, render_settings
from repave.cli.client import Client, Endpoint
from repave.config import SETTINGS_FILE
from repave.lab import scripted_os
from repave.lab.postgres import Server, start_server
from repave.lab.processes import find_free_ports, find_process, wait_for_port
from repave.lab.rack import power_on
from repave.lab.scripted import start_scripted_rack
from repave.lab.service import import_image, register_machine, wait_for_answer
from repave.lab.state import Machine
from repave.secrets import write_private
from repave.store.database import open_engine

SHORT = {"worker_beat_s": 0.5, "worker_fence_s": 2.0, "worker_lease_s": 3.0}
Json = dict[str, Any]


class Balancer:
    """One loopback port; each connection goes to the next of `backends` that takes it. `heard`: the first line that each client sent."""

    def __init__(self) -> None:
        self.backends: list[int] = []
        self.heard: list[str] = []
        self.port = 0
        self._next = 0
        self._open: set[asyncio.StreamWriter] = set()
        self.loop: asyncio.AbstractEventLoop | None = None

    def cut(self) -> None:
        """No backend any more, and every connection is ended."""
        self.backends = []
        assert self.loop is not None
        for writer in list(self._open):
            self.loop.call_soon_threadsafe(writer.close)

    async def _serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            await self._connect(reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._next += 1
        first = await reader.read(65536)
        if not first:  # connected, and gone without a word
            return
        self.heard.append(first.split(b"\r\n", 1)[0].decode("latin-1"))
        backends = self.backends
        for port in (backends[(self._next + n) % len(backends)] for n in range(len(backends))):
            with contextlib.suppress(OSError):
                other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
                other_writer.write(first)
                await asyncio.gather(_pump(reader, other_writer), _pump(other_reader, writer), return_exceptions=True)
                return


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@contextmanager
def start_balancer() -> Iterator[Balancer]:
    """A balancer without backends yet."""
    balancer, started, loop = Balancer(), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    balancer.loop = loop
    thread = threading.Thread(target=lambda: loop.run_until_complete(balancer._serve(started, stop)), daemon=True)
    thread.start()
    started.wait()
    try:
        yield balancer
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=5)


@dataclass
class Worker:
    """One `repave serve`. `executor_id` of this life of it."""

    folder: Path
    api: int
    provisioning: int
    media: int
    chunks: int
    process: subprocess.Popen[bytes] | None = None
    executor_id: str = ""

    @property
    def log(self) -> Path:
        return self.folder / "serve.log"

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait(30)


@dataclass
class Workers:
    """The site as its operator and its clients see it."""

    folder: Path
    postgres: Server
    database: Balancer  # what the workers see of it; `url` is the database itself
    agents: Balancer
    media: Balancer
    chunks: Balancer
    settings: Json
    machines: list[Machine] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    token: str = ""
    project_id: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    bmcs: list[Balancer] = field(default_factory=list)  # one in front of each BMC: the driver opens a connection for each request

    @property
    def url(self) -> str:
        return self.postgres.url

    def __post_init__(self) -> None:
        self.engine = open_engine(self.url)

    def add(self) -> Worker:
        """One more worker: settings of its own, the first makes the site."""
        api, provisioning, media, chunks = find_free_ports(4)
        worker = Worker(self.folder / f"w{len(self.workers) + 1}", api, provisioning, media, chunks)
        seen_url = self.url.replace(str(self.engine.url.port), str(self.database.port))
        changes = {
            "database_url": seen_url, "key_file": str(self.folder / "secret/key"), "images_dir": str(self.folder / "images"),
            "api_listen": f"127.0.0.1:{api}", "provisioning_listen": f"127.0.0.1:{provisioning}", "media_listen": f"127.0.0.1:{media}",
            "agent_url": f"https://127.0.0.1:{self.agents.port}", "media_url": f"http://127.0.0.1:{self.media.port}",
            "chunks_listen": f"127.0.0.1:{chunks}", "chunks_url": f"https://127.0.0.1:{self.chunks.port}/chunks",
            "boot_iso": str(self.folder / "boot.iso"), "graceful_s": 5, **self.settings,
        }  # fmt: skip
        if not self.workers:
            first = init_site(worker.folder, **changes)
            self.token, self.project_id = first.token, first.project.id
        else:
            worker.folder.mkdir()
            write_private(worker.folder / SETTINGS_FILE, render_settings(changes).encode())
        self.workers.append(worker)
        return worker

    def spawn(self, worker: Worker, **environment: str) -> None:
        """Its process runs and may still be starting."""
        with worker.log.open("ab") as out:
            command = [sys.executable, "-m", "repave.cli.main", "serve", str(worker.folder)]
            worker.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | environment)

    def start(self, worker: Worker, **environment: str) -> Worker:
        """It answers, and its executor id is known."""
        before = self.executors()
        self.spawn(worker, **environment)
        assert worker.process is not None
        process = find_process(worker.process.pid, "repave serve")
        if process is None:
            raise RuntimeError(worker.log.read_text()[-2000:])
        wait_for_port(worker.provisioning, process=process, log=worker.log, deadline_s=60)
        wait_for_answer(f"http://127.0.0.1:{worker.api}/", worker.log)
        worker.executor_id = next(e for e in self.executors() if e not in before)
        self.balance()
        return worker

    def balance(self, *, without: Sequence[Worker] = ()) -> None:
        """New connections go to the workers that run, but not to those `without`: what a balancer's health check does."""
        up = [w for w in self.workers if w not in without and w.process is not None and w.process.poll() is None]
        self.agents.backends, self.media.backends, self.chunks.backends = ([getattr(w, n) for w in up] for n in ("provisioning", "media", "chunks"))

    def stop(self) -> None:
        for worker in self.workers:
            if worker.process is not None and worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)
                worker.kill()
        self.engine.dispose()

    def client(self, worker: Worker | None = None) -> Client:
        return Client(None, Endpoint(f"http://127.0.0.1:{(worker or self.workers[0]).api}", self.token))

    def reinstall(self, names: Sequence[str], password: str, *, worker: Worker | None = None) -> str:
        """CloudDC's PUT; the batch's id."""
        client = self.client(worker)
        image = next(i["id"] for i in client.items("/images") if i["name"] == "tiny-1")
        import requests

        url = f"{client.endpoint.url}/v1/{self.project_id}/instances/reinstall"
        body = {"image_id": image, "password": password, "instance_id_set": [self.ids[n] for n in names]}
        answer = requests.put(url, json=body, headers={"X-Auth-Token": self.token}, timeout=60)
        if answer.status_code != 202:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")
        return str(client.items("/batches", limit=1)[0]["id"])

    def bmc_writes(self) -> list[str]:
        """The requests that were meant to change something, BMC by BMC."""
        return [line for bmc in self.bmcs for line in bmc.heard if not line.startswith("GET ")]

    # ---- what the database says ----

    def executors(self) -> list[str]:
        return self._column("SELECT executor_id FROM workers")

    def owners(self) -> dict[str, str]:
        """Executor by run, of those under way."""
        with self.engine.connect() as conn:
            rows = conn.execute(sa.text("SELECT workflow_uuid, executor_id FROM dbos.workflow_status WHERE status = 'PENDING'"))
            return {r[0]: r[1] for r in rows}

    def queued(self) -> set[str]:
        return set(self._column("SELECT workflow_uuid FROM dbos.workflow_status WHERE status = 'ENQUEUED'"))

    def reaped(self) -> list[str]:
        """Executors that were declared dead, or gave their lease up."""
        return self._column("SELECT executor_id FROM workers WHERE reaped")

    def wait_until_taken_over(self, dead: str, *, deadline_s: float = 60) -> float:
        """Seconds until no run under way or queued belongs to the executor any more, and what it had is owned again or over. Raises TimeoutError."""
        began = time.monotonic()
        query = f"SELECT count(*) FROM dbos.workflow_status WHERE status = 'ENQUEUED' OR (status = 'PENDING' AND executor_id = '{dead}')"  # noqa: S608
        while self._column(query)[0]:
            if time.monotonic() - began > deadline_s:
                busy = self._column("SELECT state || ' ' || coalesce(wait_event_type, '') || ' ' || query FROM pg_stat_activity WHERE state <> 'idle'")
                raise TimeoutError(f"runs of {dead} were not taken over within {deadline_s} s; {self.owners()}; {busy}")
            time.sleep(0.02)
        return time.monotonic() - began

    def _column(self, query: str) -> list[Any]:
        with self.engine.connect() as conn:
            return list(conn.execute(sa.text(query)).scalars())


@contextmanager
def start_workers(folder: Path, *, machines: int, workers: int = 2, watch_bmcs: bool = True, **settings: Any) -> Iterator[Workers]:
    """The site runs: every machine is registered and runs its old OS. `folder` must be open to other users (PostgreSQL's).

    `watch_bmcs`: a balancer before each BMC writes down what it is asked; a thread each, so not for hundreds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(start_server(folder / "pg"))
        database, agents, media, chunks = (stack.enter_context(start_balancer()) for _ in range(4))
        rack = stack.enter_context(start_scripted_rack(folder / "rack", count=machines))
        site = Workers(folder, postgres, database, agents, media, chunks, SHORT | settings, list(rack.machines))
        assert site.engine.url.port is not None
        database.backends = [site.engine.url.port]
        try:
            scripted_os.build_disc(folder / "boot.iso")
            for _ in range(workers):
                site.start(site.add())
            seen = site.machines
            if watch_bmcs:
                site.bmcs = [stack.enter_context(start_balancer()) for _ in site.machines]
                seen = [dataclasses.replace(m, bmc_url=f"http://127.0.0.1:{bmc.port}") for m, bmc in zip(site.machines, site.bmcs, strict=True)]
                for machine, bmc in zip(site.machines, site.bmcs, strict=True):
                    bmc.backends = [machine.bmc_port]

            def register(number: int) -> None:
                scripted_os.write_old_os(site.machines[number].root_disk)
                power_on(site.machines[number])
                site.ids[seen[number].name] = register_machine(site.client(site.workers[number % workers]), seen[number], unit=number + 1)["instance"]["id"]

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(register, range(machines)))
            import_image(site.client(), scripted_os.build_image(folder / "tiny-1.raw", "tiny-1"), name="tiny-1")
            yield site
        finally:
            site.stop()
