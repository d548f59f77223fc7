"""The database's side of the site's stand (domain/generation.py), and what is done to a state that was put back.

Works on connections of a `Database`, before anything else runs on it.
"""

from __future__ import annotations

import sqlite3

import sqlalchemy as sa

from repave.domain.generation import Stand
from repave.domain.states import Ending
from repave.errors import RepaveError
from repave.store.database import Database
from repave.store.endings import end_run
from repave.store.tables import EVENTS, MARKS, RUNS, SERVERS

_MARK = "generation"
_OVER = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")


def read_stand(db: Database) -> Stand | None:
    """None where the database has never been served."""
    with db.engine.connect() as conn:
        return _read_stand(conn)


def raise_generation(db: Database, *, above: int) -> Stand:
    """The generation is above `above` and above its own, durable on return."""
    with db.write() as conn:
        return _raise(conn, above)


def probe_write(db: Database) -> None:
    """The database can be written now, durably. Raises SQLAlchemyError: full, read-only, or locked for five seconds."""
    with db.write_within(5) as conn:
        _hold(conn, "written", db.now().isoformat())


def end_restored_runs(db: Database, *, above: int, why: str) -> tuple[Stand, list[str]]:
    """Every live run is at its end, `error`, and no workflow of the state is left to run; the generation is raised: all or nothing.

    Returns the new stand and the names of the runs' servers. Touches no BMC.
    """
    with db.write() as conn:
        live = list(conn.execute(sa.select(RUNS.c.id).where(RUNS.c.ended_at.is_(None)).order_by(RUNS.c.id)).scalars())
        for run_id in live:
            end_run(db, conn, run_id, Ending.RESTORED, RepaveError("restored", why).as_json())
        conn.execute(sa.update(SERVERS).values(media_run_id=None))  # no BMC is asked because of an old state (ADR 2)
        _cancel_workflows(db, conn)
        stand = _raise(conn, above)
        db.event(conn, "site.restored", "", runs=len(live), generation=stand.generation)
        found = _read_stand(conn)
    for run_id in live:
        db.sealer.destroy_run(run_id)
    assert found is not None
    return found, live


def check_file(url: str | sa.URL) -> None:
    """Raises RepaveError database-corrupt where SQLite's own check finds damage. A file that is not there yet is fine.

    Blocks: about a second for 100 MB.
    """
    path = sa.make_url(url).database
    if sa.make_url(url).get_backend_name() != "sqlite" or not path:
        return
    try:
        conn = sqlite3.connect(path, timeout=30)
        try:
            found = conn.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            conn.close()
    except sqlite3.OperationalError:  # full, locked, read-only: no damage; whoever opens it next says so
        return
    except sqlite3.DatabaseError as error:
        raise RepaveError("database-corrupt", f"SQLite: {error}.") from None
    if found != ("ok",):
        raise RepaveError("database-corrupt", "SQLite's own check found damage.")


def _read_stand(conn: sa.Connection) -> Stand | None:
    value = conn.execute(sa.select(MARKS.c.value).where(MARKS.c.name == _MARK)).scalar()
    events = conn.execute(sa.select(sa.func.max(EVENTS.c.seq))).scalar()
    return None if value is None else Stand(int(value), events or 0)


def _raise(conn: sa.Connection, above: int) -> Stand:
    now = _read_stand(conn)
    stand = Stand(max(above, now.generation if now else 0) + 1, now.events if now else 0)
    _hold(conn, _MARK, str(stand.generation))
    return stand


def _hold(conn: sa.Connection, name: str, value: str) -> None:
    if conn.execute(sa.update(MARKS).where(MARKS.c.name == name).values(value=value)).rowcount == 0:
        conn.execute(sa.insert(MARKS).values(name=name, value=value))


def _cancel_workflows(db: Database, conn: sa.Connection) -> None:
    """DBOS's queue and its workflows under way; its tables are not there where the state was never served."""
    schema = "dbos" if db.engine.dialect.name == "postgresql" else None
    if not sa.inspect(conn).has_table("workflow_status", schema=schema):
        return
    table = sa.table("workflow_status", sa.column("status"), schema=schema)
    conn.execute(sa.update(table).where(table.c.status.not_in(_OVER)).values(status="CANCELLED"))
