"""The writer on disks as they are, in the ramdisk's own kernel: every transport, both sector sizes, and disks that fail, lie or go away.

One machine with all of them; in it the agent's parts write an image to one after the other, as `agent/main.py` does. Each disk is larger than the
image and full of an old system. Nothing but the disks is asked how it went.
"""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disk_images import MIB, make_disk, old_disk

from repave.agent.gpt import parse_table
from repave.images.importer import import_image
from repave.images.store import ImageStore
from repave.lab.os_images import default_cache
from repave.ramdisk import cpio
from repave.ramdisk.build import build_ramdisk
from repave.ramdisk.media import COMMAND_LINE

IMAGE_BYTES, DISK_BYTES = 24 * MIB, 40 * MIB
CONFIG = b"the config drive " * 4000
CPU = "qemu64,+aes,+pclmulqdq,+sse4.1,+sse4.2,+ssse3,+popcnt"
DEADLINE_S = 420  # 60 s on a quiet machine without KVM
LAST = DISK_BYTES // 512 - 1
KEPT = (34 * MIB, 38 * MIB)  # a partition of each disk that the owner wants to find again


@dataclass(frozen=True)
class Case:
    """One disk. `device`: QEMU's, with DRIVE for its block node and SERIAL; `fails_at`: the 512-byte sector where `fails` (read, write) gets EIO."""

    serial: str
    device: str
    sector_bytes: int = 512
    fails: str = ""
    fails_at: int | None = 0  # None: in the image's data
    ends: str = "written"  # or the class of its error


VIRTIO, SCSI, NVME = "virtio-blk-pci,drive=DRIVE,serial=SERIAL", "scsi-hd,bus=vscsi.0,drive=DRIVE,serial=SERIAL,id=SERIAL", "nvme,drive=DRIVE,serial=SERIAL"
BIG = ",logical_block_size=4096,physical_block_size=4096"
CASES = (
    Case("VIRTIO", VIRTIO),
    Case("VIRTIO4K", VIRTIO + BIG, 4096),
    Case("SATA", "ide-hd,bus=ide.0,drive=DRIVE,serial=SERIAL"),
    Case("SCSI", SCSI),
    Case("SCSI4K", SCSI + BIG, 4096),
    Case("NVME", NVME),
    Case("NVME4K", NVME + BIG, 4096),
    Case("EIO-LBA0", SCSI, fails="write", fails_at=0, ends="disk-write"),
    Case("EIO-TABLE", SCSI, fails="write", fails_at=2, ends="disk-write"),
    Case("EIO-BODY", SCSI, fails="write", fails_at=None, ends="disk-write"),
    Case("EIO-BACKUP", SCSI, fails="write", fails_at=LAST, ends="disk-write"),
    Case("EIO-READ", SCSI, fails="read", fails_at=None, ends="read-back"),
    Case("LIAR", SCSI, ends="read-back"),  # takes every write and keeps none
    Case("GOES-WRITING", SCSI, ends="disk-write"),
    Case("GOES-AT-LAST", SCSI, ends="disk-changed"),
)
OWNERS = ("OWNERS", "STICK")  # a data disk, and one that is removable and comes first
UNTOUCHED = ("EIO-LBA0",)  # where the very first write fails, nothing else is done

