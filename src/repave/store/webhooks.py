"""Webhooks: where each sends, and how far in the events it is. There is no queue: what is still to be sent is what the audit has behind `after_seq`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from repave.domain.model import Event, Webhook
from repave.errors import RequestError
from repave.store import rows
from repave.store.database import Database, new_id, page_of
from repave.store.tables import EVENTS, WEBHOOKS

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5, 3600

# Made once: see database.py.
_DUE = sa.select(WEBHOOKS).where(WEBHOOKS.c.next_at <= sa.bindparam("now", type_=WEBHOOKS.c.next_at.type)).order_by(WEBHOOKS.c.next_at, WEBHOOKS.c.id)
_NEXT = (
    sa.select(EVENTS)
    .where(EVENTS.c.project_id == sa.bindparam("project"), EVENTS.c.seq > sa.bindparam("after"), EVENTS.c.type.in_(sa.bindparam("types", expanding=True)))
    .order_by(EVENTS.c.seq)
    .limit(1)
)
_LAST_SEQ = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.seq), 0).label("seq"))
_TROUBLED = sa.select(sa.func.count().label("n")).where(WEBHOOKS.c.tries > 0)


class Webhooks:
    """Who is told."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add_webhook(self, project_id: str, *, name: str, url: str, host: str, secret: str, shape: str, events: Sequence[str], actor: str) -> Webhook:
        """It is told of what happens from now on. URL and secret are sealed. Raises RequestError conflict where the name is taken."""
        now, hook_id = self._db.now(), new_id()
        sealed = {f"{what}_sealed": self._db.sealer.seal(value, about=f"webhook-{what}:{hook_id}") for what, value in (("url", url), ("secret", secret))}
        with self._db.write() as conn:
            taken = sa.select(WEBHOOKS.c.id).where(WEBHOOKS.c.project_id == project_id, WEBHOOKS.c.name == name)
            if conn.execute(taken).first():
                raise RequestError("conflict", f"A webhook {name!r} exists already.", field="name")
            values = {
                "id": hook_id, "project_id": project_id, "name": name, "host": host, "shape": shape, "events": list(events), "created_by": actor,
                "created_at": now, "after_seq": conn.execute(_LAST_SEQ).scalar_one(), "tries": 0, "next_at": now,
            }  # fmt: skip
            conn.execute(sa.insert(WEBHOOKS).values(**values, **sealed))
            self._db.event(conn, "webhook.added", project_id, actor=actor, name=name, host=host, events=list(events))
        found = self.find_webhook(project_id, hook_id)
        assert found is not None
        return found

    def list_webhooks(self, project_id: str, *, after: str | None = None, limit: int | None = None) -> list[Webhook]:
        """In the order of their names; `after` is one."""
        query = sa.select(WEBHOOKS).where(WEBHOOKS.c.project_id == project_id)
        return [rows.webhook(r) for r in self._db.rows(page_of(query, WEBHOOKS.c.name, after, limit))]

    def find_webhook(self, project_id: str, reference: str) -> Webhook | None:
        named = sa.or_(WEBHOOKS.c.id == reference, WEBHOOKS.c.name == reference)
        row = self._db.row(sa.select(WEBHOOKS).where(WEBHOOKS.c.project_id == project_id, named))
        return rows.webhook(row) if row else None

    def get_target(self, hook: Webhook) -> tuple[str, str]:
        """URL and secret."""
        row = self._db.row(sa.select(WEBHOOKS.c.url_sealed, WEBHOOKS.c.secret_sealed).where(WEBHOOKS.c.id == hook.id))
        if row is None:
            raise RequestError("not-found", "The webhook was removed.", kind="webhook")
        url, secret = (self._db.sealer.unseal(row[f"{what}_sealed"], about=f"webhook-{what}:{hook.id}") for what in ("url", "secret"))
        return url, secret

    def remove_webhook(self, hook: Webhook, *, actor: str) -> None:
        with self._db.write() as conn:
            if conn.execute(sa.delete(WEBHOOKS).where(WEBHOOKS.c.id == hook.id)).rowcount:
                self._db.event(conn, "webhook.removed", hook.project_id, actor=actor, name=hook.name)

    # ---- delivery ----

    def list_due(self) -> list[Webhook]:
        """Those that may be asked now, whether there is something to tell or not."""
        return [rows.webhook(r) for r in self._db.rows(_DUE, now=self._db.now())]

    def find_next_event(self, hook: Webhook, after: int) -> Event | None:
        row = self._db.row(_NEXT, project=hook.project_id, after=max(after, hook.after_seq), types=list(hook.events))
        return rows.event(row) if row else None

    def read_last_seq(self) -> int:
        row = self._db.row(_LAST_SEQ)
        return int(row["seq"]) if row else 0

    def claim(self, hook: Webhook, *, seconds: float) -> bool:
        """This worker alone delivers to it, until it has said how that went or so long. False where another was first, or has delivered meanwhile."""
        return self._change(hook, next_at=self._db.now() + timedelta(seconds=seconds))

    def record_delivered(self, hook: Webhook, seq: int) -> None:
        """All up to here is told; the next may follow at once."""
        now = self._db.now()
        self._change(hook, same_time=False, after_seq=seq, tries=0, next_at=now, trouble=None, delivered_at=now)

    def record_trouble(self, hook: Webhook, why: str) -> None:
        """The same event is sent again, later each time."""
        pause_s = min(FIRST_PAUSE_S * 2 ** min(hook.tries, 20), LONGEST_PAUSE_S)
        self._change(hook, same_time=False, tries=hook.tries + 1, next_at=self._db.now() + timedelta(seconds=pause_s), trouble=why)

    def count_troubled(self) -> int:
        row = self._db.row(_TROUBLED)
        return int(row["n"]) if row else 0

    def _change(self, hook: Webhook, *, same_time: bool = True, **values: int | str | datetime | None) -> bool:
        """By compare-and-set: nobody has gone further with it since it was read."""
        same = [WEBHOOKS.c.id == hook.id, WEBHOOKS.c.after_seq == hook.after_seq] + ([WEBHOOKS.c.next_at == hook.next_at] if same_time else [])
        with self._db.write() as conn:
            return conn.execute(sa.update(WEBHOOKS).where(*same).values(**values)).rowcount == 1
