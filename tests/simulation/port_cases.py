"""What the `Run` port promises (workflow/run.py), as workflows that any implementation can be asked to run, through one death of the process.

Each case logs what it sees; the log outlives the process. In the first life `die` ends the process where it is called; the second goes on
from what was recorded. What is told beforehand is in `TOLD`, what is told to the second life in `TOLD_LATER`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import sqlalchemy as sa

from repave.errors import BmcError, DeadlinePassed, RunFailed
from repave.workflow.lease import LeaseLapsed
from repave.workflow.run import Run

VALUE = {"n": [1, None, True, 2.5, "ü"], "deep": {"a": {"b": []}}}
BMC_ERROR = BmcError("power_failed", "It is still on.", tries=3)
TOLD = {
    "told before the wait": [("written", {"bytes": 7})],
    "the first of two messages stands": [("proof", {"n": 1}), ("proof", {"n": 2})],
    "a wait without time hears what was told": [("written", {"bytes": 7})],
    "messages keep apart": [("proof", {"n": "p"}), ("written", {"n": "w"}), ("agent-ready", {"n": "a"})],
    "an error that is told keeps its class": [("written", {"error": BMC_ERROR.as_json()})],
}
TOLD_LATER = {"told to a later life": [("written", {"late": True})]}
WAIT_S = 3.0


class Here(Protocol):
    """Where a case runs."""

    def log(self, what: str) -> None: ...
    def count(self, what: str) -> int: ...
    def die(self) -> None: ...
    def is_waiting(self) -> None: ...


async def last_step(run: Run, here: Here) -> None:
    """The process dies before this step is done; what came before is then replayed."""

    def effect(_: str) -> None:
        here.die()

    await run.step("last", effect)


async def death_between_effect_and_record(run: Run, here: Here) -> Any:
    def effect(run_id: str) -> str:
        here.log("effect")
        here.die()
        return run_id

    return await run.step("one", effect) == run.run_id


async def a_recorded_result_is_replayed(run: Run, here: Here) -> Any:
    def effect(_: str) -> Any:
        here.log("effect")
        return VALUE

    value = await run.step("one", effect)
    here.log(json.dumps(value))
    await last_step(run, here)
    return value


def failing(error: Exception) -> Callable[[Run, Here], Any]:
    async def case(run: Run, here: Here) -> Any:
        def effect(_: str) -> None:
            here.log("effect")
            raise error

        try:
            await run.step("one", effect)
        except RunFailed as failed:
            here.log(json.dumps([isinstance(failed, DeadlinePassed), failed.slug, str(failed), failed.as_json()]))
        except Exception:
            here.log("a bug")
        await last_step(run, here)

    return case


def waiting(*events: str, deadline_s: float = 30.0) -> Callable[[Run, Here], Any]:
    async def case(run: Run, here: Here) -> Any:
        for event in events:
            try:
                here.log(json.dumps(await run.wait_for(event, deadline_s)))
            except RunFailed as failed:
                here.log(json.dumps([isinstance(failed, DeadlinePassed), failed.slug, str(failed)]))
        await last_step(run, here)

    return case


def cut_in_a_wait(event: str, deadline_s: float) -> Callable[[Run, Here], Any]:
    async def case(run: Run, here: Here) -> Any:
        here.log("waits")
        here.is_waiting()
        try:
            return await run.wait_for(event, deadline_s)
        except DeadlinePassed as passed:
            return passed.slug

    return case


async def a_sleep_is_not_begun_anew(run: Run, here: Here) -> Any:
    here.log("waits")
    here.is_waiting()
    await run.sleep(WAIT_S)


async def the_time_is_recorded(run: Run, here: Here) -> Any:
    first = await run.now()
    await run.sleep(0.2)
    second = await run.now()
    here.log(json.dumps([first.isoformat(), second.isoformat(), first < second, first.tzinfo is not None]))
    await last_step(run, here)


def failing_once(error: Exception) -> Callable[[Run, Here], Any]:
    async def case(run: Run, here: Here) -> Any:
        def effect(_: str) -> str:
            here.log("effect")
            if here.count("effect") == 1:
                raise error
            return "done"

        return await run.step("one", effect)

    return case


CASES: dict[str, Callable[[Run, Here], Any]] = {
    "death between effect and record": death_between_effect_and_record,
    "a recorded result is replayed": a_recorded_result_is_replayed,
    "an error keeps its class": failing(BMC_ERROR),
    "a deadline keeps its class": failing(DeadlinePassed("deadline", "No word.")),
    "a bug is no RunFailed": failing(ValueError("nobody foresaw")),
    "told before the wait": waiting("written"),
    "the first of two messages stands": waiting("proof"),
    "messages keep apart": waiting("agent-ready", "written", "proof"),
    "an error that is told keeps its class": waiting("written"),
    "a wait has a deadline": waiting("written", deadline_s=0.5),
    "a message is taken once": waiting("proof", "proof", deadline_s=0.5),
    "an ignored boot override has its own class": waiting("agent-ready", deadline_s=0.5),
    "a wait without time hears what was told": waiting("written", "proof", deadline_s=0.0),
    "a deadline outlives the process": cut_in_a_wait("written", WAIT_S),
    "told to a later life": cut_in_a_wait("written", 60.0),
    "a sleep is not begun anew": a_sleep_is_not_begun_anew,
    "the time is recorded": the_time_is_recorded,
    "a busy database is asked again": failing_once(sa.exc.OperationalError("BEGIN", {}, Exception("database is locked"))),
    "a lease that lapsed begins the effect anew": failing_once(LeaseLapsed()),
}
TOLD["a message is taken once"] = [("proof", {"n": 1})]
