"""The operating systems of the lab: a tiny one that boots in seconds, and Debian 12. Both from the machine's own package sources.

    tiny    raw, 64 MiB: GPT | ESP with signed shim, GRUB, kernel, initramfs | ext4 root with busybox, dropbear and a cut Python
    debian  qcow2, 2 GiB: GPT | ESP with signed shim and GRUB | ext4 root of mmdebstrap, with cloud-init and nothing of ours

No loop devices and no mounts: sfdisk on a file, mcopy for the ESP, `mke2fs -d -E offset=` for the root. An image is made under another name
and renamed when it is whole; its name holds the hash of its recipe, so a changed recipe makes a new image.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from repave.agent import gpt
from repave.firstboot import FirstBoot, render_config_drive
from repave.lab.os_packages import copy_libraries, copy_modules, copy_python, fetch_packages, find_kernel, list_sources, run
from repave.lab.processes import end_on_sigterm

Progress = Callable[[str], None]
MIB = 1024 * 1024
VARIANTS = ("tiny-1", "tiny-2")
CONFIG_DRIVE_BYTES = 64 * MIB
_NAMESPACE = uuid.UUID("6f0f0f4c-6e2f-4f0e-9d1b-5b8f1f1c2d3e")

_TINY_PACKAGES = (
    "busybox-static", "dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10", "libcrypt1", "libc6", "zlib1g", "libssl3", "libexpat1",
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
)  # fmt: skip
_TINY_DISK_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "ahci", "nvme", "sd_mod", "crc32c_generic", "ext4")
_TINY_MODULES = (*_TINY_DISK_MODULES, "virtio_net", "e1000", "e1000e", "isofs", "evdev", "button")
_DEBIAN_PACKAGES = (
    "linux-image-amd64", "initramfs-tools", "zstd", "systemd-sysv", "dbus", "udev", "cloud-init", "cloud-guest-utils", "fdisk", "e2fsprogs",
    "openssh-server", "ifupdown", "isc-dhcp-client", "iproute2", "netbase", "procps",
)  # fmt: skip
_DEBIAN_MODULES = "virtio_pci virtio_blk virtio_scsi ahci nvme sd_mod ext4 crc32c_generic isofs"


def default_cache() -> Path:
    """$REPAVE_CACHE, or `.repave/cache` here."""
    return Path(os.environ.get("REPAVE_CACHE") or ".repave/cache")


def build_tiny(cache: Path, *, variant: str = "tiny-1", progress: Progress = print) -> Path:
    """The raw disk image of the tiny OS; /etc/repave-release names the variant. From the cache, or both built in some 20 s."""
    finals = {name: _image_path(cache, f"{name}.raw", _TINY_PACKAGES, _TINY_MODULES, *sorted(_read_recipe_files())) for name in VARIANTS}
    if finals[variant].exists():
        return finals[variant]
    with _work_folder(cache) as work:
        progress("tiny: fetching packages")
        tree = work / "packages"
        fetch_packages(_TINY_PACKAGES, tree, cache)
        kernel, modules = find_kernel(work / "kernel", cache)
        progress("tiny: building")
        initrd, root = _build_initramfs(work, tree, modules), _build_tiny_root(work, tree)
        for name, final in finals.items():
            root_uuid = uuid.uuid5(_NAMESPACE, name)
            (root / "etc/repave-release").write_text(name + "\n")
            esp = _build_esp(work, _render_tiny_grub(root_uuid), {"vmlinuz": kernel, "initrd.zst": initrd}, mib=24)
            _assemble(work / "image", esp, root, root_uuid, root_mib=38)
            (work / "image").rename(final)
    return finals[variant]


def build_debian(cache: Path, *, progress: Progress = print) -> Path:
    """The qcow2 image of Debian 12. From the cache, or built in 70 to 90 s on two quiet cores."""
    final = _image_path(cache, "debian-12.qcow2", _DEBIAN_PACKAGES, _DEBIAN_MODULES, _DEBIAN_HOOK, _DEBIAN_GRUB)
    if final.exists():
        return final
    with _work_folder(cache) as work:
        root_uuid = uuid.uuid5(_NAMESPACE, "debian")
        progress("debian: mmdebstrap")
        root = _bootstrap_debian(work, root_uuid)
        progress("debian: disk image")
        grub = f"search --no-floppy --fs-uuid --set=root {root_uuid}\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
        _assemble(work / "raw", _build_esp(work, grub, {}, mib=16), root, root_uuid, root_mib=1500)
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", work / "raw", work / "image"])
        (work / "image").rename(final)
    return final


def write_old_os(image: Path, disk: Path, *, password_hash: str, hostname: str, size_bytes: int) -> None:
    """`disk` is a sparse raw file of `size_bytes` with the tiny OS of `image` on it, which sets itself up at its first boot and calls nobody."""
    first_boot = FirstBoot(hostname=hostname, instance_id=f"old-{hostname}", password_hash=password_hash)
    drive = render_config_drive(first_boot)
    with image.open("rb") as source, disk.open("wb") as target:
        tables = gpt.rebuild(
            source.read(MIB), sector_bytes=512, disk_bytes=size_bytes, config_bytes=CONFIG_DRIVE_BYTES, config_guid=uuid.uuid5(_NAMESPACE, hostname).bytes_le
        )
        target.truncate(size_bytes)
        target.write(tables.lba0 + tables.lba1_onward)
        while block := source.read(MIB):
            target.seek(len(block), os.SEEK_CUR) if not any(block) else target.write(block)
        target.seek(tables.config_offset)
        target.write(drive)
        target.seek(tables.backup_offset)
        target.write(tables.backup)


def _image_path(cache: Path, name: str, *recipe: object) -> Path:
    """Where this image lies, or will. The recipe is everything of ours that decides what it holds."""
    source = Path(__file__).read_bytes() + (importlib.resources.files("repave.lab") / "os_packages.py").read_bytes()
    digest = hashlib.sha256(source + repr(recipe).encode()).hexdigest()[:12]
    stem, _, suffix = name.rpartition(".")
    return cache.resolve() / f"{stem}-{digest}.{suffix}"


@contextmanager
def _work_folder(cache: Path) -> Iterator[Path]:
    """A folder in the cache, gone afterwards: what is whole in it is renamed away."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as work:
        yield Path(work).resolve()


