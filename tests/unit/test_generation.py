"""An older database that was put back is recognised; a crash between the two places never locks anybody out."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from repave.domain.generation import NOTHING, Stand, Verdict, judge
from repave.errors import RepaveError
from repave.generation import Watch, begin_life, read_stand_file, stand_path, write_stand_file
from repave.secrets import Sealer
from repave.store import Store


@pytest.mark.parametrize(
    ("file", "database", "verdict"),
    [
        (None, None, Verdict.FIRST),
        (Stand(3, 70), Stand(3, 70), Verdict.CURRENT),
        (Stand(3, 70), Stand(4, 70), Verdict.CURRENT),  # died after the database, before the file
        (Stand(3, 70), Stand(3, 71), Verdict.CURRENT),
        (Stand(3, 70), Stand(3, 69), Verdict.OLD),  # a copy from this very life, before the last fact
        (Stand(3, 70), Stand(2, 99), Verdict.OLD),  # another branch of history, however long it ran
        (Stand(3, 70), None, Verdict.OLD),  # an empty database, or one from before there were generations
        (NOTHING, None, Verdict.FIRST),  # died in the very first start
        (NOTHING, Stand(1, 70), Verdict.CURRENT),
        (None, Stand(1, 1), Verdict.UNKNOWN),  # put on another machine without the file
    ],
)
def test_only_a_database_as_new_as_the_file_is_worked_with(file, database, verdict):
    assert judge(file, database) is verdict


def test_whoever_dies_between_any_two_writes_may_start_again():
    """The database is written first, at each start, restore and fact; the process may die before the file follows."""
    steps = ("start", "fact", "restore")
    for history in itertools.product(steps, repeat=4):
        for follows in itertools.product((True, False), repeat=4):
            file = database = Stand(1, 0)
            for step, followed in zip(history, follows, strict=True):
                assert judge(file, database) is Verdict.CURRENT
                above = max(file.generation, database.generation)
                database = Stand(database.generation, database.events + 1) if step == "fact" else Stand(above + 1, database.events)
                file = database if followed else file
            assert judge(file, database) is Verdict.CURRENT


def start(folder: Path) -> Stand:
    """What a start of the service does with the two."""
    key = folder / "key"
    store = Store.open(f"sqlite:///{folder / 'repave.db'}", sealer=Sealer.open(key), now=lambda: datetime.now(UTC))
    try:
        return begin_life(store, stand_path(key))
    finally:
        store.close()


def kill_at(point: int, folder: Path, act: Callable[[], object]) -> bool:
    """`act` in a process of its own that SIGKILLs itself at its nth touch of a file in `folder`. False where it has fewer."""

    def run() -> None:
        left = itertools.count(point, -1)

        def look(event: str, args: tuple[object, ...]) -> None:
            if event in ("open", "os.rename", "os.remove") and str(folder) in str(args[0]) and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        act()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_start_that_is_killed_at_any_touch_of_a_file_locks_nobody_out(tmp_path):
    start(tmp_path)
    for life in ("first", "later"):
        for point in itertools.count():
            if life == "first":
                (tmp_path / "generation").unlink()
                forget(tmp_path)
            killed = kill_at(point, tmp_path, lambda: start(tmp_path))
            stand = start(tmp_path)
            assert read_stand_file(tmp_path / "generation") == stand
            if not killed:
                break
        assert point >= 5, life


def test_workers_that_start_a_new_site_at_once_all_start(tmp_path):
    start(tmp_path)  # the tables, the key
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for round_ in range(5):
            (tmp_path / "generation").unlink()
            forget(tmp_path)
            stands = pool.map(start, [tmp_path] * 4)
            assert sorted(s.generation for s in stands) == [1, 2, 3, 4], round_
            assert read_stand_file(tmp_path / "generation") == max(stands)


def forget(folder: Path) -> None:
    """The database has never been served."""
    with contextlib.closing(sqlite3.connect(folder / "repave.db")) as conn, conn:
        conn.execute("DELETE FROM marks WHERE name = 'generation'")


def test_the_file_never_goes_back(tmp_path):
    path = tmp_path / "generation"
    for stand in (Stand(2, 5), Stand(1, 9), Stand(2, 4)):
        write_stand_file(path, stand)
    assert read_stand_file(path) == Stand(2, 5)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_refused_not_taken_for_none(tmp_path):
    (tmp_path / "generation").write_bytes(b"\x00\x00")
    with pytest.raises(RepaveError) as refused:
        read_stand_file(tmp_path / "generation")
    assert refused.value.slug == "old-state"


def test_a_half_written_run_key_of_a_dead_process_is_swept_and_stops_nothing(tmp_path):
    """The bug: its name began with a dot, the sweep took it for the folder itself, failed, and with it every later round of the reconciler."""
    sealer = Sealer.open(tmp_path / "key")
    half = tmp_path / "run-keys" / ".0198-aa.new"
    half.write_bytes(b"half")
    os.utime(half, (1, 1))
    old = sealer.list_keyed_runs(before=time.time() - 3600)
    assert old == {"0198-aa"}
    for run in old:
        sealer.destroy_run(run)
    assert list((tmp_path / "run-keys").iterdir()) == []


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[tuple[Store, Watch]]:
    store = Store.open(f"sqlite:///{folder / 'repave.db'}", sealer=Sealer.open(folder / "key"), now=lambda: datetime.now(UTC))
    begin_life(store, stand_path(folder / "key"))
    yield store, Watch(store, stand_path(folder / "key"), folder, late_s=1.5)
    store.close()


def test_health_tells_a_stranger_no_address_no_path_and_no_statement(tmp_path):
    with watched(tmp_path) as (store, watch):
        store.engine = sa.create_engine("postgresql+psycopg://repave@127.0.0.1:1/fleet")
        watch.look()
        assert watch.health()["database"].text == "the database does not answer, or takes nothing"
    with watched(tmp_path) as (store, watch):
        (tmp_path / "generation").unlink()
        (tmp_path / "generation").mkdir()
        watch.look()
        assert (watch.health()["generation"].ok, watch.health()["generation"].text) == (False, "Is a directory")


def test_a_look_that_hangs_is_told_until_one_ends(tmp_path):
    with watched(tmp_path) as (store, watch), socket.create_server(("127.0.0.1", 0)) as silent, watch.running():
        assert all(part.ok for part in watch.health().values())
        here, store.engine = store.engine, sa.create_engine(f"postgresql+psycopg://repave@127.0.0.1:{silent.getsockname()[1]}/fleet")
        time.sleep(3.5)
        assert not watch.health()["watch"].ok
        store.engine = here
        silent.accept()[0].close()
        deadline = time.monotonic() + 10
        while not all(part.ok for part in watch.health().values()):
            assert time.monotonic() < deadline, watch.health()
            time.sleep(0.1)


def test_a_damaged_page_that_nobody_reads_is_found_by_the_watch_and_nothing_is_written_any_more(tmp_path):
    with watched(tmp_path) as (store, watch):
        watch.check()
        store.access.add_project("before")
        with contextlib.closing(sqlite3.connect(tmp_path / "repave.db")) as conn:
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            page = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'alembic_version'").fetchone()[0]
        with (tmp_path / "repave.db").open("r+b") as file:
            file.seek((page - 1) * 4096)
            file.write(os.urandom(4096))
        watch.check()
        assert not watch.health()["database"].ok and "database-corrupt" in watch.health()["database"].text
        with pytest.raises(sa.exc.DatabaseError, match="malformed"):
            store.access.add_project("after")
        assert store.access.find_project("before") and not store.access.find_project("after")