IN_GUEST = """
import fcntl, json, os, struct, subprocess, time, urllib.request, uuid
from repave.agent.chunks import ChunkSource
from repave.agent.gpt import LINUX_DATA, Partition
from repave.agent.inventory import Roots, read_disks
from repave.agent.machine import RealMachine, BLKROSET
from repave.agent.writer import write_image
from repave.errors import RunFailed
from repave.images.manifest import parse_manifest

BASE, CASES, MANIFESTS, CONFIG = "http://10.0.2.2:PORT", json.loads('CASES_JSON'), json.loads('MANIFESTS_JSON'), b"the config drive " * 4000


def get(path):
    return urllib.request.urlopen(BASE + path, timeout=60).read()


def written(machine, serial, sector_bytes):
    [disk] = [d for d in machine.read_inventory().disks if d.serial == serial]
    manifest = parse_manifest(get("/manifests/" + MANIFESTS[str(sector_bytes)] + ".json"), sha256=MANIFESTS[str(sector_bytes)])
    source, fetched = ChunkSource([BASE + "/chunks"]), []

    def fetch(sha256):
        fetched.append(sha256)
        if serial == "GOES-WRITING" and len(fetched) == 4:
            get("/take-away/" + serial)
        return source.fetch(sha256)

    def boot_entry(partitions):
        if serial == "GOES-AT-LAST":
            get("/take-away/" + serial)

    with machine.open_disk(disk) as opened:
        notes = machine.protect_others(disk)
        open_for_writing = sorted(d.serial for d in machine.read_inventory().disks if not d.read_only)
        result = write_image(
            opened.path, manifest, fetch=fetch, config_drive=CONFIG, sector_bytes=disk.sector_bytes, disk_bytes=disk.size_bytes,
            keep_writing=lambda: True, progress=lambda stage, done, total: None, partition_guid=bytes(range(16)), boot_entry=boot_entry,
            verify_identity=opened.verify,
            keep=[Partition(5, LINUX_DATA, uuid.UUID(int=5), KEPT_START // sector_bytes, KEPT_END // sector_bytes - 1, "data")],
        )
    return {"ends": "written", "open_for_writing": open_for_writing, "zeroed_by": result.zeroed_by, "notes": notes, "stages_s": result.stages_s}


def run_in_ramdisk():
    machine = RealMachine()
    for _ in range(50):
        disks = machine.read_inventory().disks
        if any(d.removable for d in disks):
            break
        time.sleep(0.2)
    print("INVENTORY", json.dumps([[d.path, d.serial, d.transport, d.sector_bytes, d.removable] for d in disks]), flush=True)
    for serial, sector_bytes in CASES:
        began = time.monotonic()
        try:
            said = written(machine, serial, sector_bytes)
        except RunFailed as error:
            said = {"ends": error.slug, "cause": str(error)}
        print("RESULT", json.dumps(said | {"serial": serial, "seconds": round(time.monotonic() - began, 2)}), flush=True)
        for disk in read_disks(Roots()):
            fd = os.open(disk.path, os.O_RDONLY)
            fcntl.ioctl(fd, BLKROSET, struct.pack("i", 0))
            os.close(fd)
    machine.power_off()
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageStore, dict[int, str], dict[int, bytes]]:
    folder = tmp_path_factory.mktemp("images")
    store, manifests, raws = ImageStore(folder / "store"), dict[int, str](), dict[int, bytes]()
    for sector_bytes in (512, 4096):
        raw = make_disk(folder / f"image{sector_bytes}", IMAGE_BYTES, sector_bytes=sector_bytes, seed=sector_bytes)
        manifests[sector_bytes], raws[sector_bytes] = import_image(raw, store, max_bytes=1 << 30).manifest_sha256, raw.read_bytes()
    return store, manifests, raws


@pytest.fixture(scope="module")
def done(images: tuple[ImageStore, dict[int, str], dict[int, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What was said of each disk, by serial; "folder" has the disks as they are afterwards, "old" what was on all of them."""
    store, manifests, _ = images
    folder = tmp_path_factory.mktemp("disks")
    files = build_ramdisk(default_cache(), progress=print)
    old = old_disk(folder / "old", DISK_BYTES).read_bytes()
    for name in (*OWNERS, *(c.serial for c in CASES if c.serial != "LIAR")):
        (folder / name).write_bytes(old)
    with start_origin(store.root, folder / "qmp") as port:
        guest = IN_GUEST.replace("PORT", str(port)).replace("CASES_JSON", json.dumps([[c.serial, c.sector_bytes] for c in CASES]))
        guest = guest.replace("KEPT_START", str(KEPT[0])).replace("KEPT_END", str(KEPT[1])).replace("MANIFESTS_JSON", json.dumps(manifests))
        overlay = cpio.render_archive({"usr/lib/repave/repave/agent/main.py": cpio.file(textwrap.dedent(guest).encode())})
        base = files.initramfs.read_bytes()
        (folder / "initramfs").write_bytes(base + bytes(-len(base) % 4) + overlay)
        console = folder / "console"
        process = subprocess.Popen([*qemu(files.kernel, folder, console), *disks(folder, a_sector_with_data(store, manifests[512]))], stdin=subprocess.DEVNULL)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(console.read_text(errors="replace")[-4000:])
        finally:
            process.kill()
            process.wait()
    text = console.read_text(errors="replace")
    results = {r["serial"]: r for line in re.findall(r"RESULT (\{.*\})", text) for r in [json.loads(line)]}
    inventory = re.search(r"INVENTORY (\[.*\])", text)
    assert inventory is not None, text[-4000:]
    yield results | {"folder": folder, "old": old, "inventory": json.loads(inventory[1]), "console": text}


def qemu(kernel: Path, folder: Path, console: Path) -> list[str]:
    return [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", CPU, "-m", "768", "-display", "none", "-nodefaults", "-no-reboot",
        "-serial", f"file:{console}", "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off",
        "-kernel", str(kernel), "-initrd", str(folder / "initramfs"), "-append", COMMAND_LINE,
        "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-scsi-pci,id=vscsi", "-device", "qemu-xhci",
    ]  # fmt: skip


