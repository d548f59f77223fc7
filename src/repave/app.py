"""Composition root: settings -> store, drivers, engine, HTTP apps. Only here are drivers and stores constructed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import platform
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
import structlog
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from repave import __version__
from repave.api.agent import MAX_BODY_BYTES, ChunkPlaces, build_agent_router
from repave.api.asgi import BodyLimit, EchoAsk, WireProtocol, install_wire
from repave.api.clouddc import build_clouddc_router
from repave.api.health import build_health_router
from repave.api.iam import build_iam_router
from repave.api.limits import Limiter
from repave.api.media import build_media_router
from repave.api.metrics import build_metrics_router
from repave.api.openapi import build_openapi_router
from repave.api.operator.desk import Desk, ImportProgress
from repave.api.operator.routes import build_operator_router
from repave.auth import Authenticator
from repave.auth.login import Logins
from repave.bmc import Bmc, BmcAddress, BmcFacts
from repave.bmc.connector import CountRequest
from repave.bmc.redfish import Paths, RedfishBmc
from repave.ca import make_ca, make_certificate
from repave.chunk_process import ChunkBytes, start_chunk_process
from repave.config import SETTINGS_FILE, Settings, load_settings, split_caches, split_listen
from repave.domain.model import Credential, Image, Project, Role, Server, Step
from repave.domain.urls import find_unreachable_place
from repave.domain.waves import Limits
from repave.errors import ImageError, RepaveError
from repave.generation import Watch, begin_life, stand_path
from repave.images.fetch import ImageSources
from repave.images.headers import FORMATS, FileState
from repave.images.importer import RESERVE_BYTES, import_image
from repave.images.store import ImageStore
from repave.leftovers import sweep_files
from repave.metrics import Metrics
from repave.own_host import read_own_host
from repave.pages import build_pages_router
from repave.ramdisk.media import BootMedia
from repave.secrets import Sealer, write_private
from repave.steady_clock import SteadyClock
from repave.store import Store
from repave.store.database import OF_THE_STORE, is_unavailable
from repave.store.stand import check_file
from repave.webhooks import WebhookSender
from repave.workflow.bmc_login import find_password
from repave.workflow.bmc_talk import keep_talk
from repave.workflow.console_files import ConsoleFiles
from repave.workflow.effects import Places, ServerEffects, verify_system
from repave.workflow.engine import Engine
from repave.workflow.fleet import Fleet
from repave.workflow.lease import LeaseTimes
from repave.workflow.media_sweep import MediaSweep
from repave.workflow.power import PowerSwitch
from repave.workflow.reinstall import Waits

log = structlog.get_logger()
_M_ARENA_MAX = -8  # malloc.h


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class FirstKey:
    """What `init` prints once."""

    project: Project
    credential: Credential
    sk: str
    token: str


class ImageDesk:
    """What the operator's routes ask of images: room, import, sweep."""

    def __init__(self, store: ImageStore, folder: Path, quota_bytes: int, *, formats: Sequence[str] = FORMATS, sources: ImageSources | None = None) -> None:
        self.store, self.folder, self.quota_bytes, self.formats = store, folder, quota_bytes, formats
        self.sources = sources or ImageSources()
        self.over = threading.Event()

    def room_bytes(self) -> int:
        return min(self.quota_bytes - self.store.used_bytes(), self.store.free_bytes() - RESERVE_BYTES)

    def add(
        self,
        file: Path | int,
        *,
        name: str,
        os_type: str,
        arch: str,
        project_id: str,
        image_id: str,
        created_at: datetime,
        progress: Callable[[int, int], None],
        since: FileState | None = None,
    ) -> Image:
        made = import_image(file, self.store, arch=arch, max_bytes=self.quota_bytes, formats=self.formats, progress=progress, since=since)
        return Image(
            image_id, project_id, name, os_type, made.arch, made.boot, made.manifest_sha256, made.size_bytes, made.sector_bytes,
            made.stored_bytes, made.data_bytes, created_at,
        )  # fmt: skip

    def alone(self) -> AbstractContextManager[None]:
        return self.store.catalogue_lock(waiting=self.refuse_over)

    def refuse_over(self) -> None:
        if self.over.is_set():
            raise ImageError("service-ending")

    def verify(self, manifest_sha256: str) -> None:
        self.store.verify(self.store.read_manifest(manifest_sha256), deep=True)

    def sweep(self, manifests_in_use: list[str]) -> int:
        unused = [m for m in self.store.list_manifests() if m not in manifests_in_use]
        for manifest in unused:
            self.store.remove(manifest, keep=manifests_in_use)
        return len(unused)


