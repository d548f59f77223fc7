"""Faults that are no single request, minutes long: `make faults` plays them after the cells. Each is a test by its name and its assertions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from conftest import SECTOR, wait_until
from fault_rig import FaultRig

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.lab import scripted_os
from repave.lab.fault_proxy import Rule


def test_a_rack_and_its_service_that_lose_power_at_one_moment_end_every_run(rig: FaultRig) -> None:
    lose_power(rig, rig.names)


def lose_power(rig: FaultRig, names: list[str]) -> None:
    """These machines and the service, while every second agent is in the midst of writing and the others are not past the line. Every run ends."""
    digests = {}
    for number, name in enumerate(names):
        rig.settle(name)
        rig.scribble(name)
        digests[name] = rig.disk_digest(name)
        # The first chunk is fetched before anything is cleared; without the second the disk stays half written.
        held = Rule("black-hole", path="/chunks/", nth=2, times=None) if number % 2 else Rule("black-hole", path="/cross$", times=None)
        rig.agents.set_rules([replace(held, caller=name)], caller=name)
    batches = {name: rig.start_run(name, "wide") for name in names}
    for number, name in enumerate(names):
        rig.wait_for_event(batches[name], "run.crossed" if number % 2 else "run.plan", server=name)
        if number % 2:
            wait_until(lambda name=name: rig.first_sector(name) == bytes(SECTOR), deadline_s=60, what=lambda name=name: f"{name} clears nothing")
    rig.kill_service()
    for name in names:
        m = rig.machines[name]
        with RedfishBmc(BmcAddress(m.bmc_url, m.bmc_username, m.bmc_password)) as bmc:
            bmc.power_off()
        rig.set_cell(None, name)
    halves = {name: rig.first_sector(name) == bytes(SECTOR) for name in names}
    assert len(set(halves.values())) == 2, halves
    rig.start_service()
    for name in names:
        run = rig.wait_for_run(batches[name], name)
        assert run["outcome"] == ("write-failed" if run["past_the_line"] else "returned"), run
        assert rig.bmc(name) == {"boot": "Hdd", "media": "", "power": "Off" if run["past_the_line"] else "On"}
        if halves[name]:
            assert scripted_os.find_os(rig.machines[name].root_disk) is None
        else:
            assert rig.disk_digest(name) == digests[name]
    for name in names:
        rig.settle(name)


def test_an_old_os_that_comes_up_instead_of_the_ramdisk_is_never_a_success(rig: FaultRig) -> None:
    """The BMC shows the override as asked for, and the firmware boots the disk."""
    name = rig.names[0]
    rig.settle(name)
    before, mark = rig.disk_digest(name), len(rig.console(name))
    rig.set_faults(**{name: "ignore-override"})
    run = rig.wait_for_run(rig.start_run(name, "tiny-1"), name)
    rig.set_faults()
    assert (run["outcome"], run["error"]["code"]) == ("returned", "Repave.2110")
    assert "boot: CD" not in rig.console(name)[mark:] and rig.disk_digest(name) == before
    assert rig.status(name) | {"error": None} == {"state": "running", "operation_state": "reinstall-failed", "error": None}
    assert rig.bmc(name) == {"power": "On", "boot": "Hdd", "media": ""}


def test_a_silent_bmc_takes_no_time_from_the_other_runs(rig: FaultRig) -> None:
    silent = rig.names[0]
    batch = prove_others_beside_a_silent_bmc(rig, rig.names)
    run = rig.wait_for_run(batch, silent)
    rig.set_cell(None, silent)
    assert (run["outcome"], run["past_the_line"]) == ("returned", False), run


def prove_others_beside_a_silent_bmc(rig: FaultRig, names: list[str]) -> str:
    """The first one's BMC says nothing, its run goes on, and all others of the batch are proved. Returns the batch."""
    silent, *others = names
    for name in names:
        rig.settle(name)
    rig.bmcs[silent].set_rules([Rule("black-hole", times=None)])
    batch = rig.start_run(silent, "tiny-1", also=others)
    for name in others:
        rig.wait_for_run(batch, name)
    assert rig.runs(batch)[silent]["ended_at"] is None
    assert {r["outcome"] for n, r in rig.runs(batch).items() if n != silent} == {"proved"}
    return batch


SCENES: tuple[Callable[[FaultRig], None], ...] = (
    test_a_silent_bmc_takes_no_time_from_the_other_runs,
    test_a_rack_and_its_service_that_lose_power_at_one_moment_end_every_run,
    test_an_old_os_that_comes_up_instead_of_the_ramdisk_is_never_a_success,
)
