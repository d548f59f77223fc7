"""The boot media in QEMU with UEFI firmware: a live disc brings the agent's hello, or gives the local disk back; an inert one does so at once."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import queue
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from repave.agent.protocol import ASK_HEADER, Slot
from repave.ca import make_ca, make_certificate
from repave.ramdisk import cpio
from repave.ramdisk.build import BootFiles, build_ramdisk
from repave.ramdisk.media import SLOT_BYTES, BootMedia, build_iso, render_slot

CPU = "qemu64,+aes,+pclmulqdq,+sse4.1,+sse4.2,+ssse3,+popcnt"
MAC, DISK_SERIAL, TOKEN = "52:54:00:12:34:56", "RAMDISK-0001", "one-boot-only"
STATIC = {"mac": MAC, "address": "10.0.2.77", "prefix": 24, "gateway": "10.0.2.2", "dns": ["10.0.2.3"]}
MIB = 1024 * 1024
KILLED_ONCE = {  # laid over the ramdisk: the agent's package, which kills the first Python that imports it
    "usr/lib/repave/repave/agent/__init__.py": cpio.file(
        b"import os\nif not os.path.exists('/run/killed'):\n    open('/run/killed', 'w').close()\n    os.kill(os.getpid(), 9)\n"
    )
}
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"  # UEFI 2.10, 3.3; four bytes of attributes, then the value
SAYS_SECURE_BOOT = {
    "usr/lib/repave/repave/agent/__init__.py": cpio.file(f"print('SecureBoot =', open('{SECURE_BOOT}', 'rb').read()[4], flush=True)\n".encode())
}
BOOT_DEADLINE_S = 240  # 25 s on a quiet machine without KVM; others may be using it


@pytest.fixture(scope="module")
def files() -> BootFiles:
    return build_ramdisk(Path(os.environ.get("REPAVE_CACHE", ".repave/cache")), progress=print)


@pytest.fixture(scope="module")
def media(files: BootFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootMedia]:
    iso = tmp_path_factory.mktemp("iso") / "boot.iso"
    build_iso(files, iso)
    media = BootMedia(iso)
    yield media
    media.close()


@pytest.mark.parametrize(("network", "secure_boot"), [(None, False), (STATIC, True)], ids=["dhcp", "static-address-and-secure-boot"])
@pytest.mark.timeout(600)
def test_a_live_disc_brings_the_agents_hello(media: BootMedia, tmp_path: Path, network: dict[str, Any] | None, secure_boot: bool) -> None:
    """Without network settings also where its first agent is killed before it has said a word."""
    disk = make_local_disk(tmp_path / "disk.img")
    with provisioning_listener(tmp_path) as (url, ca_pem, hellos):
        slot = render_slot(Slot("run-1", url, TOKEN, ca_pem, network))
        laid_over = SAYS_SECURE_BOOT if secure_boot else KILLED_ONCE
        slot = (slot.rstrip(b"\0") + bytes(4) + cpio.render_archive(laid_over)).ljust(SLOT_BYTES, b"\0")
        started = time.monotonic()
        with machine(tmp_path, media.read(0, media.size, slot), disk, secure_boot=secure_boot) as console:
            path, authorization, hello = wait_for(hellos, console)
    print(f"hello {time.monotonic() - started:.1f} s after power-on, {hello['uptime_s']} s after kernel start")
    assert (path, authorization) == ("/agent/v1/hello", f"Bearer {TOKEN}")
    assert hello["macs"] == [MAC]
    assert hello["firmware"] == "uefi"
    assert [(d["path"], d["serial"], d["size_bytes"]) for d in hello["disks"]] == [("/dev/vda", DISK_SERIAL, disk.stat().st_size)]
    shown = console.read_text(errors="replace")
    assert TOKEN not in shown
    assert ("10.0.2.77/24" in shown) is (network is not None)
    assert shown.count("the agent was killed by signal 9") == (not secure_boot)
    assert ("SecureBoot = 1" in shown) is secure_boot


@pytest.mark.timeout(600)
def test_the_firmware_boots_the_disc_by_http_as_a_bmc_would_tell_it_to(media: BootMedia, tmp_path: Path) -> None:
    """UEFI HTTP boot under Secure Boot, from the boot option that a BMC makes of HttpBootUri. Nothing is in the drive."""
    with provisioning_listener(tmp_path) as (url, ca_pem, hellos):
        iso = media.read(0, media.size, render_slot(Slot("run-1", url, TOKEN, ca_pem, None)))
        with media_listener(iso) as iso_url:
            disk = make_local_disk(tmp_path / "disk.img")
            with machine(tmp_path, None, disk, secure_boot=True, http_boot=iso_url) as console:
                path, authorization, _ = wait_for(hellos, console)
    assert (path, authorization) == ("/agent/v1/hello", f"Bearer {TOKEN}")


@pytest.mark.timeout(600)
def test_secure_boot_refuses_the_same_disc_with_a_kernel_that_is_not_signed(files: BootFiles, tmp_path: Path) -> None:
    """Microsoft's keys, shim and GRUB as on the disc that said hello; the kernel alone lost its signature."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(remove_signature(files.kernel.read_bytes()))
    build_iso(dataclasses.replace(files, kernel=kernel), tmp_path / "unsigned.iso")
    slot = render_slot(Slot("run-1", "https://10.0.2.2:1", TOKEN, "", None))
    media = BootMedia(tmp_path / "unsigned.iso")
    with machine(tmp_path, media.read(0, media.size, slot), make_local_disk(tmp_path / "disk.img"), secure_boot=True, must_end=True) as console:
        wait_for_line("no local disk has a UEFI boot loader", console)
    media.close()
    shown = console.read_text(errors="replace")
    assert "bad shim signature" in shown and "repave" not in shown.replace("Repave", "")


