"""The agent's inventory, on trees built as the kernel builds them."""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from pathlib import Path

import pytest

from repave.agent.efi import GLOBAL, BootVariables, render_load_option
from repave.agent.gpt import ESP, Partition
from repave.agent.inventory import Roots, read_disks, read_inventory, read_partitions
from repave.agent.machine import RealMachine


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    roots = Roots(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev")
    for folder in (roots.sys / "block", roots.sys / "class/net", roots.proc, roots.dev):
        folder.mkdir(parents=True)
    return roots


def add_disk(roots: Roots, name: str, place: str, files: dict[str, bytes], *, mib: int = 4) -> Path:
    """/sys/block/NAME as a link to devices/PLACE/block/NAME, whose `device` is devices/PLACE; and the node in /dev."""
    device = roots.sys / "devices" / place
    block = device / "block" / name
    defaults = {"size": str(mib * 2048).encode(), "removable": b"0\n", "ro": b"0\n", "queue/logical_block_size": b"512\n", "queue/rotational": b"0\n"}
    for path, value in (defaults | files).items():
        target = device / path.removeprefix("device/") if path.startswith("device/") else block / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(value)
    (block / "device").symlink_to(device)
    (roots.sys / "block" / name).symlink_to(block)
    node = roots.dev / name
    node.touch()
    os.truncate(node, mib * 2**20)
    return node


def add_esp(node: Path, guid: uuid.UUID, *, sector_bytes: int = 512) -> Partition:
    """A primary GPT with one EFI system partition as its second entry."""
    partition = Partition(2, ESP, guid, 2048, 4095, "")
    entries = bytearray(128 * 128)
    struct.pack_into("<16s16sQQQ72s", entries, 128, ESP.bytes_le, guid.bytes_le, partition.first_lba, partition.last_lba, 0, b"")
    fields = (1, 8191, 34, 8158, b"", 2, 128, 128, zlib.crc32(entries))
    header = "<8sIIIIQQQQ16sQIII"
    crc = zlib.crc32(struct.pack(header, b"EFI PART", 0x10000, 92, 0, 0, *fields))
    with open(node, "r+b") as disk:
        disk.seek(sector_bytes)
        disk.write(struct.pack(header, b"EFI PART", 0x10000, 92, crc, 0, *fields))
        disk.seek(2 * sector_bytes)
        disk.write(entries)
    return partition


def set_variable(roots: Roots, name: str, value: bytes) -> None:
    roots.efivars.mkdir(parents=True, exist_ok=True)
    (roots.efivars / f"{name}-{GLOBAL}").write_bytes(struct.pack("<I", 7) + value)


def test_each_kind_of_disk_has_its_serial_where_the_kernel_keeps_it(roots: Roots) -> None:
    add_disk(roots, "vda", "pci0/virtio1", {"serial": b"ROOT-1", "device/vendor": b"0x1af4\n"})
    add_disk(
        roots, "nvme0n1", "pci0/nvme/nvme0",
        {"device/serial": b"S64GNX0T        \n", "device/model": b"SAMSUNG MZQL2    \n", "wwid": b"eui.36344730\n", "queue/logical_block_size": b"4096\n"},
    )  # fmt: skip
    add_disk(
        roots, "sdb", "pci0/ata1/host0/target0:0:0/0:0:0:0",
        {"device/vpd_pg80": b"\x00\x80\x00\x14" + b"        ZL2ABCDE    ", "device/wwid": b"naa.5000c500\n", "device/vendor": b"ATA     \n",
         "device/model": b"ST4000NM\n", "queue/rotational": b"1\n"},
    )  # fmt: skip
    nvme, sata, virtio = read_disks(roots)
    assert (virtio.serial, virtio.transport, virtio.model) == ("ROOT-1", "virtio", "")
    assert (nvme.serial, nvme.wwn, nvme.transport, nvme.sector_bytes) == ("S64GNX0T", "eui.36344730", "nvme", 4096)
    assert (sata.serial, sata.wwn, sata.transport, sata.hctl) == ("ZL2ABCDE", "naa.5000c500", "sata", "0:0:0:0")
    assert sata.rotational and sata.model == "ATA ST4000NM"
    assert {d.size_bytes for d in (nvme, sata, virtio)} == {4 * 2**20}
    assert not any(d.virtual or d.removable or d.read_only for d in (nvme, sata, virtio))


def test_a_stick_and_the_bmcs_media_are_marked_and_a_cd_is_not_even_listed(roots: Roots) -> None:
    add_disk(roots, "sda", "pci0/usb1/1-1/host6/target6:0:0/6:0:0:0", {"removable": b"1\n", "device/vendor": b"Kingston", "device/model": b"DataTraveler"})
    add_disk(roots, "sdb", "pci0/usb1/1-2/host7/target7:0:0/7:0:0:0", {"device/vendor": b"AMI     ", "device/model": b"Virtual HDisk0"})
    add_disk(roots, "sr0", "pci0/usb1/1-3/host8/target8:0:0/8:0:0:0", {"removable": b"1\n"})
    for name in ("loop0", "zram0", "dm-0", "md127", "mmcblk0boot0", "nbd3"):
        add_disk(roots, name, f"virtual/{name}", {})
    add_disk(roots, "nvme0c0n1", "pci0/nvme/nvme0c", {"hidden": b"1\n"})
    add_disk(roots, "sdc", "pci0/ata1/host0/target0:0:0/0:0:0:0", {"ro": b"1\n"})
    stick, media, locked = read_disks(roots)
    assert (stick.path, stick.removable, stick.virtual) == (str(roots.dev / "sda"), True, False)
    assert media.virtual and media.transport == "usb"
    assert locked.read_only


def test_the_disk_that_boots_today_is_the_first_of_the_boot_order_that_is_here(roots: Roots) -> None:
    add_disk(roots, "sda", "pci0/ata1/host0/target0:0:0/0:0:0:0", {})
    node = add_disk(roots, "sdb", "pci0/ata2/host1/target1:0:0/1:0:0:0", {})
    here, gone = uuid.uuid4(), uuid.uuid4()
    partition = add_esp(node, here)
    assert read_partitions(node, 512) == (partition,)
    cd = struct.pack("<IH", 1, 8) + "CD\0".encode("utf-16-le") + struct.pack("<BBHI", 2, 1, 8, 0)
    set_variable(roots, "Boot0000", cd)
    set_variable(roots, "Boot0001", render_load_option("an old disk", Partition(1, ESP, gone, 2048, 4095, ""), "\\EFI\\old.efi"))
    set_variable(roots, "Boot000A", render_load_option("debian", partition, "\\EFI\\debian\\shimx64.efi"))
    set_variable(roots, "BootOrder", struct.pack("<3H", 0, 1, 0xA))
    set_variable(roots, "BootCurrent", struct.pack("<H", 0))
    assert [(d.path, d.boots) for d in read_disks(roots)] == [(str(roots.dev / "sda"), False), (str(node), True)]


def test_boot_variables_that_make_no_sense_are_passed_over(roots: Roots) -> None:
    add_disk(roots, "vda", "pci0/virtio1", {})
    for number, value in enumerate((b"", b"\x01", b"\xff" * 7, struct.pack("<IH", 1, 0xFFFF) + b"A\0\0\0" + b"\x04\x01\x01\x00")):
        set_variable(roots, f"Boot{number:04X}", value)
    set_variable(roots, "BootOrder", struct.pack("<5H", 0, 1, 2, 3, 9) + b"\x01")
    assert [d.boots for d in read_disks(roots)] == [False]


def test_our_boot_entry_is_first_and_there_is_only_one_of_it(roots: Roots) -> None:
    esp = Partition(1, ESP, uuid.uuid4(), 2048, 4095, "")
    set_variable(roots, "Boot0000", render_load_option("debian", Partition(1, ESP, uuid.uuid4(), 2048, 4095, ""), "\\EFI\\debian\\shimx64.efi"))
    set_variable(roots, "BootOrder", struct.pack("<H", 0))
    machine, boot = RealMachine(roots), BootVariables(roots.efivars)
    machine.set_boot_entry("repave", [Partition(1, ESP, uuid.uuid4(), 34, 2047, "")])
    assert "Boot0001" in machine.set_boot_entry("repave", [esp])
    assert boot.order() == [1, 0]
    first = boot.list_entries()[0]
    assert (first.label, first.partition_guid) == ("repave", esp.guid)
    assert sorted(p.name[:8] for p in roots.efivars.glob("Boot0*")) == ["Boot0000", "Boot0001"]


def test_the_way_back_sets_boot_next_to_the_local_disk_and_reboots(roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = add_disk(roots, "vda", "pci0/virtio1", {})
    add_esp(node, uuid.uuid4())
    set_variable(roots, "BootOrder", b"")
    (tmp_path / "bin").mkdir()
    reboot = tmp_path / "bin/reboot"
    reboot.write_text(f"#!/bin/sh\ntouch {tmp_path}/rebooted\n")
    reboot.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for _ in range(2):  # a second time uses the same entry again
        RealMachine(roots).boot_local_disk()
    assert (roots.efivars / f"BootNext-{GLOBAL}").read_bytes() == struct.pack("<IH", 7, 0)
    assert BootVariables(roots.efivars).order() == []
    assert sorted(p.name[:8] for p in roots.efivars.iterdir()) == ["Boot0000", "BootNext", "BootOrde"]
    assert (tmp_path / "rebooted").exists()


def test_the_server_is_known_by_dmi_and_by_its_physical_cards(roots: Roots) -> None:
    dmi = roots.sys / "class/dmi/id"
    dmi.mkdir(parents=True)
    (dmi / "product_serial").write_text("SRV-7\n")
    (dmi / "product_uuid").write_text("4C4C4544-0042-3510-8051-B4C04F4E3132\n")
    for name, physical in (("eth0", True), ("lo", False), ("br0", False)):
        card = roots.sys / "class/net" / name
        card.mkdir()
        (card / "address").write_text("52:54:00:AA:BB:01\n")
        if physical:
            (card / "device").mkdir()
    (roots.proc / "meminfo").write_text("MemTotal:         524288 kB\n")
    found = read_inventory(roots)
    assert (found.serial, found.uuid, found.macs) == ("SRV-7", "4c4c4544-0042-3510-8051-b4c04f4e3132", ("52:54:00:aa:bb:01",))
    assert (found.memory_bytes, found.firmware) == (512 * 2**20, "bios")
    (roots.sys / "firmware/efi").mkdir(parents=True)
    (dmi / "product_serial").write_text("To Be Filled By O.E.M.\n")
    assert (read_inventory(roots).firmware, read_inventory(roots).serial) == ("uefi", "")
