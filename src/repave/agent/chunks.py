"""Where the agent's chunks come from: caches near the rack first, the origin last. Each is any web server with the files BASE/ab/SHA256.

A cache is believed nothing: what it gives is hashed here, and one that fails, stalls or gives something else is left alone for `REST_S`, so
that a bad one costs one more request now and then. What the origin gives is the writer's to check (agent/writer.py), as ever.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from repave.agent.http_client import BACKOFF_S, TIMEOUT_S, Address, Closed, Connection, Refused, Unreachable, make_room, parse_address, trust

if TYPE_CHECKING:
    import ssl

CHUNK_CAP_BYTES = 65 * 1024 * 1024  # a window is at most 64 MiB (manifest.py), and zstd adds next to nothing
REST_S = 20.0
CACHE_CONNECT_S = 3.0  # it is near, and there is another place to ask
CACHE_CHUNK_S = 30.0  # for a whole chunk from a cache: one that drips is no cache. 1.2 MB in that time is 40 kB/s


class ChunkSource:
    """Fetches chunks; threads may share it. `base_urls`: caches in the order they are asked, the origin last; http or https.

    Args:
        token: sent as bearer token to each of them, "" = none. May be set anew at any time.
        ca_pem: the one CA that https is trusted by; "" = those of the system.
    """

    def __init__(self, base_urls: Sequence[str], *, token: str = "", ca_pem: str = "") -> None:
        if not base_urls:
            raise ValueError("no place to fetch chunks from")
        *caches, origin = [_parse_base(url) for url in base_urls]
        tls = trust(ca_pem) if any(a.is_tls for a in (*caches, origin)) else None
        self._caches = [_Cache(_Place(address, tls, CACHE_CONNECT_S)) for address in caches]
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
    """What each thread has of a place. `buffer` is as long as a chunk can be."""

    connection: Connection | None = None
    asked = ""  # the chunk whose answer comes first on it; "" = none
    buffer: memoryview | None = None

    def room(self) -> memoryview:
        if self.buffer is None:
            self.buffer = make_room(CHUNK_CAP_BYTES)
        return self.buffer


class _Place:
    """One web server, with one connection a thread that is kept open. No redirects, no proxies."""

    def __init__(self, base: Address, tls: ssl.SSLContext | None, connect_s: float) -> None:
        self._base, self._tls, self._connect_s = base, tls if base.is_tls else None, connect_s
        self._mine = _OfThread()

    def get(self, sha256: str, token: str, *, until: float | None = None) -> memoryview:
        """One try, and one more where a kept connection turns out to be closed.

        Raises: Refused on 4xx; Unreachable on no whole answer (`until` is a time.monotonic()), 3xx and 5xx; ValueError on one that is too long.
        """
        kept = self._mine.connection is not None
        try:
            return self._exchange(sha256, token, until)
        except Closed:
            if not kept:
                raise
            return self._exchange(sha256, token, until)

    def ask(self, sha256: str, token: str) -> None:
        """What this thread will `get` next, on the connection it has. Where that fails, `get` finds out."""
        connection = self._mine.connection
        if connection is None or self._mine.asked:
            return
        try:
            connection.ask(self._target_of(sha256), token=token)
            self._mine.asked = sha256
        except Closed:
            self._drop()

    def forget(self) -> None:
        """What this thread has asked ahead for here is not wanted any more."""
        if self._mine.asked:
            self._drop()

    def _exchange(self, sha256: str, token: str, until: float | None) -> memoryview:
        room = self._mine.room()  # no memory is no fault of the place
        if self._mine.asked not in ("", sha256):
            self._drop()  # the answer that comes is to another question
        try:
            connection = self._mine.connection = self._mine.connection or Connection(self._base, self._tls, connect_s=self._connect_s, read_s=TIMEOUT_S)
            if not self._mine.asked:
                connection.ask(self._target_of(sha256), token=token)
            self._mine.asked = ""
            status, body = connection.read(room, until=until)
        except BaseException:
            self._drop()
            raise
        if connection.will_close:
            self._drop()
        if 400 <= status < 500:
            raise Refused(status, self._target_of(sha256))
        if status != 200:
            raise Unreachable(f"{self._target_of(sha256)} was answered with {status}")
        return body

    def _target_of(self, sha256: str) -> str:
        return f"{self._base.target}/{sha256[:2]}/{sha256}"

    def _drop(self) -> None:
        if self._mine.connection is not None:
            self._mine.connection.close()
        self._mine.connection, self._mine.asked = None, ""


def _parse_base(url: str) -> Address:
    """Where chunks are found below. Raises ValueError."""
    address = parse_address(url)
    if "?" in address.target:
        raise ValueError(f"{url} has a query: chunks are files below it")
    return address._replace(target=address.target.rstrip("/"))
