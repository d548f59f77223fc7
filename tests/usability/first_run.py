"""The first ten minutes as a stranger has them, full size: `make first-run`, or `python3 tests/usability/first_run.py [--scripted]`.

    a clone in a folder of its own -> make run at a terminal -> Ctrl-C -> make run at a terminal without a network -> Ctrl-C

A line a figure; exit status 1 where what was promised did not come: a batch within the time that was announced, the pages within 20 s the second
time, the block with the next steps last on the screen. Nothing is left running, whatever happens. The standard library alone: a clone has no more.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

TREE = Path(__file__).parents[2]
PAGES_S = 20
HANGS_S = 1800.0
LAST = "  Next  "  # how the last line of the last block begins
PAGES = r"^  Pages +(http\S+)"
_TERMINAL = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}


class Run:
    """One `make run` at a terminal of its own; what it says, with the second in which it was said."""

    def __init__(self, command: list[str], folder: Path) -> None:
        ours, its = pty.openpty()
        self.said: list[tuple[float, str]] = []
        self._terminal, self._rest, self._started = ours, b"", time.monotonic()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("REPAVE_", "MAKE", "MFLAGS"))} | _TERMINAL
        self._process = subprocess.Popen(command, cwd=folder, stdin=its, stdout=its, stderr=its, env=env, start_new_session=True)
        os.close(its)

    def follow(self, *, until: str = "\n\n") -> None:
        """All that it says up to a line that begins so, or its end."""
        while time.monotonic() - self._started < HANGS_S:
            if select.select([self._terminal], [], [], 1)[0]:
                try:
                    new = os.read(self._terminal, 65536)
                except OSError:  # EIO: nobody has the other end any more
                    return
                *lines, self._rest = (self._rest + new).split(b"\n")
                for line in lines:
                    text = line.decode(errors="replace").rstrip("\r")
                    self.said.append((time.monotonic() - self._started, text))
                    print(f"    {self.said[-1][0]:6.1f}  {text}", flush=True)
                    if text.startswith(until):
                        return
            elif self._process.poll() is not None:
                return

    def end(self) -> int:
        """As by Ctrl-C; killed where that is not enough."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
            self.follow()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()

    def at(self, pattern: str) -> tuple[float, re.Match[str]] | None:
        """When the first line came that has it."""
        return next(((second, found) for second, line in self.said if (found := re.search(pattern, line))), None)

    def announced_s(self) -> int:
        """Set-up and the rest have a line each."""
        return sum(60 * int(found[1]) for _, line in self.said if (found := re.search(r"[Ww]ithin (\d+) min", line)))


def judge(run: Run, name: str) -> list[str]:
    """Prints the figures; returns what was promised and did not come."""
    pages, done, end = run.at(PAGES), run.at(r"^✓ \d+ machines run"), run.said[-1] if run.said else (0.0, "")
    print(f"{name}: announced {run.announced_s()} s")
    print(f"{name}: pages after {pages[0]:.1f} s, at {pages[1][1]}" if pages else f"{name}: no pages")
    print(f"{name}: batch finished after {done[0]:.1f} s" if done else f"{name}: no finished batch")
    broken = [] if pages and done else [f"{name}: it did not come to its end; it said last: {end[1]}"]
    if done and done[0] > run.announced_s():
        broken.append(f"{name}: {done[0]:.0f} s, and {run.announced_s()} s were announced")
    if not end[1].startswith(LAST):
        broken.append(f"{name}: the next steps are not last on the screen")
    return broken


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return bool(page.status == 200)
    except OSError:
        return False


def without_network(command: str) -> list[str]:
    """A namespace whose only network is a loopback of its own."""
    return ["unshare", "-n" if os.geteuid() == 0 else "-rn", "sh", "-c", f"ip link set lo up && exec {command}"]


def judge_both(clone: Path, command: str, runs: list[Run]) -> list[str]:
    runs.append(Run(command.split(), clone))
    runs[-1].follow(until=LAST)
    broken = judge(runs[-1], "first")
    pages = runs[-1].at(PAGES)
    if not (pages and answers(pages[1][1])):
        broken.append("first: its URL does not answer")
    runs[-1].end()
    if pages and answers(pages[1][1]):
        broken.append("first: Ctrl-C left something running")
    runs.append(Run(without_network(command), clone))
    runs[-1].follow(until=LAST)
    broken += judge(runs[-1], "second, no network")
    again = runs[-1].at(PAGES)
    if again and again[0] > PAGES_S:
        broken.append(f"second, no network: pages after {again[0]:.0f} s, promised within {PAGES_S}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripted", action="store_true", help="scripted machines: what this script does, in two minutes")
    command = "make run SCRIPTED=1" if parser.parse_args().scripted else "make run"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder, runs = Path(tempfile.mkdtemp(prefix="repave-first-", dir="/tmp")), list[Run]()
    clone = folder / "repave"
    try:
        subprocess.run(["git", "clone", "--quiet", TREE, clone], check=True)
        broken = judge_both(clone, command, runs)
    finally:
        for run in runs:
            run.end()
        if (clone / ".venv/bin/repave").exists():
            subprocess.run([clone / ".venv/bin/repave", "rack", "down"], cwd=clone, check=False)
        shutil.rmtree(folder)
    for line in broken:
        print(f"broken: {line}")
    print("promised and kept" if not broken else f"{len(broken)} promises broken")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
