"""A site for contract tests: the real store, admission and routes on uvicorn at a loopback port; nothing runs behind the queue."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel

from repave.api.asgi import WireProtocol, install_wire
from repave.api.clouddc import build_clouddc_router
from repave.api.iam import build_iam_router
from repave.api.limits import Limiter
from repave.auth import Authenticator
from repave.domain.model import Image, Project, Role, Server
from repave.secrets import Sealer
from repave.store import Store
from repave.store.tables import BATCHES, INSTANCES
from repave.workflow.fleet import Fleet

PASSWORD = "Fresh-Start-42"
Headers = Sequence[tuple[str, str]]


@dataclass
class Key:
    ak: str
    sk: str
    token: str


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Site:
    """`instances` are running, on `image`; the other project has one instance."""

    store: Store
    port: int
    project: Project
    operator: Key
    viewer: Key
    expired: Key
    other: Project
    other_key: Key
    other_instance: str
    image: str
    windows_image: str

    @property
    def path(self) -> str:
        return f"/v1/{self.project.id}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_instance(self, project: Project | None = None, *, image: str | None = "", os_type: str = "Linux") -> str:
        """A running instance on a server of its own; image "" = the Linux image, None = unknown."""
        owner, now = project or self.project, datetime.now(UTC)
        name = f"node-{uuid.uuid4().hex[:12]}"
        server = Server(
            str(uuid.uuid4()), name, owner.id, "https://bmc.invalid", "admin", "true", None, None, "ACME", "R1", name, str(uuid.uuid4()), (),
            "x86_64", "uefi", "R07", "12", {}, None, now,
        )  # fmt: skip
        made = self.store.servers.add_server(server, bmc_password="bmc-secret", blank=False, os_type=os_type)
        with self.store.engine.begin() as conn:
            conn.execute(sa.update(INSTANCES).where(INSTANCES.c.id == made.id).values(image_id=self.image if image == "" else image))
        return made.id

    def count_batches(self) -> int:
        with self.store.engine.connect() as conn:
            return conn.execute(sa.select(sa.func.count()).select_from(BATCHES)).scalar_one()

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Headers | None = None) -> Answer:
        """Exactly these headers (and Host); with the operator's token where none are given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in [("X-Auth-Token", self.operator.token)] if headers is None else headers:
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())

    def reinstall(self, body: Any, headers: Headers | None = None, *, path: str | None = None) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("PUT", path or f"{self.path}/instances/reinstall", raw, headers)

    def sign(
        self, method: str, path: str, body: bytes = b"", *, key: Key | None = None, at: datetime | None = None,
        headers: Headers = (), signed: Sequence[str] = ("host", "x-sdk-date"),
    ) -> list[tuple[str, str]]:  # fmt: skip
        """Headers of a request signed as section 5.2 says, written apart from the product."""
        key = key or self.operator
        date = (at or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
        known = {"host": f"127.0.0.1:{self.port}", "x-sdk-date": date, **{n.lower(): v for n, v in headers}}
        bare, _, query = path.partition("?")
        lines = [method, quote(bare, safe="/~") + "/", query, *(f"{n}:{known[n]}" for n in signed), "", ";".join(signed)]
        lines.append(known.get("x-sdk-content-sha256", hashlib.sha256(body).hexdigest()))
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        signature = hmac.new(key.sk.encode(), f"SDK-HMAC-SHA256\n{date}\n{digest}".encode(), hashlib.sha256).hexdigest()
        value = f"SDK-HMAC-SHA256 Access={key.ak}, SignedHeaders={';'.join(signed)}, Signature={signature}"
        return [*headers, ("X-Sdk-Date", date), ("Authorization", value)]


@contextlib.contextmanager
def open_site(folder: Path, *, per_s: float = 10_000, burst: int = 10_000, http: type[WireProtocol] = WireProtocol) -> Iterator[Site]:
    now = lambda: datetime.now(UTC)  # noqa: E731
    store = Store.open(f"sqlite:///{folder}/wire.db", sealer=Sealer.open(folder / "key"), now=now)
    ours, other = store.access.add_project("default"), store.access.add_project("other")
    site = Site(store, 0, ours, *_keys(store, ours), other, _key(store, other, Role.ADMIN), "", "", "")
    site.image, site.windows_image = (_image(store, ours, os_type) for os_type in ("Linux", "Windows"))
    site.other_instance = site.add_instance(other)

    app = FastAPI()
    fleet = Fleet(store, lambda conn, runs: None, run_timeout_s=600)
    limiter, authenticator = Limiter(per_s, burst), Authenticator(store.access, now=now)
    app.include_router(build_clouddc_router(store, fleet, authenticate=authenticator, limiter=limiter))
    app.include_router(build_iam_router(store, authenticate=authenticator, limiter=limiter))

    @app.get("/v1/broken")
    def broken() -> None:
        raise ValueError("a secret detail")

    @app.post("/repave/v1/things")
    def things(thing: Thing) -> None: ...

    @app.post("/repave/v1/images")
    async def images(request: Request) -> int:
        Authenticator(store.access, now=now).identify(request.state.presented)
        return sum([len(piece) async for piece in request.stream()])

    install_wire(app)
    try:
        with serving(app, http) as site.port:
            yield site
    finally:
        store.close()


@contextlib.contextmanager
def serving(app: FastAPI, http: type[WireProtocol] = WireProtocol) -> Iterator[int]:
    """The app on a loopback port, in a thread that ends with the block."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, http=http, log_config=None, lifespan="off", server_header=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=10)


class Thing(BaseModel):
    password: int


def _keys(store: Store, project: Project) -> tuple[Key, Key, Key]:
    past = datetime.now(UTC) - timedelta(minutes=1)
    return _key(store, project, Role.OPERATOR), _key(store, project, Role.VIEWER), _key(store, project, Role.ADMIN, past)


def _key(store: Store, project: Project, role: Role, expires_at: datetime | None = None) -> Key:
    made, sk, token = store.access.add_credential(project.id, role.value, role, expires_at=expires_at)
    return Key(made.ak, sk, token)


def _image(store: Store, project: Project, os_type: str) -> str:
    image = Image(str(uuid.uuid4()), project.id, os_type, os_type, "x86_64", "uefi", "0" * 64, 1, 512, 1, 1, datetime.now(UTC))
    store.images.add_image(image)
    return image.id
