"""The engine's adapter and the simulator keep the same promises of the `Run` port: the same cases (port_cases.py) through the death of a process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from durable import Disk
from port_cases import BMC_ERROR, CASES, TOLD, TOLD_LATER, VALUE, WAIT_S
from sim_run import SimRun
from virtual_time import Life, Signal, VirtualTime

HERE = Path(__file__).parent
Log = list[tuple[int, float, str]]  # life, seconds, what


def play_dbos() -> dict[str, Log]:
    """Two processes, one after the other, on one SQLite file."""
    logs: dict[str, Log] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="rpp-", dir="/tmp") as folder:
        (Path(folder) / "log").touch()
        for life in (1, 2):
            done = subprocess.run(
                [sys.executable, str(HERE / "port_dbos.py"), folder, str(life)], cwd=HERE, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for line in (Path(folder) / "log").read_text().splitlines():
            case, *rest = json.loads(line)
            logs[case].append(tuple(rest))
    return logs


def play_simulator() -> dict[str, Log]:
    """Two lives of one process in virtual time, on one disk."""
    logs: dict[str, Log] = defaultdict(list)
    time, news = VirtualTime(1), Signal()
    disk = Disk(lambda: time.now)
    disk.told = lambda: time.give(news)
    store = disk.open_store()
    settled: set[str] = set()

    def begin(case: str, number: int) -> Life:
        life = Life(f"{case} {number}")

        def die() -> None:
            if number == 1:
                life.ended = True
                settled.add(case)
                time.leave()

        here: Any = SimpleNamespace(
            log=lambda what: logs[case].append((number, time.now, what)),
            count=lambda what: sum(entry[2] == what for entry in logs[case]), die=die, is_waiting=lambda: settled.add(case) if number == 1 else None,
        )  # fmt: skip

        def run() -> None:
            try:
                CASES[case](SimRun(case, disk, time, lambda point: None, news=news), here).send(None)
            except StopIteration as end:
                here.log(f"result {json.dumps(end.value)}")
                settled.add(case)

        time.spawn(case, run, life=life)
        return life

    def tell(told: dict[str, list[tuple[str, dict[str, Any]]]]) -> None:
        for case, messages in told.items():
            for event, message in messages:
                with store.write() as conn:
                    store.tell(conn, case, event, message)

    try:
        tell(TOLD)
        lives = [begin(case, 1) for case in CASES]
        time.run(lambda: len(settled) == len(CASES), until=60)
        for life in lives:
            life.ended = True
        ended = [case for case in CASES if any(what.startswith("result") for _, _, what in logs[case])]
        settled.clear()
        settled.update(ended)
        for case in CASES:
            if case not in ended:
                begin(case, 2)
        tell(TOLD_LATER)
        time.run(lambda: len(settled) == len(CASES), until=200)
    finally:
        time.close()
        disk.close()
    return logs


@pytest.fixture(scope="module", params=[play_dbos, play_simulator], ids=["dbos", "simulator"])
def logs(request: pytest.FixtureRequest) -> dict[str, Log]:
    return request.param()  # type: ignore[no-any-return]


def said(log: Log) -> list[tuple[int, str]]:
    return [(life, what) for life, _, what in log]


def test_an_effect_that_was_not_recorded_is_done_again(logs):
    assert said(logs["death between effect and record"]) == [(1, "effect"), (2, "effect"), (2, "result true")]


def test_a_recorded_result_is_replayed_as_it_was_and_its_effect_is_not_repeated(logs):
    value = json.dumps(VALUE)
    assert said(logs["a recorded result is replayed"]) == [(1, "effect"), (1, value), (2, value), (2, f"result {value}")]


@pytest.mark.parametrize("case", ["an error keeps its class", "a deadline keeps its class"])
def test_a_failed_step_raises_the_same_error_again(logs, case):
    (_, effect), (_, first), (life, again), _ = said(logs[case])
    assert (effect, life, first) == ("effect", 2, again)
    passed, slug, _, told = json.loads(first)
    assert (passed, slug) == ((False, "power_failed") if case.startswith("an error") else (True, "deadline"))
    assert told.get("context") == (BMC_ERROR.context if not passed else None)


def test_an_unforeseen_error_is_never_taken_for_a_failed_step(logs):
    assert said(logs["a bug is no RunFailed"]) == [(1, "effect"), (1, "a bug"), (2, "a bug"), (2, "result null")]


@pytest.mark.parametrize(("case", "heard"), [
    ("told before the wait", ['{"bytes": 7}']),
    ("the first of two messages stands", ['{"n": 1}']),
    ("messages keep apart", ['{"n": "a"}', '{"n": "w"}', '{"n": "p"}']),
    ("an error that is told keeps its class", [json.dumps([False, BMC_ERROR.slug, str(BMC_ERROR)])]),
    ("a wait has a deadline", [json.dumps([True, "deadline", "It took too long. No written within 0 minutes."])]),
    ("a wait without time hears what was told", ['{"bytes": 7}', json.dumps([True, "deadline", "It took too long. No proof within 0 minutes."])]),
    ("an ignored boot override has its own class",
     [json.dumps([True, "boot_override_ignored", "The server did not boot our media. No agent-ready within 0 minutes."])]),
    ("a message is taken once", ['{"n": 1}', json.dumps([True, "deadline", "It took too long. No proof within 0 minutes."])]),
])  # fmt: skip
def test_a_wait_hears_what_was_told_and_hears_it_again_in_the_next_life(logs, case, heard):
    assert said(logs[case]) == [*((1, h) for h in heard), *((2, h) for h in heard), (2, "result null")]


@pytest.mark.parametrize(("case", "result"), [("a deadline outlives the process", '"deadline"'), ("a sleep is not begun anew", "null")])
def test_a_death_does_not_begin_a_wait_anew(logs, case, result):
    (_, began, _), (life, again, _), (_, ended, what) = logs[case]
    assert (life, what) == (2, f"result {result}")
    assert began + WAIT_S - 0.1 <= ended <= max(began + WAIT_S, again) + WAIT_S / 2


def test_a_message_told_after_the_death_is_heard(logs):
    assert said(logs["told to a later life"])[-1] == (2, 'result {"late": true}')


def test_the_time_is_recorded_and_goes_on(logs):
    (_, first), (_, again), _ = said(logs["the time is recorded"])
    assert first == again
    assert json.loads(first)[2:] == [True, True]


@pytest.mark.parametrize("case", ["a busy database is asked again", "a lease that lapsed begins the effect anew"])
def test_an_effect_that_was_refused_for_a_moment_is_begun_anew(logs, case):
    assert said(logs[case]) == [(1, "effect"), (1, "effect"), (1, 'result "done"')]
