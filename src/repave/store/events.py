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

    def list_events(self, project_id: str, *, after: int = 0, batch_id: str | None = None, limit: int = 1000, newest: bool = False) -> list[Event]:
        """Oldest first; at most `limit`, the first ones or the `newest`."""
        order = EVENTS.c.seq.desc() if newest else EVENTS.c.seq
        query = sa.select(EVENTS).where(EVENTS.c.project_id == project_id, EVENTS.c.seq > after).order_by(order).limit(limit)
        found = [rows.event(r) for r in self._db.rows(query.where(EVENTS.c.batch_id == batch_id) if batch_id else query)]
        return found[::-1] if newest else found
