"""The database: one SQLAlchemy engine on SQLite (WAL, synchronous=FULL) or PostgreSQL, transactions, and what every change needs."""

from __future__ import annotations

import errno
import secrets
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from repave.domain.waves import Limits
from repave.secrets import Sealer
from repave.store.chain import LAST, link
from repave.store.tables import EVENTS

Tell = Callable[[sa.Connection, str, str, dict[str, Any]], None]  # (connection, run id, event, message): wakes the run's workflow
Enqueue = Callable[[sa.Connection, Sequence[Any]], None]  # (connection, runs or rows of them): queues their workflows with the transaction


_BUSY_MS = 15_000  # SQLite: how long a writer waits for its lock
_SWITCH_S = 5  # as sqlite3 itself waits where SQLite does
_CACHE_KIB = 512  # of pages, for each of some twenty connections; the kernel has the file's pages anyway (SQLite's own: 2 MB)
_IDLE_MS = 5_000  # ours last milliseconds; a worker that is stopped inside one holds up all others for so long
# What runs often is made once: making a statement and finding it in SQLAlchemy's cache takes longer than SQLite takes to run it.
_NEW_EVENT = sa.insert(EVENTS)
_WRITERS_LOCK = 0x7265706176650002  # beside the one of migrations/


def new_id() -> str:
    """A UUID of version 7: sorts by the time it was made (RFC 9562)."""
    raw = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return str(uuid.UUID(int=raw & ~(0xF << 76) & ~(0x3 << 62) | 7 << 76 | 2 << 62))


class Database:
    """Transactions and rows. `now` is the clock of every fact; `tell` wakes a run's workflow in the transaction of the fact."""

    def __init__(self, engine: sa.Engine, sealer: Sealer, now: Callable[[], datetime]) -> None:
        self.engine, self.sealer, self.now = engine, sealer, now
        self.damaged = False  # a damaged page was met: nothing more is written, until a start has checked the file
        # SQLite lets writers poll for its lock, up to 0.1 s each: they wait here instead, and are woken at once.
        self._turn: AbstractContextManager[object] = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()
        self.tell: Tell = lambda conn, run_id, event, message: None  # the engine's; set by app.py
        self.enqueue: Enqueue = lambda conn, runs: None  # the engine's; set by workflow.fleet
        self.limits = Limits()  # the site's; set by workflow.fleet

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that changes something: one at a time, on both databases and over all workers.

        So limits are counted right, whoever follows the events misses none (`seq` is given before the commit), and no two wait for each other.
        """
        self._refuse_damaged()
        with self._turn, self.engine.connect().execution_options(repave_write=True) as conn, conn.begin():
            if self.engine.dialect.name == "postgresql":
                conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
            yield conn

    @contextmanager
    def write_within(self, seconds: float) -> Iterator[sa.Connection]:
        """As `write`, but out of turn: a look at how the database is must not queue behind those who wait for it. Raises OperationalError when it is late."""
        self._refuse_damaged()
        with self.engine.connect().execution_options(repave_write=True) as conn:
            if self.engine.dialect.name == "postgresql":
                with conn.begin():
                    conn.exec_driver_sql(f"SET LOCAL lock_timeout = {round(seconds * 1000)}")
                    conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
                    yield conn
                return
            driver = conn.connection.driver_connection
            assert driver is not None
            driver.execute(f"PRAGMA busy_timeout={round(seconds * 1000)}")
            try:
                with conn.begin():
                    yield conn
            finally:
                driver.execute(f"PRAGMA busy_timeout={_BUSY_MS}")

    def note_damage(self, context: sa.engine.ExceptionContext) -> None:
        self.damaged = self.damaged or is_damage(context.sqlalchemy_exception)

    def _refuse_damaged(self) -> None:
        """In the words of SQLite: whoever bears a database that can not be written bears this."""
        if self.damaged:
            cause = sqlite3.DatabaseError("database disk image is malformed")
            cause.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise sa.exc.DatabaseError("", None, cause, hide_parameters=True)

    def rows(self, statement: sa.Select[Any], **values: Any) -> list[sa.RowMapping]:
        with self._look() as conn:
            return [r._mapping for r in conn.execute(statement, values)]

    def row(self, statement: sa.Select[Any], **values: Any) -> sa.RowMapping | None:
        """The first one."""
        with self._look() as conn:
            found = conn.execute(statement, values).first()
            return None if found is None else found._mapping

    def _look(self) -> sa.Connection:
        """For one statement, which sees one state of the database by itself: on SQLite without BEGIN and ROLLBACK around it."""
        return self.engine.connect().execution_options(repave_look=True)

    def event(self, conn: sa.Connection, type_: str, project_id: str, **about: Any) -> None:
        self.write_events(conn, type_, project_id, [about])

    def write_events(self, conn: sa.Connection, type_: str, project_id: str, each: Sequence[dict[str, Any]]) -> None:
        """One audit row for each of `each`: actor and the ids it is about have columns of their own, the rest is its data."""
        names = ("batch_id", "run_id", "server_id")
        fixed = {"at": self.now(), "project_id": project_id, "type": type_}
        mac, events = conn.execute(LAST).scalar() or "", []
        for about in each:
            data = {k: v for k, v in about.items() if k not in (*names, "actor")}
            event = fixed | {"actor": about.get("actor", "repave"), "data": data} | {name: about.get(name) for name in names}
            mac = link(self.sealer, mac, event)
            events.append(event | {"mac": mac})
        if events:
            conn.execute(_NEW_EVENT, events)

    def page(self, table: sa.Table, where: list[sa.ColumnElement[bool]], after: str | None, limit: int) -> tuple[list[sa.RowMapping], int]:
        counted = self.row(sa.select(sa.func.count().label("n")).select_from(table).where(*where))
        assert counted is not None
        page = sa.select(table).where(*where).order_by(table.c.id).limit(limit)
        return self.rows(page.where(table.c.id > after) if after else page), counted["n"]


def page_of(query: sa.Select[Any], key: sa.Column[str], after: str | None, limit: int | None, *, newest_first: bool = False) -> sa.Select[Any]:
    """The rows behind `after` in the order of a key that no two have: what is added or removed meanwhile shifts no page."""
    ordered = query.order_by(key.desc() if newest_first else key).limit(limit)
    return ordered if after is None else ordered.where(key < after if newest_first else key > after)


OF_THE_STORE = (sa.exc.DBAPIError, sa.exc.TimeoutError, OSError)  # what `is_unavailable` is asked about


def is_unavailable(error: BaseException) -> bool:
    """The database or the disk under it takes nothing now: full, read-only, locked, away, damaged. Not: a statement that is wrong."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    kinds = (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
    return isinstance(error, kinds) or type(error) is sa.exc.DatabaseError


