"""Sabotage: a bug of one line in a copy of the source, and the program that must be turned red by it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """`finds` is how a line must begin that `program` says then, or with a `*` before it what must be in one; `also` is the second guard of what has two."""

    says: str
    path: str
    old: str
    new: str
    finds: str
    program: tuple[str, ...]
    folder: str  # where it is run; it and `src` are copied
    also: tuple[str, str, str] | None = None  # path, old, new


def plant(bug: Bug) -> tuple[bool, str]:
    """Whether the bug was found, and what was said."""
    with tempfile.TemporaryDirectory(prefix="repave-sabotage-") as name:
        copy = Path(name)
        for part in ("src", bug.folder):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for path, old, new in filter(None, ((bug.path, bug.old, bug.new), bug.also)):
            text = (copy / path).read_text()
            if old not in text:
                return False, f"the line is not there any more: {old!r}"
            (copy / path).write_text(text.replace(old, new, 1))
        env = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        env.setdefault("REPAVE_CACHE", str(ROOT / ".repave/cache"))
        command = [sys.executable, *bug.program]
        done = subprocess.run(command, cwd=copy / bug.folder, env=env, capture_output=True, text=True, timeout=900, check=False)
        anywhere, wanted = bug.finds.startswith("*"), bug.finds.lstrip("*")
        said = [line for line in done.stdout.splitlines() if (wanted in line if anywhere else line.startswith(wanted))]
        return bool(done.returncode) and bool(said), said[0] if said else (done.stdout + done.stderr)[-1500:]
