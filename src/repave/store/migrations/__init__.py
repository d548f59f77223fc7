"""The tables' history, by Alembic: `Store.open` brings a database to the newest revision, in one transaction, on SQLite and PostgreSQL.

A new column or table is two edits in one commit: `tables.py`, and a new file `versions/rNNNN_what.py` whose `down_revision` is the newest
revision so far (one line of history: a test refuses two heads). Write its `upgrade()` with `op.add_column`, `op.create_table`,
`op.create_index`; a column that may not be null needs a `server_default` for the rows that are there. SQLite changes no column in place:
`with op.batch_alter_table(...)` makes the table anew. A revision that others may have run is never edited. There is no downgrade: an older
version refuses a newer database and says so; the way back is a backup. tests/flow/test_store_databases.py compares tables.py with the
revisions on both databases and prints what is missing.

DBOS has tables of its own in the same database and migrates them itself; nothing here touches them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory

from repave.errors import RepaveError

_FIRST = "0001"
_LOCK = 0x7265706176650001  # "repave" and a number: no other program on this PostgreSQL database takes this advisory lock


def bring_up_to_date(engine: sa.Engine) -> None:
    """The tables are those of tables.py. Raises RepaveError database-newer, with nothing changed, where a newer version made them. Repeatable."""
    scripts = open_scripts()
    with engine.connect().execution_options(repave_write=True) as conn:
        sqlite = engine.dialect.name == "sqlite"
        if sqlite:  # a table that is made anew is dropped first; the pragma has no effect inside a transaction
            _raw(conn).execute("PRAGMA foreign_keys=OFF")
        try:
            with conn.begin():
                if not sqlite:
                    conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                _upgrade(conn, scripts)
                if sqlite and (broken := conn.exec_driver_sql("PRAGMA foreign_key_check").first()):
                    raise RepaveError("internal", f"A row of {broken[0]} refers to nothing after the migration; nothing was changed.")
        finally:
            if sqlite:
                _raw(conn).execute("PRAGMA foreign_keys=ON")


def _upgrade(conn: sa.Connection, scripts: ScriptDirectory) -> None:
    context = MigrationContext.configure(conn, opts={"transactional_ddl": True})
    at = context.get_current_revision()
    newest = scripts.get_current_head()
    if at == newest:
        return
    known = {script.revision for script in scripts.walk_revisions()}
    if at is not None and at not in known:
        raise RepaveError("database-newer", f"The database has revision {at}; this version of Repave knows those up to {newest}.")
    if at is None and sa.inspect(conn).has_table("projects"):  # made before there were revisions
        context.stamp(scripts, _FIRST)
        at = _FIRST
    with Operations.context(context):
        for script in reversed(list(scripts.iterate_revisions(newest, at or "base"))):
            script.module.upgrade()
    context.stamp(scripts, str(newest))


def is_newest(conn: sa.Connection) -> bool:
    """Whether the tables are those of tables.py."""
    return MigrationContext.configure(conn).get_current_revision() == open_scripts().get_current_head()


def open_scripts() -> ScriptDirectory:
    """The revisions beside this file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return ScriptDirectory.from_config(config)


def _raw(conn: sa.Connection) -> Any:
    return conn.connection.driver_connection
