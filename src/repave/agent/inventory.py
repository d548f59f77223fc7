"""What this server is: read from sysfs, procfs and the disks' own partition tables; nothing is written, no tool is called.

Every root is a parameter, so a test builds the tree. No udev runs in the ramdisk: serials come from the kernel, by kind of disk:
virtio `serial`, NVMe `device/serial` (padded with blanks), SATA and SCSI `device/vpd_pg80` from byte 4 (padded too).
"""

from __future__ import annotations

import os
import re
import struct
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from repave.agent.efi import BootVariables
from repave.agent.gpt import MIB, Partition, parse_table
from repave.agent.protocol import Disk, Inventory

SECTOR_BYTES = 512  # sysfs `size` counts these, whatever the disk's sectors are
_NO_DISK = re.compile(r"(loop|ram|zram|dm-|md|nbd|drbd|fd|sr|mtdblock|mmcblk\d+(boot|rpmb|gp))\d*")
_BMC_MEDIA = re.compile(r"virtual|idrac|ilo\b|lcdrive|oemdrv", re.IGNORECASE)  # AMI Virtual HDisk0, Virtual Media, iDRAC OEMDRV
_ENTRIES_CAP_BYTES = 1024 * 1024
_MOST_OF_A_DISK, _MOST_OF_ALL = 128, 600  # partitions in a hello, which has 1 MiB at most
_NO_VALUE = {"", "none", "not specified", "default string", "to be filled by o.e.m.", "0123456789", "system serial number"}
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}


