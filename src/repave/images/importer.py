"""Turns a disk image file into chunks and a manifest in the store.

    read_header (ours) -> data found by SEEK_DATA, in a qcow2 by a confined qemu-nbd's block status -> 4 MiB windows, read and compressed by a
    few threads -> chunk files -> the manifest, last

A broken import leaves nothing listed and no chunk behind. The same image twice adds nothing: chunks and manifests are named by digest (until the
compressor or its parameters change).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard

from repave.errors import ImageError
from repave.images.confined import open_qemu_disk
from repave.images.headers import FORMATS, MAX_VIRTUAL_BYTES, FileState, ImageHeader, open_image, read_file_state, read_header_of, read_inner_header
from repave.images.manifest import WINDOW_BYTES, ZERO_BYTES, Chunk, Manifest, render_manifest
from repave.images.store import ImageStore

LEVEL = 3  # 10 is 8 % smaller and 2-2.7 times slower; decoding costs the same (measured)
# Tables that fit a core's cache: a tenth less work than the level's own, 0.3 % larger (measured). The agent relies on the checksum.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(LEVEL, source_size=WINDOW_BYTES, hash_log=16, write_checksum=True)
THREADS = min(4, os.cpu_count() or 1) + 2  # two more than work: some wait for the disk
RESERVE_BYTES = 256 * 1024 * 1024  # left free on the store's disk: the database may live there too

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
    source: Path | int,
    store: ImageStore,
    *,
    arch: str = "amd64",
    max_bytes: int,
    formats: Collection[str] = FORMATS,
    progress: Callable[[int, int], None] | None = None,
    max_virtual_bytes: int = MAX_VIRTUAL_BYTES,
    since: FileState | None = None,
) -> ImportedImage:
    """The image is in the store and verified as far as it went through our hands.

    Args:
        source: a file, or the descriptor of one that is open already and stays open.
        arch: amd64 or arm64: no partition table says it. Whether UEFI boots it, its EFI system partition does.
        formats: those that are allowed, as headers.py names them.
        max_bytes: the store's quota, all images together.
        progress: (bytes of the disk done, bytes of the disk), from this thread.
        since: the file's state when it was looked at before, e.g. hashed; None = as it is now. In another one at the end, it is no image.

    Raises: ImageError image-missing, image-refused (also where the file changes meanwhile), image-quota; nothing is listed then and no chunk
    of it stays.
    Blocks: minutes; and while another import into the same store runs.
    """
    fd = open_image(source) if isinstance(source, Path) else source
    try:
        since = since or read_file_state(fd)
        header = read_header_of(fd, formats=formats, max_virtual_bytes=max_virtual_bytes)
        with store.lock():
            store.sweep()  # what a killed import left
            quota = _Quota(store, max_bytes)
            try:
                with _open_disk(fd, header) as (disk, found, notes):
                    manifest, added = _pack_disk(disk, found, store, quota, arch, progress or (lambda done, total: None))
                if read_file_state(fd) != since:
                    raise ImageError("image-refused", "The file changed while it was read: import it when its copy is whole.")
                quota.take(len(render_manifest(manifest)))
                return ImportedImage(
                    manifest_sha256=store.write_manifest(manifest), size_bytes=manifest.size_bytes, sector_bytes=manifest.sector_bytes,
                    data_bytes=manifest.data_bytes, stored_bytes=sum({c.sha256: c.compressed_bytes for c in manifest.chunks}.values()), added_bytes=added,
                    arch=manifest.arch, boot=manifest.boot, notes=notes,
                )  # fmt: skip
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise ImageError("image-quota", "The disk of the image store is full.") from e
                raise ImageError("image-refused", f"Reading or writing failed: {e.strerror}.") from e
            finally:
                store.sweep()
    finally:
        if isinstance(source, Path):
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


class _Disk(Protocol):
    """What is imported. `read_into` may be called by several threads at once; `next_data` by one, with offsets that never become smaller."""

    def read_into(self, offset: int, view: memoryview) -> None: ...

    def next_data(self, offset: int) -> int:
        """Where the next bytes that may not be zero begin, at or after `offset`; the disk's size where there are none."""