@dataclass
class Site:
    """One installation, opened."""

    settings: Settings
    store: Store
    images: ImageStore
    engine: Engine
    fleet: Fleet
    effects: ServerEffects
    places: Places
    watch: Watch
    media_sweep: MediaSweep
    desk: ImageDesk
    console_files: ConsoleFiles
    metrics: Metrics
    chunk_bytes: ChunkBytes
    imports: list[ImportProgress]
    webhooks: WebhookSender
    power: PowerSwitch


def init_site(folder: Path, **changes: Any) -> FirstKey:
    """Settings file, key file, CA, database and image folder are there, the project `default` and its first admin key too.

    Raises RepaveError conflict where a settings file is there already: nothing is overwritten.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        raise RepaveError("conflict", f"{SETTINGS_FILE} is there already; this folder is a site.", field="folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_private(path, render_settings(changes).encode())
    try:
        settings = load_settings(folder)
    except RepaveError:
        path.unlink()  # or the next `init`, with the mistake mended, would find a site here
        raise
    with open_site(settings) as site:
        project = site.store.access.add_project("default")
        credential, sk, token = site.store.access.add_credential(project.id, "admin", Role.ADMIN)
    return FirstKey(project, credential, sk, token)


def render_settings(changes: dict[str, Any]) -> str:
    """The settings file: every setting with its description; those not changed are commented out."""
    lines = ["# Repave's settings. The environment (REPAVE_<NAME>) wins over this file.", ""]
    for name, field in Settings.model_fields.items():
        value = changes.get(name, field.default)
        lines.append(f"# {field.description}")
        text = f'"{value or ""}"' if not isinstance(value, int | float) else str(value).lower()  # TOML's true and false
        lines.append(f"{name} = {text}" if name in changes else f"#{name} = {text}")
        lines.append("")
    unknown = changes.keys() - Settings.model_fields.keys()
    if unknown:
        raise RepaveError("bad-request", f"No such setting: {', '.join(sorted(unknown))}.", field=sorted(unknown)[0])
    return "\n".join(lines)


@contextlib.contextmanager
def open_site(settings: Settings) -> Iterator[Site]:
    """The site's parts, constructed; nothing runs yet."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    secret_dir = settings.key_file.parent
    sealer = Sealer.open(settings.key_file)
    make_ca(secret_dir)
    _keep_chunk_key(settings, sealer)
    check_file(settings.database_url)
    clock = SteadyClock() if sa.make_url(settings.database_url).get_backend_name() == "sqlite" else utc_now  # workers must agree, so they keep the wall's time
    store = Store.open(settings.database_url, sealer=sealer, now=clock)
    store.marks.check_ca(hashlib.sha256((secret_dir / "ca.pem").read_bytes()).hexdigest())
    assert settings.images_dir is not None
    images = ImageStore(settings.images_dir)
    ca_pem = (secret_dir / "ca.pem").read_text()
    media_urls, agent_url = tuple(settings.media_url.split()), settings.agent_url.rstrip("/")
    places = Places(media_urls, agent_url, settings.chunks_url, ca_pem, settings.graceful_s, settings.read_back, settings.console_files)

    watch = Watch(store, stand_path(settings.key_file), settings.data_dir)
    chunk_bytes, imports = ChunkBytes(), list[ImportProgress]()
    metrics = Metrics(store, health=watch.health, chunk_bytes=chunk_bytes.read, imports=imports)
    webhooks = WebhookSender(store, local_addresses=settings.webhook_local_addresses)
    known_paths = dict[tuple[str, str | None], Paths]()  # one for each BMC spoken to; each run's preflight finds them anew

    @contextlib.contextmanager
    def open_bmc(server: Server, before_write: Callable[[], None] = lambda: None, run_id: str = "") -> Iterator[Bmc]:
        def may_write() -> None:
            before_write()  # asks the database, which may take its time: the lease is asked last
            engine.lease.require()

        address = BmcAddress.of(server, find_password(store, server, functools.partial(probe_bmc, count=metrics.count_bmc)))
        paths = known_paths.setdefault((address.url, address.system_uri), Paths())
        recognize = functools.partial(verify_system, server)
        with (
            keep_talk(store, run_id, also_secret=address.password) as talk,
            RedfishBmc(
                address, observe=talk, before_write=may_write, recognize=recognize, paths=paths, http_boot=settings.uefi_http_boot, count=metrics.count_bmc
            ) as bmc,
        ):
            yield bmc

    effects = ServerEffects(store, images, open_bmc, places)
    waits = Waits(settings.agent_ready_s, settings.written_s, settings.proof_s, settings.forward_pause_s, settings.return_pause_s)
    times = LeaseTimes(settings.worker_beat_s, settings.worker_fence_s, settings.worker_lease_s)
    lock = settings.data_dir / "worker.lock"
    engine = Engine(store, settings.database_url, lock, waits=waits, times=times, shared=(secret_dir, settings.images_dir))
    if isinstance(clock, SteadyClock):
        engine.when_idle = clock.follow
    limits = Limits(settings.runs_at_once, settings.rack_at_once)
    fleet = Fleet(
        store, engine.enqueue, run_timeout_s=settings.reinstall_timeout_s, waiting_timeout_s=settings.waiting_timeout_s, limits=limits,
        max_batch=settings.batch_max,
    )  # fmt: skip
    try:
        sweep = MediaSweep(store, open_bmc, every_s=settings.media_sweep_s)
        sources = ImageSources(settings.import_dir, settings.import_keyring, settings.import_local_addresses)
        desk = ImageDesk(images, images.root, settings.images_quota_bytes, formats=settings.image_formats.split(), sources=sources)
        consoles = ConsoleFiles(store, settings.console_files)
        power = PowerSwitch(store, fleet, open_bmc, graceful_s=settings.graceful_s)
        yield Site(settings, store, images, engine, fleet, effects, places, watch, sweep, desk, consoles, metrics, chunk_bytes, imports, webhooks, power)
    finally:
        store.close()