def a_sector_with_data(store: ImageStore, manifest_sha256: str) -> int:
    """Of a window behind the first, whose start is read back always."""
    manifest = store.read_manifest(manifest_sha256)
    index = next(i for i, c in enumerate(manifest.chunks) if i and c.extents)
    return (manifest.window(index)[0] + manifest.chunks[index].extents[0][0]) // 512


def disks(folder: Path, with_data: int) -> list[str]:
    words = []
    for name, device in (("STICK", "usb-storage,drive=DRIVE,removable=on,serial=SERIAL"), ("OWNERS", VIRTIO)):
        words += [
            "-blockdev",
            f"driver=file,filename={folder / name},node-name=n-{name}",
            "-device",
            device.replace("DRIVE", f"n-{name}").replace("SERIAL", name),
        ]
    for case in CASES:
        node = f"n-{case.serial}"
        if case.serial == "LIAR":
            words += ["-blockdev", f"driver=null-co,size={DISK_BYTES},read-zeroes=on,node-name={node}"]
        else:
            words += ["-blockdev", f"driver=file,filename={folder / case.serial},discard=unmap,node-name={'f-' * bool(case.fails)}{node}"]
        if case.fails:
            rule = {"event": "none", "iotype": case.fails, "errno": 5, "sector": with_data if case.fails_at is None else case.fails_at, "once": False}
            words += ["-blockdev", json.dumps({"driver": "blkdebug", "image": f"f-{node}", "node-name": node, "inject-error": [rule]})]
        words += ["-device", case.device.replace("DRIVE", node).replace("SERIAL", case.serial)]
    return words


class start_origin:
    """The store at a web server, which also takes disks out of the machine: `/take-away/SERIAL` is answered when the disk is gone."""

    def __init__(self, root: Path, qmp: Path) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path.startswith("/take-away/"):
                    take_away(qmp, self.path.rpartition("/")[2])
                    body = b"gone"
                else:
                    body = (root / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> int:
        self._thread.start()
        return self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def take_away(qmp: Path, device: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(qmp))
        lines = connection.makefile("rw")
        lines.readline()
        for command in ({"execute": "qmp_capabilities"}, {"execute": "device_del", "arguments": {"id": device}}):
            lines.write(json.dumps(command) + "\n")
            lines.flush()
        while "DEVICE_DELETED" not in lines.readline():
            pass
    time.sleep(0.5)  # the guest's kernel hears of it


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.serial)
@pytest.mark.timeout(900)
def test_each_disk_holds_the_image_whole_or_can_not_boot(case: Case, done: dict[str, Any], images: tuple[ImageStore, dict[int, str], dict[int, bytes]]) -> None:
    said = done[case.serial]
    assert said["ends"] == case.ends, said
    if case.serial == "LIAR":
        return
    disk, image = (done["folder"] / case.serial).read_bytes(), images[2][case.sector_bytes]
    assert disk[slice(*KEPT)] == done["old"][slice(*KEPT)], "a kept partition was written"
    if case.ends != "written":
        if case.serial in UNTOUCHED:
            assert disk == done["old"]
        else:
            assert not any(disk[: case.sector_bytes]), "LBA 0 must stay zero"
        return
    assert said["open_for_writing"] == [case.serial], "the others were not read-only"
    config_at = disk.rindex(CONFIG)
    assert disk[MIB:IMAGE_BYTES] == image[MIB:] or disk[MIB : IMAGE_BYTES - MIB] == image[MIB:-MIB]
    assert disk[:446] == image[:446] and disk[case.sector_bytes : case.sector_bytes + 8] == b"EFI PART"
    assert "data" in {p.name for p in parse_table(disk[:MIB], case.sector_bytes)}
    assert config_at > IMAGE_BYTES - MIB and disk[-case.sector_bytes :][:8] == b"EFI PART"


@pytest.mark.timeout(900)
def test_an_owners_disks_are_as_they_were_though_one_is_removable_and_comes_first(done: dict[str, Any]) -> None:
    for name in OWNERS:
        assert (done["folder"] / name).read_bytes() == done["old"]
    seen = {serial: (transport, sector_bytes, removable) for _, serial, transport, sector_bytes, removable in done["inventory"]}
    assert [path for path, _, transport, _, removable in done["inventory"] if (transport, removable) == ("usb", True)], done["inventory"]
    assert {serial: seen[serial][:2] for serial in ("SATA", "NVME4K", "SCSI4K", "VIRTIO")} == {
        "SATA": ("sata", 512), "NVME4K": ("nvme", 4096), "SCSI4K": ("scsi", 4096), "VIRTIO": ("virtio", 512),
    }  # fmt: skip
