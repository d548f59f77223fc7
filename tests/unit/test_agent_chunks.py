"""Where the agent's chunks come from, against real small web servers, good and bad."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from repave.agent import chunks
from repave.agent.chunks import ChunkSource
from repave.agent.http_client import Refused, Unreachable

FILES = {hashlib.sha256(data).hexdigest(): data for data in (bytes([n]) * 300_000 for n in range(8))}
NAMES = list(FILES)


class Place(http.server.ThreadingHTTPServer):
    """A web server with the chunk files below /chunks. `spoil`: what it does to a body, "" = nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.connections = self.hung_up = 0
        self.status, self.spoil, self.gone = 200, "", threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/chunks"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Place

    def log_message(self, *args: object) -> None: ...

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def finish(self) -> None:
        super().finish()
        self.server.hung_up += 1

    def do_GET(self) -> None:
        place, (_, folder, prefix, name) = self.server, self.path.split("/")
        spoil = place.spoil  # as it was when this was asked: a test may set another while this one is still answered
        assert (folder, prefix) == ("chunks", name[:2])
        place.asked.append(name)
        place.tokens.add(self.headers["Authorization"])
        body = FILES[name] if place.status == 200 else b"no"
        if spoil == "flipped":
            body = b"?" + body[1:]
        if spoil == "silent":
            place.gone.wait(30)
            return
        if spoil == "moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            body = b""
        else:
            self.send_response(place.status)
        if spoil == "endless":
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 20))
        if spoil == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (body[:100_000], body[100_000:], b""):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if spoil == "dripping":
            with contextlib.suppress(OSError):
                for at in range(len(body)):
                    self.wfile.write(body[at : at + 1])
                    if place.gone.wait(0.01):
                        break
            return
        self.wfile.write(body[: len(body) // 2] if spoil == "cut" else body)
        if spoil in ("cut", "closing"):  # the second: after a whole answer, without a word
            self.close_connection = True


@contextlib.contextmanager
def serving() -> Iterator[Place]:
    place = Place()
    thread = threading.Thread(target=place.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield place
    finally:
        place.gone.set()
        place.shutdown()
        place.server_close()


@pytest.fixture
def cache() -> Iterator[Place]:
    with serving() as place:
        yield place


@pytest.fixture
def origin() -> Iterator[Place]:
    with serving() as place:
        yield place


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(chunks, "CACHE_CHUNK_S", 0.5)


def test_chunks_come_from_the_cache_over_one_connection_and_the_origin_is_not_asked(cache: Place, origin: Place) -> None:
    source = ChunkSource([cache.url, origin.url], token="expiry.run.mac")
    assert [bytes(source.fetch(name)) for name in NAMES] == list(FILES.values())
    assert (cache.asked, origin.asked, cache.connections) == (NAMES, [], 1)
    assert cache.tokens == {"Bearer expiry.run.mac"}


def test_a_plain_web_server_alone_is_enough_and_gets_no_token(origin: Place) -> None:
    assert ChunkSource([f"{origin.url}/"]).fetch(NAMES[0]) == FILES[NAMES[0]]
    assert origin.tokens == {None}


@pytest.mark.parametrize("spoil", ["flipped", "silent", "moved", "endless", "dripping", "cut"])
def test_a_bad_cache_costs_one_request_and_is_left_alone(cache: Place, origin: Place, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    monkeypatch.setattr(chunks, "CHUNK_CAP_BYTES", 16 << 20)
    cache.spoil = spoil
    source = ChunkSource([cache.url, origin.url])
    began = time.monotonic()
    assert [bytes(source.fetch(name)) for name in NAMES] == list(FILES.values())
    assert (cache.asked, origin.asked) == (NAMES[:1], NAMES)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("status", [401, 404, 500, 503])
def test_a_cache_that_refuses_is_left_alone(cache: Place, origin: Place, status: int) -> None:
    cache.status = status
    source = ChunkSource([cache.url, origin.url])
    assert [bytes(source.fetch(name)) for name in NAMES] == list(FILES.values())
    assert (cache.asked, origin.asked) == (NAMES[:1], NAMES)


def test_a_dead_cache_costs_one_try(origin: Place) -> None:
    with serving() as dead:
        url = dead.url
    source = ChunkSource([url, origin.url])
    assert [bytes(source.fetch(name)) for name in NAMES] == list(FILES.values())
    assert origin.asked == NAMES


def test_four_threads_lose_one_request_each_to_a_bad_cache(cache: Place, origin: Place) -> None:
    cache.spoil = "flipped"
    source = ChunkSource([cache.url, origin.url])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: bytes(source.fetch(name)), NAMES * 5)) == list(FILES.values()) * 5
    assert len(cache.asked) <= 4


def test_a_cache_that_does_well_again_is_asked_again_by_one_thread_first(cache: Place, origin: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "REST_S", 1)
    cache.status = 503
    source = ChunkSource([cache.url, origin.url])
    source.fetch(NAMES[0])
    time.sleep(1.1)
    cache.spoil = "silent"
    cache.status = 200
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: bytes(source.fetch(name)), NAMES[:4])) == [FILES[n] for n in NAMES[:4]]
    assert len(cache.asked) == 2
    cache.spoil = ""
    time.sleep(1.1)
    assert [bytes(source.fetch(n)) for n in NAMES] == list(FILES.values())
    assert cache.asked[2:] == NAMES


