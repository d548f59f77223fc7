"""The `Run` port in virtual time, with the promises of `workflow/run.py`: what the engine keeps is text, as in its database.

The journal holds (name, JSON) of each step and wait. A step whose result is there never runs again; an error comes back with its class.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from durable import Disk
from virtual_time import Signal, VirtualTime

from repave.errors import RunFailed
from repave.workflow.engine import _DATABASE_PAUSES_S, JsonSerializer
from repave.workflow.lease import LeaseLapsed
from repave.workflow.run import Json, open_message

_JSON = JsonSerializer()
TIMES_OUT_S = 1800.0  # a wait that is made to time out does so before the reaper ends the run: `written` may last a day


class Overtaken(Exception):
    """The engine gave the workflow to another worker: nothing of this one is recorded any more."""


class OrderChanged(Exception):
    """The workflow asked for another step than the one that was recorded."""


@dataclasses.dataclass
class Meddling:
    """What a test does to a run's steps: repeat each effect, let one fail for good, let one wait time out."""

    twice: bool = False
    fails: str = ""
    silent: str = ""
    stopped: bool = False  # the step that fails was met


class SimRun:
    """One run's port. `at` is told each edge, and may end the process there."""

    def __init__(
        self, run_id: str, disk: Disk, time: VirtualTime, at: Callable[[str], None], *, news: Signal | None = None, meddling: Meddling | None = None,
        owner: str = "", require: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`require`: asked before each effect, raises LeaseLapsed where the effect must begin anew. `owner`: the executor whose workflow this is."""
        self.run_id, self._disk, self._time, self._at = run_id, disk, time, at
        self._owner, self._require = owner, require
        self._news, self._meddling = news or Signal(), meddling or Meddling()
        self._journal = disk.journals.setdefault(run_id, [])
        self._position = 0

    async def step(self, name: str, effect: Callable[[str], Json]) -> Json:
        found, value = self._replay(name)
        if found:
            return value
        self._at(f"step {name} before")
        try:
            value = self._do(name, effect)
        except RunFailed as error:
            value = error
        except Exception as error:
            value = error  # a bug: the engine keeps it too, and raises it
        self._at(f"step {name} after")
        self._record(name, value)
        self._at(f"step {name} recorded")
        if isinstance(value, Exception):
            raise value
        return value

    def _do(self, name: str, effect: Callable[[str], Json]) -> Json:
        if self._meddling.fails == name.rstrip("-1234"):
            self._meddling.stopped = True
            raise RunFailed("agent-failed", "The step fails for good.")
        for pause_s in (*_DATABASE_PAUSES_S, None):
            try:
                if self._meddling.twice:
                    with contextlib.suppress(RunFailed):
                        self._act(effect)
                return self._act(effect)
            except (sa.exc.OperationalError, sa.exc.TimeoutError):
                if pause_s is None:
                    raise
                self._time.sleep(pause_s)
        raise AssertionError

    def _act(self, effect: Callable[[str], Json]) -> Json:
        while True:
            try:
                self._require()
                return effect(self.run_id)
            except LeaseLapsed:
                continue

    async def wait_for(self, event: str, deadline_s: float, why: str = "") -> dict[str, Json]:
        if self._meddling.silent == event:
            deadline_s = min(deadline_s, TIMES_OUT_S)
        until = self._deadline(f"{event} until", deadline_s)
        found, message = self._replay(event)
        if not found:
            self._at(f"wait {event} before")
            while (message := self._take(event)) is None and self._time.now < until:
                self._time.wait(self._news, until)
            self._record(event, message)
            if message is not None:
                self._disk.inbox[self.run_id, event] = None  # taken; the same event is not told twice
            self._at(f"wait {event} recorded")
        return open_message(event, message, deadline_s, why)

    def _take(self, event: str) -> dict[str, Any] | None:
        if self._meddling.silent == event:
            self._meddling.stopped = True
            return None
        return self._disk.inbox.get((self.run_id, event))

    async def sleep(self, seconds: float) -> None:
        until = self._deadline("sleep", seconds)
        self._time.sleep(max(0.0, until - self._time.now))

    async def now(self) -> datetime:
        found, value = self._replay("now")
        if not found:
            value = self._disk.now().isoformat()
            self._record("now", value)
        return datetime.fromisoformat(value)

    def _deadline(self, name: str, seconds: float) -> float:
        """When it ends, kept: a restart does not begin the wait anew."""
        found, until = self._replay(name)
        if found:
            return float(until)
        until = self._time.now + seconds
        self._record(name, until)
        return until

    def _replay(self, name: str) -> tuple[bool, Any]:
        """Whether there is a record, and its value. Raises the recorded error."""
        if self._position >= len(self._journal):
            return False, None
        recorded, text = self._journal[self._position]
        if recorded != name:
            raise OrderChanged(f"{recorded} was recorded, {name} was asked for")
        self._position += 1
        value = _JSON.deserialize(text)
        if isinstance(value, Exception):
            raise value
        return True, value

    def _record(self, name: str, value: Any) -> None:
        if self._disk.owners.get(self.run_id, self._owner) != self._owner:
            raise Overtaken
        self._journal.append((name, _JSON.serialize(value)))
        self._position += 1
