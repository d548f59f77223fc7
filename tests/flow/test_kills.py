"""The service is killed with SIGKILL at the worst moments of a batch and started again: every run ends `running`, once, as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from conftest import wait_until

from repave.lab import scripted_os
from repave.lab.rack import find_service


def assert_ended_once(lab, batch: str, names: list[str], image: str, consoles: dict[str, int]) -> None:
    """Each instance had one run; it crossed the line once, ended once, its machine wrote once and started the new OS once."""
    runs = lab.wait_for_end(batch)
    assert sorted(runs) == names and {r["state"] for r in runs.values()} == {"running"}, lab.describe(batch)
    events = lab.events(batch)
    for name in names:
        types = [e["type"] for e in events if e.get("server") == name]
        assert (types.count("run.accepted"), types.count("run.crossed"), types.count("run.ended")) == (1, 1, 1), types
        steps = [e["step"] for e in events if e.get("server") == name and e["type"] == "run.step"]
        assert len(steps) == len(set(steps)), steps
        since = lab.console(name)[consoles[name] :]
        assert (since.count("crossed the line"), since.count("first boot as"), since.count("home: taken")) == (1, 1, 1), since
        assert lab.differences(name, lab.folder / f"{image}.raw") == []
        assert scripted_os.find_config_drive(lab.machines[name].root_disk) is None
        assert lab.bmc(name) == {"power": "On", "boot": "Hdd", "media": ""}
        assert lab.status(name) == {"state": "running", "operation_state": "reinstall-succeed"}
    assert lab.keys() == []


def consoles(lab) -> dict[str, int]:
    return {name: len(lab.console(name)) for name in lab.names}


def test_a_service_killed_right_after_the_202_keeps_what_it_promised(lab):
    before = consoles(lab)
    accepted = lab.reinstall(lab.names[:3], "tiny-1")
    lab.kill_service()
    lab.start_service()
    assert accepted == [lab.ids[n] for n in lab.names[:3]]
    assert_ended_once(lab, lab.newest_batch(), lab.names[:3], "tiny-1", before)


def test_a_service_killed_before_the_line_goes_on_and_writes_once(lab):
    before = consoles(lab)
    lab.reinstall(["lab01", "lab02"], "tiny-2")
    batch = lab.newest_batch()
    lab.wait_for_event(batch, "run.step", server="lab01", step="boot-ramdisk")
    lab.kill_service()
    lab.start_service()
    assert_ended_once(lab, batch, ["lab01", "lab02"], "tiny-2", before)


def test_a_service_killed_while_a_disk_is_written_lets_the_agent_finish(lab):
    before = consoles(lab)
    lab.reinstall(["lab01", "lab02"], "heavy")
    batch = lab.newest_batch()
    wait_until(lambda: lab.first_sector("lab01") == bytes(512), deadline_s=60, what=lambda: lab.describe(batch))
    lab.kill_service()
    torn = lab.first_sector("lab01") == bytes(512)
    lab.start_service()
    assert torn, "the service was killed too late for this test: the image was on the disk"
    assert_ended_once(lab, batch, ["lab01", "lab02"], "heavy", before)


def test_a_service_killed_while_it_starts_the_new_os_does_not_cut_its_first_boot_short(lab):
    """The bug: the repeated step power-cycled a machine whose first boot had erased the config drive; no proof could ever come."""
    before = consoles(lab)
    lab.set_faults(lab01="hold-disk-boot")  # the service is killed while its POST is not answered, so the step is repeated
    lab.reinstall(["lab01"], "tiny-1")
    batch = lab.newest_batch()
    words_of_both = {"the BMC holds its answer", "the config drive is erased"}
    wait_until(
        lambda: all(words in lab.console("lab01")[before["lab01"] :] for words in words_of_both),
        deadline_s=60,
        what=lambda: lab.console("lab01")[before["lab01"] :],
    )
    lab.kill_service()
    lab.start_service()
    time.sleep(3)  # for the step that is repeated: the new OS does not call home before the fault is over
    lab.set_faults()
    assert_ended_once(lab, batch, ["lab01"], "tiny-1", before)


def wait_for_held_media(lab, batch: str, names: list[str]) -> None:
    """Each BMC was asked for this batch's media, and holds its answer."""
    for name in names:
        lab.wait_for_event(batch, "run.step", server=name, step="insert-media")
    time.sleep(0.5)  # from the event to the request


