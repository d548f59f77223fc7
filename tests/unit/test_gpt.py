"""The refitted partition tables, judged by a reader of our own here and by sgdisk and sfdisk."""

from __future__ import annotations

import itertools
import struct
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest
from disk_images import MIB, fdisk, make_disk
from hypothesis import given
from hypothesis import strategies as st

from repave.agent.gpt import DiskTooSmall, Tables, minimum_disk_bytes, rebuild

GUID = uuid.UUID("6f0e3b1c-5d1f-4b7a-9a86-0123456789ab")


def image_head(sector: int, image_bytes: int, *, partitions: int = 2, entries: int = 128) -> bytes:
    """The first MiB of an image whose partitions fill it up to its backup table, made without the code under test."""
    table = bytearray(entries * 128)
    sectors = image_bytes // sector
    last_usable = sectors - 2 - -(-len(table) // sector)
    edges = [MIB // sector + (last_usable + 1 - MIB // sector) * n // partitions for n in range(partitions + 1)]
    for n in range(partitions):
        struct.pack_into("<16s16sQQ", table, n * 128, b"\x11" * 16, bytes([n + 1]) * 16, edges[n], edges[n + 1] - 1)
    fields = (1, sectors - 1, MIB // sector, last_usable, b"\x22" * 16, 2, entries, 128, zlib.crc32(table))
    pack = "<8sIIIIQQQQ16sQIII"
    crc = zlib.crc32(struct.pack(pack, b"EFI PART", 0x10000, 92, 0, 0, *fields))
    head = bytearray(MIB)
    head[:440] = b"\xeb" * 440
    struct.pack_into("<B3sB3sII", head, 446, 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(sectors - 1, 0xFFFFFFFF))
    head[510:512] = b"\x55\xaa"
    head[sector : sector + 92] = struct.pack(pack, b"EFI PART", 0x10000, 92, crc, 0, *fields)
    head[2 * sector : 2 * sector + len(table)] = table
    return bytes(head)


def read_table(disk: bytes, at: int, sector: int, base: int = 0) -> tuple[tuple[int, ...], bytes]:
    """((my, alternate, first usable, last usable, entries LBA), entries) of the header at byte `at`; both CRCs must be right."""
    raw = disk[at : at + 92]
    assert raw[:8] == b"EFI PART"
    (size, crc), count, entry = struct.unpack("<II", raw[12:20]), *struct.unpack("<II", raw[80:88])
    assert zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) == crc
    my, alternate, first, last = struct.unpack("<QQQQ", raw[24:56])
    entries_lba = struct.unpack("<Q", raw[72:80])[0]
    start = entries_lba * sector - base
    entries = disk[start : start + count * entry]
    assert zlib.crc32(entries) == struct.unpack("<I", raw[88:92])[0]
    return (my, alternate, first, last, entries_lba), entries


@given(
    sector=st.sampled_from([512, 4096]),
    image_mib=st.integers(4, 3_000_000),
    more_sectors=st.integers(0, 1 << 33),
    config_bytes=st.integers(1, 64 * MIB),
    partitions=st.integers(1, 127),
)
def test_both_tables_are_sound_and_nothing_overlaps(sector: int, image_mib: int, more_sectors: int, config_bytes: int, partitions: int) -> None:
    image_bytes = image_mib * MIB
    disk_bytes = minimum_disk_bytes(image_bytes, config_bytes) + more_sectors * sector
    head = image_head(sector, image_bytes, partitions=partitions)
    t = rebuild(head, sector_bytes=sector, disk_bytes=disk_bytes, config_bytes=config_bytes, config_guid=GUID.bytes_le)
    first = t.lba0 + t.lba1_onward
    assert len(t.lba0) == sector and len(first) == MIB
    assert t.backup_offset + len(t.backup) == disk_bytes
    (my, alternate, first_usable, last_usable, _), entries = read_table(first, sector, sector)
    backup, backup_entries = read_table(t.backup, len(t.backup) - sector, sector, base=t.backup_offset)
    last = disk_bytes // sector - 1
    assert (my, alternate) == (1, last) and backup[:2] == (last, 1) and backup[2:4] == (first_usable, last_usable)
    assert entries == backup_entries
    assert (last_usable + 1) * sector == t.backup_offset
    assert t.config_offset % MIB == 0 and config_bytes <= t.config_bytes < config_bytes + MIB
    spans = sorted((p.first_lba * sector, (p.last_lba + 1) * sector) for p in t.partitions)
    assert spans[-1] == (t.config_offset, t.config_offset + t.config_bytes) and spans[-1][1] <= t.backup_offset
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert t.backup_offset - spans[-1][1] < MIB
    assert struct.unpack_from("<I", t.lba0, 458)[0] == min(last, 0xFFFFFFFF)
    assert t.lba0[:446] == head[:446], "boot code stays"
    assert t.partitions[-1].name == "config-2" and t.partitions[-1].guid == GUID


def refit(head: bytes, *, sector: int = 512, disk_bytes: int = 64 * MIB) -> Tables:
    return rebuild(head, sector_bytes=sector, disk_bytes=disk_bytes, config_bytes=100_000, config_guid=GUID.bytes_le)


def test_a_disk_without_room_for_the_config_drive_is_refused() -> None:
    with pytest.raises(DiskTooSmall, match="too small"):
        refit(image_head(512, 40 * MIB), disk_bytes=40 * MIB)
    with pytest.raises(DiskTooSmall):
        refit(image_head(512, 40 * MIB), disk_bytes=MIB)


def test_a_full_table_is_refused() -> None:
    with pytest.raises(ValueError, match="none is free"):
        refit(image_head(512, 40 * MIB, partitions=128))


def test_another_sector_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="512-byte sectors, the disk has 4096"):
        refit(image_head(512, 40 * MIB), sector=4096)


@pytest.mark.parametrize("at", [512 + 40, 512 + 17, 1024 + 33])
def test_a_flipped_byte_in_header_or_entries_is_refused(at: int) -> None:
    head = bytearray(image_head(512, 40 * MIB))
    head[at] ^= 1
    with pytest.raises(ValueError, match="checksum is wrong"):
        refit(bytes(head))


def test_an_image_that_is_a_cd_too_is_refused_because_firmware_would_boot_it_without_lba_0() -> None:
    head = bytearray(image_head(512, 40 * MIB))
    head[32769:32774] = b"CD001"
    with pytest.raises(ValueError, match="CD image"):
        refit(bytes(head))


@given(st.binary(min_size=92, max_size=92))
def test_a_hostile_header_ends_in_a_sentence(fields: bytes) -> None:
    """With a right checksum: the values themselves must be judged."""
    head = bytearray(image_head(512, 40 * MIB))
    head[512 + 24 : 512 + 92] = fields[24:]
    head[512 + 16 : 512 + 20] = bytes(4)
    head[512 + 16 : 512 + 20] = struct.pack("<I", zlib.crc32(head[512 : 512 + 92]))
    with pytest.raises(ValueError):
        refit(bytes(head))


@pytest.mark.parametrize("sector", [512, 4096])
def test_fdisk_and_gdisk_find_no_fault(tmp_path: Path, sector: int) -> None:
    disk = make_disk(tmp_path / "disk", 40 * MIB, sector_bytes=sector)
    with disk.open("r+b") as f:
        t = refit(f.read(MIB), sector=sector, disk_bytes=64 * MIB + 3 * sector)
        f.truncate(64 * MIB + 3 * sector)
        f.seek(0)
        f.write(t.lba0 + t.lba1_onward)
        f.seek(t.backup_offset)
        f.write(t.backup)
    assert "No errors detected" in fdisk(disk, sector, "v", "q")
    if sector == 512:  # the other two know no other sector size on a file
        assert "No errors detected" in subprocess.run(["sfdisk", "--verify", disk], capture_output=True, text=True, check=True).stdout
        assert "No problems found" in subprocess.run(["sgdisk", "-v", disk], capture_output=True, text=True, check=True).stdout
