"""UEFI boot variables through efivarfs: which disk boots today, an entry for the disk we wrote, BootNext for the way back.

The files are read and written directly, as efibootmgr does; efibootmgr itself can not name a disk whose partition table is not there yet,
and ours is written last. Stdlib only. A variable's file holds 4 bytes of attributes, then its value.
Source: UEFI 2.10, 3.1.3 (EFI_LOAD_OPTION), 3.3 (BootOrder, BootNext), 10.3.5.1 (hard drive media path).
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from repave.agent.gpt import ESP, Partition

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"  # EFI_GLOBAL_VARIABLE
LOADERS = {"amd64": "\\EFI\\BOOT\\BOOTX64.EFI", "arm64": "\\EFI\\BOOT\\BOOTAA64.EFI"}  # UEFI 2.10, 3.5.1.1
_ATTRIBUTES = struct.pack("<I", 7)  # non-volatile, boot services, runtime
_ACTIVE = 1  # LOAD_OPTION_ACTIVE
_HARD_DRIVE = struct.Struct("<BBHIQQ16sBB")  # type 4, subtype 1, 42 bytes
_END = struct.pack("<BBH", 0x7F, 0xFF, 4)


class BootEntry(NamedTuple):
    number: int
    label: str
    partition_guid: uuid.UUID | None  # None: not a partition of a GPT disk


def parse_load_option(number: int, value: bytes) -> BootEntry:
    """Raises ValueError or struct.error on a value that is no EFI_LOAD_OPTION."""
    _, paths_bytes = struct.unpack_from("<IH", value)
    end = next(i for i in range(6, len(value) - 1, 2) if value[i : i + 2] == b"\0\0") if len(value) > 7 else 6
    label = value[6:end].decode("utf-16-le", errors="replace")
    guid = None
    offset, stop = end + 2, min(end + 2 + paths_bytes, len(value))
    while offset + 4 <= stop:
        kind, subtype, length = struct.unpack_from("<BBH", value, offset)
        if length < 4 or kind == 0x7F:
            break
        if (kind, subtype, length) == (4, 1, _HARD_DRIVE.size) and offset + length <= stop:
            *_, signature, _, signature_type = _HARD_DRIVE.unpack_from(value, offset)
            guid = uuid.UUID(bytes_le=signature) if signature_type == 2 else None
        offset += length
    return BootEntry(number, label, guid)


def render_load_option(label: str, esp: Partition, loader: str) -> bytes:
    file_path = (loader + "\0").encode("utf-16-le")
    path = _HARD_DRIVE.pack(4, 1, _HARD_DRIVE.size, esp.number, esp.first_lba, esp.last_lba - esp.first_lba + 1, esp.guid.bytes_le, 2, 2)
    path += struct.pack("<BBH", 4, 4, 4 + len(file_path)) + file_path + _END
    return struct.pack("<IH", _ACTIVE, len(path)) + (label + "\0").encode("utf-16-le") + path


class BootVariables:
    """The variables of one firmware, as files in `folder` (/sys/firmware/efi/efivars). OSError where the firmware refuses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list_entries(self) -> list[BootEntry]:
        """In the firmware's order; entries outside BootOrder are not listed."""
        return self._parse(self.order())

    def _parse(self, numbers: Iterable[int]) -> list[BootEntry]:
        entries = []
        for number in numbers:
            try:
                entries.append(parse_load_option(number, self._read(f"Boot{number:04X}")))
            except (ValueError, struct.error, StopIteration):
                continue
        return entries

    def order(self) -> list[int]:
        value = self._read("BootOrder")
        return list(struct.unpack(f"<{len(value) // 2}H", value[: len(value) // 2 * 2]))

    def add_first(self, label: str, esp: Partition, loader: str) -> int:
        """The entry `label`, alone of that name, is first in the boot order. Repeatable. Returns its number."""
        number, order = self._create(label, esp, loader)
        self._write("BootOrder", struct.pack(f"<{len(order) + 1}H", number, *order))
        return number

    def boot_next(self, number: int) -> None:
        """The next boot, and only that, uses the entry; it wins over a CD that is still inserted."""
        self._write("BootNext", struct.pack("<H", number))

    def boot_next_from(self, label: str, esp: Partition, loader: str) -> int:
        """As `boot_next`, with an entry of our own that stays out of the boot order."""
        number, order = self._create(label, esp, loader)
        if order != self.order():
            self._write("BootOrder", struct.pack(f"<{len(order)}H", *order))
        self.boot_next(number)
        return number

    def _create(self, label: str, esp: Partition, loader: str) -> tuple[int, list[int]]:
        """Writes the entry to the number our earlier one has, or a free one; returns it and the boot order without entries of that label."""
        names = (p.name for p in self._folder.glob(f"Boot*-{GLOBAL}"))
        used = sorted(int(n[4:8], 16) for n in names if re.fullmatch(rf"Boot[0-9A-Fa-f]{{4}}-{GLOBAL}", n))
        ours = [e.number for e in self._parse(used) if e.label == label]
        order = [n for n in self.order() if n not in ours]
        number = ours[0] if ours else next(n for n in range(0x10000) if n not in used)
        for extra in ours[1:]:
            self._path(f"Boot{extra:04X}").unlink(missing_ok=True)
        self._write(f"Boot{number:04X}", render_load_option(label, esp, loader))
        return number, order

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}-{GLOBAL}"

    def _read(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()[4:]
        except OSError:
            return b""

    def _write(self, name: str, value: bytes) -> None:
        """One write call: efivarfs takes each write as a whole variable."""
        with open(self._path(name), "wb", buffering=0) as file:
            file.write(_ATTRIBUTES + value)


def find_esp(partitions: Sequence[Partition]) -> Partition | None:
    return next((p for p in partitions if p.type_guid == ESP), None)
