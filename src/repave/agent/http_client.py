"""HTTP/1.1 over one connection, answers into a buffer of the caller's: what the agent talks to its server and fetches chunks with.

Half the work of http.client, which makes an e-mail message of each head and passes each piece up through three layers; where the link is the limit, a
sixth less again, as the kernel fills the buffer before it wakes us (docs/benchmarks.md, "Writing an image"). Reference: RFC 9112. Stdlib only, ssl where it
is needed: Python's start is a tenth of a short write.
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
HEAD_CAP_BYTES = 64 * 1024  # http.client takes as much in one line
_LINE_CAP_BYTES = 1024  # of chunked coding


class Refused(Exception):
    """The server answered, and the answer is no: 401 unknown token, 410 ended run, or another 4xx."""

    def __init__(self, status: int, path: str) -> None:
        self.status = status
        super().__init__(f"{path} was answered with {status}")


class Unreachable(Exception):
    """No answer, half an answer, an answer of somebody else (TLS) or to another request, or 5xx. Worth another try."""


class Closed(Unreachable):
    """Not even a first byte of an answer: what becomes of a request on a connection that the server has closed meanwhile."""


class Address(NamedTuple):
    host: str
    port: int
    is_tls: bool
    target: str  # path and query


def parse_address(url: str) -> Address:
    """Raises ValueError, whose text names no password."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or "@" in parts.netloc or not re.fullmatch(r"[!-~]*", url):
        raise ValueError(f"{url.rpartition('@')[2]} is not http(s)://HOST[:PORT][/PATH] without a user")
    is_tls = parts.scheme == "https"
    return Address(parts.hostname, parts.port or _port_of(is_tls), is_tls, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def _port_of(is_tls: bool) -> int:
    return 443 if is_tls else 80


def make_room(count: int) -> memoryview:
    """A buffer; what no answer has filled yet takes no memory."""
    return memoryview(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@functools.cache
def trust(ca_pem: str = "") -> ssl.SSLContext:
    """That one CA, as agent/tls.py does, or the system's; read once, which takes 20 ms."""
    from repave.agent import tls  # http needs none of it

    return tls.trust_only(ca_pem) if ca_pem else tls.trust_system()


class Response(NamedTuple):
    status: int
    body: memoryview  # where the status is 2xx; somewhere in the buffer


class Connection:
    """One connection, for one thread: a request, its answer, the next one. No redirects, no proxies. After an error it is of no more use: close it."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, *, connect_s: float, read_s: float) -> None:
        """Connects. `tls`: for https, None for http. `read_s`: silence of so long is noticed, at the latest after twice that. Raises Unreachable."""
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._host = host if address.port == _port_of(tls is not None) else f"{host}:{address.port}"
        self.will_close = False  # the answer that was read last is the last one on it
        self._read_s, self._waits_s = read_s, 0.0
        self._until: float | None = None
        self._is_tls = tls is not None
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout=connect_s)
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a request behind a handshake waits for its ACK (40 ms, measured)
                if tls is not None:
                    self._socket = tls.wrap_socket(self._socket, server_hostname=address.host)
                self._wait_at_most(read_s)
            except BaseException:
                self._socket.close()
                raise
        except OSError as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        self._socket.close()

    def ask(self, target: str, *, token: str = "", method: str = "GET", fields: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Sends a request; its answer is read before the next one is sent. `token`: a bearer's. Raises Closed; ValueError on what no line can hold."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}", "Accept-Encoding: identity"]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        if body or method != "GET":
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        if not all(line.isprintable() for line in lines):
            raise ValueError("a control character in a request's head")
        try:
            self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        except OSError as error:
            raise Closed(f"{type(error).__name__}: {error}") from None

    def read(self, room: memoryview, *, until: float | None = None, must_have: tuple[str, str] | None = None) -> Response:
        """The answer, into `room`, which is as long as head and body may be together.

        Args:
            until: a time.monotonic(); an answer that is not whole by then is none.
            must_have: a field and its value; an answer without it is to another request, and nothing more is read of it.

        Raises: Closed; Unreachable where it is not whole, no HTTP or too slow; ValueError where it does not fit.
        """
        self._until = until
        try:
            status, fields, begin, got = self._read_head(room, 0, 0)
            while 100 <= status < 200 and status != 101:  # RFC 9110, 15.2: more about it before it
                status, fields, begin, got = self._read_head(room, begin, got)
            if must_have is not None and fields.get(must_have[0].lower()) != must_have[1]:
                raise Unreachable(f"the answer ({status}) is not to this request")
            if 200 <= status < 300 and status != 204:
                return Response(status, self._read_body(fields, room, begin, got))
            self.will_close |= fields.get("content-length", "0" if status == 204 else "") != str(got - begin)  # all of it is here, or is not waited for
            return Response(status, room[:0])
        except OSError as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None

    def _read_head(self, room: memoryview, at: int, got: int) -> tuple[int, dict[str, str], int, int]:
        """Status, fields, where the body begins in `room`, and how much of `room` is filled. What is there begins at `at`."""
        while not (parts := bytes(room[at:got]).partition(b"\r\n\r\n"))[1]:
            if got >= min(HEAD_CAP_BYTES, len(room)):
                raise Unreachable("the answer's head does not end")
            try:
                more = self._receive(room[got:HEAD_CAP_BYTES], 0)
            except ConnectionError:
                more = 0
            if not more:
                raise Unreachable("the answer ended early") if got else Closed("the connection was closed")
            got += more
        status, fields = _parse_head(parts[0])
        self.will_close = "close" in fields.get("connection", "").lower() or parts[0].startswith(b"HTTP/1.0")
        return status, fields, at + len(parts[0]) + 4, got

    def _read_body(self, fields: dict[str, str], room: memoryview, begin: int, got: int) -> memoryview:
        if "transfer-encoding" in fields:
            if fields["transfer-encoding"].lower() != "chunked":
                raise Unreachable(f"the answer comes as {fields['transfer-encoding']}")
            return room[begin : self._read_chunked(room, begin, got)]
        length = fields.get("content-length")
        if length is None:
            self.will_close = True
            return room[begin : self._fill(room, got, len(room) + 1)]
        if not length.isdecimal():
            raise Unreachable("the answer has no length")
        end = begin + int(length)
        if end > len(room):
            raise ValueError(f"an answer of {length} bytes does not fit")
        if self._fill(room, got, end) != end:
            raise Unreachable("the answer does not end where it says")
        return room[begin:end]

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

    def _read_chunked(self, room: memoryview, begin: int, got: int) -> int:
        """Where the body ends, whose pieces are moved together. RFC 9112, 7.1."""
        end = begin
        while True:
            line, at, got = self._read_line(room, end, got)
            size = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(;.*)?", line)
            if size is None:
                raise Unreachable("the answer is not in chunks as it says")
            if not (count := int(size[1], 16)):
                break
            got = self._fill(room, got, at + count + 2)
            if bytes(room[at + count : min(got, at + count + 2)]) != b"\r\n":
                raise Unreachable("the answer ended early, or is not in chunks as it says")
            room[end : end + count] = room[at : at + count]
            end += count
            behind = got - (at + count + 2)
            room[end : end + behind] = room[got - behind : got]
            got = end + behind
        while line:  # the size's own, then trailers, which nobody wants
            line, at, got = self._read_line(room, at, got)
        self.will_close |= got != at
        return end

    def _read_line(self, room: memoryview, at: int, got: int) -> tuple[bytes, int, int]:
        """A line of chunked coding that begins at `at`, where the next one does, and how much of `room` is filled."""
        while not (parts := bytes(room[at : min(got, at + _LINE_CAP_BYTES)]).partition(b"\r\n"))[1]:
            if got - at >= _LINE_CAP_BYTES or (more := self._fill(room, got, got + 1)) == got:
                raise Unreachable("the answer ended early, or is not in chunks as it says")
            got = more
        return parts[0], at + len(parts[0]) + 2, got

    def _receive(self, room: memoryview, flags: int) -> int:
        """How much was put there; 0 = the connection ended. MSG_WAITALL: all that it takes, or what came in the time there is."""
        left_s = self._read_s if self._until is None else self._until - time.monotonic()
        if left_s <= 0:
            raise Unreachable("the answer comes too slowly")
        self._wait_at_most(min(self._read_s, left_s))
        try:
            return self._socket.recv_into(room) if self._is_tls else self._socket.recv_into(room, 0, flags)
        except BlockingIOError:
            raise TimeoutError("nothing came in time") from None

    def _wait_at_most(self, seconds: float) -> None:
        """For each call. The kernel keeps the time where it can: with a timeout of Python's each read is a poll and a read, and MSG_WAITALL does not hold."""
        if seconds == self._waits_s:
            return
        self._waits_s = seconds
        if self._is_tls:
            self._socket.settimeout(seconds)
            return
        self._socket.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), max(1, int(seconds % 1 * 1e6))))  # 0 = for ever


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status, and fields by their names in small letters. Raises Unreachable."""
    first, *lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1\.[01] ([0-9]{3})( |$)", first)
    if status is None:
        raise Unreachable("the answer is not HTTP/1.1")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if not colon or (fields.setdefault(name, value) != value and name in ("content-length", "transfer-encoding")):
            raise Unreachable("the answer is not HTTP/1.1")
    return int(status[1]), fields
