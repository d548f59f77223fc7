"""Serves the image store's chunks to agents: a process of its own, without a database, so that the service's answers never wait for bytes.

    GET /chunks/ab/SHA256   bearer token (chunk_token.py)   the chunk's file | 401 | 404
    GET /token              bearer token                    204 | 401: for nginx, which serves the same files and asks us about tokens (docs/nginx/)

One thread a connection, and a chunk goes out in one write: OpenSSL encrypts and the kernel sends without Python's lock, so that all cores work and
a GB costs what it costs nginx (docs/benchmarks.md). No agent has more than `AT_ONCE` answers under way: the others have their share.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from repave.images.chunk_token import find_token_run

AT_ONCE = 4  # as many as a writer has threads (agent/writer.py)
CONNECTIONS_MAX = 1024  # 4 a server: 256 servers that write at once. Above it, nginx (docs/operations.md)
NICE = 10  # the service and its database come first where cores are short
QUIET_S = 60  # neither a request nor a byte taken for so long: hung up
_HEAD_BYTES = 16 * 1024
_PIECE_BYTES = 4 * 1024 * 1024
_UNSENT_BYTES = 512 * 1024  # in the kernel for one connection: an answer is under way until all but this is taken
_CHUNK = re.compile(r"/chunks/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed"}
_CACHEABLE = "Content-Type: application/zstd\r\nCache-Control: public, max-age=31536000, immutable\r\n"  # public: in spite of Authorization, RFC 9111, 3.5


class ChunkServer:
    """Answers on connections that `serve` accepts."""

    def __init__(self, images_dir: Path, key: bytes, tls: ssl.SSLContext, *, now_s: Callable[[], float]) -> None:
        self._chunks, self._key, self._tls, self._now_s = images_dir / "chunks", key, tls, now_s
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._shares: dict[str, _Share] = {}
        self._lock = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        """Until the listener is closed. Blocks: always."""
        while True:
            self._room.acquire()
            try:
                connection, _ = listener.accept()
            except OSError:
                self._room.release()
                if listener.fileno() < 0:
                    return
                time.sleep(0.1)  # out of files, as a rule: those who hang up give some back
                continue
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        quiet = struct.pack("ll", QUIET_S, 0)
        try:
            with connection:
                # Blocking, with the kernel's deadlines: a socket with Python's would be polled between two records.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, quiet)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, quiet)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT_BYTES)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._tls.wrap_socket(connection, server_side=True) as stream:
                    buffer = bytearray(_HEAD_BYTES)
                    while self._answer(stream, buffer):
                        pass
        except OSError:
            pass  # hung up, silent, or no TLS
        finally:
            self._room.release()

    def _answer(self, stream: socket.socket, buffer: bytearray) -> bool:
        """One request; whether another may follow on this connection."""
        request = _read_head(stream)
        if request is None:
            return False
        method, path, headers = request
        if headers.keys() & {"content-length", "transfer-encoding"}:  # nothing here takes a body
            return _refuse(stream, 400, last=True)
        if method not in ("GET", "HEAD"):
            return _refuse(stream, 405, last=True)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        run_id = find_token_run(self._key, token.strip(), now_s=self._now_s()) if scheme.lower() == "bearer" else None
        if run_id is None:
            return _refuse(stream, 401)
        if path == "/token":
            return _refuse(stream, 204)
        found = _CHUNK.fullmatch(path)
        if found is None:
            return _refuse(stream, 404)
        try:
            file = os.open(self._chunks / found[1] / found[2], os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return _refuse(stream, 404)
        try:
            with self._share_of(run_id):
                _send_file(stream, file, buffer, body=method == "GET")
        finally:
            os.close(file)
        return headers.get("connection") != "close"

    @contextlib.contextmanager
    def _share_of(self, run_id: str) -> Iterator[None]:
        """Held while an answer to this run is under way. Blocks: while the run has `AT_ONCE` of them."""
        with self._lock:
            share = self._shares.setdefault(run_id, _Share())
            share.users += 1
        try:
            with share.room:
                yield
        finally:
            with self._lock:
                share.users -= 1
                if not share.users:
                    del self._shares[run_id]


class _Share:
    def __init__(self) -> None:
        self.room, self.users = threading.BoundedSemaphore(AT_ONCE), 0


def _read_head(stream: socket.socket) -> tuple[str, str, dict[str, str]] | None:
    """Method, path and headers (names in lower case); None where the client hung up or did not speak HTTP/1.1."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        more = stream.recv(_HEAD_BYTES)
        data += more
        if not more or len(data) > _HEAD_BYTES:
            return None
    first, *lines = data[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        return None
    headers = {name.lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    if parts[2] == "HTTP/1.0" or headers.get("connection", "").lower() == "close":
        headers["connection"] = "close"
    return parts[0], parts[1], headers


def _refuse(stream: socket.socket, status: int, *, last: bool = False) -> bool:
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nCache-Control: no-store\r\n"
    head += ("" if status == 204 else "Content-Length: 0\r\n") + ("Connection: close\r\n" if last else "")
    stream.sendall(f"{head}\r\n".encode())
    return not last


def _send_file(stream: socket.socket, file: int, buffer: bytearray, *, body: bool) -> None:
    size = os.fstat(file).st_size
    head = f"HTTP/1.1 200 OK\r\n{_CACHEABLE}Content-Length: {size}\r\n\r\n".encode()
    if not body:
        stream.sendall(head)
        return
    room = len(head) + min(size, _PIECE_BYTES)
    if len(buffer) < room:
        buffer.extend(bytes(room - len(buffer)))
    view = memoryview(buffer)
    view[: len(head)] = head
    filled, done = len(head), 0
    while True:
        more = os.preadv(file, [view[filled:room]], done)
        if not more and done < size:
            raise OSError("the file became shorter")
        done += more
        stream.sendall(view[: filled + more])
        filled = 0
        if done >= size:
            return


def main() -> None:
    """`python -m repave.images.chunk_server IMAGES KEY CERTIFICATE FD`: what `repave serve` starts; it ends with whoever holds its standard input."""
    images_dir, key_path, certificate, descriptor = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's, which then lets go of us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICE)
    serve_chunks(socket.socket(fileno=int(descriptor)), Path(images_dir), Path(key_path), Path(certificate))


def serve_chunks(listener: socket.socket, images_dir: Path, key_path: Path, certificate: Path) -> None:
    """TLS on `listener`, for good. `certificate`: one PEM file with chain and key. Raises OSError where a file is missing or is none."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.load_cert_chain(certificate)
    wall_ahead_s = time.time() - _boot_clock()

    def now_s() -> float:
        """Nobody loses his token by a clock that was set, forward or back (steady_clock.py says why): what both clocks call past is past."""
        return min(time.time(), wall_ahead_s + _boot_clock())

    ChunkServer(images_dir, key_path.read_bytes(), tls, now_s=now_s).serve(listener)


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