def is_damage(error: BaseException | None) -> bool:
    """The database itself says that its pages make no sense. It is no passing trouble."""
    cause = getattr(error, "orig", None)
    found = getattr(cause, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return found or getattr(cause, "sqlstate", "") in ("XX001", "XX002")  # PostgreSQL: data_corrupted, index_corrupted


def open_engine(url: str) -> sa.Engine:
    """The SQLAlchemy engine; a statement's values never appear in an error.

    The connection used last is used next: each of SQLite's has a page cache of its own, and taking turns would fill them all.
    """
    if sa.make_url(url).get_backend_name() == "sqlite":
        engine = sa.create_engine(url, pool_size=8, max_overflow=56, pool_use_lifo=True, hide_parameters=True)
        _prepare_sqlite(engine)
        return engine
    # A worker that is stopped inside a transaction must not keep its locks: the server ends it, and the worker's lease has run out by then.
    options = {"options": f"-c idle_in_transaction_session_timeout={_IDLE_MS}", "connect_timeout": 10}
    return sa.create_engine(url, pool_size=32, max_overflow=32, pool_use_lifo=True, hide_parameters=True, pool_pre_ping=True, connect_args=options)


@sa.event.listens_for(sa.Engine, "connect")
def _cache_little(connection: Any, _: Any) -> None:
    """Of every engine, DBOS's too: caches that fill for hours look like a leak."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")


@sa.event.listens_for(sa.Engine, "handle_error")
def _drop_read_only(context: sa.engine.ExceptionContext) -> None:
    """Of every engine, DBOS's too: SQLite opens a file that can not be written for reading, and such a connection would stay so when the file can be."""
    if getattr(context.original_exception, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
        context.is_disconnect = True


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """A file stays so. As long as it is not, SQLite refuses this at once while another has the writer's lock, whatever its timeout: it is asked again.

    Raises sqlite3.OperationalError where the lock is not free after `_SWITCH_S`.
    """
    until = time.monotonic() + _SWITCH_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _prepare_sqlite(engine: sa.Engine) -> None:
    """WAL and synchronous=FULL, foreign keys, BEGIN IMMEDIATE for writers (a read that turns into a write can not wait for its lock)."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        _switch_to_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_MS}"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(conn: sa.Connection) -> None:
        options = conn.get_execution_options()
        if "repave_look" not in options:
            conn.exec_driver_sql("BEGIN IMMEDIATE" if "repave_write" in options else "BEGIN")
