"""The disks of machines, from outside: what is on them, and when it was written."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

MIB = 1 << 20
BLOCK = 4096
_AN_OS_WRITES = 20  # of its own file system's blocks, one in so many at most: host keys, logs, a journal
_EFI_SYSTEM = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"


class Disks:
    """Digests, read again only when a file was written, and the times of writes: each look sees the file's last one."""

    def __init__(self) -> None:
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}
        self._written: dict[Path, int] = {}
        self._writes: dict[Path, list[float]] = {}

    def digest(self, disk: Path) -> str:
        """Of every byte that is not in a hole, and where it is."""
        stat = disk.stat()
        now = (stat.st_mtime_ns, stat.st_size)
        if self._digests.get(disk, (None,))[0] != now:
            self._digests[disk] = (now, digest_of(disk))
        return self._digests[disk][1]

    def look(self, disk: Path) -> None:
        at = disk.stat().st_mtime_ns
        if self._written.setdefault(disk, at) != at:
            self._written[disk] = at
            self._writes.setdefault(disk, []).append(at / 1e9)

    def forget(self, disk: Path) -> None:
        """What was written up to now is of no interest."""
        self._written[disk] = disk.stat().st_mtime_ns
        self._writes[disk] = []

    def writes(self, disk: Path) -> list[float]:
        """Seconds since 1970. Of writes that follow each other faster than the looks, only some."""
        return list(self._writes.get(disk, ()))


def digest_of(disk: Path) -> str:
    """Of every byte that is not in a hole, and where it is."""
    digest = hashlib.sha256()
    for offset, data in read_data(disk):
        digest.update(offset.to_bytes(8, "big") + data)
    return digest.hexdigest()


def read_data(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of what the file holds, holes left out, at most 8 MiB at once."""
    with path.open("rb") as file:
        offset, end = 0, os.fstat(file.fileno()).st_size
        while offset < end:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole
                return
            hole = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
            while offset < hole:
                data = os.pread(file.fileno(), min(8 << 20, hole - offset), offset)
                yield offset, data
                offset += len(data)


def differences(disk: Path, raw: Path) -> list[int]:
    """The MiB of the disk that are not the image's, from the second to its last partition's end; the first has the tables."""
    end, found = max(start + size for start, size, _, _ in read_partitions(raw)), []
    with raw.open("rb") as image, disk.open("rb") as there:
        image.seek(MIB)
        there.seek(MIB)
        for at in range(MIB, end, MIB):
            size = min(MIB, end - at)
            if image.read(size) != there.read(size):
                found.append(at // MIB)
    return found


def find_strange(disk: Path, raw: Path) -> list[str]:
    """What of the image is not on the disk of a real OS, which writes its own file systems while it runs.

    Each partition is where it was, with its type and GUID. The EFI system partition, which the tiny OS does not mount, is the image's to the byte.
    Of the others at most one block in twenty is another.
    """
    found, there = [], read_partitions(disk, fresh=disk.stat().st_mtime_ns)
    for part in read_partitions(raw):
        start, size, kind, guid = part
        if part not in there:
            found.append(f"partition {guid} of the image is not on the disk")
            continue
        changed = count_changed(disk, raw, start, size)
        if changed > (0 if kind == _EFI_SYSTEM else size // BLOCK // _AN_OS_WRITES):
            found.append(f"{changed} of {size // BLOCK} blocks of partition {guid} are not the image's")
    return found


def count_changed(disk: Path, raw: Path, start: int, size: int) -> int:
    changed = 0
    with raw.open("rb") as image, disk.open("rb") as there:
        image.seek(start)
        there.seek(start)
        for at in range(0, size, MIB):
            a, b = image.read(min(MIB, size - at)), there.read(min(MIB, size - at))
            if a != b:
                changed += sum(a[n : n + BLOCK] != b[n : n + BLOCK] for n in range(0, len(a), BLOCK))
    return changed


@cache
def read_partitions(disk: Path, *, fresh: int = 0) -> list[tuple[int, int, str, str]]:
    """Start and size in bytes, type and GUID of each partition, as sfdisk sees it. `fresh`: the time of what was written, of a disk that changes."""
    listed = subprocess.run(["/sbin/sfdisk", "--dump", disk], capture_output=True, text=True, check=False).stdout
    parts = [line.split(":", 1)[1] for line in listed.splitlines() if "start=" in line]
    fields: list[Mapping[str, str]] = [dict(f.strip().split("=", 1) for f in part.split(",") if "=" in f) for part in parts]
    return [(int(f["start"]) * 512, int(f["size"]) * 512, f["type"], f["uuid"]) for f in fields]