def test_a_service_that_takes_runs_up_listens_before_it_asks_bmcs_to_fetch_media(lab):
    """The bug: the engine began before the media listener did; a BMC that found its port closed refused the media, and the run went back."""
    before = consoles(lab)
    lab.set_faults(**dict.fromkeys(lab.names, "hold-media"))
    lab.reinstall(lab.names, "tiny-1")
    batch = lab.newest_batch()
    wait_for_held_media(lab, batch, lab.names)
    lab.kill_service()
    lab.set_faults()
    lab.start_service()
    assert_ended_once(lab, batch, lab.names, "tiny-1", before)


def test_a_service_that_is_stopped_in_order_while_bmcs_fetch_media_goes_on_afterwards(lab):
    """The bug: a fetch that found the listeners of a stopping service closed counted as the BMC's refusal."""
    before = consoles(lab)
    lab.set_faults(lab01="hold-media", lab02="hold-media")
    lab.reinstall(lab.names[:2], "tiny-1")
    batch = lab.newest_batch()
    wait_for_held_media(lab, batch, lab.names[:2])
    service = find_service(lab.folder)
    os.kill(service.pid, signal.SIGTERM)
    time.sleep(1)  # its listeners are closed, its effects still wait for their BMCs
    lab.set_faults()
    wait_until(lambda: find_service(lab.folder) is None, deadline_s=30, what=lambda: "the service did not end")
    lab.start_service()
    assert_ended_once(lab, batch, lab.names[:2], "tiny-1", before)


def test_a_start_that_would_strand_runs_of_another_version_is_refused_and_their_own_version_ends_them(lab):
    before = consoles(lab)
    lab.set_faults(lab01="hold-media")
    lab.reinstall(["lab01"], "tiny-1")
    batch = lab.newest_batch()
    wait_for_held_media(lab, batch, ["lab01"])
    lab.kill_service()
    lab.set_faults()
    with begun_by_version(lab, "0"):
        start = [sys.executable, "-m", "repave.cli.main", "serve", str(lab.folder / "site")]
        refused = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode and "Repave.9026" in refused.stderr and "version 0" in refused.stderr, refused.stderr
        assert lab.bmc("lab01")["power"] == "Off"  # as it was left: nothing was asked of it
    lab.start_service()
    assert_ended_once(lab, batch, ["lab01"], "tiny-1", before)


@contextmanager
def begun_by_version(lab, version: str) -> Iterator[None]:
    """For the block, what is under way was begun by this version of the workflow."""
    with closing(sqlite3.connect(lab.folder / "site/repave-data/repave.db")) as db:
        change, under_way = "UPDATE workflow_status SET application_version = ?", "WHERE status = 'PENDING'"
        (own,) = db.execute(f"SELECT DISTINCT application_version FROM workflow_status {under_way}").fetchone()
        db.execute(f"{change} {under_way}", (version,))
        db.commit()
        try:
            yield
        finally:
            db.execute(f"{change} {under_way}", (own,))
            db.commit()


@pytest.mark.parametrize("seed", [20261124])
def test_a_service_killed_at_five_random_moments_of_a_batch_ends_every_run_once(lab, seed):
    rng = random.Random(seed)
    before = consoles(lab)
    lab.reinstall(lab.names, "tiny-2")
    moments = []
    for _ in range(5):
        moments.append(round(rng.uniform(0, 1.5), 2))
        time.sleep(moments[-1])
        lab.kill_service()
        lab.start_service()
    print(f"seed {seed}: killed after {moments} s of service")
    assert_ended_once(lab, lab.newest_batch(), lab.names, "tiny-2", before)
