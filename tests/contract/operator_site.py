"""A site for tests of the operator API and the command line: the real store, admission, image store and routes on uvicorn at a
loopback port. The far ends are fakes: a probe that answers for a BMC, and a queue behind which nothing runs."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import uvicorn
from fastapi import FastAPI
from openapi_answers import Document

from repave.api.asgi import install_wire
from repave.api.clouddc import build_clouddc_router
from repave.api.health import build_health_router
from repave.api.limits import Limiter
from repave.api.metrics import build_metrics_router
from repave.api.openapi import build_openapi_router, render_openapi
from repave.api.operator.desk import Desk
from repave.api.operator.routes import build_operator_router
from repave.app import ImageDesk
from repave.auth import Authenticator
from repave.auth.login import Logins
from repave.bmc import BmcAddress, BmcFacts, Power
from repave.domain.model import Image, Project, Role, Server
from repave.domain.urls import find_unreachable_place
from repave.errors import BmcError
from repave.images.fetch import ImageSources
from repave.images.store import ImageStore
from repave.metrics import Metrics
from repave.pages import build_pages_router
from repave.secrets import Sealer
from repave.store import Store, new_id
from repave.webhooks import WebhookSender
from repave.workflow.fleet import Fleet
from repave.workflow.power import PowerSwitch

BMC_PASSWORD = "calvin-and-Hobbes-7"
NEW_PASSWORD = "Fresh-Start-42"


@dataclass
class Bmcs:
    """The BMCs out there, by URL: a serial number, or an error's slug for one that does not work."""

    known: dict[str, str] = field(default_factory=dict)
    asked: list[BmcAddress] = field(default_factory=list)
    passwords: dict[str, str] = field(default_factory=dict)  # of those that have another one than BMC_PASSWORD
    rotate: str = "well"  # or: an error's slug, "lies" (says yes, keeps the old one), "dies" (takes it, then nobody answers any more)

    def set_password(self, address: BmcAddress, password: str) -> None:
        self.probe(address)
        if self.rotate not in ("well", "lies", "dies"):
            raise BmcError(self.rotate)
        if self.rotate != "lies":
            self.passwords[address.url] = password
        if self.rotate == "dies":
            self.known[address.url] = "unreachable"

    model: str = "R1"
    off: set[str] = field(default_factory=set)  # URLs of BMCs whose server is off
    switched: list[str] = field(default_factory=list)  # what was done to the power of servers
    before_switch: Callable[[], None] = lambda: None  # what happens just then, elsewhere

    @contextlib.contextmanager
    def open(self, server: Server, before_write: Callable[[], None] = lambda: None, run_id: str = "") -> Iterator[Any]:
        self.probe(BmcAddress.of(server, BMC_PASSWORD))
        yield OpenedBmc(self, server, before_write)

    def probe(self, address: BmcAddress) -> BmcFacts:
        self.asked.append(address)
        what = self.known.get(address.url, "unreachable")
        if not what.startswith("SN"):
            raise BmcError(what)
        if address.password != self.passwords.get(address.url, BMC_PASSWORD):
            raise BmcError("auth")
        uuid = f"00000000-0000-0000-0000-{int(what[2:]):012}"
        return BmcFacts(
            "/redfish/v1/Systems/1",
            "ACME",
            self.model,
            what,
            uuid,
            Power.OFF if address.url in self.off else Power.ON,
            ("/cd",),
            ("Cd",),
            ("AA:BB:CC:00:00:01",),
            "ab" * 32,
            "amd64",
        )


@dataclass
class OpenedBmc:
    """What of the driver's contract an order about power needs."""

    bmcs: Bmcs
    server: Server
    before_write: Callable[[], None]

    def power_off(self, *, graceful_s: float = 0, while_waiting: Callable[[], None] = lambda: None) -> bool:
        self._switch(f"{self.server.name} {'shut down' if graceful_s else 'cut'}")
        self.bmcs.off.add(self.server.bmc_url)
        return not graceful_s

    def power_on(self) -> None:
        self._switch(f"{self.server.name} on")
        self.bmcs.off.discard(self.server.bmc_url)

    def _switch(self, what: str) -> None:
        self.bmcs.before_switch()
        self.before_write()
        self.bmcs.switched.append(what)