def remove_signature(pe: bytes) -> bytes:
    """A PE image (Microsoft's PE format, "Optional header data directories") without its certificate table, which lies at its end."""
    header = int.from_bytes(pe[0x3C:0x40], "little") + 24
    assert pe[header : header + 2] == b"\x0b\x02", "no PE32+"
    entry = header + 112 + 4 * 8
    at, size = int.from_bytes(pe[entry : entry + 4], "little"), int.from_bytes(pe[entry + 4 : entry + 8], "little")
    assert at and at + size == len(pe)
    return pe[:entry] + bytes(8) + pe[entry + 8 : at]


@pytest.mark.timeout(600)
def test_an_address_on_a_tagged_vlan_speaks_with_its_tag(media: BootMedia, tmp_path: Path) -> None:
    """The bug: the VLAN was taken and never told to the ramdisk. QEMU's network drops tagged frames, so they are looked at and not answered."""
    sent = tmp_path / "sent.pcap"
    make_ca(tmp_path)
    slot = render_slot(Slot("run-1", "https://10.0.2.2:1", TOKEN, (tmp_path / "ca.pem").read_text(), STATIC | {"vlan": 42}))
    with machine(tmp_path, media.read(0, media.size, slot), make_local_disk(tmp_path / "disk.img"), dump=sent) as console:
        wait_for_line(".42 10.0.2.77/24", console)
        tagged = bytes.fromhex(MAC.replace(":", "") + "8100" + "002a" + "0806")  # from our NIC, IEEE 802.1Q, VLAN 42, ARP
        ends_at = time.monotonic() + 30
        while not (sent.exists() and tagged in sent.read_bytes()):
            assert time.monotonic() < ends_at, console.read_text(errors="replace")[-2000:]
            time.sleep(0.2)


@pytest.mark.timeout(600)
def test_a_live_disc_whose_token_is_spent_or_whose_server_is_silent_gives_the_local_disk_back(media: BootMedia, files: BootFiles, tmp_path: Path) -> None:
    """The disc stays in the drive, first in the boot order: what the agent tells the firmware must be stronger."""
    with provisioning_listener(tmp_path) as (url, ca_pem, hellos), contextlib.ExitStack() as both:
        consoles = []
        for name, server in (("spent", url), ("silent", "https://10.0.2.2:1")):
            folder = tmp_path / name
            folder.mkdir()
            slot = render_slot(Slot("run-1", server, TOKEN, ca_pem, None, give_up_s=10))
            disk = make_local_disk(folder / "disk.img", files, says="THE LOCAL DISK BOOTED")
            consoles.append(both.enter_context(machine(folder, media.read(0, media.size, slot), disk, may_reboot=True)))
        wait_for(hellos, consoles[0])
        for console in consoles:
            wait_for_line("THE LOCAL DISK BOOTED", console)
            assert "booting the local disk: " in console.read_text(errors="replace")
        assert hellos.empty(), "a refused hello was sent again"


@pytest.mark.timeout(600)
def test_an_inert_disc_boots_the_local_disk(media: BootMedia, files: BootFiles, tmp_path: Path) -> None:
    disk = make_local_disk(tmp_path / "disk.img", files, says="THE LOCAL DISK BOOTED")
    with machine(tmp_path, media.read(0, media.size, None), disk) as console:
        wait_for_line("THE LOCAL DISK BOOTED", console)


@pytest.mark.timeout(600)
def test_an_inert_disc_without_a_bootable_disk_says_so_and_powers_off(media: BootMedia, tmp_path: Path) -> None:
    disk = make_local_disk(tmp_path / "disk.img")
    with machine(tmp_path, media.read(0, media.size, None), disk, must_end=True) as console:
        wait_for_line("no local disk has a UEFI boot loader", console)


