"""A real terminal for tests: a tmux of its own, with a screen that is read as a person would."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class Screen:
    """One command in a window of tmux; the window stays when the command has ended."""

    def __init__(self, socket: str) -> None:
        self._tmux = ["tmux", "-L", socket, "-f", "/dev/null"]

    def start(self, argv: Sequence[str], *, columns: int, rows: int, env: Mapping[str, str], cwd: Path) -> None:
        command = f"trap : INT; {shlex.join(argv)}; echo EXIT=$?; sleep 600"  # a shell without a trap ends with what Ctrl-C ended
        size = ["-x", str(columns), "-y", str(rows)]
        subprocess.run([*self._tmux, "new-session", "-d", *size, "sh", "-c", command], check=True, env=dict(env), cwd=cwd, capture_output=True)

    def read(self, *, whole: bool = False, colours: bool = False) -> list[str]:
        """The lines of the screen; `whole`: of the scrollback too. Empty ones at the end are left out."""
        argv = [*self._tmux, "capture-pane", "-p", *(["-S", "-"] if whole else []), *(["-e"] if colours else [])]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.rstrip("\n").split("\n")

    def type(self, *keys: str) -> None:
        subprocess.run([*self._tmux, "send-keys", *keys], check=True)

    def wait_for(self, text: str, *, deadline_s: float = 20.0) -> list[str]:
        """The screen that shows it."""
        return self.wait_until(lambda lines: any(text in line for line in lines), repr(text), deadline_s=deadline_s)

    def wait_until(self, is_so: Callable[[list[str]], bool], what: str, *, deadline_s: float = 20.0) -> list[str]:
        """The screen of which it is so."""
        end = time.monotonic() + deadline_s
        while True:
            lines = self.read()
            if is_so(lines):
                return lines
            assert time.monotonic() < end, f"{what} did not come:\n" + "\n".join(lines)
            time.sleep(0.1)

    def end(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True)


@contextlib.contextmanager
def open_screen(
    argv: Sequence[str],
    *,
    columns: int = 100,
    rows: int = 24,
    env: Mapping[str, str] | None = None,
    cwd: Path,
    without: Sequence[str] = ("CI", "NO_COLOR", "COLUMNS", "LINES"),
) -> Iterator[Screen]:
    """`without`: names that the environment of whoever runs the tests must not bring along."""
    screen = Screen(f"repave-{uuid.uuid4().hex[:8]}")
    inherited = {k: v for k, v in os.environ.items() if k not in without and not k.startswith("REPAVE_")}
    try:
        screen.start(argv, columns=columns, rows=rows, env=inherited | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | dict(env or {}), cwd=cwd)
        yield screen
    finally:
        screen.end()
