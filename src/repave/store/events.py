"""The audit: what happened, in order. Other parts write it in the transaction of the change itself."""

from __future__ import annotations

import sqlalchemy as sa

from repave.domain.model import Event
from repave.store import rows
from repave.store.database import Database
from repave.store.tables import EVENTS


class Events:
    """What happened."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def list_events(self, project_id: str, *, after: int = 0, batch_id: str | None = None, limit: int = 1000) -> list[Event]:
        query = sa.select(EVENTS).where(EVENTS.c.project_id == project_id, EVENTS.c.seq > after).order_by(EVENTS.c.seq).limit(limit)
        return [rows.event(r) for r in self._db.rows(query.where(EVENTS.c.batch_id == batch_id) if batch_id else query)]

    def list_newest(
        self, project_id: str, *, before: int | None = None, batch_id: str | None = None, server_id: str | None = None, limit: int = 50
    ) -> list[Event]:
        """Newest first."""
        query = sa.select(EVENTS).where(EVENTS.c.project_id == project_id).order_by(EVENTS.c.seq.desc()).limit(limit)
        for column, value in ((EVENTS.c.batch_id, batch_id), (EVENTS.c.server_id, server_id)):
            query = query.where(column == value) if value is not None else query
        return [rows.event(r) for r in self._db.rows(query.where(EVENTS.c.seq < before) if before is not None else query)]

    def last_seq(self, project_id: str) -> int:
        """0 where nothing has happened."""
        row = self._db.row(sa.select(sa.func.max(EVENTS.c.seq).label("seq")).where(EVENTS.c.project_id == project_id))
        return row["seq"] or 0 if row else 0
