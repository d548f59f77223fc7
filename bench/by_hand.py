"""What cannot be avoided: the same machine, the same ramdisk kernel and the same bytes, by hand and with nothing of ours.

    power on -> firmware -> our ISO, whose /init only says that it runs -> curl | zstd -d | dd -> power on -> firmware -> the OS, alone, until its SSH answers

The write is done inside the machine, because there the agent's is done: the same emulated core receives, decodes and writes. It has less to
do: plain HTTP, no digests, no config drive, no read-back. The OS has less to do too: no config drive, no call home.
What is needed to get from one part to the next (driver modules, an address, fetching curl and zstd) is left out of the sum.
"""

from __future__ import annotations

import dataclasses
import http.server
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from bench.console import GRUB, Console
from repave.agent.protocol import Slot
from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.images.store import ImageStore
from repave.lab.state import Machine
from repave.ramdisk import cpio
from repave.ramdisk.build import BootFiles
from repave.ramdisk.media import BootMedia, build_iso, render_slot

FETCH = "curl -sf" if shutil.which("curl") else "wget -q -O -"  # the ramdisk's busybox has a wget
_INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin
mount -t proc proc /proc
read -r up _ </proc/uptime
echo "bench: user space ${{up}}s"
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
/usr/bin/modprobe -abq virtio_pci virtio_blk virtio_net
while [ ! -e /sys/class/net/eth0 ] || [ ! -e /dev/vda ]; do sleep 0.1; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
cd /
wget -q -O - http://10.0.2.2:{port}/tools.cpio | cpio -id
{fetch} http://10.0.2.2:{port}/warm >/dev/null
echo "bench: writing"
{fetch} http://10.0.2.2:{port}/image.zst | zstd -dc | dd of=/dev/vda bs=4M conv=fsync 2>/dev/null && echo "bench: written"
poweroff -f
"""


@dataclasses.dataclass(frozen=True)
class ByHand:
    """Seconds of each part."""

    firmware_cd: float  # power on to the boot loader's first line
    to_user_space: float  # the boot loader reads kernel and initramfs from the disc; the kernel starts; /init's first line
    write: float
    firmware_disk: float
    os_boot: float  # the boot loader's first line to the SSH banner

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


class Kit:
    """The reference's boot media and what the machine fetches, made once, in `folder`."""

    def __init__(self, folder: Path, files: BootFiles, images: ImageStore, manifest_sha256: str) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "warm").write_bytes(b"")
        (folder / "tools.cpio").write_bytes(_pack_tools(["zstd", *(["curl"] if FETCH.startswith("curl") else [])]))
        with (folder / "image.zst").open("wb") as out:
            for chunk in images.read_manifest(manifest_sha256).chunks:
                out.write(images.chunk_path(chunk.sha256).read_bytes())
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: _Quiet(*a, directory=str(folder)))
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._build_disc(files)

    def _build_disc(self, files: BootFiles) -> None:
        """Our ISO of the same size, with a later /init in its initramfs and an empty run's slot laid over it."""
        init = cpio.render_archive({"init": cpio.file(_INIT.format(port=self.port, fetch=FETCH).encode(), mode=0o755)})
        packed = files.initramfs.read_bytes()
        initramfs = self.folder / "initramfs"
        initramfs.write_bytes(packed + bytes(-len(packed) % 4) + zstandard.compress(init))
        build_iso(dataclasses.replace(files, initramfs=initramfs), self.folder / "inert.iso")
        media = BootMedia(self.folder / "inert.iso")
        (self.folder / "bench.iso").write_bytes(media.read(0, media.size, render_slot(Slot("bench", "https://10.0.2.2:1", "none", ""))))
        media.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def measure(self, machine: Machine, console: Console) -> ByHand:
        """Afterwards the image, alone, runs on the machine. Destroys: its root disk."""
        with RedfishBmc(BmcAddress(machine.bmc_url, machine.bmc_username, machine.bmc_password)) as bmc:
            bmc.power_off()
            bmc.insert_media([f"http://127.0.0.1:{self.port}/bench.iso"])
            bmc.boot_from_media_once()
            on_at = time.time()
            bmc.power_on()
            grub_at = console.wait_for(GRUB, after=on_at)
            init_at = console.wait_for("bench: user space", after=grub_at)
            writing_at = console.wait_for("bench: writing", after=init_at)
            written_at = console.wait_for("bench: written", after=writing_at)
            bmc.power_off(graceful_s=10)
            bmc.eject_media()
            bmc.boot_from_disk()
            again_at = time.time()
            bmc.power_on()
            again_grub_at = console.wait_for(GRUB, after=again_at)
            ssh_at = _wait_for_banner(machine.ssh_port)
        return ByHand(grub_at - on_at, init_at - grub_at, written_at - writing_at, again_grub_at - again_at, ssh_at - again_grub_at)


@contextmanager
def start_kit(folder: Path, files: BootFiles, images: ImageStore, manifest_sha256: str) -> Iterator[Kit]:
    kit = Kit(folder, files, images, manifest_sha256)
    try:
        yield kit
    finally:
        kit.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _pack_tools(programs: list[str]) -> bytes:
    """This machine's own curl and zstd with the libraries they load; those the ramdisk has already are the same Debian's."""
    entries = {}
    for program in programs:
        path = shutil.which(program)
        if path is None:
            raise RuntimeError(f"{program} is not installed")
        entries[f"bin/{program}"] = cpio.file(Path(path).read_bytes(), mode=0o755)
        for library in re.findall(r"=> (/\S+)", subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout):
            entries[f"lib/x86_64-linux-gnu/{Path(library).name}"] = cpio.file(Path(library).read_bytes(), mode=0o755)
    return cpio.render_archive(entries)


def _wait_for_banner(port: int, *, deadline_s: float = 240) -> float:
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
                if probe.recv(4) == b"SSH-":
                    return time.time()
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"no SSH on port {port} within {deadline_s:.0f} s")
