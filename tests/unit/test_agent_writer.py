"""The writer on disk files. The far end that is faked: the server's chunks (`fetch`), the run (`keep_writing`) and the kernel's disk calls."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import math
import mmap
import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from disk_images import MIB, fdisk, make_disk, old_disk

from repave.agent import target, writer
from repave.agent.gpt import Partition
from repave.agent.writer import WriteResult, write_image
from repave.errors import ImageError, RunFailed
from repave.images.importer import import_image
from repave.images.manifest import WINDOW_BYTES, Manifest
from repave.images.store import ImageStore

IMAGE_BYTES = 40 * MIB
DISK_BYTES = 64 * MIB
CONFIG = b"the config drive " * 9000
STAGES = ["clear", "write", "config-drive", "read-back", "boot-entry", "seal"]


@dataclass
class Case:
    image: bytes
    store: ImageStore
    manifest: Manifest
    disk: Path

    def fetch(self, sha256: str) -> bytes:
        return self.store.chunk_path(sha256).read_bytes()

    def write(self, **changes: Any) -> WriteResult:
        wanted: dict[str, Any] = {
            "fetch": self.fetch, "config_drive": CONFIG, "sector_bytes": self.manifest.sector_bytes, "disk_bytes": self.disk.stat().st_size,
            "keep_writing": lambda: True, "progress": lambda stage, done, total: None, "partition_guid": uuid.uuid4().bytes_le,
        }  # fmt: skip
        return write_image(self.disk, self.manifest, **(wanted | changes))

    def first_sector_is_zero(self) -> bool:
        with self.disk.open("rb") as f:
            return not any(f.read(self.manifest.sector_bytes))


def make_case(folder: Path, image: Path, disk_bytes: int = DISK_BYTES) -> Case:
    store = ImageStore(folder / "store")
    imported = import_image(image, store, max_bytes=1 << 30)
    return Case(image.read_bytes(), store, store.read_manifest(imported.manifest_sha256), old_disk(folder / "disk", disk_bytes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("made")
    return make_case(folder, make_disk(folder / "image", IMAGE_BYTES, seed=7))


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Iterator[Case]:
    """The same image for all, an old disk for each test."""
    disk = tmp_path / "disk"
    shutil.copyfile(made.disk, disk)
    yield dataclasses.replace(made, disk=disk)
    disk.unlink()


def assert_holds_the_image(case: Case, old: bytes) -> None:
    """The image, zeros in its gaps too; behind it the old bytes (not ours to touch), the config drive, our backup table, nothing of the old one."""
    disk = case.disk.read_bytes()
    config_at = disk.rindex(CONFIG)
    assert config_at % MIB == 0
    body_end = min(len(case.image), config_at)
    assert disk[MIB:body_end] == case.image[MIB:body_end]
    assert disk[body_end : min(config_at, DISK_BYTES - MIB)] == old[body_end : min(config_at, DISK_BYTES - MIB)]
    sector = case.manifest.sector_bytes
    assert not any(disk[config_at + len(CONFIG) : len(disk) - (1 + 128 * 128 // sector) * sector])
    assert disk[:446] == case.image[:446] and disk[sector : sector + 8] == b"EFI PART"
    assert "No errors detected" in fdisk(case.disk, sector, "v", "q")


def test_a_disk_full_of_old_data_becomes_the_image(case: Case) -> None:
    old = case.disk.read_bytes()
    seen: list[str] = []
    tables: list[tuple[Partition, ...]] = []
    result = case.write(progress=lambda stage, done, total: seen.append(stage), boot_entry=tables.append)
    assert_holds_the_image(case, old)
    assert [p.name for p in tables[0]] == ["", "", "config-2"]
    assert list(result.stages_s) == STAGES
    assert list(dict.fromkeys(seen)) == [s for s in STAGES if s != "boot-entry"]
    assert result.bytes_fetched == sum(c.compressed_bytes for c in case.manifest.chunks if c.extents), "zeros are not fetched, nothing twice"
    assert result.bytes_zeroed + case.manifest.data_bytes >= IMAGE_BYTES - MIB
    assert "No problems found" in subprocess.run(["sgdisk", "-v", case.disk], capture_output=True, text=True).stdout


def test_a_disk_of_4096_byte_sectors_becomes_the_image(tmp_path: Path) -> None:
    case = make_case(tmp_path, make_disk(tmp_path / "image", IMAGE_BYTES, sector_bytes=4096, seed=3))
    assert case.manifest.sector_bytes == 4096
    old = case.disk.read_bytes()
    case.write()
    assert_holds_the_image(case, old)


def test_a_disk_as_large_as_the_image_takes_it_where_its_partitions_end_early(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "image", IMAGE_BYTES, seed=5)
    subprocess.run(["sfdisk", "-q", image], input=b"label: gpt\nstart=1MiB, size=8MiB, type=uefi\nsize=25MiB\n", check=True)
    case = make_case(tmp_path, image, IMAGE_BYTES)
    case.write()
    assert_holds_the_image(case, b"")


def test_the_chunk_files_one_after_the_other_are_the_disk(case: Case, tmp_path: Path) -> None:
    with subprocess.Popen(["zstd", "-dcq"], stdin=subprocess.PIPE, stdout=(tmp_path / "out").open("wb")) as zstd:
        assert zstd.stdin
        for chunk in case.manifest.chunks:
            zstd.stdin.write(case.fetch(chunk.sha256))
    assert zstd.returncode == 0
    assert (tmp_path / "out").read_bytes() == case.image


# A half-written disk can never boot.


def test_lba_0_is_the_last_write_alone_behind_a_flush_and_zero_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of what the kernel was asked, in order: a write log, as a disk would see it."""
    log: list[tuple[str, int, bytes]] = []
    pwrite, fsync, preadv = os.pwrite, os.fsync, os.preadv

    def logged_pwrite(fd: int, data: Any, offset: int) -> int:
        done = pwrite(fd, data, offset)
        log.append(("write", offset, bytes(data[:done])))
        return done

    def logged_fsync(fd: int) -> None:
        fsync(fd)
        log.append(("flush", 0, b""))

    def logged_preadv(fd: int, buffers: Any, offset: int) -> int:
        log.append(("read", offset, b""))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "pwrite", logged_pwrite)
    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "preadv", logged_preadv)
    case.write()
    monkeypatch.undo()

    writes = [n for n, (kind, _, _) in enumerate(log) if kind == "write"]
    *earlier, last = writes
    assert log[last][1] == 0 and len(log[last][2]) == 512 and any(log[last][2])
    assert {kind for kind, _, _ in log[earlier[-1] + 1 : last]} >= {"flush"}, "all else is on the disk before LBA 0"
    assert log[last + 1][0] == "flush"
    assert not any(any(data[: MIB - at]) for n in earlier[:-1] for _, at, data in [log[n]] if at < MIB), "the first MiB is zero until LBA 1 onward"
    # What firmware finds the old OS by goes first, LBA 0 alone; all else of it is whole until that is flushed. Then what may hold data of its
    # partitions too; and all that before a byte of the image is there.
    flush, end = ("flush", 0, 0), DISK_BYTES
    cleared = [(kind, at, len(data)) for kind, at, data in log[:9]]
    assert cleared[:2] == [("write", 0, 512), flush]
    assert cleared[2:6] == [("write", 512, 33 * 512), ("write", 32768, 512), ("write", end - 33 * 512, 33 * 512), flush]
    assert cleared[6:] == [("write", 0, MIB), ("write", end - MIB, MIB), flush]
    assert not any(any(log[n][2]) for n in writes[:6])
    # The new backup table comes when the data that it leads to are on the disk.
    backup = next(n for n in writes if log[n][1] == end - 33 * 512 and any(log[n][2]))
    assert log[backup - 1][0] == "flush" and log[backup + 1][0] == "flush"
    # Everything that is read back was flushed, and comes before LBA 1 onward.
    first_read = next(n for n, (kind, _, _) in enumerate(log) if kind == "read")
    assert log[first_read - 1][0] == "flush" and all(n < first_read for n in earlier[:-1])


