"""Importing a qcow2 beside `qemu-img convert -O raw` and `zstd -T0`: the same bytes in, the same compressed disk out.

Ours does more: damage check, digests of every piece and of its content, pieces flushed to the disk. It is measured as `repave image pack`, with
the start of Python.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from bench.scripted_batch import describe_machine
from repave.lab.os_images import build_debian

GOAL = 0.8


def main(rounds: int = 5) -> None:
    """Prints one table. 2 minutes on 2 cores."""
    folder = Path(tempfile.mkdtemp(prefix="rpb-", dir="/tmp"))
    try:
        image = build_debian(Path(os.environ.get("REPAVE_CACHE", ".repave/cache")).resolve(), progress=lambda line: None)
        zlib = folder / "zlib.qcow2"  # as distributions publish them
        subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", image, zlib], check=True)
        print(f"{rounds} rounds in turn; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}; medians, seconds")
        for name, path in (("zstd clusters", image), ("zlib clusters", zlib)):
            ours, reference = [], []
            for _ in range(rounds):
                reference.append(_by_hand(path, folder))
                ours.append(_pack(path, folder))
            _show(name, ours, reference)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _by_hand(image: Path, folder: Path) -> tuple[float, float]:
    raw, packed = folder / "disk", folder / "disk.zst"
    seconds, cpu_s = _time(["sh", "-ec", 'qemu-img convert -O raw "$1" "$2"; zstd -q -T0 "$2" -o "$3"', "sh", image, raw, packed])
    raw.unlink()
    packed.unlink()
    return seconds, cpu_s


def _pack(image: Path, folder: Path) -> tuple[float, float]:
    result = _time([sys.executable, "-m", "repave.cli.main", "image", "pack", image, folder / "store"])
    shutil.rmtree(folder / "store")
    return result


def _time(argv: Sequence[str | Path]) -> tuple[float, float]:
    """Wall and CPU seconds of a process and its children."""
    before, began = os.times(), time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.monotonic() - began, os.times()
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


def _show(name: str, ours: list[tuple[float, float]], reference: list[tuple[float, float]]) -> None:
    print(f"\n  {name:<16}{'ours':>8}{'reference':>11}{'ratio':>8}")
    for what, part in (("wall", 0), ("CPU", 1)):
        mine, theirs = [t[part] for t in ours], [t[part] for t in reference]
        ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
        ratio = statistics.median(mine) / statistics.median(theirs)
        goal = f"  (goal {GOAL})" if what == "wall" else ""
        row = f"  {what:<16}{statistics.median(mine):>8.2f}{statistics.median(theirs):>11.2f}{ratio:>8.2f}  (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{row}{goal}", flush=True)
