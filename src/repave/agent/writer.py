"""Writes one image to one disk so that a half-written disk never boots.

The order (design decision 12; reference: OVMF boots from a leftover backup GPT as soon as LBA 0 is there):

    compare       resumed: what the disk holds of the image already, read past the cache and hashed; a chunk is its digest, so this is always safe
    clear         zero LBA 0 alone, flush; both partition tables, flush; the first and the last MiB, flush
    write         body: fetch | verify | decode (which checks itself) | write, gaps made zero; the first MiB of the image is held back
    config-drive  the config drive, flush; the new backup GPT, flush
    read-back     past the cache: the start of every chunk, 5 % whole, zero probes; or all of it
    boot-entry    the caller's `boot_entry`
    seal          LBA 1 onward, flush, read back; then LBA 0 alone, last, flush

Without a config drive the disk becomes the image bit for bit (`repave.agent.alone`); where anything is written, its last MiB, behind the image, is
zeroed all the same. Kept partitions are gone around in every stage.
Imports nothing but the stdlib, zstandard and repave's image format and errors.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import zstandard

from repave.agent.gpt import MIB, DiskTooSmall, Partition, Tables, rebuild
from repave.agent.target import TargetDisk, aligned
from repave.errors import RunFailed
from repave.images.manifest import Manifest

TRIES = 3  # a chunk with a wrong digest: a bad transfer is over after one more, a bad store never
WORKERS = min(4, (os.cpu_count() or 1) + 2)  # fetch, disk and decoder overlap from 2; 8 take 90 MB for no gain (measured)
SAMPLE_BYTES = 64 * 1024  # of every chunk, read back
WHOLE_EVERY = 20  # one chunk in so many is read back whole: 5 %
ZERO_PROBES = 32
ZERO_RUN_BYTES = 64 * MIB  # made zero at once; the lease is asked before each, and a disk that must write them takes half a second
TABLE_BYTES = 128 * 128  # UEFI 2.10, 5.3: the least that the entries of a GPT take
CD_DESCRIPTOR = 32 * 1024  # ECMA-119, 6.2.1: OVMF boots El Torito from a disk with 512-byte sectors as well, and wants no LBA 0 for it (measured)
DECODER_WINDOW = 8 * MIB  # the decoder's memory, whatever a frame asks for; larger only where the windows are

_T = TypeVar("_T")


class WriteResult(NamedTuple):
    """What was done. `bytes_written` counts what we sent to the disk, `bytes_zeroed` what was made zero, `stages_s` seconds by stage."""

    bytes_written: int
    bytes_fetched: int
    bytes_zeroed: int
    zeroed_by: str  # how, in the end: see target.TargetDisk
    bytes_kept: int  # of the image, found on the disk and verified there
    bytes_read_back: int
    stages_s: dict[str, float]


def write_image(
    device: Path,
    manifest: Manifest,
    *,
    fetch: Callable[[str], Any],
    ask_ahead: Callable[[str], None] = lambda sha256: None,
    config_drive: bytes | None,
    sector_bytes: int,
    disk_bytes: int,
    keep_writing: Callable[[], bool],
    progress: Callable[[str, int, int], None],
    partition_guid: bytes = bytes(16),
    boot_entry: Callable[[tuple[Partition, ...]], None] | None = None,
    verify_identity: Callable[[], None] = lambda: None,
    resume: bool = False,
    read_back_all: bool = False,
    keep: Sequence[Partition] = (),
) -> WriteResult:
    """Afterwards the disk boots the image: every byte was verified before it was written, and what was written read back by samples, or all of it.

    Destroys: what is on `device`, a block device (opened with O_EXCL: the caller must not hold it so) or a plain file of `disk_bytes`.
    Repeatable: from the start. Until the last write, the first sector is zero.

    Args:
        fetch: SHA-256 of a chunk -> its bytes in any buffer, good until this thread asks again. Called from up to 4 threads; what it raises ends the write.
        ask_ahead: called by a thread with what it will `fetch` next, before it works on what it has.
        config_drive: the config drive's file system, written to a new partition `config-2` at the end of the disk. None: see the module's docstring.
        keep_writing: False = the lease or the run is over. Asked before each chunk, each 64 MiB of zeros and each stage, from several threads; must be quick.
        progress: (stage, bytes done, bytes total); never two calls at once. Stages as in the module's docstring.
        partition_guid: 16 bytes, as on disk (`uuid.UUID.bytes_le`).
        boot_entry: called with the new partition table when the data are verified, before the disk can boot.
        verify_identity: raises where `device` does not lead to the right disk any more. Asked just before the first write, and before the last.
        keep: partitions of the disk that stay bit for bit, and are in the new table; with a config drive only.
        resume: keep what of the image is on the disk already. Where that is all of it, nothing is written.

    Raises: RunFailed: disk-changed, sector-size, disk-too-small, image-refused (nothing was written);
        image-damaged, disk-write, read-back, stale-run (the disk cannot boot).
    """
    if manifest.sector_bytes != sector_bytes:
        raise RunFailed("sector-size", f"The image is made for {manifest.sector_bytes}-byte sectors, the disk has {sector_bytes}.")
    kept = sorted(p.span(sector_bytes) for p in keep)
    with TargetDisk(device, sector_bytes=sector_bytes, size_bytes=disk_bytes, keep=kept) as disk:
        w = _Write(disk, manifest, fetch, ask_ahead, keep_writing, progress, read_back_all, kept)
        if resume:
            with w.stage("compare"):
                disk.flush()  # what another program has just written is on the disk before it is looked at
                w.compare()
        if config_drive is not None or not w.is_whole_image():
            tables = w.plan_tables(config_drive, partition_guid, keep)
            with w.stage("clear"):
                verify_identity()
                w.clear(tables)
            with w.stage("write"):
                w.write_body()
            if config_drive is not None:
                with w.stage("config-drive"):
                    w.write_config_drive(tables, config_drive)
            with w.stage("read-back"):
                w.read_back()
            if boot_entry is not None:
                with w.stage("boot-entry"):
                    boot_entry(tables.partitions)
            with w.stage("seal"):
                verify_identity()
                w.seal(tables)
        return WriteResult(disk.bytes_written, w.bytes_fetched, disk.bytes_zeroed, disk.zeroed_by, w.bytes_kept, w.bytes_read_back, w.stages_s)


def read_first_mib(manifest: Manifest, read_window: Callable[[int, memoryview], None]) -> bytes:
    """The image's first MiB. `read_window` fills the view with the window of this number, one that has data."""
    first = bytearray(MIB)
    buffer = memoryview(mmap.mmap(-1, manifest.window_bytes))
    for index in range(min(len(manifest.chunks), -(-MIB // manifest.window_bytes))):
        offset, length = manifest.window(index)
        if manifest.chunks[index].extents:
            read_window(index, buffer[:length])
            first[offset : offset + length] = buffer[: min(length, MIB - offset)]
    return bytes(first)


class _Piece(NamedTuple):
    """A part of a window, in bytes of the window: data to write, or a gap to make zero."""

    is_data: bool
    start: int
    end: int


class _Job(NamedTuple):
    """What a worker does at once: a window with data, and then a run of windows without."""

    chunk: int | None
    zeros: range | None


class _Sample(NamedTuple):
    """What must be on the disk: `sha256` None = zeros."""

    what: str
    offset: int
    length: int
    sha256: bytes | None


class _Write:
    """One write: the stages share what was fetched, written and must be read back."""

    def __init__(
        self,
        disk: TargetDisk,
        manifest: Manifest,
        fetch: Callable[[str], Any],
        ask_ahead: Callable[[str], None],
        keep_writing: Callable[[], bool],
        progress: Callable[[str, int, int], None],
        read_back_all: bool,
        kept: Sequence[tuple[int, int]],
    ) -> None:
        self.disk, self.manifest = disk, manifest
        self.bytes_fetched = self.bytes_read_back = 0
        self.stages_s: dict[str, float] = {}
        self._fetch, self._ask_ahead, self._keep_writing, self._progress = fetch, ask_ahead, keep_writing, progress
        self._read_back_all, self._keep = read_back_all, kept
        self._lock, self._stop = threading.Lock(), threading.Event()  # set: the write has failed, and no worker begins anything more
        self._held: dict[int, bytes] = {}  # compressed chunks of the first MiB, fetched before anything is cleared
        self._kept: set[int] = set()  # windows that the disk held already
        self._samples: list[_Sample] = []  # of what was written
        self._gaps: list[_Sample] = []  # the first of each window
        self._body = (MIB, manifest.size_bytes)  # bytes of the disk that stage "write" fills

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the stage and names it in `report`."""
        self._stage, self._done, self._total = name, 0, 0
        self.may_go_on()
        began = time.monotonic()
        yield
        self.stages_s[name] = round(time.monotonic() - began, 3)

    def expect(self, total: int) -> None:
        self._total = total
        self._progress(self._stage, 0, total)

    def report(self, more: int) -> None:
        with self._lock:
            self._done += more
            self._progress(self._stage, self._done, self._total)

    def may_go_on(self) -> None:
        if not self._keep_writing():
            raise RunFailed("stale-run", "The agent stopped writing: its lease or its run is over.")

    # Nothing is written before it is known what is there, and that the tables fit.

    def compare(self) -> None:
        m = self.manifest
        there = [i for i in range(len(m.chunks)) if sum(m.window(i)) <= self.disk.size_bytes]
        self.expect(sum(m.window(i)[1] for i in there))
        self.disk.drop_cache()
        self._in_workers(there, self._compare_window)

    def _compare_window(self, index: int, buffer: memoryview, following: int | None) -> None:
        self.may_go_on()
        offset, length = self.manifest.window(index)
        self.disk.read_into(offset, buffer[:length])
        if _sha256(buffer[:length]).hex() == self.manifest.chunks[index].raw_sha256:
            self._kept.add(index)
        self.report(length)

    def is_whole_image(self) -> bool:
        return len(self._kept) == len(self.manifest.chunks)

    @property
    def bytes_kept(self) -> int:
        return sum(size for i in self._kept for _, size in self.manifest.chunks[i].extents)

    def plan_tables(self, config_drive: bytes | None, partition_guid: bytes, keep: Sequence[Partition]) -> Tables:
        """The tables for this disk, from the image's first MiB, which stays in memory until `seal`."""
        m, disk = self.manifest, self.disk
        first = read_first_mib(m, self._read_early)
        if config_drive is None:
            if max(m.size_bytes, 2 * MIB) > disk.size_bytes:
                raise RunFailed("disk-too-small", f"The image has {m.size_bytes} bytes, the disk {disk.size_bytes}.")
            tables = Tables(first[: m.sector_bytes], first[m.sector_bytes :], disk.size_bytes, b"", disk.size_bytes, 0, ())
        else:
            try:
                tables = rebuild(
                    first, sector_bytes=disk.sector_bytes, disk_bytes=disk.size_bytes, config_bytes=len(config_drive), config_guid=partition_guid, keep=keep
                )
            except DiskTooSmall as e:
                raise RunFailed("disk-too-small", f"{e}.") from e
            except ValueError as e:
                raise RunFailed("image-refused", f"{e}.") from e
        # What the image has behind its last partition is its own backup table: not wanted where the config drive goes.
        self._body = (MIB, min([m.size_bytes, tables.config_offset, *(start for start, _ in self._keep)]))
        return tables

    def _read_early(self, index: int, view: memoryview) -> None:
        """A window of the first MiB; from the disk where it holds it. Its chunk stays in `_held`, fetched once."""
        if index in self._kept:
            self.disk.read_into(self.manifest.window(index)[0], view)
        else:
            self._held[index] = bytes(self._fetch_chunk(index))
            decode(self.manifest, index, self._held[index], view)

    def clear(self, tables: Tables) -> None:
        """First what firmware finds the old OS by, LBA 0 alone: while that may be there all else of it is whole."""
        size, sector = self.disk.size_bytes, self.disk.sector_bytes
        behind = tables.config_offset + tables.config_bytes
        tail = size - MIB if any(end > behind for _, end in self._keep) else min(size - MIB, behind)
        self.expect(MIB + size - tail)
        self.disk.write_zeros(0, sector)
        self.disk.flush()
        table = sector + -(-TABLE_BYTES // sector) * sector
        for offset, length in ((sector, table), (CD_DESCRIPTOR, sector), (size - table, table)):
            self.disk.write_zeros(offset, length)
        self.disk.flush()
        for offset, end in ((0, MIB), *self._beside_kept(tail, size)):
            self.disk.write_zeros(offset, end - offset)
            self.report(end - offset)
        self.disk.flush()
        cut = {i for i in self._kept if self.manifest.window(i)[0] + self.manifest.window(i)[1] > tail}
        self._kept -= cut  # what was just zeroed of them is not there any more

    def _beside_kept(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What of this range is not kept."""
        for first, after in self._keep:
            if start < min(first, end):
                yield start, min(first, end)
            start = max(start, after)
        if start < end:
            yield start, end

    def write_body(self) -> None:
        missing = [i for i in range(len(self.manifest.chunks)) if i not in self._kept and self._pieces(i)]
        self.expect(sum(size for i in missing for _, size in self.manifest.chunks[i].extents))
        self._in_workers(self._jobs(missing), self._do)
        self.disk.flush()

    def write_config_drive(self, tables: Tables, config_drive: bytes) -> None:
        self.expect(tables.config_bytes + len(tables.backup))
        for what, offset, data in (
            ("the config drive", tables.config_offset, config_drive.ljust(tables.config_bytes, b"\0")),
            ("the backup partition table", tables.backup_offset, tables.backup),
        ):
            self._write_whole(what, offset, data)
            self.disk.flush()
            self.report(len(data))

    def read_back(self) -> None:
        samples = [*self._samples, *self._whole_chunks(), *self._zero_probes()]
        self.expect(sum(s.length for s in samples))
        self.disk.drop_cache()
        self._in_workers(samples, self._verify)

    def seal(self, tables: Tables) -> None:
        """LBA 1 onward, then LBA 0: only that last sector makes the disk bootable."""
        self.expect(MIB)
        for offset, data in ((self.disk.sector_bytes, tables.lba1_onward), (0, tables.lba0)):
            self.may_go_on()
            self._samples.clear()
            self._write_whole("the partition table", offset, data)
            self.disk.flush()
            self.disk.drop_cache()
            self._compare(self._samples[0], memoryview(mmap.mmap(-1, MIB)))
            self.report(len(data))

    # The body: chunks in their order, and among them runs of windows without data, so that these are zero before the last chunk has come.

    def _jobs(self, windows: Sequence[int]) -> Iterator[_Job]:
        with_data = [i for i in windows if self.manifest.chunks[i].extents]
        runs = self._zero_runs(i for i in windows if not self.manifest.chunks[i].extents)
        every, left = max(1, len(with_data) // (len(runs) + 1)), iter(runs)
        for number, index in enumerate(with_data, start=1):
            yield _Job(index, next(left, None) if number % every == 0 else None)
        for run in left:
            yield _Job(None, run)

    def _zero_runs(self, windows: Iterable[int]) -> list[range]:
        """Those that follow one another together: the fewer the calls that make zeros, the better (a disk image as disk: 5 ms each, measured)."""
        most = max(1, ZERO_RUN_BYTES // self.manifest.window_bytes)
        runs: list[range] = []
        for index in windows:
            if runs and index == runs[-1].stop and len(runs[-1]) < most:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        return runs

    def _do(self, job: _Job, buffer: memoryview, following: _Job | None) -> None:
        if job.chunk is not None:
            self._write_chunk(job.chunk, buffer, following.chunk if following else None)
        if job.zeros is not None and not self._stop.is_set():
            self._zero_windows(job.zeros)

    def _zero_windows(self, run: range) -> None:
        for index in run:
            if self.manifest.chunks[index].raw_sha256 != _zeros_sha256(self.manifest.window(index)[1]):
                raise RunFailed("image-damaged", f"Chunk {index} is said to be zeros and has another digest.")
        start = self.manifest.window(run[0])[0] + self._pieces(run[0])[0].start
        end = self.manifest.window(run[-1])[0] + self._pieces(run[-1])[-1].end
        self.may_go_on()
        self.disk.make_zero(start, end - start)
        for index in run:
            self._note_gaps(index, self._pieces(index))
        self.report(0)

    def _write_chunk(self, index: int, buffer: memoryview, following: int | None) -> None:
        m = self.manifest
        offset, length = m.window(index)
        view, pieces = buffer[:length], self._pieces(index)
        data = self._held.pop(index, None) or self._fetch_chunk(index)
        if following is not None and following not in self._held:
            self._ask_ahead(m.chunks[following].sha256)
        decode(m, index, data, view)
        self.may_go_on()
        for piece in pieces:
            if piece.is_data:
                self.disk.write(offset + piece.start, view[piece.start : piece.end])
            else:
                self.disk.make_zero(offset + piece.start, piece.end - piece.start)
        self._samples.extend(self._samples_of(index, view, [p for p in pieces if p.is_data]))
        self._note_gaps(index, pieces)
        self.report(sum(size for _, size in m.chunks[index].extents))

    def _note_gaps(self, index: int, pieces: Sequence[_Piece]) -> None:
        """What of the window's gaps may be read back."""
        offset, _ = self.manifest.window(index)
        gaps = [_Sample(f"a gap of chunk {index}", offset + p.start, p.end - p.start, None) for p in pieces if not p.is_data]
        if self._read_back_all and not self._is_whole(index):  # which no digest of the manifest covers
            self._samples.extend(gaps)
        elif gaps:
            self._gaps.append(gaps[0]._replace(length=min(gaps[0].length, SAMPLE_BYTES)))

    def _fetch_chunk(self, index: int) -> Any:
        """The chunk's compressed bytes, as the manifest names them."""
        chunk = self.manifest.chunks[index]
        for _ in range(TRIES):
            data = self._fetch(chunk.sha256)
            with self._lock:
                self.bytes_fetched += len(data)
            if len(data) == chunk.compressed_bytes and hashlib.sha256(data).hexdigest() == chunk.sha256:
                return data
        raise RunFailed("image-damaged", f"Chunk {index} came {TRIES} times with another digest than its manifest names.", chunk=index)

    def _pieces(self, index: int) -> list[_Piece]:
        """The window's data and gaps in order, as far as they belong to the body."""
        offset, length = self.manifest.window(index)
        low, high = (min(max(edge - offset, 0), length) for edge in self._body)
        found, end = [], low
        for start, size in (*self.manifest.chunks[index].extents, (length, 0)):
            if end < (gap_end := min(start, high)):
                found.append(_Piece(False, end, gap_end))
            start, end = max(start, low), max(end, min(start + size, high))
            if start < end and size:
                found.append(_Piece(True, start, end))
        return found

    def _is_whole(self, index: int) -> bool:
        """All of the window is in the body: what is on the disk has the digest that the manifest names."""
        offset, length = self.manifest.window(index)
        return self._body[0] <= offset and offset + length <= self._body[1]

    def _samples_of(self, index: int, view: memoryview, data: list[_Piece]) -> list[_Sample]:
        """The first 64 KiB of data; of a window that the body cuts, all of it, because no digest of the manifest covers the rest."""
        if self._is_whole(index):
            data = [_Piece(True, p.start, min(p.end, p.start + SAMPLE_BYTES)) for p in data[:1]]
        offset, _ = self.manifest.window(index)
        return [_Sample(f"chunk {index}", offset + p.start, p.end - p.start, _sha256(view[p.start : p.end])) for p in data]

    # Read-back.

    def _whole_chunks(self) -> list[_Sample]:
        m = self.manifest
        all_of_it = self._read_back_all
        whole = [i for i, c in enumerate(m.chunks) if (c.extents or all_of_it) and i not in self._kept and self._is_whole(i)]
        return [_Sample(f"chunk {i}", *m.window(i), bytes.fromhex(m.chunks[i].raw_sha256)) for i in whole[:: 1 if all_of_it else WHOLE_EVERY]]

    def _zero_probes(self) -> list[_Sample]:
        return self._gaps[:: max(1, len(self._gaps) // ZERO_PROBES)]

    def _verify(self, sample: _Sample, buffer: memoryview, following: _Sample | None) -> None:
        self.may_go_on()
        self._compare(sample, buffer)
        self.report(sample.length)

    def _compare(self, sample: _Sample, buffer: memoryview) -> None:
        view = buffer[: sample.length]
        self.disk.read_into(sample.offset, view)
        with self._lock:
            self.bytes_read_back += sample.length
        wanted = sample.sha256 or bytes.fromhex(_zeros_sha256(sample.length))
        if _sha256(view) != wanted:
            raise RunFailed("read-back", f"{sample.what}, at byte {sample.offset} of the disk, is not what was written.")

    def _write_whole(self, what: str, offset: int, data: bytes) -> None:
        """Writes `data` and asks for all of it at read-back, in parts that fit a worker's buffer."""
        for at in range(0, len(data), MIB):
            part = data[at : at + MIB]
            self.disk.write(offset + at, aligned(part))
            self._samples.append(_Sample(what, offset + at, len(part), _sha256(part)))

    def _in_workers(self, items: Iterable[_T], work: Callable[[_T, memoryview, _T | None], None]) -> None:
        """`work(item, buffer, following)` for every item, by a few threads with one page-aligned buffer each; the first error stops them all and is raised.

        `following` is what the same thread works on next, None at the end.
        """
        todo, lock, stop = iter(items), threading.Lock(), self._stop
        buffer_bytes = max(self.manifest.window_bytes, MIB)

        def take() -> _T | None:
            with lock:
                return next(todo, None)

        def loop() -> None:
            try:
                buffer, item = memoryview(mmap.mmap(-1, buffer_bytes)), take()
                while item is not None and not stop.is_set():
                    following = take()
                    work(item, buffer, following)
                    item = following
            except BaseException as e:  # no worker ends in silence: what it had in hand was not done
                with lock:
                    errors.append(e)
                stop.set()

        errors: list[BaseException] = []
        workers = [threading.Thread(target=loop, name=f"writer-{n}") for n in range(WORKERS)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except BaseException:  # Ctrl-C: none may go on when the disk is closed
            stop.set()
            for worker in workers:
                worker.join()
            raise
        if errors:
            raise errors[0]


def decode(manifest: Manifest, index: int, data: Any, view: memoryview) -> None:
    """Fills `view` with the window, and never more than the window whatever the frame claims.

    `data` has the digest of the manifest already; the frame's own checksum, made from the image, says that it was decoded right (a tenth of
    the work of hashing the window, which read-back does by samples). A frame without one is hashed.
    """
    try:
        has_checksum = zstandard.get_frame_parameters(data).has_checksum
        decoder = zstandard.ZstdDecompressor(max_window_size=max(DECODER_WINDOW, len(view))).stream_reader(data)
        filled = 0
        while filled < len(view) and (more := decoder.readinto(view[filled:])):
            filled += more
        exact = filled == len(view) and not decoder.read(1)
    except zstandard.ZstdError:
        exact = False
    if not exact or not (has_checksum or _sha256(view).hex() == manifest.chunks[index].raw_sha256):
        raise RunFailed("image-damaged", f"Chunk {index} does not decode to what its manifest names.", chunk=index)


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


@functools.lru_cache(maxsize=64)
def _zeros_sha256(length: int) -> str:
    return hashlib.sha256(bytes(length)).hexdigest()
