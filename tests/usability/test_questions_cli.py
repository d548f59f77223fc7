"""Can a stranger judge it? Those questions that are about the command line, asked of one scripted rack as a person at a shell would."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import digest_of
from tmux_screen import Screen, open_screen

from repave.errors import CATALOGUE
from repave.lab.processes import is_alive
from repave.lab.rack import find_service, rack_down, rack_up, start_service_again
from repave.lab.scripted import BMC_LOG, set_faults, set_firmware
from repave.lab.state import find_state

REPAVE = [sys.executable, "-m", "repave.cli.main"]
PASSWORD = "Question-7!asked"
ALL = "lab[01-04]"
AGENT_READY_S = 26  # longer than a late boot must be seen, so that the same run is late first and given up then

Done = subprocess.CompletedProcess[str]


class Shell:
    """The folder that `repave rack up` was typed in; REPAVE_ variables are as in a new shell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rack = folder, folder / ".repave/rack"
        state = find_state(self.rack)
        assert state is not None
        self.machines = {m.name: m for m in state.machines}

    @property
    def env(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_")}

    def run(self, *argv: str, stdin: str = "", code: int = 0) -> Done:
        done = subprocess.run([*REPAVE, *argv], input=stdin, capture_output=True, text=True, timeout=120, env=self.env, cwd=self.folder)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def json(self, *argv: str) -> Any:
        return json.loads(self.run(*argv, "--json").stdout)

    def reinstall(self, names: str, *, image: str, code: int = 0) -> Done:
        number = str(len(self.names(names)))
        return self.run("reinstall", names, "--image", image, "--yes", "--expect", number, "--password-stdin", stdin=f"{PASSWORD}\n", code=code)

    def names(self, nodeset: str) -> list[str]:
        from repave.cli.output import unfold

        return unfold(nodeset)

    def at_a_terminal(self, *argv: str, rows: int = 24) -> Any:
        return open_screen([*REPAVE, *argv], rows=rows, env={"REPAVE_NEW_PASSWORD": PASSWORD}, cwd=self.folder)

    def bmc_changes(self) -> int:
        """How often a BMC of the rack was asked to change something."""
        log = self.rack / BMC_LOG
        return len(log.read_text().splitlines()) if log.exists() else 0

    def batches(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json("batch", "ls")["items"]
        return found

    def newest(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json("batch", "show")
        return found


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """Four machines that were each reinstalled twice, so that there is a usual time."""
    folder = Path(tempfile.mkdtemp(prefix="rpq-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPAVE_AGENT_READY_S", str(AGENT_READY_S))
        try:
            rack_up(4, scripted=True, folder=folder / ".repave", debian=False)
            shell = Shell(folder)
            for image in ("tiny-2", "tiny-1"):
                shell.reinstall(ALL, image=image)
            yield shell
        finally:
            rack_down(folder / ".repave")
            shutil.rmtree(folder, ignore_errors=True)


def test_q3_bare_repave_says_state_and_next_command_in_six_lines(shell: Shell) -> None:
    said = shell.run().stdout.splitlines()
    assert len(said) <= 6 and "5 servers" in said[0]
    following = said[-1].removeprefix("Next:").strip()
    assert following.startswith("repave ")
    assert shell.run(*_words(following)).returncode == 0, "the next command works when pasted"


def _words(command: str) -> list[str]:
    import shlex

    return shlex.split(command)[1:]


def test_q4_a_plan_names_what_is_erased_and_kept_time_and_what_stops_it_and_powers_nothing(shell: Shell) -> None:
    before, events = shell.bmc_changes(), shell.json("events", "--limit", "1")["items"]
    plan = shell.run("reinstall", "lab[01-03]", "--image", "tiny-2", "--max-failed", "1", "--plan-only").stdout
    assert re.search(r"ERASED\s+lab\[01-03\]", plan) and re.search(r"KEPT\s+3 data disks seen before", plan), plan
    assert re.search(r"TIME\s+lab\[01-03\] usual \d+:\d\d", plan) and "STOPS" in plan and "more than 1 fail" in plan
    assert (shell.bmc_changes(), shell.json("events", "--limit", "1")["items"]) == (before, events)


def test_q5_enter_y_and_other_words_start_nothing(shell: Shell) -> None:
    before = len(shell.batches())
    for typed in ([], ["y"], ["erase 3"]):
        with shell.at_a_terminal("reinstall", ALL, "--image", "tiny-2") as screen:
            screen.wait_for("to start:")
            screen.type(*typed, "Enter")
            screen.wait_for("EXIT=3")
    assert len(shell.batches()) == before


def test_q6_without_a_terminal_or_with_another_number_nothing_is_touched(shell: Shell) -> None:
    before = shell.bmc_changes()
    shell.run("reinstall", ALL, "--image", "tiny-2", code=3)
    shell.run("reinstall", ALL, "--image", "tiny-2", "--yes", "--expect", "3", "--password-stdin", stdin=PASSWORD, code=3)
    assert shell.bmc_changes() == before


def test_q8_a_rehearsal_ends_with_the_old_os_up_and_the_disks_byte_equal(shell: Shell) -> None:
    def digests() -> list[str]:
        return [digest_of(path) for m in shell.machines.values() for path in (m.root_disk, m.data_disk) if path]

    before = digests()
    done = shell.run("reinstall", "lab[01-02]", "--image", "tiny-2", "--rehearse", "--yes", "--expect", "2")
    assert "nothing written" in done.stdout and digests() == before
    assert [s["instance"]["state"] for s in shell.json("server", "ls")["items"][:2]] == ["running"] * 2


def test_q9_the_side_of_the_line_is_on_each_run(shell: Shell) -> None:
    shell.reinstall("lab01", image="tiny-2")
    assert shell.json("run", "lab01")["past_the_line"] is True
    assert "the line, crossed" in shell.run("run", "lab01").stdout and "past the line" in shell.run("run", "lab01").stdout
    assert all(isinstance(run["past_the_line"], bool) for run in shell.newest()["runs"])


def test_q10_q11_q12_a_slow_server_has_no_estimate_then_a_cause_and_the_retry_takes_only_that_one(shell: Shell) -> None:
    set_firmware(shell.rack, {"lab03": 60.0})
    try:
        with shell.at_a_terminal("reinstall", "lab[03-04]", "--image", "tiny-2") as screen:
            _type_when_asked(screen, "erase 2")
            lines = screen.wait_for("late: now", deadline_s=60)
            late = next(line for line in lines if "late: now" in line)
            assert re.search(r"▲ lab03 .*late: now \d+:\d\d, usual \d+:\d\d, gives up at 0:2\d · before the line", late), late
            assert not any("about" in line and "left" in line for line in lines), "an estimate that is no longer true is gone"
            set_firmware(shell.rack, {})
            lines = screen.wait_for("EXIT=10", deadline_s=60)
    finally:
        set_firmware(shell.rack, {})
    text = "\n".join(lines)
    assert "✗ lab03" in text and "Repave.2110" in text and "cause" in text and "untouched  the root disk was not written" in text
    following = next(line for line in lines if line.startswith("Next:"))
    assert "repave batch retry" in following
    shell.run("batch", "retry", "--yes", "--expect", "1", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert [run["server"] for run in shell.newest()["runs"]] == ["lab03"]
    assert [a["state"] for a in shell.json("run", "lab03")["attempts"]][-2:] == ["failed", "running"]


def _type_when_asked(screen: Screen, words: str) -> None:
    screen.wait_for("to start:")
    screen.type(words, "Enter")


def test_q13_q15_a_second_call_attaches_and_a_cancel_says_first_what_it_will_do(shell: Shell) -> None:
    before = len(shell.batches())
    set_faults(shell.rack, {"lab01": ["no-hello"], "lab02": ["no-hello"]})
    argv = ("reinstall", "lab[01-02]", "--image", "tiny-2")
    try:
        with shell.at_a_terminal(*argv) as screen:
            _type_when_asked(screen, "erase 2")
            screen.wait_for("working 2")
            screen.type("C-c")
            screen.wait_for("EXIT=130")
        with shell.at_a_terminal(*argv) as screen:
            screen.wait_for("Watch it? [Y/n]")
            screen.type("Enter")
            screen.wait_for("working 2")
            screen.type("C-c")
            screen.wait_for("EXIT=130")
        refused = shell.run(*argv, "--yes", "--expect", "2", "--password-stdin", stdin=PASSWORD, code=3)
        assert f"repave watch {shell.newest()['id']}" in refused.stderr
        assert len(shell.batches()) == before + 1
        said = shell.run("cancel", code=3).stderr
        assert re.search(r"lab\[01-02\]\s+before the line\s+media out, what was there boots again\s+→ cancelled", said), said
        late = shell.run("wait", "lab[01-02]", "--timeout", "0.5", code=124)
        assert "lab[01-02] not ended" in late.stderr and "4/8 boot-ramdisk" in late.stdout
        shell.run("cancel", "--yes")
        shell.run("wait", "lab[01-02]", "--timeout", "60", code=13)
    finally:
        set_faults(shell.rack, {})


def test_q16_a_killed_service_loses_no_number_and_the_watcher_goes_on(shell: Shell) -> None:
    service = find_service(shell.folder / ".repave")
    assert service is not None
    argv = ["reinstall", ALL, "--image", "tiny-1", "--yes", "--expect", "4", "--password-stdin"]
    watcher = subprocess.Popen(
        [*REPAVE, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=shell.env, cwd=shell.folder
    )
    try:
        assert watcher.stdin is not None and watcher.stdout is not None
        watcher.stdin.write(f"{PASSWORD}\n")
        watcher.stdin.flush()
        assert "lab" in watcher.stdout.readline()
        os.kill(service.pid, signal.SIGKILL)
        while is_alive(service):
            time.sleep(0.02)
        start_service_again(shell.folder / ".repave")
        out, err = watcher.communicate(timeout=90)
    finally:
        watcher.kill()
    assert watcher.returncode == 0, out + err
    assert shell.newest()["counts"] == {"running": 4, "working": 0, "waiting": 0, "failed": 0, "rehearsed": 0, "cancelled": 0}


def test_power_is_switched_by_hand_as_the_bmc_then_shows_it_and_the_os_comes_back(shell: Shell) -> None:
    def shown() -> str:
        return str(shell.json("server", "power", "lab04", "show")["items"][0]["power"])

    shell.run("server", "power", "lab04", "off", "--force", "--yes", "--expect", "1")
    assert shown() == "off"
    with shell.at_a_terminal("server", "power", "lab[03-04]", "restart", "--force") as screen:
        screen.wait_for("to start:")
        screen.type("restart 1", "Enter")
        screen.wait_for("EXIT=0")
    assert shown() == "on"


def test_q22_all_lists_have_items_names_and_csv(shell: Shell) -> None:
    for argv in (("server", "ls"), ("image", "ls"), ("batch", "ls"), ("project", "ls"), ("key", "ls"), ("rack", "ls"), ("events",), ("report",), ("explain",)):
        assert shell.json(*argv)["items"], argv
    for argv in (("server", "ls"), ("report",)):
        names = shell.run(*argv, "-o", "name").stdout.split()
        table = shell.run(*argv, "-o", "csv").stdout.splitlines()
        assert names == [line.split(",")[0] for line in table[1:]] and "lab01" in names


def test_q23_explain_gives_cause_what_to_do_and_what_is_untouched_for_each_code(capsys: pytest.CaptureFixture[str]) -> None:
    from repave.cli.main import run

    documented = re.findall(r"Repave\.\d{4}", (Path(__file__).parents[2] / "docs/errors.md").read_text())
    assert {p.code for p in CATALOGUE.values()} <= set(documented)
    for code in dict.fromkeys(documented):
        assert run(["explain", code]) == 0
        said = capsys.readouterr().out
        assert all(re.search(rf"^{name}\s+\S", said, re.MULTILINE) for name in ("Why", "Do", "Untouched")), code


def test_q24_the_password_is_in_no_file_of_the_site_and_in_no_answer(shell: Shell) -> None:
    looked_at = [p for p in (shell.folder / ".repave").rglob("*") if p.is_file() and p.suffix != ".raw" and "rack" not in p.parts]
    assert any(p.suffix == ".db" for p in looked_at)
    assert [p for p in looked_at if PASSWORD.encode() in p.read_bytes()] == []
    for argv in (("events", "--limit", "1000"), ("batch", "show"), ("run", "lab01")):
        assert PASSWORD not in shell.run(*argv, "--json").stdout


def test_the_doctor_begins_and_ends_with_its_verdict_and_tells_only_what_is_not_well(shell: Shell) -> None:
    well = shell.run("doctor", ALL).stdout.splitlines()
    assert re.match(r"✓ \d+ checks passed\.", well[0]) and well[-1] == "Ready for reinstalls." and len(well) == 2, well
    shell.run("server", "lock", "lab01", "--reason", "database, ask first")
    try:
        locked = shell.run("doctor", ALL).stdout
    finally:
        shell.run("server", "unlock", "lab01")
    assert locked.startswith("▲ 1 warning, ") and "lab01: locked by" in locked
    nobody = subprocess.run([*REPAVE, "doctor"], capture_output=True, text=True, env=shell.env | {"REPAVE_ENDPOINT": "http://127.0.0.1:9", "REPAVE_TOKEN": "t"})
    assert nobody.returncode == 5
