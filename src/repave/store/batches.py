"""Batches after they were accepted: pause, resume, cancel, and why a run still waits."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import sqlalchemy as sa

from repave.domain.model import Batch, RunRow
from repave.domain.states import Ending
from repave.errors import RequestError
from repave.store import rows
from repave.store.database import Database
from repave.store.endings import close_for, end_run, go_on, why_waiting
from repave.store.tables import BATCHES, RUNS


class Cancelled(enum.StrEnum):
    """What a cancel did to one run."""

    NOT_STARTED = "not-started"  # it has ended, its server was not touched
    RETURNING = "returning"  # before the line: nobody crosses any more, what was found comes back
    PAST_THE_LINE = "past-the-line"  # refused: it finishes
    ENDED = "ended"  # it had ended already


class Batches:
    """What an operator may still do to what was accepted."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def pause(self, batch_id: str, *, actor: str) -> None:
        """No waiting run of this batch begins; those under way go on. Repeatable."""
        with self._db.write() as conn:
            where = sa.and_(BATCHES.c.id == batch_id, BATCHES.c.paused_at.is_(None), BATCHES.c.ended_at.is_(None))
            found = conn.execute(sa.update(BATCHES).where(where).values(paused_at=self._db.now()).returning(BATCHES.c.project_id)).first()
            if found:
                self._db.event(conn, "batch.paused", found.project_id, batch_id=batch_id, actor=actor)

    def resume(self, batch_id: str, *, actor: str) -> None:
        """What waits begins as its rules allow. Repeatable."""
        with self._db.write() as conn:
            where = sa.and_(BATCHES.c.id == batch_id, BATCHES.c.paused_at.is_not(None))
            found = conn.execute(sa.update(BATCHES).where(where).values(paused_at=None).returning(BATCHES.c.project_id)).first()
            if found:
                self._db.event(conn, "batch.resumed", found.project_id, batch_id=batch_id, actor=actor)
            ended = go_on(self._db, conn)
        self._destroy(ended)

    def cancel(self, batch_id: str, run_ids: Sequence[str], *, actor: str) -> dict[str, Cancelled]:
        """What became of each run, by its id. Committed before it is answered: a run that is `returning` can not cross any more. Repeatable."""
        done: dict[str, Cancelled] = {}
        with self._db.write() as conn:
            where = sa.and_(RUNS.c.batch_id == batch_id, RUNS.c.id.in_(run_ids))
            for row in conn.execute(sa.select(RUNS).where(where).order_by(RUNS.c.number)).all():
                done[row.id] = self._cancel(conn, row.id, waits=row.released_at is None, actor=actor)
                if done[row.id] in (Cancelled.NOT_STARTED, Cancelled.RETURNING):
                    about = {"batch_id": batch_id, "run_id": row.id, "server_id": row.server_id}
                    self._db.event(conn, "run.cancelled", row.project_id, actor=actor, **about, what=done[row.id].value)
            ended = go_on(self._db, conn)
        self._destroy([*ended, *(run_id for run_id, what in done.items() if what is Cancelled.NOT_STARTED)])
        return done

    def _cancel(self, conn: sa.Connection, run_id: str, *, waits: bool, actor: str) -> Cancelled:
        if waits:
            error = RequestError("cancelled", f"cancelled, not started (by {actor}).").as_json()
            return Cancelled.NOT_STARTED if end_run(self._db, conn, run_id, Ending.RETURNED, error) else Cancelled.ENDED
        if close_for(self._db, conn, run_id, RequestError("cancelled", f"cancelled before the line (by {actor}).").as_json()):
            return Cancelled.RETURNING
        now = conn.execute(sa.select(RUNS.c.ended_at, RUNS.c.crossed_at).where(RUNS.c.id == run_id)).one()
        if now.ended_at is not None:
            return Cancelled.ENDED
        return Cancelled.PAST_THE_LINE if now.crossed_at is not None else Cancelled.RETURNING  # it was on its way back already

    def why_waiting(self, batch: Batch) -> dict[str, str]:
        """Why each waiting run of this batch has not begun, by its id; "" = it begins at once."""
        with self._db.engine.connect() as conn:
            return why_waiting(conn, [batch.id], self._db.limits)

    def list_retryable(self, batch: Batch) -> list[RunRow]:
        """Its ended runs that did not reach what was asked of them (a proved new OS, or a rehearsal), on servers that nobody reinstalled since."""
        latest = sa.select(sa.func.max(RUNS.c.epoch)).where(RUNS.c.server_id == sa.bindparam("server_id")).scalar_subquery()
        good = (Ending.PROVED.value, Ending.LATE_PROOF.value, Ending.REHEARSED.value)
        found = []
        with self._db.engine.connect() as conn:
            query = sa.select(RUNS).where(RUNS.c.batch_id == batch.id, RUNS.c.ended_at.is_not(None), RUNS.c.outcome.not_in(good)).order_by(RUNS.c.number)
            for row in conn.execute(query).all():
                if conn.execute(sa.select(latest), {"server_id": row.server_id}).scalar_one() == row.epoch:
                    found.append(rows.run(row._mapping))
        return found

    def _destroy(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            self._db.sealer.destroy_run(run_id)