def write_and_die(case: Case, die: Callable[[str, int, int], None]) -> None:
    """In a process of its own, which `die`, told of the progress, kills."""
    child = os.fork()
    if child == 0:
        try:
            case.write(progress=die)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the stage was never reached"


KILLS = {"clear": (0, 1), "write": (0, 2, 6), "config-drive": (0, 1), "read-back": (0, 5), "seal": (0, 1)}


@pytest.mark.parametrize(("stage", "count"), [(stage, n) for stage, counts in KILLS.items() for n in counts])
def test_killed_at_any_stage_the_disk_can_not_boot_and_the_next_write_repairs_it(case: Case, stage: str, count: int) -> None:
    old = case.disk.read_bytes()
    calls = {"n": 0}

    def die(name: str, done: int, total: int) -> None:
        if name == stage:
            if calls["n"] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            calls["n"] += 1

    write_and_die(case, die)
    if (stage, count) != ("clear", 0):
        assert case.first_sector_is_zero()
        if stage in ("clear", "write") and (stage, count) != ("clear", 1):
            assert not any(case.disk.read_bytes()[-MIB:]), "no backup table to boot from while the data are not whole"
    case.write()
    assert_holds_the_image(case, old)


# What the disk holds already is kept, as far as its digests say so.


def test_a_write_that_was_killed_half_way_goes_on_with_what_is_on_the_disk(case: Case) -> None:
    old = case.disk.read_bytes()
    whole = sum(c.compressed_bytes for c in case.manifest.chunks if c.extents)

    def die(stage: str, done: int, total: int) -> None:
        if stage == "write" and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    write_and_die(case, die)
    result = case.write(resume=True)
    assert_holds_the_image(case, old)
    assert list(result.stages_s) == ["compare", *(s for s in STAGES if s != "boot-entry")]
    assert 0 < result.bytes_fetched < whole and 0 < result.bytes_kept < case.manifest.data_bytes


