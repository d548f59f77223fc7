"""qemu's tools on files that nobody trusts, after headers.py has looked at them. They get the open file that was looked at and explicit drivers, and have

no network and nothing of our environment · 2 GiB of address space, an hour of CPU, 1 MiB to write · no new privileges · no life longer than ours
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from repave.errors import ImageError
from repave.images.headers import ImageHeader
from repave.images.nbd import NbdConnection, NbdError

READ_S = 3600  # CPU and wall seconds: 2 TiB at 600 MB/s
MEMORY_BYTES = 2 * 1024**3  # address space; 200 MB are usual
START_S = 30  # a busy machine's; 0.02 s are usual
ANSWER_S = 120  # one request of one window
_SAID_BYTES = 1024**2
_DRIVERS: dict[str, dict[str, str | None]] = {
    "qcow2": {"driver": "qcow2", "backing": None},
    "vmdk": {"driver": "vmdk", "backing": None},
    "vhd": {"driver": "vpc", "force_size_calc": "current_size"},  # not a geometry's
    "vhdx": {"driver": "vhdx"},
}
# Its buffers of 4 MiB are kept, where each read would map and clear new ones: half of its system time (measured, 7.2).
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "67108864", "MALLOC_TRIM_THRESHOLD_": "268435456"}


class QemuDisk:
    """The disk inside an image file. Threads may share it: each request takes a connection of its own."""

    def __init__(self, connections: list[NbdConnection]) -> None:
        self.size_bytes = connections[0].size
        self._status, *others = connections
        self._free = queue.SimpleQueue[NbdConnection]()
        for connection in others:
            self._free.put(connection)
        self._deadline = time.monotonic() + READ_S

    def read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return data

    def read_into(self, offset: int, view: memoryview) -> None:
        connection = self._free.get()
        try:
            if time.monotonic() > self._deadline:
                raise ImageError("image-refused", f"Reading it took longer than {READ_S} seconds.")
            connection.read_into(offset, view)
        finally:
            self._free.put(connection)

    def next_data(self, offset: int) -> int:
        return self._status.next_data(offset)


@contextmanager
def open_qemu_disk(fd: int, header: ImageHeader, *, readers: int) -> Iterator[tuple[QemuDisk, tuple[str, ...]]]:
    """The disk that the image holds, checked for damage, and notes. Up to `readers` threads read at once. Raises ImageError image-refused, also within."""
    file = {"driver": "file", "filename": f"/proc/self/fd/{fd}", "locking": "off"}
    node = json.dumps({**_DRIVERS[header.format], "file": file})
    name, (alone, notes) = f"json:{node}", _without_network()
    confined = [*alone, _tool("setpriv"), "--pdeathsig", "KILL", "--no-new-privs", "--", *_limits()]
    with ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile())
        if header.format != "vhd":  # no check for it; foreign.py did what one would
            _check(confined, name, fd, said)
        try:
            with tempfile.TemporaryDirectory(prefix="repave-nbd-") as folder:  # gone when all are connected, so that nobody's death leaves it
                path = Path(folder) / "s"
                server = _start([*confined, _tool("qemu-nbd"), "--read-only", f"--shared={readers + 1}", f"--socket={path}", name], fd, said)
                stack.callback(server.wait)
                stack.callback(server.kill)
                connections = _connect(path, server, readers + 1, stack)
            yield QemuDisk(connections), notes
        except (NbdError, TimeoutError, ConnectionError) as e:
            raise _refused(f"qemu-nbd can not read it: {e}", said, name) from e


def _check(confined: list[str], name: str, fd: int, said: IO[bytes]) -> None:
    """qemu reads what lies behind the end of a cut off file as zeros (measured, 7.2); check knows."""
    process = _start([*confined, _tool("qemu-img"), "check", name], fd, said)
    try:
        code = process.wait(READ_S)
    except subprocess.TimeoutExpired:
        raise _refused(f"qemu-img check took longer than {READ_S} seconds", said, name) from None
    finally:
        process.kill()
        process.wait()
    if code not in (0, 3):  # 3: leaked clusters, no harm
        raise _refused(f"qemu-img check says it is damaged (exit {code})", said, name)


def _start(argv: list[str], fd: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, pass_fds=[fd], env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=said, stderr=said)


def _connect(path: Path, server: subprocess.Popen[bytes], count: int, stack: ExitStack) -> list[NbdConnection]:
    deadline, connections = time.monotonic() + START_S, list[NbdConnection]()
    while len(connections) < count:
        try:
            connections.append(NbdConnection(path, timeout_s=ANSWER_S))
            stack.callback(connections[-1].close)
        except (FileNotFoundError, ConnectionRefusedError):  # not yet there, not yet listening
            if server.poll() is not None or time.monotonic() > deadline:
                raise NbdError("it does not start") from None
            time.sleep(0.005)
    return connections


def _limits() -> list[str]:
    return [_tool("prlimit"), f"--cpu={READ_S}", f"--as={MEMORY_BYTES}", f"--fsize={_SAID_BYTES}", "--core=0", "--nofile=64", "--"]


def _without_network() -> tuple[list[str], tuple[str, ...]]:
    """The words before a command that leave it no network; where the kernel allows none, no words and a note."""
    alone = [_tool("unshare"), "-n" if os.geteuid() == 0 else "-rn", "--"]
    if subprocess.run([*alone, _tool("true")], env={}, capture_output=True).returncode == 0:
        return alone, ()
    return [], ("qemu ran without a network namespace of its own: this kernel or container allows none",)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ImageError("image-refused", f"{name} is not installed; it is needed to read what is not raw.")
    return path


def _refused(sentence: str, said: IO[bytes], name: str) -> ImageError:
    """With what the tool said, but no path of ours."""
    said.seek(0)
    words = " ".join(said.read(4096).decode(errors="replace").replace(name, "the image").split())
    return ImageError("image-refused", f"{sentence}{': ' if words else '.'}{words[:300]}")
