"""Archives in cpio's `newc` format, the one the Linux kernel unpacks into its first file system. The same entries give the same bytes.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_ALIGN = 4


@dataclass(frozen=True)
class Entry:
    """One file. `data` is the content, or a symbolic link's target. `device` is (major, minor) of a device node."""

    mode: int  # type and permissions, as in stat
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(data: bytes, *, mode: int = 0o644) -> Entry:
    return Entry(stat.S_IFREG | mode, data)


def symlink(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def directory(mode: int = 0o755) -> Entry:
    return Entry(stat.S_IFDIR | mode)


def render_archive(entries: Mapping[str, Entry]) -> bytes:
    """`entries` by path without a leading slash. Missing parent directories are added, root owns everything, times are 0."""
    complete = dict(entries)
    for path in entries:
        for parent in PurePosixPath(path).parents:
            if str(parent) != ".":
                complete.setdefault(str(parent), directory())
    parts = [_render(number, path, complete[path]) for number, path in enumerate(sorted(complete), start=1)]
    return b"".join(parts) + _render(0, "TRAILER!!!", Entry(0))


def _render(number: int, path: str, entry: Entry) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, size, device of the file system, device of the node, length of the name, checksum (unused)
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _pad(header + name) + _pad(entry.data)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)
