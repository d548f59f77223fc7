"""The writer beside what others write images with: one Debian disk over HTTP onto a loop device, flushed, in interleaved rounds on this machine.

    python -m bench write [ROUNDS]

The origin is nginx on loopback; the disk is a loop device with direct I/O over a file in RAM, full of old data before each write. Its peers:

    agent-tls       ours again, over HTTPS
    curl-zstd-dd    curl | zstd -d | dd oflag=direct: what Tinkerbell's image2disk does, with native tools; nothing is verified
    bmaptool        Debian's bmap-tools, .raw.zst and a map of the blocks with data
    wget-zcat-dd    curtin's way
    curl-qemu       downloaded into RAM, qemu-img convert onto the disk
    ipa-qcow2       ironic-python-agent's own code: download into RAM, checksum, qemu-img convert
    ipa-raw         the same, streamed, checksum afterwards
    partclone       the root partition alone

`stages` is no writer: the CPU seconds of receiving, SHA-256, decoding, writing and reading back the same bytes, each alone, which no writer of this
kind can do without. CPU is of the writer and what it starts; nginx and the loop device's thread are not counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench.scripted_batch import describe_machine
from repave.ca import make_ca, make_certificate
from repave.images.manifest import Manifest, parse_manifest
from repave.lab.os_images import build_debian, default_cache
from repave.lab.processes import find_free_ports

HERE = Path(__file__).parent
TOOLS = {
    "bmaptool": "bmap-tools", "partclone.restore": "partclone", "curl": "curl", "wget": "wget", "nginx": "nginx-light", "sgdisk": "gdisk",
    "partprobe": "parted", "/usr/bin/time": "time",
}  # fmt: skip
IMAGE_BYTES = 2 << 30
LARGE_BYTES = 10 << 30
LINK = "1gbit"
NAMESPACE = "repave-bench"
AGENT = [sys.executable, "-c", "from repave.agent.cli import main; main()", "write"]


@dataclass(frozen=True)
class Measured:
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    stale_bytes: int  # of the image's range, other than the image
    said: dict[str, object]


@dataclass(frozen=True)
class Files:
    """What the origin serves, all of one disk."""

    folder: Path
    manifest_name: str
    manifest: Manifest
    raw_sha256: str
    qcow2_sha256: str
    root_offset: int
    root_bytes: int

    @property
    def raw(self) -> Path:
        return self.folder / "disk.raw"


def main(rounds: int = 5) -> None:
    """The table, then one line a goal."""
    ipa = prepare_tools()
    with ExitStack() as stack:
        ram = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="repave-bench-", dir="/dev/shm")))
        (ram / "bin").mkdir()
        (ram / "bin/udevadm").symlink_to("/bin/true")  # ironic-python-agent waits for udev, which runs in its ramdisk and not here
        files = make_files(ram / "origin")
        url = stack.enter_context(start_origin(ram, files.folder))
        make_ca(ram)
        tls_url = stack.enter_context(start_origin(ram, files.folder, certificate=make_certificate(ram, ["127.0.0.1"], ram / "origin.pem")))
        print(f"write; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}; {rounds} rounds; nginx on loopback", flush=True)
        print(f"image: {IMAGE_BYTES >> 20} MiB, {files.manifest.data_bytes / 1e6:.0f} MB of data, {stored_bytes(files) / 1e6:.0f} MB in chunks", flush=True)
        tls = {"agent-tls": lambda device: ["env", f"SSL_CERT_FILE={ram / 'ca.pem'}", *agent(files, tls_url, device)]}
        compare("a disk of the image's size", rounds, ram, files, IMAGE_BYTES, writers(files, url, ipa, ram) | tls, stages(files, url, ram))
        compare("a disk of 10 GiB", max(2, rounds // 2), ram, files, LARGE_BYTES, writers(files, url, ipa, ram, large=True), None)
        link(rounds, ram, files)


def install(tools: dict[str, str]) -> None:
    """Debian's packages of the tools that are missing."""
    if missing := [package for tool, package in tools.items() if shutil.which(tool) is None]:
        print(f"installing {' '.join(missing)}", flush=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", *missing], check=True, stdout=subprocess.DEVNULL)


def prepare_tools() -> Path:
    """The peers, from the registries; returns ironic-python-agent's Python."""
    install(TOOLS)
    venv = default_cache() / "bench-ironic-python-agent"
    if not (venv / "ready").exists():
        print("installing ironic-python-agent", flush=True)
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--clear", venv], check=True)
        command = [venv / "bin/pip", "install", "-q", "--disable-pip-version-check", "--require-hashes", "-r", HERE / "ironic-python-agent.txt"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (venv / "ready").touch()
    return venv / "bin/python"


def make_files(folder: Path) -> Files:
    folder.mkdir()
    raw = folder / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", build_debian(default_cache()), raw], check=True)
    os.truncate(raw, IMAGE_BYTES)
    subprocess.run(["sgdisk", "-e", raw], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, folder / "disk.qcow2"], check=True)
    subprocess.run(["zstd", "-q", "-3", "-T0", raw, "-o", folder / "disk.raw.zst"], check=True)
    with (folder / "disk.raw.gz").open("wb") as out:
        subprocess.run(["gzip", "-1", "-c", raw], stdout=out, check=True)
    subprocess.run(["bmaptool", "create", "-o", folder / "disk.bmap", raw], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "repave.cli.main", "image", "pack", raw, folder / "pack"], check=True, capture_output=True)
    [path] = (folder / "pack/manifests").iterdir()
    manifest = parse_manifest(path.read_bytes())
    with (folder / "all.chunks").open("wb") as out:
        for chunk in manifest.chunks:
            if chunk.extents:
                out.write((folder / f"pack/chunks/{chunk.sha256[:2]}/{chunk.sha256}").read_bytes())
    parts = json.loads(subprocess.run(["sfdisk", "-J", raw], check=True, capture_output=True).stdout)["partitiontable"]["partitions"]
    root = max(parts, key=lambda p: int(p["size"]))
    offset, size = root["start"] * 512, root["size"] * 512
    with loop_device(raw, offset=offset, size=size) as device, (folder / "root.partclone.zst").open("wb") as out:
        saved = subprocess.Popen(["partclone.ext4", "-c", "-q", "-s", device, "-o", "-", "-L", "/dev/null"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        subprocess.run(["zstd", "-q", "-3", "-T0"], stdin=saved.stdout, stdout=out, check=True)
        saved.wait()
    return Files(folder, path.name, manifest, sha256_of(raw), sha256_of(folder / "disk.qcow2"), offset, size)


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def stored_bytes(files: Files) -> int:
    return sum({c.sha256: c.compressed_bytes for c in files.manifest.chunks if c.extents}.values())


@contextmanager
def start_origin(ram: Path, folder: Path, *, address: str = "127.0.0.1", before: tuple[str, ...] = (), certificate: Path | None = None) -> Iterator[str]:
    """nginx serves the folder, plain and by sendfile; with a certificate over TLS."""
    [port] = find_free_ports(1)
    state = ram / f"nginx-{port}"
    state.mkdir()
    tls = f"ssl_certificate {certificate}; ssl_certificate_key {certificate};" if certificate else ""
    temp = " ".join(f"{kind}_temp_path {state}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (state / "nginx.conf").write_text(
        f"daemon off; user root; pid {state}/pid; error_log stderr; worker_processes 2; events {{ worker_connections 256; }}\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on; {temp} "
        f"server {{ listen {address}:{port}{' ssl' if certificate else ''}; {tls} root {folder}; }} }}\n"
    )
    process = subprocess.Popen([*before, shutil.which("nginx") or "/usr/sbin/nginx", "-c", state / "nginx.conf", "-e", "stderr"], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        assert process.poll() is None, "nginx did not start"
        yield f"http{'s' if certificate else ''}://{address}:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def loop_device(file: Path, *, offset: int = 0, size: int = 0) -> Iterator[str]:
    more = [f"--offset={offset}", f"--sizelimit={size}"] if size else []
    device = subprocess.run(["losetup", "-f", "--show", "--direct-io=on", *more, file], check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def agent(files: Files, url: str, device: str) -> list[str]:
    return [*AGENT, f"{url}/pack/manifests/{files.manifest_name}", device, "--json"]


def writers(files: Files, url: str, ipa: Path, ram: Path, *, large: bool = False) -> dict[str, Callable[[str], list[str]]]:
    """A command for a device, by name."""

    def shell(text: str) -> Callable[[str], list[str]]:
        return lambda device: ["bash", "-c", f"set -eo pipefail; {text.replace('DEV', device)}"]

    apart = ("unshare", "--pid", "--fork", "--mount-proc")  # it asks fuser who holds the disk, which may not look at every process here
    found: dict[str, Callable[[str], list[str]]] = {
        "agent": lambda device: agent(files, url, device),
        "curl-zstd-dd": shell(f"curl -sf {url}/disk.raw.zst | zstd -dc -q | dd of=DEV bs=4M iflag=fullblock oflag=direct conv=fsync status=none"),
        "bmaptool": shell(f"bmaptool -q copy --bmap {files.folder}/disk.bmap {url}/disk.raw.zst DEV"),
        "curl-qemu": shell(
            f"curl -sf -o {ram}/got.qcow2 {url}/disk.qcow2; qemu-img convert -n -t none -f qcow2 -O raw {ram}/got.qcow2 DEV; rm {ram}/got.qcow2"
        ),
        "ipa-qcow2": lambda device: [*apart, str(ipa), str(HERE / "ipa_write.py"), "qcow2", f"{url}/disk.qcow2", files.qcow2_sha256, device],
    }
    if large:
        return found
    return found | {
        "ipa-raw": lambda device: [*apart, str(ipa), str(HERE / "ipa_write.py"), "raw", f"{url}/disk.raw", files.raw_sha256, device],
        "wget-zcat-dd": shell(f"wget -q -O - {url}/disk.raw.gz | zcat | dd of=DEV bs=4M iflag=fullblock oflag=direct conv=fsync status=none"),
        "partclone": shell(
            f"part=$(losetup -f --show -o {files.root_offset} --sizelimit {files.root_bytes} DEV); trap 'losetup -d $part' EXIT; "
            f"curl -sf {url}/root.partclone.zst | zstd -dc -q | partclone.restore -q -s - -o $part -L /dev/null 2>/dev/null; sync $part"
        ),
    }


def stages(files: Files, url: str, ram: Path) -> Callable[[str], list[str]]:
    return lambda device: [sys.executable, str(HERE / "stages.py"), str(files.folder / "pack"), files.manifest_name, f"{url}/pack/chunks", device]


def compare(
    what: str, rounds: int, ram: Path, files: Files, disk_bytes: int, commands: dict[str, Callable[[str], list[str]]], alone: Callable[[str], list[str]] | None
) -> None:
    """All of them in turn, as many rounds; prints a table of medians."""
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    floor: list[float] = []
    disk = (ram if disk_bytes == IMAGE_BYTES else default_cache()) / "disk"
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(measure(disk, disk_bytes, files, command, ram))
        if alone is not None:
            fill(disk, disk_bytes)
            with loop_device(disk) as device:
                done = subprocess.run(alone(device), check=True, capture_output=True, text=True)
            floor.append(json.loads(done.stdout.splitlines()[-1])["sum_s"])
    disk.unlink()
    ours = found["agent"]
    wall, cpu = statistics.median(m.wall_s for m in ours), statistics.median(m.cpu_s for m in ours)
    print(f"\n{what}\n{'writer':14}{'wall s min/med/max':>22}{'x':>7}{'CPU s':>8}{'x':>7}{'RSS MB':>8}{'stale MB':>10}", flush=True)
    for name, each in found.items():
        walls, cpus = sorted(m.wall_s for m in each), statistics.median(m.cpu_s for m in each)
        spread = f"{walls[0]:.2f}/{statistics.median(walls):.2f}/{walls[-1]:.2f}"
        rss, stale = max(m.peak_rss_bytes for m in each) / 1e6, max(m.stale_bytes for m in each) / 1e6
        print(f"{name:14}{spread:>22}{statistics.median(walls) / wall:>7.2f}{cpus:>8.2f}{cpus / cpu:>7.2f}{rss:>8.0f}{stale:>10.1f}", flush=True)
    said = ours[-1].said
    print(f"agent: {said['bytes_written']} bytes written of {said['data_bytes']} data, {said['bytes_fetched']} fetched, zeros: {said['zeroed_by']}", flush=True)
    for name in ("agent", "agent-tls") if floor else ():
        ratios = [m.cpu_s / f for m, f in zip(found[name], floor, strict=True)]
        print(f"{name}'s CPU over the stages alone, round by round: {' '.join(f'{r:.2f}' for r in ratios)}, median {statistics.median(ratios):.2f}", flush=True)


def measure(disk: Path, disk_bytes: int, files: Files, command: Callable[[str], list[str]], ram: Path) -> Measured:
    fill(disk, disk_bytes)
    with loop_device(disk) as device:
        rss = ram / "rss"
        argv = ["/usr/bin/time", "-f", "%M", "-o", str(rss), *command(device)]  # getrusage's peak counts what started a process, too
        env = os.environ | {"TMPDIR": str(ram), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin:{ram / 'bin'}"}
        began = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(argv, env=env, stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            fd = os.open(device, os.O_RDWR)
            os.fsync(fd)
            os.close(fd)
            wall = time.monotonic() - began
            out.seek(0)
            err.seek(0)
            if process.returncode:
                raise RuntimeError(f"{argv} ended with {process.returncode}: {err.read().decode(errors='replace')[-2000:]}")
            lines = out.read().decode(errors="replace").splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Measured(wall, used.ru_utime + used.ru_stime, int(rss.read_text().split()[-1]) * 1024, count_stale(disk, files.raw), said)


def fill(disk: Path, size: int) -> None:
    """Old data in the image's range, and where the disk is larger a little of it in each 64 MiB: a sparse file stands for the rest."""
    old = hashlib.shake_128(b"old").digest(1 << 20)
    disk.unlink(missing_ok=True)
    with disk.open("wb", buffering=0) as f:
        f.truncate(size)
        for at in range(0, IMAGE_BYTES, len(old)):
            os.pwrite(f.fileno(), old, at)
        for at in range(IMAGE_BYTES, size, 64 << 20):
            os.pwrite(f.fileno(), old, at)
        os.fsync(f.fileno())


def count_stale(disk: Path, raw: Path) -> int:
    """Bytes in 4 KiB blocks of the image's range that are not the image's; without the first and the last MiB, where tools put tables of their own."""
    stale = 0
    with disk.open("rb") as a, raw.open("rb") as b:
        a.seek(1 << 20)
        b.seek(1 << 20)
        for _ in range(IMAGE_BYTES // (1 << 20) - 2):
            got, wanted = a.read(1 << 20), b.read(1 << 20)
            if got != wanted:
                stale += sum(4096 for at in range(0, 1 << 20, 4096) if got[at : at + 4096] != wanted[at : at + 4096])
    return stale


def link(rounds: int, ram: Path, files: Files) -> None:
    """Over a veth pair whose server's end sends at most 1 Gbit/s: the agent, and curl that throws the same bytes away."""
    with shaped_link() as (address, before), start_origin(ram, files.folder, address=address, before=before) as url:
        agents, curls, alone = [], [], []
        for _ in range(rounds):
            began = time.monotonic()
            subprocess.run(["curl", "-sf", "-o", "/dev/null", f"{url}/all.chunks"], check=True)
            curls.append(time.monotonic() - began)
            done = measure(ram / "disk", IMAGE_BYTES, files, functools.partial(agent, files, url), ram)
            agents.append(done.wall_s)
            alone.append(float(done.said["stages_s"]["write"]))  # type: ignore[index]
        (ram / "disk").unlink()
    curl, whole, stage = (statistics.median(each) for each in (curls, agents, alone))
    print(
        f"\nat {LINK}: curl -o /dev/null {curl:.2f} s, agent {whole:.2f} s: {curl / whole:.3f} of the link; its write alone {stage:.2f} s: {curl / stage:.3f}",
        flush=True,
    )


@contextmanager
def shaped_link() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The address of a server's end in a namespace of its own, and the words before a command that run it there."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", "rpbench0", "type", "veth", "peer", "name", "rpbench1", "netns", NAMESPACE)
        ip("addr", "add", "10.213.0.1/30", "dev", "rpbench0")
        ip("link", "set", "rpbench0", "up")
        inside = ("ip", "netns", "exec", NAMESPACE)
        subprocess.run([*inside, "ip", "addr", "add", "10.213.0.2/30", "dev", "rpbench1"], check=True)
        subprocess.run([*inside, "ip", "link", "set", "rpbench1", "up"], check=True)
        subprocess.run([*inside, "tc", "qdisc", "add", "dev", "rpbench1", "root", "tbf", "rate", LINK, "burst", "256kb", "latency", "50ms"], check=True)
        yield "10.213.0.2", inside
    finally:
        ip("netns", "del", NAMESPACE)
