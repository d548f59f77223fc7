"""The operating systems of scripted machines: how one is told from its disk, and what its first boot does.

The partition table is read by code of our own and not by the agent's, which wrote it: a mistake there must show.
"""

from __future__ import annotations

import base64
import email
import hashlib
import io
import json
import secrets
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import pycdlib

from repave import home_call
from repave.ramdisk.build import BootFiles
from repave.ramdisk.media import build_iso

OLD_OS = b"repave lab: the old OS\n"
CONFIG_LABEL = "config-2"
_SECTOR = 512
_HOME_CALL = "000-repave-home"
_WINDOWS_HOME_CALL = "000-repave-home.ps1"
_RETRY_S = 0.5


@dataclass(frozen=True)
class ConfigDrive:
    offset_bytes: int
    size_bytes: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class FirstBoot:
    """What the config drive tells. `script` holds the names of the call home's code as the drive carries it, {} where it asks for no call."""

    hostname: str
    password_usable: bool
    script: dict[str, Any] = field(repr=False)

    def call_home(self, home: dict[str, Any], off: threading.Event) -> bool:
        """Whether the server took the call. Tries until it does, or the power is off. Blocks."""
        config = self.script.get("CONFIG", {})
        while config and not off.is_set():
            if self.script["call_home"](home, config["home_url"], config["nonce"], config["ca_pem"], retry_s=0, give_up_s=0) == 0:
                return True
            off.wait(_RETRY_S)
        return False


def build_image(path: Path, marker: str) -> Path:
    """A raw image of 12 MiB that a scripted machine boots: a GPT whose ESP has the removable path, and `marker` in its first file.

    Needs fdisk, dosfstools and mtools.
    """
    loader = path.with_suffix(".efi")
    loader.write_bytes(b"MZ" + marker.encode().ljust(64 * 1024, b"\0"))
    with path.open("wb") as out:
        out.truncate(12 << 20)
    table = "label: gpt\nstart=2048, size=16384, type=uefi\n"
    subprocess.run(["/sbin/sfdisk", "-q", path], input=table, text=True, check=True)
    subprocess.run(["/sbin/mkfs.vfat", "--offset=2048", path, "8192"], capture_output=True, check=True)
    subprocess.run(["mmd", "-i", f"{path}@@1M", "::EFI", "::EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", f"{path}@@1M", loader, "::EFI/BOOT/BOOTX64.EFI"], check=True)
    loader.unlink()
    return path


def build_disc(path: Path) -> Path:
    """Boot media on which nothing boots: a run's slot is laid over them as over the real ones, and a scripted machine reads no more.

    6 MB and no packages to fetch, where the real disc has 29 MB that fifty BMCs would download.
    """
    nothing = path.with_suffix(".nothing")
    nothing.write_bytes(b"nothing that boots\n")
    build_iso(BootFiles(kernel=nothing, initramfs=nothing, shim=nothing, grub=nothing), path)
    nothing.unlink()
    return path


def write_old_os(disk: Path) -> None:
    """The disk boots a scripted OS that knows no password. Destroys: the first sector."""
    with disk.open("r+b") as out:
        out.write(OLD_OS.ljust(510, b"\0") + b"\x55\xaa")


def find_os(disk: Path) -> str | None:
    """Which OS the firmware would start: "old OS", "new OS", or None. A disk without its first sector does not boot."""
    with disk.open("rb") as file:
        first = file.read(2 * _SECTOR)
    if first[510:512] != b"\x55\xaa":
        return None
    if first.startswith(OLD_OS):
        return "old OS"
    return "new OS" if first[_SECTOR : _SECTOR + 8] == b"EFI PART" else None


def find_config_drive(disk: Path) -> ConfigDrive | None:
    """The partition named config-2 where it holds an ISO 9660 image; None where it is erased or there is none. (UEFI 2.10, 5.3)"""
    with disk.open("rb") as file:
        file.seek(_SECTOR)
        header = file.read(_SECTOR)
        if header[:8] != b"EFI PART":
            return None
        entries_lba, count, entry_bytes = struct.unpack_from("<QII", header, 72)
        for number in range(min(count, 128)):
            file.seek(entries_lba * _SECTOR + number * entry_bytes)
            entry = file.read(entry_bytes)
            first, last = struct.unpack_from("<QQ", entry, 32)
            if entry[56:128].decode("utf-16-le", "replace").rstrip("\0") == CONFIG_LABEL:
                file.seek(first * _SECTOR)
                data = file.read((last - first + 1) * _SECTOR)
                return ConfigDrive(first * _SECTOR, len(data), data) if data[32769:32774] == b"CD001" else None
    return None


def erase_config_drive(disk: Path, drive: ConfigDrive) -> None:
    """Destroys: the config drive; it holds nothing but zeros."""
    with disk.open("r+b") as out:
        out.seek(drive.offset_bytes)
        out.write(bytes(drive.size_bytes))


def read_first_boot(drive: bytes) -> FirstBoot:
    """Raises KeyError, ValueError or pycdlib's errors where the drive is not one that a new OS could use."""
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(drive))
    try:
        files = {}
        for name in ("meta_data.json", "user_data"):
            out = io.BytesIO()
            iso.get_file_from_iso_fp(out, joliet_path=f"/openstack/latest/{name}")
            files[name] = out.getvalue()
    finally:
        iso.close()
    meta_data = json.loads(files["meta_data.json"])
    parts = {part.get_filename(): part for part in email.message_from_bytes(files["user_data"]).walk()}
    if _WINDOWS_HOME_CALL in parts:
        return _read_windows_first_boot(meta_data, _text(parts[_WINDOWS_HOME_CALL]))
    script: dict[str, Any] = {}
    if _HOME_CALL in parts:
        script["__name__"] = "repave_home"
        exec(compile(_text(parts[_HOME_CALL]), _HOME_CALL, "exec"), script)  # noqa: S102 - the code that the drive carries is what is played
    return FirstBoot(
        hostname=meta_data["hostname"],
        password_usable=_is_password_usable(parts.get("000-repave.cfg"), script.get("CONFIG", {}).get("hash_sha256", "")),
        script=script,
    )


def _read_windows_first_boot(meta_data: dict[str, Any], script: str) -> FirstBoot:
    """There is no PowerShell here: only the script's settings are the drive's, the call itself is the one of Linux."""
    config = json.loads(script.partition("$Config = @'\n")[2].partition("\n'@")[0])
    account = meta_data["meta"]
    usable = account["admin_username"] == config["user"] and bool(account["admin_pass"])
    return FirstBoot(hostname=meta_data["hostname"], password_usable=usable, script={"CONFIG": config, "call_home": home_call.call_home})


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode()


def _is_password_usable(cloud_config: Message | None, hash_sha256: str) -> bool:
    """Whether the cloud-config sets a crypt(5) hash that is the one the call home looks for."""
    if cloud_config is None:
        return False
    config = json.loads(_text(cloud_config).partition("\n")[2])
    hashes = [user["password"] for user in config["chpasswd"]["users"]]
    return any(h.startswith("$") and hashlib.sha256(h.encode()).hexdigest() == hash_sha256 for h in hashes)


def create_host_key() -> str:
    """An ed25519 public key as sshd would show it (RFC 8709, 4); nobody holds its private half."""
    blob = struct.pack(">I", 11) + b"ssh-ed25519" + struct.pack(">I", 32) + secrets.token_bytes(32)
    return "ssh-ed25519 " + base64.b64encode(blob).decode()
