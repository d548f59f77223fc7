"""Cancel, rehearsal, waves, pause, limits and the reaper: the workflow's endings and races, with a queue that shows what was begun.

Real and faked as in test_reinstall_workflow.py, whose world and journal these tests use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_reinstall_workflow import PASSWORD, Crash, Machine, World, discovered_steps

from repave.bmc import Power
from repave.domain.model import Host, InstanceState, Step
from repave.domain.timing import REAP_GRACE_S
from repave.domain.waves import Limits, Waves
from repave.errors import RequestError
from repave.store import Cancelled, new_id
from repave.workflow.effects import ServerEffects, verify_system
from repave.workflow.fleet import Fleet


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


def cancel(world: World) -> Cancelled:
    run = world.store.runs.get_run(world.run_id)
    return world.store.batches.cancel(run.batch_id, [run.id], actor="ann")[run.id]


def is_as_before(world: World) -> bool:
    m = world.machine
    return (m.os, m.disk, m.media, m.override, m.power, world.state().state) == ("old-os", "old-os", "", False, Power.ON, InstanceState.RUNNING)


# ---- cancel ----


@pytest.mark.parametrize("event", ["agent-ready", "written"])
def test_a_run_that_waits_before_the_line_is_cancelled_and_the_old_os_runs_again(world, event):
    said = []

    def turn(now: str) -> None:
        if now == event:
            said.append(cancel(world))
        world.machine_turn(now)

    journal = world.journal()
    journal.machine_turn = turn
    assert world.play(journal) == "returned"
    assert said == [Cancelled.RETURNING]
    assert is_as_before(world)
    error = world.state().error
    assert (error["class"], error["untouched"]) == ("cancelled", "the root disk was not written")
    assert "ann" in error["cause"]


def test_cancelled_after_any_step_before_the_line_the_run_stops_at_its_next_step(tmp_path):
    (tmp_path / "look").mkdir()
    steps = discovered_steps(tmp_path / "look")
    before = steps[: steps.index("plan") + 1]
    assert len(before) == 5
    for number, step in enumerate(before):
        (tmp_path / str(number)).mkdir()
        made = World(tmp_path / str(number))
        journal = made.journal(crash_after=step)
        with pytest.raises(Crash):
            made.play(journal)
        assert cancel(made) is Cancelled.RETURNING, step
        assert made.play(journal.again()) == "returned", step
        assert is_as_before(made), step
        assert made.state().error["class"] == "cancelled", step
        assert cancel(made) is Cancelled.ENDED


@pytest.mark.parametrize("call", ["power_off", "insert_media", "boot_from_media_once", "power_on"])
def test_cancelled_while_a_bmc_call_is_under_way_the_run_sends_nothing_more_of_it(world, call):
    """The bug: a step that had begun went on to its end; a BMC that took minutes powered a server off that nobody wanted off any more."""
    forward = []

    def when(action: str) -> None:
        if action == call and not forward:
            assert cancel(world) is Cancelled.RETURNING
            forward.extend(world.machine.actions)

    world.machine.when = when
    journal = world.journal()
    assert world.play(journal) == "returned"
    assert is_as_before(world)
    assert (world.state().error["class"], call in forward) == ("cancelled", False)
    assert world.machine.actions[len(forward)] != call, "what is sent next is of the way back"
    assert not [s for s in journal.steps if s.endswith("-2")], "no other try of a step that was cancelled"


def test_a_run_whose_time_is_over_while_a_bmc_call_is_under_way_turns_back(world):
    world.machine.when = lambda action: later(world.store, 55 * 60) if action == "insert_media" else None
    assert world.play(world.journal()) == "returned"
    assert is_as_before(world)
    assert ("insert_media" in world.machine.actions, world.state().error["class"]) == (False, "deadline")


def test_a_run_cancelled_before_its_workflow_began_touches_nothing(world):
    assert cancel(world) is Cancelled.RETURNING
    assert world.play(world.journal()) == "returned"
    assert world.machine.actions == []


def test_after_the_line_a_cancel_is_refused_and_the_run_ends_in_the_new_os(world):
    said = []

    def turn(event: str) -> None:
        world.machine_turn(event)
        if event == "written":
            said.append(cancel(world))

    journal = world.journal()
    journal.machine_turn = turn
    assert world.play(journal) == "proved"
    assert (said, world.machine.os) == ([Cancelled.PAST_THE_LINE], "new-os")


@pytest.mark.parametrize("first", ["cancel", "crossing"])
def test_of_cancel_and_crossing_whoever_commits_first_wins(world, first):
    for step in (world.effects.preflight, world.effects.power_off, world.effects.insert_media, world.effects.boot_ramdisk):
        step(world.run_id)
    world.machine_turn("agent-ready")
    world.effects.plan(world.run_id)
    plan_id = world.store.runs.get_run(world.run_id).plan["plan_id"]
    if first == "cancel":
        assert cancel(world) is Cancelled.RETURNING
        assert not world.store.runs.record_crossing(world.run_id, plan_id)
    else:
        assert world.store.runs.record_crossing(world.run_id, plan_id)
        assert cancel(world) is Cancelled.PAST_THE_LINE
        assert world.store.runs.get_run(world.run_id).cancel is None


# ---- rehearsal ----


@pytest.fixture
def rehearsal(tmp_path):
    made = World(tmp_path, rehearse=True)
    yield made
    made.store.close()


def test_a_rehearsal_ends_with_the_old_os_running_and_nothing_written(rehearsal):
    assert rehearsal.state().state is InstanceState.PENDING
    assert rehearsal.play(rehearsal.journal()) == "rehearsed"
    assert is_as_before(rehearsal)
    after, run = rehearsal.state(), rehearsal.store.runs.get_run(rehearsal.run_id)
    assert (after.operation_state, after.error, after.image_id, run.crossed_at) == (None, None, None, None)
    assert {"preflight", "boot-ramdisk"} <= run.durations_s.keys()


def test_a_rehearsal_never_crosses_whoever_asks(rehearsal):
    for step in (rehearsal.effects.preflight, rehearsal.effects.power_off, rehearsal.effects.insert_media, rehearsal.effects.boot_ramdisk):
        step(rehearsal.run_id)
    rehearsal.machine_turn("agent-ready")
    rehearsal.effects.plan(rehearsal.run_id)
    assert not rehearsal.store.runs.record_crossing(rehearsal.run_id, rehearsal.store.runs.get_run(rehearsal.run_id).plan["plan_id"])


def test_a_rehearsal_of_a_blank_server_leaves_it_off_with_its_error(tmp_path):
    made = World(tmp_path, blank=True, rehearse=True)
    before = made.store.runs.get_run(made.run_id)
    assert made.play(made.journal()) == "rehearsed"
    assert (made.state().state, made.machine.power, made.state().error["class"]) == (InstanceState.ERROR, Power.OFF, "blank")
    assert before.found_state is InstanceState.ERROR


def test_a_rehearsal_killed_after_each_step_still_ends_with_the_old_os(tmp_path):
    (tmp_path / "look").mkdir()
    look = World(tmp_path / "look", rehearse=True)
    journal = look.journal()
    look.play(journal)
    for number, step in enumerate(journal.steps):
        (tmp_path / str(number)).mkdir()
        made = World(tmp_path / str(number), rehearse=True)
        journal = made.journal(crash_after=step)
        with pytest.raises(Crash):
            made.play(journal)
        assert made.play(journal.again()) == "rehearsed", step
        assert is_as_before(made), step


def test_a_rehearsal_that_fails_says_why_and_the_old_os_runs(rehearsal):
    rehearsal.machine.silent = {"agent-ready"}
    assert rehearsal.play(rehearsal.journal()) == "returned"
    assert is_as_before(rehearsal)
    assert rehearsal.state().operation_state.value == "reinstall-failed"


# ---- many ----


class Racks:
    """Some servers, each with its machine; a queue that shows what was begun. `play` runs what is queued, one after the other."""

    def __init__(self, folder: Path, *, count: int, racks: int = 1, limits: Limits | None = None) -> None:
        base = World(folder)
        base.play(base.journal())
        self.base, self.store = base, base.store
        self.machines: dict[str, Machine] = {}
        self.instances, self.queue, self.inboxes = [], [], {}
        template = self.store.servers.get_server(base.instance.server_id)
        for n in range(1, count + 1):
            machine = Machine(serial=f"SN-{n}", uuid=f"uuid-{100 + n}", mac=f"52:54:00:00:01:{n:02x}")
            server = dataclasses.replace(
                template, id=new_id(), name=f"web{n:02}", serial=machine.serial, uuid=machine.uuid, macs=(machine.mac,), rack=f"r{(n - 1) % racks}"
            )
            self.machines[server.id] = machine
            self.instances.append(self.store.servers.add_server(server, bmc_password="x", blank=False))

        @contextlib.contextmanager
        def open_bmc(server, before_write=lambda: None, run_id=""):
            self.machines[server.id].before_write, self.machines[server.id].recognize = before_write, functools.partial(verify_system, server)
            yield self.machines[server.id]

        self.store.tell = lambda conn, run_id, event, message: self.inboxes.setdefault(run_id, {}).setdefault(event, message)
        self.effects = ServerEffects(self.store, base.images, open_bmc, base.effects.places)
        self.fleet = Fleet(self.store, lambda conn, runs: self.queue.extend(r.id for r in runs), run_timeout_s=3600, limits=limits or Limits())

    def admit(self, instances=None, **how) -> str:
        ids = [i.id for i in (instances or self.instances)]
        admitted = self.fleet.admit(credential=self.base.credential, instance_ids=ids, image_id=self.base.image.id, password=PASSWORD, **how)
        return admitted.batch_id

    def machine(self, n: int) -> Machine:
        return list(self.machines.values())[n - 1]

    def begun(self) -> list[str]:
        """Names of the servers whose runs are queued and not played yet."""
        return [self.name(run_id) for run_id in self.queue]

    def name(self, run_id: str) -> str:
        return self.store.servers.get_server(self.store.runs.get_run(run_id).server_id).name

    def play(self, name: str | None = None) -> str:
        """The first queued run, or that of this server, to its end."""
        one = self.take(name)
        return one.play(one.journal())

    def take(self, name: str | None = None) -> World:
        """It as a world of its own."""
        run_id = next(r for r in self.queue if name in (None, self.name(r)))
        self.queue.remove(run_id)
        one = object.__new__(World)
        one.store, one.effects, one.run_id = self.store, self.effects, run_id
        one.machine, one.inbox = self.machines[self.store.runs.get_run(run_id).server_id], self.inboxes.setdefault(run_id, {})
        return one

    def play_all(self) -> list[str]:
        ended = []
        while self.queue:
            ended.append(self.play())
        return ended

    def runs(self, batch_id: str) -> list:
        return sorted(self.store.runs.list_runs(batch_id=batch_id), key=lambda r: r.number)

    def batch(self, batch_id: str):
        return self.store.runs.find_batch(self.base.credential.project_id, batch_id)

    def why(self, batch_id: str) -> set[str]:
        return set(self.store.batches.why_waiting(self.batch(batch_id)).values())


@pytest.fixture
def racks(tmp_path):
    made = Racks(tmp_path, count=5, racks=2)
    yield made
    made.store.close()


def test_without_rules_all_begin_at_once_in_the_order_of_the_request(racks):
    racks.admit()
    assert racks.begun() == [f"web{n:02}" for n in range(1, 6)]


def test_canaries_go_first_and_the_others_when_all_of_them_run(racks):
    batch = racks.admit(waves=Waves(canary=2))
    assert racks.begun() == ["web01", "web02"]
    assert racks.why(batch) == {"the 2 canaries go first"}
    assert racks.play() == "proved"
    assert racks.begun() == ["web02"]
    assert racks.play() == "proved"
    assert racks.begun() == ["web03", "web04", "web05"]
    assert set(racks.play_all()) == {"proved"}
    assert racks.batch(batch).ended_at is not None


def test_a_canary_that_fails_stops_the_batch_and_the_rest_says_it_was_not_started(racks):
    batch = racks.admit(waves=Waves(canary=1))
    racks.machine(1).silent = {"agent-ready"}
    assert racks.play() == "returned"
    assert racks.queue == []
    assert racks.batch(batch).stop_reason == "1 of 1 canaries did not go well"
    for run in racks.runs(batch)[1:]:
        assert (run.outcome, run.error["class"], run.started_at) == ("returned", "batch-stopped", None)
        assert run.error["cause"].startswith("not started: ")
    assert [m.actions for m in list(racks.machines.values())[1:]] == [[], [], [], []]
    assert {i.state for i in racks.store.servers.list_instances(racks.base.credential.project_id)[0]} == {InstanceState.RUNNING}
    assert racks.batch(batch).ended_at is not None


def test_more_failures_than_allowed_stop_the_batch(racks):
    batch = racks.admit(waves=Waves(at_once=1, max_failed=1))
    for n in (1, 2):
        racks.machine(n).silent = {"agent-ready"}
    racks.play()
    assert racks.begun() == ["web02"]
    racks.play()
    assert racks.queue == []
    assert {r.error["cause"] for r in racks.runs(batch)[2:]} == {"not started: 2 of 5 failed, max-failed 1"}


def test_runs_before_the_line_return_when_the_batch_stops_and_those_past_it_finish(racks):
    batch = racks.admit(waves=Waves(max_failed=0))
    past = racks.runs(batch)[2]
    for step in (racks.effects.preflight, racks.effects.power_off, racks.effects.insert_media, racks.effects.boot_ramdisk):
        step(past.id)
    racks.store.runs.record_hello(past.id, "b", {"boot_id": "b"})
    racks.store.runs.record_plan(past.id, {"plan_id": "p", "disk_path": "/dev/vda", "disk_serial": "D"})
    assert racks.store.runs.record_crossing(past.id, "p")
    racks.machine(1).silent = {"agent-ready"}
    racks.play("web01")
    assert [bool(r.cancel) for r in racks.runs(batch)] == [False, True, False, True, True]
    assert racks.play("web02") == "returned"
    assert racks.runs(batch)[1].error["class"] == "batch-stopped"
    assert racks.machine(2).os == "old-os"
    assert not racks.store.runs.is_closed(past.id)


def test_so_many_at_once_and_the_next_begins_in_the_transaction_that_ends_one(racks):
    racks.admit(waves=Waves(at_once=2))
    assert racks.begun() == ["web01", "web02"]
    racks.play("web02")
    assert racks.begun() == ["web01", "web03"]


def test_a_rack_and_the_site_have_limits(tmp_path):
    made = Racks(tmp_path, count=5, racks=2, limits=Limits(runs_at_once=3, rack_at_once=1))
    batch = made.admit()
    assert made.begun() == ["web01", "web02"]  # one a rack
    assert made.why(batch) == {"1 at once in rack r0", "1 at once in rack r1"}
    assert set(made.play_all()) == {"proved"}


def test_a_waiting_runs_deadline_counts_from_its_begin(racks):
    batch = racks.admit(waves=Waves(at_once=1))
    begun, waits = racks.runs(batch)[:2]
    assert begun.deadline_at - begun.released_at == timedelta(hours=1)
    assert (waits.released_at, waits.deadline_at - waits.created_at > timedelta(hours=23)) == (None, True)


def test_a_paused_batch_begins_nothing_and_a_resumed_one_goes_on(racks):
    batch = racks.admit(waves=Waves(at_once=1))
    racks.store.batches.pause(batch, actor="ann")
    racks.play()
    assert racks.queue == []
    assert racks.why(batch) == {"the batch is paused"}
    racks.store.batches.resume(batch, actor="ann")
    assert racks.begun() == ["web02"]


def test_cancelling_a_batch_ends_what_waits_at_once_and_keeps_nothing_of_it(racks):
    batch = racks.admit(waves=Waves(at_once=1))
    ids = [r.id for r in racks.runs(batch)]
    done = racks.store.batches.cancel(batch, ids, actor="ann")
    assert [done[i] for i in ids] == [Cancelled.RETURNING] + [Cancelled.NOT_STARTED] * 4
    assert racks.begun() == ["web01"]
    assert racks.play() == "returned"
    assert {r.error["class"] for r in racks.runs(batch)} == {"cancelled"}
    assert racks.batch(batch).ended_at is not None
    assert list((racks.base.folder / "secret" / "run-keys").iterdir()) == []


def test_a_cancelled_run_is_no_failure_that_stops_the_others(racks):
    batch = racks.admit(waves=Waves(at_once=1, max_failed=0))
    racks.store.batches.cancel(batch, [racks.runs(batch)[1].id], actor="ann")
    assert racks.batch(batch).stop_reason is None
    racks.play_all()
    assert [r.outcome for r in racks.runs(batch)] == ["proved", "returned", "proved", "proved", "proved"]


def test_only_what_did_not_end_well_may_be_tried_again_and_nothing_that_ran_since(racks):
    batch = racks.admit()
    for n in (2, 3):
        racks.machine(n).silent = {"agent-ready"}
    racks.play_all()
    assert [racks.name(r.id) for r in racks.store.batches.list_retryable(racks.batch(batch))] == ["web02", "web03"]
    racks.machine(3).silent = set()
    racks.admit([racks.instances[2]])
    racks.play_all()
    assert [racks.name(r.id) for r in racks.store.batches.list_retryable(racks.batch(batch))] == ["web02"]


def test_a_locked_server_is_refused_with_its_reason_also_when_the_lock_comes_between_look_and_commit(racks):
    server_id = racks.instances[1].server_id
    racks.store.servers.lock(server_id, reason="database, ask first", actor="ann")
    with pytest.raises(RequestError) as refused:
        racks.admit()
    assert (refused.value.slug, refused.value.context["ids"]) == ("locked", [server_id])
    assert "web02, by ann" in refused.value.detail and "database, ask first" in refused.value.detail
    racks.fleet.refuse_protected = lambda servers: None  # the look came before the lock
    with pytest.raises(RequestError) as refused:
        racks.admit()
    assert refused.value.slug == "locked"
    assert (racks.queue, racks.store.runs.list_runs(live=True)) == ([], [])
    racks.store.servers.unlock(server_id, actor="ann")
    racks.admit()


def test_the_machines_repave_runs_on_are_refused(racks):
    racks.store.servers.record_host(Host("h1", "control", "", "", (racks.machine(4).mac.upper(),)))
    with pytest.raises(RequestError) as refused:
        racks.admit()
    assert refused.value.slug == "own-host"
    assert "web04" in refused.value.detail and "control" in refused.value.detail


# ---- overdue ----


def later(store, seconds: float) -> None:
    store.now = lambda: datetime.now(UTC) + timedelta(seconds=seconds)


def reap(store) -> list[str]:
    """The ids of those it ended."""
    return [run_id for run_id in store.runs.list_overdue() if store.runs.reap(run_id)]


def test_a_run_past_its_deadline_is_ended_without_its_workflow_and_its_later_steps_touch_nothing(world):
    world.effects.preflight(world.run_id)
    world.effects.power_off(world.run_id)
    later(world.store, 3600 + REAP_GRACE_S - 30)
    assert reap(world.store) == []
    later(world.store, 3600 + REAP_GRACE_S + 30)
    assert reap(world.store) == [world.run_id]
    assert (world.state().state, world.state().error["class"]) == (InstanceState.ERROR, "deadline")
    done = len(world.machine.actions)
    world.play(world.journal())
    assert len(world.machine.actions) == done
    assert reap(world.store) == []


def test_a_run_that_never_began_ends_untouched(racks):
    batch = racks.admit(waves=Waves(at_once=1))
    later(racks.store, 25 * 3600)
    assert len(reap(racks.store)) == 5
    assert [r.outcome for r in racks.runs(batch)] == ["return-failed"] + ["returned"] * 4


def test_a_run_that_the_reaper_ended_sends_nothing_more_from_a_call_under_way(world):
    """The server may be another run's by then."""

    def when(action: str) -> None:
        if action == "eject_media":
            later(world.store, 3600 + REAP_GRACE_S + 1)
            reap(world.store)

    world.machine.refuses, world.machine.when = {"insert_media"}, when
    world.play(world.journal())
    assert "eject_media" not in world.machine.actions
    assert world.machine.actions[-1] == "boot_from_disk"


def test_a_step_that_takes_longer_than_usual_is_said_to_be_late_once(racks):
    for _ in range(5):
        racks.admit([racks.instances[0]])
        racks.play_all()
    batch = racks.admit([racks.instances[1]])
    run_id = racks.runs(batch)[0].id
    racks.store.runs.record_step(run_id, Step.PREFLIGHT)
    racks.store.runs.tell_late({})
    assert racks.runs(batch)[0].late_step is None
    later(racks.store, 120)
    racks.store.runs.tell_late({})
    racks.store.runs.tell_late({})
    late = [e for e in racks.store.events.list_events(racks.base.credential.project_id, batch_id=batch) if e.type == "run.late"]
    assert [(e.data["step"], racks.runs(batch)[0].late_step) for e in late] == [("preflight", "preflight")]
