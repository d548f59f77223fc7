"""What the boot media are made of: a line for each file, with its digest, its size, its place, and the Debian package and version it is from."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from repave.ramdisk import cpio

MADE_HERE = "made by Repave"


def list_files(tree: Path) -> set[str]:
    """Files and links under `tree`, by path without a leading slash."""
    return {os.path.relpath(os.path.join(folder, name), tree) for folder, _, names in os.walk(tree) for name in names}


def package_of(deb: Path) -> str:
    """`NAME VERSION` of a package's file, as apt names it."""
    name, version, _ = unquote(deb.name).split("_")
    return f"{name} {version}"


def render(place: str, entries: Mapping[str, cpio.Entry], packages: Mapping[str, str]) -> str:
    """A line for each file and link; folders and devices have none. `packages`: of each file that was unpacked."""
    lines = []
    for path, entry in sorted(entries.items()):
        if stat.S_ISREG(entry.mode):
            lines.append(f"{hashlib.sha256(entry.data).hexdigest()} {len(entry.data):9} {place}:/{path}  {_find_package(path, packages)}\n")
        elif stat.S_ISLNK(entry.mode):
            lines.append(f"{'link':64} {0:9} {place}:/{path} -> {entry.data.decode()}  {_find_package(path, packages)}\n")
    return "".join(lines)


def _find_package(path: str, packages: Mapping[str, str]) -> str:
    """By where the file was before `base.collect` put it in its place: bytecode is of its source's package, /lib and /usr/lib are one."""
    unpacked = path.removesuffix("c") if path.endswith(".pyc") else path
    names = [unpacked, f"usr/{unpacked}", unpacked.removeprefix("usr/"), unpacked.replace("/python3.11/", "/python3/dist-packages/")]
    return next((packages[name] for name in names if name in packages), MADE_HERE)
