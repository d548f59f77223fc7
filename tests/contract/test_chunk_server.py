"""The chunk server: who gets what, what is refused, and that nobody takes another's share. Real TLS connections to the real process."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from repave.agent.chunks import ChunkSource
from repave.agent.http_client import Refused
from repave.ca import make_ca, make_certificate
from repave.chunk_process import ChunkBytes, start_chunk_process
from repave.images.chunk_server import AT_ONCE
from repave.images.chunk_token import find_token_run, render_chunk_token

KEY = b"the key of this site's chunks"
CHUNKS = {hashlib.sha256(data).hexdigest(): data for data in (os.urandom(size) for size in (*[1_200_000] * 5, 6_000_000))}
NAMES = list(CHUNKS)
LARGE = NAMES[-1]
HOUR = timedelta(hours=1)


def token(*, run: str = "run-1", key: bytes = KEY, expires_in: timedelta = HOUR) -> str:
    return render_chunk_token(key, run, datetime.now(UTC) + expires_in)


class Site:
    """An image folder and the process that serves it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        for name, data in CHUNKS.items():
            path = self.images / "chunks" / name[:2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (self.images / "secret").write_text("not a chunk")
        make_ca(folder)
        self.ca_pem = (folder / "ca.pem").read_text()
        self.certificate = make_certificate(folder, ["127.0.0.1", "localhost"], folder / "server.pem")
        self.key = folder / "chunks.key"
        self.key.write_bytes(KEY)
        self.sent = ChunkBytes()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.tls = ssl.create_default_context(cafile=str(folder / "ca.pem"))

    def source(self, bearer: str) -> ChunkSource:
        return ChunkSource([f"https://127.0.0.1:{self.port}/chunks"], token=bearer, ca_pem=self.ca_pem)

    def connect(self, *, room_bytes: int = 1 << 20) -> ssl.SSLSocket:
        connection = socket.socket()
        connection.settimeout(20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room_bytes)
        connection.connect(("127.0.0.1", self.port))
        return self.tls.wrap_socket(connection, server_hostname="127.0.0.1")

    def ask(self, method: str, path: str, bearer: str = "") -> http.client.HTTPResponse:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=self.tls)
        connection.request(method, path, headers={"Authorization": f"Bearer {bearer}"} if bearer else {})
        return connection.getresponse()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("chunks"))
    with made.listener, start_chunk_process(made.listener, made.images, made.key, made.certificate, made.sent):
        yield made


def test_an_agent_gets_every_chunk_over_one_connection(site: Site) -> None:
    source = site.source(token())
    assert [bytes(source.fetch(name)) for name in NAMES] == list(CHUNKS.values())


def test_caches_may_keep_a_chunk_for_ever(site: Site) -> None:
    answer = site.ask("GET", f"/chunks/{NAMES[0][:2]}/{NAMES[0]}", token())
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer.read() == CHUNKS[NAMES[0]]
    head = site.ask("HEAD", f"/chunks/{NAMES[0][:2]}/{NAMES[0]}", token())
    assert (head.headers["Content-Length"], head.read()) == ("1200000", b"")


