"""The boot media: one cached ISO, and a run's slot that is laid over it while it is read.

On the disc: an El Torito FAT image with shim and Debian's signed GRUB; beside it, on ISO 9660, grub.cfg, kernel and initramfs, and two
placeholders of fixed size. As built the disc is inert: it boots the local disk. With a slot, /boot/live.cfg says `set live=1`, and
/boot/slot.cpio, GRUB's second initramfs, holds the run's token, CA and network settings. Nothing secret is on a command line.
Source for where gcdx64 looks: booted and seen, Debian 12's GRUB 2.06.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repave.agent.protocol import SLOT_FILE, Slot
from repave.errors import RunFailed
from repave.ramdisk import cpio
from repave.ramdisk.build import BootFiles

SLOT_BYTES = 64 * 1024
LIVE_BYTES = 2 * 1024
NETWORK_FILE = "repave-network"  # the slot's static settings as one line for /init: MAC ADDRESS PREFIX GATEWAY|- VLAN|- [DNS...]
COMMAND_LINE = "console=tty0 console=ttyS0,115200 quiet panic=30 scsi_mod.scan=sync"  # sync: modprobe returns when the disks are there

WORK_PREFIX = ".repave-iso-"  # what a killed build leaves is swept by this name
_EPOCH = "2020010100000000"  # of the ISO, so that the same files give the same bytes
_SLOT_MARK = b"REPAVE-SLOT-0d9b2f6c5e7a4c1f8b3e"
_LIVE_MARK = b"# REPAVE-LIVE-6a1c94e27b5d40f3a8de\n"
_LIVE = b"set live=1\n"
_ISO_BLOCK = 2048
_EFI_IMAGE_BYTES = 6 * 1024 * 1024  # shim 1.0, gcdx64 2.5-4, room for later ones


def build_iso(files: BootFiles, out: Path) -> None:
    """`out` is the inert ISO, whole or not at all. Needs xorriso, mtools, dosfstools."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=WORK_PREFIX) as folder:
        work = Path(folder)
        boot = work / "disc/boot"
        (boot / "grub").mkdir(parents=True)
        (work / "disc/.disk").mkdir()
        (work / "disc/.disk/info").write_text("Repave\n")  # what gcdx64 searches for where the firmware hides which disc it came from
        shutil.copyfile(files.kernel, boot / "vmlinuz")
        shutil.copyfile(files.initramfs, boot / "initramfs")
        (boot / "grub/grub.cfg").write_text(_grub_config())
        (boot / "live.cfg").write_bytes(_LIVE_MARK.ljust(LIVE_BYTES, b"\n"))
        (boot / "slot.cpio").write_bytes(_SLOT_MARK.ljust(SLOT_BYTES, b"\0"))
        _make_efi_image(files, work / "disc/efi.img")
        _make_reproducible(work / "disc")
        _run([
            "xorriso", "-as", "mkisofs", "-V", "REPAVE", "-o", str(work / "boot.iso"), "-R", "-J", f"--modification-date={_EPOCH}",
            "--set_all_file_dates", _EPOCH, "-e", "efi.img", "-no-emul-boot", str(work / "disc"),
        ])  # fmt: skip
        BootMedia(work / "boot.iso")
        (work / "boot.iso").replace(out)


def render_slot(slot: Slot) -> bytes:
    """The slot as a cpio archive of exactly SLOT_BYTES. Raises RunFailed where it does not fit or the network settings make no sense."""
    entries = {SLOT_FILE: cpio.file(json.dumps(slot._asdict()).encode(), mode=0o600)}
    if slot.network is not None:
        entries[NETWORK_FILE] = cpio.file(_render_network(slot.network), mode=0o600)
    archive = cpio.render_archive(entries)
    if len(archive) > SLOT_BYTES:
        raise RunFailed("internal", f"The run's part of the boot media has {len(archive)} bytes, {SLOT_BYTES} fit.")
    return archive.ljust(SLOT_BYTES, b"\0")


