"""The virtual rack's real machines: QEMU with UEFI firmware behind libvirt, each with sushy-emulator as its BMC.

It owns their processes, disks, NVRAM and consoles in one folder, and nothing outside it but one short folder in /tmp
for libvirt's sockets (a Unix socket's path has at most 107 bytes, unix(7)). No system libvirt is touched: a libvirtd
of its own runs in session mode. libvirt refuses session mode to root (`qemu:///session` is then the system's socket),
so as root everything of it runs as `nobody` in a user namespace; outside, its files stay root's.

What is in the rack is in `machines.json` (mode 0600: BMC passwords), so that a later process can take it down.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bcrypt

from repave.lab import domain_xml
from repave.lab.processes import ProcessRef, find_free_ports, find_process, is_alive, start_detached, stop_processes, wait_for_port

STATE_FILE = "machines.json"
ROOT_DISK_BYTES = 4 << 30
DATA_DISK_BYTES = 1 << 30
_NOBODY = 65534  # in every Debian's passwd: libvirt looks its user up

# Debian's libvirt binding is not on the package index for this libvirt; it is appended, so the venv's packages win.
_EMULATOR = "import sys; sys.path.append('/usr/lib/python3/dist-packages'); from sushy_tools.emulator.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Machine:
    """One machine of the rack, real or scripted. `ssh_port` is 0 where there is no SSH."""

    name: str
    uuid: str
    serial: str
    mac: str
    bmc_url: str
    bmc_username: str
    bmc_password: str
    ssh_port: int
    root_disk: Path
    root_serial: str
    console: Path
    data_disk: Path | None = None
    data_serial: str = ""

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self.bmc_url!r})"


def write_private(path: Path, text: str) -> None:
    """The file holds `text`, whole or not at all, readable by its owner alone."""
    new = path.with_name(path.name + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
    new.replace(path)


def create_machine(folder: Path, name: str, *, bmc_port: int, ssh_port: int = 0, data_disk: bool = False) -> Machine:
    """A machine with new identity and credentials; nothing is on disk yet."""
    tag = secrets.token_hex(3)
    return Machine(
        name=name,
        uuid=str(uuid.uuid4()),
        serial=f"RPV{tag.upper()}",
        mac=f"52:54:00:{tag[0:2]}:{tag[2:4]}:{tag[4:6]}",
        bmc_url=f"http://127.0.0.1:{bmc_port}",
        bmc_username="admin",
        bmc_password=secrets.token_urlsafe(12),
        ssh_port=ssh_port,
        root_disk=folder / f"{name}.root.img",
        root_serial=f"ROOT{tag.upper()}",
        console=folder / f"{name}.console",
        data_disk=folder / f"{name}.data.img" if data_disk else None,
        data_serial=f"DATA{tag.upper()}" if data_disk else "",
    )


def create_disk(path: Path, size_bytes: int) -> None:
    """A sparse file of zeros is there; one that is there already keeps its bytes."""
    if not path.exists():
        with path.open("wb") as out:
            out.truncate(size_bytes)


class QemuRack:
    """`count` QEMU machines in `folder`, made by `start`, ended by `stop`, also by another process than the starter."""

    def __init__(self, folder: Path, *, count: int = 2, data_disk: bool = False, memory_mib: int = 1024) -> None:
        self.folder = folder.resolve()
        self.count = count
        self.data_disk = data_disk
        self.memory_mib = memory_mib
        self.machines: list[Machine] = []
        self._processes: list[ProcessRef] = []
        self._runtime: Path | None = None
        self._read_state()

    def start(self, *, root_disk_bytes: int = ROOT_DISK_BYTES) -> list[Machine]:
        """The machines are defined, powered off, their disks zeros, and their BMCs answer.

        Raises: RuntimeError when libvirt or an emulator does not start; then nothing of it is left. Blocks about 4 s.
        """
        if self.machines:
            raise RuntimeError(f"a rack is in {self.folder} already")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start_libvirt()
            ports = find_free_ports(2 * self.count)
            for i in range(self.count):
                machine = create_machine(self.folder, f"m{i + 1}", bmc_port=ports[2 * i], ssh_port=ports[2 * i + 1], data_disk=self.data_disk)
                self._define(machine, root_disk_bytes)
                self.machines.append(machine)
                self._start_emulator(machine, ports[2 * i])
            for machine, process in zip(self.machines, self._processes[1:], strict=True):
                wait_for_port(int(machine.bmc_url.rpartition(":")[2]), process=process, log=self.folder / f"{machine.name}.bmc.log")
        except BaseException:
            self.stop()
            raise
        return self.machines

    def is_up(self) -> bool:
        """Whether all its processes run."""
        return bool(self._processes) and all(is_alive(p) for p in self._processes)

    def stop(self, *, keep_disks: bool = True) -> None:
        """No process of the rack is left, nor its folder in /tmp. Repeatable. `keep_disks=False` Destroys: disks and NVRAM."""
        machines = self._qemu_processes()
        stop_processes(self._processes[1:])  # the BMCs first, so that nobody powers a machine on again
        stop_processes(machines)
        stop_processes(self._processes[:1])
        if self._runtime is not None:
            shutil.rmtree(self._runtime, ignore_errors=True)
        if not keep_disks:
            for machine in self.machines:
                for path in self.folder.glob(f"{machine.name}.*"):
                    path.unlink()
        (self.folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "libvirt", ignore_errors=True)
        self.machines, self._processes, self._runtime = [], [], None

    def _qemu_processes(self) -> list[ProcessRef]:
        """The machines that are on: libvirt writes a pid file for each."""
        found = []
        for pid_file in self._runtime.glob("libvirt/qemu/run/*.pid") if self._runtime else ():
            process = find_process(int(pid_file.read_text() or 0), pid_file.stem)
            if pid_file.stem != "driver" and process is not None and _is_qemu(process.pid):
                found.append(process)
        return found

    def _start_libvirt(self) -> None:
        self._runtime = Path(tempfile.mkdtemp(prefix="repave-", dir="/tmp"))  # noqa: S108 - a short path, and mkdtemp makes it private
        home = self.folder / "libvirt"
        for name in ("conf/libvirt", "cache", "data", "pool", "tmp"):
            (home / name).mkdir(parents=True, exist_ok=True)
        # The console goes straight to its file: without this a virtlogd would be started that nobody ends.
        (home / "conf/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        log = self.folder / "libvirtd.log"
        self._processes.append(start_detached("libvirtd", self._wrap(["libvirtd"]), log=log, env=self._env()))
        self._write_state()
        deadline = time.monotonic() + 30  # first start reads QEMU's capabilities: 4 s on a loaded box (lab-cookbook 0)
        while self._virsh("list", check=False).returncode != 0:
            if time.monotonic() > deadline or not is_alive(self._processes[0]):
                raise RuntimeError(f"libvirtd does not answer; see {log}")
            time.sleep(0.1)
        self._virsh("pool-define-as", "default", "dir", "--target", str(home / "pool"))
        self._virsh("pool-start", "default")

    def _define(self, machine: Machine, root_disk_bytes: int) -> None:
        create_disk(machine.root_disk, root_disk_bytes)
        if machine.data_disk is not None:
            create_disk(machine.data_disk, DATA_DISK_BYTES)
        spec = domain_xml.DomainSpec(
            name=machine.name,
            uuid=machine.uuid,
            serial=machine.serial,
            mac=machine.mac,
            ssh_port=machine.ssh_port,
            root_disk=machine.root_disk,
            root_serial=machine.root_serial,
            console=machine.console,
            nvram=self.folder / f"{machine.name}.fd",
            data_disk=machine.data_disk,
            data_serial=machine.data_serial,
            memory_mib=self.memory_mib,
            kvm=domain_xml.probe_kvm(),
        )
        xml = self.folder / f"{machine.name}.xml"
        xml.write_text(domain_xml.render_domain(spec))
        self._virsh("define", str(xml))

    def _start_emulator(self, machine: Machine, port: int) -> None:
        auth = self.folder / f"{machine.name}.htpasswd"
        # 4 rounds: the emulator checks the password with each request, and the default of 12 costs 0.25 s of this CPU.
        digest = bcrypt.hashpw(machine.bmc_password.encode(), bcrypt.gensalt(rounds=4)).decode()
        write_private(auth, f"{machine.bmc_username}:{digest}\n")
        state = self.folder / "libvirt" / f"bmc-{machine.name}"
        state.mkdir(exist_ok=True)
        config = self.folder / f"{machine.name}.bmc.conf"
        config.write_text(_emulator_config(machine, auth=auth, state=state))
        command = self._wrap([sys.executable, "-c", _EMULATOR, "--config", str(config), "-i", "127.0.0.1", "--port", str(port)])
        log = self.folder / f"{machine.name}.bmc.log"
        self._processes.append(start_detached(f"bmc-{machine.name}", command, log=log, env=self._env(), cwd=self.folder))
        self._write_state()

    def _virsh(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = self._wrap(["virsh", "-q", "-c", "qemu:///session", *arguments])
        done = subprocess.run(command, env=self._env(), capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"virsh {arguments[0]}: {done.stderr.strip()}")
        return done

    def _wrap(self, command: Sequence[str]) -> list[str]:
        """The command as an ordinary user. `unshare` becomes the command, so its pid is the command's."""
        as_nobody = ["unshare", "-U", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}", "--"] if os.geteuid() == 0 else []
        return [*as_nobody, *command]

    def _env(self) -> dict[str, str]:
        home = self.folder / "libvirt"
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(self._runtime),
            "XDG_CONFIG_HOME": str(home / "conf"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
            "TMPDIR": str(home / "tmp"),  # the emulator downloads media here
        }

    def _write_state(self) -> None:
        state = {
            "runtime": str(self._runtime),
            "processes": [dataclasses.asdict(p) for p in self._processes],
            "machines": [dataclasses.asdict(m) for m in self.machines],
        }
        write_private(self.folder / STATE_FILE, json.dumps(state, indent=1, default=str))

    def _read_state(self) -> None:
        path = self.folder / STATE_FILE
        if path.exists():
            state = json.loads(path.read_text())
            self._runtime = Path(state["runtime"])
            self._processes = [ProcessRef(**p) for p in state["processes"]]
            self.machines = [parse_machine(m) for m in state["machines"]]


