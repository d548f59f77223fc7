"""The recordings that are judged: images and old disks of many shapes, written by the agent's real writer in QEMU and on the host."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import record_in_qemu
from bootable_disks import MIB, Layout, make_esp, write_os
from crash_states import CrashedDisk, Recording, plan_states
from write_log import read_epochs

# The old disk. "esp-behind" is the trap of finding 1: all of the old ESP lies where the new image never writes, its backup table at the end.
OLD_DISKS = ("esp-behind", "gpt", "mbr", "cd", "half-written", "no-os")
SOURCE = Path(__file__).parents[2] / "src"


def make_image(folder: Path, sector_bytes: int, seed: int) -> tuple[Path, str]:
    """An image of 14 to 24 MiB with islands of data, and what its loader says."""
    rng = random.Random(seed)
    size = rng.randint(14, 24)
    islands = tuple((rng.randrange(9 * 256, size * 256) * 4, rng.randrange(1000, 1_500_000)) for _ in range(4))
    name = f"new-{seed}"
    return write_os(folder / "image", Layout(size, esp_at=rng.choice((1, size - 9)), data=islands), name=name, sector_bytes=sector_bytes, seed=seed), name


def make_old_disk(folder: Path, kind: str, sector_bytes: int, seed: int) -> tuple[Path, str]:
    """A disk of 36 to 44 MiB full of old data, and what its loader says; "" where it does not boot."""
    path, name, size = folder / "before", f"old-{seed}", random.Random(seed).randint(36, 44)
    if kind == "cd":
        return _write_cd(folder, path, size, name), name
    if kind == "half-written":
        return _write_half(folder, path, sector_bytes, seed), ""
    layout = Layout(size, esp_at=1 if kind == "gpt" else size - 10, mbr=kind == "mbr")
    write_os(path, layout, name=name, sector_bytes=sector_bytes, seed=seed)
    if kind == "no-os":
        with path.open("r+b") as f:
            f.write(bytes(512))
        return path, ""
    return path, name


def record_on_host(folder: Path, kind: str, sector_bytes: int, seed: int, *, source: Path = SOURCE) -> Recording:
    """By the writer in `source`, which may be a copy with a planted bug."""
    folder.mkdir(parents=True)
    image, new = make_image(folder, sector_bytes, seed)
    before, old = make_old_disk(folder, kind, sector_bytes, seed)
    shutil.copyfile(before, folder / "disk")
    argv: list[str | Path] = [sys.executable, Path(__file__).with_name("record_on_host.py"), image, folder / "disk", folder / "log", str(sector_bytes)]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(source)}, check=False)
    if done.returncode:
        raise RuntimeError(f"the writer failed: {done.stderr[-1000:]}")
    return _read(f"host-{sector_bytes}-{kind}-{seed}", folder, sector_bytes, new, old)


def record_on_machine(folder: Path, sector_bytes: int, seed: int, *, cache: Path) -> Recording:
    """By the agent in its ramdisk, on a machine of QEMU whose old OS has its ESP and its backup table behind the new image."""
    folder.mkdir(parents=True)
    image, new = make_image(folder, sector_bytes, seed)
    before, old = make_old_disk(folder, "esp-behind", sector_bytes, seed)
    shutil.copyfile(before, folder / "disk")
    variables = record_in_qemu.record(image, folder / "disk", folder / "log", sector_bytes=sector_bytes, folder=folder, cache=cache)
    return _read(f"qemu-{sector_bytes}-{seed}", folder, sector_bytes, new, old, variables)


def _read(name: str, folder: Path, sector_bytes: int, new: str, old: str, variables: Path | None = None) -> Recording:
    """Checked against the disk: what was logged is what the disk holds."""
    recording = Recording(name, sector_bytes, folder / "before", read_epochs(folder / "log"), new, old, variables)
    replayed = CrashedDisk(recording)
    replayed.go_to(recording.after_the_end)
    if replayed.read(0, replayed.size_bytes) != (folder / "disk").read_bytes():
        raise RuntimeError(f"{name}: the log, replayed, is not the disk")
    return recording


def _write_cd(folder: Path, path: Path, size: int, name: str) -> Path:
    """An isohybrid: ISO 9660 with El Torito, and the boot code of a hard disk in LBA 0."""
    disc = folder / "disc"
    disc.mkdir()
    make_esp(disc / "efi.img", 4 * MIB, name=name, sector_bytes=512)
    (disc / "data").write_bytes(random.Random(1).randbytes(20 * MIB))
    argv: list[str | Path] = ["xorriso", "-as", "mkisofs", "-o", path, "-e", "efi.img", "-no-emul-boot", disc]
    subprocess.run(argv, check=True, capture_output=True)
    os.truncate(path, size * MIB)
    shutil.rmtree(disc)
    return path


def _write_half(folder: Path, path: Path, sector_bytes: int, seed: int) -> Path:
    """What an earlier reinstall left when it lost power at some point."""
    earlier = record_on_host(folder / "earlier", "gpt", sector_bytes, seed + 1000)
    states = [s for s in plan_states(earlier, 200, random.Random(seed)) if s not in (earlier.untouched, earlier.after_the_end)]
    disk = CrashedDisk(earlier)
    disk.go_to(random.Random(seed).choice(states))
    disk.save(path)
    shutil.rmtree(folder / "earlier")
    return path