def _chunk_key_path(settings: Settings) -> Path:
    return settings.key_file.parent / "chunks.key"


def _keep_chunk_key(settings: Settings, sealer: Sealer) -> None:
    """What signs the chunks' tokens is in a file of its own: it comes of the site's key, not that of it, so a chunk server elsewhere may have it."""
    path, key = _chunk_key_path(settings), sealer.authenticate("", about="chunk-tokens").encode()
    if not path.exists() or path.read_bytes() != key:
        write_private(path, key)


def probe_bmc(address: BmcAddress, *, count: CountRequest = lambda method, outcome: None) -> BmcFacts:
    """What a new server's BMC says."""
    with RedfishBmc(address, count=count) as bmc:
        return bmc.probe()


def set_bmc_password(address: BmcAddress, password: str, *, count: CountRequest = lambda method, outcome: None) -> None:
    """The account of this address was told its new password."""
    with RedfishBmc(address, count=count) as bmc:
        bmc.set_password(password)


def _without_password(database_url: str) -> str:
    return database_url and sa.make_url(database_url).set(query={}).render_as_string(hide_password=True)


def describe_site(settings: Settings) -> dict[str, Any]:
    """Versions, and the settings; what is secret in them the reader masks (case_file.py)."""
    names = ("dbos", "sqlalchemy", "sushy", "fastapi", "uvicorn", "cryptography")
    versions = {name: importlib.metadata.version(name) for name in names} | {"repave": __version__, "python": platform.python_version()}
    return {
        "versions": versions | {"kernel": platform.release()},
        "settings": settings.model_dump(mode="json") | {"database_url": _without_password(settings.database_url)},
    }


def build_api(site: Site) -> FastAPI:
    """CloudDC's routes and our own."""
    app = _bare_app()
    authenticator = Authenticator(site.store.access, now=utc_now)
    limiter = Limiter(site.settings.rate_per_s, site.settings.rate_burst)
    app.include_router(build_clouddc_router(site.store, site.fleet, authenticate=authenticator, limiter=limiter))
    app.include_router(build_iam_router(site.store, authenticate=authenticator, limiter=limiter))
    find_unreachable = functools.partial(
        find_unreachable_place, media_urls=site.places.media_urls, agent_url=site.places.agent_url, chunks_url=site.places.chunks_url
    )
    waits_s = {Step.BOOT_RAMDISK: site.settings.agent_ready_s, Step.FIRST_BOOT: site.settings.proof_s}
    probe = functools.partial(probe_bmc, count=site.metrics.count_bmc)
    set_password = functools.partial(set_bmc_password, count=site.metrics.count_bmc)
    desk = Desk(
        site.store, site.fleet, site.desk, authenticator.identify, probe, find_unreachable, set_password, site.power, site.webhooks.send_test,
        site.imports, waits_s, lambda: describe_site(site.settings),
    )  # fmt: skip
    app.include_router(build_operator_router(desk))
    app.include_router(build_pages_router(desk, Logins(site.store.people, now=site.store.now)))
    app.include_router(build_health_router(site.watch.health))
    app.include_router(build_metrics_router(site.store, authenticator, site.metrics.render))
    app.include_router(build_openapi_router(app))
    install_wire(app)
    return app


