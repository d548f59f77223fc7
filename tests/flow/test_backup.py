"""`repave backup` and `repave restore`, and an old state that was put back: it never powers or wipes anything (T13)."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from conftest import PASSWORD, wait_until

from repave.app import init_site
from repave.backup import restore_backup, write_backup
from repave.errors import RepaveError
from repave.lab.postgres import make_database
from repave.lab.processes import is_alive
from repave.lab.rack import find_service
from repave.lab.scripted import BMC_LOG


def repave(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "repave.cli.main", *map(str, words)], capture_output=True, text=True, check=False)


def changes_asked(lab) -> list[str]:
    """What the BMCs were asked to change, by their own log."""
    return (lab.folder / "rack" / BMC_LOG).read_text().splitlines()


def copy_database(site: Path, target: Path) -> None:
    """As an operator's script copies it while the service runs."""
    with sqlite3.connect(site / "repave-data/repave.db") as old, sqlite3.connect(target) as new:
        old.backup(new)
    old.close()
    new.close()


def put_back(site: Path, copy: Path) -> None:
    for end in ("", "-wal", "-shm"):
        (site / f"repave-data/repave.db{end}").unlink(missing_ok=True)
    shutil.copy(copy, site / "repave-data/repave.db")


def nothing_was_done(lab, before: tuple[list[str], dict[str, str], dict[str, int]]) -> None:
    asked, disks, consoles = before
    assert changes_asked(lab) == asked != []
    assert {n: lab.disk_digest(n) for n in lab.names} == disks
    assert {n: len(lab.console(n)) for n in lab.names} == consoles


def look(lab) -> tuple[list[str], dict[str, str], dict[str, int]]:
    return changes_asked(lab), {n: lab.disk_digest(n) for n in lab.names}, {n: len(lab.console(n)) for n in lab.names}


def reinstall_with_copies(lab, tmp_path: Path) -> tuple[str, list[Path]]:
    """A batch that ended well, and backups and copies from the middle of it: before the line, and while the new OS was about to boot."""
    names, batch = ["lab01", "lab02"], ""
    for held, step, copy in (("hold-media", "insert-media", "before"), ("hold-disk-boot", "first-boot", "past")):
        lab.set_faults(**dict.fromkeys(names, held))
        if not batch:
            lab.reinstall(names, "tiny-2")
            batch = lab.newest_batch()
        for name in names:
            lab.wait_for_event(batch, "run.step", server=name, step=step)
        copy_database(lab.folder / "site", tmp_path / f"{copy}.db")
        assert repave("backup", tmp_path / f"{copy}.backup", lab.folder / "site").returncode == 0
    lab.set_faults()
    assert {r["state"] for r in lab.wait_for_end(batch).values()} == {"running"}
    time.sleep(2)  # the file beside the key follows within a second
    return batch, [tmp_path / n for n in ("before.db", "past.db", "before.backup", "past.backup")]


def test_an_old_state_that_is_put_back_never_powers_or_wipes_anything(lab, tmp_path):
    site = lab.folder / "site"
    lab.watch.excuse("the client saw it pending")  # the service was stopped meanwhile, and the database forgets what it knew
    batch, (before_db, past_db, before_backup, past_backup) = reinstall_with_copies(lab, tmp_path)
    lab.kill_service()
    world = look(lab)
    try:
        for copy in (before_db, past_db):
            put_back(site, copy)
            refused = subprocess.run([sys.executable, "-m", "repave.cli.main", "serve", site], capture_output=True, text=True, timeout=60, check=False)
            assert refused.returncode == 1 and "repave restore --accept-database" in refused.stderr, refused.stderr
            assert "Repave.9021" in refused.stderr
        nothing_was_done(lab, world)

        accepted = repave("restore", "--accept-database", "--json")  # no site here
        assert accepted.returncode == 2, accepted.stderr
        for backup in (before_backup, past_backup):
            done = repave("restore", backup, site, "--json")
            assert done.returncode == 0, done.stderr
            said = json.loads(done.stdout)
            ended = said["ended_runs"]
            assert ended == 2, said
            assert said["missing_images"] == []
            assert (Path(said["kept_in"]) / "key").exists()
            lab.start_service()
            time.sleep(3)  # a workflow of the old state would have begun by now
            failed = [run for run in lab.runs(batch).values() if run["state"] == "failed"]
            assert len(failed) == ended, lab.describe(batch)
            for run in failed:
                assert run["error"]["code"] == "Repave.9020", run
                assert lab.status(run["server"])["state"] == "error"
                assert "not known" in run["error"]["untouched"] and "reinstall it" in run["error"]["do"]
            assert lab.status("lab03")["state"] == "running"
            assert lab.keys() == []
            nothing_was_done(lab, world)
            lab.kill_service()
    finally:
        if not (site / "secret/restore-under-way").exists():
            lab.start_service()
    lab.reinstall(["lab01", "lab02"], "tiny-1", password=PASSWORD)  # the way back
    assert {r["state"] for r in lab.wait_for_end(lab.newest_batch()).values()} == {"running"}


def test_an_older_database_that_is_put_under_a_running_service_ends_it(lab, tmp_path):
    site = lab.folder / "site"
    copy_database(site, tmp_path / "older.db")
    lab.client.post("/projects", {"name": f"later-{time.time_ns()}"})
    time.sleep(2)  # the file beside the key follows within a second
    copy_database(site, tmp_path / "newest.db")
    service = find_service(lab.folder)
    assert service is not None
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "older.db")) as old,
        contextlib.closing(sqlite3.connect(site / "repave-data/repave.db", timeout=30)) as live,
    ):
        old.backup(live)  # what sqlite3's .restore does
    wait_until(lambda: not is_alive(service), deadline_s=10, what=lambda: "it works on the older database")
    put_back(site, tmp_path / "newest.db")
    lab.start_service()
    service = find_service(lab.folder)
    assert service is not None
    time.sleep(2)
    for name in ("repave-data/new", "now.db"):
        copy_database(site, (site if "/" in name else tmp_path) / name)
    (site / "repave-data/new").rename(site / "repave-data/repave.db")  # what mv does: open files stay what they are
    wait_until(lambda: not is_alive(service), deadline_s=10, what=lambda: "it works on a file that nobody sees any more")
    put_back(site, tmp_path / "now.db")
    lab.start_service()


