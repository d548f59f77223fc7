"""Whether an image comes up and proves itself: one blank machine, a service of its own, one real reinstall. Nothing is left afterwards."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from repave.errors import ImageError
from repave.images.manifest import Manifest
from repave.images.store import ImageStore
from repave.lab.machines import QemuRack
from repave.lab.processes import stop_processes
from repave.lab.service import REINSTALL_TIMEOUT_S, import_image, register_machine, start_service
from repave.ramdisk.build import build_ramdisk
from repave.ramdisk.media import build_iso

GIB = 1 << 30
_CONSOLE_BYTES = 1500
Json = dict[str, Any]


@dataclass(frozen=True)
class BootCheck:
    """How the reinstall ended."""

    run: Json  # as the API shows it
    console: str  # the last the machine said

    @property
    def is_proved(self) -> bool:
        return self.run["error"] is None and self.run["proof"] is not None


def find_hindrance(image: Json) -> str | None:
    """Why the virtual rack can not boot this image, as the API shows it; None where it can."""
    if image["os_type"] != "Linux":
        return "the virtual rack has no machine for Windows"
    if (image["arch"], image["boot"], image["sector_bytes"]) != ("amd64", "uefi", 512):
        return f"its machines are amd64 with UEFI and 512-byte sectors; the image is {image['arch']}/{image['boot']} with {image['sector_bytes']}"
    return None


def boot_image(store: ImageStore, manifest_sha256: str, *, cache: Path, say: Callable[[str], None]) -> BootCheck:
    """The image of this store on a machine of the virtual rack, through the reinstall as it is. Blocks: a minute and more.

    Raises: ImageError where the image is not whole.
    """
    manifest = store.read_manifest(manifest_sha256)
    folder = Path(tempfile.mkdtemp(prefix="rpv-", dir="/tmp"))
    rack = QemuRack(folder / "rack", count=1)
    service = None
    try:
        disk = folder / "disk.raw"
        unpack(store, manifest, disk)
        build_iso(build_ramdisk(cache, progress=say), folder / "boot.iso")
        [machine] = rack.start(root_disk_bytes=max(4 * GIB, manifest.size_bytes + GIB))
        service = start_service(folder, agent_host="10.0.2.2", boot_iso=folder / "boot.iso")
        client = service.client()
        if import_image(client, disk, name="image")["manifest_sha256"] != manifest_sha256:
            raise ImageError("image-damaged", "Unpacked and imported again it is another image.")
        disk.unlink()
        register_machine(client, machine, unit=1, blank=True)
        password = f"Boot-{secrets.token_hex(8)}A1"
        batch = client.post("/reinstall", {"servers": [machine.name], "image": "image", "password": password})["id"]
        step, deadline = "", time.monotonic() + REINSTALL_TIMEOUT_S
        while not (run := client.get(f"/batches/{batch}")["runs"][0])["ended_at"] and time.monotonic() < deadline:
            if run["step"] != step:
                step = run["step"]
                say(f"boot     {step}")
            time.sleep(0.5)
        with machine.console.open("rb") as console:
            console.seek(max(0, machine.console.stat().st_size - _CONSOLE_BYTES))
            return BootCheck(run, console.read().decode(errors="replace"))
    finally:
        if service is not None:
            stop_processes([service.process], grace_s=10)
        rack.stop()
        shutil.rmtree(folder, ignore_errors=True)


def unpack(store: ImageStore, manifest: Manifest, disk: Path) -> None:
    """`disk` is what the image holds, sparse."""
    decompressor = zstandard.ZstdDecompressor()
    with disk.open("wb") as out:
        out.truncate(manifest.size_bytes)
        for index, chunk in enumerate(manifest.chunks):
            offset, length = manifest.window(index)
            if not chunk.extents:
                continue
            try:
                window = decompressor.decompress(store.chunk_path(chunk.sha256).read_bytes(), max_output_size=length)
            except (OSError, zstandard.ZstdError) as e:
                raise ImageError("image-damaged", f"Chunk {index} can not be read.", chunk=index) from e
            for start, size in chunk.extents:
                out.seek(offset + start)
                out.write(window[start : start + size])
