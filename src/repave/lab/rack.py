"""The virtual rack, whole: machines with an old OS, their BMCs, Repave on a site of its own, everything registered as an operator would.

    FOLDER/rack machines · site Repave's site · other a machine of another project · lab.json for clients · service.json the service's pid

Machines, BMCs and service are detached: they outlive the command that started them, and `rack_down` finds them by pid and start time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.cli.client import Client, Endpoint
from repave.lab import scripted_os
from repave.lab.faults import start_proxies
from repave.lab.machines import QemuRack
from repave.lab.os_images import build_debian, build_tiny, write_old_os
from repave.lab.phases import phase, say
from repave.lab.processes import ProcessRef, is_alive, stop_processes
from repave.lab.scripted import ScriptedRack
from repave.lab.service import LAB_FILE, Service, import_image, register_machine, restart_service, start_service, write_lab_file
from repave.lab.ssh import SshFailed, ssh_login
from repave.lab.state import Machine, find_state
from repave.password_hash import hash_password
from repave.ramdisk.build import build_ramdisk
from repave.ramdisk.media import build_iso
from repave.secrets import write_private

OLD_PASSWORD = "Old-Lab-2026"  # noqa: S105  known on purpose: the old OS of a lab machine
ROOT_DISK_BYTES = 4 << 30
MOST_QEMU, MOST_SCRIPTED = 50, 1000  # more is a slip of the finger: a QEMU machine has a GiB of memory
OLD_OS_S = 180.0  # an emulated machine needs 12 s for the tiny OS; two at once on two busy cores several times that
SERVICE_FILE = "service.json"
PROXIES_FILE = "proxies.json"
_BLOCK = 1 << 20
Json = dict[str, Any]
Begun = Callable[[Client], None]  # told as soon as the service answers, before the machines boot


def _nothing(_: Client) -> None:
    pass


def rack_up(count: int, *, scripted: bool, folder: Path, debian: bool = True, data_disk: bool = False, begun: Begun = _nothing) -> Json:
    """`count` instances with Linux are running, in a scripted rack one with Windows beside them, and one of another project.

    Returns what lab.json holds. A live rack of this folder that has as many is taken as it is.
    """
    live = find_live_rack(folder)
    if live is not None and live["scripted"] is scripted and sum(i.get("os_type") != "Windows" for i in live["instances"]) >= count:
        say("5/6 rack     ✓ the one that runs already")
        begun(Client(None, Endpoint(live["endpoint"], live["token"])))
        return live
    rack_down(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("REPAVE_CACHE", folder / "cache"))
    try:
        if scripted:
            return _scripted_up(count, folder, begun)
        boot_iso = build_boot_iso(cache, folder)
        return _qemu_up(count, folder, boot_iso, build_images(cache, debian=debian), data_disk, begun)
    except BaseException:
        rack_down(folder)
        raise


def build_boot_iso(cache: Path, folder: Path) -> Path:
    """The boot media's ISO of this checkout's agent."""
    why = "the system that a server boots to be written; a minute, then cached by its recipe"
    with phase("3/6 ramdisk", why, fix="is Debian's mirror reachable? apt-get update, then again") as took:
        files = build_ramdisk(cache, progress=lambda line: say(f"3/6 ramdisk  {line}"))
        iso = folder / "boot.iso"
        build_iso(files, iso)
        say(f"3/6 ramdisk  ✓ {iso.stat().st_size / 1e6:.1f} MB ISO  {took()}")
    return iso


def build_images(cache: Path, *, debian: bool) -> dict[str, Path]:
    """Something real to install, each from the cache where it is there."""
    why = "something real to install; two minutes, then cached by their recipes"
    with phase("4/6 images", why, fix="is Debian's mirror reachable, and are 3 GB of disk free? then again") as took:
        images = {name: build_tiny(cache, variant=name, progress=lambda line: say(f"4/6 images   {line}")) for name in ("tiny-1", "tiny-2")}
        if debian:
            images["debian-12"] = build_debian(cache, progress=lambda line: say(f"4/6 images   {line}"))
        say(f"4/6 images   ✓ {', '.join(images)}  {took()}")
    return images


def _qemu_up(count: int, folder: Path, boot_iso: Path, images: dict[str, Path], data_disk: bool, begun: Begun) -> Json:
    logs = folder / "rack"
    why = f"{count} machines with UEFI firmware and an old OS behind {count} Redfish BMCs, and Repave; a minute, made anew each time"
    with phase("5/6 rack", why, log=lambda: _newest_log(logs, folder), fix="repave rack down; is memory free (1 GiB a machine)?") as took:
        rack, other = QemuRack(logs, count=count, data_disk=data_disk), ScriptedRack(folder / "other", count=1)
        service = _start(folder, agent_host="10.0.2.2", boot_iso=boot_iso)
        say(f"5/6 rack     Repave answers at {service.endpoint}  {took()}; now the machines boot their old OS")
        begun(service.client())
        machines = rack.start(root_disk_bytes=ROOT_DISK_BYTES)
        proxies, bmc_urls = start_proxies(logs, machines)
        write_private(folder / PROXIES_FILE, json.dumps(dataclasses.asdict(proxies)).encode())
        password_hash = hash_password(OLD_PASSWORD, rounds=5000)
        for machine in machines:
            write_old_os(images["tiny-1"], machine.root_disk, password_hash=password_hash, hostname=machine.name, size_bytes=ROOT_DISK_BYTES)
            power_on(machine)
        other_machines = other.start()
        _import(service, images)
        for machine in machines:
            wait_for_ssh(machine, OLD_PASSWORD)
        registered = [
            (register_machine(service.client(), dataclasses.replace(m, bmc_url=bmc_urls[m.name]), unit=n), m.ssh_port) for n, m in enumerate(machines, 1)
        ]
        lab = write_lab_file(folder, service, scripted=False, instances=registered, other=dataclasses.replace(other_machines[0], name="other01"))
        say(f"5/6 rack     ✓ {', '.join(m.name for m in machines)} run the old OS, its old password works  {took()}")
    return lab


def _newest_log(*folders: Path) -> Path | None:
    return max((path for folder in folders for path in folder.glob("*.log")), key=lambda path: path.stat().st_mtime, default=None)


def _scripted_up(count: int, folder: Path, begun: Begun) -> Json:
    """Nothing is fetched or built but small stand-ins for disc and images, under the real ones' names."""
    boot_iso = scripted_os.build_disc(folder / "boot.iso")
    images = {name: scripted_os.build_image(folder / f"{name}.raw", name) for name in ("tiny-1", "tiny-2", "windows-2022")}
    windows_image = images.pop("windows-2022")
    rack = ScriptedRack(folder / "rack", count=count + 2)
    machines = rack.start()
    for machine in machines:
        scripted_os.write_old_os(machine.root_disk)
        power_on(machine)
    service = _start(folder, agent_host="127.0.0.1", boot_iso=boot_iso)
    begun(service.client())
    _import(service, images)
    import_image(service.client(), windows_image, name="windows-2022", os_type="Windows")
    mine, windows, other = machines[:count], machines[count], machines[count + 1]
    registered = [(register_machine(service.client(), m, unit=n), 0) for n, m in enumerate(mine, 1)]
    registered.append((register_machine(service.client(), windows, unit=count + 1, os_type="Windows", image="windows-2022"), 0))
    lab = write_lab_file(folder, service, scripted=True, instances=registered, other=dataclasses.replace(other, name="other01"))
    say(f"5/6 rack     {count} scripted machines and one with Windows; Repave at {service.endpoint}")
    return lab