def parse_machine(value: dict[str, object]) -> Machine:
    """The machine that `dataclasses.asdict` and JSON made text of."""
    fields = {k: Path(str(v)) if k in ("root_disk", "console", "data_disk") and v is not None else v for k, v in value.items()}
    return Machine(**fields)  # type: ignore[arg-type]


def _is_qemu(pid: int) -> bool:
    try:
        return b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False


def _emulator_config(machine: Machine, *, auth: Path, state: Path) -> str:
    """sushy-emulator's settings (a Python file). Its default UEFI loader is the Secure Boot build, which hangs without SMM."""
    settings = {
        "SUSHY_EMULATOR_LIBVIRT_URI": "qemu:///session",
        "SUSHY_EMULATOR_ALLOWED_INSTANCES": [machine.uuid],
        "SUSHY_EMULATOR_AUTH_FILE": str(auth),
        "SUSHY_EMULATOR_STATE_DIR": str(state),
        "SUSHY_EMULATOR_BOOT_LOADER_MAP": {"UEFI": {"x86_64": domain_xml.OVMF_CODE}, "Legacy": {"x86_64": None}},
        "SUSHY_EMULATOR_SECURE_BOOT_ENABLED_NVRAM": domain_xml.OVMF_VARS_SECURE,
        "SUSHY_EMULATOR_SECURE_BOOT_DISABLED_NVRAM": domain_xml.OVMF_VARS,
    }
    return "".join(f"{name} = {value!r}\n" for name, value in settings.items())


@contextmanager
def start_qemu_rack(folder: Path, *, count: int, data_disk: bool = False, memory_mib: int = 1024) -> Iterator[QemuRack]:
    """A rack of QEMU machines, powered off, for as long as the block runs."""
    rack = QemuRack(folder, count=count, data_disk=data_disk, memory_mib=memory_mib)
    rack.start()
    try:
        yield rack
    finally:
        rack.stop()
