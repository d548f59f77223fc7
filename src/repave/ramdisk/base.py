"""What of the unpacked Debian packages goes into the ramdisk: drivers, Python as bytecode, busybox, kmod, and the libraries they need."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from repave.errors import RunFailed
from repave.ramdisk import cpio

Run = Callable[[list[str]], str]

# Of the standard library: what no part of the agent and nothing it imports can want on a server without a user.
_NOT_WANTED = (
    "asyncio", "curses", "dbm", "distutils", "ensurepip", "idlelib", "lib2to3", "multiprocessing", "pydoc_data", "sqlite3", "test",
    "tkinter", "turtledemo", "unittest", "venv", "wsgiref", "xml", "xmlrpc", "config-*", "sitecustomize.py", "_sysconfigdata_*",
    "doctest.py", "pdb.py", "pydoc.py", "turtle.py", "tarfile.py", "zipapp.py", "imaplib.py", "nntplib.py", "smtplib.py", "smtpd.py",
    "ftplib.py", "poplib.py", "telnetlib.py", "mailbox.py", "pickletools.py", "optparse.py", "cgi.py", "cgitb.py", "aifc.py", "__phello__",
)  # fmt: skip
_DYNLOAD = ("_ctypes", "_ssl", "_hashlib", "_json", "_uuid", "_multibytecodec", "mmap", "_contextvars", "_queue", "_opcode", "_posixsubprocess")
_APPLET_DIR = "bin"
_FIRMWARE_NICS = ("bnx2", "bnx2x", "qede", "cxgb4", "nfp")  # which do nothing without firmware files: not in modules.txt


def collect(tree: Path, *, run: Run, nic_firmware: bool = False) -> dict[str, cpio.Entry]:
    """The base archive's entries, from the packages unpacked in `tree` (which is used as a workshop too)."""
    # Not lib64/, a link to the absolute path: that would be this machine's own.
    linker = tree / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    libraries = ":".join(str(tree / folder) for folder in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
    start = [str(linker), "--library-path", libraries]

    def kmod_as(name: str) -> Callable[[list[str]], str]:
        return lambda arguments: run([*start, "--argv0", name, str(tree / "bin/kmod"), *arguments])

    entries = _drivers(tree, kmod_as("depmod"), _FIRMWARE_NICS if nic_firmware else ())
    if nic_firmware:
        entries |= find_firmware(tree, kmod_as("modinfo"))
    kmod, python = tree / "bin/kmod", tree / "usr/bin/python3.11"
    library = _list_python_files(tree, lambda arguments: run([*start, str(python), *arguments]))
    # Debian keeps zstandard in dist-packages, which only its site.py would add to the path.
    entries |= {str(path.relative_to(tree)).replace("/python3/dist-packages/", "/python3.11/"): cpio.file(path.read_bytes()) for path in library}
    entries |= {
        "usr/bin/python3.11": cpio.file(python.read_bytes(), mode=0o755),
        "usr/bin/python3": cpio.symlink("python3.11"),
        "usr/bin/kmod": cpio.file(kmod.read_bytes(), mode=0o755),
        "usr/bin/modprobe": cpio.symlink("kmod"),
        "sbin/modprobe": cpio.symlink("/usr/bin/kmod"),  # the kernel calls it by this name
        "dev/console": cpio.Entry(0o020600, device=(5, 1)),  # /init's output before devtmpfs is mounted
        "proc": cpio.directory(), "sys": cpio.directory(), "tmp": cpio.directory(), "run": cpio.directory(), "mnt": cpio.directory(),
        "etc/passwd": cpio.file(b"root:x:0:0:root:/root:/bin/sh\n"),
        "etc/nsswitch.conf": cpio.file(b"hosts: files dns\n"),
        "etc/hosts": cpio.file(b"127.0.0.1 localhost\n::1 localhost\n"),
    }  # fmt: skip
    entries |= _busybox(tree, run)
    programs = [python, kmod, *(path for path in library if path.suffix == ".so")]
    entries |= _libraries(tree, programs, lambda path: run([*start, "--list", str(path)]))
    entries["lib64/ld-linux-x86-64.so.2"] = cpio.file(linker.read_bytes(), mode=0o755)
    return entries


def _drivers(tree: Path, depmod: Callable[[list[str]], str], also: tuple[str, ...]) -> dict[str, cpio.Entry]:
    """The modules of modules.txt, `also`, and what they need, with fresh indexes. Not stripped: Secure Boot wants their signatures."""
    version = next((tree / "lib/modules").iterdir()).name
    source, small = tree / "lib/modules" / version, tree / "small"
    depmod(["-b", str(tree), version])
    needs = {}
    for line in (source / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[_module_name(path)] = [path, *needed.split()]
    lines = (Path(__file__).parent / "modules.txt").read_text().splitlines()
    wanted = {_module_name(name) for line in lines if not line.startswith("#") for name in line.split()} | set(also)
    kept = small / "lib/modules" / version
    for path in sorted({path for name in wanted for path in needs[name]}):
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, kept / path)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copyfile(source / name, kept / name)
    depmod(["-b", str(small), version])
    indexes = ("modules.dep.bin", "modules.alias.bin", "modules.softdep", "modules.builtin.bin", "modules.builtin.alias.bin", "modules.symbols.bin")
    files = [*kept.rglob("*.ko"), *(kept / name for name in indexes)]
    return {str(path.relative_to(small)): cpio.file(path.read_bytes()) for path in files if path.exists()}


def find_firmware(tree: Path, modinfo: Callable[[list[str]], str]) -> dict[str, cpio.Entry]:
    """The files that the NIC drivers in the ramdisk ask for, as far as the packages have them: drivers name older and newer ones too."""
    drivers = [str(path) for path in sorted((tree / "small").rglob("*.ko")) if "/drivers/net/ethernet/" in str(path)]
    asked = sorted(set(modinfo(["-F", "firmware", *drivers]).split()))
    found = {name: tree / "lib/firmware" / name for name in asked if (tree / "lib/firmware" / name).is_file()}
    return {f"lib/firmware/{name}": cpio.file(path.read_bytes()) for name, path in found.items()}


def _module_name(path: str) -> str:
    return Path(path).name.removesuffix(".ko").replace("-", "_")


def _list_python_files(tree: Path, python: Callable[[list[str]], str]) -> list[Path]:
    """The standard library and zstandard as .pyc beside no source (compiled by the ramdisk's own Python), and the extension modules wanted."""
    library = tree / "usr/lib/python3.11"
    for pattern in _NOT_WANTED:
        for path in library.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    zstandard = tree / "usr/lib/python3/dist-packages/zstandard"
    # -b: beside the source; -o 2: no docstrings, no asserts; names without our build folder, so that the same packages give the same bytes.
    python([
        "-I", "-m", "compileall", "-q", "-b", "-f", "-o", "2", "-s", str(tree), "-p", "/", "--invalidation-mode", "unchecked-hash",
        str(library), str(zstandard),
    ])  # fmt: skip
    found = [*library.rglob("*.pyc"), *zstandard.glob("*.pyc"), *zstandard.glob("backend_c.*.so")]
    found += [path for path in (library / "lib-dynload").glob("*.so") if path.name.split(".")[0] in _DYNLOAD]
    return [path for path in found if "__pycache__" not in path.parts]


def _busybox(tree: Path, run: Run) -> dict[str, cpio.Entry]:
    busybox = tree / "bin/busybox"
    applets = run([str(busybox), "--list"]).split()
    entries = {f"{_APPLET_DIR}/{name}": cpio.symlink("busybox") for name in applets if name not in ("busybox", "modprobe", "depmod")}
    return entries | {f"{_APPLET_DIR}/busybox": cpio.file(busybox.read_bytes(), mode=0o755)}


def _libraries(tree: Path, programs: list[Path], list_needed: Callable[[Path], str]) -> dict[str, cpio.Entry]:
    """What the programs load, by the dynamic linker's own answer, in the one folder it searches by default."""
    paths = set()
    for program in programs:
        shown = list_needed(program)
        if "not found" in shown:
            raise RunFailed("internal", f"The ramdisk's {program.name} needs a library of a package that is not on the list.")
        paths |= {Path(path) for path in re.findall(rf"=> ({re.escape(str(tree))}/\S+)", shown)}
    paths |= {tree / "lib/x86_64-linux-gnu/libgcc_s.so.1"}  # dlopened by glibc when a thread ends
    return {f"lib/x86_64-linux-gnu/{path.name}": cpio.file(path.resolve().read_bytes(), mode=0o755) for path in paths if "ld-linux" not in path.name}
