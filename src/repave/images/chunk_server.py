"""Serves the image store's chunks to agents: a process of its own, without a database, so that the service's answers never wait for bytes.

    GET /chunks/ab/SHA256   bearer token (chunk_token.py)   the chunk's file | 401 | 404
    GET /token              bearer token                    204 | 401: for nginx, which serves the same files and asks us about tokens (docs/nginx/)

One loop a core, each in a thread, so that no more than that many are ever in the service's way; OpenSSL encrypts and the kernel sends without
Python's lock, and a GB costs about what it costs nginx (docs/benchmarks.md). No run has more than `AT_ONCE` answers under way: the others have their share.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
import select
import signal
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from repave.images.chunk_token import find_token_run

AT_ONCE = 4  # as many as a writer has threads (agent/writer.py)
COUNTERS_BYTES = 256 * 8  # a number of 8 bytes for each loop, which alone adds to it
Counters = memoryview
QUIET_S = 60.0  # neither a request nor a byte taken for so long: hung up
_CONNECTIONS_MAX = 8192
_TURN = 8  # pieces or requests of one connection before the others'
_HEAD_BYTES = 16 * 1024
_PIECE_BYTES = 256 * 1024  # stays in a core's cache between the file, OpenSSL and the kernel
_UNSENT_BYTES = 512 * 1024  # in the kernel for one connection: an answer is under way until all but this is taken
_CHUNK = re.compile(r"/chunks/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed"}
_CACHEABLE = "Content-Type: application/zstd\r\nCache-Control: public, max-age=31536000, immutable\r\n"  # public: in spite of Authorization, RFC 9111, 3.5


@dataclass(eq=False)
class _Connection:
    """A client. While `answer` is there, it is sent: `head`, then `file` (where there is one), from byte `at` of both."""

    stream: ssl.SSLSocket
    touched: float
    asked: bytes = b""
    head: bytes = b""
    file: int = -1
    total: int = 0  # bytes of head and file; 0 = no answer is under way
    at: int = 0
    last: bool = False  # hang up after the answer
    run_id: str = ""  # whose share the answer has or waits for
    waits: bool = False  # for a share
    events: int = select.EPOLLIN


@dataclass
class _Share:
    """One run's answers: those under way, and the connections whose turn it is not yet."""

    under_way: int = 0
    waiting: deque[tuple[_Loop, _Connection]] = field(default_factory=deque)


