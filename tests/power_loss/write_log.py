"""What a disk was asked, in order: writes and flushes, as QEMU's blklogwrites and `record_on_host.py` write them down.

The format is dm-log-writes': a superblock, then entries of one log sector each with the data behind them. Source: Linux,
Documentation/admin-guide/device-mapper/log-writes.rst; QEMU, block/blklogwrites.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4
LOG_SECTOR = 512


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes


Epoch = list[Write]  # the writes between two flushes: any of their sectors may be lost, in any order, until the second one has returned


def read_epochs(log: Path) -> list[Epoch]:
    """The writes, cut at each flush. The last epoch is one that was flushed: what was not is an error here, as it would be in the writer."""
    epochs: list[Epoch] = [[]]
    for sector, data, flags in _entries(log):
        if flags & _DISCARD:
            raise ValueError("a discard: what it leaves behind is not known")
        if data:
            epochs[-1].append(Write(sector * LOG_SECTOR, data))
        if flags & (_FLUSH | _FUA) and epochs[-1]:
            epochs.append([])
    if epochs[-1]:
        raise ValueError("the last write was not flushed")
    return epochs[:-1]


def _entries(log: Path) -> Iterator[tuple[int, bytes, int]]:
    with log.open("rb") as f:
        magic, version, count, log_sector = _SUPER.unpack(f.read(_SUPER.size))
        if (magic, version, log_sector) != (_MAGIC, 1, LOG_SECTOR):
            raise ValueError("no write log with sectors of 512 bytes")
        for _ in range(count):
            f.seek(-f.tell() % LOG_SECTOR, 1)
            sector, sectors, flags, _ = _ENTRY.unpack(f.read(_ENTRY.size))
            f.seek(-f.tell() % LOG_SECTOR, 1)
            yield sector, b"" if flags & _DISCARD else f.read(sectors * LOG_SECTOR), flags


class LogWriter:
    """The same format, for the recorder on the host."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._count = out, 0
        out.write(bytes(LOG_SECTOR))

    def write(self, offset: int, data: bytes) -> None:
        if offset % LOG_SECTOR or len(data) % LOG_SECTOR:
            raise ValueError(f"a write of {len(data)} bytes at {offset}: no whole sectors")
        self._add(offset // LOG_SECTOR, data, 0)

    def flush(self) -> None:
        self._add(0, b"", _FLUSH)

    def close(self) -> None:
        self._out.seek(0)
        self._out.write(_SUPER.pack(_MAGIC, 1, self._count, LOG_SECTOR))
        self._out.close()

    def _add(self, sector: int, data: bytes, flags: int) -> None:
        self._out.write(_ENTRY.pack(sector, len(data) // LOG_SECTOR, flags, 0).ljust(LOG_SECTOR, b"\0") + data)
        self._count += 1
