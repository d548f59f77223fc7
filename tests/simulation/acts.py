"""What clients ask besides a plain reinstall: waves, a rehearsal, a pause, a cancel, another try. Drawn from the seed, asked by the product's own routes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response

from repave.api.operator.batches import Chosen, Reinstall, begin_reinstall, cancel_batch, pause_batch, resume_batch
from repave.domain.waves import Limits, Waves
from repave.errors import RequestError
from repave.workflow.fleet import ALL_AT_ONCE, NO_LIMITS

PASSWORD = "Canary-7!canary"


@dataclass
class Asked:
    """One request, and what follows it: seconds after its acceptance."""

    waves: Waves = ALL_AT_ONCE
    rehearse: bool = False
    retry: str = ""  # the batch whose failures are tried again
    pause: tuple[float, float] | None = None
    cancel: tuple[float, list[str]] | None = None  # when, and which servers
    paused: list[tuple[float, float]] = field(default_factory=list)  # surely paused: from the answer to one to the asking of the other
    cancelled: dict[str, tuple[float, float, str]] = field(default_factory=dict)  # run id -> asked at, answered at, what became of it


def draw(rng: random.Random, names: list[str], *, may_cancel: bool) -> Asked:
    """A third of the requests are plain ones."""
    asked = Asked()
    if rng.random() < 0.33:
        return asked
    if rng.random() < 0.5:
        pick = lambda *of: rng.choice(of)  # noqa: E731
        asked.waves = Waves(pick(None, None, 1, 2), pick(None, None, 1, 2, 3), pick(None, None, 0, 1))
    asked.rehearse = rng.random() < 0.15
    if rng.random() < 0.2:
        asked.pause = rng.uniform(0, 500), rng.choice((100.0, 700.0, 2000.0))
    if may_cancel and rng.random() < 0.35:
        asked.cancel = rng.choice((rng.uniform(0, 60), rng.uniform(60, 900))), sorted(rng.sample(names, rng.choice((1, 2, len(names)))))
    return asked


def draw_limits(rng: random.Random) -> Limits:
    return NO_LIMITS if rng.random() < 0.6 else Limits(rng.choice((0, 2, 3)), rng.choice((0, 1, 2)))


def begin(scope: Any, ids: list[str], image_id: str, asked: Asked) -> Any:
    if asked.retry:
        return begin_reinstall(scope, Reinstall(retry=asked.retry, password=PASSWORD), Response())
    return scope.desk.fleet.admit(
        credential=scope.credential,
        instance_ids=ids,
        image_id=image_id,
        password="" if asked.rehearse else PASSWORD,
        rehearse=asked.rehearse,
        waves=asked.waves,
    )


def cancel(scope: Any, batch_id: str, names: list[str]) -> dict[str, str]:
    """What became of each run."""
    try:
        return {item["run"]: item["result"] for item in cancel_batch(scope, batch_id, Chosen(servers=names))["items"]}
    except RequestError as refused:
        assert refused.slug == "past-the-line", refused
        names_of = {s.id: s.name for s in scope.store.servers.list_servers(scope.project_id)[0]}
        return {run.id: "past-the-line" for run in scope.store.runs.list_runs(batch_id=batch_id) if names_of[run.server_id] in names}


def pause(scope: Any, batch_id: str) -> None:
    pause_batch(scope, batch_id)


def resume(scope: Any, batch_id: str) -> None:
    resume_batch(scope, batch_id)