class ChunkServer:
    """Answers on connections to `listener`, until the process ends."""

    def __init__(self, images_dir: Path, key: bytes, tls: ssl.SSLContext, *, now_s: Callable[[], float], counters: Counters | None = None) -> None:
        """`counters`: the bytes that each loop has sent are added to one of them."""
        self.chunks, self.tls, self._key, self._now_s = images_dir / "chunks", tls, key, now_s
        self._counters = memoryview(bytearray(COUNTERS_BYTES)).cast("Q") if counters is None else counters
        self._shares: dict[str, _Share] = {}
        self._lock = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        """Blocks: always."""
        listener.setblocking(False)
        loops = [_Loop(self, listener, self._counters[number : number + 1]) for number in range(min(os.cpu_count() or 1, COUNTERS_BYTES // 8))]
        for loop in loops[1:]:
            threading.Thread(target=loop.run, daemon=True).start()
        loops[0].run()

    def find_run(self, authorization: str) -> str | None:
        scheme, _, token = authorization.partition(" ")
        return find_token_run(self._key, token.strip(), now_s=self._now_s()) if scheme.lower() == "bearer" else None

    def take_share(self, loop: _Loop, connection: _Connection) -> bool:
        """Whether the answer may begin. If not, the loop is told when it may."""
        with self._lock:
            share = self._shares.setdefault(connection.run_id, _Share())
            if share.under_way < AT_ONCE:
                share.under_way += 1
                return True
            share.waiting.append((loop, connection))
            return False

    def give_share_back(self, run_id: str) -> None:
        with self._lock:
            share = self._shares[run_id]
            if share.waiting:
                loop, connection = share.waiting.popleft()
                loop.wake(connection)
                return
            share.under_way -= 1
            if not share.under_way:
                del self._shares[run_id]


class _Loop:
    """Some of the connections. Only its own thread touches them."""

    def __init__(self, server: ChunkServer, listener: socket.socket, sent: Counters) -> None:
        self._server, self._listener, self._sent = server, listener, sent
        self._connections: dict[int, _Connection] = {}
        self._room = memoryview(bytearray(_PIECE_BYTES))
        self._woken: deque[_Connection] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._bell, select.EPOLLIN)

    def wake(self, connection: _Connection) -> None:
        """Its turn has come. Called from any thread."""
        self._woken.append(connection)
        os.eventfd_write(self._bell, 1)

    def run(self) -> None:
        looked = time.monotonic()
        while True:
            for descriptor, _ in self._epoll.poll(5.0):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == self._bell:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._bell)
                elif (connection := self._connections.get(descriptor)) is not None and not connection.waits:
                    self._advance(connection)
            for _ in range(len(self._woken)):
                connection = self._woken.popleft()
                if connection.stream.fileno() >= 0:
                    connection.waits = False
                    self._advance(connection)
            if time.monotonic() > looked + 5:
                looked = time.monotonic()
                for connection in [c for c in self._connections.values() if not c.waits and c.touched < looked - QUIET_S]:
                    self._close(connection)

    def _accept(self) -> None:
        try:
            plain, _ = self._listener.accept()
        except BlockingIOError:
            return  # another loop was first
        except OSError:
            time.sleep(0.1)  # out of files, as a rule: those who hang up give some back
            return
        if len(self._connections) >= _CONNECTIONS_MAX:
            plain.close()
            return
        try:
            plain.setblocking(False)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT_BYTES)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = self._server.tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        except OSError:
            plain.close()
            return
        connection = _Connection(stream, time.monotonic())
        self._connections[stream.fileno()] = connection
        self._epoll.register(stream, connection.events)

    def _advance(self, connection: _Connection) -> None:
        """As far as it goes without waiting."""
        connection.touched = time.monotonic()
        try:
            for _ in range(_TURN):
                if connection.waits:
                    self._await(connection, 0)
                    return
                if connection.total:
                    self._send(connection)
                else:
                    self._receive(connection)
            self.wake(connection)  # the others' turn; it may have more in OpenSSL, of which epoll knows nothing
        except ssl.SSLWantReadError:
            self._await(connection, select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self._await(connection, select.EPOLLOUT)
        except OSError:  # hung up, done with, or no TLS
            self._close(connection)

    def _await(self, connection: _Connection, events: int) -> None:
        """Events 0: not looked at, not even whether it hung up."""
        before, connection.events = connection.events, events
        if events == before:
            return
        if not events:
            self._epoll.unregister(connection.stream)
        elif not before:
            self._epoll.register(connection.stream, events)
        else:
            self._epoll.modify(connection.stream, events)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.stream.fileno()]
        connection.stream.close()
        self._end_answer(connection)

    def _send(self, connection: _Connection) -> None:
        """One piece. A write that has to wait is done again with the same bytes, as OpenSSL wants it."""
        piece, filled = self._room, 0
        if connection.at < len(connection.head):
            rest = connection.head[connection.at :]
            filled = len(rest)
            piece[:filled] = rest
        wanted = min(_PIECE_BYTES, connection.total - connection.at)
        if filled < wanted:
            filled += os.preadv(connection.file, [piece[filled:wanted]], connection.at + filled - len(connection.head))
        if filled < wanted:
            raise OSError("the file became shorter")
        count = connection.stream.send(piece[:filled])
        connection.at += count
        self._sent[0] += count
        if connection.at == connection.total:
            self._end_answer(connection)
            if connection.last:
                raise OSError("done with")

    def _end_answer(self, connection: _Connection) -> None:
        if connection.file >= 0:
            os.close(connection.file)
            self._server.give_share_back(connection.run_id)
        connection.file, connection.total = -1, 0

    def _receive(self, connection: _Connection) -> None:
        """What is there of a request; when it is whole, its answer is set. The first call makes the handshake."""
        more = connection.stream.recv(_HEAD_BYTES)
        connection.asked += more
        if not more or len(connection.asked) > _HEAD_BYTES:
            raise OSError("hung up, or no end of headers")
        if connection.asked.endswith(b"\r\n\r\n"):
            data, connection.asked = connection.asked, b""
            if b"\r\n\r\n" in data[:-4]:
                raise OSError("two requests at once")
            self._begin_answer(connection, *_parse_head(data))

    def _begin_answer(self, connection: _Connection, method: str, path: str, headers: dict[str, str]) -> None:
        connection.last = headers.get("connection", "").lower() == "close"
        if headers.keys() & {"content-length", "transfer-encoding"}:  # nothing here takes a body
            return _refuse(connection, 400, last=True)
        if method not in ("GET", "HEAD"):
            return _refuse(connection, 405, last=True)
        run_id = self._server.find_run(headers.get("authorization", ""))
        if run_id is None:
            return _refuse(connection, 401)
        if path == "/token":
            return _refuse(connection, 204)
        found = _CHUNK.fullmatch(path)
        try:
            if found is None:
                raise FileNotFoundError
            file = os.open(self._server.chunks / found[1] / found[2], os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return _refuse(connection, 404)
        size = os.fstat(file).st_size
        connection.head = f"HTTP/1.1 200 OK\r\n{_CACHEABLE}Content-Length: {size}\r\n\r\n".encode()
        connection.at, connection.total = 0, len(connection.head)
        if method == "HEAD":
            os.close(file)
            return None
        connection.total += size
        connection.run_id = run_id
        connection.waits = not self._server.take_share(self, connection)
        connection.file = file
        return None


def _parse_head(data: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, path and headers (names in lower case). Raises OSError where it is no HTTP/1.1."""
    first, *lines = data[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise OSError("not HTTP/1.1")
    headers = {name.lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    return parts[0], parts[1], headers | ({"connection": "close"} if parts[2] == "HTTP/1.0" else {})


def _refuse(connection: _Connection, status: int, *, last: bool = False) -> None:
    """An answer without a body."""
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nCache-Control: no-store\r\n"
    head += ("" if status == 204 else "Content-Length: 0\r\n") + ("Connection: close\r\n" if last else "")
    connection.head, connection.last = f"{head}\r\n".encode(), connection.last or last
    connection.at, connection.total = 0, len(connection.head)


def main() -> None:
    """`python -m repave.images.chunk_server IMAGES KEY CERTIFICATE FD COUNTERS-FD`: what `repave serve` starts; ends with whoever holds its standard input."""
    images_dir, key_path, certificate, descriptor, counters_fd = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's, which then lets go of us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What else runs here comes first, the service and its database: at every wake-up, where `nice` would let them wait for the end of a turn. Measured.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    counters = memoryview(mmap.mmap(int(counters_fd), COUNTERS_BYTES)).cast("Q")
    serve_chunks(socket.socket(fileno=int(descriptor)), Path(images_dir), Path(key_path), Path(certificate), counters)


def serve_chunks(listener: socket.socket, images_dir: Path, key_path: Path, certificate: Path, counters: Counters | None = None) -> None:
    """TLS on `listener`, for good. `certificate`: one PEM file with chain and key. Raises OSError where a file is missing or is none."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.load_cert_chain(certificate)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    wall_ahead_s = time.time() - _boot_clock()

    def now_s() -> float:
        """Nobody loses his token by a clock that was set, forward or back (steady_clock.py says why): what both clocks call past is past."""
        return min(time.time(), wall_ahead_s + _boot_clock())

    ChunkServer(images_dir, key_path.read_bytes(), tls, now_s=now_s, counters=counters).serve(listener)


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
