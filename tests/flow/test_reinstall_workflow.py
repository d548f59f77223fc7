"""The workflow against every way its steps can go: twice, killed after each, each failing for good, each wait timing out.

Real: the workflow, its effects, the store on both databases, the sealer, the image store, the config drive. At the far end: a BMC and a machine, scripted.
The port is a journal in memory: a crash is an exception after the record, and the same journal goes on in a second life.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import zstandard

from repave.bmc import BmcFacts, Power
from repave.domain.model import Image, InstanceState, Role, Server
from repave.domain.states import Ending
from repave.errors import BmcError, RequestError, RunFailed
from repave.images.manifest import Chunk, Manifest
from repave.images.store import ImageStore
from repave.secrets import Sealer
from repave.store import Store, new_id
from repave.workflow.effects import Places, ServerEffects, verify_system
from repave.workflow.fleet import Fleet
from repave.workflow.reinstall import reinstall
from repave.workflow.run import open_message

PASSWORD = "Canary-7!canary"


class Crash(BaseException):
    """The process dies here."""


@dataclass
class Machine:
    """The far end: a server, its BMC and whatever OS its disk holds. `actions` is what reached it."""

    power: Power = Power.ON
    disk: str = "old-os"
    os: str = "old-os"
    media: str = ""
    override: bool = False
    actions: list[str] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)  # events that never come
    refuses: set[str] = field(default_factory=set)  # BMC calls that fail for good
    refuses_once: set[str] = field(default_factory=set)
    refusal: str = "power_failed"
    proof_serial: str = "DISK-1"
    serial: str = "SER-1"
    uuid: str = "uuid-1"
    mac: str = "52:54:00:00:00:01"

    # Not fields: they are no state of the machine's.
    before_write = staticmethod(lambda: None)  # the driver's, of the call under way
    recognize = staticmethod(lambda serial, uuid: None)
    when = staticmethod(lambda action: None)  # told of each call when it has begun and nothing is sent yet

    def do(self, action: str) -> None:
        self.when(action)
        reads, refused = action in ("probe", "check_media"), action in self.refuses | self.refuses_once
        if reads:
            self.actions.append(action)
        self.recognize(self.serial, self.uuid)
        if not reads:
            self.before_write()
            self.actions.append(action)
        if refused:
            self.refuses_once.discard(action)
            raise BmcError(self.refusal, action)

    # Bmc
    def probe(self) -> BmcFacts:
        self.do("probe")
        return BmcFacts("/s/1", "Lab", "M1", self.serial, self.uuid, self.power, ("/cd",), ("Cd", "Hdd"))

    def check_media(self, urls) -> None:
        self.do("check_media")

    def read_power(self) -> Power:
        return self.power

    def power_off(self, *, graceful_s: float = 0) -> bool:
        self.do("power_off")
        self.power, self.os = Power.OFF, ""
        return not graceful_s

    def wait_for_off(self, within_s: float) -> bool:
        return self.power is Power.OFF

    def insert_media(self, urls):
        self.do("insert_media")
        self.media = urls[0]
        return urls[0]

    def eject_media(self) -> None:
        self.do("eject_media")
        self.media = ""

    def boot_from_media_once(self) -> None:
        self.do("boot_from_media_once")
        self.override = True

    def boot_from_disk(self) -> None:
        self.do("boot_from_disk")
        self.override = False

    def power_on(self) -> None:
        self.do("power_on")
        if self.power is not Power.ON:
            self.power = Power.ON
            self.os = "ramdisk" if self.media and self.override else self.disk


class Journal:
    """The Run port in memory. `crash_after` names the step after whose record the process dies, `twice` repeats every effect."""

    def __init__(self, run_id: str, inbox: dict, machine_turn, *, crash_after: str = "", twice: bool = False) -> None:
        self.run_id, self.inbox, self.machine_turn = run_id, inbox, machine_turn
        self.crash_after, self.twice = crash_after, twice
        self.records: list[tuple[str, object]] = []
        self.steps: list[str] = []
        self.takes_s: dict[str, float] = {}  # how long the machine needs until it says this; no turn of it where that is longer than the wait
        self.waited: dict[str, float] = {}
        self._at = 0

    def again(self) -> Journal:
        """The next life: same records, from the top, no crash."""
        self._at, self.crash_after = 0, ""
        return self

    def _record(self, name, value):
        self.records.append((name, value))
        self._at += 1
        if isinstance(value, RunFailed):
            raise value
        return value

    def _replay(self, name):
        if self._at >= len(self.records):
            return False, None
        recorded, value = self.records[self._at]
        assert recorded == name, f"step order changed: {recorded} was recorded, {name} asked"
        self._at += 1
        if isinstance(value, RunFailed):
            raise value
        return True, value

    async def step(self, name, effect):
        found, value = self._replay(name)
        if found:
            return value
        self.steps.append(name)
        try:
            if self.twice:
                with contextlib.suppress(RunFailed):
                    effect(self.run_id)
            value = effect(self.run_id)
        except RunFailed as error:
            value = error
        if name == self.crash_after:
            self.records.append((name, value))
            raise Crash
        return self._record(name, value)

    async def wait_for(self, event, deadline_s, why=""):
        found, value = self._replay(event)
        if found:
            return value
        self.waited[event] = deadline_s
        if self.takes_s.get(event, 0) <= deadline_s:
            self.machine_turn(event)
        try:
            value = open_message(event, self.inbox.get(event), deadline_s, why)
        except RunFailed as error:
            value = error
        return self._record(event, value)

    async def sleep(self, seconds):
        found, _ = self._replay("sleep")
        if not found:
            self._record("sleep", None)

    async def now(self):
        return datetime.now(UTC)


class World:
    """One server, one instance, one image, one admitted run."""

    def __init__(self, folder: Path, *, blank: bool = False, rehearse: bool = False, url: str = "") -> None:
        self.folder = folder
        self.machine = Machine(power=Power.OFF, disk="", os="") if blank else Machine()
        self.store = Store.open(url or f"sqlite:///{folder / 'repave.db'}", sealer=Sealer.open(folder / "secret" / "key"), now=lambda: datetime.now(UTC))
        self.inbox: dict[str, dict] = {}
        self.store.tell = lambda conn, run_id, event, message: self.inbox.setdefault(event, message)
        self.images = ImageStore(folder / "images")
        project = self.store.access.add_project("default")
        self.credential, _, _ = self.store.access.add_credential(project.id, "op", Role.OPERATOR)
        raw = bytes(1024 * 1024)
        packed = zstandard.ZstdCompressor().compress(raw)
        sha256 = hashlib.sha256(packed).hexdigest()
        self.images.write_chunk(sha256, packed)
        manifest = Manifest(len(raw), 512, "amd64", "uefi", (Chunk(sha256, len(packed), hashlib.sha256(raw).hexdigest(), ()),))
        digest = self.images.write_manifest(manifest)
        now = datetime.now(UTC)
        self.image = Image(new_id(), project.id, "img", "Linux", "amd64", "uefi", digest, len(raw), 512, len(packed), 0, now)
        self.store.images.add_image(self.image)
        server = Server(
            new_id(), "lab01", project.id, "https://bmc.invalid", "admin", "true", None, None, "Lab", "M1", "SER-1", "uuid-1", ("52:54:00:00:00:01",),
            "amd64", "uefi", "r1", "1", {}, None, now,
        )  # fmt: skip
        self.instance = self.store.servers.add_server(server, bmc_password="Canary-bmc-password", blank=blank)

        @contextlib.contextmanager
        def open_bmc(known, before_write=lambda: None, run_id=""):
            self.machine.before_write, self.machine.recognize = before_write, functools.partial(verify_system, known)
            yield self.machine

        places = Places(("http://media.invalid",), "https://agents.invalid", "https://chunks.invalid/chunks", "CA", 0)
        self.effects = ServerEffects(self.store, self.images, open_bmc, places)
        self.fleet = Fleet(self.store, lambda conn, runs: None, run_timeout_s=3600)
        self.admit(rehearse=rehearse)

    def admit(self, *, rehearse: bool = False) -> None:
        admitted = self.fleet.admit(
            credential=self.credential, instance_ids=[self.instance.id], image_id=self.image.id, password="" if rehearse else PASSWORD, rehearse=rehearse,
        )  # fmt: skip
        self.run_id = self.store.runs.list_runs(batch_id=admitted.batch_id)[0].id
        self.inbox.clear()

    def machine_turn(self, event: str) -> None:
        """What the machine does of itself before `event` would come."""
        m, store = self.machine, self.store
        if event in m.silent:
            return
        if event == "agent-ready" and m.os == "ramdisk":
            disk = {
                "path": "/dev/vda", "size_bytes": 2**30, "sector_bytes": 512, "serial": "DISK-1", "wwn": "", "model": "", "transport": "virtio",
                "removable": False, "read_only": False, "rotational": False, "virtual": False, "hctl": "", "by_path": "", "boots": True,
            }  # fmt: skip
            inventory = {
                "boot_id": "boot-ramdisk", "serial": m.serial, "uuid": m.uuid, "macs": [m.mac], "arch": "amd64",
                "firmware": "uefi", "memory_bytes": 2**30, "disks": [disk], "uptime_s": 1.0,
            }  # fmt: skip
            store.runs.record_hello(self.run_id, "boot-ramdisk", inventory)
        if event == "written" and m.os == "ramdisk":
            run = store.runs.get_run(self.run_id)
            if run.plan.get("rehearse"):
                store.runs.record_report(self.run_id, {"epoch": 0, "verified": False, "rehearsal": {"data_bytes": 5}, "error": None})
            elif store.runs.record_crossing(self.run_id, run.plan["plan_id"]):
                m.disk = "half-written"
                if "report" not in m.silent:
                    m.disk = "new-os"
                    store.runs.record_report(self.run_id, {"epoch": run.epoch, "verified": True, "disk_serial": "DISK-1", "error": None})
        if event == "proof" and m.os == "new-os":
            proof = {"boot_id": "boot-new", "root_disk_serial": m.proof_serial, "ssh_host_keys": ["ssh-ed25519 A"], "password_usable": True}
            store.runs.record_proof(self.run_id, proof)

    def journal(self, **how) -> Journal:
        return Journal(self.run_id, self.inbox, self.machine_turn, **how)

    def play(self, journal: Journal) -> str:
        return asyncio.run(reinstall(journal, self.effects))

    def play_another(self) -> str:
        """The next reinstall of the same server."""
        self.admit()
        return self.play(self.journal())

    def state(self):
        return self.store.servers.find_instance(self.credential.project_id, self.instance.id)


@pytest.fixture
def world(tmp_path, database_url):
    made = World(tmp_path, url=database_url)
    yield made
    made.store.close()


def discovered_steps(tmp_path, **prepare) -> list[str]:
    made = World(tmp_path)
    for name, value in prepare.items():
        setattr(made.machine, name, value)
    journal = made.journal()
    made.play(journal)
    return journal.steps


def test_the_new_os_runs_and_the_state_is_pending_meanwhile(world):
    assert world.state().state is InstanceState.PENDING
    assert world.play(world.journal()) == "proved"
    after = world.state()
    assert (after.state, after.image_id, after.ssh_host_keys) == (InstanceState.RUNNING, world.image.id, ("ssh-ed25519 A",))
    assert (world.machine.os, world.machine.media, world.machine.override) == ("new-os", "", False)


def test_each_step_run_twice_changes_nothing(world):
    assert world.play(world.journal(twice=True)) == "proved"
    assert (world.machine.os, world.state().state) == ("new-os", InstanceState.RUNNING)


def test_killed_after_each_step_it_goes_on_to_the_same_end(tmp_path):
    steps = discovered_steps(tmp_path / "look") if (tmp_path / "look").mkdir() is None else []
    assert len(steps) >= 8
    for number, step in enumerate(steps):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = World(folder)
        journal = made.journal(crash_after=step)
        with pytest.raises(Crash):
            made.play(journal)
        assert made.play(journal.again()) == "proved", step
        assert (made.machine.os, made.state().state) == ("new-os", InstanceState.RUNNING), step


BEFORE_THE_LINE = ["probe", "check_media", "insert_media", "boot_from_media_once"]


@pytest.mark.parametrize("call", BEFORE_THE_LINE)
def test_a_bmc_that_fails_for_good_before_the_line_leaves_the_old_os_running(world, call):
    world.machine.refuses = {call}
    assert world.play(world.journal()) == "returned"
    after = world.state()
    assert (after.state, after.operation_state.value) == (InstanceState.RUNNING, "reinstall-failed")
    assert (world.machine.os, world.machine.disk, world.machine.media) == ("old-os", "old-os", "")
    assert after.error["code"].startswith("Repave.2")


@pytest.mark.parametrize("call", ["insert_media", "boot_from_media_once", "power_on"])
def test_what_a_bmc_does_not_do_at_the_first_try_costs_no_run(world, call):
    world.machine.refuses_once = {call}
    assert world.play(world.journal()) == "proved"
    assert (world.machine.os, world.machine.media) == ("new-os", "")


@pytest.mark.parametrize(("refusal", "tries"), [("busy", 4), ("auth", 1)])
def test_only_a_refusal_that_may_pass_is_met_with_another_try(world, refusal, tries):
    world.machine.refuses, world.machine.refusal = {"insert_media"}, refusal
    assert world.play(world.journal()) == "returned"
    assert world.machine.actions.count("insert_media") == tries


def test_an_os_that_still_runs_is_not_cut_by_the_return(world):
    world.machine.refuses = {"power_off"}
    assert world.play(world.journal()) == "returned"
    assert (world.state().state, world.machine.os, world.machine.power) == (InstanceState.RUNNING, "old-os", Power.ON)
    assert world.machine.actions.count("power_off") == 1


def test_a_bmc_that_takes_nothing_back_ends_in_error_with_the_disk_untouched(world):
    world.machine.refuses = {"insert_media", "eject_media"}
    assert world.play(world.journal()) == "return-failed"
    after = world.state()
    assert (after.state, world.machine.disk, after.error["untouched"]) == (InstanceState.ERROR, "old-os", "the root disk was not written")


def test_a_bmc_that_fails_after_the_write_does_not_make_the_disk_unverified(world):
    world.machine.refuses = {"eject_media"}
    assert world.play(world.journal()) == "unproved"
    assert world.state().error["untouched"] == "data disks; the image on the root disk is verified"


def test_a_run_that_slept_past_its_deadline_powers_nothing_off(world):
    world.effects.store.now = lambda: datetime.now(UTC) + timedelta(days=1)
    assert world.play(world.journal()) == "returned"
    assert world.machine.actions == []


def test_a_stop_that_began_is_not_overtaken_by_a_late_report(world):
    world.machine.silent = {"report"}
    world.play(world.journal())
    report = {"epoch": 1, "verified": True, "disk_serial": "DISK-1", "error": None}
    assert not world.store.runs.record_report(world.run_id, report)
    assert world.store.runs.get_run(world.run_id).verified_at is None


def test_a_proof_that_came_while_unproved_was_written_down_counts(world):
    world.machine.silent = {"proof"}
    proof = {"boot_id": "boot-new", "root_disk_serial": "DISK-1", "ssh_host_keys": [], "password_usable": True}
    world.play(world.journal())
    world.store.runs.record_proof(world.run_id, proof)
    world.effects.end(world.run_id, Ending.UNPROVED, None)  # the process died after the ending was written, and the step is done again
    assert world.state().state is InstanceState.RUNNING


@pytest.mark.parametrize("event", ["agent-ready", "written"])
def test_a_machine_that_never_speaks_before_the_line_gets_its_old_os_back(world, event):
    world.machine.silent = {event}
    assert world.play(world.journal()) == "returned"
    assert (world.state().state, world.machine.os, world.machine.disk, world.machine.media) == (InstanceState.RUNNING, "old-os", "old-os", "")


def test_an_agent_that_falls_silent_after_the_line_ends_in_error_powered_off(world):
    world.machine.silent = {"report"}
    assert world.play(world.journal()) == "write-failed"
    assert (world.state().state, world.machine.power, world.machine.media) == (InstanceState.ERROR, Power.OFF, "")


def test_no_proof_is_error_with_the_server_left_on(world):
    world.machine.silent = {"proof"}
    assert world.play(world.journal()) == "unproved"
    assert (world.state().state, world.machine.power, world.machine.os) == (InstanceState.ERROR, Power.ON, "new-os")
    assert world.state().error["code"] == "Repave.5101"


def test_a_proof_from_another_disk_is_never_running(world):
    world.machine.proof_serial = "DISK-2"
    assert world.play(world.journal()) == "write-failed"
    assert (world.state().state, world.machine.power) == (InstanceState.ERROR, Power.OFF)


def test_a_blank_server_that_fails_before_the_line_is_off_and_error_again(tmp_path):
    made = World(tmp_path, blank=True)
    made.machine.silent = {"agent-ready"}
    assert made.play(made.journal()) == "returned"
    assert (made.state().state, made.machine.power) == (InstanceState.ERROR, Power.OFF)


def test_a_damaged_image_is_found_before_any_power_action(world):
    chunk = next((world.folder / "images").rglob("chunks/*/*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert world.play(world.journal()) == "returned"
    assert world.state().error["code"] == "Repave.4102"
    assert world.machine.actions == []


def test_an_image_that_another_run_met_damaged_is_looked_at_again_before_the_line_until_it_is_whole(world):
    chunk = next((world.folder / "images").rglob("chunks/*/*"))
    good, journal = chunk.read_bytes(), world.journal(crash_after="boot-ramdisk-1")
    with pytest.raises(Crash):
        world.play(journal)
    chunk.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    world.store.images.record_damage(world.image, "another run's word")
    assert world.play(journal.again()) == "returned"
    assert (world.state().error["code"], world.machine.os) == ("Repave.4102", "old-os")
    chunk.write_bytes(good)
    assert world.play_another() == "proved"
    kinds = [e.type for e in world.store.events.list_events(world.credential.project_id) if e.type.startswith("image.")]
    assert kinds == ["image.added", "image.doubted", "image.whole"]


def test_another_server_behind_the_address_is_locked_until_an_operator_has_looked(world):
    world.machine.uuid = "uuid-of-another"
    assert world.play(world.journal()) == "returned"
    assert world.machine.actions == ["probe"]
    server = world.store.servers.get_server(world.instance.server_id)
    assert server.locked_by == "repave" and "another UUID" in server.lock_reason
    with pytest.raises(RequestError, match="another UUID") as refused:
        world.play_another()
    assert refused.value.slug == "locked"
    seen = {"serial": "SER-1", "uuid": "uuid-of-another", "model": "M1", "macs": ("52:54:00:00:00:01",)}
    world.store.servers.replace_server(server, seen, bmc_password=None, actor="op")
    assert world.play_another() == "proved"


def test_another_server_met_on_the_way_to_stop_locks_it_too(world):
    """After a write that failed: the half-written server could not be switched off, and nothing is sent to the other one."""
    world.machine.silent = {"report"}
    world.machine.when = lambda action: setattr(world.machine, "uuid", "uuid-of-another") if world.store.runs.get_run(world.run_id).crossed_at else None
    assert world.play(world.journal()) == "write-failed"
    assert world.machine.actions[-1] == "power_on"
    assert world.state().error["class"] == "wrong-server" and world.store.servers.get_server(world.instance.server_id).locked_by == "repave"


def test_a_serial_number_that_only_stands_for_one_tells_nobody_apart(world):
    world.store.servers.set_server(world.instance.server_id, serial="Default string")
    world.machine.serial = "00000000"
    assert world.play(world.journal()) == "proved"


@pytest.mark.parametrize(
    ("met_at", "ending"),
    [
        ("power_off", "return-failed"),
        ("insert_media", "return-failed"),
        ("power_on", "return-failed"),
        ("eject_media", "unproved"),
    ],
)
def test_an_address_that_changes_hands_within_a_run_lets_nothing_through_to_the_other_server(world, met_at, ending):
    """The bug: who answers was looked at before the first power action and never again, so a run of hours ended by cutting another server's power."""
    machine, sent = world.machine, []

    def when(action: str) -> None:
        if action == met_at and machine.uuid == "uuid-1":
            machine.uuid = "uuid-of-another"
            sent.extend(machine.actions)

    machine.when = when
    assert world.play(world.journal()) == ending
    assert machine.actions == sent
    error = world.state().error
    assert error["class"] == "wrong-server" and "another UUID" in error["cause"]
    assert world.store.servers.get_server(world.instance.server_id).locked_by == "repave"