@contextlib.contextmanager
def machine(
    folder: Path,
    iso: bytes | None,
    disk: Path,
    *,
    secure_boot: bool = False,
    must_end: bool = False,
    may_reboot: bool = False,
    dump: Path | None = None,
    http_boot: str = "",
) -> Iterator[Path]:
    """A running machine; gives its console's file. `must_end`: it powers itself off before the context ends; `may_reboot`: else a reboot ends it.
    `dump`: its frames, as pcap. `http_boot`: its firmware boots from there, once; then it needs memory for the disc too."""
    console = folder / "console"
    console.touch()
    shutil.copyfile("/usr/share/OVMF/OVMF_VARS_4M.ms.fd" if secure_boot else "/usr/share/OVMF/OVMF_VARS_4M.fd", folder / "vars.fd")
    if http_boot:
        make_boot_option = [Path(sys.executable).with_name("virt-fw-vars"), "--inplace", folder / "vars.fd", "--set-boot-uri", http_boot]
        subprocess.run(make_boot_option, check=True, capture_output=True)
    code = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd" if secure_boot else "/usr/share/OVMF/OVMF_CODE_4M.fd"
    smm = ["-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"]
    command = [
        "qemu-system-x86_64", *(smm if secure_boot else ["-machine", "q35"]), "-accel", "tcg", "-cpu", CPU, "-m", "768" if http_boot else "512",
        "-display", "none", *([] if may_reboot else ["-no-reboot"]), "-serial", f"file:{console}",
        "-drive", f"if=pflash,format=raw,readonly=on,file={code}", "-drive", f"if=pflash,format=raw,file={folder / 'vars.fd'}",
        "-drive", f"if=none,id=disk,format=raw,file={disk}", "-device", f"virtio-blk-pci,drive=disk,serial={DISK_SERIAL},bootindex=10",
        "-nic", "none", "-netdev", "user,id=net", "-device", f"virtio-net-pci,netdev=net,mac={MAC},bootindex=20",
    ]  # fmt: skip
    if iso is not None:
        (folder / "boot.iso").write_bytes(iso)
        command += ["-drive", f"if=none,id=cd,media=cdrom,readonly=on,file={folder / 'boot.iso'}", "-device", "ide-cd,drive=cd,bootindex=0"]
    if dump is not None:
        command += ["-object", f"filter-dump,id=dump,netdev=net,file={dump}"]
    process = subprocess.Popen(command)
    try:
        yield console
        if must_end:
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def make_local_disk(path: Path, files: BootFiles | None = None, *, says: str = "") -> Path:
    """A GPT disk with an ESP; with `files`, EFI/BOOT holds shim and a GRUB that says something and stops."""
    with path.open("wb") as out:
        out.truncate(64 * MIB)
    subprocess.run(["sfdisk", "-q", path], input="label: gpt\nstart=1MiB, size=48MiB, type=U\n", text=True, check=True)
    subprocess.run(["mkfs.vfat", "-F", "32", "--offset", "2048", path, "49152"], check=True, capture_output=True)
    if files is None:
        return path
    config = path.with_suffix(".cfg")
    config.write_text(f"echo {says}\nhalt\n")
    esp = f"{path}@@1M"
    subprocess.run(["mmd", "-i", esp, "::/EFI", "::/EFI/BOOT", "::/boot", "::/boot/grub"], check=True)
    for source, target in ((files.shim, "EFI/BOOT/BOOTX64.EFI"), (files.grub, "EFI/BOOT/grubx64.efi"), (config, "boot/grub/grub.cfg")):
        subprocess.run(["mcopy", "-i", esp, source, f"::/{target}"], check=True)
    return path


@contextlib.contextmanager
def provisioning_listener(folder: Path) -> Iterator[tuple[str, str, queue.Queue[tuple[str, str, Any]]]]:
    """A TLS server that machines see as 10.0.2.2; it takes every hello down and refuses it. Gives URL, CA, hellos."""
    make_ca(folder)
    hellos: queue.Queue[tuple[str, str, Any]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hellos.put((self.path, self.headers["Authorization"], body))
            self.send_response(401)
            self.send_header(ASK_HEADER, self.headers[ASK_HEADER])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(folder, ["10.0.2.2"], folder / "server.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://10.0.2.2:{server.server_port}", (folder / "ca.pem").read_text(), hellos
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def media_listener(iso: bytes) -> Iterator[str]:
    """A plain HTTP server with one disc, answered as `api/media.py` does. Gives its URL as machines see it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # OVMF takes no other

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(iso)))
            self.send_header("Content-Type", "application/octet-stream")  # that it is an ISO the firmware takes from the URL's end
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(iso)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://10.0.2.2:{server.server_port}/media/run-1/key/boot.iso"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wait_for(hellos: queue.Queue[tuple[str, str, Any]], console: Path) -> tuple[str, str, Any]:
    try:
        return hellos.get(timeout=BOOT_DEADLINE_S)
    except queue.Empty:
        pytest.fail(f"no hello; the console's end:\n{console.read_text(errors='replace')[-2000:]}")


def wait_for_line(text: str, console: Path) -> None:
    ends_at = time.monotonic() + BOOT_DEADLINE_S
    while text not in console.read_text(errors="replace"):
        if time.monotonic() > ends_at:
            pytest.fail(f"the console never said {text!r}; its end:\n{console.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)
