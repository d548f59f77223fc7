"""Makes the ramdisk from Debian packages: fetched with apt, unpacked, and packed again as one initramfs. No chroot, no root.

Two archives one after the other, as the kernel reads them: the base (drivers, Python, busybox; cached by the digest of its packages and
of this recipe, it takes half a minute) and the agent (our own code, /init; made anew each time, in milliseconds).
The slot of a run comes third, from GRUB (repave.ramdisk.media).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import marshal
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

import repave
from repave.errors import RunFailed
from repave.ramdisk import base, contents, cpio

PACKAGES = (
    "busybox-static", "kmod", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "python3-zstandard",
    "libc6", "libgcc-s1", "zlib1g", "libexpat1", "libssl3", "libzstd1", "liblzma5", "libuuid1", "libffi8",
    "shim-signed", "grub-efi-amd64-signed",
)  # fmt: skip
# In Debian's non-free-firmware; of them only the files that the ramdisk's own NIC drivers ask for are taken.
FIRMWARE_PACKAGES = ("firmware-bnx2", "firmware-bnx2x", "firmware-misc-nonfree", "firmware-netronome", "firmware-qlogic", "firmware-realtek")
_KERNEL_META = "linux-image-amd64"  # generic: the cloud kernel has no SATA and few NICs

# What the agent may import of ours (import-linter keeps it so); the rest of the package stays out of the ramdisk.
_AGENT_SOURCES = ("__init__.py", "errors.py", "images/__init__.py", "images/manifest.py", "agent/*.py")
_AGENT_ROOT = "usr/lib/repave"
_PYTHON = (3, 11)
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class BootFiles:
    """What boot media are made of, each a file in the cache."""

    kernel: Path
    initramfs: Path  # base and agent
    shim: Path  # signed by Microsoft
    grub: Path  # gcdx64, signed by Debian


def build_ramdisk(cache: Path, *, progress: Callable[[str], None], nic_firmware: bool = False) -> BootFiles:
    """Packages come from the machine's own apt sources. Repeatable: what is in `cache` already is not made again.

    The same packages and code give the same bytes. `nic_firmware`: with the NICs that need firmware files, and those files.
    Raises: RunFailed where apt has no such package or a tool fails.
    """
    (cache / "debs").mkdir(parents=True, exist_ok=True)
    debs = fetch_packages(cache / "debs", FIRMWARE_PACKAGES if nic_firmware else (), progress)
    folder = cache / f"ramdisk-{_recipe_key(debs)}"
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builders of one cache: the second finds what the first made
        if not folder.is_dir():
            _build_base(folder, debs, nic_firmware, progress)
        agent = render_agent_archive()
        initramfs = folder / f"initramfs-{hashlib.sha256(agent).hexdigest()[:16]}"
        if not initramfs.exists():
            packed = (folder / "base.cpio.zst").read_bytes()
            new = initramfs.with_suffix(".new")
            new.write_bytes(packed + bytes(-len(packed) % 4) + _compress(agent))
            new.replace(initramfs)
    files = BootFiles(folder / "vmlinuz", initramfs, folder / "shimx64.efi", folder / "gcdx64.efi")
    progress(f"kernel {_mb(files.kernel)}, initramfs {_mb(files.initramfs)}")
    return files


def render_contents(files: BootFiles) -> str:
    """All that the boot media hold, as `contents` renders it; beside it on the disc are only grub.cfg and a run's two places."""
    return (files.kernel.parent / "contents.txt").read_text() + contents.render("initramfs", _collect_agent(), {})


def render_agent_archive() -> bytes:
    """/init, the DHCP script and our own modules, as a cpio archive. Bytecode where this Python is the ramdisk's, else source."""
    return cpio.render_archive(_collect_agent())


def _collect_agent() -> dict[str, cpio.Entry]:
    entries = {
        "init": cpio.file((_HERE / "init").read_bytes(), mode=0o755),
        "etc/udhcpc.script": cpio.file((_HERE / "udhcpc.script").read_bytes(), mode=0o755),
    }
    package = Path(repave.__file__).parent
    for source in sorted(path for pattern in _AGENT_SOURCES for path in package.glob(pattern)):
        name = f"{_AGENT_ROOT}/repave/{source.relative_to(package)}"
        if sys.version_info[:2] == _PYTHON:
            entries[f"{name}c"] = cpio.file(_compile(source, f"/{name}"))
        else:
            entries[name] = cpio.file(source.read_bytes())
    return entries


def _compile(source: Path, name: str) -> bytes:
    """A .pyc whose header says: never compare with a source (PEP 552, unchecked hash).

    Version 2 of marshal is the last whose bytes do not depend on what else this process has loaded: no references, no interned names.
    """
    code = compile(source.read_bytes(), name, "exec", dont_inherit=True, optimize=0)
    return importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(code, 2)


