"""After the end nothing of ours stays: not in drives, not in boot orders, not in files, not in the process. What could not be removed then is removed later."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
import requests
import sqlalchemy as sa
from conftest import MIB, wait_until
from test_reinstall_workflow import PASSWORD, World

from repave.errors import BmcError, RunFailed
from repave.lab.fault_proxy import FaultProxy, Rule, start_fault_proxy
from repave.lab.rack import find_service
from repave.lab.scripted import BMC_LOG
from repave.secrets import Sealer
from repave.store.stand import end_restored_runs
from repave.workflow.fleet import Fleet
from repave.workflow.media_sweep import MediaSweep

SHORT_S = 20  # on two busy cores an agent says hello after 1 to 8 s
SLACK_THREADS, SLACK_DESCRIPTORS = 6, 20  # pools that had not yet been asked for all that they may hold; fifty leaks a round would be far above
AWAY = [Rule("reset", times=None)]


def size_of(lab) -> tuple[int, int]:
    """Threads and descriptors of the service."""
    pid = find_service(lab.folder).pid
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


def rows(lab, query: str) -> list:
    with sa.create_engine(f"sqlite:///{lab.folder / 'site/repave-data/repave.db'}", poolclass=sa.NullPool).connect() as conn:
        return list(conn.execute(sa.text(query)))


def half_made(lab) -> list[str]:
    """Every name that only a file in the making has, and what lies where only such files do."""
    site = lab.folder / "site"
    found = [p for p in site.rglob("*") if p.name.endswith((".new", ".part", ".tmp")) or p.name.startswith((".repave-iso-", "tmp"))]
    found += [p for folder in ("tmp", "uploads") for p in (site / "repave-data/images" / folder).glob("*")]
    return sorted({str(p.relative_to(site)) for p in found if p.name != "tmp"})


def outcomes(lab, batch: str) -> dict[str, str]:
    found = rows(lab, f"SELECT s.name, r.outcome FROM runs r JOIN servers s ON s.id = r.server_id WHERE r.batch_id = '{batch}'")
    return {name: outcome for name, outcome in found}


def play_three_endings(lab) -> None:
    """lab01 does well, lab02 fails before the line, lab03 after it; then their faults are over."""
    lab.set_faults(lab02="no-hello", lab03="never-home")
    lab.reinstall(["lab01", "lab02", "lab03"], "tiny-1")
    batch = lab.newest_batch()
    lab.wait_for_end(batch)
    lab.set_faults()
    assert outcomes(lab, batch) == {"lab01": "proved", "lab02": "returned", "lab03": "unproved"}, lab.describe(batch)


def test_after_batches_that_end_well_before_and_past_the_line_nothing_of_ours_is_left_and_the_service_has_not_grown(lab, capsys):
    with lab.short_waits(SHORT_S):
        play_three_endings(lab)
        before = size_of(lab)
        play_three_endings(lab)
        wait_until(lambda: all(n <= b + s for n, b, s in zip(size_of(lab), before, (SLACK_THREADS, SLACK_DESCRIPTORS), strict=True)),
                   deadline_s=30, what=lambda: f"threads and descriptors {size_of(lab)}, had {before}")  # fmt: skip
        with capsys.disabled():
            print(f"\nthreads, descriptors: {before} before the second round, {size_of(lab)} after it")
        for name in ("lab01", "lab02", "lab03"):
            assert (lab.bmc(name)["media"], lab.bmc(name)["boot"]) == ("", "Hdd")
        assert rows(lab, "SELECT name FROM servers WHERE media_run_id IS NOT NULL") == []
        assert_no_secret_opens(lab)
        assert half_made(lab) == []
        # We log in with each request (Basic) and never open a session, so none can be left.
        assert [line for line in (lab.folder / "rack" / BMC_LOG).read_text().splitlines() if "SessionService" in line] == []
    lab.reinstall(["lab03"], "tiny-1")
    assert lab.wait_for_end(lab.newest_batch())["lab03"]["state"] == "running"


def assert_no_secret_opens(lab) -> None:
    """The keys are gone, so what the database keeps sealed is noise, also to who has the key file."""
    assert lab.keys() == []
    sealer = Sealer.open(lab.folder / "site/secret/key")
    ended = rows(lab, "SELECT id, secret_sealed FROM runs WHERE ended_at IS NOT NULL")
    assert ended
    for run_id, sealed in ended:
        with pytest.raises(RunFailed, match="password"):
            sealer.unseal_for_run(run_id, sealed or "")


# ---- media that a BMC kept ----


@contextmanager
def behind_proxies(lab, names: list[str]) -> Iterator[dict[str, FaultProxy]]:
    """These servers' BMCs are asked through proxies, until the end of the block."""
    with ExitStack() as stack:
        proxies = {name: stack.enter_context(start_fault_proxy(lab.machines[name].bmc_url)) for name in names}
        try:
            for name in names:
                move_bmc(lab, name, proxies[name].url)
            yield proxies
        finally:
            for name, proxy in proxies.items():
                proxy.set_rules([])
                move_bmc(lab, name, lab.machines[name].bmc_url)


