"""VMDK, VHD and VHDX: what their headers say, read by us before qemu sees the file. An operator may allow them (`image_formats`).

One file that is the whole disk: no other extents, no parent. Every table that qemu would read is bounded and inside the file.
Sources: VMware Virtual Disk Format 1.1; Microsoft's VHD specification 1.0, MS-VHDX.
"""

from __future__ import annotations

import os
import re
import struct
import uuid

from repave.errors import ImageError

_SECTOR = 512
_MOST_TABLE_BYTES = 16 * 1024**2
_NONE32, _NONE64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_WHOLE = "make it whole with qemu-img convert -O qcow2"
_VHDX_ITEM = {
    name: uuid.UUID(value).bytes_le
    for name, value in {
        "metadata": "8b7ca206-4790-4b9a-b8fe-575f050f886e",
        "parameters": "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
        "size": "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
        "parent": "a8d35f2d-b30b-454d-abf7-d3d84834ab0c",
    }.items()
}


def read_vmdk_size(fd: int, file_bytes: int) -> int:
    """Bytes of the disk in a monolithicSparse or streamOptimized VMDK. Raises ImageError image-refused."""
    head = _read(fd, 0, _SECTOR)
    version, _, capacity, grain, described_at, described = struct.unpack_from("<IIQQQQ", head, 4)
    if version not in (1, 2, 3) or not capacity or not 8 <= grain <= 1 << 16 or grain & (grain - 1):
        raise _refused("The VMDK's header is damaged, or its data are in other files")  # qemu takes extents from the descriptor where capacity is 0
    if not described_at or not 0 < described <= 128 or (described_at + described) * _SECTOR > file_bytes:
        raise _refused("The VMDK has no descriptor")
    text = _read(fd, described_at * _SECTOR, described * _SECTOR).split(b"\0")[0].decode("latin-1")
    kind = re.search(r'^\s*createType\s*=\s*"?([^"\r\n]*)', text, re.M | re.I)
    if kind is None or kind[1] not in ("monolithicSparse", "streamOptimized"):
        raise _refused(f"The VMDK is {kind[1][:40] if kind else 'of no known kind'}, not one whole file: {_WHOLE}")
    parents = re.findall(r"^\s*parentCID\s*=\s*(\S+)", text, re.M | re.I)
    if any(p.lower() != "ffffffff" for p in parents) or re.search("parentFileNameHint", text, re.I):
        raise _refused(f"The VMDK needs a parent: {_WHOLE}")
    extents = re.findall(r"^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+(\S+)", text, re.M | re.I)
    if [e.upper() for e in extents] != ["SPARSE"]:
        raise _refused(f"The VMDK has extents in other files: {_WHOLE}")
    return int(capacity) * _SECTOR


def read_vhd_size(fd: int, file_bytes: int) -> int:
    """Bytes of the disk in a fixed or dynamic VHD. Raises ImageError image-refused."""
    if file_bytes < 2 * _SECTOR:
        raise _refused("The VHD is cut off")
    footer = _read(fd, file_bytes - _SECTOR, _SECTOR)
    if footer[:8] != b"conectix" or struct.unpack_from(">I", footer, 64)[0] != ~(sum(footer) - sum(footer[64:68])) & _NONE32:
        raise _refused("The VHD's footer is missing or damaged: it is cut off")
    header_at, size, kind = *struct.unpack_from(">Q", footer, 16), *struct.unpack_from(">Q", footer, 48), *struct.unpack_from(">I", footer, 60)
    if kind == 2:
        if size != file_bytes - _SECTOR:
            raise _refused("The VHD's size and its file's do not fit: it is cut off or damaged")
        return int(size)
    if kind != 3:
        raise _refused(f"The VHD is a difference to another: {_WHOLE}")
    if _read(fd, 0, _SECTOR) != footer:
        raise _refused("The VHD's two footers differ")
    header = _read(fd, header_at, 1024)
    table_at, _, entries, block = struct.unpack_from(">QIII", header, 16)
    if header[:8] != b"cxsparse" or any(header[40:56]) or not 1 << 19 <= block <= 1 << 28 or block & (block - 1) or entries * block < size:
        raise _refused("The VHD's header is damaged, or it needs a parent")
    if entries * 4 > _MOST_TABLE_BYTES:
        raise _refused("The VHD's table is too large")
    bitmap = -(-block // _SECTOR // 8 // _SECTOR) * _SECTOR
    for (sector,) in struct.iter_unpack(">I", _read(fd, table_at, entries * 4)):  # qemu-img check knows no VHD, and qemu reads zeros behind the end
        if sector != _NONE32 and sector * _SECTOR + bitmap + block > file_bytes:
            raise _refused("The VHD's data end behind the file: it is cut off")
    return int(size)


def read_vhdx_size(fd: int, file_bytes: int) -> int:
    """Bytes of the disk in a VHDX without a parent. Raises ImageError image-refused. That its blocks are inside the file, qemu looks itself."""
    regions = _read(fd, 192 * 1024, 64 * 1024)
    count = min(struct.unpack_from("<I", regions, 8)[0], 2047) if regions[:4] == b"regi" else 0
    found = {regions[e : e + 16]: struct.unpack_from("<Q", regions, e + 16)[0] for e in range(16, 16 + 32 * count, 32)}
    if _VHDX_ITEM["metadata"] not in found:
        raise _refused("The VHDX's table of regions is damaged")
    at = found[_VHDX_ITEM["metadata"]]
    table = _read(fd, at, 64 * 1024)
    if table[:8] != b"metadata":
        raise _refused("The VHDX's metadata are damaged")
    count = min(struct.unpack_from("<H", table, 10)[0], 2047)
    items = {table[e : e + 16]: struct.unpack_from("<I", table, e + 16)[0] for e in range(32, 32 + 32 * count, 32)}
    if not {_VHDX_ITEM["parameters"], _VHDX_ITEM["size"]} <= items.keys():
        raise _refused("The VHDX does not name its size")
    _, flags = struct.unpack("<II", _read(fd, at + items[_VHDX_ITEM["parameters"]], 8))
    if flags & 2 or _VHDX_ITEM["parent"] in items:
        raise _refused(f"The VHDX is a difference to another: {_WHOLE}")
    size: int = struct.unpack("<Q", _read(fd, at + items[_VHDX_ITEM["size"]], 8))[0]
    return size


def _read(fd: int, offset: int, count: int) -> bytes:
    data = os.pread(fd, count, offset) if offset < 1 << 62 else b""
    if len(data) != count:
        raise _refused("The file is cut off or damaged")
    return data


def _refused(sentence: str) -> ImageError:
    return ImageError("image-refused", f"{sentence}.")


FOREIGN = {"vmdk": read_vmdk_size, "vhd": read_vhd_size, "vhdx": read_vhdx_size}
