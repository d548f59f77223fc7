"""HTTP/1.1 over one connection, answers into a buffer of the caller's: what the agent talks to its server and fetches chunks with.

A chunk costs half of what it does with http.client, which makes an e-mail message of each head and passes each piece up through three layers; where
the link is the limit, a third less again, as the kernel fills the buffer before it wakes us (measured, docs/benchmarks.md). Reference: RFC 9112. Stdlib
only, ssl where it is needed: Python's start is a tenth of a short write.
"""

from __future__ import annotations

import functools
import mmap
import re
import socket
import struct
import time
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import ssl

TIMEOUT_S = 10.0  # to connect, and for each read; well under a lease of 60 s
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 5.0)  # between tries; then 5 s each
HEAD_CAP_BYTES = 64 * 1024


class Refused(Exception):
    """The server answered, and the answer is no: 401 unknown token, 410 ended run, or another 4xx."""

    def __init__(self, status: int, path: str) -> None:
        self.status = status
        super().__init__(f"{path} was answered with {status}")


class Unreachable(Exception):
    """No answer, half an answer, an answer of somebody else (TLS) or to another request, or 5xx. Worth another try."""


class Closed(Unreachable):
    """Not even a first byte of an answer: what a server does to a connection that it kept for long enough."""


class Address(NamedTuple):
    host: str
    port: int
    is_tls: bool
    target: str  # path and query


def parse_address(url: str) -> Address:
    """Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or parts.username or not re.fullmatch(r"[!-~]*", url):
        raise ValueError(f"{url} is not http(s)://HOST[:PORT][/PATH]")
    is_tls = parts.scheme == "https"
    return Address(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, parts.path + (f"?{parts.query}" if parts.query else ""))


def make_room(count: int) -> memoryview:
    """A buffer; what no answer has filled yet takes no memory."""
    return memoryview(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@functools.cache
def trust(ca_pem: str = "") -> ssl.SSLContext:
    """That one CA, as agent/tls.py does, or the system's."""
    from repave.agent import tls  # http needs none of it

    return tls.trust_only(ca_pem) if ca_pem else tls.trust_system()


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]  # by name in small letters
    body: memoryview  # where the status is 2xx; somewhere in the buffer