def move_bmc(lab, name: str, url: str) -> None:
    lab.client.patch(f"/servers/{name}", {"bmc_url": url, "bmc_password": lab.machines[name].bmc_password})


@contextmanager
def operators_iso(folder: Path) -> Iterator[str]:
    """The URL of an ISO that is none of ours."""
    folder.mkdir(exist_ok=True)
    (folder / "rescue.iso").write_bytes(os.urandom(MIB))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/rescue.iso"
    finally:
        server.shutdown()
        server.server_close()


def ask_bmc(lab, name: str, method: str, path: str, body: dict) -> None:
    """As the operator, past the service."""
    m = lab.machines[name]
    with requests.Session() as session:
        session.trust_env, session.auth = False, (m.bmc_username, m.bmc_password)
        session.request(method, f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}{path}", json=body, timeout=30).raise_for_status()


def ours_are_in(lab, name: str) -> bool:
    bmc = lab.bmc(name)
    return "/media/" in bmc["media"] and bmc["boot"] == "Cd"


def test_media_that_a_bmc_kept_are_taken_out_when_it_is_back_and_an_operators_iso_or_a_locked_server_is_left_alone(lab, tmp_path):
    names = kept, foreign, locked = ["lab01", "lab02", "lab03"]
    lab.watch.excuse(f"I11 {foreign}", *(f"I6 {n}" for n in names), *(f"I14 {n}" for n in names))  # the operator's own hand
    with lab.settings(agent_ready_s=SHORT_S, return_pause_s=0.5, media_sweep_s=0.5), behind_proxies(lab, names) as proxies, operators_iso(tmp_path) as iso:
        lab.set_faults(**dict.fromkeys(names, "no-hello"))
        lab.reinstall(names, "tiny-1")
        batch = lab.newest_batch()
        for name in names:
            wait_until(lambda name=name: "ramdisk: hangs" in lab.console(name)[-200:], deadline_s=60, what=lambda: lab.describe(batch))
        lab.kill_service()
        for proxy in proxies.values():
            proxy.set_rules(AWAY)
        lab.start_service()
        lab.wait_for_end(batch)
        assert set(outcomes(lab, batch).values()) == {"return-failed"}, lab.describe(batch)
        lab.kill_service()  # what is to be done lies in the database
        assert [ours_are_in(lab, name) for name in names] == [True] * 3

        ask_bmc(lab, foreign, "POST", "/VirtualMedia/Cd/Actions/VirtualMedia.EjectMedia", {})
        ask_bmc(lab, foreign, "POST", "/VirtualMedia/Cd/Actions/VirtualMedia.InsertMedia", {"Image": iso})
        powers = {name: lab.bmc(name)["power"] for name in names}
        said = len((lab.folder / "service.log").read_text())
        lab.start_service()
        lab.client.post(f"/servers/{locked}/lock", {"reason": "a technician works on it"})
        time.sleep(5)  # some looks at BMCs that are away
        for proxy in proxies.values():
            proxy.set_rules([])
        wait_until(lambda: lab.bmc(kept) == {"power": powers[kept], "boot": "Hdd", "media": ""}, deadline_s=60, what=lambda: f"{lab.bmc(kept)}")
        wait_until(
            lambda: not rows(lab, f"SELECT 1 FROM servers WHERE name = '{foreign}' AND media_run_id IS NOT NULL"), deadline_s=60, what=lambda: "not looked"
        )
        time.sleep(2)
        assert ours_are_in(lab, locked)
        lab.client.post(f"/servers/{locked}/unlock", {})
        wait_until(lambda: lab.bmc(locked)["media"] == "", deadline_s=60, what=lambda: f"{lab.bmc(locked)}")
        wait_until(lambda: not rows(lab, "SELECT 1 FROM servers WHERE media_run_id IS NOT NULL"), deadline_s=60, what=lambda: "still marked")

        assert (lab.bmc(foreign)["media"], lab.bmc(foreign)["boot"]) == (iso, "Cd")
        assert {name: lab.bmc(name)["power"] for name in names} == powers
        assert sorted(e["server"] for e in lab.events(batch) if e["type"] == "run.media-out") == [kept, locked]
        lines = [json.loads(line) for line in (lab.folder / "service.log").read_text()[said:].splitlines() if line.startswith("{")]
        waiting = [line for line in lines if line["event"].startswith("media stay in")]
        assert 1 <= len(waiting) <= len(names) and {line["level"] for line in waiting} == {"info"}, waiting
        ask_bmc(lab, foreign, "POST", "/VirtualMedia/Cd/Actions/VirtualMedia.EjectMedia", {})
    lab.set_faults()
    lab.reinstall(names, "tiny-1")
    assert {r["state"] for r in lab.wait_for_end(lab.newest_batch()).values()} == {"running"}


# ---- the sweep's own rules, on a machine in memory ----


