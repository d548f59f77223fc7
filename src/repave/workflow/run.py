"""The `Run` port: all that a workflow may ask of time and effects.

`engine.py` implements it on DBOS; tests and the simulator bring their own. A step runs at least once; a step whose result
was recorded never runs again. A failed step raises the same `errors.RunFailed` again after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from repave.errors import DeadlinePassed, RunFailed

Json = Any  # None, bool, int, float, str, list or dict of these


class Run(Protocol):
    """One try for one instance."""

    run_id: str

    async def step(self, name: str, effect: Callable[[str], Json]) -> Json:
        """Do `effect(run_id)` in a worker thread and record its result. The effect must be repeatable."""

    async def wait_for(self, event: str, deadline_s: float, why: str = "") -> dict[str, Json]:
        """The event's message, also one sent before the call. Raises DeadlinePassed, with `why` it was so long; the deadline survives restarts.
        A message with an "error" (`RepaveError.as_json`) is raised as RunFailed."""

    async def sleep(self, seconds: float) -> None:
        """Seconds later, also across restarts."""

    async def now(self) -> datetime:
        """The time, recorded: the same again when replayed."""


def open_message(event: str, message: dict[str, Json] | None, deadline_s: float, why: str = "") -> dict[str, Json]:
    """What `wait_for` makes of what came; None: nothing did within `deadline_s` seconds. Raises DeadlinePassed, or the message's "error" as RunFailed."""
    if message is None:
        slug = "boot_override_ignored" if event == "agent-ready" else "deadline"
        raise DeadlinePassed(slug, f"No {event} within {deadline_s / 60:.0f} minutes{why and f'; {why}'}.")
    if error := message.get("error"):
        raise RunFailed(error["class"], error.get("cause", ""), **error.get("context", {}))
    return dict(message)
