"""Turns a disk image file into chunks and a manifest in the store.

    read_header (ours) -> qcow2 only: qemu-img, confined, to a sparse file beside the store -> data found by SEEK_DATA -> 4 MiB windows,
    compressed by a few threads -> chunk files -> the manifest, last

A broken import leaves nothing listed and no chunk behind. The same image twice adds nothing: chunks and manifests are named by digest.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import zstandard

from repave.errors import ImageError
from repave.images.headers import MAX_VIRTUAL_BYTES, ImageHeader, open_image, read_header_of
from repave.images.manifest import WINDOW_BYTES, ZERO_BYTES, Chunk, Manifest, render_manifest
from repave.images.store import ImageStore

LEVEL = 3  # 10 is 8 % smaller and 2-2.7 times slower; decoding costs the same (measured)
WORKERS = min(4, os.cpu_count() or 1)
RESERVE_BYTES = 256 * 1024 * 1024  # left free on the store's disk: the database may live there too
CONVERT_S = 3600  # CPU and wall seconds: 2 TiB at 600 MB/s
CONVERT_MEMORY_BYTES = 2 * 1024**3  # qemu-img's address space; 200 MB are usual

_ZERO_GRAIN = bytes(ZERO_BYTES)
_local = threading.local()


@dataclass(frozen=True)
class ImportedImage:
    """What an import made. `notes` says what the operator should know, e.g. that the conversion had no network namespace of its own."""

    manifest_sha256: str
    size_bytes: int
    sector_bytes: int
    data_bytes: int
    stored_bytes: int  # sum of its chunks
    added_bytes: int  # new in the store; 0 where the same image was there
    arch: str
    boot: str
    notes: tuple[str, ...] = ()


def import_image(
    source: Path,
    store: ImageStore,
    *,
    arch: str = "amd64",
    max_bytes: int,
    progress: Callable[[int, int], None] | None = None,
    max_virtual_bytes: int = MAX_VIRTUAL_BYTES,
) -> ImportedImage:
    """The image is in the store and verified as far as it went through our hands.

    Args:
        arch: amd64 or arm64: no partition table says it. Whether UEFI boots it, its EFI system partition does.
        max_bytes: the store's quota, all images together.
        progress: (bytes of the disk done, bytes of the disk), from this thread.

    Raises: ImageError image-missing, image-refused, image-quota; nothing is listed then and no chunk of it stays.
    Blocks: minutes; and while another import into the same store runs.
    """
    fd = open_image(source)
    try:
        header = read_header_of(fd, max_virtual_bytes=max_virtual_bytes)
        with store.lock():
            store.sweep()  # what a killed import left
            quota = _Quota(store, max_bytes)
            try:
                with _raw_disk(fd, header, store) as (disk, raw, notes):
                    return _import_raw(disk, raw, store, quota, arch, notes, progress or (lambda done, total: None))
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise ImageError("image-quota", "The disk of the image store is full.") from e
                raise ImageError("image-refused", f"Reading or writing failed: {e.strerror}.") from e
            finally:
                store.sweep()
    finally:
        os.close(fd)


class _Quota:
    """Room in the store; asked before bytes are written, so that the disk never fills."""

    def __init__(self, store: ImageStore, max_bytes: int) -> None:
        self._store, self._max, self._used = store, max_bytes, store.used_bytes()

    def take(self, count: int) -> None:
        self._used += count
        if self._used > self._max:
            raise ImageError("image-quota", f"The quota of {self._max} bytes would be passed.")
        if self._store.free_bytes() - count < RESERVE_BYTES:
            raise ImageError("image-quota", f"Fewer than {RESERVE_BYTES} bytes would stay free on the disk.")


def _import_raw(
    fd: int,
    header: ImageHeader,
    store: ImageStore,
    quota: _Quota,
    arch: str,
    notes: tuple[str, ...],
    progress: Callable[[int, int], None],
) -> ImportedImage:
    if header.table != "gpt":
        raise ImageError("image-refused", "The disk has an MBR partition table; the writer needs a GPT: convert it with sgdisk --mbrtogpt.")
    size = header.virtual_size_bytes
    chunks: list[Chunk] = []
    stored: set[str] = set()
    added = 0
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="import") as pool:
        for chunk, data in _packed_windows(fd, size, pool):
            if chunk.sha256 not in stored:
                stored.add(chunk.sha256)
                if not store.holds(chunk.sha256, data):
                    quota.take(len(data))
                    store.write_chunk(chunk.sha256, data)
                    added += len(data)
            chunks.append(chunk)
            progress(min(len(chunks) * WINDOW_BYTES, size), size)
    boot = "uefi" if header.has_esp else "bios"
    manifest = Manifest(size, header.sector_bytes, arch, boot, tuple(chunks))
    quota.take(len(render_manifest(manifest)))
    return ImportedImage(
        manifest_sha256=store.write_manifest(manifest), size_bytes=size, sector_bytes=header.sector_bytes,
        data_bytes=manifest.data_bytes, stored_bytes=sum({c.sha256: c.compressed_bytes for c in chunks}.values()), added_bytes=added,
        arch=arch, boot=boot, notes=notes,
    )  # fmt: skip


def _packed_windows(fd: int, size: int, pool: ThreadPoolExecutor) -> Iterator[tuple[Chunk, bytes]]:
    """Each window's chunk and compressed bytes, in order. Holes of the file are not read."""
    pending: deque[Callable[[], tuple[Chunk, bytes]]] = deque()
    data_at = _next_data(fd, 0, size)
    for offset in range(0, size, WINDOW_BYTES):
        length = min(WINDOW_BYTES, size - offset)
        if data_at < offset:
            data_at = _next_data(fd, offset, size)
        if data_at < offset + length:
            pending.append(pool.submit(_pack, fd, offset, length).result)
        else:
            pending.append(functools.partial(_zero_window, length))
        if len(pending) > 2 * WORKERS:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def _next_data(fd: int, offset: int, size: int) -> int:
    """Where the next data of the file begin, at or after `offset`; `size` where there are none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return size
        raise


def _pack(fd: int, offset: int, length: int) -> tuple[Chunk, bytes]:
    window = os.pread(fd, length, offset)
    if len(window) != length:
        raise ImageError("image-refused", "The file became shorter while it was read.")
    extents: list[tuple[int, int]] = []
    for at in range(0, length, ZERO_BYTES):
        grain = window[at : at + ZERO_BYTES]
        if grain == _ZERO_GRAIN[: len(grain)]:
            continue
        start, size = extents.pop() if extents and sum(extents[-1]) == at else (at, 0)
        extents.append((start, size + len(grain)))
    return _compress(window, tuple(extents)) if extents else _zero_window(length)


@functools.lru_cache(maxsize=4)
def _zero_window(length: int) -> tuple[Chunk, bytes]:
    return _compress(bytes(length), ())


def _compress(window: bytes, extents: tuple[tuple[int, int], ...]) -> tuple[Chunk, bytes]:
    if not hasattr(_local, "compressor"):  # one a thread: it is not safe to share
        _local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)  # the agent relies on it
    data: bytes = _local.compressor.compress(window)
    return Chunk(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(window).hexdigest(), extents), data


@contextmanager
def _raw_disk(fd: int, header: ImageHeader, store: ImageStore) -> Iterator[tuple[int, ImageHeader, tuple[str, ...]]]:
    """The image as an open raw disk: the file itself, or a sparse temporary file that is gone afterwards."""
    if header.format == "raw":
        yield fd, header, ()
        return
    raw_fd, name = tempfile.mkstemp(dir=store.tmp, suffix=".raw")
    try:
        notes = _convert(fd, Path(name), header.virtual_size_bytes, store)
        raw = read_header_of(raw_fd)
        if raw.format != "raw" or raw.virtual_size_bytes - header.virtual_size_bytes not in range(512):
            raise ImageError("image-refused", "The qcow2 holds something else than a disk of the size that it names.")
        yield raw_fd, raw, notes
    finally:
        os.close(raw_fd)
        os.unlink(name)


def _convert(fd: int, target: Path, virtual_bytes: int, store: ImageStore) -> tuple[str, ...]:
    """The disk that the qcow2 holds, in `target`. Returns notes."""
    source = {
        "driver": "qcow2",
        "backing": None,
        "file": {"driver": "file", "filename": f"/proc/self/fd/{fd}", "locking": "off"},
    }
    name = f"json:{json.dumps(source)}"
    alone, notes = _without_network()
    # convert reads what lies behind the end of a cut off file as zeros and succeeds (measured, 7.2): check says so.
    for what, words in (("check", [name]), ("convert", ["-O", "raw", name, str(target)])):
        code, said = _qemu_img([*alone, *_limits(virtual_bytes)], what, words, fd, store)
        if code and not (what == "check" and code == 3):  # 3: leaked clusters, no harm
            said = said.replace(str(target), "the copy").replace(name, "the image")
            raise ImageError("image-refused", f"qemu-img {what} says it is damaged (exit {code}): {said[:300]}")
    return notes


def _limits(virtual_bytes: int) -> list[str]:
    return [
        _tool("prlimit"), f"--cpu={CONVERT_S}", f"--as={CONVERT_MEMORY_BYTES}", f"--fsize={virtual_bytes + 1024**2}",
        "--core=0", "--nofile=64", "--",
    ]  # fmt: skip


def _qemu_img(before: list[str], what: str, words: list[str], fd: int, store: ImageStore) -> tuple[int, str]:
    """Exit code and what it said, of qemu-img on the open file that was checked: no network, no environment, little memory."""
    argv = [*before, _tool("qemu-img"), what, *words]
    with tempfile.TemporaryFile(dir=store.tmp) as said:
        process = subprocess.Popen(argv, pass_fds=[fd], env={}, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + CONVERT_S
            while process.poll() is None:
                if store.free_bytes() < RESERVE_BYTES:
                    raise ImageError("image-quota", "The disk of the image store became full while the qcow2 was converted.")
                if time.monotonic() > deadline:
                    raise ImageError("image-refused", f"The conversion took longer than {CONVERT_S} seconds.")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return process.returncode, " ".join(said.read(4096).decode(errors="replace").split())


def _without_network() -> tuple[list[str], tuple[str, ...]]:
    """The words before a command that leave it no network; where the kernel allows none, no words and a note."""
    alone = [_tool("unshare"), "-n" if os.geteuid() == 0 else "-rn", "--"]
    if subprocess.run([*alone, _tool("true")], env={}, capture_output=True).returncode == 0:
        return alone, ()
    return [], ("qemu-img ran without a network namespace of its own: this kernel or container allows none",)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ImageError("image-refused", f"{name} is not installed; it is needed to convert a qcow2.")
    return path