@pytest.mark.parametrize(
    ("named", "places"),
    [
        ("media_url", {"media_urls": ("http://127.0.0.1:8472", "http://[::1]:8472")}),
        ("media_url", {"media_urls": ("http://0.0.0.0:8472",)}),
        ("agent_url", {"agent_url": "https://localhost:8471"}),
        ("chunks_url", {"chunks_url": "https://localhost:8473/chunks"}),
    ],
)
def test_a_server_elsewhere_is_not_powered_where_we_are_known_by_a_loopback_address(world, named, places):
    world.effects.places = dataclasses.replace(world.effects.places, **places)
    assert world.play(world.journal()) == "returned"
    error = world.state().error
    assert error["class"] == "loopback-address" and error["cause"].startswith(named)
    assert world.machine.actions == []


def test_who_commits_first_wins_at_the_line(world):
    world.machine.silent = {"written"}
    world.play(world.journal())
    run = world.store.runs.get_run(world.run_id)
    assert not world.store.runs.record_crossing(world.run_id, run.plan["plan_id"])


def test_no_secret_stays_after_the_end_and_none_was_ever_in_clear(world):
    world.play(world.journal())
    kept = b"".join(p.read_bytes() for p in world.folder.rglob("*") if p.is_file())
    assert PASSWORD.encode() not in kept
    assert b"Canary-bmc-password" not in kept
    assert b"$6$" not in kept
    with pytest.raises(RunFailed):
        world.store.runs.get_run_secret(world.run_id)