def _read_recipe_files() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in (importlib.resources.files("repave.lab") / "tiny_os").iterdir() if path.is_file()]


def _build_initramfs(work: Path, tree: Path, modules: Path) -> Path:
    folder = work / "initramfs"
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(tree / "bin/busybox", folder / "bin/busybox")
    order = copy_modules(modules, _TINY_MODULES, folder / "modules")
    (folder / "modules/order").write_text("\n".join(order) + "\n")
    _install_own("initramfs_init", folder / "init", 0o755)
    names = "\n".join(sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))).encode()
    cpio = subprocess.run(["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"], input=names, cwd=folder, check=True, stdout=subprocess.PIPE).stdout
    out = work / "initrd.zst"
    subprocess.run(["zstd", "-q", "-9", "-o", out], input=cpio, check=True)
    return out


def _build_tiny_root(work: Path, tree: Path) -> Path:
    root = work / "root"
    for name in ("bin", "sbin", "usr/bin", "usr/sbin", "etc/acpi/PWRF", "etc/dropbear", "etc/ssh", "proc", "sys", "dev", "run", "tmp", "root", "var/log"):
        (root / name).mkdir(parents=True)
    shutil.copy2(tree / "bin/busybox", root / "bin/busybox")
    for applet in subprocess.run([tree / "bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("/bin/busybox")
    for applet in ("init", "acpid", "poweroff", "reboot"):
        (root / "sbin" / applet).symlink_to("/bin/busybox")
    programs = ["usr/sbin/dropbear", "usr/bin/dropbearkey", "usr/bin/python3.11"]
    for program in programs:
        shutil.copy2(tree / program, root / program)
    (root / "usr/bin/python3").symlink_to("python3.11")
    (root / "usr/bin/env").symlink_to("/bin/busybox")
    extensions = copy_python(tree, root, needed_by=("repave.home_call", "repave.lab.tiny_os.read_config_drive"))
    copy_libraries(tree, root, [tree / program for program in programs] + extensions)
    for name, target, mode in (
        ("inittab", "etc/inittab", 0o644),
        ("rc", "etc/rc", 0o755),
        ("first_boot", "etc/first-boot", 0o755),
        ("udhcpc.script", "etc/udhcpc.script", 0o755),
        ("read_config_drive.py", "etc/read-config-drive", 0o755),
    ):
        _install_own(name, root / target, mode)
    power = root / "etc/acpi/PWRF/00000080"  # what busybox acpid calls for the power button
    power.write_text("#!/bin/sh\nsync\numount -a -r\nexec /sbin/poweroff -f\n")  # by way of init it takes two seconds more
    power.chmod(0o755)
    for path, text in {
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
        "etc/group": "root:x:0:\n",
        "etc/shadow": "root:*:19000:0:99999:7:::\n",
        "etc/shells": "/bin/sh\n",
        "etc/hostname": "tiny\n",
    }.items():
        (root / path).write_text(text)
    (root / "etc/shadow").chmod(0o600)
    return root


def _install_own(name: str, target: Path, mode: int) -> None:
    text = (importlib.resources.files("repave.lab") / "tiny_os" / name).read_text(encoding="utf-8")
    target.write_text(("#!/usr/bin/python3\n" if name.endswith(".py") else "") + text)
    target.chmod(mode)


def _render_tiny_grub(root_uuid: uuid.UUID) -> str:
    return (
        "set timeout=0\n"  # root is the file system that grub.cfg was found on: the ESP
        f"linux ($root)/vmlinuz root=UUID={root_uuid} console=tty0 console=ttyS0 quiet panic=10\n"
        "initrd ($root)/initrd.zst\nboot\n"
    )


def _build_esp(work: Path, grub_cfg: str, files: dict[str, Path], *, mib: int) -> Path:
    """A FAT file system with the signed shim under the removable path, so that any UEFI firmware boots it without a boot entry."""
    esp = work / "esp"
    esp.write_bytes(b"")
    os.truncate(esp, mib * MIB)
    (work / "grub.cfg").write_text(grub_cfg)
    run(["mkfs.vfat", "-n", "EFI", esp])
    run(["mmd", "-i", esp, "::EFI", "::EFI/BOOT", "::EFI/debian"])
    content = {
        "EFI/BOOT/BOOTX64.EFI": Path("/usr/lib/shim/shimx64.efi.signed"),
        "EFI/BOOT/grubx64.efi": Path("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"),
        "EFI/debian/grub.cfg": work / "grub.cfg",
    }
    for name, path in (content | files).items():
        run(["mcopy", "-i", esp, path, f"::{name}"])
    return esp


def _assemble(image: Path, esp: Path, root: Path, root_uuid: uuid.UUID, *, root_mib: int) -> None:
    """A raw disk: GPT, the ESP at 1 MiB, an ext4 made of the folder `root` behind it, 1 MiB for the backup table."""
    esp_mib = esp.stat().st_size // MIB
    image.write_bytes(b"")
    os.truncate(image, (1 + esp_mib + root_mib + 1) * MIB)
    table = (
        f"label: gpt\nlabel-id: {root_uuid}\n"
        f"start=1MiB, size={esp_mib}MiB, type=U, name=esp\n"
        f"start={1 + esp_mib}MiB, size={root_mib}MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root\n"
    )
    run(["sfdisk", "--quiet", image], stdin=table)
    run(["dd", f"if={esp}", f"of={image}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"])
    extended = f"offset={(1 + esp_mib) * MIB},root_owner=0:0,hash_seed={root_uuid}"
    run(["mke2fs", "-q", "-t", "ext4", "-m", "1", "-U", str(root_uuid), "-E", extended, "-d", root, image, f"{root_mib}M"])


_DEBIAN_HOOK = """set -e
root="$1"; uuid="$2"; modules="$3"
printf '%s\\n' $modules > "$root/etc/initramfs-tools/modules"
printf 'MODULES=list\\nCOMPRESS=zstd\\n' > "$root/etc/initramfs-tools/conf.d/repave"
printf 'UUID=%s / ext4 errors=remount-ro 0 1\\n' "$uuid" > "$root/etc/fstab"
printf 'auto lo\\niface lo inet loopback\\nsource /etc/network/interfaces.d/*\\n' > "$root/etc/network/interfaces"
printf 'debian\\n' > "$root/etc/hostname"
: > "$root/etc/machine-id"
cat > "$root/etc/cloud/cloud.cfg.d/10_lab.cfg" <<END
# As image builders do: what this image has no use for is left out (measured: 10 s of its first boot when emulated).
datasource_list: [ConfigDrive, None]
ssh_genkeytypes: [ed25519]
locale: false
grub_dpkg: {enabled: false}
apt_preserve_sources_list: true
END
rm -f "$root"/etc/ssh/ssh_host_*
mkdir -p "$root/boot/grub"
chroot "$root" systemctl --quiet disable e2scrub_reap.service apt-daily.timer apt-daily-upgrade.timer
chroot "$root" update-initramfs -u -k all
"""

_DEBIAN_GRUB = """set timeout=0
linux /vmlinuz root=UUID={uuid} ro console=tty0 console=ttyS0 quiet
initrd /initrd.img
boot
"""


def _bootstrap_debian(work: Path, root_uuid: uuid.UUID) -> Path:
    root = work / "debian"
    hook, sources = work / "hook.sh", work / "sources.list"
    hook.write_text(_DEBIAN_HOOK)
    sources.write_text("\n".join(list_sources()) + "\n")
    command: Sequence[str | Path] = [
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(_DEBIAN_PACKAGES)}",
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
        f"--customize-hook=sh {hook} \"$1\" {root_uuid} '{_DEBIAN_MODULES}'", "bookworm", root, sources,
    ]  # fmt: skip
    run(command)
    (root / "boot/grub/grub.cfg").write_text(_DEBIAN_GRUB.format(uuid=root_uuid))
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repave.lab.os_images", description="Build the lab's operating-system images.")
    parser.add_argument("image", choices=["tiny", *VARIANTS, "debian"])
    parser.add_argument("--cache", type=Path, default=default_cache())
    chosen = parser.parse_args(arguments)
    end_on_sigterm()  # what is half built goes with it

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    names = VARIANTS if chosen.image == "tiny" else (chosen.image,)
    for name in names:
        print(build_debian(chosen.cache, progress=progress) if name == "debian" else build_tiny(chosen.cache, variant=name, progress=progress))
    return 0


if __name__ == "__main__":
    sys.exit(main())