def test_the_second_cache_is_asked_where_the_first_fails(cache: Place, origin: Place) -> None:
    with serving() as second:
        cache.status = 404
        assert ChunkSource([cache.url, second.url, origin.url]).fetch(NAMES[0]) == FILES[NAMES[0]]
        assert (len(cache.asked), len(second.asked), len(origin.asked)) == (1, 1, 0)


def test_a_chunk_without_a_length_is_whole(origin: Place) -> None:
    origin.spoil = "chunked"
    source = ChunkSource([origin.url])
    assert [bytes(source.fetch(n)) for n in NAMES] == list(FILES.values())
    assert origin.connections == 1


def test_a_kept_connection_that_was_closed_meanwhile_is_no_failure(origin: Place) -> None:
    origin.spoil = "closing"
    source = ChunkSource([origin.url])
    assert [bytes(source.fetch(n)) for n in NAMES[:3]] == [FILES[n] for n in NAMES[:3]]
    assert origin.connections == 3


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_next_chunk_travels_while_the_last_one_is_worked_on(cache: Place, origin: Place) -> None:
    for place, source in ((origin, ChunkSource([origin.url])), (cache, ChunkSource([cache.url, origin.url]))):
        for number, name in enumerate(NAMES[:4]):
            assert source.fetch(name) == FILES[name]
            source.ask_ahead(NAMES[number + 1])
            wait_until(lambda place=place, asked=NAMES[: number + 2]: place.asked == asked)
        assert place.connections == 1


def test_what_was_asked_ahead_is_never_taken_for_another_chunk(cache: Place, origin: Place) -> None:
    source = ChunkSource([cache.url, origin.url])
    source.ask_ahead(NAMES[5])  # nothing was fetched: there is no place to ask
    assert source.fetch(NAMES[0]) == FILES[NAMES[0]]
    source.ask_ahead(NAMES[1])
    source.ask_ahead(NAMES[3])
    assert source.fetch(NAMES[2]) == FILES[NAMES[2]]
    source.ask_ahead(NAMES[4])
    cache.spoil = "flipped"
    assert [bytes(source.fetch(name)) for name in NAMES] == list(FILES.values())


def test_what_was_asked_ahead_on_a_connection_that_was_closed_is_asked_for_again(origin: Place) -> None:
    source = ChunkSource([origin.url])
    origin.spoil = "closing"
    assert source.fetch(NAMES[0]) == FILES[NAMES[0]]
    wait_until(lambda: origin.hung_up == 1)
    source.ask_ahead(NAMES[1])
    assert source.fetch(NAMES[1]) == FILES[NAMES[1]]
    assert (origin.asked, origin.connections) == (NAMES[:2], 2)


def test_an_answer_asked_ahead_that_breaks_off_is_asked_for_again(origin: Place) -> None:
    source = ChunkSource([origin.url])
    assert source.fetch(NAMES[0]) == FILES[NAMES[0]]
    origin.spoil = "cut"
    source.ask_ahead(NAMES[1])
    wait_until(lambda: len(origin.asked) == 2)
    assert source.fetch(NAMES[1], while_true=lambda: not setattr(origin, "spoil", "")) == FILES[NAMES[1]]
    assert origin.asked[1:] == [NAMES[1]] * len(origin.asked[1:]) and len(origin.asked) > 2


def test_what_was_asked_ahead_of_a_place_that_is_not_asked_any_more_is_hung_up_on(cache: Place, origin: Place) -> None:
    cache.status = 404
    source = ChunkSource([cache.url, origin.url])
    assert source.fetch(NAMES[0]) == FILES[NAMES[0]]
    source.ask_ahead(NAMES[1])
    wait_until(lambda: len(origin.asked) == 2)
    cache.status = 200
    source._caches[0]._rests_until = 0.0  # it has rested
    assert source.fetch(NAMES[1]) == FILES[NAMES[1]] and cache.asked == NAMES[:2]
    wait_until(lambda: origin.hung_up == 1)
    assert source.fetch(NAMES[2]) == FILES[NAMES[2]] and origin.asked == NAMES[:2]


@pytest.mark.parametrize(("spoil", "status", "error"), [("cut", 200, Unreachable), ("moved", 200, Unreachable), ("", 503, Unreachable), ("", 404, Refused)])
def test_the_origins_failure_is_told(origin: Place, spoil: str, status: int, error: type[Exception]) -> None:
    origin.spoil, origin.status = spoil, status
    with pytest.raises(error):
        ChunkSource([origin.url]).fetch(NAMES[0])


def test_the_origin_is_asked_again_while_it_matters(origin: Place) -> None:
    origin.status = 503
    looks = 0

    def mend() -> bool:
        nonlocal looks
        looks += 1
        origin.status = 503 if looks < 2 else 200
        return True

    assert ChunkSource([origin.url]).fetch(NAMES[0], while_true=mend) == FILES[NAMES[0]]
    assert len(origin.asked) == 3


def test_the_origins_lie_is_left_to_the_writer(origin: Place) -> None:
    origin.spoil = "flipped"
    assert ChunkSource([origin.url]).fetch(NAMES[0]) != FILES[NAMES[0]]


@pytest.mark.parametrize("url", ["", "ftp://h/", "http://", "http://h/?a=b", "http://user:word@h/", "h:80"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        ChunkSource([url])
