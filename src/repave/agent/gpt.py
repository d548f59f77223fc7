"""The partition tables of an image, refitted to the disk it is written to. Stdlib only, no I/O.

An image ends where its maker stopped; a disk is larger. So the backup table moves to the disk's real end, the primary header is corrected,
and one partition, `config-2`, is added for the config drive: at the end of the disk, or of the last room that kept partitions leave.
Order on disk, in sectors:

    0 protective MBR | 1 primary header | 2.. entries | ... first usable ... config-2 | last usable | backup entries | backup header (last)

Kept partitions, which the owner wants to find again, stay where they are: their entries are copied into the new table.

Source: UEFI 2.10, 5.2.3 (protective MBR) and 5.3 (GPT).
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

MIB = 1024 * 1024
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
CONFIG_NAME = "config-2"  # the label cloud-init and cloudbase-init look for; ours is the partition's name, the file system has it too

_SIGNATURE = b"EFI PART"
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")  # UEFI 2.10, table 5-5: 92 bytes
_ENTRY = struct.Struct("<16s16sQQQ72s")  # table 5-6: 128 bytes


class DiskTooSmall(ValueError):
    """The image's partitions and the config drive do not fit on this disk."""


class Partition(NamedTuple):
    """One used entry. LBAs are inclusive, in the disk's sectors."""

    number: int  # from 1, as in /dev/sda1
    type_guid: uuid.UUID
    guid: uuid.UUID
    first_lba: int
    last_lba: int
    name: str
    attributes: int = 0  # UEFI 2.10, table 5-8

    def span(self, sector_bytes: int) -> tuple[int, int]:
        """First byte, and the one after the last."""
        return self.first_lba * sector_bytes, (self.last_lba + 1) * sector_bytes

    def as_json(self) -> dict[str, Any]:
        return self._asdict() | {"type_guid": str(self.type_guid), "guid": str(self.guid)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Partition:
        return cls(**value | {"type_guid": uuid.UUID(value["type_guid"]), "guid": uuid.UUID(value["guid"])})


class Tables(NamedTuple):
    """What `rebuild` returns. `lba0` + `lba1_onward` are the disk's first MiB."""

    lba0: bytes
    lba1_onward: bytes
    backup_offset: int
    backup: bytes
    config_offset: int
    config_bytes: int  # rounded up to MiB
    partitions: tuple[Partition, ...]  # of the new table, config-2 included


class _Header(NamedTuple):
    """A GPT header's fields that we keep or change."""

    my_lba: int
    alternate_lba: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    entries_lba: int
    entry_count: int
    entry_bytes: int
    revision: int

    def render(self, entries: bytes, sector_bytes: int) -> bytes:
        fields = (
            self.my_lba, self.alternate_lba, self.first_usable, self.last_usable, self.disk_guid, self.entries_lba,
            self.entry_count, self.entry_bytes, zlib.crc32(entries),
        )  # fmt: skip
        crc = zlib.crc32(_HEADER.pack(_SIGNATURE, self.revision, _HEADER.size, 0, 0, *fields))
        return _HEADER.pack(_SIGNATURE, self.revision, _HEADER.size, crc, 0, *fields).ljust(sector_bytes, b"\0")


def rebuild(first_mib: bytes, *, sector_bytes: int, disk_bytes: int, config_bytes: int, config_guid: bytes, keep: Sequence[Partition] = ()) -> Tables:
    """The tables for the real disk.

    Args:
        first_mib: the image's first MiB (protective MBR, primary header, entries).
        config_bytes: size of the config drive; its partition is rounded up to MiB, MiB-aligned, at the end of the disk.
        config_guid: that partition's unique GUID, 16 bytes as on disk (`uuid.UUID.bytes_le`).
        keep: partitions of the disk that the new table has too, with their numbers where the image leaves these free.

    Raises: ValueError, a sentence, where the image has no sound GPT for these sectors, no entry is free, the image has a kept partition's name or GUID,
        or (DiskTooSmall) there is no room.
    """
    header, entries = _read_primary(first_mib, sector_bytes)
    if first_mib[32769:32774] == b"CD001":  # ECMA-119, 8.1.2
        raise ValueError("the image is a CD image too: firmware would boot it without its LBA 0")
    config_bytes = -(-config_bytes // MIB) * MIB
    sectors = disk_bytes // sector_bytes
    entry_sectors = -(-len(entries) // sector_bytes)
    last_usable = sectors - 2 - entry_sectors
    used = _parse_entries(entries, header.entry_bytes)
    image_end = max([MIB, *(p.span(sector_bytes)[1] for p in used)])
    config_offset = _find_room(image_end, (last_usable + 1) * sector_bytes, config_bytes, [p.span(sector_bytes) for p in keep])
    free = {number for number, at in enumerate(range(0, len(entries), header.entry_bytes), start=1) if not any(entries[at : at + 16])}
    for kept in sorted(keep, key=lambda p: p.number not in free):  # who can have its number has it
        if same := next((p for p in used if p.guid == kept.guid or (kept.name and p.name == kept.name)), None):
            raise ValueError(f"the image's partition {same.number} has the name or GUID of {kept.name or kept.guid}, which is to be kept")
        _add_entry(entries, header, kept)
    first_lba, last_lba = config_offset // sector_bytes, (config_offset + config_bytes) // sector_bytes - 1
    _add_entry(entries, header, Partition(0, LINUX_DATA, uuid.UUID(bytes_le=config_guid), first_lba, last_lba, CONFIG_NAME))

    primary = header._replace(alternate_lba=sectors - 1, last_usable=last_usable)
    backup = primary._replace(my_lba=sectors - 1, alternate_lba=1, entries_lba=sectors - 1 - entry_sectors)
    first = bytearray(first_mib)
    _fit_protective_mbr(first, sectors)
    first[sector_bytes : 2 * sector_bytes] = primary.render(bytes(entries), sector_bytes)
    at = header.entries_lba * sector_bytes
    first[at : at + len(entries)] = entries
    tail = bytes(entries).ljust(entry_sectors * sector_bytes, b"\0") + backup.render(bytes(entries), sector_bytes)
    return Tables(
        bytes(first[:sector_bytes]), bytes(first[sector_bytes:]), backup.entries_lba * sector_bytes, tail,
        config_offset, config_bytes, _parse_entries(entries, header.entry_bytes),
    )  # fmt: skip


def _find_room(image_end: int, disk_end: int, config_bytes: int, kept: Sequence[tuple[int, int]]) -> int:
    """Where the config drive begins: as far back as there is room behind the image. Raises DiskTooSmall."""
    edges = sorted(kept)
    if edges and (edges[0][0] < image_end or max(end for _, end in edges) > disk_end):
        raise DiskTooSmall(
            f"the image's partitions end at byte {image_end} and the last that can be used is {disk_end - 1}: a kept partition"
            f" at {edges[0][0]} to {edges[-1][1] - 1} is in the way"
        )
    gaps = zip([image_end, *(end for _, end in edges)], [*(start for start, _ in edges), disk_end], strict=True)
    for start, end in reversed(list(gaps)):
        if (offset := (end - config_bytes) // MIB * MIB) >= start:
            return offset
    raise DiskTooSmall(
        f"the disk is too small: the image's partitions end at byte {image_end}, the config drive needs {config_bytes} more, and byte {disk_end - 1}"
        " is the last that can be used" + (" beside what is kept" if edges else "")
    )


def minimum_disk_bytes(image_bytes: int, config_bytes: int) -> int:
    """A disk of this many bytes always holds the image, the config drive and the backup table (alignment included)."""
    return image_bytes + -(-config_bytes // MIB) * MIB + 2 * MIB


def check_room(image_bytes: int, config_bytes: int, *, disk_bytes: int, sector_bytes: int, keep: Sequence[Partition]) -> None:
    """The image, the config drive, both tables and what is kept find room on the disk, wherever the image's partitions end. Raises DiskTooSmall."""
    last_table = -(-128 * 128 // sector_bytes) * sector_bytes + sector_bytes  # UEFI 2.10, 5.3: 128 entries at least
    _find_room(image_bytes, disk_bytes - last_table, -(-config_bytes // MIB) * MIB, [p.span(sector_bytes) for p in keep])


def parse_table(first_mib: bytes, sector_bytes: int) -> tuple[Partition, ...]:
    """The partitions of a primary GPT. Raises ValueError, a sentence about "the image", where it is not sound."""
    header, entries = _read_primary(first_mib, sector_bytes)
    return _parse_entries(entries, header.entry_bytes)


def _read_primary(first_mib: bytes, sector_bytes: int) -> tuple[_Header, bytearray]:
    """The primary header and its entry array, both CRCs checked."""
    raw = first_mib[sector_bytes : sector_bytes + _HEADER.size]
    if raw[:8] != _SIGNATURE:
        for other in {512, 4096} - {sector_bytes}:
            if first_mib[other : other + 8] == _SIGNATURE:
                raise ValueError(f"the image is made for {other}-byte sectors, the disk has {sector_bytes}")
        raise ValueError("the image has no GPT")
    _, revision, size, crc, _, my, alternate, first, last, guid, at, count, entry_bytes, entries_crc = _HEADER.unpack(raw)
    whole = bytearray(first_mib[sector_bytes : sector_bytes + size])
    whole[16:20] = bytes(4)
    if not _HEADER.size <= size <= sector_bytes or zlib.crc32(whole) != crc:
        raise ValueError("the image's GPT header is damaged: its checksum is wrong")
    start, length = at * sector_bytes, count * entry_bytes
    if my != 1 or at < 2 or entry_bytes < _ENTRY.size or entry_bytes % 8 or not length:
        raise ValueError("the image's GPT header has values that no disk can have")
    if start + length > min(len(first_mib), first * sector_bytes):
        raise ValueError("the image's partition entries do not fit below its first usable sector and into the first MiB")
    entries = bytearray(first_mib[start : start + length])
    if zlib.crc32(entries) != entries_crc:
        raise ValueError("the image's partition entries are damaged: their checksum is wrong")
    return _Header(my, alternate, first, last, guid, at, count, entry_bytes, revision), entries


def _parse_entries(entries: bytes | bytearray, entry_bytes: int) -> tuple[Partition, ...]:
    found = []
    for number, at in enumerate(range(0, len(entries), entry_bytes), start=1):
        kind, guid, first, last, attributes, name = _ENTRY.unpack_from(entries, at)
        if any(kind):
            text = name.decode("utf-16-le", "replace").split("\0")[0]
            found.append(Partition(number, uuid.UUID(bytes_le=kind), uuid.UUID(bytes_le=guid), first, last, text, attributes))
    return tuple(found)


def _add_entry(entries: bytearray, header: _Header, p: Partition) -> None:
    """At its number where that is free, else at the first free one."""
    free = [at for at in range(0, len(entries), header.entry_bytes) if not any(entries[at : at + 16])]
    if not free:
        raise ValueError(f"all {header.entry_count} entries of the image's partition table are in use: none is free for {p.name or p.guid}")
    wanted = (p.number - 1) * header.entry_bytes
    at = wanted if wanted in free else free[0]
    name = p.name.encode("utf-16-le").ljust(72, b"\0")
    entries[at : at + header.entry_bytes] = bytes(header.entry_bytes)
    _ENTRY.pack_into(entries, at, p.type_guid.bytes_le, p.guid.bytes_le, p.first_lba, p.last_lba, p.attributes, name)


def _fit_protective_mbr(first: bytearray, sectors: int) -> None:
    """The 0xEE record covers the disk (5.2.3: all ones where it does not fit); boot code and other records stay."""
    records = [at for at in range(446, 510, 16) if first[at + 4] == 0xEE]
    if first[510:512] != b"\x55\xaa" or not records:
        raise ValueError("the image has no protective MBR")
    struct.pack_into("<I", first, records[0] + 12, min(sectors - 1, 0xFFFFFFFF))
