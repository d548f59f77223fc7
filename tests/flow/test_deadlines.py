"""Deadlines and lateness: what is usual is learnt from each model's own runs, motion extends, silence and standing still do not, late comes before dead."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from datetime import timedelta

import pytest
from test_cancel_and_waves import Racks, later
from test_reinstall_workflow import World

from repave.bmc import Power
from repave.domain.model import InstanceState, Step
from repave.domain.timing import ENOUGH, MOVED_S, REAP_GRACE_S
from repave.workflow.engine import SILENCE_S, Engine

MINUTE = 60.0


class Reconciler(Engine):
    """The engine's reconciler beside workflows that hang: none of them ends a run."""

    def __init__(self, store) -> None:
        self.store, self.when_idle = store, lambda: None

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
        racks.store.runs.tell_late()
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
