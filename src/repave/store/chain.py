"""The audit's chain: each event has a MAC over itself and the event before it, by the site's key.

Whoever can write in the database, but has not the key file, can not change, add or remove an event that has a MAC unseen. That the newest are
missing shows in the file `generation` (stand.py). Events written before revision 0005 have none, and none can follow one that has. Whoever takes
all of them away makes every event look that old: so it is told how many are, and a site begun since has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import sqlalchemy as sa

from repave.errors import RepaveError
from repave.secrets import Sealer
from repave.store.tables import EVENTS

LAST = sa.select(EVENTS.c.mac).order_by(EVENTS.c.seq.desc()).limit(1)
_SAID = ("project_id", "type", "batch_id", "run_id", "server_id", "actor", "data")


@dataclass(frozen=True)
class Checked:
    """`without_mac`: events from before the chain."""

    events: int
    without_mac: int


def link(sealer: Sealer, before: str, event: Mapping[str, Any]) -> str:
    """The MAC of this event behind the one whose MAC is `before` ("" for the first)."""
    at = event["at"].astimezone(UTC).isoformat(timespec="microseconds")
    return sealer.authenticate(json.dumps([before, at, *(event[name] for name in _SAID)], sort_keys=True), about="event")


def check_chain(conn: sa.Connection, sealer: Sealer) -> Checked:
    """Raises RepaveError audit-broken."""
    before, count, bare = "", 0, 0
    for row in conn.execution_options(yield_per=1000).execute(sa.select(EVENTS).order_by(EVENTS.c.seq)).mappings():
        count += 1
        if row["mac"] is None and not before:
            bare += 1
        elif row["mac"] != (before := link(sealer, before, {**row})):
            raise RepaveError("audit-broken", f"Event {row['seq']} ({row['type']}, {row['at']:%Y-%m-%d %H:%M:%S}) is the first that is not.")
    return Checked(count, bare)