def build_provisioning(site: Site) -> FastAPI:
    app = _bare_app()
    chunks = ChunkPlaces(_chunk_key_path(site.settings).read_bytes(), site.places.chunks_url, tuple(split_caches(site.settings.chunk_caches)))
    app.include_router(build_agent_router(site.store, site.images, chunks))
    app.add_middleware(BodyLimit, limit_bytes=MAX_BODY_BYTES)
    app.add_middleware(EchoAsk)  # the last one is the outermost: refusals have it too

    async def refuse(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # FastAPI's own answer repeats the input

    async def wait(request: Request, error: Exception) -> Response:
        if not is_unavailable(error):
            raise error
        log.error("database not available", error=type(error).__name__)
        return Response(status_code=503)  # they ask again

    app.add_exception_handler(RequestValidationError, refuse)
    for of_the_store in OF_THE_STORE:
        app.add_exception_handler(of_the_store, wait)
    return app


def build_media(site: Site) -> FastAPI:
    app = _bare_app()
    assert site.settings.boot_iso is not None
    media = BootMedia(site.settings.boot_iso)
    app.include_router(build_media_router(site.store, site.places, lambda: media))
    return app


def _bare_app() -> FastAPI:
    return FastAPI(title="Repave", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)


def serve(folder: Path) -> None:
    """The service, until SIGTERM or Ctrl-C. Three listeners in one loop; workflows in threads of their own."""
    settings = load_settings(folder)
    host, _ = split_listen(settings.api_listen)
    if settings.api_certificate is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise RepaveError("bad-request", "api_listen is not loopback: api_certificate is needed.", field="api_listen")
    for name in ("api_certificate", "media_certificate"):
        _check_certificate(name, getattr(settings, name))
    configure_logging()
    stay_small()
    ensure_boot_iso(settings)
    try:
        _serve_site(settings)
    except (sa.exc.DBAPIError, OSError) as error:
        if not is_unavailable(error):
            raise
        raise RepaveError("database-unavailable", f"{getattr(error, 'orig', None) or error}.") from None


def _serve_site(settings: Settings) -> None:
    with open_site(settings) as site:
        site.store.servers.record_host(read_own_host())
        with contextlib.ExitStack() as stack:
            sockets: dict[str, socket.socket] = {}

            def first() -> None:
                begin_life(site.store, stand_path(settings.key_file))
                sweep_files(settings, site.images, site.engine.lease)
                for name in ("api_listen", "provisioning_listen", "media_listen", "media_https_listen", "chunks_listen"):
                    if value := getattr(settings, name):
                        sockets[name] = stack.enter_context(_listen(name, value))

            # A run that is taken up asks its BMC for media at once: who comes before the listeners are served waits in their queues, and is not refused.
            site.engine.start(site.effects, first=first)
            try:
                certificate = _certificate(settings, "chunks.pem", settings.chunks_url, settings.chunks_listen)  # nginx may want it too
                if listener := sockets.get("chunks_listen"):
                    stack.enter_context(start_chunk_process(listener, site.images.root, _chunk_key_path(settings), certificate, site.chunk_bytes))
                with site.watch.running(), site.media_sweep.running(), site.console_files.running(), site.webhooks.running():
                    uvloop.run(_serve(site, sockets))
            finally:
                site.engine.stop()


def _listen(name: str, value: str) -> socket.socket:
    """Raises RepaveError bad-request, naming the setting, where the address is not ours or is taken."""
    host, port = split_listen(value)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except (OSError, OverflowError) as error:  # the second: a port above 65535
        raise RepaveError("bad-request", f"{name} = {value}: {getattr(error, 'strerror', None) or error}.", field=name) from None


async def _serve(site: Site, sockets: dict[str, socket.socket]) -> None:
    """The API in this loop; machines (agents, boot media) in a loop and threads of their own, so that neither waits for the other's share."""
    settings = site.settings
    provisioning_certificate = _certificate(settings, "provisioning.pem", settings.agent_url, settings.provisioning_listen)
    api = {_server(build_api(site), settings.api_certificate): sockets["api_listen"]}
    machines = {
        _server(build_provisioning(site), provisioning_certificate): sockets["provisioning_listen"],
        _server(build_media(site), None): sockets["media_listen"],
    }
    if by_https := sockets.get("media_https_listen"):
        certificate = settings.media_certificate or _certificate(settings, "media.pem", *settings.media_url.split(), settings.media_https_listen)
        machines[_server(build_media(site), certificate)] = by_https
    loop = asyncio.get_running_loop()

    def stop() -> None:
        site.desk.over.set()
        site.engine.stop_effects()  # a BMC that finds our listeners closed has not refused our media
        for server in (*api, *machines):
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    answer_soon()
    log.info("serving", api=settings.api_listen, provisioning=settings.provisioning_listen, media=settings.media_listen, chunks=settings.chunks_listen)
    try:
        await asyncio.gather(_run_all(api), asyncio.to_thread(uvloop.run, _run_all(machines)))
    finally:
        stop()


def stay_small() -> None:
    """glibc keeps two arenas of memory, not one for nearly each thread: what one thread gave back another can use. To be called before there are threads.

    Measured in an hour of reinstalls with faults: RSS 220 MB and growing (7.4 % from minute 10 on), 180 MB with it and with
    smaller caches of SQLite's (3.3 %).
    """
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def answer_soon() -> None:
    """Requests wait less for the threads of the runs: threads take turns ten times as often, and what is loaded now is never searched for garbage again.

    Measured while 50 runs share the process and 2 cores: p99 of GET status 296 ms, 203 with the first alone; in another hour 298 ms, 180 with both.
    """
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()


async def _run_all(servers: dict[uvicorn.Server, socket.socket]) -> None:
    """Until all have ended; when one can not start, the others end too."""
    try:
        await asyncio.gather(*(server._serve([listener]) for server, listener in servers.items()))
    finally:
        for server in servers:
            server.should_exit = True


def _server(app: FastAPI, certificate: Path | None) -> uvicorn.Server:
    config = uvicorn.Config(
        app, loop="uvloop", http=WireProtocol, log_config=None, access_log=False, server_header=False,
        ssl_certfile=certificate, timeout_graceful_shutdown=3, timeout_keep_alive=20, lifespan="off",
    )  # fmt: skip
    return uvicorn.Server(config)


def _check_certificate(name: str, path: Path | None) -> None:
    """Raises RepaveError bad-request, naming the setting, where the file can not be served with."""
    try:
        if path is not None:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
    except OSError as error:  # SSLError is one
        raise RepaveError("bad-request", f"{name} = {path}: {error.strerror or error}. One PEM file: key and certificate chain.", field=name) from None


def _certificate(settings: Settings, file: str, *seen_as: str) -> Path:
    """By our own CA, for the hosts of these URLs and listeners and for this machine."""
    hosts = [urlsplit(url if "//" in url else f"//{url}").hostname for url in seen_as]
    return make_certificate(settings.key_file.parent, [*filter(None, hosts), "127.0.0.1", "localhost"], settings.data_dir / file)


def ensure_boot_iso(settings: Settings) -> None:
    """The boot media's ISO and the list of its contents are there: made from Debian packages, again with each version of the agent.

    An ISO that others put there stays as it is.
    """
    from repave.ramdisk.build import build_ramdisk, render_agent_archive, render_contents
    from repave.ramdisk.media import build_iso

    assert settings.boot_iso is not None and settings.cache_dir is not None
    carried = settings.boot_iso.with_suffix(".agent")
    agent = hashlib.sha256(render_agent_archive()).hexdigest() + (" nic-firmware" if settings.nic_firmware else "")
    if settings.boot_iso.exists() and (not carried.exists() or carried.read_text() == agent):
        return
    settings.boot_iso.parent.mkdir(parents=True, exist_ok=True)
    files = build_ramdisk(settings.cache_dir, progress=lambda line: log.info("ramdisk", step=line), nic_firmware=settings.nic_firmware)
    build_iso(files, settings.boot_iso)
    settings.boot_iso.with_suffix(".contents").write_text(render_contents(files))
    carried.write_text(agent)


def configure_logging() -> None:
    """One JSON object a line on standard error. Values whose name says secret are never shown."""

    def redact(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        for name in event:
            if any(word in name.lower() for word in ("password", "token", "secret", "nonce")):
                event[name] = "***"
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars, structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True), redact, structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(__import__("sys").stderr),
    )  # fmt: skip
