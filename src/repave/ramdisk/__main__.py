"""`python -m repave.ramdisk build [--cache DIR]`: the boot media's ISO in the cache, with sizes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from repave.errors import RepaveError
from repave.ramdisk.build import build_ramdisk
from repave.ramdisk.media import build_iso


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repave.ramdisk")
    build = parser.add_subparsers(required=True).add_parser("build", help="make the boot media from Debian packages")
    build.add_argument("--cache", type=Path, default=Path(os.environ.get("REPAVE_CACHE", ".repave/cache")), help="where packages and results are kept")
    cache: Path = parser.parse_args().cache
    try:
        files = build_ramdisk(cache, progress=print)
        build_iso(files, cache / "boot.iso")
    except RepaveError as error:
        sys.exit(f"{error} {error.problem.do}")
    print(f"{cache / 'boot.iso'}: {(cache / 'boot.iso').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
