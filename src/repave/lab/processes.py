"""Processes of the lab that outlive the command that started them: started detached, found again and ended by pid.

A pid alone may be another process by the time it is read back from a file, so it is kept with its start time
(field 22 of /proc/PID/stat, proc(5)): a pid that was used again is never signalled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessRef:
    """One process of this boot of this machine. `started` is in clock ticks since boot."""

    pid: int
    started: int
    name: str = ""


def find_process(pid: int, name: str = "") -> ProcessRef | None:
    """The process with this pid, or None where there is none or only its remains (a zombie)."""
    try:
        # The second field is the command in parentheses and may hold blanks: split after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else ProcessRef(pid, int(fields[19]), name)


def is_alive(process: ProcessRef) -> bool:
    """Whether this very process still runs."""
    now = find_process(process.pid)
    return now is not None and now.started == process.started


def start_detached(name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> ProcessRef:
    """The process runs in a session of its own, its output appended to `log`.

    Raises: OSError when the program is not there, RuntimeError when it ended at once.
    """
    with log.open("ab") as out:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=None if env is None else dict(env), cwd=cwd, start_new_session=True
        )
    started = find_process(child.pid, name)
    if started is None:
        raise RuntimeError(f"{name} ended at once with status {child.wait()}; see {log}")
    return started


def stop_processes(processes: Iterable[ProcessRef], *, grace_s: float = 5.0) -> None:
    """None of them runs: SIGTERM to all, SIGKILL to what is left after `grace_s`. Repeatable. Blocks."""
    for signal_number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        left = [p for p in processes if is_alive(p)]
        for process in left:
            _send(process, signal_number)
        deadline = time.monotonic() + patience_s
        while any(is_alive(p) for p in left) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in left:
            _reap(process)


def end_on_sigterm() -> None:
    """SIGTERM ends this process as an exception does, so that what it started does not outlive it. In the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _send(process: ProcessRef, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal_number)


def _reap(process: ProcessRef) -> None:
    """Our own dead children leave no zombie; other people's are none of our business."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


def wait_for_port(port: int, *, process: ProcessRef, log: Path, deadline_s: float = 30.0) -> None:
    """Something listens on 127.0.0.1:`port`. Raises RuntimeError when the process died or the time is over. Blocks."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if not is_alive(process):
            break
        time.sleep(0.05)
    raise RuntimeError(f"{process.name} does not listen on port {port}; see {log}")


def find_free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on.

    They lie below the range the kernel gives to outgoing connections (32768 up, ip(7)): a port must still be free
    when its machine is powered on an hour later.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports
