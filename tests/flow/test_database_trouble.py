"""The disk under the database is full, read-only, locked or damaged: no 202, nothing half done, running writes finish, and it is said loudly."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from conftest import PASSWORD, Lab, build_heavy_image, wait_until

from repave.lab.rack import rack_down, rack_up
from repave.lab.service import import_image

ROOM = "900m"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")


class SmallSite(Lab):
    """Its site is on a file system of its own, which can be made full and roomy again."""

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a page more can be written."""

        def shrink() -> bool:
            used = shutil.disk_usage(self.site).used  # more by the time of the mount, where the service has just written: then it is refused
            return subprocess.run(["mount", "-o", f"remount,size={used}", self.site], check=False).returncode == 0

        wait_until(shrink, deadline_s=10, what=lambda: "the file system can not be made full")
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", f"remount,size={ROOM}", self.site], check=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Another process writes, and does not end its transaction."""
        conn = sqlite3.connect(self.site / "repave-data/repave.db", timeout=30, isolation_level=None)
        conn.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            conn.execute("ROLLBACK")
            conn.close()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """As on a file system that has been made read-only by an error: nothing is written any more, not even by whoever has the file open. Root neither."""
        found = [self.data, *self.data.glob("repave.db*")]
        subprocess.run(["chattr", "+i", *found], check=True)
        try:
            yield
        finally:
            subprocess.run(["chattr", "-i", *found], check=True)

    @property
    def data(self) -> Path:
        return self.site / "repave-data"

    def put(self, names: list[str], *, timeout_s: float = 90) -> requests.Response:
        url = f"{self.values['endpoint']}/v1/{self.values['project_id']}/instances/reinstall"
        body = {"image_id": self.image("tiny-1")["id"], "password": PASSWORD, "instance_id_set": [self.ids[n] for n in names]}
        return requests.put(url, json=body, headers={"X-Auth-Token": self.values["token"]}, timeout=timeout_s)

    def health(self) -> dict:
        return requests.get(f"{self.values['endpoint']}/repave/v1/health", timeout=30).json()

    def wait_for_trouble(self) -> dict:
        """What health says of the database; another part may fail some seconds before."""
        wait_until(lambda: not self.health()["parts"]["database"]["ok"], deadline_s=40, what=lambda: str(self.health()))
        return self.health()["parts"]["database"]

    def wait_for_health(self, status: str) -> dict:
        wait_until(lambda: self.health()["status"] == status, deadline_s=40, what=lambda: str(self.health()))
        return self.health()


@contextlib.contextmanager
def start_site(folder: Path) -> Iterator[SmallSite]:
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HUAWEICLOUD_SDK_HOME", str(folder))
            site = SmallSite(folder, rack_up(2, scripted=True, folder=folder, debian=False))
            import_image(site.client, build_heavy_image(folder / "heavy.raw"), name="heavy")
            site.watch.begin()
            yield site
            site.watch.close()
    finally:
        with contextlib.suppress(Exception):
            rack_down(folder)


