"""No service works on a database: asked before its state is copied away or replaced."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from repave.errors import RepaveError
from repave.store.tables import WORKERS

GONE_MS = 60_000  # a worker that has not beaten so long is dead; above every lease that makes sense


@contextlib.contextmanager
def alone(engine: sa.Engine) -> Iterator[None]:
    """Raises RepaveError conflict where a service works on it. On SQLite none can begin meanwhile either: we hold its lock."""
    if engine.dialect.name != "sqlite":
        refuse_workers(engine)
        yield
        return
    with locked(Path(f"{engine.url.database}.worker")):
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A worker's lock file is ours. Raises RepaveError conflict."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _served() from None
        yield


def refuse_workers(engine: sa.Engine) -> None:
    """PostgreSQL. Raises RepaveError conflict where a worker has beaten of late, by the database's clock."""
    if not sa.inspect(engine).has_table("workers"):
        return
    now_ms = sa.literal_column("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)", sa.BigInteger)
    with engine.connect() as conn:
        if conn.execute(sa.select(WORKERS.c.executor_id).where(~WORKERS.c.reaped, WORKERS.c.beat_at_ms > now_ms - GONE_MS)).first():
            raise _served()


def _served() -> RepaveError:
    return RepaveError("conflict", "A repave serve works on this site: stop it first, and every other worker.", field="site")
