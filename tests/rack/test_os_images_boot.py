"""The tiny OS in QEMU, on a disk laid out as the agent lays it out: first boot, home call, login, reboot."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import json
import queue
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from repave.firstboot import FirstBoot, render_config_drive
from repave.lab.os_images import build_tiny, default_cache, write_old_os
from repave.lab.ssh import SshFailed, SshRefused, ssh_login

CPU = "qemu64,+aes,+pclmulqdq,+sse4.1,+sse4.2,+ssse3,+popcnt"
PASSWORD, SERIAL, MIB = "New-Passw0rd!", "REPAVE-0001", 1024 * 1024


@dataclass
class HomeServer:
    url: str
    ca_pem: str
    calls: queue.Queue[tuple[str, dict[str, Any]]]


def hash_password(password: str) -> str:
    return subprocess.run(["openssl", "passwd", "-6", "-stdin"], input=password, capture_output=True, text=True, check=True).stdout.strip()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def make_certificates(folder: Path) -> str:
    """server.pem in `folder` for 10.0.2.2; the CA's certificate is returned."""
    now = datetime.datetime.now(datetime.UTC)

    def sign(name: str, key: Any, issuer: str, issuer_key: Any, *extensions: tuple[x509.ExtensionType, bool]) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        by = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)])
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by).public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuer_key, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = sign("lab CA", ca_key, "lab CA", ca_key, (x509.BasicConstraints(True, 0), True))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(a)) for a in ("10.0.2.2", "127.0.0.1")])
    certificate = sign("server", key, "lab CA", ca_key, (names, False))
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return ca.public_bytes(serialization.Encoding.PEM).decode()


@contextlib.contextmanager
def start_home_server(folder: Path) -> Iterator[HomeServer]:
    """A TLS server on loopback that takes every home call."""
    calls: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.put((self.headers["Authorization"], body | {"path": self.path}))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    ca_pem = make_certificates(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield HomeServer(f"https://10.0.2.2:{server.server_port}/home/v1/run-1", ca_pem, calls)
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def start_machine(disk: Path, ssh_port: int, folder: Path, *, memory_mib: int = 384) -> Iterator[Callable[[], float]]:
    """A machine with real UEFI firmware; what is yielded presses its power button and returns the seconds until it is off."""
    variables, monitor = folder / "vars.fd", folder / "monitor"
    if not variables.exists():
        shutil.copy("/usr/share/OVMF/OVMF_VARS_4M.fd", variables)
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", CPU, "-m", str(memory_mib), "-display", "none",
        "-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd", "-drive", f"if=pflash,format=raw,file={variables}",
        "-drive", f"if=none,id=d0,format=raw,cache=unsafe,file={disk}", "-device", f"virtio-blk-pci,drive=d0,serial={SERIAL},bootindex=1",
        "-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{ssh_port}-:22", "-device", "virtio-net-pci,netdev=n0,romfile=",
        "-serial", f"file:{folder / 'console.log'}", "-monitor", f"unix:{monitor},server=on,wait=off",
    ]  # fmt: skip
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def press_power_button() -> float:
        start = time.monotonic()
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(monitor))
            s.sendall(b"system_powerdown\n")
            machine.wait(120)
        return time.monotonic() - start

    try:
        yield press_power_button
    finally:
        machine.kill()
        machine.wait()


def write_as_the_agent_does(image: Path, disk: Path, drive: bytes, *, size_bytes: int) -> None:
    """The image, its backup table moved to the disk's end, and the config drive in a 64 MiB partition there."""
    shutil.copyfile(image, disk)
    with disk.open("r+b") as f:
        f.truncate(size_bytes)
    subprocess.run(["sfdisk", "--quiet", "--relocate", "gpt-bak-std", disk], check=True)
    first = size_bytes // MIB - 65
    subprocess.run(["sfdisk", "--quiet", "--append", disk], input=f"start={first}MiB, size=64MiB, name=config-2\n", text=True, check=True)
    with disk.open("r+b") as f:
        f.seek(first * MIB)
        f.write(drive)


def read_config_partition(disk: Path, *, size_bytes: int) -> bytes:
    with disk.open("rb") as f:
        f.seek((size_bytes // MIB - 65) * MIB)
        return f.read(64 * MIB)


def login(port: int, password: str, command: str, *, within_s: float = 300) -> str:
    """Tries until the machine answers at all; a refusal counts as an answer."""
    end = time.monotonic() + within_s
    while True:
        try:
            return ssh_login("127.0.0.1", port, password, command)
        except SshRefused:
            raise
        except SshFailed:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def test_the_tiny_os_sets_itself_up_calls_home_and_stays_the_same_after_a_reboot(tmp_path: Path) -> None:
    size, port, disk = 256 * MIB, free_port(), tmp_path / "disk"
    password_hash = hash_password(PASSWORD)
    with start_home_server(tmp_path) as home:
        first_boot = FirstBoot(hostname="web-1", instance_id="i-1", password_hash=password_hash, home_url=home.url, nonce="nonce-of-run-1", ca_pem=home.ca_pem)
        write_as_the_agent_does(build_tiny(default_cache(), variant="tiny-2"), disk, render_config_drive(first_boot), size_bytes=size)
        with start_machine(disk, port, tmp_path) as press_power_button:
            bearer, call = home.calls.get(timeout=300)
            assert bearer == "Bearer nonce-of-run-1"
            assert (call["path"], call["root_disk_serial"], call["password_usable"]) == ("/home/v1/run-1", SERIAL, True)
            boot = login(port, PASSWORD, "cat /etc/repave-release /etc/hostname /proc/sys/kernel/random/boot_id")
            assert boot.split() == ["tiny-2", "web-1", call["boot_id"]]
            with pytest.raises(SshRefused):
                login(port, "Old-Passw0rd!", "true")
            assert login(port, PASSWORD, f"grep -rlF '{password_hash}' /etc /var /run || true").split() == ["/etc/shadow"]
            assert press_power_button() < 100
        assert not any(read_config_partition(disk, size_bytes=size))
        with start_machine(disk, port, tmp_path):
            keys = call["ssh_host_keys"]
            assert keys and login(port, PASSWORD, "cat /etc/hostname /etc/ssh/ssh_host_ed25519_key.pub").split()[:3] == ["web-1", *keys[0].split()]
            assert ssh_login("127.0.0.1", port, PASSWORD, "echo same key", host_keys=keys) == "same key\n"
        assert home.calls.empty()


def test_the_old_os_of_the_rack_takes_its_known_password_and_turns_off_when_asked(tmp_path: Path) -> None:
    disk, port = tmp_path / "disk", free_port()
    image = build_tiny(default_cache())
    write_old_os(image, disk, password_hash=hash_password("Old-Passw0rd!"), hostname="old-1", size_bytes=512 * MIB)
    with start_machine(disk, port, tmp_path) as press_power_button:
        assert login(port, "Old-Passw0rd!", "cat /etc/repave-release /etc/hostname").split() == ["tiny-1", "old-1"]
        assert press_power_button() < 100
