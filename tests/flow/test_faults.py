"""A slice of `make faults`: each fault of the wire at each kind of request to a BMC, and whole reinstalls with the faults that end quickly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import fault_cells
import fault_driver
import pytest
import requests
from bmc_log import read_bmc
from conftest import wait_until
from disks import digest_of
from fault_rig import FaultRig, run_cells, start_fault_rig
from fault_scenes import lose_power, prove_others_beside_a_silent_bmc

from repave.lab.fault_proxy import Rule


def quiet(line: str) -> None: ...


def test_every_faulty_request_to_a_bmc_ends_in_time_and_is_never_a_false_success(capsys: Any) -> None:
    with fault_driver.start_benches() as benches:
        cells = fault_driver.choose_slice(fault_driver.list_cells(benches[0]))
        wrong = fault_driver.run_cells(benches, cells, quiet)
    with capsys.disabled():
        print(f"\nBMC faults: {len(cells)} cells, {len(cells) - len(wrong)} ended as the matrix says")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def rig() -> Iterator[FaultRig]:
    with start_fault_rig(8) as rig:
        yield rig


@pytest.fixture(scope="module")
def second_service(rig: FaultRig) -> Iterator[subprocess.Popen[bytes]]:
    """It waits ten seconds for the lock, and cells run meanwhile."""
    with subprocess.Popen([sys.executable, "-m", "repave.cli.main", "serve", str(rig.folder / "site")], stdout=subprocess.DEVNULL) as second:
        yield second
        second.kill()


@pytest.mark.usefixtures("second_service")
def test_a_reinstall_with_a_fault_at_the_wire_ends_as_the_matrix_says(rig: FaultRig, capsys: Any) -> None:
    cells = fault_cells.choose_slice(fault_cells.list_cells())
    wrong = run_cells(rig, cells, quiet)
    with capsys.disabled():
        print(f"\nfaults: {len(cells)} cells, {len(cells) - len(wrong)} ended as the matrix says")
    assert not wrong, "\n".join(wrong)
    assert rig.watch.judge_site() == []


def test_a_second_boot_with_a_runs_token_is_refused_and_before_the_line_the_run_goes_back(rig: FaultRig) -> None:
    name = rig.names[0]
    rig.settle(name)
    rig.agents.set_rules([Rule("latency", path="/plan$", times=None, seconds=2.0, caller=name)], caller=name)
    answered = rig.console(name).count("hello was answered")
    batch = rig.start_run(name, "tiny-1")
    run = rig.runs(batch)[name]["id"]
    wait_until(lambda: rig.console(name).count("hello was answered") > answered, deadline_s=60, what=lambda: rig.describe(batch))
    hello = {"boot_id": "the thief's", "serial": "", "uuid": "", "macs": [], "arch": "amd64", "firmware": "uefi", "memory_bytes": 1, "disks": []}
    answer = requests.post(
        f"{rig.agents.url}/agent/v1/hello", json=hello, headers={"Authorization": f"Bearer {rig.media_token(run)}"}, verify=rig.ca, timeout=30
    )
    assert (answer.status_code, "session" in answer.text) == (410, False)
    rig.set_cell(None, name)
    run = rig.wait_for_run(batch, name)
    assert (run["outcome"], run["error"]["class"]) == ("returned", "second-agent")
    assert [e["serial"] for e in rig.events(batch) if e["type"] == "run.second-agent"] == [""]


def test_a_second_service_on_a_site_is_refused(rig: FaultRig, second_service: subprocess.Popen[bytes]) -> None:
    assert second_service.wait(60) != 0
    assert rig.status(rig.names[0])["state"] == "running"


def test_another_machine_behind_a_bmcs_address_is_left_alone_and_the_server_locked_until_an_operator_has_looked(rig: FaultRig) -> None:
    name, other = rig.names[0], rig.other
    rig.settle(name)
    before = rig.disk_digest(name), rig.bmc(name), digest_of(other.root_disk), read_bmc(other)
    rig.bmcs[name].set_rules([Rule("elsewhere", times=None, other_url=other.bmc_url)])
    batch = rig.start_run(name, "tiny-1")
    run = rig.wait_for_run(batch, name)
    rig.set_cell(None, name)
    assert (run["outcome"], run["error"]["class"]) == ("returned", "wrong-server"), run["error"]
    assert (rig.disk_digest(name), rig.bmc(name), digest_of(other.root_disk), read_bmc(other)) == before
    lock = rig.client.get(f"/servers/{name}")["lock"]
    assert lock["by"] == "repave" and batch in lock["reason"], lock
    refused = rig.put(name, "tiny-1")  # its own machine is there again, and nobody can know
    assert (refused.status_code, refused.json()["error_code"]) == (400, "iMetal.0101")
    assert name in refused.text and lock["reason"] in refused.text, refused.text
    rig.client.post(f"/servers/{name}/unlock", {})
    assert rig.wait_for_run(rig.start_run(name, "tiny-1"), name)["outcome"] == "proved"


def test_two_servers_and_the_service_that_lose_power_at_one_moment_end_both_runs(rig: FaultRig) -> None:
    """The scene of the whole rack, with a wait that is soon over."""
    with rig.settings(written_s=12):
        lose_power(rig, rig.names[:2])


def test_a_bmcs_address_that_changes_hands_while_the_image_is_written_powers_no_other_machine(rig: FaultRig) -> None:
    """The bug: who answers was looked at in preflight only, and a new OS was "booted" by cutting whatever machine had the address by then."""
    name, other = rig.names[0], rig.other
    rig.settle(name)
    before = digest_of(other.root_disk), read_bmc(other)
    rig.agents.set_rules([Rule("latency", path="/report$", times=None, seconds=3.0, caller=name)], caller=name)
    batch = rig.start_run(name, "tiny-1")
    wait_until(lambda: rig.runs(batch)[name]["step"] == "write-image", deadline_s=60, what=lambda: str(rig.runs(batch)[name]))
    rig.bmcs[name].set_rules([Rule("elsewhere", times=None, other_url=other.bmc_url)])
    run = rig.wait_for_run(batch, name)
    rig.set_cell(None, name)
    assert (run["outcome"], run["error"]["class"]) == ("unproved", "wrong-server"), run["error"]
    assert (digest_of(other.root_disk), read_bmc(other)) == before
    assert rig.client.get(f"/servers/{name}")["lock"]["by"] == "repave"
    rig.client.post(f"/servers/{name}/unlock", {})
    assert rig.wait_for_run(rig.start_run(name, "tiny-1"), name)["outcome"] == "proved"


def test_while_one_bmc_is_silent_the_others_of_its_batch_are_proved(rig: FaultRig) -> None:
    """The last one here: how the silent one's own run ends takes minutes, and `make faults` waits for it."""
    prove_others_beside_a_silent_bmc(rig, rig.names[:4])
