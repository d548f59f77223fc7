"""`python -m repave.ramdisk build|list|verify [--cache DIR] [--nic-firmware]`: the boot media's ISO, what is in it, and whether it can be made again."""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from pathlib import Path

from repave.errors import RepaveError
from repave.ramdisk.build import BootFiles, build_ramdisk, render_contents
from repave.ramdisk.media import build_iso

ACTS = {
    "build": "make the boot media from Debian packages; their contents are written beside the ISO",
    "list": "what the boot media hold: digest, size, place, and the Debian package and version it is from",
    "verify": "make them once more from the same packages, in another folder, and compare bit by bit (a minute)",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repave.ramdisk")
    acts = parser.add_subparsers(required=True, dest="act")
    for act, told in ACTS.items():
        one = acts.add_parser(act, help=told)
        one.add_argument("--cache", type=Path, default=Path(os.environ.get("REPAVE_CACHE", ".repave/cache")), help="where packages and results are kept")
        one.add_argument("--nic-firmware", action="store_true", help="with NICs that need firmware files, and those (Debian's non-free-firmware)")
    asked = parser.parse_args()
    iso: Path = asked.cache / ("boot-nic-firmware.iso" if asked.nic_firmware else "boot.iso")
    try:
        files = build_ramdisk(asked.cache, progress=lambda line: print(line, file=sys.stderr), nic_firmware=asked.nic_firmware)
        if asked.act == "list":
            sys.stdout.write(render_contents(files))
            return
        write_iso(files, iso)
        if asked.act == "verify":
            verify(files, iso, asked.cache, nic_firmware=asked.nic_firmware)
    except RepaveError as error:
        sys.exit(error.detail)
    print(f"{iso}: {iso.stat().st_size / 1e6:.1f} MB")


def write_iso(files: BootFiles, iso: Path) -> None:
    build_iso(files, iso)
    iso.with_suffix(".contents").write_text(render_contents(files))


def verify(files: BootFiles, iso: Path, cache: Path, *, nic_firmware: bool) -> None:
    """Says so where all is the same; ends the program, naming what is not."""
    with tempfile.TemporaryDirectory(prefix="repave-again-") as folder:
        again = Path(folder)
        (again / "debs").symlink_to((cache / "debs").resolve())
        made = build_ramdisk(again, progress=lambda line: print(line, file=sys.stderr), nic_firmware=nic_firmware)
        write_iso(made, again / iso.name)
        pairs = [(files.kernel, made.kernel), (files.initramfs, made.initramfs), (iso, again / iso.name)]
        pairs += [(iso.with_suffix(".contents"), (again / iso.name).with_suffix(".contents"))]
        if unlike := [first.name for first, second in pairs if not filecmp.cmp(first, second, shallow=False)]:
            sys.exit(f"Made again, these are not the same: {', '.join(unlike)}")
    print("Made again, bit for bit the same.")


if __name__ == "__main__":
    main()
