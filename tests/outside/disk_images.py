"""Disks as files for the tests of images and the writer. GPTs are made by sfdisk, not by our code."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

MIB = 1024 * 1024


def make_disk(path: Path, size_bytes: int, *, sector_bytes: int = 512, seed: int | None = None) -> Path:
    """A sparse GPT disk: ESP from 1 MiB, a Linux partition behind it. With `seed`: data in islands of odd sizes between holes."""
    path.unlink(missing_ok=True)
    with path.open("xb") as f:
        f.truncate(size_bytes)
    if sector_bytes == 512:
        subprocess.run(["sfdisk", "-q", path], input=b"label: gpt\nstart=1MiB, size=8MiB, type=uefi\ntype=linux\n", check=True)
    else:
        # Debian 12's sfdisk knows no other sector size; fdisk does
        fdisk(path, sector_bytes, "g", "n", "1", "256", "+8M", "t", "uefi", "n", "2", "", "", "w")
    if seed is not None:
        rng = random.Random(seed)
        with path.open("r+b") as f:
            for at in (MIB, 6 * MIB + 4096, 13 * MIB - 777, 21 * MIB, size_bytes - 2 * MIB):
                f.seek(at)
                f.write(rng.randbytes(rng.randrange(1000, 1_500_000) if at < size_bytes - 3 * MIB else MIB))
    return path


def fdisk(path: Path, sector_bytes: int, *commands: str) -> str:
    """What fdisk said. Its exit status says nothing."""
    argv = ["fdisk", f"--sector-size={sector_bytes}", path]
    return subprocess.run(argv, input="\n".join(commands) + "\n", capture_output=True, text=True, env={"LC_ALL": "C", "PATH": os.environ["PATH"]}).stdout


def old_disk(path: Path, size_bytes: int) -> Path:
    """A disk full of another owner's data, with a whole GPT: also the backup at its end."""
    block = random.Random(1).randbytes(MIB)
    with path.open("wb") as f:
        while f.tell() < size_bytes:
            f.write(block[: size_bytes - f.tell()])
    subprocess.run(["sfdisk", "-q", "--wipe=never", path], input=b"label: gpt\nstart=1MiB, size=8MiB, type=uefi\ntype=linux\n", check=True)
    assert path.read_bytes()[-512:][:8] == b"EFI PART"
    return path


def allocated_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512
