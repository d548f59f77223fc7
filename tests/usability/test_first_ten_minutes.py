"""Can a stranger judge it? Those questions that are about the first ten minutes: 1, 2 and 7.

Here `make run SCRIPTED=1` answers them in seconds, by the same Makefile, demonstration and judge as the real one. Full size, by hand:

    make first-run      a clone in a folder of its own, `make run` with set-up, firmware and Debian, then once more without a network (15 minutes)

It prints a line for each figure, and its exit status is 1 where a promise was broken.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from first_run import LAST, PAGES, PAGES_S, Run, answers, judge, without_network

from repave.lab.processes import is_alive
from repave.lab.rack import find_service, rack_down

TREE = Path(__file__).parents[2]
MAKE = ["make", "--old-file=install", "run", "SCRIPTED=1"]  # the environment of whoever runs the tests is installed
BUSY = 2  # how much later the pages may come beside four files of tests


def make_folder() -> Path:
    """What a clone has where `make run` is typed; the environment is the tests' own."""
    path = Path(tempfile.mkdtemp(prefix="rpf-", dir="/tmp"))
    for name, target in (("Makefile", TREE / "Makefile"), ("tools", TREE / "tools"), (".venv", sys.prefix)):
        (path / name).symlink_to(target)
    return path


@contextlib.contextmanager
def open_run(command: list[str]) -> Iterator[tuple[Run, Path]]:
    """`make run` that has said its last line; nothing of it is left afterwards."""
    folder = make_folder()
    run = Run(command, folder)
    try:
        run.follow(until=LAST)
        yield run, folder
    finally:
        run.end()
        rack_down(folder / ".repave")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stranger() -> Iterator[tuple[Run, Path]]:
    """One `make run` that stays up at its terminal."""
    with open_run(MAKE) as opened:
        yield opened


def test_q1_make_run_ends_with_a_url_and_a_finished_batch_within_the_time_it_announced(stranger: tuple[Run, Path]) -> None:
    run, _ = stranger
    assert judge(run, "make run") == []
    pages = run.at(PAGES)
    assert pages and answers(pages[1][1])
    phases = {found[1] for _, line in run.said if (found := re.match(r"(\d)/6 ", line))}
    assert phases >= {"1", "2", "5", "6"}  # scripted machines boot no ramdisk


def test_q7_a_sample_of_the_official_sdk_runs_unchanged_with_what_make_env_prints_and_nothing_else(stranger: tuple[Run, Path]) -> None:
    _, folder = stranger
    exports = subprocess.run(["make", "env"], cwd=folder, capture_output=True, text=True, check=True).stdout
    variables = dict(re.findall(r"^export (\w+)=(\S+)$", exports, re.M))
    sample = [sys.executable, "-I", Path(__file__).with_name("sdk_sample.py")]
    done = subprocess.run(sample, env=variables | {"HOME": str(folder)}, cwd=folder, capture_output=True, text=True, timeout=60)
    accepted, *ended = done.stdout.splitlines() or [""]
    ids = accepted.split()[2:]
    assert accepted.startswith("accepted 202") and len(ids) == 2, done.stdout + done.stderr
    assert ended == [f"ended {instance} running" for instance in ids]


def test_q2_without_a_network_its_pages_come_in_time_a_batch_ends_and_ctrl_c_leaves_nothing() -> None:
    with open_run(without_network(" ".join(MAKE))) as (run, folder):
        assert judge(run, "without a network") == []
        pages = run.at(PAGES)
        assert pages and pages[0] <= PAGES_S * BUSY
        service = find_service(folder / ".repave")
        assert service and is_alive(service)
        run.end()
        assert not is_alive(service) and not (folder / ".repave/lab.json").exists()


def test_the_judge_tells_what_was_promised_and_did_not_come(tmp_path: Path) -> None:
    def broken(script: str) -> str:
        run = Run(["sh", "-c", script], tmp_path)
        run.follow(until=LAST)
        run.end()
        return " ".join(judge(run, "it"))

    whole = "echo 'Within 1 min'; echo '  Pages      http://127.0.0.1:9'; echo '✓ 2 machines run tiny-2'; echo '  Next       docs'"
    assert broken(whole) == ""
    assert "were announced" in broken(whole.replace("1 min", "0 min"))
    assert "not last on the screen" in broken(whole.replace("  Next", "next"))
    assert "did not come to its end; it said last: ✗ no memory" in broken("echo '✗ no memory'")
