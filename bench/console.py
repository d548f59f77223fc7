"""A machine's serial console, followed from outside: each line with the time it came."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.02
GRUB = "Welcome to GRUB"  # the boot loader's first line: firmware is done


class Console:
    """Lines since it was opened, as (unix time, text). The file may be appended to by any number of boots."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._file.seek(0, 2)
        self._lines: list[tuple[float, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._file.close()

    def _follow(self) -> None:
        rest = b""
        while not self._over.wait(POLL_S):
            *whole, rest = (rest + self._file.read()).split(b"\n")
            self._lines += [(time.time(), line.decode(errors="replace").strip()) for line in whole]

    def wait_for(self, pattern: str, *, after: float, deadline_s: float = 240) -> float:
        """When the first such line after `after` came. Raises RuntimeError with the console's end where none comes."""
        until = time.monotonic() + deadline_s
        while True:
            at = self.find(pattern, after=after)
            if at is not None:
                return at
            if time.monotonic() > until:
                raise RuntimeError(f"no line {pattern!r} on the console within {deadline_s:.0f} s:\n" + "\n".join(text for _, text in self._lines[-15:]))
            time.sleep(POLL_S)

    def find(self, pattern: str, *, after: float) -> float | None:
        return next((at for at, text in self._lines if at >= after and re.search(pattern, text)), None)

    def find_number(self, pattern: str, *, after: float) -> float | None:
        """The number in the pattern's first group."""
        found = (re.search(pattern, text) for at, text in self._lines if at >= after)
        return next((float(match.group(1)) for match in found if match), None)


@contextmanager
def open_console(path: Path) -> Iterator[Console]:
    console = Console(path)
    try:
        yield console
    finally:
        console.close()
