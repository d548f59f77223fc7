"""Where the agent's chunks come from: caches near the rack first, the origin last. Each is any web server with the files BASE/ab/SHA256.

A cache is believed nothing: what it gives is hashed here, and one that fails, stalls or gives something else is left alone for `REST_S`, so
that a bad one costs one more request now and then. What the origin gives is the writer's to check (agent/writer.py), as ever.
"""

from __future__ import annotations

import hashlib
import http.client
import mmap
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence

from repave.agent.client import BACKOFF_S, TIMEOUT_S, Refused, Unreachable, trust_only

CHUNK_CAP_BYTES = 65 * 1024 * 1024  # a window is at most 64 MiB (manifest.py), and zstd adds next to nothing
REST_S = 20.0
CACHE_CONNECT_S = 3.0  # it is near, and there is another place to ask
CACHE_CHUNK_S = 30.0  # for a whole chunk from a cache: one that drips is no cache. 1.2 MB in that time is 40 kB/s
_PIECE_BYTES = 256 * 1024


class ChunkSource:
    """Fetches chunks; threads may share it. `base_urls`: caches in the order they are asked, the origin last; http or https.

    Args:
        token: sent as bearer token to each of them, "" = none. May be set anew at any time.
        ca_pem: the one CA that https is trusted by; "" = those of the system.
    """

    def __init__(self, base_urls: Sequence[str], *, token: str = "", ca_pem: str = "") -> None:
        if not base_urls:
            raise ValueError("no place to fetch chunks from")
        tls = trust_only(ca_pem) if ca_pem else ssl.create_default_context() if any(u.startswith("https:") for u in base_urls) else None
        *caches, origin = base_urls
        self._caches = [_Cache(_Place(url, tls, CACHE_CONNECT_S)) for url in caches]
        self._origin = _Place(origin, tls, TIMEOUT_S)
        self._last = _Last()
        self.token = token

    def prove(self, sha256: str, *, while_true: Callable[[], bool]) -> bytes:
        """A chunk of the origin's, by which it is known that it can be had when caches fail. To be verified. Raises as `fetch` does."""
        return bytes(self._insist(sha256, (), while_true))

    def fetch(self, sha256: str, *, while_true: Callable[[], bool] = lambda: False) -> memoryview:
        """The chunk's bytes, until this thread fetches the next: verified where a cache gave them, to be verified where the origin did.

        Asks all places again while none has an answer and `while_true()`. Raises: Refused where the origin answers 4xx; Unreachable where nobody has
        an answer; ValueError where the origin's is too long.
        """
        return self._insist(sha256, self._caches, while_true)

    def ask_ahead(self, sha256: str) -> None:
        """This thread will fetch this chunk next: where its last one came from, it is asked for now, and travels while that one is worked on."""
        if self._last.place is not None:
            self._last.place.ask(sha256, self.token)

    def _insist(self, sha256: str, caches: Sequence[_Cache], while_true: Callable[[], bool]) -> memoryview:
        tries = 0
        while True:
            for cache in caches:
                if (found := cache.find(sha256, self.token)) is not None:
                    self._now_from(cache.place)
                    return found
            try:
                self._now_from(self._origin)
                return self._origin.get(sha256, self.token)
            except Unreachable:
                time.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                tries += 1
                if not while_true():
                    raise

    def _now_from(self, place: _Place) -> None:
        """What this thread has asked ahead for elsewhere it does not wait for."""
        if self._last.place not in (None, place):
            self._last.place.forget()
        self._last.place = place


class _Cache:
    """A place that may fail: asked while it does well, and after a failure by one thread every `REST_S`."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        self._rests_until = 0.0  # 0 = it does well
        self._lock = threading.Lock()

    def find(self, sha256: str, token: str) -> memoryview | None:
        """The chunk, which has this digest; None where the cache rests or has just failed."""
        if not self._may_ask():
            return None
        try:
            data = self.place.get(sha256, token, until=time.monotonic() + CACHE_CHUNK_S)
        except (Refused, Unreachable, ValueError):
            data = None
        good = data is not None and hashlib.sha256(data).hexdigest() == sha256
        with self._lock:
            self._rests_until = 0.0 if good else time.monotonic() + REST_S
        return data if good else None

    def _may_ask(self) -> bool:
        with self._lock:
            now = time.monotonic()
            if now < self._rests_until:
                return False
            if self._rests_until:
                self._rests_until = now + REST_S  # this thread looks whether it does well again; the others do not wait for it
            return True


class _Last(threading.local):
    """Where each thread's last chunk came from."""

    place: _Place | None = None


