"""What the agent can do to the server it runs on: the contract, the real server, and a server made of plain files for scripted racks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from repave.agent.efi import LOADERS, BootVariables, find_esp
from repave.agent.gpt import Partition
from repave.agent.inventory import Roots, find_booting_partition, read_disks, read_inventory, read_partitions, read_sound_partitions
from repave.agent.protocol import Disk, Inventory
from repave.agent.target import BLKGETSIZE64
from repave.errors import RunFailed

BLKROSET = 0x125D  # linux/fs.h
LOCAL_LABEL = "repave local disk"


class OpenDisk(NamedTuple):
    """`path` leads to one disk and no other, however names move. `verify` raises RunFailed disk-changed where it is not that disk any more."""

    path: Path
    verify: Callable[[], None]


class Machine(Protocol):
    """The far end of the agent. Nothing but `write_image`, on the path that `open_disk` gives, writes to a disk."""

    def read_inventory(self) -> Inventory: ...

    def open_disk(self, disk: Disk) -> contextlib.AbstractContextManager[OpenDisk]:
        """`disk`, while the context lasts. Raises RunFailed disk-changed."""

    def protect_others(self, disk: Disk) -> list[str]:
        """Every whole disk but `disk` is read-only for this boot. Returns what could not be protected, as sentences."""

    def set_boot_entry(self, label: str, partitions: Sequence[Partition]) -> str:
        """The firmware boots the ESP among `partitions` first. Returns what was done. OSError where the firmware refuses."""

    def boot_local_disk(self) -> None:
        """Reboots into what is installed on this server, not into our media again."""

    def power_off(self) -> None: ...


def is_ramdisk(mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether we run from an initramfs, not from an installed system: the agent's every ending reboots or powers off (proc(5), kernel: ramfs-rootfs)."""
    try:
        roots = [fields[2] for line in mounts.read_text().splitlines() if len(fields := line.split()) > 2 and fields[1] == "/"]
    except OSError:
        return False
    return bool(roots) and roots[-1] == "rootfs"


