"""Debian packages of the machine's own sources, unpacked, and the few of their files that a tiny OS needs: modules, Python, libraries."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

_LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_LOADER = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"


def run(command: Sequence[str | Path], *, stdin: str = "", cwd: Path | None = None) -> str:
    """The program's standard output. Raises RuntimeError with its last words."""
    done = subprocess.run([str(word) for word in command], input=stdin, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def fetch_packages(names: Iterable[str], target: Path, cache: Path) -> None:
    """The packages' files are under `target`. Downloaded once: the cache keeps them by name and version."""
    debs = (cache / "debs").resolve()
    debs.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    for line in run(["apt-get", "download", "--print-uris", *names]).splitlines():
        file = line.split()[1]
        if not (debs / file).exists():
            with tempfile.TemporaryDirectory(dir=debs) as whole:  # another build may look at the same cache
                run(["apt-get", "download", "--quiet", file.split("_")[0]], cwd=Path(whole))
                next(Path(whole).iterdir()).rename(debs / file)
        run(["dpkg-deb", "--extract", debs / file, target])


def find_kernel(target: Path, cache: Path) -> tuple[Path, Path]:
    """The newest generic kernel, unpacked under `target`: its vmlinuz and its modules' folder."""
    depends = run(["apt-cache", "depends", "--no-recommends", "--no-suggests", "linux-image-amd64"])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise RuntimeError("apt knows no linux-image-amd64: run apt-get update")
    fetch_packages([found[1]], target, cache)
    return next((target / "boot").glob("vmlinuz-*")), next((target / "lib/modules").iterdir())


def copy_modules(modules: Path, names: Iterable[str], target: Path) -> list[str]:
    """The kernel modules `names` and what they depend on are in `target`; returned in an order in which insmod takes them.

    A module that is not there is built into the kernel. Dependencies are read from the modules themselves (no depmod).
    """
    paths = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name not in paths:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", paths[name].read_bytes())
        for dependency in found[1].decode().split(",") if found else []:
            add(dependency.replace("-", "_"))
        order.append(name)

    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        add(name.replace("-", "_"))
    for name in order:
        shutil.copy2(paths[name], target / f"{name}.ko")
    return order


def copy_python(tree: Path, root: Path, *, needed_by: Sequence[str]) -> list[Path]:
    """The standard library's modules that importing `needed_by` loads are under `root`; the extension modules' paths are returned.

    They are asked of the very Python that will run there, with the standard library alone.
    """
    sources = [Path(__file__).parents[2] / (name.replace(".", "/") + ".py") for name in needed_by]
    program = (
        "import sys, runpy, encodings.idna, encodings.ascii, encodings.latin_1, encodings.utf_8, collections.abc\n"
        f"for path in {[str(p) for p in sources]!r}: runpy.run_path(path)\n"
        "print('\\n'.join(sorted({m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)})))\n"
    )
    library = tree / "usr/lib/python3.11"
    with_tree = {"PYTHONHOME": str(tree / "usr"), "LD_LIBRARY_PATH": ":".join(str(tree / f) for f in _LIBRARY_FOLDERS), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(tree / _LOADER), str(tree / "usr/bin/python3.11"), "-S", "-s", "-c", program]
    done = subprocess.run(command, env=with_tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the unpacked Python failed: {done.stderr[-2000:]}")
    extensions = []
    for line in done.stdout.splitlines():
        path = Path(line)
        if not path.is_relative_to(library):
            continue
        target = root / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        if path.suffix == ".so":
            extensions.append(path)
    (root / "usr/lib/python3.11/lib-dynload").mkdir(parents=True, exist_ok=True)
    # Compiled here, once: the target would compile at each boot. unchecked-hash: the image's times do not matter.
    run(["python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(root), root / "usr/lib/python3.11"])
    return extensions


def copy_libraries(tree: Path, root: Path, programs: Iterable[Path]) -> None:
    """Every shared library that the programs need is under `root`, as is the loader."""
    folders = ":".join(str(tree / folder) for folder in _LIBRARY_FOLDERS)
    target = root / "lib/x86_64-linux-gnu"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy2(tree / _LOADER, root / _LOADER)
    (root / "lib64").mkdir()
    (root / "lib64/ld-linux-x86-64.so.2").symlink_to(f"/{_LOADER}")
    for program in programs:
        for name, path in re.findall(r"^\s*([^/\s]+) => (\S+)", run([tree / _LOADER, "--library-path", folders, "--list", program]), re.MULTILINE):
            if not Path(path).is_relative_to(tree):
                raise RuntimeError(f"{program.name} needs {name}, which no package of the tiny OS has")
            shutil.copy2(path, target / name)


def list_sources() -> list[str]:
    """The machine's own Debian sources for bookworm, as lines for sources.list; other origins are left out."""
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    lines = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).splitlines()
    found = sorted({tuple(line.split("|")[1:]) for line in lines if line.startswith("Debian|") and "|bookworm" in line and line.endswith("|main")})
    return [f"deb {' '.join(fields)}" for fields in found]