class Roots(NamedTuple):
    """Where the kernel shows things."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")

    @property
    def efivars(self) -> Path:
        return self.sys / "firmware/efi/efivars"


def read_inventory(roots: Roots) -> Inventory:
    dmi = roots.sys / "class/dmi/id"
    serial = _text(dmi / "product_serial")
    memory = re.search(r"MemTotal:\s+(\d+) kB", _text(roots.proc / "meminfo"))
    return Inventory(
        boot_id=_text(roots.proc / "sys/kernel/random/boot_id"),
        serial="" if serial.lower() in _NO_VALUE else serial,
        uuid=_text(dmi / "product_uuid").lower(),
        macs=_read_macs(roots.sys),
        arch=_ARCH.get(os.uname().machine, os.uname().machine),
        firmware="uefi" if (roots.sys / "firmware/efi").is_dir() else "bios",
        memory_bytes=int(memory.group(1)) * 1024 if memory else 0,
        disks=read_disks(roots),
        uptime_s=round(time.clock_gettime(time.CLOCK_BOOTTIME), 1),
    )


def read_disks(roots: Roots) -> tuple[Disk, ...]:
    """Whole disks by name. Optical drives, loops and other devices made by software are left out."""
    disks = _cap_partitions(_disks(roots))
    booting = find_booting_partition(roots, disks)
    if booting is None:
        return tuple(disks)
    return tuple(d._replace(boots=d.path == booting[1]) for d in disks)


def _cap_partitions(disks: Iterable[Disk]) -> list[Disk]:
    """What is on many disks must not make the hello too large to be taken."""
    shown, found = 0, []
    for disk in disks:
        fits = shown + len(disk.partitions) <= _MOST_OF_ALL
        shown += len(disk.partitions) if fits else 0
        found.append(disk if fits else disk._replace(partitions=()))
    return found


def find_booting_partition(roots: Roots, disks: list[Disk]) -> tuple[int, str, Partition] | None:
    """(boot entry's number, disk's path, partition): the first entry of the boot order whose partition is on a disk here.

    The ramdisk itself was booted from a CD or the network, so BootCurrent says nothing about the disks.
    """
    entries = [e for e in BootVariables(roots.efivars).list_entries() if e.partition_guid is not None]
    if not entries:
        return None
    where = {p.guid: (d.path, p) for d in disks if d.size_bytes for p in read_partitions(Path(d.path), d.sector_bytes)}
    for entry in entries:
        if entry.partition_guid in where:
            return entry.number, *where[entry.partition_guid]
    return None


def read_partitions(device: Path, sector_bytes: int) -> tuple[Partition, ...]:
    """The partitions in the disk's primary GPT, damaged or not; () where it has none or can not be read. UEFI 2.10, 5.3.

    For what boots: firmware may do with the backup where this one is damaged. What is kept wants a sound one (`read_sound_partitions`).
    """
    try:
        with open(device, "rb") as disk:
            disk.seek(sector_bytes)
            header = disk.read(92)
            if header[:8] != b"EFI PART":
                return ()
            entries_lba, count, entry_bytes = struct.unpack_from("<QII", header, 72)
            if not 128 <= entry_bytes <= 4096 or count * entry_bytes > _ENTRIES_CAP_BYTES:
                return ()
            disk.seek(entries_lba * sector_bytes)
            table = disk.read(count * entry_bytes)
    except (OSError, OverflowError, struct.error):
        return ()
    found = []
    for index in range(len(table) // entry_bytes):
        kind, guid, first, last = struct.unpack_from("<16s16sQQ", table, index * entry_bytes)
        if any(kind):
            found.append(Partition(index + 1, uuid.UUID(bytes_le=kind), uuid.UUID(bytes_le=guid), first, last, ""))
    return tuple(found)


def read_sound_partitions(device: Path, sector_bytes: int) -> tuple[Partition, ...]:
    """The same, with names, where both checksums are right and no more than the usual 128 entries are used; else ()."""
    try:
        with open(device, "rb") as disk:
            found = parse_table(disk.read(MIB), sector_bytes)
    except (OSError, ValueError):
        return ()
    return found if len(found) <= _MOST_OF_A_DISK else ()


def _disks(roots: Roots) -> Iterator[Disk]:
    for block in sorted((roots.sys / "block").glob("*")):
        if not _NO_DISK.fullmatch(block.name) and _text(block / "hidden") != "1":  # hidden: one path of a multipath NVMe disk
            yield _read_disk(block, roots.dev)


def _read_disk(block: Path, dev: Path) -> Disk:
    device = block / "device"
    transport = _transport(block)
    path, size_bytes = dev / block.name.replace("!", "/"), int(_text(block / "size") or 0) * SECTOR_BYTES
    sector_bytes = int(_text(block / "queue/logical_block_size") or SECTOR_BYTES)
    model = " ".join(filter(None, (_text(device / "vendor"), _text(device / "model")))) if transport != "nvme" else _text(device / "model")
    if transport == "virtio":
        model = ""  # `vendor` is a PCI number there
    return Disk(
        path=str(path),
        size_bytes=size_bytes,
        sector_bytes=sector_bytes,
        serial=_serial(block),
        wwn=_text(block / "wwid") or _text(device / "wwid"),
        model=model,
        transport=transport,
        removable=_text(block / "removable") == "1",
        read_only=_text(block / "ro") == "1",
        rotational=_text(block / "queue/rotational") == "1",
        virtual=transport == "usb" and bool(_BMC_MEDIA.search(model)),
        hctl=_hctl(device),
        partitions=tuple(p.as_json() for p in read_sound_partitions(path, sector_bytes)) if size_bytes else (),
    )


def _serial(block: Path) -> str:
    page = _bytes(block / "device/vpd_pg80")  # SPC-4, 7.8.10: page code, length at byte 2, serial from byte 4
    if len(page) > 4:
        return _clean(page[4 : 4 + int.from_bytes(page[2:4], "big")])
    return _text(block / "serial") or _text(block / "device/serial")


def _transport(block: Path) -> str:
    """By name and by the device's place in the tree; `scsi` where no more is known."""
    if block.name.startswith("nvme"):
        return "nvme"
    if block.name.startswith("vd"):
        return "virtio"
    if block.name.startswith("mmcblk"):
        return "mmc"
    place = str(block.resolve())
    for part, transport in (("/usb", "usb"), ("/ata", "sata"), ("/end_device-", "sas"), ("/session", "iscsi"), ("/rport-", "fc")):
        if part in place:
            return transport
    return "scsi"


def _hctl(device: Path) -> str:
    name = device.resolve().name
    return name if re.fullmatch(r"\d+:\d+:\d+:\d+", name) else ""


def _read_macs(sys_root: Path) -> tuple[str, ...]:
    """Of network cards, not of bridges and the like: those have no `device`."""
    cards = [n for n in sorted((sys_root / "class/net").glob("*")) if (n / "device").exists()]
    macs = (_text(n / "address").lower() for n in cards)
    return tuple(m for m in macs if m and m != "00:00:00:00:00:00")


def _text(path: Path) -> str:
    return _clean(_bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _clean(value: bytes) -> str:
    return value.decode("utf-8", errors="replace").strip("\0 \t\r\n")