def fetch_packages(debs: Path, firmware: Sequence[str], progress: Callable[[str], None]) -> list[Path]:
    """The newest versions that apt knows, downloaded where they are missing. apt checks their digests."""
    if firmware:
        known = {line.split("|")[0].strip() for line in run(["apt-cache", "madison", *firmware]).splitlines()}
        if unknown := [name for name in firmware if name not in known]:
            raise RunFailed("internal", f"apt knows no {', '.join(unknown)}: add Debian's non-free-firmware to its sources, then run apt-get update.")
    shown = run(["apt-cache", "show", "--no-all-versions", _KERNEL_META])
    kernel = re.search(r"^Depends:.*?\b(linux-image-[0-9][^ ,]*)", shown, re.MULTILINE)
    if kernel is None:
        raise RunFailed("internal", f"apt knows no {_KERNEL_META}: run apt-get update.")
    wanted = (kernel.group(1), *PACKAGES, *firmware)
    uris = run(["apt-get", "download", "--print-uris", *(f"{name}:amd64" for name in wanted)])
    names = re.findall(r"^'[^']*' (\S+\.deb) \d+", uris, re.MULTILINE)
    by_package = {name.split("_")[0]: name for name in names}
    missing = [name for name in wanted if name not in by_package]
    if missing:
        raise RunFailed("internal", f"apt knows no {', '.join(missing)}: run apt-get update.")
    to_fetch = [name for name in wanted if not (debs / by_package[name]).exists()]
    if to_fetch:
        progress(f"fetching {len(to_fetch)} Debian packages")
        with tempfile.TemporaryDirectory(dir=debs) as folder:
            # As root apt would drop to its own user, who may not be able to enter our folder, and warn.
            run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *(f"{name}:amd64" for name in to_fetch)], cwd=Path(folder))
            for deb in Path(folder).iterdir():
                deb.replace(debs / deb.name)
    return [debs / by_package[name] for name in wanted]


def _recipe_key(debs: Sequence[Path]) -> str:
    """Of everything the base is made from: packages by name and version, and this recipe."""
    digest = hashlib.sha256()
    for deb in debs:
        digest.update(deb.name.encode())
    for part in ("base.py", "build.py", "contents.py", "cpio.py", "modules.txt"):
        digest.update((_HERE / part).read_bytes())
    return digest.hexdigest()[:16]


def _build_base(folder: Path, debs: Sequence[Path], nic_firmware: bool, progress: Callable[[str], None]) -> None:
    """`folder` holds base.cpio.zst, vmlinuz, shimx64.efi, gcdx64.efi and contents.txt; whole or not at all."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacked-") as scratch:
        tree, new = Path(scratch) / "tree", Path(scratch) / "new"
        new.mkdir()
        progress("unpacking")
        packages = unpack(debs, tree)
        disc = {
            "vmlinuz": next((tree / "boot").glob("vmlinuz-*")),
            "shimx64.efi": tree / "usr/lib/shim/shimx64.efi.signed",
            "gcdx64.efi": tree / "usr/lib/grub/x86_64-efi-signed/gcdx64.efi.signed",
        }
        for name, source in disc.items():
            shutil.copyfile(source, new / name)
        entries = base.collect(tree, run=run, nic_firmware=nic_firmware)
        on_disc = {name: cpio.file(source.read_bytes()) for name, source in disc.items()}
        origins = {name: packages[str(source.relative_to(tree))] for name, source in disc.items()}
        (new / "contents.txt").write_text(contents.render("disc", on_disc, origins) + contents.render("initramfs", entries, packages))
        archive = cpio.render_archive(entries)
        progress(f"packing {len(archive) / 1e6:.1f} MB with zstd -19 (half a minute)")
        (new / "base.cpio.zst").write_bytes(_compress(archive))
        new.replace(folder)
    progress(f"base made in {time.monotonic() - started:.0f} s")


def unpack(debs: Sequence[Path], tree: Path) -> dict[str, str]:
    """The packages are unpacked in `tree`. Returns the package of each file."""
    packages: dict[str, str] = {}
    for deb in debs:
        run(["dpkg-deb", "-x", str(deb), str(tree)])
        packages |= dict.fromkeys(contents.list_files(tree) - packages.keys(), contents.package_of(deb))
    return packages


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19, threads=2, write_checksum=True).compress(data)


def run(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """Its standard output. Raises RunFailed with its last line where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunFailed("internal", f"{Path(command[0]).name} failed: {lines[-1]}")
    return done.stdout


def _mb(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