@dataclass
class Site:
    store: Store
    images: ImageDesk
    bmcs: Bmcs
    url: str
    project: Project
    other: Project
    document: Document
    tokens: dict[str, str]  # by role; "other" is an admin of the other project, not of the site

    def ask(self, method: str, path: str, *, as_: str = "admin", **how: Any) -> requests.Response:
        headers = {"X-Auth-Token": self.tokens[as_]} | how.pop("headers", {})
        answer = requests.request(method, f"{self.url}/repave/v1{path}", headers=headers, timeout=20, **how)
        self.document.check(method, f"/repave/v1{path}".partition("?")[0], answer)
        return answer

    def add_server(self, name: str, *, project: Project | None = None, **more: Any) -> dict[str, Any]:
        url = f"https://{name}.bmc.invalid"
        self.bmcs.known.setdefault(url, f"SN{len(self.bmcs.known) + 1}")
        body = {"name": name, "bmc_url": url, "bmc_username": "root", "bmc_password": BMC_PASSWORD} | more
        answer = self.ask("POST", "/servers", json=body, params={"project": project.name} if project else {})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def add_image(self, name: str, *, arch: str = "amd64", os_type: str = "Linux") -> Image:
        """A row only: nothing here reads its chunks."""
        image = Image(new_id(), self.project.id, name, os_type, arch, "uefi", "0" * 64, 2**30, 512, 10**6, 10**7, datetime.now(UTC))
        self.store.images.add_image(image)
        return image

    def files(self) -> list[str]:
        return sorted(p.name for p in self.images.folder.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != "lock")


@contextlib.contextmanager
def start_site(
    folder: Path, *, media_url: str = "http://media.invalid", sources: ImageSources | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Iterator[Site]:
    folder.mkdir(exist_ok=True)
    store = Store.open(f"sqlite:///{folder / 'repave.db'}", sealer=Sealer.open(folder / "secret" / "key"), now=now)
    project, other = store.access.add_project("default"), store.access.add_project("other")
    tokens = {role.value: store.access.add_credential(project.id, f"the {role.value}", role)[2] for role in Role}
    tokens["other"] = store.access.add_credential(other.id, "elsewhere", Role.ADMIN)[2]
    images = ImageDesk(ImageStore(folder / "images"), folder / "images", 2**26, sources=sources)
    bmcs, authenticator = Bmcs(), Authenticator(store.access, now=now)

    fleet = Fleet(store, lambda conn, runs: None, run_timeout_s=3600)
    webhooks = WebhookSender(store, local_addresses=True)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    find_unreachable = functools.partial(
        find_unreachable_place, media_urls=(media_url,), agent_url="https://agents.invalid", chunks_url="https://chunks.invalid"
    )
    power = PowerSwitch(store, fleet, bmcs.open, graceful_s=60)
    desk = Desk(store, fleet, images, authenticator.identify, bmcs.probe, find_unreachable, bmcs.set_password, power, webhooks.send_test, [])
    app.include_router(build_operator_router(desk))
    app.include_router(build_pages_router(desk, Logins(store.people, now=now)))
    app.include_router(build_clouddc_router(store, fleet, authenticate=authenticator, limiter=Limiter()))
    app.include_router(build_health_router(lambda: {}))
    metrics = Metrics(store, health=dict, chunk_bytes=lambda: 0, imports=[])
    app.include_router(build_metrics_router(store, authenticator, metrics.render))
    app.include_router(build_openapi_router(app))
    install_wire(app)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Site(store, images, bmcs, f"http://127.0.0.1:{port}", project, other, Document(render_openapi(app)), tokens)
    finally:
        server.should_exit = True
        thread.join(10)
        store.close()
