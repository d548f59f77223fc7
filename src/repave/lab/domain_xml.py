"""What libvirt is told of one QEMU machine, and whether KVM may be used for it. Pure but for the KVM probe.

The layout that matters (measured, QEMU 7.2, libvirt 9.0, sushy-tools 2.2):
- sushy-emulator puts `<boot order='1'/>` on the CD and rewrites every other boot order. As soon as one device has a
  bootindex, OVMF connects only devices that have one, and GRUB then sees neither disk nor network. So root disk,
  network and data disk have theirs in `qemu:override`, which the emulator keeps: CD 1, root 10, network 20, data 30.
- libvirt's user-mode network can not forward a port. A second netdev with `hostfwd` on the command line is put behind
  the one NIC by overriding its `netdev` property: libvirt, the BMC and the machine all see one NIC with one MAC, and
  the forward is there after each power-on.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"
OVMF_VARS_SECURE = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"

# Emulated AVX2 is what makes OpenSSL slow: HTTPS 23 MB/s with this list, 8 with the "maximum" model (lab-cookbook 2).
_TCG_FEATURES = ("aes", "pclmuldq", "sse4.1", "sse4.2", "ssse3", "popcnt")


@dataclass(frozen=True)
class DomainSpec:
    """One machine as libvirt sees it. `nvram` is made from OVMF_VARS at the first power-on."""

    name: str
    uuid: str
    serial: str
    mac: str
    ssh_port: int
    root_disk: Path
    root_serial: str
    console: Path
    nvram: Path
    data_disk: Path | None = None
    data_serial: str = ""
    memory_mib: int = 1024
    kvm: bool = False


def render_domain(spec: DomainSpec) -> str:
    """The domain XML of a machine."""
    disks = _disk(spec.root_disk, "vda", spec.root_serial)
    overrides = _override("virtio-disk0", bootindex="10") + _override("net0", bootindex="20", netdev="lab0")
    if spec.data_disk is not None:
        disks += _disk(spec.data_disk, "vdb", spec.data_serial)
        overrides += _override("virtio-disk1", bootindex="30")
    forward = f"user,id=lab0,hostfwd=tcp:127.0.0.1:{spec.ssh_port}-:22"
    return f"""<domain type='{"kvm" if spec.kvm else "qemu"}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(spec.name)}</name>
  <uuid>{spec.uuid}</uuid>
  <memory unit='MiB'>{spec.memory_mib}</memory>
  <vcpu>1</vcpu>
  <sysinfo type='smbios'><system>
    <entry name='manufacturer'>Repave</entry><entry name='product'>Virtual rack</entry>
    <entry name='serial'>{escape(spec.serial)}</entry><entry name='uuid'>{spec.uuid}</entry>
  </system></sysinfo>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='pflash'>{OVMF_CODE}</loader>
    <nvram template='{OVMF_VARS}'>{escape(str(spec.nvram))}</nvram>
    <smbios mode='sysinfo'/>
  </os>
  <features><acpi/><apic/></features>
  {_cpu(spec.kvm)}
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}<interface type='user'><mac address='{spec.mac}'/><model type='virtio'/></interface>
    <serial type='file'><source path={quoteattr(str(spec.console))} append='on'/><target port='0'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline><qemu:arg value='-netdev'/><qemu:arg value='{forward}'/></qemu:commandline>
  <qemu:override>
    {overrides}</qemu:override>
</domain>
"""


def _disk(path: Path, target: str, serial: str) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw' cache='writeback' discard='unmap' detect_zeroes='unmap'/>"
        f"<source file={quoteattr(str(path))}/><target dev='{target}' bus='virtio'/><serial>{escape(serial)}</serial></disk>\n    "
    )


def _override(alias: str, *, bootindex: str, netdev: str | None = None) -> str:
    properties = f"<qemu:property name='bootindex' type='unsigned' value='{bootindex}'/>"
    if netdev is not None:
        properties += f"<qemu:property name='netdev' type='string' value='{netdev}'/>"
    return f"<qemu:device alias='{alias}'><qemu:frontend>{properties}</qemu:frontend></qemu:device>\n    "


def _cpu(kvm: bool) -> str:
    if kvm:
        return "<cpu mode='host-passthrough'/>"
    features = "".join(f"<feature policy='require' name='{name}'/>" for name in _TCG_FEATURES)
    return f"<cpu mode='custom' match='exact' check='none'><model>qemu64</model>{features}</cpu>"


@functools.cache
def probe_kvm() -> bool:
    """Whether a machine really runs under KVM here. /dev/kvm may exist and its guests hang, so one is booted. Blocks up to 5 s."""
    if not Path("/dev/kvm").exists():
        return False
    # mov dx,0x501; mov al,0x10; out dx,al; hlt: the isa-debug-exit device ends QEMU with status (0x10 << 1) | 1.
    sector = bytes.fromhex("ba0105b010eef4").ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(suffix=".img") as boot:
        boot.write(sector)
        boot.flush()
        command = ["qemu-system-x86_64", "-accel", "kvm", "-m", "16", "-nodefaults", "-display", "none", "-device", "isa-debug-exit,iobase=0x501"]
        command += ["-drive", f"file={boot.name},format=raw,if=ide,readonly=on"]
        try:
            return subprocess.run(command, timeout=5, capture_output=True, check=False).returncode == 33
        except (subprocess.TimeoutExpired, OSError):
            return False
