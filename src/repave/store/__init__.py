"""All SQL, one part a noun. Methods are named for questions (`find_x` may return None, `get_x` raises, `list_x`) and facts (`record_x`).

Sync, one transaction a method, on SQLite or PostgreSQL. Facts that must not be overtaken are compare-and-set: they return False where
another fact came first. Every change writes its audit row in the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import sqlalchemy as sa

from repave.secrets import Sealer
from repave.store.access import Access
from repave.store.batches import Batches, Cancelled
from repave.store.consoles import Consoles
from repave.store.database import Database, Enqueue, Tell, new_id, open_engine
from repave.store.events import Events
from repave.store.figures import Figures
from repave.store.images import Images
from repave.store.marks import Marks
from repave.store.migrations import bring_up_to_date
from repave.store.people import People
from repave.store.runs import NewRun, Runs
from repave.store.servers import Servers
from repave.store.webhooks import Webhooks


class Store(Database):
    """Everything Repave knows."""

    def __init__(self, engine: sa.Engine, sealer: Sealer, now: Callable[[], datetime]) -> None:
        super().__init__(engine, sealer, now)
        self.access, self.servers, self.images = Access(self), Servers(self), Images(self)
        self.runs, self.batches, self.events = Runs(self), Batches(self), Events(self)
        self.marks, self.people, self.consoles = Marks(self), People(self), Consoles(self)
        self.figures, self.webhooks = Figures(self), Webhooks(self)

    @classmethod
    def open(cls, url: str, *, sealer: Sealer, now: Callable[[], datetime]) -> Store:
        """The store at a SQLAlchemy URL, its tables made or brought up to date. Raises RepaveError database-newer, or not-this-site (another key)."""
        engine = open_engine(url)
        try:
            bring_up_to_date(engine)
            store = cls(engine, sealer, now)
            sa.event.listen(engine, "handle_error", store.note_damage)
            store.marks.check_key()
        except BaseException:
            engine.dispose()
            raise
        return store

    def close(self) -> None:
        self.engine.dispose()


__all__ = ["Cancelled", "Enqueue", "NewRun", "Store", "Tell", "new_id"]
