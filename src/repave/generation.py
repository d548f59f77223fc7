"""The site's stand outside the database, beside the key file, and the watch that keeps it and finds a database that fails.

At start the database must be at least as new as this file (domain/generation.py). While the service runs the file follows the database
within a second: a copy of the database that is put back is then older, unless nothing has happened since it was made. One that is put back
under a running service ends it.

Several workers of one database share the folder of the key file (docs/operations.md), so all of them read and write this one file. Where that
folder is on NFS a reader may see it as it was a while ago: it then proves less, and never locks anybody out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
import structlog

from repave.domain.generation import NOTHING, Stand, Verdict, judge
from repave.errors import RepaveError
from repave.secrets import write_private
from repave.store import Store
from repave.store.database import is_damage
from repave.store.stand import check_file, probe_write, raise_generation, read_stand

FOLLOW_S = 1.0
PROBE_S = 10.0
CHECK_PAUSE = 100  # SQLite's own check takes about a second for 100 MB: at most a hundredth of the time goes into it
LATE_S = 60.0  # a look takes milliseconds; 30 s where PostgreSQL is a black hole (three connections of 10 s)
LOW_BYTES = 256 << 20  # a batch of 50 writes about 10 MB; below this there is time to act
UNDER_WAY = "restore-under-way"
LOCK_S = 5.0  # it is held for one small write; a machine that died with it on NFS may keep it for good, and nobody waits for that
OLDER = 78  # exit code, beside those of workflow/lease.py
_FOLLOWS = "the file beside the key file follows the database"

log = structlog.get_logger()


def stand_path(key_file: Path) -> Path:
    return key_file.parent / "generation"


def read_stand_file(path: Path) -> Stand | None:
    """None where there is no such file. Raises RepaveError old-state where it makes no sense: a file that can not be read proves nothing."""
    try:
        return Stand(**{name: int(value) for name, value in json.loads(path.read_bytes()).items()})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        raise RepaveError("old-state", f"{path.name}, beside the key file, is damaged: whether the database is the newest can not be told.") from None


def write_stand_file(path: Path, stand: Stand) -> None:
    """The file holds this stand, durable; a higher one is kept. Several processes may call it at once. Raises OSError: full, read-only, lock not to be had."""
    with _locked(path.with_name("generation.lock")):
        if (now := read_stand_file(path)) is not None and now >= stand:
            return
        write_private(path, json.dumps(asdict(stand)).encode())


def begin_life(store: Store, path: Path) -> Stand:
    """The database is the newest state of this site, and its generation is raised, there first and then in the file.

    Raises RepaveError old-state with nothing changed where an older one was put back, and restore-unfinished in the middle of a restore.
    """
    if (path.parent / UNDER_WAY).exists():
        raise RepaveError("restore-unfinished")
    for _ in range(2):  # the second look: between the two reads another worker's first start can have made both
        file = read_stand_file(path)
        database = read_stand(store)  # after the file: it is never behind what the file said before
        verdict = judge(file, database)
        if verdict in (Verdict.FIRST, Verdict.CURRENT):
            break
    else:
        raise RepaveError("old-state", f"It says {_text(database)}, the file beside the key file {_text(file)}.")
    if verdict is Verdict.FIRST:
        write_stand_file(path, NOTHING)  # else a death after the next line leaves a stand without a file, which is refused
    stand = raise_generation(store, above=file.generation if file else 0)
    with contextlib.suppress(BlockingIOError):  # the watch goes on trying, and says so
        write_stand_file(path, stand)
    return stand


def _text(stand: Stand | None) -> str:
    return f"generation {stand.generation}, event {stand.events}" if stand else "nothing"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_S
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(errno.EAGAIN, f"{path.name} is held by another process") from None
                time.sleep(0.05)
        yield


@dataclass(frozen=True)
class Health:
    """What `GET /repave/v1/health` says of one part."""

    ok: bool
    text: str
    since: datetime


class Watch:
    """The file follows the database; a database that can not be written or is damaged, or a disk about to be full, is an alarm in the log and in `health`."""

    def __init__(self, store: Store, path: Path, data_dir: Path, *, late_s: float = LATE_S) -> None:
        self._store, self._path, self._data_dir, self._late_s = store, path, data_dir, late_s
        self._stop = threading.Event()
        self._database = store.engine.url.database if store.engine.dialect.name == "sqlite" else None
        self._file_id = _read_file_id(self._database)
        self._followed: Stand | None = None
        self._health: dict[str, Health] = {}
        self._looked_at = time.monotonic()
        self._threads = [threading.Thread(target=run, name=f"watch{run.__name__}", daemon=True) for run in (self._run, self._check_forever)]

    def health(self) -> dict[str, Health]:
        """Each part as last looked at; a look that hangs (a dead disk) is the failing part `watch`."""
        parts, late_s = dict(self._health), time.monotonic() - self._looked_at
        if late_s > self._late_s:
            parts["watch"] = Health(False, f"the last look began {late_s:.0f} seconds ago and has not ended", self._store.now() - timedelta(seconds=late_s))
        return parts

    @contextlib.contextmanager
    def running(self) -> Iterator[Watch]:
        self.look()
        self._looked_at = time.monotonic()
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(timeout=5)
            with contextlib.suppress(sa.exc.SQLAlchemyError, OSError):
                self.follow()

    def look(self) -> None:
        """The database is probed with a write, the disk for room."""
        self._try("database", lambda: probe_write(self._store), "it can be written")
        free = shutil.disk_usage(self._data_dir).free
        self._tell("disk", free >= LOW_BYTES, f"{free >> 20} MiB free in data_dir")
        self._try("generation", self.follow, _FOLLOWS)

    def check(self) -> None:
        """SQLite's file is checked page by page. Where it is damaged nothing more is written into it, so no reinstall is taken and no step is begun."""
        try:
            check_file(self._store.engine.url)
        except RepaveError as error:
            log.error("database-corrupt", cause=error.detail, do=error.problem.do)
            self._store.damaged = True
            self.look()

    def follow(self) -> None:
        """The file is as new as the database. Ends the process where the database has become older: nothing of an old state may be acted on."""
        if (put := _read_file_id(self._database)) != self._file_id:
            self._end("another file was put in the place of the database", now=put, before=self._file_id)
        stand = read_stand(self._store)
        if self._followed is not None and (stand is None or stand < self._followed):
            self._end("an older database was put back under it", now=_text(stand), before=_text(self._followed))
        if stand is not None and stand != self._followed:
            write_stand_file(self._path, stand)
            self._followed = stand

    def _end(self, why: str, **about: object) -> None:
        log.error("worker ends itself", why=why, **about)
        os._exit(OLDER)  # without cleaning up: that would be acting on it too

    def _run(self) -> None:
        probe_at = time.monotonic() + PROBE_S
        while not self._stop.wait(FOLLOW_S):
            self._looked_at = time.monotonic()
            try:
                self._try("generation", self.follow, _FOLLOWS)
                if time.monotonic() >= probe_at:
                    probe_at = time.monotonic() + PROBE_S
                    self.look()
                if "watch" in self._health:
                    self._tell("watch", True, "it looks again")
            except Exception as error:  # a watch that died would be silence
                self._tell("watch", False, type(error).__name__)

    def _check_forever(self) -> None:
        pause_s = PROBE_S
        while not (self._stop.wait(pause_s) or self._store.damaged):
            began = time.monotonic()
            self.check()
            pause_s = max(PROBE_S, CHECK_PAUSE * (time.monotonic() - began))

    def _try(self, part: str, question: Callable[[], None], good: str) -> None:
        try:
            question()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            self._tell(part, False, self._plain(error), detail=str(getattr(error, "orig", None) or error)[:500])
        else:
            self._tell(part, True, good)

    def _plain(self, error: Exception) -> str:
        """For anybody who asks: no SQL, no values, no path, no address. The log has the rest."""
        if is_damage(error):
            corrupt = RepaveError("database-corrupt")
            return f"{corrupt.slug}: {corrupt.problem.title} {corrupt.problem.do}"
        if isinstance(error, OSError):
            return error.strerror or type(error).__name__
        if self._database and not os.access(self._database, os.W_OK):  # SQLite itself says "disk I/O error" on a connection that was open before
            return "the database's file or its file system is read-only"
        cause = getattr(error, "orig", None)
        return str(cause) if isinstance(cause, sqlite3.Error) else "the database does not answer, or takes nothing"

    def _tell(self, part: str, ok: bool, text: str, detail: str = "") -> None:
        before = self._health.get(part)
        since = before.since if before and before.ok == ok else self._store.now()
        self._health[part] = Health(ok, text, since)
        if not ok and (before is None or before.ok):
            log.error("ALARM: new reinstalls are refused or at risk", part=part, cause=text, detail=detail)
        elif ok and before is not None and not before.ok:
            log.warning("alarm over", part=part, cause=text)


def _read_file_id(path: str | None) -> tuple[int, int] | None:
    """Which file this path names now: open connections go on with the one that was there before. None: not a file, or gone."""
    try:
        found = os.stat(path) if path else None
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if found else None