class Connection:
    """One connection, for one thread. No redirects, no proxies. After an error it is of no more use: close it."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, *, connect_s: float, read_s: float) -> None:
        """Connects. `tls`: for https, None for http. `read_s`: how long may pass without a byte. Raises OSError."""
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._host, self._read_s = f"{host}:{address.port}", read_s
        self.will_close = False  # the answer that was read last is the last one on it
        self._until: float | None = None
        self._socket = socket.create_connection((address.host, address.port), timeout=connect_s)
        self._is_tls = tls is not None
        try:
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=address.host)
            self._wait_at_most(read_s)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def ask(self, target: str, *, token: str = "", method: str = "GET", fields: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Sends a request. One answer is read for each, in their order. `token`: a bearer's. Raises Closed."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}", "Accept-Encoding: identity"]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        if body or method != "GET":
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        try:
            self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        except OSError as error:
            raise Closed(f"{type(error).__name__}: {error}") from None

    def read(self, room: memoryview, *, until: float | None = None) -> Answer:
        """The next answer, in `room`, which is as long as it may be.

        Raises: Closed; Unreachable where it is not whole, no HTTP, or not there at `until` (a time.monotonic()); ValueError where it does not fit.
        """
        self._until = until
        try:
            if until is not None:
                self._wait_at_most(min(self._read_s, until - time.monotonic()))
            return self._read(room)
        except OSError as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None

    def _read(self, room: memoryview) -> Answer:
        head, begin, got = self._read_head(room)
        status, fields = _parse_head(head)
        self.will_close = not 200 <= status < 300 or "close" in fields.get("connection", "").lower() or head.startswith(b"HTTP/1.0")
        if status == 204 or not 200 <= status < 300:
            return Answer(status, fields, room[:0])
        return Answer(status, fields, self._read_body(fields, room, begin, got))

    def _read_body(self, fields: dict[str, str], room: memoryview, begin: int, got: int) -> memoryview:
        if "transfer-encoding" in fields:
            if fields["transfer-encoding"].lower() != "chunked":
                raise Unreachable(f"the answer comes as {fields['transfer-encoding']}")
            return self._read_chunked(room, begin, got)
        length = fields.get("content-length")
        if length is None:
            self.will_close = True
            return room[begin : self._fill(room, got, len(room) + 1)]
        if not length.isdecimal():
            raise Unreachable("the answer has no length")
        end = begin + int(length)
        if self._fill(room, got, end) != end:
            raise Unreachable("the answer does not end where it says")
        return room[begin:end]

    def _read_head(self, room: memoryview) -> tuple[bytes, int, int]:
        """The head, where the body begins in `room`, and how much of `room` is filled."""
        got = 0
        while got < min(HEAD_CAP_BYTES, len(room)):
            try:
                more = self._receive(room[got:HEAD_CAP_BYTES], 0)
            except ConnectionError:
                more = 0
            if not more:
                raise Unreachable("the answer ended early") if got else Closed("the connection was closed")
            got += more
            head, end, _ = bytes(room[:got]).partition(b"\r\n\r\n")
            if end:
                return head, len(head) + 4, got
        raise Unreachable("the answer's head does not end")

    def _fill(self, room: memoryview, got: int, end: int) -> int:
        """Receives into `room` from `got` up to `end`; returns where it ended, before `end` where the connection did."""
        while got < end:
            if got == len(room):
                raise ValueError(f"an answer of more than {len(room)} bytes does not fit")
            more = self._receive(room[got:end], socket.MSG_WAITALL)
            if not more:
                break
            got += more
        return got

    def _read_chunked(self, room: memoryview, at: int, got: int) -> memoryview:
        """The body, its pieces moved together."""
        begin = end = at
        while True:
            while (line := bytes(room[at : min(got, at + 100)]).partition(b"\r\n"))[1] == b"":
                if got - at >= 100 or (more := self._fill(room, got, got + 1)) == got:
                    raise Unreachable("the answer is not in chunks as it says")
                got = more
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}(;.*)?", line[0]):
                raise Unreachable("the answer is not in chunks as it says")
            size = int(line[0].partition(b";")[0], 16)
            at += len(line[0]) + 2
            if got < at + size + 2:
                got = self._fill(room, got, at + size + 2)
            if got < at + size + 2 or bytes(room[at + size : at + size + 2]) != b"\r\n":
                raise Unreachable("the answer ended early, or is not in chunks as it says")
            if not size:
                return room[begin:end]
            room[end : end + size] = room[at : at + size]
            end, at = end + size, at + size + 2

    def _receive(self, room: memoryview, flags: int) -> int:
        """How much was put there; 0 = the connection ended. MSG_WAITALL: all that it takes, or what came in the time there is."""
        if self._until is not None and time.monotonic() > self._until:
            raise Unreachable("the answer comes too slowly")
        try:
            return self._socket.recv_into(room) if self._is_tls else self._socket.recv_into(room, 0, flags)
        except BlockingIOError:
            raise TimeoutError("nothing came in time") from None

    def _wait_at_most(self, seconds: float) -> None:
        """For each read. The kernel keeps the time where it can: with a timeout of Python's, each read is a poll and a read, and MSG_WAITALL does not hold."""
        seconds = max(seconds, 0.001)
        self._socket.settimeout(seconds if self._is_tls else None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and fields by their names in small letters. Raises Unreachable."""
    first, *lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1\.[01] ([0-9]{3})( |$)", first)
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if not colon or (fields.setdefault(name, value) != value and name in ("content-length", "transfer-encoding")):
            status = None
    if status is None:
        raise Unreachable("the answer is not HTTP/1.1")
    return int(status[1]), fields