def _start(folder: Path, *, agent_host: str, boot_iso: Path) -> Service:
    service = start_service(folder, agent_host=agent_host, boot_iso=boot_iso)
    _record(folder, service.process)
    return service


def _find_recorded(path: Path) -> ProcessRef | None:
    process = ProcessRef(**json.loads(path.read_text())) if path.exists() else None
    return process if process and is_alive(process) else None


def _record(folder: Path, process: ProcessRef) -> None:
    write_private(folder / SERVICE_FILE, json.dumps(dataclasses.asdict(process)).encode())


def find_service(folder: Path) -> ProcessRef | None:
    """The service of this rack where it runs."""
    return _find_recorded(folder / SERVICE_FILE)


def start_service_again(folder: Path) -> ProcessRef:
    """The service runs again on the same site, after it was killed."""
    process = restart_service(folder)
    _record(folder, process)
    return process


def _import(service: Service, images: dict[str, Path]) -> None:
    for name, path in images.items():
        started = time.monotonic()
        made = import_image(service.client(), path, name=name)
        say(f"4/6 images   {name}: {made['stored_bytes'] / 1e6:.0f} MB in chunks, {time.monotonic() - started:.1f} s")


def power_on(machine: Machine) -> None:
    with RedfishBmc(BmcAddress(machine.bmc_url, machine.bmc_username, machine.bmc_password)) as bmc:
        bmc.power_on()


