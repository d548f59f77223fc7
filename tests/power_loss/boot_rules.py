"""What firmware makes of a disk: the rules of GPT, MBR, El Torito and FAT, as OVMF 2022.11 was seen to apply them.

Pure: bytes in, verdict out; nothing of the product. Sources: UEFI 2.10, 5.2 (MBR), 5.3 (GPT), 13.3.1 (FAT), 13.3.2 (El Torito). Measured with
`firmware.boot`, each one a case of test_boot_rules.py that is asked of OVMF too:

- A GPT counts only behind a protective MBR, of which only the record is looked at, not the 55 AA. Without a sound primary the backup in
  the last sector is taken, and the primary written anew.
- An MBR counts only with 55 AA. A legacy BIOS runs whatever sector 0 has 55 AA: a way in of its own here, which OVMF is not asked about.
- El Torito is looked for on every disk whose sectors divide 2048 bytes, LBA 0 or not.

Not here: UDF, and what firmware of others may do (an entry of its own for a disk without a table).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

SAYS = "REPAVE-STARTED:".encode("utf-16-le")
_CD_BLOCK = 2048


class Disk(Protocol):
    """What is read by: a file, or a disk as a power loss left it."""

    sector_bytes: int
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class Verdict:
    """`taken`: each way in by which firmware finds something on this disk. `loader`: it would be started. `says`: its line, "" where it is torn."""

    taken: tuple[str, ...]
    loader: bool = False
    says: str = ""

    @property
    def boots(self) -> bool:
        """Said of the whole family: a table that is taken counts as booting, whether or not a loader is found behind it."""
        return bool(self.taken)


def judge(disk: Disk, *, needs_mbr: bool = True) -> Verdict:
    """`needs_mbr` False: as a firmware would that takes a GPT without a protective MBR. None was seen to; the standard asks for one."""
    taken, loader, says = [], False, ""
    first = disk.read(0, 512)
    if first[510:] == b"\x55\xaa":
        taken.append("boot-code")
    for name, partitions in (("gpt", _gpt(disk, first, needs_mbr)), ("el-torito", _el_torito(disk)), ("mbr", _mbr(disk, first))):
        if partitions is None:
            continue
        way, spans = partitions
        taken.append(way or name)
        for start, length in spans:
            found = find_loader(disk, start, length)
            if found is not None and found[:2] == b"MZ":
                loader, says = True, _line(found)
                break
        break  # as PartitionDxe: the first kind that fits is the only one
    return Verdict(tuple(taken), loader, says)


_Spans = list[tuple[int, int]]  # (byte offset, bytes)


def _gpt(disk: Disk, first: bytes, needs_mbr: bool) -> tuple[str, _Spans] | None:
    records = (first[at : at + 16] for at in range(446, 510, 16))
    if needs_mbr and not any(r[4] == 0xEE and r[8:12] == b"\1\0\0\0" for r in records):
        return None
    for way, lba in (("gpt-primary", 1), ("gpt-backup", disk.size_bytes // disk.sector_bytes - 1)):
        spans = _read_gpt(disk, lba)
        if spans is not None:
            return way, spans
    return None


def _read_gpt(disk: Disk, lba: int) -> _Spans | None:
    sector = disk.sector_bytes
    raw = disk.read(lba * sector, sector)
    if raw[:8] != b"EFI PART":
        return None
    size, crc = struct.unpack_from("<II", raw, 12)
    my_lba, _, first_usable, last_usable = struct.unpack_from("<QQQQ", raw, 24)
    entries_lba, count, entry_bytes, entries_crc = struct.unpack_from("<QIII", raw, 72)
    if not 92 <= size <= sector or zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != crc or my_lba != lba:
        return None
    at, length = entries_lba * sector, count * entry_bytes
    if entry_bytes < 128 or not 0 < length <= 1 << 24 or at + length > disk.size_bytes:
        return None
    entries = disk.read(at, length)
    if zlib.crc32(entries) != entries_crc:
        return None
    spans = []
    for n in range(0, length, entry_bytes):
        start, end = struct.unpack_from("<QQ", entries, n + 32)
        if any(entries[n : n + 16]) and first_usable <= start <= end <= last_usable:
            spans.append((start * sector, (end - start + 1) * sector))
    return spans


def _mbr(disk: Disk, first: bytes) -> tuple[str, _Spans] | None:
    if first[510:] != b"\x55\xaa":
        return None
    sector, spans = disk.sector_bytes, []
    for at in range(446, 510, 16):
        start, count = struct.unpack_from("<II", first, at + 8)
        if first[at + 4] not in (0, 0xEE) and count and (start + count) * sector <= disk.size_bytes:
            spans.append((start * sector, count * sector))
    return ("mbr", spans) if spans else None


def _el_torito(disk: Disk) -> tuple[str, _Spans] | None:
    if disk.sector_bytes > _CD_BLOCK:
        return None
    for block in range(16, 32):
        raw = disk.read(block * _CD_BLOCK, _CD_BLOCK)
        if raw[1:6] != b"CD001" or raw[0] == 0xFF:
            return None
        if raw[0] == 0 and raw[7:30] == b"EL TORITO SPECIFICATION":
            catalog = disk.read(struct.unpack_from("<I", raw, 71)[0] * _CD_BLOCK, _CD_BLOCK)
            spans = [
                (struct.unpack_from("<I", catalog, at + 8)[0] * _CD_BLOCK, 0)
                for at in range(32, _CD_BLOCK, 32)
                if catalog[at] == 0x88
            ]  # fmt: skip
            if catalog[0] != 1 or catalog[30:32] != b"\x55\xaa" or not spans:
                return None
            return "el-torito", [(start, disk.size_bytes - start) for start, _ in spans if start < disk.size_bytes]
    return None


def find_loader(disk: Disk, start: int, length: int) -> bytes | None:
    """The removable path's file on the FAT file system at `start`; None where there is none."""
    try:
        fat = _Fat(disk, start, length)
        entry = fat.find(fat.root(), b"EFI        ")
        entry = entry and fat.find(fat.chain(entry[0]), b"BOOT       ")
        entry = entry and fat.find(fat.chain(entry[0]), b"BOOTX64 EFI")
        return entry and b"".join(fat.chain(entry[0]))[: entry[1]]
    except (_NoFat, struct.error):
        return None


