"""How the cost of a write grows: with the image, and with the window that a chunk holds. Draws docs/write.svg and docs/windows.svg.

    python -m bench growth [REPETITIONS]

The image is the lab's Debian, its chunks again and again until it is as large as wanted; the disk is a loop device over a file in RAM.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import zstandard

from bench.plot import Series, render_plot
from bench.scripted_batch import describe_machine
from bench.write import AGENT, install, loop_device, start_origin
from repave.images.importer import import_image, pack_window
from repave.images.manifest import Manifest
from repave.images.store import ImageStore
from repave.lab.os_images import build_debian, default_cache

GIB = 1 << 30
SIZES_GIB = (0.5, 1, 2, 4, 8, 16)
WINDOWS_MIB = (1, 2, 4, 8, 16)
DOCS = Path(__file__).parents[1] / "docs"


def main(repetitions: int = 3) -> None:
    install({"nginx": "nginx-light"})
    with tempfile.TemporaryDirectory(prefix="repave-bench-", dir="/dev/shm") as name:
        ram = Path(name)
        store = ImageStore(ram / "pack")
        debian = store.read_manifest(import_image(build_debian(default_cache()), store, max_bytes=64 * GIB).manifest_sha256)
        with start_origin(ram, ram / "pack") as url:
            print(f"growth; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}; {repetitions} repetitions, medians", flush=True)
            sizes = {size: measure(url, ram, store, grow(debian, int(size * GIB)), repetitions) for size in SIZES_GIB}
            draw("write.svg", "Writing one image, by its size", "GiB", "image", sizes)
            windows = {mib: measure(url, ram, store, pack(debian, store, mib << 20), repetitions) for mib in WINDOWS_MIB}
            draw("windows.svg", f"Writing {debian.size_bytes / GIB:.1f} GiB, by what one chunk holds", "MiB", "window", windows)


def grow(manifest: Manifest, size_bytes: int) -> Manifest:
    whole = size_bytes // manifest.window_bytes
    again = -(-whole // (len(manifest.chunks) - 1))
    chunks = (manifest.chunks[:-1] * again)[:whole]  # without the last: its window is shorter
    return Manifest(whole * manifest.window_bytes, manifest.sector_bytes, manifest.arch, manifest.boot, chunks)


def pack(manifest: Manifest, store: ImageStore, window_bytes: int) -> Manifest:
    """The same disk in windows of another size."""
    chunks = []
    with store.lock():
        for window in read_windows(manifest, store, window_bytes):
            chunk, data = pack_window(window)
            store.write_chunk(chunk.sha256, data)
            chunks.append(chunk)
    return Manifest(manifest.size_bytes, manifest.sector_bytes, manifest.arch, manifest.boot, tuple(chunks), window_bytes)


def read_windows(manifest: Manifest, store: ImageStore, window_bytes: int) -> Iterator[bytes]:
    held = b""
    for chunk in manifest.chunks:
        held += zstandard.decompress(store.chunk_path(chunk.sha256).read_bytes())
        while len(held) >= window_bytes:
            yield held[:window_bytes]
            held = held[window_bytes:]
    if held:
        yield held


def measure(url: str, ram: Path, store: ImageStore, manifest: Manifest, repetitions: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak RSS in MB of a write."""
    with store.lock():
        sha256 = store.write_manifest(manifest)
    disk, found = ram / "disk", []
    for _ in range(repetitions):
        with disk.open("wb") as f:
            f.truncate(manifest.size_bytes)
        with loop_device(disk) as device:
            done = subprocess.run([*AGENT, f"{url}/manifests/{sha256}.json", device, "--json"], check=True, capture_output=True)
            said = json.loads(done.stdout)
        found.append((float(said["seconds"]), float(said["cpu_s"]), said["peak_rss_bytes"] / 1e6))
        disk.unlink()
    wall, cpu, rss = (statistics.median(one) for one in zip(*found, strict=True))
    fetched = sum(c.compressed_bytes for c in manifest.chunks if c.extents) / 1e6
    what = f"{manifest.size_bytes / GIB:5.1f} GiB in windows of {manifest.window_bytes >> 20:2} MiB"
    print(f"  {what}: {wall:6.2f} s, {cpu:6.2f} CPU s, {rss:4.0f} MB; {fetched:.0f} MB fetched", flush=True)
    return wall, cpu, rss


def draw(name: str, title: str, unit: str, what: str, found: dict[float, tuple[float, float, float]]) -> None:
    lines = [Series(label, [(x, y[n]) for x, y in found.items()]) for n, label in enumerate(("seconds", "CPU seconds", "peak RSS in 10 MB"))]
    lines[2] = Series(lines[2].name, [(x, y / 10) for x, y in lines[2].points])
    note = f"{describe_machine()}; {datetime.now():%Y-%m-%d}"
    (DOCS / name).write_text(render_plot(title, f"{what}, {unit}", "", lines, note=note))
