"""The agent in its ramdisk reinstalls a machine of QEMU, whose blklogwrites writes down what reaches the disk. The far end is a scripted server.

The ramdisk is the product's, built from this tree; only the CD is left out (OVMF loads kernel and initramfs directly, 10 s sooner).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firmware import CODE, VARIABLES

from repave.agent.protocol import ASK_HEADER, Slot
from repave.ca import make_ca, make_certificate
from repave.images.importer import import_image
from repave.images.store import ImageStore
from repave.ramdisk.build import build_ramdisk
from repave.ramdisk.media import COMMAND_LINE, render_slot

SERIAL = "POWER-LOSS-1"
CONFIG_DRIVE = b"the config drive of a power loss " * 20000
DEADLINE_S = 300  # 25 to 40 s on a quiet machine without KVM
# Debian's Python in the ramdisk hashes and decrypts with these where the processor has them (ten times as fast when emulated).
_CPU = "qemu64,+aes,+pclmulqdq,+sse4.1,+sse4.2,+ssse3,+popcnt"


def record(image: Path, disk: Path, log: Path, *, sector_bytes: int, folder: Path, cache: Path) -> Path:
    """`disk` holds the image and `log` all writes to it. Returns the firmware's variables as the agent left them."""
    files = build_ramdisk(cache, progress=lambda text: None)
    store = ImageStore(folder / "store")
    manifest = store.read_manifest_bytes(import_image(image, store, max_bytes=1 << 30).manifest_sha256)
    plan = {
        "plan_id": "plan-1", "disk_path": "/dev/somewhere", "disk_serial": SERIAL, "disk_wwn": "", "disk_size_bytes": disk.stat().st_size,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(), "config_drive_sha256": hashlib.sha256(CONFIG_DRIVE).hexdigest(),
        "config_drive_bytes": len(CONFIG_DRIVE),
    }  # fmt: skip
    variables, console = folder / "vars.fd", folder / "console"
    shutil.copyfile(VARIABLES, variables)
    log.touch()
    with start_far_end(folder, plan, manifest, store) as (port, ca_pem, reports):
        plan |= {"chunk_urls": [f"https://10.0.2.2:{port}/chunks"], "chunk_token": "token-1"}
        slot = render_slot(Slot("run-1", f"https://10.0.2.2:{port}", "one-boot-only", ca_pem))
        initramfs = files.initramfs.read_bytes()
        (folder / "initramfs").write_bytes(initramfs + bytes(-len(initramfs) % 4) + slot)
        geometry = f"logical_block_size={sector_bytes},physical_block_size={sector_bytes}"
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", _CPU, "-m", "512", "-display", "none", "-nodefaults", "-no-reboot",
            "-serial", f"file:{console}",
            "-drive", f"if=pflash,format=raw,readonly=on,file={CODE}", "-drive", f"if=pflash,format=raw,file={variables}",
            "-kernel", str(files.kernel), "-initrd", str(folder / "initramfs"), "-append", COMMAND_LINE,
            "-blockdev", f"driver=file,filename={disk},node-name=f0", "-blockdev", f"driver=file,filename={log},node-name=l0",
            "-blockdev", "driver=blklogwrites,file=f0,log=l0,log-sector-size=512,node-name=d0",
            "-device", f"virtio-blk-pci,drive=d0,serial={SERIAL},bootindex=1,{geometry}",
            "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()
    if not reports or not reports[-1]["verified"]:
        raise RuntimeError(f"the agent did not report a verified write: {reports}; the console's end:\n{console.read_text(errors='replace')[-2000:]}")
    return variables


@contextlib.contextmanager
def start_far_end(folder: Path, plan: dict[str, Any], manifest: bytes, store: ImageStore) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Port, CA, and the reports that came."""
    reports: list[dict[str, Any]] = []
    answers = {
        "/agent/v1/hello": {"session": "session-1", "poll_s": 0.1}, "/agent/v1/cross": {"epoch": 1, "lease_s": 60},
        "/agent/v1/progress": {"lease_s": 60, "chunk_token": "token-1"}, "/agent/v1/report": {"then": "power-off"},
        "/agent/v1/log": {},
    }  # fmt: skip

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fixed = {"/agent/v1/plan": json.dumps(plan).encode(), "/agent/v1/manifest": manifest, "/agent/v1/config-drive": CONFIG_DRIVE}
            self.answer(fixed.get(self.path) or store.chunk_path(self.path.rpartition("/")[2]).read_bytes())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/agent/v1/report":
                reports.append(body)
            self.answer(json.dumps(answers[self.path]).encode())

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header(ASK_HEADER, self.headers[ASK_HEADER])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    make_ca(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(folder, ["10.0.2.2"], folder / "server.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    try:
        yield server.server_port, (folder / "ca.pem").read_text(), reports
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
