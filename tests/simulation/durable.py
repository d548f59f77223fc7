"""What outlives the service's process: the database (SQLite in memory, the real schema), the engine's own tables beside it, the run keys.

One connection for all; transactions never overlap, because a task yields only before it begins one. `at_commit` is asked before and after
each commit, and may end the process there: what was not committed is then gone, with the workflows queued and the messages sent in it.
"""

from __future__ import annotations

import functools
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlite_direct import DirectEngine

from repave import secrets as repave_secrets
from repave.errors import RunFailed
from repave.secrets import Sealer
from repave.store import Store
from repave.store.tables import META

START = datetime(2026, 11, 24, tzinfo=UTC)


class KeptKeys(Sealer):
    """The product's sealer with its folder in memory; times are virtual."""

    def __init__(self, key: bytes, now: Callable[[], float]) -> None:
        self._key, self._now = key, now
        self.salts: dict[str, tuple[float, bytes]] = {}
        self.kept: dict[tuple[str, str], bytes] = {}

    def make_run_keys(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            self.salts.setdefault(run_id, (self._now(), os.urandom(32)))

    def seal_for_run(self, run_id: str, value: str) -> str:
        self.make_run_keys([run_id])
        return repave_secrets._seal(self._run_key(run_id), value, f"run:{run_id}")

    def keep_for_run(self, run_id: str, name: str, data: bytes) -> None:
        nonce = os.urandom(12)
        self.kept[run_id, name] = nonce + AESGCM(self._run_key(run_id)).encrypt(nonce, data, name.encode())

    def read_for_run(self, run_id: str, name: str) -> bytes:
        key, raw = self._run_key(run_id), self.kept.get((run_id, name))
        if raw is None:
            raise RunFailed("password-gone")
        return AESGCM(key).decrypt(raw[:12], raw[12:], name.encode())

    def list_keyed_runs(self, *, before: float = float("inf")) -> set[str]:
        return {run_id for run_id, (made_at, _) in self.salts.items() if made_at < before}

    def destroy_run(self, run_id: str) -> None:
        self.salts.pop(run_id, None)
        for key in [k for k in self.kept if k[0] == run_id]:
            del self.kept[key]

    def _run_key(self, run_id: str) -> bytes:
        made = self.salts.get(run_id)
        if made is None:
            raise RunFailed("password-gone")
        return repave_secrets.hmac.new(self._key, made[1] + run_id.encode(), repave_secrets.hashlib.sha256).digest()


class Disk:
    """The service's disk: database, keys, and what the engine keeps. `clock` gives seconds since the world began."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.engine = _engine()
        self._raw = self.engine.raw
        self._raw.create_function("virtual_now_ms", 0, lambda: int(clock() * 1000))
        self.sealer = KeptKeys(b"k" * 32, lambda: (START + timedelta(seconds=clock())).timestamp())
        self.before_begin: Callable[[], None] = lambda: None
        self.at_commit: Callable[[str], None] = lambda edge: None
        self.queued: dict[str, str] = {}  # run id -> the workflow's status, in the order of admission
        self.owners: dict[str, str] = {}  # run id -> the executor that its workflow was given to
        self.journals: dict[str, list[tuple[str, str]]] = {}
        self.inbox: dict[tuple[str, str], dict[str, Any] | None] = {}
        self.told: Callable[[], None] = lambda: None
        self._open: list[Callable[[], None]] = []  # what the open transaction does to the engine's tables
        self.engine.before_begin, self.engine.around = self._begin, self._around
        self.commits = 0

    def now(self) -> datetime:
        return START + timedelta(seconds=self.clock())

    def open_store(self) -> Store:
        store = Store(self.engine, self.sealer, self.now)  # type: ignore[arg-type]
        store.tell = self.tell
        store._turn = nullcontext()  # a lock of threads would stand for ever where a task is overtaken; SQLite's one writer at a time stays true
        return store

    def enqueue(self, conn: Any, runs: Any) -> None:
        self._open.extend(lambda run=run: self.queued.setdefault(run.id, "ENQUEUED") for run in runs)

    def tell(self, conn: Any, run_id: str, event: str, message: dict[str, Any]) -> None:
        self._open.append(lambda: self._deliver(run_id, event, message))

    def _deliver(self, run_id: str, event: str, message: dict[str, Any]) -> None:
        self.inbox.setdefault((run_id, event), message)  # the engine's idempotency key is run:event

    def roll_back(self) -> None:
        """The process died: nothing of its open transaction is there."""
        self._open.clear()
        self._raw.rollback()

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """For observers: past the product's own code."""
        return self._raw.execute(sql, values).fetchall()

    def dump(self) -> bytes:
        return self._raw.serialize()

    def close(self) -> None:
        self.engine.before_begin, self.engine.around = (lambda: None), (lambda edge: None)
        self._raw.rollback()

    def _begin(self) -> None:
        self.before_begin()
        self._open.clear()  # whatever is left there was rolled back

    def _around(self, edge: str) -> None:
        if edge == "before":
            self.commits += 1
        else:
            done, self._open = self._open, []
            for change in done:
                change()
            if done:
                self.told()
        self.at_commit(edge)


@functools.cache
def _open() -> tuple[DirectEngine, bytes]:
    """One a process, and what its database holds before anything was written: making the tables takes longer than a reinstall."""
    raw = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    for pragma in ("synchronous=OFF", "journal_mode=MEMORY", "foreign_keys=ON"):
        raw.execute(f"PRAGMA {pragma}")
    engine = DirectEngine(raw)
    META.create_all(engine.slow)
    return engine, raw.serialize()


def _engine() -> DirectEngine:
    engine, empty = _open()
    engine.raw.deserialize(empty)
    return engine


def scratch_folder() -> Path:
    """For the one image all worlds share."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
