"""The agent is killed with SIGKILL in its ramdisk: it is started again in the same boot, and the run goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from conftest import wait_until


def find_agent(lab, name: str) -> int | None:
    slot = os.fsencode(lab.folder / f"rack/scripted/{name}.slot")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if slot in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
        except OSError:
            continue
    return None


def kill_agent(lab, name: str) -> None:
    pid = wait_until(lambda: find_agent(lab, name), deadline_s=60, what=lambda: lab.console(name))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: find_agent(lab, name) != pid, deadline_s=10, what=lambda: "it lives")


def test_an_agent_killed_before_the_line_and_again_while_it_writes_is_started_again_and_the_run_ends_running(lab):
    before = len(lab.console("lab01"))  # of other tests' runs
    lab.reinstall(["lab01"], "heavy")
    batch = lab.newest_batch()
    kill_agent(lab, "lab01")
    for said in ("stage write", "stage compare"):  # the second agent looks what the first one wrote
        pid = wait_until(lambda: find_agent(lab, "lab01"), deadline_s=60, what=lambda: lab.describe(batch))
        until = time.monotonic() + 60
        while said not in lab.console("lab01")[before:]:  # a write takes half a second: there is no time to look for the process then
            assert time.monotonic() < until, lab.describe(batch)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: find_agent(lab, "lab01") != pid, deadline_s=10, what=lambda: "it lives")
    runs = lab.wait_for_end(batch)
    assert runs["lab01"]["state"] == "running" and runs["lab01"]["error"] is None, lab.describe(batch)
    console = lab.console("lab01")[before:]
    assert console.count("the agent was killed by signal 9") == 3
    assert "past the line still" in console