def test_without_a_config_drive_the_disk_becomes_the_image_bit_for_bit_and_a_second_time_nothing_is_fetched_or_written(case: Case) -> None:
    old = case.disk.read_bytes()
    case.write(config_drive=None)
    assert case.disk.read_bytes() == case.image + old[IMAGE_BYTES:-MIB] + bytes(MIB)
    again = case.write(config_drive=None, resume=True)
    assert (again.bytes_fetched, again.bytes_written, again.bytes_zeroed) == (0, 0, 0) and again.bytes_kept == case.manifest.data_bytes


def test_a_byte_that_changed_in_the_data_and_one_in_a_gap_cost_one_chunk_each_and_are_right_again(case: Case) -> None:
    case.write(config_drive=None)
    done = case.disk.read_bytes()
    data, gap = next(i for i, c in enumerate(case.manifest.chunks) if i and c.extents), next(i for i, c in enumerate(case.manifest.chunks) if not c.extents)
    with case.disk.open("r+b") as f:
        for at in (case.manifest.window(data)[0] + case.manifest.chunks[data].extents[0][0], case.manifest.window(gap)[0] + 5000):
            f.seek(at)
            byte = f.read(1)
            f.seek(at)
            f.write(bytes([byte[0] ^ 1]))
    result = case.write(config_drive=None, resume=True)
    assert case.disk.read_bytes() == done
    assert result.bytes_fetched == case.manifest.chunks[data].compressed_bytes


