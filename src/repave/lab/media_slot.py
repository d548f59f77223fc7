"""What a run laid into boot media, found the way a ramdisk sees it: a file in a cpio archive, wherever it lies on the disc."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from repave.agent.protocol import SLOT_FILE

_MAGIC = b"070701"  # cpio's "newc" format, cpio(5): a header of 110 bytes, 13 fields of 8 hex digits after the magic
_HEADER_BYTES = 110


def find_slot(iso: Path) -> str | None:
    """The text of the slot on these media, or None where they carry no live run."""
    with iso.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as disc:
        at = disc.find(SLOT_FILE.encode() + b"\0")
        while at >= 0:
            text = _read_member(disc, at)
            if text is not None:
                return text
            at = disc.find(SLOT_FILE.encode() + b"\0", at + 1)
    return None


def _read_member(disc: mmap.mmap, name_at: int) -> str | None:
    """The file whose name is at `name_at`, if that is a cpio member and holds a JSON object. The name may begin with "./"."""
    start = disc.rfind(_MAGIC, max(0, name_at - _HEADER_BYTES - 2), name_at)
    if start < 0:
        return None
    try:
        size, name_bytes = int(disc[start + 54 : start + 62], 16), int(disc[start + 94 : start + 102], 16)
        data_at = start + (_HEADER_BYTES + name_bytes + 3) // 4 * 4
        text = disc[data_at : data_at + size].decode().strip("\0 \n")
        return text if isinstance(json.loads(text), dict) else None
    except ValueError:
        return None
