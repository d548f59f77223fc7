"""An image with more than one chunk to fetch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from repave.lab import scripted_os

MIB = 1 << 20


def build_wide_image(path: Path, marker: str) -> Path:
    """A scripted OS with a second partition that no compressor makes smaller."""
    scripted_os.build_image(path, marker)
    with path.open("r+b") as out:
        out.truncate(40 * MIB)
        out.seek(10 * MIB)
        out.write(os.urandom(24 * MIB))
    table = f"label: gpt\nstart=2048, size=16384, type=uefi\nstart={10 * MIB // 512}, size={24 * MIB // 512}, type=linux\n"
    subprocess.run(["/sbin/sfdisk", "-q", "--wipe=never", "--wipe-partitions=never", path], input=table, text=True, capture_output=True, check=True)
    return path
