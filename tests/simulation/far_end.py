"""Simulated servers: disks, firmware, power, BMC, the agent in the ramdisk, and the systems that boot. Nothing in here is the product's but the
shapes of its messages and the agent's rule for the planned disk. The agent's order is agent/main.py's, the write order agent/writer.py's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trouble import Trouble
from virtual_time import Life, VirtualTime

from repave.agent import protocol
from repave.agent.main import find_planned_disk
from repave.bmc import BmcFacts, Power
from repave.errors import BmcError, RepaveError, RunFailed

if TYPE_CHECKING:
    from wire import Wire

WINDOWS = 4
GIB = 2**30
PATIENCE_S = 300.0
RENEW_S = 20.0  # the real agent's is 3 s; fewer requests, the same lease
HOME_RETRY_S, HOME_GIVE_UP_S = 15.0, 600.0
CHANGES = ("power_off", "insert_media", "boot_from_media_once", "power_on", "eject_media", "boot_from_disk", "withdraw_media")


class Refused(Exception):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(str(status))


class Unreachable(Exception):
    pass


class LocalBoot(Exception):
    pass


@dataclass
class Write:
    """One write that reached a disk."""

    at: float
    boot_id: str
    place: str
    what: str


class SimDisk:
    """A disk by what firmware looks at: LBA 0, the tables, the data. Each place holds whose it is, "" = zeros."""

    def __init__(self, serial: str, holds: str, *, size_bytes: int = 100 * GIB) -> None:
        self.serial, self.size_bytes = serial, size_bytes
        self.places = {name: holds for name in ("lba0", "table", "backup", *(f"body-{i}" for i in range(WINDOWS)))}
        self.config: bytes | None = None
        self.writes: list[Write] = []

    def content(self) -> tuple[str, ...]:
        return tuple(self.places.values())

    def boots(self) -> str:
        """What firmware boots from it (trust.md, finding 1): nothing without LBA 0; with it the primary table, else the backup."""
        if not self.places["lba0"]:
            return ""
        table = self.places["table"] or self.places["backup"]
        if not table:
            return ""
        body = {self.places[f"body-{i}"] for i in range(WINDOWS)}
        return table if body == {table} and self.places["lba0"] == table else "half-written"

    def write(self, at: float, boot_id: str, place: str, what: str) -> None:
        self.places[place] = what
        self.writes.append(Write(at, boot_id, place, what))


@dataclass
class Call:
    """A call that reached a BMC."""

    at: float
    action: str
    live: frozenset[str]  # ids of the runs that had begun and not ended at that time, on this server
    run_id: str  # for which it was made
    executor_id: str  # by which worker


@dataclass
class Boot:
    """One start of the machine."""

    at: float
    boot_id: str
    what: str = ""  # "ramdisk", a system's name, "nothing"


@dataclass
class HomeCall:
    """A call home that the new system really made."""

    at: float
    run_id: str
    system: str
    serial: str
    boot_id: str


@dataclass
class Machine:
    """One server with everything in its case."""

    time: VirtualTime
    name: str
    wire: Wire
    root: SimDisk
    data: SimDisk
    on: bool = True
    media: str = ""
    override: bool = False
    runs_now: str = ""  # the system that runs: its name, "ramdisk" or ""
    life: Life = field(default_factory=lambda: Life("power"))
    trouble: Trouble = field(default_factory=Trouble)
    calls: list[Call] = field(default_factory=list)
    boots: list[Boot] = field(default_factory=list)
    homes: list[HomeCall] = field(default_factory=list)
    plans: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)  # served: time, boot id, plan
    refused_logins: Counter[str] = field(default_factory=Counter)  # by run
    horrors: list[str] = field(default_factory=list)  # what must never be seen, seen the moment it happens
    live_runs: Callable[[], frozenset[str]] = lambda: frozenset()
    is_stale: Callable[[str], bool] = lambda executor_id: False

    @property
    def serial(self) -> str:
        return f"SER-{self.name}"

    # ---- power and firmware ----

    def start(self) -> None:
        if not self.on:
            self.on, self.life = True, Life(f"{self.name} on")
            self.time.note(f"{self.name} power on")
            self.time.spawn(f"{self.name} boot", self._firmware, life=self.life)

    def cut(self) -> None:
        if self.on:
            self.on, self.runs_now, self.life.ended = False, "", True
            self.time.note(f"{self.name} power off")

    def reset(self) -> None:
        """Off and on at once, by a third party or by itself."""
        self.cut()
        self.start()

    def _firmware(self) -> None:
        boot = Boot(self.time.now, f"boot-{self.name}-{len(self.boots)}")
        self.boots.append(boot)
        self.time.sleep(self.time.rng.uniform(20, 90))
        if self.trouble.has("slow-boot") and self.trouble.fire("slow-boot"):  # a firmware update is applied
            self.time.sleep(self.trouble.get("slow-boot")["slow_s"])
        from_cd = self.override and bool(self.media)
        if self.override and self.trouble.has("override-ignored") and self.trouble.fire("override-ignored"):
            from_cd = False
        self.override = False
        if from_cd:
            slot = self._read_media()
            if slot is not None:
                return self._ramdisk(boot, slot)
        return self.boot_disk(boot)

    def boot_disk(self, boot: Boot) -> None:
        system, disk = self.root.boots(), self.root
        if self.trouble.has("other-disk") and self.root.config is not None and system and self.trouble.fire("other-disk"):
            system, disk = "other-os", self.data
        if not system and self.media:  # the last in the boot order
            slot = self._read_media()
            if slot is not None:
                return self._ramdisk(boot, slot)
        boot.what = self.runs_now = system or "nothing"
        self.time.note(f"{self.name} boots {boot.what}")
        if system == "half-written":
            self.horrors.append(f"I3 {self.name} booted a half-written disk at {self.time.now:.0f} s")
        if system and self.root.config is not None:
            self._first_boot(boot, system, disk)
        return None

    def _read_media(self) -> protocol.Slot | None:
        """The slot on this run's media; None where they are inert, can not be read, or the ramdisk hangs."""
        if self.trouble.has("media-fails") and self.trouble.fire("media-fails"):
            self.time.sleep(60)
            return None
        for _ in range(5):
            try:
                return self.wire.read_media(self, self.media)
            except Unreachable:
                self.time.sleep(10)
        return None

    # ---- the agent ----

    def _ramdisk(self, boot: Boot, slot: protocol.Slot) -> None:
        boot.what = self.runs_now = "ramdisk"
        self.time.note(f"{self.name} boots ramdisk")
        self.time.sleep(self.time.rng.uniform(10, 40))
        if self.trouble.has("no-hello") and self.trouble.fire("no-hello"):
            return
        for kind in ("clone", "thief"):
            if self.trouble.has(kind):
                self._second_agent(kind, slot)
        Agent(self, boot, slot).run()

    def _second_agent(self, kind: str, slot: protocol.Slot) -> None:
        """Another machine with the same media: one that says it is this one, or one that says who it is."""
        self.trouble.fire(kind)
        twin = Machine(self.time, self.name if kind == "clone" else f"{self.name}-thief", self.wire, *self._twin_disks(), life=Life("twin"))
        boot = Boot(self.time.now, f"boot-{self.name}-{kind}")
        twin.horrors = self.horrors
        delay = self.trouble.get(kind)["after_s"]

        def run() -> None:
            Agent(twin, boot, slot, guest=True).run()
            if twin.root.writes or twin.data.writes:
                self.horrors.append(f"I1 a {kind} of {self.name} wrote to its disk")

        self.time.spawn(f"{self.name} {kind}", run, after=delay)
        if delay == 0.0:
            self.time.sleep(3)

    def _twin_disks(self) -> tuple[SimDisk, SimDisk]:
        return SimDisk(f"{self.root.serial}-twin", "other-os"), SimDisk(f"{self.data.serial}-twin", "")

    def inventory(self, boot: Boot) -> dict[str, Any]:
        disks = []
        for path, disk in (("/dev/sda", self.root), ("/dev/sdb", self.data)):
            disks.append({
                "path": path, "size_bytes": disk.size_bytes, "sector_bytes": 512, "serial": disk.serial, "wwn": "", "model": "M", "transport": "sata",
                "removable": False, "read_only": False, "rotational": False, "virtual": False, "hctl": "", "by_path": "", "boots": disk is self.root,
            })  # fmt: skip
        return {
            "boot_id": boot.boot_id, "serial": self.serial, "uuid": f"uuid-{self.name}", "macs": [f"mac-{self.name}"], "arch": "amd64",
            "firmware": "uefi", "memory_bytes": 8 * GIB, "disks": disks, "uptime_s": 1.0,
        }  # fmt: skip

    # ---- the new system ----

    def _first_boot(self, boot: Boot, system: str, disk: SimDisk) -> None:
        """As home_call.py: the drive is erased before the call home."""
        self.time.sleep(self.time.rng.uniform(20, 60))
        told = json.loads(self.root.config or b"{}")
        self.root.config = None
        self.time.note(f"{self.name} first boot of {system}")
        if self.trouble.has("no-proof") and self.trouble.fire("no-proof"):
            return
        if self.trouble.has("late-proof") and self.trouble.fire("late-proof"):
            self.time.sleep(self.trouble.get("late-proof")["late_s"])
        usable = not (self.trouble.has("password-unusable") and self.trouble.fire("password-unusable"))
        proof = {"boot_id": boot.boot_id, "root_disk_serial": disk.serial, "ssh_host_keys": [f"ssh-ed25519 {boot.boot_id}"], "password_usable": usable}
        self.homes.append(HomeCall(self.time.now, told["instance_id"], system, disk.serial, boot.boot_id))
        end = self.time.now + HOME_GIVE_UP_S
        while self.time.now < end:
            try:
                if self.trouble.once("home-lost"):
                    self.time.sleep(10)
                else:
                    self.wire.call(self, told["nonce"], "POST", f"/home/v1/{told['instance_id']}", proof)
                    return
            except Refused as refused:
                if refused.status == 410:
                    return
            except Unreachable:
                pass
            self.time.sleep(HOME_RETRY_S)


