"""Asks OVMF: a disk is offered to real UEFI firmware, with another disk behind it that is taken when the first is not."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bootable_disks import SAYS, Layout, write_os

CODE, VARIABLES = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
NOTHING = "the-disk-behind"  # what the second disk's loader says: the firmware has tried the first one and gone on
DEADLINE_S = 180  # 5 to 7 s on a quiet machine without KVM


@dataclass(frozen=True)
class Booted:
    says: str  # the name of the loader that ran
    seconds: float
    console: str
    wrote: bool  # the firmware changed the disk it was offered


def make_disk_behind(path: Path) -> Path:
    return write_os(path, Layout(12, esp_at=1, data=((0, 1),)), name=NOTHING, sector_bytes=512, seed=0)


def boot(disk: Path, behind: Path, folder: Path, *, sector_bytes: int, variables: Path = VARIABLES) -> Booted:
    """Which loader the firmware starts. `disk` is written to: by the firmware too."""
    console = folder / "console"
    console.write_text("")
    shutil.copyfile(variables, folder / "vars.fd")
    before = disk.stat().st_mtime_ns
    sectors = f"logical_block_size={sector_bytes},physical_block_size={sector_bytes}"
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "qemu64", "-m", "128", "-display", "none", "-nic", "none",
        "-no-reboot", "-nodefaults", "-serial", f"file:{console}",
        "-drive", f"if=pflash,format=raw,readonly=on,file={CODE}", "-drive", f"if=pflash,format=raw,file={folder / 'vars.fd'}",
        "-drive", f"if=none,id=d0,format=raw,cache=unsafe,file={disk}", "-device", f"virtio-blk-pci,drive=d0,serial=POWER-1,bootindex=1,{sectors}",
        "-drive", f"if=none,id=d1,format=raw,snapshot=on,file={behind}", "-device", "virtio-blk-pci,drive=d1,serial=BEHIND-1,bootindex=2",
    ]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - started
    shown = console.read_text(errors="replace")
    _, found, rest = shown.partition(SAYS)
    says = rest.split()[0] if found else "nothing"
    return Booted(says, seconds, shown, disk.stat().st_mtime_ns != before)
