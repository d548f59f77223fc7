"""The chunk server as a process beside the service (images/chunk_server.py): started with it, started again when it dies, gone when the service is."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog

from repave.images.chunk_server import COUNTERS_BYTES

AGAIN_S = 1.0

log = structlog.get_logger()


class ChunkBytes:
    """How many bytes the chunk server has sent, also before it was started again: memory that both processes have."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("repave-chunk-bytes")
        os.ftruncate(self.fd, COUNTERS_BYTES)
        self._counters = memoryview(mmap.mmap(self.fd, COUNTERS_BYTES)).cast("Q")

    def read(self) -> int:
        return sum(self._counters)


@contextlib.contextmanager
def start_chunk_process(listener: socket.socket, images_dir: Path, key_path: Path, certificate: Path, sent: ChunkBytes | None = None) -> Iterator[None]:
    """It answers on `listener` for as long as the block runs. Who comes while it is started again waits in the listener's queue."""
    sent = sent or ChunkBytes()
    command = [
        sys.executable, "-P", "-m", "repave.images.chunk_server", str(images_dir), str(key_path), str(certificate), str(listener.fileno()), str(sent.fd),
    ]  # fmt: skip
    over = threading.Event()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        # Its standard input is a pipe that nobody writes to: however the service ends, the process reads the end of it and ends too.
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(listener.fileno(), sent.fd))

    def keep() -> None:
        while True:
            status = started[-1].wait()
            if over.is_set():
                return
            log.error("the chunk server ended; it is started again", status=status)
            over.wait(AGAIN_S)
            with lock:
                if over.is_set():
                    return
                with contextlib.suppress(OSError):  # no memory, no process: tried again after another AGAIN_S
                    started.append(start())
                del started[:-1]

    lock = threading.Lock()
    started.append(start())
    keeper = threading.Thread(target=keep, name="chunk-process", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        with lock:
            over.set()
            process = started[-1]
        process.kill()  # it keeps nothing: agents ask again, elsewhere or later
        keeper.join()
        if process.stdin is not None:
            process.stdin.close()
