"""Deadlines and lateness: what is usual is learnt from each model's own runs, motion extends, silence and standing still do not, late comes before dead."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from datetime import timedelta

import pytest
import sqlalchemy as sa
from test_cancel_and_waves import Racks, later
from test_reinstall_workflow import Crash, World

from repave.bmc import Power
from repave.domain.model import InstanceState, Step
from repave.domain.states import Ending
from repave.domain.timing import ALIKE_ENOUGH, ENOUGH, MOVED_S, PATIENCE_S, REAP_GRACE_S, WAY_BACK_S
from repave.store.tables import INSTANCES
from repave.workflow.engine import SILENCE_S, Engine
from repave.workflow.reinstall import DEFAULT_WAITS

MINUTE = 60.0


class Reconciler(Engine):
    """The engine's reconciler beside workflows that hang: none of them ends a run."""

    def __init__(self, store) -> None:
        self.store, self._waits, self.when_idle = store, DEFAULT_WAITS, lambda: None

    def _workflow_statuses(self, run_ids: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(run_ids, "PENDING")


@pytest.fixture
def writing(tmp_path) -> World:
    """A run whose agent has crossed the line; it has an hour, and its workflow waits for "written"."""
    made = World(tmp_path)
    for step in ("preflight", "power_off", "insert_media", "boot_ramdisk"):
        getattr(made.effects, step)(made.run_id)
    made.machine_turn("agent-ready")
    made.effects.plan(made.run_id)
    made.machine.silent = {"report"}
    made.machine_turn("written")
    made.inbox.clear()
    return made


def report(world: World, minute: float, *, done: int) -> bool:
    later(world.store, minute * MINUTE)
    return world.store.runs.record_progress(world.run_id, {"stage": "write", "bytes_done": done, "bytes_total": 10**9})


def reconcile(world: World) -> None:
    Reconciler(world.store).reconcile()


def test_a_write_that_moves_goes_on_far_past_the_deadline_it_began_with(writing):
    """The bug: an image that took longer than the run's 3.5 hours was stopped at any speed, its disk erased."""
    for minute in range(0, 400, 2):
        assert report(writing, minute, done=minute + 1), f"stopped in minute {minute}"
        if minute % 20 == 0:
            reconcile(writing)
    assert writing.inbox == {} and writing.store.runs.get_run(writing.run_id).ended_at is None


def test_a_write_that_stands_still_is_stopped_at_its_deadline_however_often_its_agent_speaks(writing):
    assert report(writing, 30, done=7)
    for minute in range(31, 90):
        assert report(writing, minute, done=7)
    reconcile(writing)
    assert writing.inbox == {}
    assert not report(writing, 30 + MOVED_S / MINUTE + 0.1, done=8)
    reconcile(writing)
    assert writing.inbox["written"]["error"]["class"] == "deadline"
    assert writing.play(writing.journal()) == "write-failed"
    assert (writing.machine.power, writing.state().state) == (Power.OFF, InstanceState.ERROR)


def test_an_agent_that_falls_silent_is_found_by_its_lease_whatever_time_the_run_has_left(writing):
    assert report(writing, 1, done=7)
    later(writing.store, MINUTE + SILENCE_S - 5)
    reconcile(writing)
    assert writing.inbox == {}
    later(writing.store, MINUTE + SILENCE_S + 5)
    reconcile(writing)
    assert writing.inbox["written"]["error"]["class"] == "agent-silent"


def test_a_workflow_whose_agent_never_asks_to_cross_is_told_at_the_deadline(tmp_path):
    made = World(tmp_path)
    for step in ("preflight", "power_off", "insert_media", "boot_ramdisk"):
        getattr(made.effects, step)(made.run_id)
    made.machine_turn("agent-ready")
    later(made.store, 61 * MINUTE)
    made.store.runs.record_seen(made.store.runs.get_run(made.run_id))
    reconcile(made)
    assert made.inbox["written"]["error"]["class"] == "deadline"


def test_a_run_that_is_silent_before_its_hello_is_told_while_there_is_time_for_the_way_back(tmp_path):
    """The bug: its wait was not bounded by its own deadline, so that the reaper could end it before what it found was back."""
    made = World(tmp_path)
    for step in ("preflight", "power_off", "insert_media", "boot_ramdisk"):
        getattr(made.effects, step)(made.run_id)
    later(made.store, 60 * MINUTE - WAY_BACK_S - 30)
    reconcile(made)
    assert made.inbox == {}
    later(made.store, 60 * MINUTE - WAY_BACK_S + 30)
    reconcile(made)
    assert made.inbox["agent-ready"]["error"]["class"] == "deadline"


@pytest.mark.parametrize("after_s", [SILENCE_S + 5, 55 * MINUTE], ids=["silent", "overdue"])
def test_a_run_that_is_told_to_end_before_the_line_can_not_cross_until_it_turns_back(tmp_path, after_s):
    """The bug: of a silent agent that came back in that moment the disk was erased."""
    made = World(tmp_path)
    for step in ("preflight", "power_off", "insert_media", "boot_ramdisk"):
        getattr(made.effects, step)(made.run_id)
    made.machine_turn("agent-ready")
    made.effects.plan(made.run_id)
    later(made.store, after_s)
    reconcile(made)
    assert made.inbox["written"]["error"]
    assert not made.store.runs.record_crossing(made.run_id, made.store.runs.get_run(made.run_id).plan["plan_id"])


def test_a_wait_for_the_agent_ends_early_enough_for_the_way_back(tmp_path):
    made = World(tmp_path)
    made.machine.silent = {"agent-ready"}
    for step in ("preflight", "power_off", "insert_media"):
        getattr(made.effects, step)(made.run_id)
    later(made.store, 45 * MINUTE)  # a BMC that took its time: five minutes are left until the way back
    journal = made.journal()
    assert made.play(journal) == "returned"
    assert journal.waited["agent-ready"] == pytest.approx(60 * MINUTE - WAY_BACK_S - 45 * MINUTE, abs=5)
    assert made.state().error["cause"].endswith("No agent-ready within 5 minutes; the run's deadline left no more.")
    assert made.machine.os == "old-os"


def late_events(racks: Racks, batch: str) -> list:
    return [e for e in racks.store.events.list_events(racks.base.credential.project_id, batch_id=batch) if e.type == "run.late"]


def run_in_preflight(racks: Racks, instance) -> tuple[str, str]:
    batch = racks.admit([instance])
    run_id = racks.runs(batch)[0].id
    racks.store.runs.record_step(run_id, Step.PREFLIGHT)
    return batch, run_id


def test_what_is_usual_is_learnt_from_the_same_model_and_from_enough_of_its_runs(tmp_path):
    racks = Racks(tmp_path, count=4)
    try:
        for n in (2, 3):
            server = racks.store.servers.get_server(racks.instances[n].server_id)
            racks.store.servers.set_server(server.id, **{"model": f"M{n}"})
        for number in range(ENOUGH):
            racks.admit([racks.instances[0]] + ([racks.instances[2]] if number else []))  # M2 has one run too few
            racks.play_all()
        later(racks.store, 120)
        begun = [run_in_preflight(racks, racks.instances[n]) for n in (1, 2, 3)]
        racks.store.now = lambda now=racks.store.now: now() + timedelta(seconds=120)
        racks.store.runs.tell_late({})
        assert [len(late_events(racks, batch)) for batch, _ in begun] == [1, 0, 0]
    finally:
        racks.store.close()


def test_a_run_is_said_to_be_late_long_before_it_is_dead(tmp_path):
    racks = Racks(tmp_path, count=2)
    try:
        for _ in range(ENOUGH):
            racks.admit([racks.instances[0]])
            racks.play_all()
        batch, _ = run_in_preflight(racks, racks.instances[1])
        reconciler = Reconciler(racks.store)
        for second in range(0, int(3600 + REAP_GRACE_S) + 120, 15 * 4):
            later(racks.store, second)
            reconciler.reconcile()
        events = [(e.type, e.at) for e in racks.store.events.list_events(racks.base.credential.project_id, batch_id=batch)]
        told = dict(events)
        assert [t for t, _ in events if t in ("run.late", "run.ended")] == ["run.late", "run.ended"]
        assert (told["run.ended"] - told["run.late"]).total_seconds() > 3000
        assert dataclasses.asdict(racks.runs(batch)[0])["late_step"] == "preflight"
    finally:
        racks.store.close()


def test_one_overdue_run_that_can_not_be_ended_keeps_none_of_the_others(tmp_path):
    """The bug: all were ended in one transaction, so one instance in a state that no run may leave it in held up the rest for good."""
    racks = Racks(tmp_path, count=3)
    try:
        batch = racks.admit()
        with racks.store.write() as conn:
            conn.execute(sa.update(INSTANCES).where(INSTANCES.c.id == racks.instances[0].id).values(state="running"))
        later(racks.store, 3600 + REAP_GRACE_S + 1)
        reconcile(racks)
        assert [run.outcome for run in racks.runs(batch)] == [None, "return-failed", "return-failed"]
    finally:
        racks.store.close()


# ---- waits that are learnt ----


class Learning(Racks):
    """Racks whose clock moves with what their machines take."""

    def __init__(self, folder, count: int = 3) -> None:
        super().__init__(folder, count=count)
        self.store.servers.set_server(self.base.instance.server_id, **{"model": "M0"})  # its run is not one alike
        self.passed_s, real = 0.0, self.store.now
        self.store.now = lambda: real() + timedelta(seconds=self.passed_s)

    def reinstall(self, number: int, *, boot_s: float = 60, proof_s: float = 30, **how):
        """The run's outcome, how long it waited for each, and the cause where it failed. `boot_s`: from power on to the line."""
        batch = self.admit([self.instances[number]], **how)
        one = self.take()
        journal, turn = one.journal(), one.machine_turn
        journal.takes_s = {"agent-ready": boot_s, "proof": proof_s}

        def move(event: str) -> None:
            self.passed_s += journal.takes_s.get(event, 0)
            turn(event)

        journal.machine_turn = move
        outcome = one.play(journal)
        error = self.runs(batch)[0].error
        return outcome, journal.waited, error["cause"] if error else ""


@pytest.fixture
def learning(tmp_path):
    made = Learning(tmp_path)
    yield made
    made.store.close()


def teach(learning: Learning, times: int = ALIKE_ENOUGH, **how) -> None:
    for _ in range(times):
        assert learning.reinstall(0, **how)[0] == "proved"


def test_with_too_little_history_a_run_waits_as_long_as_the_setting_says(learning):
    teach(learning, ALIKE_ENOUGH - 1)
    outcome, waited, cause = learning.reinstall(1, boot_s=10**6)
    assert (outcome, waited["agent-ready"]) == ("returned", DEFAULT_WAITS.agent_ready_s)
    assert "No agent-ready within 30 minutes; that is the setting agent_ready_s." in cause


def test_a_silent_run_ends_sooner_once_its_model_has_shown_how_long_it_takes(learning):
    teach(learning, boot_s=180)
    outcome, waited, cause = learning.reinstall(1, boot_s=10**6)
    assert (outcome, waited["agent-ready"]) == ("returned", pytest.approx(180 + PATIENCE_S, abs=2))
    assert "No agent-ready within 13 minutes; the slowest of 8 like it took 3.0." in cause


def test_the_wait_for_a_proof_is_learnt_from_runs_with_the_same_image(learning):
    teach(learning, proof_s=120)
    other = dataclasses.replace(learning.base.image, id="img-2", name="other")
    learning.store.images.add_image(other)
    outcome, waited, cause = learning.reinstall(1, proof_s=10**6)
    assert (outcome, waited["proof"]) == ("unproved", pytest.approx(120 + PATIENCE_S, abs=2))
    assert "No proof within 12 minutes; the slowest of 8 like it took 2.0." in cause
    learning.base.image = other
    assert learning.reinstall(2)[1]["proof"] == DEFAULT_WAITS.proof_s


@pytest.mark.parametrize("boot_s", [180, 360, 750])
def test_a_run_that_is_slow_by_a_firmware_update_is_not_ended(learning, boot_s):
    teach(learning, boot_s=180)
    assert learning.reinstall(1, boot_s=boot_s)[0] == "proved"


def test_what_was_learnt_never_waits_longer_than_the_setting(learning):
    teach(learning, boot_s=1500)
    outcome, waited, cause = learning.reinstall(1, boot_s=10**6)
    assert (outcome, waited["agent-ready"]) == ("returned", DEFAULT_WAITS.agent_ready_s)
    assert "the setting" in cause


@pytest.mark.parametrize("change", [{"model": "M2"}, {"boot": "bios"}, {"model": ""}])
def test_another_model_or_firmware_and_a_model_not_known_learn_nothing_from_these(learning, change):
    teach(learning)
    server = learning.store.servers.get_server(learning.instances[1].server_id)
    alike = dataclasses.replace(server, **change)
    assert len(learning.store.runs.list_seconds_alike(server, Step.BOOT_RAMDISK)) == ALIKE_ENOUGH
    assert learning.store.runs.list_seconds_alike(alike, Step.BOOT_RAMDISK) == []


def test_a_model_that_has_become_slower_for_good_costs_one_run_and_teaches_with_the_next(learning):
    """Without it, a slower network or a larger ramdisk would end every run of the model from then on."""
    teach(learning, boot_s=60)
    assert learning.reinstall(1, boot_s=900)[0] == "returned"
    outcome, waited, _ = learning.reinstall(1, boot_s=900)
    assert (outcome, waited["agent-ready"]) == ("proved", DEFAULT_WAITS.agent_ready_s)
    assert learning.reinstall(2, boot_s=900)[0] == "proved"


def test_a_proof_that_came_after_its_wait_teaches_how_long_it_really_took(learning):
    teach(learning, proof_s=60)
    batch = learning.admit([learning.instances[1]])
    one = learning.take()
    journal = one.journal()
    journal.takes_s = {"proof": 10**6}
    assert one.play(journal) == "unproved"
    learning.passed_s += 1400
    one.machine_turn("proof")
    one.effects.end(one.run_id, Ending.UNPROVED, None)
    assert learning.runs(batch)[0].outcome == "late-proof"
    assert learning.reinstall(2, proof_s=1400)[0] == "proved"


def test_the_wait_that_was_chosen_stays_when_the_process_dies_and_history_goes_on(learning):
    teach(learning, boot_s=180)
    learning.admit([learning.instances[1]])
    one = learning.take()
    one.machine.silent = {"agent-ready"}
    journal = one.journal(crash_after="boot-ramdisk-1")
    with pytest.raises(Crash):
        one.play(journal)
    teach(learning, boot_s=600)
    assert one.play(journal.again()) == "returned"
    assert journal.waited["agent-ready"] == pytest.approx(180 + PATIENCE_S, abs=2)


def test_without_history_a_silent_run_is_late_at_half_of_its_wait(tmp_path):
    racks = Racks(tmp_path, count=1)
    try:
        batch = racks.admit()
        racks.store.runs.record_step(racks.runs(batch)[0].id, Step.BOOT_RAMDISK)
        for minute, times in ((14, 0), (16, 1), (20, 1)):
            later(racks.store, minute * MINUTE)
            Reconciler(racks.store).reconcile()
            assert len(late_events(racks, batch)) == times, minute
    finally:
        racks.store.close()