class _NoFat(Exception):
    pass


class _Fat:
    """Source: Microsoft's FAT specification, 1.03."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        bpb = disk.read(start, 512)
        self._sector, self._per_cluster, reserved, tables, self._root_entries, total, _, table_sectors = struct.unpack_from("<HBHBHHBH", bpb, 11)
        total = total or struct.unpack_from("<I", bpb, 32)[0]
        is_32 = table_sectors == 0
        table_sectors = table_sectors or struct.unpack_from("<I", bpb, 36)[0]
        sane = self._sector in (512, 1024, 2048, 4096) and self._per_cluster and not self._per_cluster & (self._per_cluster - 1)
        if not (sane and reserved and tables and table_sectors and total) or bpb[0] not in (0xE9, 0xEB) or total * self._sector > length:
            raise _NoFat
        self._disk, self._start = disk, start
        self._table = disk.read(start + reserved * self._sector, min(table_sectors * self._sector, 1 << 22))
        self._root_at = (reserved + tables * table_sectors) * self._sector
        self._data_at = self._root_at + -(-self._root_entries * 32 // self._sector) * self._sector
        self._clusters = (total * self._sector - self._data_at) // (self._per_cluster * self._sector)
        self._bits = 32 if is_32 else 12 if self._clusters < 4085 else 16
        self._root_cluster = struct.unpack_from("<I", bpb, 44)[0] if is_32 else 0

    def root(self) -> Iterator[bytes]:
        if self._bits == 32:
            return self.chain(self._root_cluster)
        return iter([self._disk.read(self._start + self._root_at, self._root_entries * 32)])

    def chain(self, cluster: int) -> Iterator[bytes]:
        """The clusters' bytes. A chain that leaves the file system or never ends is no chain."""
        size = self._per_cluster * self._sector
        for _ in range(self._clusters + 1):
            if not 2 <= cluster < self._clusters + 2:
                return
            yield self._disk.read(self._start + self._data_at + (cluster - 2) * size, size)
            cluster = self._next(cluster)
        raise _NoFat

    def _next(self, cluster: int) -> int:
        if self._bits == 12:
            pair = int(struct.unpack_from("<H", self._table, cluster * 3 // 2)[0])
            return pair >> 4 if cluster & 1 else pair & 0xFFF
        if self._bits == 16:
            return int(struct.unpack_from("<H", self._table, cluster * 2)[0])
        return int(struct.unpack_from("<I", self._table, cluster * 4)[0]) & 0x0FFFFFFF

    def find(self, blocks: Iterator[bytes], name: bytes) -> tuple[int, int] | None:
        """(first cluster, bytes) of the entry."""
        for block in blocks:
            for at in range(0, len(block), 32):
                if block[at] == 0:
                    return None
                if block[at : at + 11] == name and block[at + 11] & 0x08 == 0:
                    low, size = struct.unpack_from("<HI", block, at + 26)
                    return (struct.unpack_from("<H", block, at + 20)[0] << 16 if self._bits == 32 else 0) | low, size
        return None


def _line(loader: bytes) -> str:
    """What our loader prints. "" where it would not get that far: its code or its line is not what render_loader made."""
    at = loader.find(SAYS)
    if at < 0 or loader[0x200:0x204] != bytes.fromhex("4883ec38"):
        return ""
    return loader[at + len(SAYS) :].decode("utf-16-le", "replace").split("\r")[0]