class BootMedia:
    """An ISO of `build_iso`, read with a run's slot or without. Threads may share it; it keeps the file it opened, whatever replaces it."""

    def __init__(self, iso: Path) -> None:
        self._file = iso.open("rb")
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            self.size = len(whole)
            self._slot_at = _find_placeholder(whole, _SLOT_MARK)
            self._live_at = _find_placeholder(whole, _LIVE_MARK)

    def read(self, offset: int, length: int, slot: bytes | None) -> bytes:
        """At most `length` bytes from `offset`. `slot` is of `render_slot`; None: the media are inert."""
        data = os.pread(self._file.fileno(), length, offset)
        if slot is not None:
            if len(slot) != SLOT_BYTES:
                raise ValueError(f"a slot has {SLOT_BYTES} bytes")
            data = _overlay(data, offset, slot, self._slot_at)
            data = _overlay(data, offset, _LIVE.ljust(LIVE_BYTES, b"\n"), self._live_at)
        return data

    def etag(self, slot: bytes | None) -> str:
        """Changes whenever a byte of what is read changes. Quoted, as HTTP wants it."""
        return f'"{hashlib.sha256(self._iso_sha256 + (slot or b"")).hexdigest()[:32]}"'

    @functools.cached_property
    def _iso_sha256(self) -> bytes:
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return hashlib.sha256(whole).digest()

    def close(self) -> None:
        self._file.close()


def _overlay(data: bytes, offset: int, patch: bytes, patch_at: int) -> bytes:
    """`data`, read at `offset`, with the part of `patch` that falls into it."""
    start, end = max(offset, patch_at), min(offset + len(data), patch_at + len(patch))
    if start >= end:
        return data
    return data[: start - offset] + patch[start - patch_at : end - patch_at] + data[end - offset :]


def _find_placeholder(whole: mmap.mmap, mark: bytes) -> int:
    at = whole.find(mark)
    if at < 0 or at % _ISO_BLOCK or whole.find(mark, at + 1) >= 0:
        raise RunFailed("internal", "The boot media's ISO has not one place for a run's part: build it again.")
    return at


def _render_network(network: dict[str, Any]) -> bytes:
    """Checked here, because a shell reads it on the server."""
    try:
        mac = str(network["mac"]).lower()
        if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", mac):
            raise ValueError("mac")
        interface = ipaddress.ip_interface(f"{network['address']}/{network['prefix']}")
        gateway = str(ipaddress.ip_address(network["gateway"])) if network.get("gateway") else "-"
        vlan = str(int(network["vlan"])) if network.get("vlan") else "-"
        dns = [str(ipaddress.ip_address(server)) for server in network.get("dns") or ()]
    except (KeyError, ValueError):
        raise RunFailed("bad-request", "The server's static network settings are not valid.") from None
    return (" ".join([mac, str(interface.ip), str(interface.network.prefixlen), gateway, vlan, *dns]) + "\n").encode()


def _grub_config() -> str:
    """Never `exit`: OVMF then waits in its setup screen although the disk is next in the boot order (measured, GRUB 2.06 and 2.12)."""
    return (Path(__file__).parent / "grub.cfg").read_text().replace("@COMMAND_LINE@", COMMAND_LINE)


def _make_efi_image(files: BootFiles, image: Path) -> None:
    with image.open("wb") as out:
        out.truncate(_EFI_IMAGE_BYTES)
    _run(["mkfs.vfat", "--invariant", "-n", "REPAVE-EFI", str(image)])
    staged = image.parent.parent / "efi"
    staged.mkdir()
    shutil.copyfile(files.shim, staged / "BOOTX64.EFI")
    shutil.copyfile(files.grub, staged / "grubx64.efi")
    _make_reproducible(staged)
    _run(["mmd", "-i", str(image), "::/EFI", "::/EFI/BOOT"])
    _run(["mcopy", "-m", "-i", str(image), str(staged / "BOOTX64.EFI"), str(staged / "grubx64.efi"), "::/EFI/BOOT/"])


def _make_reproducible(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (1577836800, 1577836800))  # 2020-01-01


def _run(command: Sequence[str]) -> None:
    env = os.environ | {"SOURCE_DATE_EPOCH": "1577836800", "TZ": "UTC"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RunFailed("internal", f"{command[0]} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}.")
