"""From the kernel's start to the agent's hello, beside the same kernel with an init that only says that it runs.

Plain QEMU with the rack's CPU, firmware and devices; kernel and initramfs are handed over by QEMU, so that no boot loader and no disc is in the
figures. The two take turns. Seconds count from the kernel's start: the first line of either /init tells them by the machine's own clock, and the
host's goes on from there to the hello's arrival. The reference's initramfs holds busybox alone: unpacking ours is part of ours.
"""

from __future__ import annotations

import http.server
import os
import queue
import re
import ssl
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import zstandard

from bench.console import open_console
from bench.scripted_batch import describe_machine
from repave.agent.protocol import Slot
from repave.ca import make_ca, make_certificate
from repave.ramdisk import cpio
from repave.ramdisk.build import BootFiles, build_ramdisk
from repave.ramdisk.media import COMMAND_LINE, build_iso, render_slot

CPU = "qemu64,+aes,+pclmulqdq,+sse4.1,+sse4.2,+ssse3,+popcnt"  # the rack's machines
REPEAT = 5
DEADLINE_S = 240
_EMPTY_INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
read -r up _ </proc/uptime
echo "bench: ${up}s"
/bin/busybox poweroff -f
"""


def main(repeat: int = REPEAT) -> None:
    """Prints seconds, medians and ratio. Takes about 40 seconds a repetition on 2 cores without KVM."""
    files = build_ramdisk(Path(os.environ.get("REPAVE_CACHE", ".repave/cache")), progress=lambda line: None)
    with tempfile.TemporaryDirectory(prefix="rpb-") as scratch, listen(Path(scratch)) as (url, ca_pem, hellos):
        folder = Path(scratch)
        build_iso(files, folder / "boot.iso")
        show_sizes(files, folder / "boot.iso")
        ours_path, empty_path = folder / "ours", folder / "empty"
        slot = render_slot(Slot("bench", url, "bench", ca_pem, None))
        packed = files.initramfs.read_bytes()
        ours_path.write_bytes(packed + bytes(-len(packed) % 4) + slot)
        empty_path.write_bytes(render_empty(files))
        ours, empty = list[float](), list[float]()
        for number in range(1, repeat + 1):
            empty.append(boot_empty(folder, files.kernel, empty_path))
            ours.append(boot_ours(folder, files.kernel, ours_path, hellos))
            print(f"{number}/{repeat}: empty init {empty[-1]:.1f} s, hello {ours[-1]:.1f} s", flush=True)
    ratios = [mine / theirs for mine, theirs in zip(ours, empty, strict=True)]
    mine, theirs = statistics.median(ours), statistics.median(empty)
    print(f"\nkernel start to hello, median of {repeat}; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}")
    print(f"  hello {mine:.1f} s, the same kernel to an empty init {theirs:.1f} s: {mine - theirs:.1f} s more, ratio {mine / theirs:.2f}", end="")
    print(f" ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def show_sizes(files: BootFiles, iso: Path) -> None:
    kernel, initramfs = files.kernel.stat().st_size / 1e6, files.initramfs.stat().st_size / 1e6
    print(f"kernel {kernel:.1f} MB and initramfs {initramfs:.1f} MB: {kernel + initramfs:.1f} MB (goal 25); ISO {iso.stat().st_size / 1e6:.1f} MB (goal 32)")


def render_empty(files: BootFiles) -> bytes:
    """An initramfs of the ramdisk's own busybox and an /init of five lines."""
    base = zstandard.ZstdDecompressor().decompressobj().decompress(files.initramfs.read_bytes())
    busybox = subprocess.run(["cpio", "-i", "--quiet", "--to-stdout", "bin/busybox"], input=base, capture_output=True, check=True).stdout
    entries = {
        "init": cpio.file(_EMPTY_INIT, mode=0o755), "bin/busybox": cpio.file(busybox, mode=0o755),
        "proc": cpio.directory(), "dev/console": cpio.Entry(0o020600, device=(5, 1)),
    }  # fmt: skip
    return zstandard.ZstdCompressor(level=19).compress(cpio.render_archive(entries))


def boot_empty(folder: Path, kernel: Path, initramfs: Path) -> float:
    with machine(folder, kernel, initramfs) as (process, console):
        process.wait(DEADLINE_S)
        found = re.search(r"bench: ([0-9.]+)s", console.read_text(errors="replace"))
    if found is None:
        raise RuntimeError(f"the empty init said nothing:\n{console.read_text(errors='replace')[-1000:]}")
    return float(found.group(1))


def boot_ours(folder: Path, kernel: Path, initramfs: Path, hellos: queue.Queue[float]) -> float:
    started = time.time()
    with machine(folder, kernel, initramfs) as (_, console_path), open_console(console_path) as console:
        line = r"repave-init ([0-9.]+)s +user space"
        init_at = console.wait_for(line, after=started, deadline_s=DEADLINE_S)
        kernel_at = init_at - (console.find_number(line, after=started) or 0)
        return hellos.get(timeout=DEADLINE_S) - kernel_at


@contextmanager
def machine(folder: Path, kernel: Path, initramfs: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    console, disk, variables = folder / "console", folder / "disk.img", folder / "vars.fd"
    console.write_bytes(b"")
    with disk.open("wb") as out:
        out.truncate(64 << 20)
    variables.write_bytes(Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes())
    process = subprocess.Popen([
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", CPU, "-m", "768", "-display", "none", "-no-reboot",
        "-serial", f"file:{console}", "-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
        "-drive", f"if=pflash,format=raw,file={variables}", "-drive", f"if=none,id=disk,format=raw,file={disk}",
        "-device", "virtio-blk-pci,drive=disk,serial=BENCH-1", "-nic", "user,model=virtio-net-pci", "-device", "virtio-rng-pci",
        "-kernel", str(kernel), "-initrd", str(initramfs), "-append", COMMAND_LINE,
    ])  # fmt: skip
    try:
        yield process, console
    finally:
        process.kill()
        process.wait()
        time.sleep(0.2)


@contextmanager
def listen(folder: Path) -> Iterator[tuple[str, str, queue.Queue[float]]]:
    """A TLS server that machines see as 10.0.2.2: URL, CA, and when each hello came."""
    make_ca(folder)
    hellos: queue.Queue[float] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hellos.put(time.time())
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(folder, ["10.0.2.2"], folder / "server.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://10.0.2.2:{server.server_port}", (folder / "ca.pem").read_text(), hellos
    finally:
        server.shutdown()
        server.server_close()