def test_the_newest_database_copied_by_hand_is_served_again(lab, tmp_path):
    lab.kill_service()
    copy_database(lab.folder / "site", tmp_path / "now.db")
    put_back(lab.folder / "site", tmp_path / "now.db")
    lab.start_service()
    assert lab.status("lab01")["state"] in ("running", "error")


def test_a_running_service_is_not_restored_over(lab, tmp_path):
    assert repave("backup", tmp_path / "b", lab.folder / "site").returncode == 0
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    refused = repave("restore", tmp_path / "b", lab.folder / "site")
    assert refused.returncode == 3 and "stop it first" in refused.stderr, (refused.returncode, refused.stderr)
    assert lab.status("lab01")["state"] in ("running", "error")


# ---- without a rack ----


@pytest.fixture
def site(tmp_path: Path) -> Path:
    init_site(tmp_path / "site")
    return tmp_path / "site"


def test_a_backup_goes_to_an_empty_folder_and_the_key_works_there(site, tmp_path):
    write_backup(site, tmp_path / "b")
    done = restore_backup(tmp_path / "other", tmp_path / "b")
    assert done.kept_in is None and done.ended_runs == 0
    assert (tmp_path / "other/secret/key").read_bytes() == (site / "secret/key").read_bytes()
    with sqlite3.connect(tmp_path / "other/repave-data/repave.db") as conn:
        assert conn.execute("SELECT name FROM projects").fetchall() == [("default",)]
        assert conn.execute("SELECT value FROM marks WHERE name = 'generation'").fetchone() == (str(done.generation),)
    conn.close()
    assert restore_backup(tmp_path / "other", tmp_path / "b").generation == done.generation + 1
    assert not list((tmp_path / "other").glob(".restore-*")) and not (tmp_path / "other/secret/restore-under-way").exists()


def test_every_flipped_byte_of_a_backup_is_found_before_anything_is_replaced(site, tmp_path):
    write_backup(site, tmp_path / "b")
    whole, key = (tmp_path / "b").read_bytes(), (site / "secret/key").read_bytes()
    with tarfile.open(tmp_path / "b") as tar:
        at = {m.name: (m.offset_data, m.size) for m in tar}
    for name, (offset, size) in at.items():
        for where in (offset, offset + size // 2, offset + size - 1):
            (tmp_path / "flipped").write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
            with pytest.raises(RepaveError) as refused:
                restore_backup(site, tmp_path / "flipped")
            assert refused.value.slug == "backup-refused", name
    for length in (0, 100, len(whole) // 2):
        (tmp_path / "flipped").write_bytes(whole[:length])
        with pytest.raises(RepaveError):
            restore_backup(site, tmp_path / "flipped")
    assert (site / "secret/key").read_bytes() == key and not list(site.glob("before-restore-*"))


def test_a_backup_is_never_written_over_another_file(site, tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(RepaveError):
        write_backup(site, tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine" and not list(tmp_path.glob(".backup-*"))


def test_a_backup_taken_while_others_write_is_one_moment(site, tmp_path):
    stop, database = threading.Event(), site / "repave-data/repave.db"

    def write() -> None:
        conn = sqlite3.connect(database, timeout=30, isolation_level=None)
        n = 0
        while not stop.is_set():
            n += 1
            conn.execute("BEGIN IMMEDIATE")
            conn.executemany("INSERT INTO pairs VALUES (?, ?)", [("a", n), ("b", n)])
            conn.execute("COMMIT")
        conn.close()

    def rows() -> int:
        with contextlib.closing(sqlite3.connect(database)) as conn:
            return conn.execute("SELECT count(*) FROM pairs").fetchone()[0]

    with contextlib.closing(sqlite3.connect(database)) as conn:
        conn.execute("CREATE TABLE pairs (side TEXT, n INTEGER)")
    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_until(rows, deadline_s=10, what=lambda: "no writer")
        for n in range(5):
            write_backup(site, tmp_path / f"b{n}")
    finally:
        stop.set()
        thread.join()
    for n in range(5):
        with tarfile.open(tmp_path / f"b{n}") as tar:
            tar.extract("database", tmp_path)
        conn = sqlite3.connect(tmp_path / "database")
        sides = dict(conn.execute("SELECT side, count(*) FROM pairs GROUP BY side").fetchall())
        conn.close()
        assert sides["a"] == sides["b"] > 0


def test_a_backup_of_postgresql_puts_the_rows_back(postgres, tmp_path):
    url = make_database(postgres, "backup")
    init_site(tmp_path / "site", database_url=url)
    write_backup(tmp_path / "site", tmp_path / "b")
    from repave.store.database import open_engine

    engine = open_engine(url)
    with engine.begin() as conn:
        conn.exec_driver_sql("DELETE FROM credentials")
        conn.exec_driver_sql("DELETE FROM projects")
    done = restore_backup(tmp_path / "site", tmp_path / "b")
    with engine.connect() as conn:
        assert conn.exec_driver_sql("SELECT name FROM projects").scalar_one() == "default"
        assert conn.exec_driver_sql("SELECT value FROM marks WHERE name = 'generation'").scalar_one() == str(done.generation)
    engine.dispose()