BAD_TOKENS = {
    "none": lambda: "", "a letter": lambda: "x", "dots": lambda: "..", "expired": lambda: token(expires_in=-timedelta(seconds=1)),
    "another site's": lambda: token(key=b"another site's"), "another run's": lambda: token().replace("run-1", "run-2"),
    "made longer": lambda: f"{int(token().partition('.')[0]) + 9999}.{token().partition('.')[2]}", "cut": lambda: token()[:-1],
    "one more": lambda: token() + "0", "not ASCII": lambda: "\xfc" + token(),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_a_token_that_is_none_expired_forged_or_anothers_gives_nothing(site: Site, kind: str) -> None:
    for path in (f"/chunks/{NAMES[0][:2]}/{NAMES[0]}", "/token", "/elsewhere"):
        answer = site.ask("GET", path, BAD_TOKENS[kind]())
        assert (answer.status, answer.headers["Cache-Control"], answer.read()) == (401, "no-store", b"")


def test_an_agent_is_told_that_its_token_expired(site: Site) -> None:
    source = site.source(token(expires_in=-timedelta(seconds=1)))
    with pytest.raises(Refused, match="401"):
        source.fetch(NAMES[0])
    source.token = token()
    assert source.fetch(NAMES[0]) == CHUNKS[NAMES[0]]


def test_nginx_is_told_whether_a_token_is_good(site: Site) -> None:
    assert site.ask("GET", "/token", token()).status == 204


@pytest.mark.parametrize("path", ["/chunks/../secret", "/chunks/%2e%2e/secret", "/chunks/00/" + "a" * 64, "/chunks/00/" + "0" * 64, "/", "//etc/passwd"])
def test_what_is_no_chunk_is_not_there(site: Site, path: str) -> None:
    answer = site.ask("GET", path, token())
    assert (answer.status, answer.read()) == (404, b"")


@pytest.mark.parametrize(
    ("request_bytes", "begin"),
    [
        (b"POST /token HTTP/1.1\r\nAuthorization: Bearer %b\r\n\r\n", b"HTTP/1.1 405"),
        (b"GET /token HTTP/1.1\r\nAuthorization: Bearer %b\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /token HTTP/1.1\r\nAuthorization: Bearer %b\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /token\r\n\r\n", b""),
        (b"\x16\x03garbage\r\n\r\n", b""),
        (b"GET /token HTTP/1.1\r\nX: " + b"a" * 20000 + b"\r\n\r\n", b""),
    ],
    ids=["POST", "length", "chunked", "HTTP/0.9", "no HTTP", "endless head"],
)
def test_what_is_not_asked_for_properly_ends_the_connection(site: Site, request_bytes: bytes, begin: bytes) -> None:
    with site.connect() as connection:
        connection.sendall(request_bytes.replace(b"%b", token().encode()))
        answer = b""
        try:
            while more := connection.recv(4096):
                answer += more
        except OSError:
            pass
    assert answer.startswith(begin) and (begin or not answer)


def fetch_all(pool: ThreadPoolExecutor, source: ChunkSource) -> list[bytes]:
    return list(pool.map(lambda name: bytes(source.fetch(name)), NAMES))


def test_an_agent_with_many_connections_has_no_more_than_its_share(site: Site) -> None:
    """It opens twenty and takes nothing: as many answers as its share are under way, the others have not begun. Another agent has all it asks for."""
    asked = f"GET /chunks/{LARGE[:2]}/{LARGE} HTTP/1.1\r\nAuthorization: Bearer {token(run='greedy')}\r\n\r\n".encode()
    greedy = [site.connect(room_bytes=4096) for _ in range(20)]
    for connection in greedy:
        connection.sendall(asked)
    begun = 0
    for connection in greedy:
        connection.settimeout(0.2 if begun else 5)
        with contextlib.suppress(TimeoutError):
            begun += bool(connection.recv(1))
    assert begun == AT_ONCE
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert fetch_all(pool, site.source(token(run="modest"))) == list(CHUNKS.values())
    for connection in greedy:  # those that waited have hung up when their turn comes
        connection.close()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert fetch_all(pool, site.source(token(run="greedy"))) == list(CHUNKS.values())


def test_a_chunk_server_that_dies_is_there_again_and_one_without_its_service_ends(tmp_path: Path) -> None:
    site, others = Site(tmp_path), find_children()
    with site.listener, start_chunk_process(site.listener, site.images, site.key, site.certificate, site.sent):
        source = site.source(token())
        assert source.fetch(NAMES[0]) == CHUNKS[NAMES[0]]
        [first] = find_children() - others
        os.kill(first, signal.SIGKILL)
        assert source.fetch(NAMES[1], while_true=lambda: True) == CHUNKS[NAMES[1]]
        [second] = find_children() - others
        assert second != first
        deadline = time.monotonic() + 10
        while not 2_100_000 < site.sent.read() < 2_600_000:  # of both processes; what was just sent is counted a moment later, or never when it is killed
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not Path(f"/proc/{second}").exists()


def find_children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_token_outlives_no_second_of_its_expiry() -> None:
    made = render_chunk_token(KEY, "run-1", datetime.fromtimestamp(1000, UTC))
    assert (find_token_run(KEY, made, now_s=999.9), find_token_run(KEY, made, now_s=1000)) == ("run-1", None)