class _RawFile:
    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size

    def read_into(self, offset: int, view: memoryview) -> None:
        if os.preadv(self._fd, [view], offset) != len(view):
            raise ImageError("image-refused", "The file became shorter while it was read.")

    def next_data(self, offset: int) -> int:
        if os.fstat(self._fd).st_size < self._size:
            raise ImageError("image-refused", "The file became shorter while it was read.")
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return self._size
            raise


def _pack_disk(disk: _Disk, header: ImageHeader, store: ImageStore, quota: _Quota, arch: str, progress: Callable[[int, int], None]) -> tuple[Manifest, int]:
    """The disk's chunks are in the store. Returns its manifest, and the bytes that are new."""
    if header.table != "gpt":
        raise ImageError("image-refused", "The disk has an MBR partition table; the writer needs a GPT: convert it with sgdisk --mbrtogpt.")
    size = header.virtual_size_bytes
    chunks: list[Chunk] = []
    stored: set[str] = set()
    writes: deque[Future[None]] = deque()
    added = 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="import") as pool:
        for chunk, data in _packed_windows(disk, size, pool):
            if chunk.sha256 not in stored:
                stored.add(chunk.sha256)
                if not store.holds(chunk.sha256, data):
                    quota.take(len(data))
                    writes.append(pool.submit(store.write_chunk, chunk.sha256, data))
                    added += len(data)
            while len(writes) > THREADS:
                writes.popleft().result()
            chunks.append(chunk)
            progress(min(len(chunks) * WINDOW_BYTES, size), size)
        for write in writes:
            write.result()
    return Manifest(size, header.sector_bytes, arch, "uefi" if header.has_esp else "bios", tuple(chunks)), added


def _packed_windows(disk: _Disk, size: int, pool: ThreadPoolExecutor) -> Iterator[tuple[Chunk, bytes]]:
    """Each window's chunk and compressed bytes, in order. Where there are no data, nothing is read."""
    pending: deque[Callable[[], tuple[Chunk, bytes]]] = deque()
    data_at = disk.next_data(0)
    for offset in range(0, size, WINDOW_BYTES):
        length = min(WINDOW_BYTES, size - offset)
        if data_at < offset:
            data_at = disk.next_data(offset)
        if data_at < offset + length:
            pending.append(pool.submit(_pack_of, disk, offset, length).result)
        else:
            pending.append(functools.partial(_zero_window, length))
        if len(pending) > 2 * THREADS:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def _pack_of(disk: _Disk, offset: int, length: int) -> tuple[Chunk, bytes]:
    """The window at `offset`, read into this thread's own buffer: new memory for each costs as much as receiving it (measured)."""
    window = getattr(_local, "window", bytearray())
    if len(window) != length:
        window = _local.window = bytearray(length)
    disk.read_into(offset, memoryview(window))
    return pack_window(window)


def pack_window(window: bytes | bytearray) -> tuple[Chunk, bytes]:
    """The window's chunk, and its compressed bytes."""
    extents: list[tuple[int, int]] = []
    for at in range(0, len(window), ZERO_BYTES):
        grain = min(ZERO_BYTES, len(window) - at)
        if window.startswith(_ZERO_GRAIN[:grain], at):  # no copy of it
            continue
        start, size = extents.pop() if extents and sum(extents[-1]) == at else (at, 0)
        extents.append((start, size + grain))
    return _compress(window, tuple(extents)) if extents else _zero_window(len(window))


@functools.lru_cache(maxsize=4)
def _zero_window(length: int) -> tuple[Chunk, bytes]:
    return _compress(bytes(length), ())


def _compress(window: bytes | bytearray, extents: tuple[tuple[int, int], ...]) -> tuple[Chunk, bytes]:
    if not hasattr(_local, "compressor"):  # one a thread: it is not safe to share
        _local.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    data: bytes = _local.compressor.compress(window)
    return Chunk(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(window).hexdigest(), extents), data


@contextmanager
def _open_disk(fd: int, header: ImageHeader) -> Iterator[tuple[_Disk, ImageHeader, tuple[str, ...]]]:
    """The disk in the open image file, what its own first sectors say, and notes."""
    if header.format == "raw":
        yield _RawFile(fd, header.virtual_size_bytes), header, ()
        return
    with open_qemu_disk(fd, header, readers=THREADS) as (disk, notes):
        yield disk, read_inner_header(disk.read, disk.size_bytes, header), notes
