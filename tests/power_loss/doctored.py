"""Disks made by hand around each boot rule: what the model says of them, OVMF must do.

`says` is the expected word and not the model's, so that each case tests the model by itself as well (test_boot_rules.py).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boot_rules import Verdict, judge
from bootable_disks import MIB, Layout, write_os
from recordings import make_old_disk


class DiskFile:
    """A disk in memory, for the model."""

    def __init__(self, path: Path, sector_bytes: int) -> None:
        self.sector_bytes, self._data = sector_bytes, path.read_bytes()
        self.size_bytes = len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


@dataclass(frozen=True)
class Case:
    way: str  # by which firmware takes it; "" = not
    says: str  # "" = no loader is started
    change: Callable[[bytearray, int], None] = lambda disk, sector: None
    kind: str = "esp-behind"
    sector_bytes: int = 512


def _zero(*spans: tuple[int, int]) -> Callable[[bytearray, int], None]:
    """Spans in sectors; negative ones count from the end."""

    def change(disk: bytearray, sector: int) -> None:
        for at, count in spans:
            start = at * sector if at >= 0 else len(disk) + at * sector
            disk[start : start + count * sector] = bytes(count * sector)

    return change


def _set(at: int, data: bytes) -> Callable[[bytearray, int], None]:
    def change(disk: bytearray, sector: int) -> None:
        start = at if at >= 0 else len(disk) + at
        disk[start : start + len(data)] = data

    return change


def _both(*changes: Callable[[bytearray, int], None]) -> Callable[[bytearray, int], None]:
    def change(disk: bytearray, sector: int) -> None:
        for one in changes:
            one(disk, sector)

    return change


def _header(field: int, value: bytes) -> Callable[[bytearray, int], None]:
    """The primary header with another value and a right checksum; the backup is gone."""

    def change(disk: bytearray, sector: int) -> None:
        disk[sector + field : sector + field + len(value)] = value
        disk[sector + 16 : sector + 20] = bytes(4)
        disk[sector + 16 : sector + 20] = struct.pack("<I", zlib.crc32(disk[sector : sector + 92]))
        disk[-sector:] = bytes(sector)

    return change


def _esp(change: Callable[[bytearray], None]) -> Callable[[bytearray, int], None]:
    def on_disk(disk: bytearray, sector: int) -> None:
        at = 30 * MIB
        esp = disk[at : at + 8 * MIB]
        change(esp)
        disk[at : at + 8 * MIB] = esp

    return on_disk


def _no_name(esp: bytearray) -> None:
    at = esp.index(b"BOOTX64 EFI")
    esp[at : at + 4] = b"FOOT"


def _no_code(esp: bytearray) -> None:
    at = esp.index(b"MZ\0\0")
    esp[at : at + 512] = bytes(512)


DOCTORED = {
    "a whole disk": Case("gpt-primary", "old-1"),
    "LBA 0 is zero": Case("", "", _zero((0, 1))),
    "LBA 0 is zero, 4096": Case("", "", _zero((0, 1)), sector_bytes=4096),
    "the backup alone": Case("gpt-backup", "old-1", _zero((1, 33))),
    "the backup alone, 4096": Case("gpt-backup", "old-1", _zero((1, 5)), sector_bytes=4096),
    "the primary alone": Case("gpt-primary", "old-1", _zero((-33, 33))),
    "no table but the protective MBR": Case("", "", _zero((1, 33), (-33, 33))),
    "the protective MBR without 55 AA": Case("gpt-primary", "old-1", _set(510, b"\0\0")),
    "the backup alone, without 55 AA": Case("gpt-backup", "old-1", _both(_set(510, b"\0\0"), _zero((1, 33)))),
    "the protective record is of another type": Case("mbr", "", _both(_set(450, b"\x83"), _zero((1, 33), (-33, 33)))),
    "the primary's entries are torn": Case("gpt-backup", "old-1", _zero((2, 1))),
    "the backup's entries are torn, no primary": Case("", "", _zero((1, 33), (-33, 1))),
    "the primary's checksum is wrong, no backup": Case("", "", _both(_set(512 + 17, b"\x55"), _zero((-1, 1)))),
    "the primary says another place of itself": Case("", "", _header(24, struct.pack("<Q", 2))),
    "the usable sectors leave the ESP out": Case("gpt-primary", "", _header(48, struct.pack("<Q", 4096))),
    "an MBR": Case("mbr", "old-1", kind="mbr"),
    "an MBR without 55 AA": Case("", "", _set(510, b"\0\0"), kind="mbr"),
    "an MBR, 4096": Case("mbr", "old-1", kind="mbr", sector_bytes=4096),
    "a CD image": Case("el-torito", "old-1", kind="cd"),
    "a CD image without its first sector": Case("el-torito", "old-1", _zero((0, 1)), kind="cd"),
    "a CD image without its descriptor": Case("", "", _zero((64, 1)), kind="cd"),
    "a CD image without its boot record": Case("", "", _zero((68, 1)), kind="cd"),
    "no such file on the ESP": Case("gpt-primary", "", _esp(_no_name)),
    "the loader has no head": Case("gpt-primary", "", _esp(_no_code)),
}  # fmt: skip


def make_doctored(name: str, folder: Path) -> tuple[Path, int, Verdict]:
    """The disk, its sector size, the model's verdict."""
    case, path = DOCTORED[name], folder / "doctored"
    if case.kind == "esp-behind":
        write_os(path, Layout(40, esp_at=30), name="old-1", sector_bytes=case.sector_bytes, seed=1)
    else:
        before, _ = make_old_disk(folder, case.kind, case.sector_bytes, 1)
        before.rename(path)
    disk = bytearray(path.read_bytes())
    case.change(disk, case.sector_bytes)
    path.write_bytes(disk)
    return path, case.sector_bytes, judge(DiskFile(path, case.sector_bytes))
