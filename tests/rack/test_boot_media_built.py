"""The real boot media as they were built: their size, that the same packages give the same bytes, and that the list of their contents is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from repave.lab.os_images import build_tiny
from repave.ramdisk import base, cpio
from repave.ramdisk.build import BootFiles, build_ramdisk, fetch_packages, render_agent_archive, render_contents, run, unpack
from repave.ramdisk.media import build_iso

CACHE = Path(os.environ.get("REPAVE_CACHE", ".repave/cache"))


@pytest.fixture(scope="module")
def files() -> BootFiles:
    return build_ramdisk(CACHE, progress=print)


def test_kernel_and_ramdisk_have_25_mb_and_the_whole_iso_32(files: BootFiles, tmp_path: Path) -> None:
    build_iso(files, tmp_path / "boot.iso")
    ramdisk, iso = files.kernel.stat().st_size + files.initramfs.stat().st_size, (tmp_path / "boot.iso").stat().st_size
    print(f"kernel and ramdisk {ramdisk / 1e6:.1f} MB, ISO {iso / 1e6:.1f} MB")
    assert ramdisk <= 25e6 and iso <= 32e6


def test_made_again_in_another_folder_they_are_bit_for_bit_the_same(files: BootFiles, tmp_path: Path) -> None:
    """All but zstd's own work, half a minute; `python -m repave.ramdisk verify` does that too."""
    debs = fetch_packages(CACHE / "debs", (), print)
    unpack(debs, tmp_path / "tree")
    again = cpio.render_archive(base.collect(tmp_path / "tree", run=run))
    assert again == read_archives(files)[0]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_iso(files, tmp_path / name / "boot.iso")
    assert (tmp_path / "one/boot.iso").read_bytes() == (tmp_path / "two/boot.iso").read_bytes()


def test_a_second_time_all_is_there_without_a_network(files: BootFiles, tmp_path: Path) -> None:
    """What `make run` does before its rack, in a network namespace with nothing in it."""
    again = (
        "import sys, time; from pathlib import Path; from repave.lab.rack import build_boot_iso, build_images\n"
        "cache, folder = map(Path, sys.argv[1:])\nbuild_boot_iso(cache, folder); build_images(cache, debian=False)"
    )
    build_tiny(CACHE)
    started = time.monotonic()
    done = subprocess.run(["unshare", "-rn", sys.executable, "-c", again, CACHE.resolve(), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4/6 images   ✓ tiny-1, tiny-2" in done.stderr and time.monotonic() - started < 20


def test_builders_of_one_cache_at_the_same_time_all_get_the_whole_ramdisk(files: BootFiles, tmp_path: Path) -> None:
    """They lost each other's half-made file, as two lanes of tests that started together did."""
    (tmp_path / "debs").symlink_to((CACHE / "debs").resolve())
    base_folder = tmp_path / files.kernel.parent.name
    shutil.copytree(files.kernel.parent, base_folder, ignore=shutil.ignore_patterns("initramfs-*"))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: build_ramdisk(tmp_path, progress=print), range(4)))
    assert {one.initramfs.read_bytes() for one in made} == {files.initramfs.read_bytes()}
    assert [path.name for path in base_folder.glob("initramfs-*")] == [files.initramfs.name]


def test_the_list_names_every_file_of_the_ramdisk_and_where_it_is_from(files: BootFiles) -> None:
    lines = [line for line in render_contents(files).splitlines() if " initramfs:/" in line]
    listed = {line.split("initramfs:/")[1].split("  ")[0].split(" -> ")[0] for line in lines}
    held = set()
    for archive in read_archives(files):
        shown = subprocess.run(["cpio", "-tv", "--quiet"], input=archive, capture_output=True, check=True).stdout.decode().splitlines()
        held |= {line.split(maxsplit=8)[8].split(" -> ")[0] for line in shown if line[0] in "-l"}
    assert listed == held
    packages = {line.split("  ")[-1].split()[0] for line in lines}
    assert {"libssl3", "python3.11-minimal", "libpython3.11-stdlib", "python3-zstandard", "busybox-static", "kmod"} <= packages
    unknown = [line for line in lines if line.endswith("made by Repave") and re.search(r"\.ko\b|\.so\b|lib/python3", line)]
    assert unknown == []


def read_archives(files: BootFiles) -> list[bytes]:
    """The base and the agent, each a zstd frame; zeros between them."""
    packed = zstandard.ZstdDecompressor().decompressobj()
    whole = files.initramfs.read_bytes()
    base_archive = packed.decompress(whole)
    rest = packed.unused_data.lstrip(b"\0")
    agent = zstandard.ZstdDecompressor().decompress(rest)
    assert agent == render_agent_archive()
    return [base_archive, agent]
