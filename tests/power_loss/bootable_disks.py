"""Disks that say on the console who booted: a GPT, an ESP with a loader of 1 KiB, a partition of random data.

Tables by fdisk, file systems by mkfs.vfat and mtools: nothing of the product makes what the product is judged by. The loader is a UEFI
application of our own, because it has to be quick: it prints one line and turns the machine off.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
SAYS = "REPAVE-STARTED:"  # the loader's line is this and a name
LOADER = "EFI/BOOT/BOOTX64.EFI"  # UEFI 2.10, 3.5.1.1


@dataclass(frozen=True)
class Layout:
    """A disk in MiB. The ESP lies at `esp_at`; the other partition takes what is left before or behind it."""

    size: int
    esp_at: int
    esp_size: int = 8
    data: tuple[tuple[int, int], ...] = ()  # (offset in KiB, length in bytes) of random data; none: all that is not the ESP
    mbr: bool = False  # an MBR with partitions and no GPT


def write_os(path: Path, layout: Layout, *, name: str, sector_bytes: int, seed: int) -> Path:
    """`path` becomes a raw disk whose loader says `name`."""
    rng = random.Random(seed)
    islands = layout.data or ((0, layout.size * MIB),)
    with path.open("wb") as out:
        out.truncate(layout.size * MIB)
        for at_kib, length in islands:
            block = rng.randbytes(min(length, MIB))  # again and again: to draw 40 MiB takes a second
            out.seek(at_kib * 1024)
            length = min(length, layout.size * MIB - at_kib * 1024)
            out.write((block * -(-length // len(block)))[:length])
    _write_table(path, layout, sector_bytes)
    esp = path.with_suffix(".esp")
    make_esp(esp, layout.esp_size * MIB, name=name, sector_bytes=sector_bytes)
    with path.open("r+b") as out:
        out.seek(layout.esp_at * MIB)
        out.write(esp.read_bytes())
    esp.unlink()
    return path


def make_esp(path: Path, size_bytes: int, *, name: str, sector_bytes: int) -> None:
    path.write_bytes(b"")
    os.truncate(path, size_bytes)
    loader = path.with_suffix(".efi")
    loader.write_bytes(render_loader(SAYS + name))
    # As the lab's ESPs are made; --invariant: the same bytes each time.
    _run("mkfs.vfat", "--invariant", "-S", str(sector_bytes), str(path))
    _run("mmd", "-i", str(path), "::EFI", "::EFI/BOOT")
    _run("mcopy", "-i", str(path), str(loader), f"::{LOADER}")
    loader.unlink()


def _write_table(path: Path, layout: Layout, sector_bytes: int) -> None:
    """The first and the last MiB that are the table's own stay as they are but for the table: full of old data where there is any."""
    per_mib = MIB // sector_bytes
    esp = (layout.esp_at * per_mib, (layout.esp_at + layout.esp_size) * per_mib - 1)
    other = (per_mib, esp[0] - 1) if layout.esp_at > 1 else (esp[1] + 1, "")
    commands = ["o" if layout.mbr else "g"]
    for number, (first, last) in enumerate((esp, other), start=1):
        commands += ["n", *(["p"] if layout.mbr else []), str(number), str(first), str(last)]
    commands += ["t", "1", "ef" if layout.mbr else "uefi", "w"]
    argv = ["fdisk", "--wipe=never", "--wipe-partitions=never", f"--sector-size={sector_bytes}", str(path)]
    done = subprocess.run(argv, input="\n".join(commands) + "\n", capture_output=True, text=True, env={"LC_ALL": "C", "PATH": os.environ["PATH"]})
    if "has been altered" not in done.stdout:
        raise RuntimeError(f"fdisk wrote no table: {done.stdout}{done.stderr}")


def render_loader(line: str) -> bytes:
    """A PE32+ UEFI application: prints `line`, then ResetSystem(shutdown). Source: UEFI 2.10, 4.3 (tables), 8.5.1; PE/COFF."""
    code = bytes.fromhex(
        "4883ec38"  # sub rsp,56
        "4889d3"  # mov rbx,rdx             the system table
        "488b4b40"  # mov rcx,[rbx+64]      ConOut
        "488d1521000000"  # lea rdx,[rip+33]  the line, behind this code
        "ff5108"  # call [rcx+8]            OutputString
        "488b4358"  # mov rax,[rbx+88]      RuntimeServices
        "b902000000"  # mov ecx,2           EfiResetShutdown
        "31d2"  # xor edx,edx
        "4531c0"  # xor r8d,r8d
        "4531c9"  # xor r9d,r9d
        "ff5068"  # call [rax+104]          ResetSystem
        "f4ebfd"  # hlt; jmp $-1
    )
    at = code.index(bytes.fromhex("488d15"))
    code = code[: at + 3] + struct.pack("<i", len(code) - (at + 7)) + code[at + 7 :]
    body = code + f"\r\n{line}\r\n\0".encode("utf-16-le")
    raw = -(-len(body) // 512) * 512
    coff = struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0x0022)
    optional = struct.pack("<HBBIIIII", 0x20B, 0, 0, raw, 0, 0, 0x1000, 0x1000)
    optional += struct.pack("<QIIHHHHHHIIIIHH", 0, 0x1000, 0x200, 0, 0, 0, 0, 0, 0, 0, 0x2000, 0x200, 0, 10, 0)
    optional += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + bytes(16 * 8)
    section = struct.pack("<8sIIIIIIHHI", b".text", len(body), 0x1000, raw, 0x200, 0, 0, 0, 0, 0xE0000020)
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + b"PE\0\0" + coff + optional + section
    return head.ljust(0x200, b"\0") + body.ljust(raw, b"\0")


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)
