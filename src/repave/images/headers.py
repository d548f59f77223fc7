"""What a file says of itself, read by us before any tool sees it.

`qemu-img convert` copied a local file out through a qcow2 backing file and through a data file, and a 1.2 MB file claimed 64 TiB (measured):
so what is not on the list is refused (raw and qcow2, unless the operator allows more), nothing refers to anything outside itself, and every size is
bounded here.
Source: QEMU docs/interop/qcow2.txt; UEFI 2.10, 5.3.
"""

from __future__ import annotations

import os
import stat
import struct
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from repave.errors import ImageError
from repave.images.foreign import FOREIGN

MIB = 1024 * 1024
MAX_VIRTUAL_BYTES = 2 * 1024**4
ESP_TYPE = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b").bytes_le

_TO_QCOW2 = "convert it: qemu-img convert -O qcow2"
_UNPACK = "unpack it first"
# (offset, magic, name, what to do)
_OTHERS = (
    (0, b"COWD", "a VMDK disk", _TO_QCOW2),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor", _TO_QCOW2),
    (64, b"\x7f\x10\xda\xbe", "a VDI disk", _TO_QCOW2),
    (0, b"QED\0", "a QED disk", _TO_QCOW2),
    (0, b"WithoutFreeSpace", "a Parallels disk", _TO_QCOW2),
    (0, b"WithouFreSpacExt", "a Parallels disk", _TO_QCOW2),
    (0, b"LUKS\xba\xbe", "a LUKS volume", "import the disk it holds, not encrypted"),
    (0, b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (0, b"\xfd7zXZ\0", "compressed with xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (0, b"BZh", "compressed with bzip2", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (32769, b"CD001", "a CD image", "import an installed disk, not an installer"),
)


FORMATS = ("qcow2", "raw")  # what is taken unless the operator allows more
_SAID = {"qcow2": "a qcow2 disk", "raw": "raw", "vmdk": "a VMDK disk", "vhd": "a VHD disk", "vhdx": "a VHDX disk"}


FileState = tuple[int, int, int]  # opaque


@dataclass(frozen=True)
class ImageHeader:
    """What we know of a file that may be imported. Of all but raw, the last three are known only from the disk inside: 0, "" and False."""

    format: str  # raw, qcow2, vmdk, vhd, vhdx
    virtual_size_bytes: int
    sector_bytes: int = 0  # 512, 4096
    table: str = ""  # gpt, mbr
    has_esp: bool = False


def read_file_state(fd: int) -> FileState:
    """Equal before and after: nobody has written to the file in between. The kernel sets ctime, and nobody else can."""
    found = os.fstat(fd)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size


def open_image(path: Path) -> int:
    """A descriptor of a regular file, no symbolic link. Raises ImageError image-missing or image-refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise ImageError("image-missing", f"{path.name} can not be opened: {e.strerror}.") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError("image-refused", f"{path.name} is not a regular file.")
    return fd


def read_header(path: Path, *, formats: Collection[str] = FORMATS, max_virtual_bytes: int = MAX_VIRTUAL_BYTES) -> ImageHeader:
    """Raises ImageError image-refused (the detail says what to do) or image-missing."""
    fd = open_image(path)
    try:
        return read_header_of(fd, formats=formats, max_virtual_bytes=max_virtual_bytes)
    finally:
        os.close(fd)


def read_header_of(fd: int, *, formats: Collection[str] = FORMATS, max_virtual_bytes: int = MAX_VIRTUAL_BYTES) -> ImageHeader:
    """The same of an open file, so that what was checked is what is used."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, MIB, 0)
    kind = _detect(head, os.pread(fd, 512, max(size - 512, 0)))
    if kind not in formats:
        raise _refused(f"The file is {_SAID[kind]}, which the setting image_formats does not allow: allow it, or {_TO_QCOW2}")
    if kind in FOREIGN:
        header = ImageHeader(kind, FOREIGN[kind](fd, size))
    elif kind == "qcow2":
        header = _qcow2(head, size)
    else:
        header = _raw(head, size)
    if not 0 < header.virtual_size_bytes <= max_virtual_bytes:
        raise _refused(f"The disk has {header.virtual_size_bytes} bytes; {max_virtual_bytes} are allowed: shrink it")
    return header


def read_inner_header(read: Callable[[int, int], bytes | bytearray], size: int, outer: ImageHeader) -> ImageHeader:
    """What the disk inside an image says of itself: it must be the disk that the outer header announced, and no image again."""
    head, tail = bytes(read(0, min(MIB, size))), bytes(read(max(size - 512, 0), min(512, size)))
    if _detect(head, tail) != "raw" or size - outer.virtual_size_bytes not in range(512):
        raise _refused(f"The {outer.format} holds something else than a disk of the size that it names")
    return _raw(head, size)


def _detect(head: bytes, tail: bytes) -> str:
    """Its format, raw where nothing says another. Raises where it is one that nobody may allow."""
    for offset, magic, name, fix in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            raise _refused(f"The file is {name}: {fix}")
    if tail[:4] == b"koly":
        raise _refused(f"The file is a DMG disk: {_TO_QCOW2}")
    for magic, kind in ((b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"conectix", "vhd")):
        if head.startswith(magic):
            return kind
    return "vhd" if tail[:8] == b"conectix" else "raw"


def _qcow2(head: bytes, file_bytes: int) -> ImageHeader:
    if len(head) < 104:
        raise _refused("The qcow2 header is cut off")
    version, backing, _, cluster_bits, virtual, crypt, l1_entries, l1_offset = struct.unpack_from(">IQIIQIIQ", head, 4)
    if version not in (2, 3):
        raise _refused(f"qcow{'' if version == 1 else '2'} version {version} is not read: {_TO_QCOW2}")
    if backing:
        raise _refused("The qcow2 needs a backing file: make it whole with qemu-img convert -O qcow2")
    if crypt:
        raise _refused("The qcow2 is encrypted: import it not encrypted")
    incompatible = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    if incompatible & 1 << 2:
        raise _refused("The qcow2 keeps its data in another file: make it whole with qemu-img convert -O qcow2")
    # Bits we know: 0 dirty, 1 corrupt, 3 compression type, 4 extended L2. A dirty one may still be repaired, a corrupt one is refused.
    if incompatible & ~(1 | 1 << 3 | 1 << 4):
        raise _refused("The qcow2 is marked corrupt or needs features that are not known: try qemu-img check -r all")
    if not 9 <= cluster_bits <= 21:
        raise _refused(f"The qcow2 has clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible")
    # One L1 entry points to one cluster of L2 entries (8 bytes each, 16 where extended), each to one cluster of data.
    entry_bytes = 16 if incompatible & 1 << 4 else 8
    per_l1 = (1 << cluster_bits) // entry_bytes << cluster_bits
    if not virtual or l1_entries > 32 * MIB // 8 or l1_entries < -(-virtual // per_l1):
        raise _refused("The qcow2's size and its L1 table do not fit")
    if l1_offset % (1 << cluster_bits) or l1_offset + l1_entries * 8 > file_bytes:
        raise _refused("The qcow2's L1 table is outside the file: it is cut off or damaged")
    return ImageHeader("qcow2", virtual)


def _raw(head: bytes, size: int) -> ImageHeader:
    if not size or size % 512:
        raise _refused(f"The file has {size} bytes, no whole number of 512-byte sectors: it is cut off or no disk")
    if head[510:512] != b"\x55\xaa":
        raise _refused("The file holds no partition table: import a whole disk, raw or qcow2")
    for sector in (512, 4096):
        if head[sector : sector + 8] == b"EFI PART":
            if size % sector:
                raise _refused(f"The disk has {size} bytes, no whole number of its {sector}-byte sectors: it is cut off")
            return ImageHeader("raw", size, sector, "gpt", _has_esp(head, sector))
    return ImageHeader("raw", size, 512, "mbr")


def _has_esp(head: bytes, sector: int) -> bool:
    at, count, entry_bytes = struct.unpack_from("<QII", head, sector + 72)
    start = at * sector
    return entry_bytes >= 128 and any(head[e : e + 16] == ESP_TYPE for e in range(start, min(start + count * entry_bytes, len(head)), entry_bytes))


def _refused(sentence: str) -> ImageError:
    return ImageError("image-refused", f"{sentence}.")
