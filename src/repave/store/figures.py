"""What is counted over all projects: for metrics. Whatever happened is counted from the audit, so it is the same on every worker and after a restart."""

from __future__ import annotations

import sqlalchemy as sa

from repave.store import rows
from repave.store.database import Database
from repave.store.tables import EVENTS, INSTANCES, RUNS, SERVERS, WORKERS

_COUNTED = (
    sa.select(EVENTS.c.seq, EVENTS.c.type, EVENTS.c.data, RUNS.c.durations_s, SERVERS.c.model)
    .select_from(EVENTS.outerjoin(RUNS, RUNS.c.id == EVENTS.c.run_id).outerjoin(SERVERS, SERVERS.c.id == EVENTS.c.server_id))
    .where(EVENTS.c.type.in_(("run.ended", "run.late", "image.added")), EVENTS.c.seq > sa.bindparam("after"))
    .order_by(EVENTS.c.seq)
    .limit(5000)
)
_LIVE = (
    sa.select(RUNS.c.step, RUNS.c.started_at.is_not(None).label("begun"), (RUNS.c.late_step == RUNS.c.step).label("late"), sa.func.count().label("n"))
    .where(RUNS.c.ended_at.is_(None))
    .group_by("step", "begun", "late")
)
_STATES = sa.select(INSTANCES.c.state, sa.func.count().label("n")).group_by(INSTANCES.c.state)
_WORKERS = sa.select(WORKERS.c.host, WORKERS.c.slot, WORKERS.c.beat_at_ms).where(~WORKERS.c.reaped).order_by(WORKERS.c.beat_at_ms)


class Figures:
    """How many."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def list_counted(self, after: int) -> list[rows.Row]:
        """The next events that are counted, each with its run's seconds by step and its server's model, where those are still there."""
        return list(self._db.rows(_COUNTED, after=after))

    def count_live(self) -> list[rows.Row]:
        """Live runs: `n` by step, by whether they have begun, and whether they are late in that step."""
        return list(self._db.rows(_LIVE))

    def count_states(self) -> dict[str, int]:
        return {r["state"]: r["n"] for r in self._db.rows(_STATES)}

    def list_beats(self) -> list[tuple[str, str, int]]:
        """Host, slot and last beat (ms since 1970, by the database's clock) of each worker that is not known to be dead."""
        return [(r["host"], r["slot"], r["beat_at_ms"]) for r in self._db.rows(_WORKERS)]