class Agent:
    """One boot of one run, as agent/main.py."""

    def __init__(self, machine: Machine, boot: Boot, slot: protocol.Slot, *, guest: bool = False) -> None:
        self.m, self.boot, self.slot, self.time = machine, boot, slot, machine.time
        self.guest = guest  # runs on another machine: it has no power of its own here
        self.token, self.chunk_token, self.epoch, self.writing = slot.token, "", 0, False
        self.lease_until, self.lease_ended, self.done = 0.0, False, False

    def run(self) -> None:
        plan = None
        try:
            self._insist("POST", "/agent/v1/hello", self.m.inventory(self.boot), then=lambda answer: setattr(self, "token", answer["session"]))
            if self.guest and self.boot.boot_id.endswith("clone"):
                return  # a forged identity can not be told from the real one: it only spends the token
            self._stage("hello")
            plan = self._wait_for_plan()
            self._stage("plan")
            inventory = self.m.inventory(self.boot)
            if self.m.trouble.has("disk-swapped") and self.m.trouble.fire("disk-swapped"):
                inventory["disks"][0]["serial"] = "SWAPPED"
            disk = find_planned_disk(protocol.parse_inventory(inventory), plan)
            manifest = self._insist("GET", "/agent/v1/manifest")
            if hashlib.sha256(manifest).hexdigest() != plan.manifest_sha256:
                raise RunFailed("image-damaged")
            self._stage("manifest")
            if plan.rehearse:
                self._fetch(json.loads(manifest)["chunks"][0][0], plan)
                return self._end(protocol.Report(self.epoch, False, disk.serial, rehearsal={"chunks": WINDOWS, "fetched_bytes": 1}))
            self._cross(plan)
            self._write(plan, next(d for d in (self.m.root, self.m.data) if d.serial == disk.serial), json.loads(manifest))
            self._end(protocol.Report(self.epoch, True, disk.serial))
        except (LocalBoot, Refused, Unreachable):
            if self.writing:
                self._end(protocol.Report(self.epoch, False, plan.disk_serial if plan else "", error=RunFailed("agent-failed").as_json()))
            else:
                self._boot_local()
        except RepaveError as error:
            self._end(protocol.Report(self.epoch, False, plan.disk_serial if plan else "", error=error.as_json()))

    def _wait_for_plan(self) -> protocol.Plan:
        pause = 2.0
        while True:
            plan = self._insist("GET", "/agent/v1/plan")
            if plan is not None:
                return protocol.Plan(**plan)
            self.time.sleep(pause)
            pause = min(pause * 2, 30)

    def _cross(self, plan: protocol.Plan) -> None:
        self._stage("cross")
        body = {"plan_id": plan.plan_id, "serial": plan.disk_serial, "wwn": plan.disk_wwn}
        until = self.time.now + PATIENCE_S
        while True:
            asked_at = self.time.now
            try:
                answer = self._call("POST", "/agent/v1/cross", body)
                break
            except Unreachable:
                if self.time.now > until:
                    raise LocalBoot from None
                self.time.sleep(5)
        self.epoch, self.lease_until = answer["epoch"], asked_at + answer["lease_s"]
        self.time.note(f"{self.m.name} crossed")
        self._stage("crossed")

    def _write(self, plan: protocol.Plan, disk: SimDisk, manifest: dict[str, Any]) -> None:
        self.time.spawn(f"{self.m.name} progress", self._renew, life=self.m.life)
        try:
            drive = self._insist("GET", "/agent/v1/config-drive", lease=True)
            if hashlib.sha256(drive).hexdigest() != plan.config_drive_sha256:
                raise RunFailed("agent-failed", "The config drive has another digest.")
            self.writing = True
            image = plan.manifest_sha256[:12]
            for place in ("lba0", "table", "backup"):
                self._put(disk, "clear", place, "")
            disk.config = None
            for number, chunk in enumerate(manifest["chunks"]):
                if self.m.trouble.has("chunk-damaged") and number == 2 and self.m.trouble.fire("chunk-damaged"):
                    raise RunFailed("image-damaged", "Chunk 2 came three times with another digest.")
                if number == 0:  # one is really fetched: the others would ask the same
                    self._fetch(chunk[0], plan, lease=True)
                self.time.sleep(self.time.rng.uniform(5, 30))
                self._put(disk, f"body-{number}", f"body-{number}", image)
            self._stage_write("config-drive")
            disk.config = drive
            self._put(disk, "config-drive", "backup", image)
            self._stage_write("read-back")
            self.time.sleep(5)
            self._put(disk, "table", "table", image)
            self._put(disk, "lba0", "lba0", image)
        finally:
            self.done = True

    def _put(self, disk: SimDisk, stage: str, place: str, what: str) -> None:
        self._stage_write(stage)
        self.m.time.sleep(0.2)
        if not self._lease_is_valid():
            raise RunFailed("stale-run")
        disk.write(self.time.now, self.boot.boot_id, place, what)
        if disk.boots() == "half-written":
            self.m.horrors.append(f"I3 {self.m.name}: {disk.serial} would boot half-written after {place}")

    def _stage_write(self, stage: str) -> None:
        self._stage(stage)
        if self.m.trouble.has("disk-error") and self.m.trouble.get("disk-error")["stage"] == stage and self.m.trouble.once("disk-error"):
            raise RunFailed("disk-write", "EIO")
        if not self._lease_is_valid():
            raise RunFailed("stale-run")

    def _renew(self) -> None:
        pause = RENEW_S
        while not self.done:
            self.time.sleep(pause)
            pause = RENEW_S
            if self.done:
                return
            asked_at = self.time.now
            try:
                answer = self._call("POST", "/agent/v1/progress", protocol.render(protocol.Progress(self.epoch, "write", 1, 2)))
                if self.time.now >= self.lease_until:
                    self.lease_ended = True
                self.lease_until = max(self.lease_until, asked_at + answer["lease_s"])
                self.chunk_token = answer["chunk_token"]
            except Refused:
                self.lease_ended = True
                return
            except Unreachable:
                pause = 3.0

    def _lease_is_valid(self) -> bool:
        return not self.lease_ended and self.time.now < self.lease_until

    def _end(self, report: protocol.Report) -> None:
        self._stage("report")
        then = "power-off" if self.writing else "boot-local"
        with contextlib.suppress(Refused, Unreachable):
            then = self._insist("POST", "/agent/v1/report", protocol.render(report)).get("then", then)
        if then == "boot-local" and not self.writing:
            self._boot_local()
        elif not self.guest:
            self.m.cut()
            self.time.leave()

    def _boot_local(self) -> None:
        if not self.guest:  # a boot of its own: a server without a system comes back to its media, for as long as they are in
            self.time.spawn(f"{self.m.name} boots on", lambda: self.m.boot_disk(self.boot), life=self.m.life, after=20)

    def _stage(self, stage: str) -> None:
        """Here the agent, or its whole machine, may die."""
        trouble = self.m.trouble
        if trouble.has("agent-dies") and trouble.get("agent-dies")["stage"] == stage and trouble.once("agent-dies"):
            self.done = True
            self.m.life.ended = True
            self.m.life = _next_life(self.m)
            self.time.leave()
        if trouble.has("agent-reboots") and trouble.get("agent-reboots")["stage"] == stage and trouble.once("agent-reboots"):
            self.m.reset()
            self.time.leave()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, token: str = "") -> Any:
        return self.m.wire.call(self.m, token or self.token, method, path, body, boot_id=self.boot.boot_id)

    def _fetch(self, sha256: str, plan: protocol.Plan, *, lease: bool = False) -> None:
        self._insist("GET", f"/chunks/{sha256[:2]}/{sha256}", lease=lease, token=self.chunk_token or plan.chunk_token)

    def _insist(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, lease: bool = False, then: Callable[[Any], None] | None = None, token: str = ""
    ) -> Any:
        until, tries = self.time.now + PATIENCE_S, 0
        while True:
            try:
                answer = self._call(method, path, body, token)
                if then is not None:
                    then(answer)
                return answer
            except Unreachable:
                self.time.sleep((0.5, 1.0, 2.0, 5.0)[min(tries, 3)])
                tries += 1
                if not (self._lease_is_valid() if lease else self.time.now < until):
                    raise


