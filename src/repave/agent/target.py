"""The disk that is written: O_DIRECT where it can be, zeros made by the device, nothing read from a cache, bytes counted.

Counted here and not from /sys/block: the kernel counts zeros that it makes as sectors written. Stdlib only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from repave.errors import RunFailed

# linux/falloc.h, linux/fs.h
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
_BLKZEROOUT = 0x127F
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ENODEV}
_ZEROS = mmap.mmap(-1, 1024 * 1024)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class TargetDisk:
    """One disk or disk file, open for writing but for the bytes in `keep` (first, end); safe to use from several threads.

    Raises: RunFailed: disk-changed where it can not be opened alone or has another size or sector size; disk-write; read-back.
    """

    def __init__(self, path: Path, *, sector_bytes: int, size_bytes: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        self.sector_bytes, self.size_bytes = sector_bytes, size_bytes
        self.bytes_written = 0
        self.bytes_zeroed = 0
        self._keep = tuple(keep)
        self._lock = threading.Lock()
        self._direct: int | None = None
        try:
            # O_EXCL on a block device: EBUSY while anything has it mounted or in use.
            self._is_block = stat.S_ISBLK(os.stat(path).st_mode)
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if self._is_block else 0))
        except OSError as e:
            raise RunFailed("disk-changed", f"It can not be opened for writing: {e.strerror}.") from e
        try:
            self._verify_geometry()
            self._direct = _open_direct(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        # Punch first: on a block device it is zeros for certain or EOPNOTSUPP, while one BLKZEROOUT that the device can not do
        # switches WRITE ZEROES off for all that follow (measured).
        self._zero_by: dict[str, Callable[[int, int], None]] = {"punch": self._punch, "zero-out": self._blkzeroout, "written": self._write_zeros}

    def __enter__(self) -> TargetDisk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._fd)

    def write(self, offset: int, data: memoryview) -> None:
        self._refuse_kept(offset, len(data))
        self._each("disk-write", offset, lambda: self._pwrite(offset, data))
        with self._lock:
            self.bytes_written += len(data)

    def write_zeros(self, offset: int, length: int) -> None:
        """Zeros by writing them: for the tables, where nothing is left to what a device says of itself."""
        self._refuse_kept(offset, length)
        self._each("disk-write", offset, lambda: self._write_zeros(offset, length))
        with self._lock:
            self.bytes_written += length

    def make_zero(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards, by the cheapest way that this device has."""
        self._refuse_kept(offset, length)
        for name, way in tuple(self._zero_by.items()):
            try:
                way(offset, length)
                break
            except OSError as e:
                if e.errno not in _CANNOT or name == "written":
                    raise _failed("disk-write", offset, e) from e
                self._zero_by.pop(name, None)
        with self._lock:
            self.bytes_zeroed += length

    @property
    def zeroed_by(self) -> str:
        """`punch` (a hole: zeros for certain), `zero-out` (BLKZEROOUT) or `written`: what the device could."""
        return next(iter(self._zero_by))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` from the disk, past the cache where O_DIRECT is to be had; else call `drop_cache` before."""
        self._each("read-back", offset, lambda: self._preadv(offset, view))

    def flush(self) -> None:
        self._each("disk-write", 0, lambda: os.fsync(self._fd))

    def drop_cache(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _refuse_kept(self, offset: int, length: int) -> None:
        """The writer goes around what is kept; should it ever not, this is where it ends."""
        if any(offset < end and start < offset + length for start, end in self._keep):
            raise RunFailed("agent-failed", f"A write of {length} bytes at byte {offset} would hit a partition that is to be kept.")

    def _verify_geometry(self) -> None:
        size = os.lseek(self._fd, 0, os.SEEK_END)
        sector = self.sector_bytes
        if self._is_block:
            sector = struct.unpack("i", fcntl.ioctl(self._fd, BLKSSZGET, bytes(4)))[0]
        if (size, sector) != (self.size_bytes, self.sector_bytes):
            raise RunFailed(
                "disk-changed",
                f"It has {size} bytes in sectors of {sector}, not {self.size_bytes} in sectors of {self.sector_bytes}.",
            )

    def _each(self, slug: str, offset: int, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as e:
            raise _failed(slug, offset, e) from e

    def _pwrite(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._direct_or_not(lambda fd, at=done: os.pwrite(fd, data[at:], offset + at))  # type: ignore[misc]

    def _preadv(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = self._direct_or_not(lambda fd, at=done: os.preadv(fd, [view[at:]], offset + at))  # type: ignore[misc]
            if not got:
                raise OSError(errno.EIO, "the disk ends early")
            done += got

    def _direct_or_not(self, call: Callable[[int], int]) -> int:
        """O_DIRECT; where the kernel refuses it for this range (a file system with larger blocks), the cache and the flush that follows."""
        if self._direct is not None:
            try:
                return call(self._direct)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
        return call(self._fd)

    def _punch(self, offset: int, length: int) -> None:
        if _libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, offset, length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def _blkzeroout(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))

    def _write_zeros(self, offset: int, length: int) -> None:
        for at in range(0, length, len(_ZEROS)):
            self._pwrite(offset + at, memoryview(_ZEROS)[: min(len(_ZEROS), length - at)])


def aligned(data: bytes) -> memoryview:
    """A copy that begins on a page, as O_DIRECT wants it."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return memoryview(buffer)


def _open_direct(fd: int) -> int | None:
    """A second descriptor of the same open disk, with O_DIRECT; None where its file system has none (tmpfs)."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def _failed(slug: str, offset: int, error: OSError) -> RunFailed:
    return RunFailed(slug, f"{error.strerror} at byte {offset}.", errno=error.errno)