def wait_for_ssh(machine: Machine, password: str, *, deadline_s: float = OLD_OS_S) -> None:
    """The machine's OS takes this password. Raises SshFailed when the deadline passed."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            ssh_login("127.0.0.1", machine.ssh_port, password, "true")
            return
        except SshFailed:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def find_live_rack(folder: Path) -> Json | None:
    """lab.json of a rack whose machines and service run."""
    lab = rack_state(folder)
    if lab is None or find_service(folder) is None:
        return None
    if (folder / "other").exists():
        return lab if QemuRack(folder / "rack").is_up() and _find_recorded(folder / PROXIES_FILE) else None
    return lab if ScriptedRack(folder / "rack").is_up() else None


def rack_state(folder: Path) -> Json | None:
    """What lab.json holds, None where no rack is."""
    path = folder / LAB_FILE
    return dict(json.loads(path.read_text())) if path.exists() else None


def describe_machines(folder: Path, *, digest: bool) -> list[Json]:
    """The instances of the rack that is up; with `digest` what is on their root disks, holes and zeros alike."""
    lab, state = rack_state(folder), find_state(folder / "rack")
    disks = {m.name: m.root_disk for m in state.machines} if state else {}
    return [i | ({"digest": digest_disk(disks[i["name"]])} if digest and i["name"] in disks else {}) for i in (lab or {}).get("instances", [])]


def digest_disk(path: Path) -> str:
    """SHA-256 over every block that is not zero, and where it is. Blocks about a second for each GiB of data."""
    found = hashlib.sha256()
    with path.open("rb") as disk:
        at, end = 0, os.fstat(disk.fileno()).st_size
        while at < end:
            try:
                at = os.lseek(disk.fileno(), at, os.SEEK_DATA) // _BLOCK * _BLOCK
            except OSError:  # ENXIO: a hole up to the end
                break
            disk.seek(at)
            block = disk.read(_BLOCK)
            if block.strip(b"\0"):
                found.update(at.to_bytes(8) + block)
            at += _BLOCK
    return found.hexdigest()


def rack_down(folder: Path) -> None:
    """No process of the rack runs, its site and disks are gone; the cache stays. Repeatable."""
    service = find_service(folder)
    if service is not None:
        stop_processes([service], grace_s=10)
    if proxies := _find_recorded(folder / PROXIES_FILE):
        stop_processes([proxies])
    real = (folder / "other").exists()
    if (folder / "rack").exists():
        (QemuRack if real else ScriptedRack)(folder / "rack").stop()
    if real:
        ScriptedRack(folder / "other").stop()
    for name in ("rack", "other", "site"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (LAB_FILE, SERVICE_FILE, PROXIES_FILE):
        (folder / name).unlink(missing_ok=True)


__all__ = ["OLD_PASSWORD", "find_service", "rack_down", "rack_state", "rack_up", "start_service_again"]
