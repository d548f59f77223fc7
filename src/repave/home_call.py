"""The call home: what a new OS runs at its first boot. `firstboot` sends this file's text in the config drive's user data.

It runs on machines where nothing of ours is installed: one file, Python 3.7 or later, stdlib only. Its order is its promise:

    find the disk under / | erase the config drive | erase the copies of its secrets | no cloud-init at later boots | call home

The hash is not in here, only its SHA-256: enough to say whether root's password is the one asked for, and to find the copies.
The drive is known by its label and by the nonce in it, so no other file system is ever erased.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import ssl
import stat
import struct
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any, Iterator  # noqa: UP035  (Python 3.7 has no other)

CONFIG: dict[str, Any] = {}  # home_url, nonce, ca_pem, user, hash_sha256: filled in by `firstboot.render_home_call_script`

RETRY_S, GIVE_UP_S = 2, 600  # the server waits longer than a network needs to come up, and so do we
BLKZEROOUT = 0x127F  # linux/fs.h: zeros by the device where it can, written where it can not
LABEL = b"config-2"
KEPT_UNDER = ("var/lib/cloud", "run/cloud-init", "var/log")  # where cloud-init leaves user data (22.4.2: found by grep)
CRYPT = re.compile(rb"\$[0-9a-z]{1,8}\$[./0-9A-Za-z$=,+-]{20,200}")  # crypt(5)
MIB = 1024 * 1024


def main(root: Path = Path("/")) -> int:
    """The exit status: 0 when the server took the call."""
    home = {
        "boot_id": (root / "proc/sys/kernel/random/boot_id").read_text().strip(),
        "root_disk_serial": find_root_serial(root),
        "ssh_host_keys": list_host_keys(root),
        "password_usable": is_password_usable(root, CONFIG["user"], CONFIG["hash_sha256"]),
    }
    erase_config_drives(root, CONFIG["nonce"])
    erase_copies(root, CONFIG["nonce"], CONFIG["hash_sha256"])
    disable_cloud_init(root)
    os.sync()
    return call_home(home, CONFIG["home_url"], CONFIG["nonce"], CONFIG["ca_pem"])


def find_root_serial(root: Path) -> str:
    """The serial of the disk under /, through partitions, LVM, RAID and dm-crypt; "" where it has none."""
    number = os.stat(root).st_dev
    device = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not device.exists():  # btrfs has a number of its own; its device is in the mount table
        for line in (root / "proc/mounts").read_text().splitlines():
            source, target = line.split()[:2]
            if target == "/" and source.startswith("/dev/"):
                device = (root / "sys/class/block" / os.path.basename(os.path.realpath(source))).resolve()
    return find_serial(device)


def find_serial(device: Path) -> str:
    """The serial of the disk that this block device (its folder in sysfs) lies on."""
    while (device / "slaves").is_dir() and any((device / "slaves").iterdir()):
        device = sorted((device / "slaves").iterdir())[0].resolve()
    if (device / "partition").exists():
        device = device.parent
        return find_serial(device)
    for name in ("serial", "device/serial"):  # virtio-blk; NVMe, padded with blanks
        with contextlib.suppress(OSError):
            return (device / name).read_text().strip()
    with contextlib.suppress(OSError):  # SCSI and SATA: SPC-4, 7.8.15: the serial starts at byte 4
        return (device / "device/vpd_pg80").read_bytes()[4:].decode("ascii", "replace").strip("\0 \n")
    return ""


def list_host_keys(root: Path) -> list[str]:
    """Each key as "TYPE BASE64"."""
    return [" ".join(path.read_text().split()[:2]) for path in sorted((root / "etc/ssh").glob("ssh_host_*_key.pub"))]


def is_password_usable(root: Path, user: str, hash_sha256: str) -> bool:
    """Whether the user's shadow field is the hash that the server sent."""
    fields = (line.split(":") for line in (root / "etc/shadow").read_text().splitlines())
    return any(f[0] == user and hashlib.sha256(f[1].encode()).hexdigest() == hash_sha256 for f in fields)


