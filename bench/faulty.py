"""Nine faults while an image is written: what the agent's writer says and leaves behind, beside what others do.

    python -m bench faulty

The writers, files and loop device of `bench/write.py`; the origin is a server of this file that does one thing wrong. A fault hits a chunk in the middle,
or the one file that the others fetch. Judged by the disk: what it holds when the writer has ended, and whether firmware would boot it (there is a
signature in LBA 0, without which no GPT counts).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench.scripted_batch import describe_machine
from bench.write import IMAGE_BYTES, Files, count_stale, fill, loop_device, make_files, prepare_tools, writers

FAULTS = (
    "none",
    "cut short",
    "cut short, no length",
    "a byte flipped",
    "dropped once",
    "origin away for 10 s",
    "404",
    "another file",
    "disk error",
    "kill -9 half way",
)
AWAY_S = 10.0
GIVE_UP_S = 120.0
SMALL_DISK = "300m"  # of data; then its writes fail
PIECE_BYTES = 256 * 1024
MIB = 1 << 20
BLOCK_BYTES = 4096


@dataclass
class Origin:
    """Serves a folder; `fault` is done to whoever fetches what is in `aims`."""

    folder: Path
    aims: frozenset[str]
    fault: str = ""
    hits: int = 0
    away_until: float = 0.0

    def begin(self, fault: str) -> None:
        self.fault, self.hits, self.away_until = fault, 0, 0.0


def main() -> None:
    """One table, a row a fault."""
    ipa = prepare_tools()
    with tempfile.TemporaryDirectory(prefix="repave-bench-", dir="/dev/shm") as name:
        ram = Path(name)
        (ram / "bin").mkdir()
        (ram / "bin/udevadm").symlink_to("/bin/true")
        files = make_files(ram / "origin")
        make_strangers(ram)
        with_data = [c.sha256 for c in files.manifest.chunks if c.extents]
        origin = Origin(files.folder, frozenset({with_data[len(with_data) // 2], "disk.raw.zst", "disk.qcow2"}))
        with serve(origin) as url:
            commands = writers(files, url, ipa, ram, large=True)
            print(f"faulty; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n{'':22}{''.join(f'{name:34}' for name in commands)}", flush=True)
            usual_s: dict[str, float] = {}
            for fault in FAULTS:
                print(f"{fault:22}", end="", flush=True)
                for writer, command in commands.items():
                    origin.begin(fault)
                    words, took_s = play(ram, files, origin, command, usual_s.get(writer, 0) / 2 if fault == "kill -9 half way" else GIVE_UP_S)
                    usual_s.setdefault(writer, took_s)
                    print(f"{f'{words}, {took_s:.1f} s':34}", end="", flush=True)
                print(flush=True)


def make_strangers(ram: Path) -> None:
    """Another disk, as large and whole, in each format."""
    raw = ram / "stranger.raw"
    with raw.open("wb") as f:
        f.write(os.urandom(64 * MIB))
        f.truncate(IMAGE_BYTES)
    subprocess.run(["zstd", "-q", "-1", raw, "-o", ram / "stranger.raw.zst"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, ram / "stranger.qcow2"], check=True)
    raw.unlink()


def play(ram: Path, files: Files, origin: Origin, command: Callable[[str], list[str]], kill_after_s: float) -> tuple[str, float]:
    """One write with this fault: how it ended and what the disk holds, and how long it took."""
    with small_disk(ram) if origin.fault == "disk error" else contextlib.nullcontext(ram / "disk") as disk:
        if not disk.exists():
            fill(disk, IMAGE_BYTES)
        subprocess.run(["sgdisk", "-o", "-n", "1:2048:0", disk], check=True, capture_output=True)  # the old OS's tables, at both ends
        with disk.open("rb") as f:
            old = f.read(4 * MIB)
        with loop_device(disk) as device:
            began = time.monotonic()
            status = run(command(device), ram, kill_after_s)
            took = time.monotonic() - began
        words = judge(status, disk, files, old)
        disk.unlink()
    return words, took


@contextlib.contextmanager
def small_disk(ram: Path) -> Iterator[Path]:
    """A disk that takes no more data from some place on."""
    folder = ram / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "repave-bench", folder], check=True)
    try:
        disk = folder / "disk"
        with disk.open("wb") as f:
            f.truncate(IMAGE_BYTES)
        yield disk
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def run(argv: list[str], ram: Path, kill_after_s: float) -> int:
    """Its exit status; -9 where it was killed."""
    env = os.environ | {"TMPDIR": str(ram), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin:{ram / 'bin'}"}
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(kill_after_s)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def judge(status: int, disk: Path, files: Files, old: bytes) -> str:
    with disk.open("rb") as f:
        first = f.read(4 * MIB)
    if status == 0:
        return "SAYS DONE, IS NOT" if not has_data(disk, files) else "done, old data left" if count_stale(disk, files.raw) else "done, right"
    if first == old:
        return "failed, nothing written"
    return "failed, CAN STILL BOOT" if first[510:512] == b"\x55\xaa" else "failed, can not boot"


def has_data(disk: Path, files: Files) -> bool:
    """All blocks of the image that are not zero are there, whatever is in the others."""
    with disk.open("rb") as a, files.raw.open("rb") as b:
        for _ in range(IMAGE_BYTES // MIB):
            got, wanted = a.read(MIB), b.read(MIB)
            if got != wanted and any(
                got[at : at + BLOCK_BYTES] != wanted[at : at + BLOCK_BYTES] and any(wanted[at : at + BLOCK_BYTES]) for at in range(0, MIB, BLOCK_BYTES)
            ):
                return False
    return True


@contextlib.contextmanager
def serve(origin: Origin) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if time.monotonic() < origin.away_until:
                self.reset()
                return
            name, file = Path(self.path).name, origin.folder / self.path.lstrip("/")
            if name in origin.aims and self.spoil(name, file):
                return
            self.send_file(file)

        def do_HEAD(self) -> None:
            self.send_file(origin.folder / self.path.lstrip("/"), most=0)

        def spoil(self, name: str, file: Path) -> bool:
            """True: it was answered."""
            origin.hits += 1
            half = file.stat().st_size // 2
            match origin.fault:
                case "cut short":  # on the origin's own disk
                    self.send_file(file, most=half, length=half)
                case "cut short, no length":
                    self.send_response(200)
                    self.send_header("Connection", "close")
                    self.end_headers()
                    self.copy(file, half)
                    self.close_connection = True
                case "a byte flipped":
                    self.send_file(file, flip_at=half)
                case "dropped once" if origin.hits == 1:
                    self.send_file(file, most=half)
                    self.reset()
                case "origin away for 10 s" if origin.hits == 1:
                    origin.away_until = time.monotonic() + AWAY_S
                    self.send_file(file, most=half)
                    self.reset()
                case "404":
                    self.send_error(404)
                case "another file":
                    stranger = origin.folder.parent / f"stranger{''.join(file.suffixes)}" if "." in name else self.another_chunk(name)
                    self.send_file(stranger)
                case _:
                    return False
            return True

        def another_chunk(self, name: str) -> Path:
            return next(path for path in sorted((origin.folder / "pack/chunks").glob("*/*")) if path.name != name)

        def send_file(self, file: Path, *, most: int | None = None, length: int | None = None, flip_at: int | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(file.stat().st_size if length is None else length))
            self.end_headers()
            self.copy(file, file.stat().st_size if most is None else most, flip_at)

        def copy(self, file: Path, most: int, flip_at: int | None = None) -> None:
            with file.open("rb") as f, contextlib.suppress(OSError):
                while most > 0 and (piece := f.read(min(PIECE_BYTES, most))):
                    at = f.tell() - len(piece)
                    if flip_at is not None and at <= flip_at < f.tell():
                        piece = piece[: flip_at - at] + bytes([piece[flip_at - at] ^ 1]) + piece[flip_at - at + 1 :]
                    self.wfile.write(piece)
                    most -= len(piece)

        def reset(self) -> None:
            """RST, not an end: what an origin that died sends."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
