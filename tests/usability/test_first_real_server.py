"""Question 25: the first real server in five commands, reading one page. The page's own commands, typed at a machine that the service does not know."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from repave.cli.client import Client, Endpoint
from repave.lab.rack import rack_down, rack_up
from repave.lab.scripted_os import build_image
from repave.lab.state import Machine, find_state

PAGE = Path(__file__).parents[2] / "docs/first-real-server.md"
PASSWORD = "First-server!25"
COMMANDS = re.findall(r"^\| \d+ \| `(repave [^`]+)` \|", PAGE.read_text(), re.M)


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Machine]:
    """It stands in the rack and runs its old OS; the service does not know it."""
    try:
        lab = rack_up(1, scripted=True, folder=tmp_path / ".repave", debian=False)
        Client(None, Endpoint(lab["endpoint"], lab["token"])).delete("/servers/lab01")
        state = find_state(tmp_path / ".repave/rack")
        assert state is not None
        yield state.machines[0]
    finally:
        rack_down(tmp_path / ".repave")


def test_q25_five_commands_of_one_page_lead_to_the_first_real_server(new: Machine, tmp_path: Path) -> None:
    assert len(COMMANDS) == 5
    build_image(tmp_path / "debian-12.qcow2", "debian-12")
    env = {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_")} | {"REPAVE_BMC_PASSWORD": new.bmc_password, "REPAVE_NEW_PASSWORD": PASSWORD}
    [two_disks] = re.findall(r"`(repave server set web01 --root-disk serial=)\.\.\.`", PAGE.read_text())  # as this machine has; the page says what then
    said = []
    for command in [*COMMANDS[:2], two_disks + new.root_serial, *COMMANDS[2:]]:
        words = shlex.split(command.replace("https://10.9.0.11", new.bmc_url).replace("--user admin", f"--user {new.bmc_username}"))[1:]
        more = ["--yes", "--expect", "1"] if words[0] == "reinstall" else []  # what a person types in at a terminal
        done = subprocess.run([sys.executable, "-m", "repave.cli.main", *words, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said.append(done.stdout + done.stderr)
        if "--rehearse" in command:
            assert "debian-12" not in new.console.read_text(errors="replace"), "a rehearsal writes nothing"
    assert "Ready for reinstalls" in said[0] and "rehears" in said[4] and "debian-12" in said[5], said