class _OfThread(threading.local):
    """What each thread has of a place. `buffer` is as long as a chunk can be; what no answer has filled yet takes no memory."""

    connection: http.client.HTTPConnection | None = None
    asked = ""  # the chunk whose answer comes first on it; "" = none
    buffer: memoryview | None = None

    def room(self) -> memoryview:
        if self.buffer is None:
            self.buffer = memoryview(mmap.mmap(-1, CHUNK_CAP_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return self.buffer


class _Place:
    """One web server, with one connection a thread that is kept open. No redirects, no proxies."""

    def __init__(self, base_url: str, tls: ssl.SSLContext | None, connect_s: float) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"{base_url} is not http(s)://HOST[:PORT][/PATH]")
        self._scheme, self._host, self._port = parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        self._path, self._tls, self._connect_s = parts.path.rstrip("/"), tls, connect_s
        self._mine = _OfThread()

    def get(self, sha256: str, token: str, *, until: float | None = None) -> memoryview:
        """One try, and one more where a kept connection turns out to be closed.

        Raises: Refused on 4xx; Unreachable on no whole answer (`until` is a time.monotonic()), 3xx and 5xx; ValueError on one that is too long.
        """
        kept = self._mine.connection is not None
        try:
            return self._exchange(sha256, token, until)
        except _Closed:
            if not kept:
                raise
            return self._exchange(sha256, token, until)

    def ask(self, sha256: str, token: str) -> None:
        """What this thread will `get` next, on the connection it has. Where that fails, `get` finds out."""
        connection = self._mine.connection
        if connection is None or self._mine.asked:
            return
        try:
            self._request(connection, sha256, token)
        except (OSError, http.client.HTTPException):
            self._drop()

    def forget(self) -> None:
        """What this thread has asked ahead for here is not wanted any more."""
        if self._mine.asked:
            self._drop()

    def _request(self, connection: http.client.HTTPConnection, sha256: str, token: str) -> None:
        connection.request("GET", self._path_of(sha256), headers={"Authorization": f"Bearer {token}"} if token else {})
        self._mine.asked = sha256

    def _path_of(self, sha256: str) -> str:
        return f"{self._path}/{sha256[:2]}/{sha256}"

    def _exchange(self, sha256: str, token: str, until: float | None) -> memoryview:
        path, answered = self._path_of(sha256), False
        self._mine.room()  # no memory is no fault of the place
        if self._mine.connection is not None and self._mine.asked not in ("", sha256):
            self._drop()  # the answer that comes is to another question
        try:
            connection = self._mine.connection or self._connect()
            if not self._mine.asked:
                self._request(connection, sha256, token)
            self._mine.asked = ""
            response = connection.getresponse()
            answered = True
            body = self._read(response, until)
            if response.will_close:
                self._drop()
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            closed = not answered and not isinstance(error, TimeoutError)
            raise (_Closed if closed else Unreachable)(f"{type(error).__name__}: {error}") from None
        except BaseException:
            self._drop()
            raise
        if 400 <= response.status < 500:
            raise Refused(response.status, path)
        if response.status != 200:
            raise Unreachable(f"{path} was answered with {response.status}")
        return body

    def _read(self, response: http.client.HTTPResponse, until: float | None) -> memoryview:
        """The body, whole, in this thread's buffer: new memory for each megabyte costs as much as receiving it (measured).

        Raises Unreachable where it ends early or comes too slowly, ValueError where it is longer than a chunk can be.
        """
        buffer, size = self._mine.room(), 0
        while not response.isclosed() and response.length != 0:
            if size == len(buffer):
                raise ValueError(f"an answer of more than {CHUNK_CAP_BYTES} bytes is no chunk")
            free = buffer[size:]
            if until is None:
                got = response.readinto(free[: response.length])
            else:  # what is there, so that one who drips is looked at too
                piece = response.read1(min(_PIECE_BYTES, len(free)))
                got = len(piece)
                free[:got] = piece
                if time.monotonic() > until:
                    raise Unreachable("the answer comes too slowly")
            if not got:
                break
            size += got
        if response.length:
            raise Unreachable("the answer ended early")
        response.read()  # lets the connection be used again
        return buffer[:size]

    def _connect(self) -> http.client.HTTPConnection:
        if self._scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(self._host, self._port, timeout=self._connect_s, context=self._tls)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._connect_s)
        self._mine.connection, self._mine.asked = connection, ""
        connection.connect()
        connection.sock.settimeout(TIMEOUT_S)  # one that is cold waits for the origin
        return connection

    def _drop(self) -> None:
        if self._mine.connection is not None:
            self._mine.connection.close()
        self._mine.connection, self._mine.asked = None, ""


class _Closed(Unreachable):
    """Not even a first byte of an answer."""
