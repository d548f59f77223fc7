"""The partition tables of an image, refitted to the disk it is written to. Stdlib only, no I/O.

An image ends where its maker stopped; a disk is larger. So the backup table moves to the disk's real end, the primary header is corrected,
and one partition, `config-2`, is added at the end of the disk for the config drive. Order on disk, in sectors:

    0 protective MBR | 1 primary header | 2.. entries | ... first usable ... config-2 | last usable | backup entries | backup header (last)

Source: UEFI 2.10, 5.2.3 (protective MBR) and 5.3 (GPT).
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

MIB = 1024 * 1024
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
CONFIG_NAME = "config-2"  # the label cloud-init and cloudbase-init look for; ours is the partition's name, the file system has it too

_SIGNATURE = b"EFI PART"
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")  # UEFI 2.10, table 5-5: 92 bytes
_ENTRY = struct.Struct("<16s16sQQQ72s")  # table 5-6: 128 bytes


@dataclass(frozen=True)
class Partition:
    """One used entry. LBAs are inclusive, in the disk's sectors."""

    number: int  # from 1, as in /dev/sda1
    type_guid: uuid.UUID
    guid: uuid.UUID
    first_lba: int
    last_lba: int
    name: str


class Tables(NamedTuple):
    """What `rebuild` returns. `lba0` + `lba1_onward` are the disk's first MiB."""

    lba0: bytes
    lba1_onward: bytes
    backup_offset: int
    backup: bytes
    config_offset: int
    config_bytes: int  # rounded up to MiB
    partitions: tuple[Partition, ...]  # of the new table, config-2 included


@dataclass(frozen=True)
class _Header:
    """A GPT header's fields that we keep or change."""

    my_lba: int
    alternate_lba: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    entries_lba: int
    count: int
    entry_bytes: int
    revision: int

    def render(self, entries: bytes, sector_bytes: int) -> bytes:
        fields = (
            self.my_lba, self.alternate_lba, self.first_usable, self.last_usable, self.disk_guid, self.entries_lba,
            self.count, self.entry_bytes, zlib.crc32(entries),
        )  # fmt: skip
        crc = zlib.crc32(_HEADER.pack(_SIGNATURE, self.revision, _HEADER.size, 0, 0, *fields))
        return _HEADER.pack(_SIGNATURE, self.revision, _HEADER.size, crc, 0, *fields).ljust(sector_bytes, b"\0")


def rebuild(first_mib: bytes, *, sector_bytes: int, disk_bytes: int, config_bytes: int, config_guid: bytes) -> Tables:
    """The tables for the real disk.

    Args:
        first_mib: the image's first MiB (protective MBR, primary header, entries).
        config_bytes: size of the config drive; its partition is rounded up to MiB, MiB-aligned, at the end of the disk.
        config_guid: that partition's unique GUID, 16 bytes as on disk (`uuid.UUID.bytes_le`).

    Raises: ValueError, a sentence, where the image has no sound GPT for these sectors, the disk is too small or no entry is free.
    """
    raise NotImplementedError


def minimum_disk_bytes(image_bytes: int, config_bytes: int) -> int:
    """A disk of this many bytes always holds the image, the config drive and the backup table (alignment included)."""
    return image_bytes + -(-config_bytes // MIB) * MIB + 2 * MIB