@pytest.fixture(scope="module")
def small() -> Iterator[SmallSite]:
    folder = Path(tempfile.mkdtemp(prefix="rpv-", dir="/tmp"))
    (folder / "site").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=700", "tmpfs", folder / "site"], check=True)
    try:
        with start_site(folder) as small:
            yield small
    finally:
        subprocess.run(["umount", "-l", folder / "site"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def plain() -> Iterator[SmallSite]:
    """Its site is in an ordinary folder: tmpfs lets whoever has an immutable file open go on writing."""
    folder = Path(tempfile.mkdtemp(prefix="rpv-", dir="/tmp"))
    try:
        if not can_be_frozen(folder / "probe"):
            pytest.skip("the file system under /tmp knows no immutable files")
        with start_site(folder) as plain:
            yield plain
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def can_be_frozen(path: Path) -> bool:
    with path.open("wb", buffering=0) as out:
        if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
            return False
        try:
            out.write(b"x")
            return False
        except PermissionError:
            return True
        finally:
            subprocess.run(["chattr", "-i", path], check=True)


def test_a_full_disk_gives_no_202_leaves_nothing_and_is_an_alarm(small):
    before, keys = small.batches(), small.keys()
    assert small.health()["status"] == "ok"
    with small.full():
        answer = small.put(["lab01", "lab02"])
        assert (answer.status_code, answer.json()["error_code"]) == (503, "iMetal.0099"), answer.text
        assert "Retry-After" in answer.headers
        own = requests.post(
            f"{small.values['endpoint']}/repave/v1/projects", json={"name": "more"}, headers={"X-Auth-Token": small.values["token"]}, timeout=60
        )
        assert (own.status_code, own.json()["code"]) == (503, "Repave.9024"), own.text
        assert small.status("lab01")["state"] == "running"  # reading goes on
        wait_until(lambda: not small.health()["parts"]["database"]["ok"], deadline_s=40, what=lambda: str(small.health()))
        said = small.health()
        assert "full" in said["parts"]["database"]["text"] and not said["parts"]["disk"]["ok"]
        assert requests.get(f"{small.values['endpoint']}/repave/v1/health", timeout=30).status_code == 503
    small.wait_for_health("ok")
    log = (small.folder / "service.log").read_text()
    assert "ALARM" in log and "alarm over" in log
    assert (small.batches(), small.keys()) == (before, keys)
    assert not list((small.site / "secret").rglob(".*.new"))
    assert small.status("lab01")["state"] == "running"
    assert small.put(["lab01", "lab02"]).status_code == 202
    assert {r["state"] for r in small.wait_for_end(small.newest_batch()).values()} == {"running"}


def test_a_write_under_way_goes_on_while_the_disk_is_full_and_the_run_ends_well(small):
    small.reinstall(["lab01"], "heavy")
    batch = small.newest_batch()
    console = len(small.console("lab01"))
    small.wait_for_event(batch, "run.crossed", server="lab01")
    with small.full():
        wait_until(lambda: small.first_sector("lab01") != bytes(512), deadline_s=60, what=lambda: small.console("lab01")[console:])
        time.sleep(5)
    run = small.wait_for_end(batch)["lab01"]
    assert run["state"] == "running", small.describe(batch)
    assert small.keys() == []


def test_a_run_whose_workflow_died_of_a_full_disk_goes_on_when_there_is_room_again(small):
    """The bug: what DBOS could not record ended its workflow and nothing else did: the server stayed off until the deadline."""
    small.set_faults(lab01="hold-media")
    small.reinstall(["lab01", "lab02"], "tiny-2")
    batch = small.newest_batch()
    small.wait_for_event(batch, "run.step", server="lab01", step="insert-media")
    with small.full():
        small.set_faults()  # the media go in now, and the step's record can not be written
        time.sleep(5)
    runs = small.wait_for_end(batch)
    assert {r["state"] for r in runs.values()} == {"running"}, small.describe(batch)
    assert small.keys() == []
    assert "workflow goes on" in (small.folder / "service.log").read_text()


def assert_nothing_is_taken(site: SmallSite, code: str = "Repave.9024") -> None:
    """On both APIs, with a time after which to ask again."""
    with ThreadPoolExecutor(8) as pool:  # so many that new connections are opened
        for answer in pool.map(site.put, [["lab02"]] * 8):
            assert (answer.status_code, answer.json()["error_code"]) == (503, "iMetal.0099"), answer.text
            assert "Retry-After" in answer.headers and "Traceback" not in answer.text
    token = {"X-Auth-Token": site.values["token"]}
    own = requests.post(f"{site.values['endpoint']}/repave/v1/projects", json={"name": "more"}, headers=token, timeout=60)
    assert (own.status_code, own.json()["code"]) == (503, code), own.text


def health_status(site: SmallSite) -> int:
    """What a monitor sees."""
    return requests.get(f"{site.values['endpoint']}/repave/v1/health", timeout=30).status_code


def log_of(site: SmallSite) -> str:
    return (site.folder / "service.log").read_text()


def test_a_database_that_becomes_read_only_gives_no_202_a_write_under_way_is_finished_and_it_goes_on_by_itself(plain):
    plain.reinstall(["lab01"], "heavy")
    batch = plain.newest_batch()
    plain.wait_for_event(batch, "run.crossed", server="lab01")
    before, keys = plain.batches(), plain.keys()
    with plain.read_only():
        said = plain.wait_for_trouble()
        assert "read-only" in said["text"], said
        assert_nothing_is_taken(plain)
        assert (plain.status("lab02")["state"], plain.keys()) == ("running", keys)  # reading goes on
        wait_until(lambda: plain.first_sector("lab01") != bytes(512), deadline_s=60, what=lambda: plain.console("lab01")[-600:])
        assert health_status(plain) == 503 and "ALARM" in log_of(plain) and "read-only" in log_of(plain)
    plain.wait_for_health("ok")
    assert plain.wait_for_end(batch)["lab01"]["state"] == "running", plain.describe(batch)
    assert (plain.batches(), plain.keys()) == (before, [])
    assert "alarm over" in log_of(plain)
    wait_until(lambda: plain.put(["lab01", "lab02"]).status_code == 202, deadline_s=20, what=lambda: log_of(plain)[-2000:])
    assert {r["state"] for r in plain.wait_for_end(plain.newest_batch()).values()} == {"running"}


def test_a_database_that_is_damaged_while_the_service_runs_is_said_to_be_corrupt_and_takes_no_more(plain):
    """It is met by a request, before the watch looks. A write under way is finished, and nothing more is done until the file is whole."""
    database = plain.data / "repave.db"
    plain.reinstall(["lab01"], "heavy")
    batch = plain.newest_batch()
    plain.wait_for_event(batch, "run.crossed", server="lab01")
    keys, console = plain.keys(), len(plain.console("lab02"))
    mend = damage(database, "hosts")  # every PUT asks it
    assert_nothing_is_taken(plain, "Repave.9025")
    said = plain.wait_for_trouble()["text"]
    assert "database-corrupt" in said and "repave restore FILE" in said, said
    assert health_status(plain) == 503 and "ALARM" in log_of(plain) and "database-corrupt" in log_of(plain)
    wait_until(lambda: plain.differences("lab01", plain.folder / "heavy.raw") == [], deadline_s=60, what=lambda: plain.console("lab01")[-600:])
    time.sleep(5)
    assert plain.runs(batch)["lab01"]["ended_at"] is None and plain.bmc("lab01")["power"] == "On"
    assert (plain.keys(), plain.console("lab02")[console:]) == (keys, "")
    assert "Traceback" not in log_of(plain)  # each report of an agent's was one
    plain.kill_service()
    said = serve_refused(plain)
    assert "Repave.9025" in said and "repave restore FILE" in said, said
    mend()
    plain.start_service()
    assert plain.wait_for_end(batch)["lab01"]["state"] == "running", plain.describe(batch)
    assert plain.keys() == []


def damage(database: Path, table: str) -> Callable[[], None]:
    """The table's first page is noise, under whoever has the file open. Returns what makes it whole again."""
    with contextlib.closing(sqlite3.connect(database)) as conn:
        emptied = lambda: conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0  # noqa: E731
        wait_until(emptied, deadline_s=20, what=lambda: "the page is in the WAL too, and would be read from there")
        page = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
        size = conn.execute("PRAGMA page_size").fetchone()[0]

    def put(content: bytes) -> None:
        with database.open("r+b") as file:
            file.seek((page - 1) * size)
            file.write(content)

    with database.open("rb") as file:
        file.seek((page - 1) * size)
        whole = file.read(size)
    put(os.urandom(size))
    return lambda: put(whole)


def test_a_writer_that_holds_the_lock_for_a_while_delays_a_202_and_nothing_is_lost(small):
    answers: list[requests.Response] = []
    asking = threading.Thread(target=lambda: answers.append(small.put(["lab01"])))
    small.watch.excuse("I4 lab01: the client saw it pending")  # the run began when it was asked for; the client sees it when the lock is given back
    with small.locked():
        asking.start()
        time.sleep(12)
    asking.join()
    assert answers[0].status_code == 202, answers[0].text
    assert small.wait_for_end(small.newest_batch())["lab01"]["state"] == "running"


def test_a_lock_that_is_never_given_back_gives_no_202_and_an_alarm(small):
    before = small.batches()
    with small.locked():
        answer = small.put(["lab01"])
        assert answer.status_code == 503, answer.text
        said = small.wait_for_health("failing")
        assert "locked" in said["parts"]["database"]["text"]
    small.wait_for_health("ok")
    assert small.batches() == before and small.keys() == []


def serve_refused(small: SmallSite) -> str:
    done = subprocess.run([sys.executable, "-m", "repave.cli.main", "serve", small.site], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stderr


def test_a_read_only_or_damaged_database_is_refused_at_start_with_what_to_run(small, tmp_path):
    small.kill_service()
    database = small.site / "repave-data/repave.db"
    subprocess.run(["mount", "-o", "remount,ro", small.site], check=True)
    try:
        said = serve_refused(small)
        assert "Repave.9024" in said and "readonly" in said.lower(), said
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small.site], check=True)
    with sqlite3.connect(database) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    conn.close()
    whole = database.read_bytes()
    try:
        for where in (20, 4096 * 3 + 5):
            size = 4096
            database.write_bytes(whole[:where] + os.urandom(size) + whole[where + size :])
            said = serve_refused(small)
            assert "Repave.9025" in said and "repave restore FILE" in said, said
    finally:
        database.write_bytes(whole)
    small.start_service()
    assert json.dumps(small.status("lab01"))
