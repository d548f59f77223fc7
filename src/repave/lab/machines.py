"""The virtual rack's real machines: QEMU with UEFI firmware behind libvirt, each with sushy-emulator as its BMC.

It owns their processes, disks, NVRAM and consoles in one folder, and nothing outside it but one short folder in /tmp
for libvirt's own files: there are sockets among them, and a Unix socket's path has at most 107 bytes (unix(7)). No system libvirt is touched: a libvirtd
of its own runs in session mode. libvirt refuses session mode to root (`qemu:///session` is then the system's socket),
so as root everything of it runs as `nobody` in a user namespace; outside, its files stay root's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from repave.lab import domain_xml
from repave.lab.processes import ProcessRef, find_free_ports, find_process, is_alive, start_detached, stop_processes, wait_for_port
from repave.lab.state import STATE_FILE, Machine, RackState, clear_machine, create_disk, create_machine, find_state, write_auth_file, write_state

ROOT_DISK_BYTES = 4 << 30
DATA_DISK_BYTES = 1 << 30
_NOBODY = 65534  # in every Debian's passwd: libvirt looks its user up

# The libvirt binding must match the libvirt installed, so Debian's is used; appended, so that the venv's packages win.
_EMULATOR = "import sys; sys.path.append('/usr/lib/python3/dist-packages'); from sushy_tools.emulator.main import main; sys.exit(main())"


class QemuRack:
    """`count` QEMU machines in `folder`, made by `start`, ended by `stop`, also by another process than the starter."""

    def __init__(self, folder: Path, *, count: int = 2, data_disk: bool = False, memory_mib: int = 1024) -> None:
        self.folder = folder.resolve()
        self.count = count
        self.data_disk = data_disk
        self.memory_mib = memory_mib
        self._state = find_state(self.folder) or RackState(scripted=False)

    @property
    def machines(self) -> list[Machine]:
        return self._state.machines

    def is_up(self) -> bool:
        """Whether libvirt and all BMCs run."""
        return self._state.is_up()

    def start(self, *, root_disk_bytes: int = ROOT_DISK_BYTES) -> list[Machine]:
        """The machines are defined, powered off, and their BMCs answer. Destroys: disks of an earlier rack in this folder.

        Raises: RuntimeError when a rack is there already, or libvirt or a BMC does not start; then nothing of it is left.
        Blocks about 4 s.
        """
        if self.machines:
            raise RuntimeError(f"a rack is in {self.folder} already")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start_libvirt()
            ports = iter(find_free_ports(2 * self.count))
            for number in range(1, self.count + 1):
                machine = create_machine(self.folder, f"lab{number:02}", bmc_port=next(ports), ssh_port=next(ports), data_disk=self.data_disk)
                self._define(machine, root_disk_bytes)
                self._start_emulator(machine)
            for machine, process in zip(self.machines, self._state.processes[1:], strict=True):
                wait_for_port(machine.bmc_port, process=process, log=self._log(process.name))
        except BaseException:
            self.stop()
            raise
        return self.machines

    def stop(self) -> None:
        """No process of the rack is left, nor its folder in /tmp; disks, NVRAM and consoles stay. Repeatable."""
        stop_processes(self._state.processes[1:])  # the BMCs first, so that nobody powers a machine on again
        stop_processes(self._qemu_processes())
        stop_processes(self._state.processes[:1])
        if self._state.runtime is not None:
            shutil.rmtree(self._state.runtime, ignore_errors=True)
        shutil.rmtree(self.folder / "libvirt", ignore_errors=True)
        (self.folder / STATE_FILE).unlink(missing_ok=True)
        self._state = RackState(scripted=False)

    def _qemu_processes(self) -> list[ProcessRef]:
        """The machines that are on: libvirt writes a pid file for each."""
        names = {m.name for m in self.machines}
        found = []
        for pid_file in self._state.runtime.glob("libvirt/qemu/run/*.pid") if self._state.runtime else ():
            text = pid_file.read_text().strip() if pid_file.stem in names else ""
            process = find_process(int(text), pid_file.stem) if text else None
            if process is not None and _is_qemu(process.pid):
                found.append(process)
        return found

    def _start_libvirt(self) -> None:
        self._state.runtime = Path(tempfile.mkdtemp(prefix="repave-", dir="/tmp"))
        home = self.folder / "libvirt"
        for path in (home / "pool", home / "tmp", self._state.runtime / "conf/libvirt"):
            path.mkdir(parents=True, exist_ok=True)
        # The console goes straight to its file: without this a virtlogd would be started that nobody ends.
        (self._state.runtime / "conf/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        # A machine that is off is gone for libvirt when somebody has waited for its process. In a container pid 1 does so late, or never.
        self._start_process("libvirtd", ["tini", "-s", "--", "setpriv", "--pdeathsig", "KILL", "--", "libvirtd"])
        deadline = time.monotonic() + 30  # the first start reads QEMU's capabilities: 4 s on a loaded box (lab-cookbook 0)
        while self._virsh("list", check=False).returncode != 0:
            if time.monotonic() > deadline or not is_alive(self._state.processes[0]):
                raise RuntimeError(f"libvirtd does not answer; see {self._log('libvirtd')}")
            time.sleep(0.1)
        self._virsh("pool-define-as", "default", "dir", "--target", str(home / "pool"))
        self._virsh("pool-start", "default")

    def _define(self, machine: Machine, root_disk_bytes: int) -> None:
        clear_machine(self.folder, machine.name)
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

    def _start_emulator(self, machine: Machine) -> None:
        state = self.folder / "libvirt" / f"bmc-{machine.name}"
        state.mkdir(exist_ok=True)
        config = self.folder / f"{machine.name}.bmc.conf"
        config.write_text(_emulator_config(machine, auth=write_auth_file(self.folder, machine), state=state))
        command = [sys.executable, "-c", _EMULATOR, "--config", str(config), "-i", "127.0.0.1", "--port", str(machine.bmc_port)]
        self._state.machines.append(machine)
        self._start_process(f"{machine.name}.bmc", command)

    def _start_process(self, name: str, command: Sequence[str]) -> None:
        process = start_detached(name, self._wrap(command), log=self._log(name), env=self._env(), cwd=self.folder)
        self._state.processes.append(process)
        write_state(self.folder, self._state)

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
        runtime = str(self._state.runtime)
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": runtime,
            "XDG_RUNTIME_DIR": runtime,
            "XDG_CONFIG_HOME": f"{runtime}/conf",  # QEMU's monitor sockets lie under it
            "XDG_CACHE_HOME": f"{runtime}/cache",
            "XDG_DATA_HOME": f"{runtime}/data",
            "TMPDIR": str(self.folder / "libvirt/tmp"),  # the emulator downloads media here
        }

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


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
