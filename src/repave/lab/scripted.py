"""Scripted machines: many, in one process, without QEMU. What is real in them: the BMC's software and the agent.

Each machine has a BMC of its own at a port of its own: sushy-emulator's fake driver, one process for every fifty ports.
The driver keeps boot order and media; power is the machine's, so it reacts at once (the driver by itself waits 1-11 s).
The machine itself is played: power on with the CD first runs the real `repave-agent` against a file as its disk; power
on from the disk runs a scripted OS, whose first boot reads the config drive, erases it and calls home with the very
code that the drive carries. No SSH.

`faults.json` in the rack's folder makes machines misbehave, from the next boot or request on: {"lab01": ["no-hello"]}.
`firmware.json` makes them slow: the seconds from power on until anything boots, {"lab01": 12.5}.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from repave.lab import scripted_os
from repave.lab.media_slot import find_slot
from repave.lab.processes import find_free_ports, start_detached, stop_processes, wait_for_port
from repave.lab.state import STATE_FILE, Machine, RackState, clear_machine, create_disk, create_machine, find_state, write_auth_file, write_private, write_state

ROOT_DISK_BYTES = 512 << 20
FAULTS_FILE = "faults.json"
FIRMWARE_FILE = "firmware.json"
PER_PROCESS = 50  # machines: their BMCs share one interpreter lock
BMC_LOG = "bmc.log"
FAULTS = ("no-hello", "never-home", "ignore-graceful", "ignore-override", "4k-sectors", "hold-disk-boot", "hold-media")

# A Python start costs 0.3 s of a core: fifty at once would starve the service under test, which has the same cores.
_starting = threading.BoundedSemaphore(2 * (os.cpu_count() or 1))
_START_S = 0.7
_AGENT_STARTS = 5
_HOLD_S = 60.0


class ScriptedRack:
    """`count` scripted machines in `folder`, made by `start`, ended by `stop`, also by another process than the starter."""

    def __init__(self, folder: Path, *, count: int = 2) -> None:
        self.folder = folder.resolve()
        self.count = count
        self._state = find_state(self.folder) or RackState(scripted=True)

    @property
    def machines(self) -> list[Machine]:
        return self._state.machines

    def is_up(self) -> bool:
        """Whether the machines' process runs."""
        return self._state.is_up()

    def start(self, *, root_disk_bytes: int = ROOT_DISK_BYTES) -> list[Machine]:
        """The machines are powered off and their BMCs answer. Destroys: disks of an earlier rack in this folder.

        Raises: RuntimeError when a rack is there already or the process does not start; then nothing of it is left.
        """
        if self.machines:
            raise RuntimeError(f"a rack is in {self.folder} already")
        (self.folder / "scripted/tmp").mkdir(parents=True, exist_ok=True)
        ports = find_free_ports(self.count)
        names = [f"lab{i + 1:02}" for i in range(self.count)]
        self._state.machines = [create_machine(self.folder, name, bmc_port=port, data_disk=True) for name, port in zip(names, ports, strict=True)]
        for machine in self.machines:
            clear_machine(self.folder, machine.name)
            create_disk(machine.root_disk, root_disk_bytes)
            create_data_disk(machine, root_disk_bytes)
            write_auth_file(self.folder, machine)
        log = self.folder / "scripted.log"
        try:
            write_state(self.folder, self._state)
            env = os.environ | {"TMPDIR": str(self.folder / "scripted/tmp")}  # the emulator downloads media here
            for first in range(0, self.count, PER_PROCESS):
                command = [sys.executable, "-m", "repave.lab.scripted", "--folder", str(self.folder), "--first", str(first)]
                self._state.processes.append(start_detached("scripted", command, log=log, env=env, cwd=self.folder))
            write_state(self.folder, self._state)
            for number, machine in enumerate(self.machines):
                wait_for_port(machine.bmc_port, process=self._state.processes[number // PER_PROCESS], log=log, deadline_s=60)
        except BaseException:
            self.stop()
            raise
        return self.machines

    def stop(self) -> None:
        """No process of the rack is left; disks and consoles stay. Repeatable."""
        stop_processes(self._state.processes)
        shutil.rmtree(self.folder / "scripted", ignore_errors=True)
        for name in (STATE_FILE, FAULTS_FILE, FIRMWARE_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self._state = RackState(scripted=True)


def set_faults(folder: Path, faults: dict[str, Sequence[str]]) -> None:
    """These machines misbehave so, all others well. Names of faults: `FAULTS`."""
    unknown = {f for names in faults.values() for f in names} - set(FAULTS)
    if unknown:
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
    write_private(folder / FAULTS_FILE, json.dumps({name: list(of) for name, of in faults.items()}))


def set_firmware(folder: Path, seconds: dict[str, float]) -> None:
    """So long each of these machines takes from power on until anything boots; all others take no time."""
    write_private(folder / FIRMWARE_FILE, json.dumps(seconds))


@contextmanager
def start_scripted_rack(folder: Path, *, count: int) -> Iterator[ScriptedRack]:
    """A rack of scripted machines, powered off, for as long as the block runs."""
    rack = ScriptedRack(folder, count=count)
    rack.start()
    try:
        yield rack
    finally:
        rack.stop()


@dataclass
class TimeOn:
    """One time of being on. Whatever began in it ends with it and touches no later one: threads are slow to notice that the power is gone."""

    off: threading.Event = field(default_factory=threading.Event)
    agent: subprocess.Popen[bytes] | None = None
    os_runs: bool = False


class Player:
    """One machine: what happens when its power, boot order and CD are what they are."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine = machine
        self.cd: Path | None = None
        self.boot_target = "Hdd"
        self._folder = folder
        self._lock = threading.Lock()
        self._on = TimeOn()  # the last one
        self._on.off.set()

    @property
    def is_on(self) -> bool:
        return not self._on.off.is_set()

    def reset(self, kind: str) -> None:
        """A Redfish ResetType, done at once. A restart is off, then on."""
        graceful = kind.startswith("Graceful")
        if graceful and (not self._on.os_runs or self.has("ignore-graceful")):
            self._say("the power button was pressed; nobody cares")
            return
        if "Off" in kind or "Shutdown" in kind or "Restart" in kind:
            self._power_off(self._on, "shut down" if graceful else "power cut")
        if kind in ("On", "ForceOn") or "Restart" in kind:
            self._power_on()
            self._hold_answer()

    def _hold_answer(self) -> None:
        """The machine boots from its disk already, while whoever asked for power waits for the BMC's answer until the fault is over."""
        ends_at = time.monotonic() + _HOLD_S
        if self.boot_target != "Cd" and self.has("hold-disk-boot"):
            self._say("the BMC holds its answer")
            while self.has("hold-disk-boot") and time.monotonic() < ends_at:
                time.sleep(0.05)

    def _power_on(self) -> None:
        with self._lock:
            if self.is_on:
                return
            self._on = TimeOn()
            threading.Thread(target=self._boot, args=(self._on,), name=self.machine.name, daemon=True).start()

    def _power_off(self, on: TimeOn, why: str) -> None:
        with self._lock:
            if not on.off.is_set():
                self._say(why)
            on.off.set()
            on.os_runs = False
            if on.agent is not None:
                on.agent.kill()

    def _boot(self, on: TimeOn) -> None:
        """One time of being on. It ends by itself only where the agent switches off; a machine that hangs stays on."""
        try:
            on.off.wait(self._firmware_s())
            if self.boot_target == "Cd" and self.cd is not None and not self.has("ignore-override"):
                self._say("boot: CD")
                then = self._run_ramdisk(self.cd, on)
                if then == "power-off":
                    self._power_off(on, "the agent switched off")
                if then != "boot-local":
                    return
            if not on.off.is_set():
                self._boot_disk(on)
        except Exception as error:  # a machine that crashed hangs; its console says why
            self._say(f"crashed: {type(error).__name__}: {error}")

    def _run_ramdisk(self, cd: Path, on: TimeOn) -> str | None:
        """What the agent did at its end, None where it hangs. Media without a live run boot the local disk, as GRUB does."""
        slot = find_slot(cd)
        if slot is None:
            self._say("ramdisk: no run on these media")
            return "boot-local"
        if self.has("no-hello"):
            self._say("ramdisk: hangs")
            return None
        slot_file, machine_file, ended = (self._folder / f"scripted/{self.machine.name}.{name}" for name in ("slot", "machine", "ended"))
        for left in (ended, slot_file.with_name(f"{slot_file.name}.wrote")):
            left.unlink(missing_ok=True)
        write_private(slot_file, slot)
        machine_file.write_text(json.dumps(self._describe(ended)))
        # setpriv: the agent dies with this thread, so that a killed rack leaves none behind.
        agent = [sys.executable, "-m", "repave.agent.cli", "run", "--slot", str(slot_file), "--machine-file", str(machine_file)]
        status = -signal.SIGKILL
        for _ in range(_AGENT_STARTS):  # as the ramdisk's init does
            with _starting, self.machine.console.open("ab") as console:
                with self._lock:
                    if on.off.is_set():
                        return None
                    on.agent = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *agent], stdin=subprocess.DEVNULL, stdout=console, stderr=console)
                on.off.wait(_START_S)
            status = on.agent.wait()
            if status >= 0 or on.off.is_set():
                break
            self._say(f"ramdisk: the agent was killed by signal {-status}")
        slot_file.unlink(missing_ok=True)
        if not ended.exists():
            self._say(f"ramdisk: the agent ended with status {status} and left the machine on")
            return None
        return str(json.loads(ended.read_text())["ended"])

    def _boot_disk(self, on: TimeOn) -> None:
        booted = scripted_os.find_os(self.machine.root_disk)
        if booted is None:
            self._say("boot: no bootable disk")
            return
        self._say(f"boot: disk, {booted}")
        on.os_runs = True
        drive = scripted_os.find_config_drive(self.machine.root_disk)
        if drive is None:
            return
        first_boot = scripted_os.read_first_boot(drive.data)
        scripted_os.erase_config_drive(self.machine.root_disk, drive)
        self._say(f"first boot as {first_boot.hostname}; the config drive is erased")
        if self.has("never-home"):
            self._say("does not call home")
            return
        call = {
            "boot_id": str(uuid.uuid4()),
            "root_disk_serial": self.machine.root_serial,
            "ssh_host_keys": [scripted_os.create_host_key()],
            "password_usable": first_boot.password_usable,
        }
        while self.has("hold-disk-boot") and not on.off.is_set():
            on.off.wait(0.05)
        self._say("calls home")
        self._say("home: " + ("taken" if first_boot.call_home(call, on.off) else "not taken"))

    def _describe(self, ended: Path) -> dict[str, Any]:
        """The machine as `repave.agent.machine.FileMachine` reads it. A new boot, a new boot id."""
        m, sector_bytes = self.machine, 4096 if self.has("4k-sectors") else 512
        disks = [
            {"path": str(path), "size_bytes": path.stat().st_size, "sector_bytes": sector_bytes, "serial": serial, "hctl": f"0:0:0:{n}"}
            for n, (path, serial) in enumerate(((m.root_disk, m.root_serial), (m.data_disk, m.data_serial)))
            if path is not None
        ]
        return {"boot_id": str(uuid.uuid4()), "serial": m.serial, "uuid": m.uuid, "macs": [m.mac], "disks": disks, "state_path": str(ended)}

    def _firmware_s(self) -> float:
        path = self._folder / FIRMWARE_FILE
        return float(json.loads(path.read_text()).get(self.machine.name, 0)) if path.exists() else 0.0

    def has(self, fault: str) -> bool:
        path = self._folder / FAULTS_FILE
        return path.exists() and fault in json.loads(path.read_text()).get(self.machine.name, ())

    def _say(self, line: str) -> None:
        with self.machine.console.open("a") as console:
            console.write(line + "\n")


def create_data_disk(machine: Machine, size_bytes: int) -> None:
    """As large as the root disk, so that a plan that names the wrong one would fit; a tenant's data at its start."""
    assert machine.data_disk is not None
    create_disk(machine.data_disk, size_bytes)
    with machine.data_disk.open("r+b") as out:
        out.write(f"data of {machine.name}\n".encode() + os.urandom(4096))


def _with_log(app: Any, folder: Path, player: Player, owners: dict[str, str]) -> Any:
    """The BMC, with its faults. It writes down, one JSON object a line, what it is asked to change and when it is shown another BMC's login.

    `owners`: machine by login, as HTTP writes it.
    """

    def logged(environ: dict[str, Any], start_response: Any) -> Any:
        name, method, path = player.machine.name, environ["REQUEST_METHOD"], environ["PATH_INFO"]
        login_of = owners.get(environ.get("HTTP_AUTHORIZATION", "").removeprefix("Basic "), "")
        changes = method not in ("GET", "HEAD")
        if changes or login_of not in ("", name):
            with (folder / BMC_LOG).open("a") as out:
                out.write(json.dumps({"at": time.time(), "machine": name, "method": method, "path": path, "login_of": login_of}) + "\n")
        while changes and "VirtualMedia" in path and player.has("hold-media"):
            time.sleep(0.05)  # its answer waits until the fault is over
        return app(environ, start_response)

    return logged


class Remembered(dict[Any, Any]):
    """What the emulator remembers, in memory: its own `PersistentDict` opens an SQLite file for every look.

    Threads that look at once never let SQLite close them (POSIX locks): 20,000 files were open after seven batches of 50, and boots died of it.
    """

    def make_permanent(self, dbpath: str | None, dbfile: str) -> None:
        """Machines and BMCs live as long as this process."""

    def __getitem__(self, key: Any) -> Any:
        return copy.deepcopy(super().__getitem__(key))  # as from a file: the emulator changes what it was given, and gives it to many


def serve(folder: Path, first: int = 0) -> None:
    """Up to fifty machines of the rack in `folder`, from number `first` on, until the process is ended."""
    from sushy_tools import error
    from sushy_tools.emulator import main as emulator
    from sushy_tools.emulator import memoize
    from sushy_tools.emulator.resources.systems import fakedriver
    from werkzeug.serving import make_server

    state = find_state(folder)
    assert state is not None
    machines = state.machines[first : first + PER_PROCESS]
    players = {m.uuid: Player(folder, m) for m in machines}
    by_port = {str(m.bmc_port): m.uuid for m in machines}

    class ScriptedDriver(fakedriver.FakeDriver):  # type: ignore[misc]
        """The fake driver, with a machine behind it, and one system for each port."""

        _ports: ClassVar = by_port

        @property
        def systems(self) -> list[str]:
            return [self._ports[emulator.flask.request.environ["SERVER_PORT"]]]

        def _get(self, identity: str) -> Any:
            system = super()._get(identity)
            if system["uuid"] not in self.systems:
                raise error.NotFound(f"{identity} has a BMC of its own")
            return system

        def get_power_state(self, identity: str) -> str:
            return "On" if players[self.uuid(identity)].is_on else "Off"

        def set_power_state(self, identity: str, state: str) -> None:
            players[self.uuid(identity)].reset(state)

        def set_boot_device(self, identity: str, boot_source: str) -> None:
            super().set_boot_device(identity, boot_source)
            players[self.uuid(identity)].boot_target = boot_source

        def set_boot_image(self, identity: str, device: str, boot_image: str | None = None, write_protected: bool = True) -> None:
            super().set_boot_image(identity, device, boot_image, write_protected)
            players[self.uuid(identity)].cd = Path(boot_image) if boot_image else None

    memoize.PersistentDict = Remembered
    fakedriver.FakeDriver = ScriptedDriver
    systems = [{"uuid": m.uuid, "name": m.name, "power_state": "Off", "nics": [{"mac": m.mac}]} for m in machines]
    emulator.app.config.update(
        SUSHY_EMULATOR_FAKE_DRIVER=True, SUSHY_EMULATOR_FAKE_SYSTEMS=systems, SUSHY_EMULATOR_STATE_DIR=str(folder / "scripted"), TESTING=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    _ = emulator.app.systems  # made once, before threads race to make it
    owners = {base64.b64encode(f"{m.bmc_username}:{m.bmc_password}".encode()).decode(): m.name for m in state.machines}
    servers = []
    for m in machines:
        guarded = emulator.RedfishAuthMiddleware(emulator.app, str(folder / f"{m.name}.htpasswd"))
        servers.append(make_server("127.0.0.1", m.bmc_port, _with_log(guarded, folder, players[m.uuid], owners), threaded=True))
    threads = [threading.Thread(target=server.serve_forever, name=f"bmc-{i}") for i, server in enumerate(servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    os.nice(10)  # real machines and BMCs bring cores of their own; here they must not take the service's
    asked = parser.parse_args()
    serve(asked.folder, asked.first)