def erase_config_drives(root: Path, nonce: str) -> None:
    """Every block device that is this run's config drive holds nothing but zeros, on the medium."""
    for block in sorted((root / "sys/class/block").iterdir()):
        path = root / "dev" / block.name
        if not is_our_drive(path, nonce):
            continue
        for line in (root / "proc/mounts").read_text().splitlines():
            if line.split()[0] == str(path):
                os.system(f"umount '{line.split()[1]}'")  # noqa: S605  (no umount(2) in the stdlib)
        size = int((block / "size").read_text()) * 512
        descriptor = os.open(path, os.O_RDWR)
        try:
            zero(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_our_drive(path: Path, nonce: str) -> bool:
    """An ISO 9660 volume labelled config-2 (ECMA-119, 8.4: the label is at byte 40 of sector 16) with our nonce in it."""
    try:
        with open(path, "rb") as f:
            f.seek(32768)
            head = f.read(72)
            if head[1:6] != b"CD001" or head[40:72].strip(b" \0").lower() != LABEL:
                return False
            f.seek(0)
            return nonce.encode() in f.read(8 * MIB)
    except OSError:
        return False


def zero(descriptor: int, size: int) -> None:
    try:
        fcntl.ioctl(descriptor, BLKZEROOUT, struct.pack("QQ", 0, size))
    except OSError:
        os.lseek(descriptor, 0, os.SEEK_SET)
        while size > 0:
            size -= os.write(descriptor, bytes(min(size, MIB)))


def erase_copies(root: Path, nonce: str, hash_sha256: str) -> list[Path]:
    """No file of cloud-init holds the hash or the nonce any more; those that did are zeroed and removed. The account file is not cloud-init's."""
    erased = []
    for path in list_files(root):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if nonce.encode() in data or any(hashlib.sha256(m).hexdigest() == hash_sha256 for m in CRYPT.findall(data)):
            with contextlib.suppress(OSError):  # in place: file systems that copy on write keep the old blocks until they are used again
                with open(path, "r+b") as f:
                    f.write(bytes(len(data)))
                    f.flush()
                    os.fsync(f.fileno())
                path.unlink()
                erased.append(path)
    return erased


def list_files(root: Path) -> Iterator[Path]:
    for folder in KEPT_UNDER:
        for where, _, names in os.walk(root / folder):
            # Regular files alone: /run/cloud-init/hook-hotplug-cmd is a FIFO, and opening it would wait for ever.
            yield from (Path(where, name) for name in names if stat.S_ISREG(os.lstat(os.path.join(where, name)).st_mode))


def disable_cloud_init(root: Path) -> None:
    """Later boots keep what this one set up. Without it cloud-init could take the next boot for a new instance and change host keys and network."""
    if (root / "etc/cloud").is_dir():
        (root / "etc/cloud/cloud-init.disabled").write_text("Set up once, by Repave.\n")


def call_home(home: dict[str, Any], home_url: str, nonce: str, ca_pem: str, *, retry_s: float = RETRY_S, give_up_s: float = GIVE_UP_S) -> int:
    """0 when the server took it; 1 when it said that the run is over (410), or time was up."""
    url = urllib.parse.urlsplit(home_url)
    context = ssl.create_default_context(cadata=ca_pem)
    headers = {"Authorization": "Bearer " + nonce, "Content-Type": "application/json"}
    asked = "X-Repave-Ask"  # as repave.agent.protocol has it: an answer repeats it, or it is another run's
    end = time.monotonic() + give_up_s
    said = ""
    while True:
        connection = http.client.HTTPSConnection(url.hostname or "", url.port, timeout=10, context=context)
        try:
            value = os.urandom(8).hex()
            connection.request("POST", url.path, json.dumps(home), dict(headers, **{asked: value}))
            response = connection.getresponse()
            status = response.status if response.getheader(asked) == value else 0
            outcome = "the server answered %d" % response.status if status else "an answer to another request"  # noqa: UP031
        except (OSError, http.client.HTTPException) as error:
            status, outcome = 0, "no answer: %s" % error  # noqa: UP031
        finally:
            connection.close()
        if outcome != said:
            print("repave: call home:", outcome, flush=True)
            said = outcome
        if 200 <= status < 300:
            return 0
        if status == 410 or time.monotonic() > end:
            return 1
        time.sleep(retry_s)


if __name__ == "__main__":
    sys.exit(main())