def _next_life(machine: Machine) -> Life:
    """The agent is gone, the machine stays on."""
    return Life(f"{machine.name} hangs")


class SimBmc:
    """The `Bmc` protocol: each call asks for a state and reads it back, as the real driver does; so most lies become errors."""

    def __init__(
        self, machine: Machine, at: Callable[[str], None], *, before_write: Callable[[], None] = lambda: None,
        recognize: Callable[[str, str], None] = lambda serial, uuid: None, executor_id: str = "",
    ) -> None:  # fmt: skip
        """As the real driver: `recognize` is asked when the system has been read, `before_write` when only the sending is left."""
        self.m, self.at, self.before_write, self.recognize, self.executor_id = machine, at, before_write, recognize, executor_id

    def _do(self, action: str, effect: Callable[[], Any]) -> Any:
        m, t, time = self.m, self.m.trouble, self.m.time
        self.at(f"bmc {action} before")
        time.sleep(60.0 if t.has("bmc-slow") and t.fire("bmc-slow") else time.rng.uniform(0.2, 2.0))
        away = t.faults.get("bmc-away")
        if away and away["from"] <= time.now < away["until"] and t.fire("bmc-away"):
            time.sleep(10)
            raise BmcError("unreachable", action)
        if t.has("login-refused") and ("login-refused" in t.fired or t.get("login-refused")["action"] == action):
            t.fire("login-refused")  # from here on: the password was changed
            m.refused_logins[m.time.about] += 1
            raise BmcError("auth", action)
        if t.has("other-machine") and ("other-machine" in t.fired or t.get("other-machine").get("action", "probe") == action):
            t.fire("other-machine")  # from here on: the address is another's
        self.recognize("SER-another" if "other-machine" in t.fired else m.serial, f"uuid-{m.name}")
        if action in CHANGES:
            self.before_write()
        if t.has("bmc-refuses") and t.get("bmc-refuses")["action"] == action and t.fire("bmc-refuses"):
            raise BmcError("power_failed" if "power" in action else "media_rejected", action)
        for kind in ("bmc-busy", "bmc-lost-request", "bmc-lost-answer", "bmc-late"):
            if t.has(kind) and t.get(kind)["action"] == action and t.once(kind):
                if kind == "bmc-lost-answer":
                    self._effect(action, effect)
                if kind == "bmc-late":
                    self._log(action)
                    time.spawn(f"{m.name} late {action}", lambda: self._too_late(effect), after=t.get(kind)["late_s"])
                time.sleep(1 if kind == "bmc-busy" else 30)
                raise BmcError("busy" if kind == "bmc-busy" else "timeout", action)
        result = self._effect(action, effect)
        self.at(f"bmc {action} after")
        return result

    def _too_late(self, effect: Callable[[], Any]) -> None:
        with contextlib.suppress(BmcError):  # nobody waits for it any more
            effect()

    def _log(self, action: str) -> None:
        if action in CHANGES:
            if self.m.is_stale(self.executor_id):
                self.m.horrors.append(f"I16 {self.m.name}: {action} at {self.m.time.now:.0f} s by {self.executor_id}, whose lease had passed")
            if "other-machine" in self.m.trouble.fired:
                self.m.horrors.append(f"I11 {action} at {self.m.time.now:.0f} s went to another machine than {self.m.name}")
            self.m.calls.append(Call(self.m.time.now, action, self.m.live_runs(), self.m.time.about, self.executor_id))
            self.m.time.note(f"{self.m.name} bmc {action}")

    def _effect(self, action: str, effect: Callable[[], Any]) -> Any:
        self._log(action)
        return effect()

    def probe(self) -> BmcFacts:
        power = Power.ON if self.m.on else Power.OFF
        return self._do("probe", lambda: BmcFacts("/s/1", "Lab", "M1", self.m.serial, f"uuid-{self.m.name}", power, ("/cd",), ("Cd", "Hdd")))

    def check_media(self, urls: Sequence[str]) -> None:
        self._do("check_media", lambda: None)

    def read_power(self) -> Power:
        return Power.ON if self.m.on else Power.OFF

    def power_on(self) -> None:
        self._do("power_on", self.m.start)

    def power_off(self, *, graceful_s: float = 0) -> bool:
        return bool(self._do("power_off", lambda: self._power_off(graceful_s)))

    def _power_off(self, graceful_s: float) -> bool:
        m = self.m
        if not m.on:
            return False
        if graceful_s:
            deaf = m.trouble.has("graceful-ignored") and m.trouble.fire("graceful-ignored")
            if not deaf and m.runs_now not in ("", "nothing", "ramdisk"):
                shuts_down_s = m.time.rng.uniform(3, 20)
                m.time.spawn(f"{m.name} shuts down", m.cut, life=m.life, after=shuts_down_s)  # by itself: whoever asked may be gone
                m.time.sleep(shuts_down_s + 0.1)
                if not m.on:
                    return False
            else:
                m.time.sleep(graceful_s)
            if not m.time.about:
                return False  # this request came late: nobody is there to force it
            self.before_write()  # to force it is another request
            self._log("power_off")
        if m.trouble.once("off-is-late"):
            m.time.spawn(f"{m.name} late off", m.cut, after=4)
        else:
            m.cut()
        return True

    def wait_for_off(self, within_s: float) -> bool:
        def wait() -> bool:
            end = self.m.time.now + within_s
            while self.m.on and self.m.time.now < end:
                self.m.time.sleep(1)
            return not self.m.on

        return bool(self._do("wait_for_off", wait))

    def insert_media(self, urls: Sequence[str]) -> str:
        def insert() -> str:
            if self.m.trouble.once("insert-empty"):
                raise BmcError("media_not_inserted", "The slot is empty.")
            self.m.media = urls[0]
            return urls[0]

        return str(self._do("insert_media", insert))

    def eject_media(self) -> None:
        self._do("eject_media", lambda: setattr(self.m, "media", ""))

    def withdraw_media(self, folder: str) -> bool:
        def withdraw() -> bool:
            ours = folder in self.m.media
            if ours:
                self.m.media, self.m.override = "", False
            return ours

        return bool(self._do("withdraw_media", withdraw))

    def boot_from_media_once(self) -> None:
        self._do("boot_from_media_once", lambda: setattr(self.m, "override", True))

    def boot_from_disk(self) -> None:
        self._do("boot_from_disk", lambda: setattr(self.m, "override", False))