class KeptDrive:
    """A BMC that kept a run's media. `meanwhile` happens between what the sweep reads and what it sends."""

    def __init__(self) -> None:
        self.asked = self.sent = 0
        self.fault = ""
        self.meanwhile = lambda: None

    @contextmanager
    def open(self, server, before_write):
        self.before_write = before_write
        yield self

    def withdraw_media(self, folder) -> bool:
        self.asked += 1
        if self.fault:
            raise BmcError(self.fault)
        self.meanwhile()
        self.before_write()
        self.sent += 1
        return True


@pytest.fixture
def kept(tmp_path, database_url):
    """A run that ended return-failed, its drive, and a sweep every five minutes."""
    world = World(tmp_path, url=database_url)
    world.machine.refuses = {"eject_media", "boot_from_media_once"}
    assert world.play(world.journal()) == "return-failed"
    drive = KeptDrive()
    yield world, drive, MediaSweep(world.store, drive.open, every_s=300)
    world.store.close()


def admit(world) -> None:
    fleet = Fleet(world.store, lambda conn, runs: None, run_timeout_s=3600)
    fleet.admit(credential=world.credential, instance_ids=[world.instance.id], image_id=world.image.id, password=PASSWORD)


def test_what_was_left_is_taken_out_once(kept):
    world, drive, sweep = kept
    sweep.look()
    sweep.look()
    assert (drive.asked, drive.sent, world.store.servers.list_left_media()) == (1, 1, {})


def test_a_run_that_is_admitted_between_the_look_and_the_write_keeps_its_server_to_itself(kept):
    world, drive, sweep = kept
    drive.meanwhile = lambda: admit(world)
    sweep.look()
    sweep.look()
    assert (drive.asked, drive.sent) == (1, 0)


def test_a_server_that_is_locked_between_the_look_and_the_write_is_left_alone(kept):
    world, drive, sweep = kept
    drive.meanwhile = lambda: world.store.servers.lock(world.instance.server_id, reason="", actor="op")
    sweep.look()
    sweep.look()
    assert (drive.asked, drive.sent) == (1, 0)


def test_what_a_restored_backup_says_of_a_drive_moves_nothing(kept):
    world, drive, sweep = kept
    end_restored_runs(world.store, above=0, why="")
    sweep.look()
    assert drive.asked == 0


def test_a_bmc_that_stays_away_is_asked_less_and_less_often_and_once_an_hour_for_good(kept):
    world, drive, sweep = kept
    drive.fault, began = "unreachable", world.store.now()
    asked = []
    for minute in range(0, 24 * 60, 5):
        world.store.now = lambda minute=minute: began + timedelta(minutes=minute)
        before = drive.asked
        sweep.look()
        if drive.asked > before:
            asked.append(minute)
    assert asked[:6] == [0, 5, 15, 35, 75, 135] and {b - a for a, b in pairwise(asked[4:])} == {60}
    drive.fault = ""
    world.store.now = lambda: began + timedelta(days=2)
    sweep.look()
    assert drive.sent == 1


def test_a_refused_login_is_not_sent_again(kept):
    world, drive, sweep = kept
    drive.fault, began = "auth", world.store.now()
    for hour in range(48):
        world.store.now = lambda hour=hour: began + timedelta(hours=hour)
        sweep.look()
    assert drive.asked == 1


# ---- files ----


def test_a_start_removes_half_written_files_and_markers_of_dead_workers_and_nothing_else(lab):
    site = lab.folder / "site"
    images, workers = site / "repave-data/images", site / "secret/workers"
    images.joinpath("uploads").mkdir(exist_ok=True)
    ours = [site / "secret/.ca.pem.new", site / "secret/run-keys/.a-run.config-drive.new", site / "repave-data/.provisioning.pem.new",
            images / "uploads/tmp1234", images / "tmp/tmp5678.raw", site / "repave-data/.repave-iso-old/boot.iso", workers / "gone-0123456789ab"]  # fmt: skip
    theirs = [site / "repave-data/notes.new", workers / "starting-0123456789ab", site / "repave-data/.repave-iso-young/boot.iso"]
    old = time.time() - 2 * 3600
    lab.kill_service()
    for path in (*ours, *theirs):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    for path in (workers / "gone-0123456789ab", site / "repave-data/.repave-iso-old"):
        os.utime(path, (old, old))
    said = len((lab.folder / "service.log").read_text())
    try:
        lab.start_service()
        assert [p for p in ours if p.exists()] == []
        assert [p for p in theirs if not p.exists()] == []
        live = {executor for (executor,) in rows(lab, "SELECT executor_id FROM workers WHERE NOT reaped")}
        assert {p.name for p in workers.iterdir()} - {"starting-0123456789ab"} == live == {p.name for p in (images / "workers").iterdir()}
        lines = [json.loads(line) for line in (lab.folder / "service.log").read_text()[said:].splitlines() if line.startswith("{")]
        told = next(line for line in lines if line["event"] == "removed what an earlier life left")
        assert {kind: told[kind] for kind in ("half-written", "uploads", "images", "media", "markers")} == {
            "half-written": 3, "uploads": 1, "images": 1, "media": 1, "markers": 3,  # the killed one's two, in both folders, and the planted one
        }  # fmt: skip
    finally:
        for path in theirs:
            path.unlink()
        (site / "repave-data/.repave-iso-young").rmdir()
