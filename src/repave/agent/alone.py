"""`repave-agent write`: the writer alone, without a Repave server. An image that `repave image pack` made, at any web server, onto a disk or into a file.

The disk becomes the image bit for bit; no config drive, no boot entry, no lease. What it is good for: to try the data path, to measure it, to
make a disk by hand. Its argument is the only disk that it touches; one that is in use (mounted, in a volume group) the kernel refuses.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import resource
import stat
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from repave.agent.chunks import ChunkSource
from repave.agent.http_client import TIMEOUT_S, Connection, Refused, Unreachable, make_room, parse_address, trust
from repave.agent.target import BLKGETSIZE64, BLKSSZGET
from repave.agent.writer import write_image
from repave.errors import RepaveError, RunFailed
from repave.images.manifest import Manifest, parse_manifest

MANIFEST_CAP_BYTES = 256 * 1024 * 1024
MANIFEST_S = 20.0
SAY_EVERY_S = 5.0


def write_alone(
    manifest_url: str, device: Path, *, sha256: str = "", caches: Sequence[str] = (), resume: bool = False, read_back_all: bool = False, give_up_s: float = 60.0
) -> dict[str, Any]:
    """`device` holds the image, verified; returns what was done, as `--json` prints it.

    Destroys: what is on `device`. A file that is not there is made, as long as the image.

    Args:
        sha256: the manifest's digest; "" = the one in its name, where `repave image pack` gave it that.
        caches: more places with the chunks, asked before the manifest's own server.
        give_up_s: no chunk for so long, and it ends.

    Raises: RunFailed, as `write_image` does; image-damaged where the manifest is not there or not what its digest says.
    """
    began = time.monotonic()
    manifest, pinned, manifest_bytes = _fetch_manifest(manifest_url, sha256)
    chunks_url = urllib.parse.urljoin(manifest_url, "../chunks")
    try:
        source = ChunkSource([*caches, chunks_url])
    except ValueError as error:
        raise RepaveError("bad-request", f"{error}.", field="cache") from None
    last_good = [time.monotonic()]

    def fetch(chunk: str) -> memoryview:
        since = time.monotonic()
        try:
            found = source.fetch(chunk, while_true=lambda: time.monotonic() - max(since, last_good[0]) < give_up_s)
        except Refused as refused:
            raise RunFailed("image-damaged", f"The chunk {chunk[:12]} can not be had: {refused}.") from None
        except (Unreachable, ValueError) as error:
            raise RunFailed("image-damaged", f"The chunk {chunk[:12]} can not be had: {error}.") from None
        last_good[0] = time.monotonic()
        return found

    sector_bytes, disk_bytes = _measure(device, manifest)
    result = write_image(
        device, manifest, fetch=fetch, ask_ahead=source.ask_ahead, config_drive=None, sector_bytes=sector_bytes, disk_bytes=disk_bytes,
        keep_writing=lambda: True, progress=_Teller(), resume=resume, read_back_all=read_back_all,
    )  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "device": str(device), "image_bytes": manifest.size_bytes, "data_bytes": manifest.data_bytes, "bytes_fetched": result.bytes_fetched,
        "manifest_bytes": manifest_bytes, "manifest_pinned": pinned, "bytes_written": result.bytes_written, "bytes_zeroed": result.bytes_zeroed,
        "zeroed_by": result.zeroed_by, "bytes_kept": result.bytes_kept, "bytes_read_back": result.bytes_read_back, "stages_s": result.stages_s,
        "seconds": round(time.monotonic() - began, 3), "cpu_s": round(used.ru_utime + used.ru_stime, 3), "peak_rss_bytes": _peak_rss_bytes(),
        "verified": "all" if read_back_all or not result.stages_s.get("seal") else "sample", "error": None,
    }  # fmt: skip


def run_write(arguments: Any) -> int:
    """The command. The last line of stdout is one JSON object with `--json`, else a sentence; the exit code is 0 where the disk holds the image."""
    try:
        done = write_alone(
            arguments.manifest_url, arguments.device, sha256=arguments.sha256, caches=arguments.cache, resume=arguments.resume,
            read_back_all=arguments.verify == "full", give_up_s=arguments.give_up_s,
        )  # fmt: skip
    except RepaveError as error:
        print(f"failed: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"device": str(arguments.device), "error": error.as_json()}))
        return 1
    if arguments.json:
        print(json.dumps(done))
    else:
        kept = f", {done['bytes_kept']} were there" if done["bytes_kept"] else ""
        made = f"{done['bytes_written']} bytes written, {done['bytes_zeroed']} zeroed ({done['zeroed_by']}){kept}"
        print(f"{arguments.device} holds the image: {made}, {done['bytes_fetched']} fetched; read back: {done['verified']}; {done['seconds']} s")
    return 0


def _fetch_manifest(url: str, sha256: str) -> tuple[Manifest, bool, int]:
    """The manifest, whether its digest was known before, and how long it is."""
    named = re.search(r"/([0-9a-f]{64})\.json$", urllib.parse.urlsplit(url).path)
    wanted = sha256.lower() or (named[1] if named else "")
    try:
        address = parse_address(url)
        with closing(Connection(address, trust() if address.is_tls else None, connect_s=TIMEOUT_S, read_s=MANIFEST_S)) as connection:
            connection.ask(address.target)
            status, data = connection.read(make_room(MANIFEST_CAP_BYTES))
        if status != 200:
            raise Unreachable(f"it was answered with {status}")
        if wanted and hashlib.sha256(data).hexdigest() != wanted:
            raise ValueError("it has another digest than its name or --sha256 says")
        return parse_manifest(bytes(data)), bool(wanted), len(data)
    except Unreachable as error:
        raise RunFailed("image-damaged", f"The manifest can not be had: {error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed("image-damaged", f"That is no manifest: {error}.") from None


def _measure(device: Path, manifest: Manifest) -> tuple[int, int]:
    """Sector size and bytes of the disk; of a file, the image's sectors."""
    try:
        return _measure_there(device, manifest)
    except FileNotFoundError:
        fd = os.open(device, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, manifest.size_bytes)
        os.close(fd)
        return manifest.sector_bytes, manifest.size_bytes
    except OSError as error:
        raise RunFailed("disk-changed", f"{device} can not be opened: {error.strerror}.") from None


def _measure_there(device: Path, manifest: Manifest) -> tuple[int, int]:
    found = os.stat(device)
    if stat.S_ISREG(found.st_mode):
        return manifest.sector_bytes, found.st_size
    if not stat.S_ISBLK(found.st_mode):
        raise RunFailed("disk-changed", f"{device} is neither a disk nor a file.")
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        (size,) = struct.unpack("<Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
        (sector,) = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
    finally:
        os.close(fd)
    return sector, size


def _peak_rss_bytes() -> int:
    """Of this process alone: getrusage's counts what started it, too (vfork)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class _Teller:
    """The writer's `progress` on stderr: a line for each stage, and one now and then, with rate and time left."""

    def __init__(self) -> None:
        self._stage, self._began, self._said = "", 0.0, 0.0
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if stage != self._stage:
                self._stage, self._began, self._said = stage, now, now
                print(f"{stage}: {total / 1e6:.0f} MB", file=sys.stderr, flush=True)
            elif now - self._said >= SAY_EVERY_S and done:
                self._said, rate = now, done / (now - self._began)
                left = (total - done) / rate
                print(f"{stage}: {100 * done // max(total, 1)} %, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True)
