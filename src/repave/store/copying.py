"""All that a database knows, in another one: from SQLite to PostgreSQL when a site grows, or back.

Only our tables: DBOS's own hold nothing but the workflows of runs, and no run is live while a database is copied. The leases of workers stay
behind too. The copy is one transaction, read back and compared before it is committed.
"""

from __future__ import annotations

import hashlib
import json

import sqlalchemy as sa

from repave.errors import RepaveError
from repave.store.alone import alone
from repave.store.database import open_engine
from repave.store.migrations import bring_up_to_date
from repave.store.tables import EVENTS, META, PROJECTS, RUNS, WORKERS

_ROWS = 1000


def copy_database(source_url: str, target_url: str) -> dict[str, int]:
    """The target holds every row of the source, compared. Returns rows by table. The source is only brought up to date.

    Raises RepaveError conflict (a service works on either, or the target is not empty), in-progress (a run has not ended), database-newer.
    """
    source, target = open_engine(source_url), open_engine(target_url)
    try:
        with alone(source), alone(target):
            bring_up_to_date(source)
            bring_up_to_date(target)
            with (
                source.connect() as read,
                target.connect().execution_options(repave_write=True) as write,
                write.begin(),
            ):
                if target.dialect.name == "postgresql":  # one transaction that waits for reads of the source: no sign of a stopped worker here
                    write.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                if live := read.execute(sa.select(sa.func.count()).select_from(RUNS).where(RUNS.c.ended_at.is_(None))).scalar_one():
                    raise RepaveError("in-progress", f"{live} runs have not ended: wait for them or cancel them, then stop the service and copy.")
                if write.execute(sa.select(PROJECTS.c.id).limit(1)).first():
                    raise RepaveError("conflict", "The target holds a site already.", field="to")
                return {table.name: _copy_table(read, write, table) for table in META.sorted_tables if table is not WORKERS}
    finally:
        source.dispose()
        target.dispose()


def _copy_table(read: sa.Connection, write: sa.Connection, table: sa.Table) -> int:
    count = 0
    for rows in read.execution_options(yield_per=_ROWS).execute(sa.select(table)).partitions():
        write.execute(sa.insert(table), [dict(r._mapping) for r in rows])
        count += len(rows)
    if table is EVENTS and write.dialect.name == "postgresql" and count:
        last = sa.select(sa.func.max(EVENTS.c.seq)).scalar_subquery()
        write.execute(sa.select(sa.func.setval(sa.func.pg_get_serial_sequence("events", "seq"), last)))
    if _digest(read, table) != _digest(write, table):
        raise RepaveError("internal", f"The copy of the table {table.name} is not like the original; nothing was kept.")
    return count


def _digest(conn: sa.Connection, table: sa.Table) -> str:
    """Of all rows in no order: databases sort texts differently."""
    lines = []
    for row in conn.execute(sa.select(table)):
        lines.append(hashlib.sha256(json.dumps(list(row), default=str, sort_keys=True).encode()).digest())
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()