class RealMachine:
    """The server we run on. `roots` are parameters for tests; ioctl and reboot are the kernel's."""

    def __init__(self, roots: Roots | None = None) -> None:
        self._roots = roots or Roots()
        self._boot = BootVariables(self._roots.efivars)

    def read_inventory(self) -> Inventory:
        return read_inventory(self._roots)

    @contextlib.contextmanager
    def open_disk(self, disk: Disk) -> Iterator[OpenDisk]:
        """Holds a descriptor and gives /proc/self/fd/N, so that what was verified is what is written, even if names are dealt anew."""
        try:
            fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            _disk_changed(f"{disk.path} can not be opened: {error.strerror}.")
        try:
            self._verify_identity(fd, disk)
            yield OpenDisk(Path(f"/proc/self/fd/{fd}"), lambda: self._verify_identity(fd, disk))
        finally:
            os.close(fd)

    def _verify_identity(self, fd: int, disk: Disk) -> None:
        """The descriptor is the block device whose serial, WWN and size sysfs shows now."""
        opened = os.fstat(fd)
        if not stat.S_ISBLK(opened.st_mode):
            _disk_changed(f"{disk.path} is not a block device.")
        devt = f"{os.major(opened.st_rdev)}:{os.minor(opened.st_rdev)}"
        name = Path(disk.path).relative_to(self._roots.dev).as_posix().replace("/", "!")
        try:
            shown = (self._roots.sys / "block" / name / "dev").read_text().strip()
        except OSError:
            _disk_changed(f"{disk.path} is gone.")
        if shown != devt:
            _disk_changed(f"{disk.path} is {devt}, the kernel lists {shown}.")
        (size,) = struct.unpack("<Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
        now = [d for d in read_disks(self._roots) if d.path == disk.path]
        if size != disk.size_bytes or [(d.serial, d.wwn, d.size_bytes) for d in now] != [(disk.serial, disk.wwn, disk.size_bytes)]:
            _disk_changed(f"{disk.path} has another serial or size than a moment ago.")

    def protect_others(self, disk: Disk) -> list[str]:
        notes = []
        for other in read_disks(self._roots):
            if other.path == disk.path or other.read_only or not other.size_bytes:
                continue
            try:
                fd = os.open(other.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, BLKROSET, struct.pack("i", 1))
                finally:
                    os.close(fd)
            except OSError as error:
                notes.append(f"{other.path} could not be made read-only: {error.strerror}")
        return notes

    def set_boot_entry(self, label: str, partitions: Sequence[Partition]) -> str:
        esp = find_esp(partitions)
        if esp is None or not self._roots.efivars.is_dir():
            return "none: no UEFI variables, or no EFI system partition"
        loader = LOADERS[self.read_inventory().arch]
        number = self._boot.add_first(label, esp, loader)
        return f"Boot{number:04X} {label}: partition {esp.number}, {loader}"

    def boot_local_disk(self) -> None:
        """BootNext, because the media are still in the drive and firmware may prefer them. Its failure must not stop the reboot."""
        try:
            self._set_boot_next()
        finally:
            os.sync()
            subprocess.run(["reboot", "-f"], check=True)

    def _set_boot_next(self) -> None:
        disks = [d for d in read_disks(self._roots) if not d.removable and not d.virtual]
        if not self._roots.efivars.is_dir():
            return
        today = find_booting_partition(self._roots, disks)
        if today is not None:
            self._boot.boot_next(today[0])
            return
        for disk in disks:
            esp = find_esp(read_partitions(Path(disk.path), disk.sector_bytes))
            if esp is not None:
                self._boot.boot_next_from(LOCAL_LABEL, esp, LOADERS[self.read_inventory().arch])
                return

    def power_off(self) -> None:
        os.sync()
        subprocess.run(["poweroff", "-f"], check=True)


class FileMachine:
    """A server made of files, for scripted racks and tests: the agent's real code without a kernel of its own.

    The file: {"serial", "uuid", "macs": [], "disks": [{"path", "size_bytes", "serial", ...Disk}], and optionally arch, firmware,
    memory_bytes, boot_id, state_path}. A disk that is missing is made. `state_path` (default: the file's name + ".state") tells the
    scripted BMC what the server did: {"ended": "power-off" | "boot-local", "boot_entry": LABEL or null, "read_only": [PATHS]}.
    """

    def __init__(self, path: Path) -> None:
        self._value: dict[str, Any] = json.loads(path.read_text())
        self._state_path = Path(self._value.get("state_path", f"{path}.state"))
        self._state: dict[str, Any] = {"ended": None, "boot_entry": None, "read_only": []}
        self._boot_id = self._value.get("boot_id") or str(uuid.uuid4())
        for disk in self._value["disks"]:
            file = Path(disk["path"])
            if not file.exists():
                file.touch(mode=0o600)
                os.truncate(file, disk["size_bytes"])

    def read_inventory(self) -> Inventory:
        value = self._value
        disks = tuple(self._read_disk({"sector_bytes": 512} | d) for d in value["disks"])
        return Inventory(
            boot_id=self._boot_id, serial=value["serial"], uuid=value["uuid"], macs=tuple(value["macs"]), arch=value.get("arch", "amd64"),
            firmware=value.get("firmware", "uefi"), memory_bytes=value.get("memory_bytes", 2**30), disks=disks, uptime_s=1.0,
        )  # fmt: skip

    @staticmethod
    def _read_disk(value: dict[str, Any]) -> Disk:
        file = Path(value["path"])
        partitions = tuple(p.as_json() for p in read_sound_partitions(file, value["sector_bytes"]))
        return Disk(**value | {"size_bytes": file.stat().st_size, "partitions": partitions})

    @contextlib.contextmanager
    def open_disk(self, disk: Disk) -> Iterator[OpenDisk]:
        path = Path(disk.path)

        def verify() -> None:
            if not path.is_file() or path.stat().st_size != disk.size_bytes:
                _disk_changed(f"{disk.path} is gone.")

        verify()
        yield OpenDisk(path, verify)

    def protect_others(self, disk: Disk) -> list[str]:
        self._write_state(read_only=[d["path"] for d in self._value["disks"] if d["path"] != disk.path])
        return []

    def set_boot_entry(self, label: str, partitions: Sequence[Partition]) -> str:
        if find_esp(partitions) is None:
            return "none: no EFI system partition"
        self._write_state(boot_entry=label)
        return label

    def boot_local_disk(self) -> None:
        self._write_state(ended="boot-local")

    def power_off(self) -> None:
        self._write_state(ended="power-off")

    def _write_state(self, **changes: Any) -> None:
        """Whole or not at all: the scripted BMC may be reading."""
        self._state |= changes
        fresh = Path(f"{self._state_path}.new")
        fresh.write_text(json.dumps(self._state))
        fresh.replace(self._state_path)


def _disk_changed(detail: str) -> NoReturn:
    raise RunFailed("disk-changed", detail)