def test_zeros_that_are_made_again_leave_the_kept_data_between_them(tmp_path: Path) -> None:
    """What lies between two runs of zeros is not theirs."""
    image = tmp_path / "image"
    make_disk(image, IMAGE_BYTES, seed=11)
    with image.open("r+b") as f:
        for window, data in ((4, bytes(WINDOW_BYTES)), (5, b"kept" * (WINDOW_BYTES // 4)), (6, bytes(WINDOW_BYTES))):
            f.seek(window * WINDOW_BYTES)
            f.write(data)
    case = make_case(tmp_path, image)
    assert [bool(c.extents) for c in case.manifest.chunks[4:7]] == [False, True, False]
    case.write(config_drive=None)
    with case.disk.open("r+b") as f:
        for window in (4, 6):
            f.seek(window * WINDOW_BYTES + 4096)
            f.write(b"old")
    result = case.write(config_drive=None, resume=True)
    assert case.disk.read_bytes()[:IMAGE_BYTES] == image.read_bytes()
    assert result.bytes_fetched <= case.manifest.chunks[0].compressed_bytes and result.bytes_zeroed >= 2 * WINDOW_BYTES


def test_a_worker_that_can_not_begin_ends_the_write(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mmap.mmap

    def no_memory(fd: int, length: int, *args: Any, **more: Any) -> mmap.mmap:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fd, length, *args, **more)

    monkeypatch.setattr("repave.agent.writer.mmap.mmap", no_memory)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        case.write()
    assert case.first_sector_is_zero()


@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_is_another_one_now_gets_no_first_byte_and_no_last_sector(case: Case, call: int) -> None:
    old, asked = case.disk.read_bytes(), []

    def verify_identity() -> None:
        asked.append(True)
        if len(asked) == call:
            raise RunFailed("disk-changed", "It is gone.")

    with pytest.raises(RunFailed, match="It is gone"):
        case.write(verify_identity=verify_identity)
    assert case.disk.read_bytes() == old if call == 1 else case.first_sector_is_zero()


def test_a_run_that_is_over_stops_at_the_next_chunk(case: Case) -> None:
    def asks_until(allowed: float) -> tuple[int, str]:
        asked = 0

        def keep_writing() -> bool:
            nonlocal asked
            asked += 1
            return asked <= allowed

        try:
            case.write(keep_writing=keep_writing)
        except RunFailed as failed:
            return asked, failed.slug
        return asked, "done"

    total, end = asks_until(math.inf)
    assert end == "done"
    for allowed in range(1, total, 3):
        asked, end = asks_until(allowed)
        assert end == "stale-run" and case.first_sector_is_zero()
        assert asked <= allowed + 4, "each worker asks once more and stops"


# Nothing is written that is not what the manifest names.


def test_a_chunk_that_came_wrong_once_is_fetched_again(case: Case) -> None:
    old = case.disk.read_bytes()
    asked: dict[str, int] = {}

    def fetch(sha256: str) -> bytes:
        asked[sha256] = asked.get(sha256, 0) + 1
        data = case.fetch(sha256)
        return data if asked[sha256] > 1 else data[:-1] + bytes([data[-1] ^ 1])

    case.write(fetch=fetch)
    assert set(asked.values()) == {2}
    assert_holds_the_image(case, old)


def test_what_is_asked_ahead_is_what_the_same_thread_fetches_next(case: Case) -> None:
    asked = threading.local()
    asks: list[str] = []
    hits: list[bool] = []

    def fetch(sha256: str) -> bytes:
        if ahead := getattr(asked, "ahead", ""):
            hits.append(ahead == sha256)
            asked.ahead = ""
        return case.fetch(sha256)

    def ask_ahead(sha256: str) -> None:
        asked.ahead = sha256
        asks.append(sha256)

    case.write(fetch=fetch, ask_ahead=ask_ahead)
    assert asks and all(hits) and len(hits) == len(asks), "nothing is asked for and left there"


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 0x40]) + data[101:]


def test_zeros_are_made_while_chunks_still_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to do when the last chunk has come nobody's link is used for."""
    monkeypatch.setattr(writer, "WORKERS", 1)
    case = make_case(tmp_path, make_disk(tmp_path / "image", 20 * WINDOW_BYTES, seed=9), 25 * WINDOW_BYTES)
    assert [i for i, c in enumerate(case.manifest.chunks) if c.extents] == [0, 1, 3, 5, 19]
    happened: list[str] = []
    make_zero = target.TargetDisk.make_zero

    def note_zeros(disk: target.TargetDisk, offset: int, length: int) -> None:
        if length >= WINDOW_BYTES:
            happened.append("zeros")
        make_zero(disk, offset, length)

    def fetch(sha256: str) -> bytes:
        happened.append("chunk")
        return case.fetch(sha256)

    monkeypatch.setattr(target.TargetDisk, "make_zero", note_zeros)
    old = case.disk.read_bytes()
    case.write(fetch=fetch)
    assert happened == ["chunk", "zeros", "chunk", "zeros", "chunk", "zeros", "chunk", "chunk"], "not where they are, before 3, 5 and 19"
    disk = case.disk.read_bytes()
    assert disk[MIB : len(case.image) - MIB] == case.image[MIB:-MIB] != old[MIB : len(case.image) - MIB]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_chunk_that_stays_wrong_ends_the_run_before_anything_of_it_is_written(case: Case, damage: Callable[[bytes], bytes]) -> None:
    index = 5
    chunk = case.manifest.chunks[index]
    assert chunk.extents
    old = case.disk.read_bytes()
    asked: list[str] = []

    def fetch(sha256: str) -> bytes:
        asked.append(sha256)
        return damage(case.fetch(sha256)) if sha256 == chunk.sha256 else case.fetch(sha256)

    with pytest.raises(RunFailed, match="Chunk 5") as failed:
        case.write(fetch=fetch)
    assert failed.value.slug == "image-damaged"
    assert asked.count(chunk.sha256) == 3
    offset, length = case.manifest.window(index)
    assert case.disk.read_bytes()[offset : offset + length] == old[offset : offset + length]
    assert case.first_sector_is_zero()


def test_a_chunk_file_that_rots_in_the_store_is_found(case: Case, tmp_path: Path) -> None:
    case.store = ImageStore(shutil.copytree(case.store.root, tmp_path / "store"))
    path = case.store.chunk_path(case.manifest.chunks[3].sha256)
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(ImageError, match="Chunk 3"):
        case.store.verify(case.manifest, deep=True)
    with pytest.raises(RunFailed, match="Chunk 3") as failed:
        case.write()
    assert failed.value.slug == "image-damaged" and case.first_sector_is_zero()


@pytest.mark.parametrize("raw", [b"\xff" * (4 * MIB - 1), b"\xff" * (4 * MIB + 1), b"\xff" * 4 * MIB, bytes(900 * MIB)], ids=["short", "long", "other", "bomb"])
def test_a_frame_that_is_not_its_window_is_refused_although_its_digest_is_right(case: Case, raw: bytes) -> None:
    refuses_frame(case, zstandard.compress(raw))


def test_a_frame_that_fails_its_own_checksum_is_refused_although_its_digest_is_right(case: Case) -> None:
    data = case.fetch(case.manifest.chunks[5].sha256)
    assert all(zstandard.get_frame_parameters(case.fetch(chunk.sha256)).has_checksum for chunk in case.manifest.chunks)
    refuses_frame(case, data[:-1] + bytes([data[-1] ^ 1]))


def refuses_frame(case: Case, data: bytes) -> None:
    """Chunk 5 is `data`, and the manifest says so."""
    bad = case.manifest.chunks[5]._replace(sha256=hashlib.sha256(data).hexdigest(), compressed_bytes=len(data))
    chunks = (*case.manifest.chunks[:5], bad, *case.manifest.chunks[6:])
    case.manifest = case.manifest._replace(chunks=chunks)
    with pytest.raises(RunFailed, match="Chunk 5 does not decode") as failed:
        case.write(fetch=lambda sha256: data if sha256 == bad.sha256 else case.fetch(sha256))
    assert failed.value.slug == "image-damaged" and case.first_sector_is_zero()


# The disk at fault.


def test_a_disk_that_reports_an_error_ends_the_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def broken(fd: int, data: Any, offset: int) -> int:
        if offset >= 21 * MIB:
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(RunFailed, match="at byte") as failed:
        case.write()
    assert failed.value.slug == "disk-write" and case.first_sector_is_zero()


@pytest.mark.parametrize("lost", ["start of a chunk", "config drive", "backup table", "a gap", "lba 1 onward"])
def test_a_disk_that_loses_a_write_is_found_before_it_can_boot(case: Case, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    pwrite, at = os.pwrite, {"start of a chunk": 21 * MIB, "backup table": DISK_BYTES - 33 * 512, "lba 1 onward": 512}.get(lost)

    def forgetful(fd: int, data: Any, offset: int) -> int:
        gone = offset == at or (lost == "config drive" and bytes(data[:17]) == CONFIG[:17])
        return len(data) if gone else pwrite(fd, data, offset)

    def put_back(stage: str, done: int, total: int) -> None:
        if lost == "a gap" and (stage, done) == ("config-drive", 0):
            with case.disk.open("r+b") as f:
                f.seek(28 * MIB)
                f.write(b"old")

    monkeypatch.setattr(os, "pwrite", forgetful)
    with pytest.raises(RunFailed, match="not what was written") as failed:
        case.write(progress=put_back)
    assert failed.value.slug == "read-back" and case.first_sector_is_zero()


@pytest.mark.parametrize("read_back_all", [False, True])
def test_a_byte_that_went_wrong_in_the_middle_of_a_chunk_is_found_where_all_is_read_back(case: Case, read_back_all: bool) -> None:
    """The 5 % that a sample reads whole are the first chunk with data and each twentieth from there."""
    with_data = [i for i, c in enumerate(case.manifest.chunks) if i and c.extents and max(size for _, size in c.extents) >= MIB]
    index = with_data[-1]
    offset = case.manifest.window(index)[0] + max(case.manifest.chunks[index].extents, key=lambda e: e[1])[0] + MIB // 2 + 7

    def put_back(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("config-drive", 0):
            with case.disk.open("r+b") as f:
                f.seek(offset)
                f.write(b"old")

    if not read_back_all:
        case.write(progress=put_back)
        return
    with pytest.raises(RunFailed, match=f"chunk {index}, .* is not what was written"):
        case.write(progress=put_back, read_back_all=True)
    assert case.first_sector_is_zero()


def test_a_device_that_can_not_make_zeros_gets_them_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to punch; BLKZEROOUT is for block devices; so zeros are written."""

    def refuse(*args: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    old = case.disk.read_bytes()
    monkeypatch.setattr(target._libc, "fallocate", refuse)
    case.write()
    assert_holds_the_image(case, old)


def test_a_device_that_can_not_make_zeros_gets_them_from_all_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: of two workers in the same refused call, the second to hear of it found only the last way left, and failed for good."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 2 * MIB)
    both_asked, first_is_done, turns = threading.Barrier(2), threading.Event(), iter((0, 1))

    def refuse(*args: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    def refuse_both(*args: object) -> None:
        turn = next(turns)
        both_asked.wait(5)
        if turn == 1:
            first_is_done.wait(5)
        raise OSError(errno.ENOTTY, "refused")

    monkeypatch.setattr(target._libc, "fallocate", refuse)
    monkeypatch.setattr(fcntl, "ioctl", refuse_both)
    with target.TargetDisk(path, sector_bytes=512, size_bytes=2 * MIB) as disk, ThreadPoolExecutor(2) as pool:
        done = [pool.submit(disk.make_zero, n * MIB, MIB) for n in range(2)]
        next(as_completed(done)).result()
        first_is_done.set()
        for future in done:
            future.result()
    assert path.read_bytes() == bytes(2 * MIB)


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({"sector_bytes": 4096}, "sector-size"),
        ({"disk_bytes": DISK_BYTES + 512}, "disk-changed"),
        ({"config_drive": bytes(30 * MIB)}, "disk-too-small"),
        ({"fetch": lambda sha256: b"x"}, "image-damaged"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(case: Case, changes: dict[str, Any], slug: str) -> None:
    old = case.disk.read_bytes()
    with pytest.raises(RunFailed) as failed:
        case.write(**changes)
    assert failed.value.slug == slug
    assert case.disk.read_bytes() == old
