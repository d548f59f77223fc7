"""Real machines of the rack: firmware, power, boot order, media, console and the SSH forward, driven through their BMCs."""

from __future__ import annotations

import functools
import http.server
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from repave.bmc import BmcAddress, Power
from repave.bmc.redfish import RedfishBmc
from repave.lab.machines import QemuRack, start_qemu_rack
from repave.lab.state import Machine

BOOT_S = 240  # firmware and GRUB take 6 s under emulation on a quiet core, 40 s beside other work
DISK_SAYS, CD_SAYS = b"the disk was booted", b"the CD was booted"


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuRack]:
    folder = tmp_path_factory.mktemp("rack")
    with start_qemu_rack(folder, count=2, data_disk=True) as rack:
        yield rack
    assert not list_processes(folder)


@pytest.fixture(scope="module")
def media_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bootable ISO on loopback whose GRUB says that it is the CD."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "disc/boot/grub").mkdir(parents=True)
    (folder / "disc/boot/grub/grub.cfg").write_text(grub_config(CD_SAYS))
    make_esp(folder / "disc/efi.img", "gcdx64.efi.signed")
    command: list[str | Path] = [
        "xorriso",
        "-as",
        "mkisofs",
        "-quiet",
        "-V",
        "TEST",
        "-o",
        folder / "boot.iso",
        "-R",
        "-e",
        "efi.img",
        "-no-emul-boot",
        folder / "disc",
    ]
    subprocess.run(command, check=True, capture_output=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/boot.iso"
        server.shutdown()


def grub_config(says: bytes) -> str:
    """GRUB names the disks that it sees, then says so, on the serial console, and stays."""
    return f"serial --unit=0 --speed=115200\nterminal_output serial\nls\necho '{says.decode()}'\nsleep 3600\n"


def make_esp(esp: Path, grub: str) -> None:
    """A FAT file system with one of Debian's signed GRUBs under the removable path."""
    with esp.open("wb") as out:
        out.truncate(8 << 20)
    subprocess.run(["/sbin/mkfs.vfat", esp], check=True, capture_output=True)
    subprocess.run(["mmd", "-i", esp, "::EFI", "::EFI/BOOT", "::EFI/debian"], check=True)
    subprocess.run(["mcopy", "-i", esp, f"/usr/lib/grub/x86_64-efi-signed/{grub}", "::EFI/BOOT/BOOTX64.EFI"], check=True)


def write_bootable(disk: Path, folder: Path) -> None:
    """The disk's GRUB says that it is the disk."""
    esp, config = folder / "esp.img", folder / "grub.cfg"
    make_esp(esp, "grubx64.efi.signed")
    config.write_text(grub_config(DISK_SAYS))
    subprocess.run(["mcopy", "-i", esp, config, "::EFI/debian/grub.cfg"], check=True)
    subprocess.run(["/sbin/sfdisk", "-q", disk], input="label: gpt\nstart=2048, size=16384, type=uefi\n", text=True, check=True)
    with disk.open("r+b") as out:
        out.seek(1 << 20)
        out.write(esp.read_bytes())


def list_processes(folder: Path) -> list[str]:
    """The command lines that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in line:
            found.append(line.decode(errors="replace"))
    return found


def wait_for_console(machine: Machine, said: list[bytes]) -> None:
    """The console has said just these, in this order."""
    wait_for(lambda: re.findall(b"|".join({DISK_SAYS, CD_SAYS}), machine.console.read_bytes()) == said)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOOT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def open_bmc(machine: Machine) -> RedfishBmc:
    return RedfishBmc(BmcAddress(machine.bmc_url, machine.bmc_username, machine.bmc_password))


def test_each_bmc_shows_its_own_machine_and_takes_its_own_password(rack: QemuRack) -> None:
    one, two = rack.machines
    facts = open_bmc(one).probe()
    assert (facts.uuid, facts.macs, facts.power) == (one.uuid, (one.mac,), Power.OFF)
    url = f"{one.bmc_url}/redfish/v1/Systems"
    assert requests.get(url, auth=(one.bmc_username, one.bmc_password), timeout=5).json()["Members@odata.count"] == 1
    assert requests.get(url, auth=(two.bmc_username, two.bmc_password), timeout=5).status_code == 401


def test_a_machine_boots_the_cd_when_asked_and_the_disk_before_and_after(rack: QemuRack, media_url: str, tmp_path: Path) -> None:
    machine = rack.machines[0]
    assert machine.data_disk is not None
    write_bootable(machine.root_disk, tmp_path)
    bmc = open_bmc(machine)
    bmc.power_on()
    wait_for_console(machine, [DISK_SAYS])
    assert bmc.power_off() is True
    bmc.insert_media([media_url])
    bmc.boot_from_media_once()
    bmc.power_on()
    wait_for_console(machine, [DISK_SAYS, CD_SAYS])
    # GRUB on the CD sees the disc and both disks: those without a boot order of their own, the firmware would not connect.
    assert b"(cd0)" in machine.console.read_bytes() and b"(hd1)" in machine.console.read_bytes()
    bmc.power_off()
    bmc.eject_media()
    bmc.boot_from_disk()
    bmc.power_on()
    wait_for_console(machine, [DISK_SAYS, CD_SAYS, DISK_SAYS])
    assert not any(machine.data_disk.read_bytes()[: 1 << 20])
    bmc.power_off()


def test_the_ssh_forward_is_there_after_each_power_on(rack: QemuRack) -> None:
    machine = rack.machines[1]
    bmc = open_bmc(machine)
    for _ in range(2):
        bmc.power_on()
        wait_for(lambda: is_open(machine.ssh_port))
        bmc.power_off()
        assert not is_open(machine.ssh_port)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_another_process_can_take_the_rack_down(tmp_path: Path) -> None:
    with start_qemu_rack(tmp_path, count=1) as rack:
        open_bmc(rack.machines[0]).power_on()
        assert any("qemu-system" in line for line in list_processes(tmp_path))
        QemuRack(tmp_path).stop()
        assert not list_processes(tmp_path)
        assert not rack.is_up()
