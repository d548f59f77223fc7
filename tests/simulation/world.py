"""One world from one seed: six servers, two rounds of reinstalls with what goes wrong in them, and a client that polls with its own clock.

Five servers are reinstalled in each round; the sixth is nobody's business and must stay as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import acts
import far_end
import trouble
import zstandard
from acts import Asked
from durable import START, Disk, scratch_folder
from far_end import GIB, Machine, SimDisk
from past import give_past
from service import HASH, Service
from trouble import Trouble
from virtual_time import Stuck, VirtualTime
from wire import Answer, Wire
from worker import TIMES, LeaseClock

from repave.domain.model import Image, Instance, Role, Server
from repave.domain.waves import Limits
from repave.images.manifest import Chunk, Manifest
from repave.images.store import ImageStore
from repave.store import database
from repave.workflow import effects, lease
from repave.workflow.fleet import NO_LIMITS

POLL_S = 20.0
ACTIVE, ROUNDS = 5, 2
ROUND_S = 24 * 3600.0  # nothing may last so long: five runs one after the other, 3.5 h each and the pauses of its ending
SETTLE_S = 1500.0  # after a round: late proofs, systems that start


@dataclass
class Seen:
    """What a client has seen of one instance: (its clock, state, operation state, error)."""

    polls: list[tuple[float, str, str | None, dict[str, Any] | None]] = field(default_factory=list)


@dataclass
class Round:
    """One PUT and what the world was before it."""

    began: float
    ids: list[str]
    answer: Answer
    troubles: dict[str, Trouble]
    disks: dict[str, tuple[str, ...]]
    found: dict[str, str]
    drives: dict[str, tuple[str, bool]]  # media and override
    asked: Asked
    batch_id: str = ""
    ended: dict[str, float] = field(default_factory=dict)  # machine -> when the client saw the end
    after: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each machine was when the world had settled
    crashes: int = 0
    busy: int = 0
    stops: int = 0  # times that a worker was stopped and went on


class _Entropy:
    """Ids are made of the seed, so that rows sort alike each time."""

    def __init__(self, rng: random.Random) -> None:
        self.randbits = rng.getrandbits
        import secrets

        self.token_hex, self.token_urlsafe = secrets.token_hex, secrets.token_urlsafe


class _Clock:
    def __init__(self, time: VirtualTime) -> None:
        self._time = time

    def time_ns(self) -> int:
        return int((START.timestamp() + self._time.now) * 1e9)


def render_drive(first_boot: Any) -> bytes:
    """Stands for firstboot's ISO, which takes 3 ms to make: what the new system reads of it, as JSON."""
    told = asdict(first_boot)
    return json.dumps({name: told[name] for name in ("instance_id", "nonce", "home_url", "password_hash")}).encode()


@functools.cache
def shared_image() -> tuple[ImageStore, Manifest, str]:
    folder = scratch_folder() / f"repave-simulation-{os.getuid()}"  # 5 KB, always the same, shared by all processes: nothing is left to remove
    images = ImageStore(folder)
    chunks = []
    for number in range(far_end.WINDOWS):
        raw = bytes([number + 1]) * 65536
        packed = zstandard.ZstdCompressor().compress(raw)
        digest = hashlib.sha256(packed).hexdigest()
        images.write_chunk(digest, packed)
        chunks.append(Chunk(digest, len(packed), hashlib.sha256(raw).hexdigest(), ((0, 65536),)))
    manifest = Manifest(65536 * far_end.WINDOWS, 512, "amd64", "uefi", tuple(chunks), 65536)
    return images, manifest, images.write_manifest(manifest)


class World:
    """`play` it once, then let observers look."""

    def __init__(self, seed: int, *, servers: int = ACTIVE + 1, blank_share: float = 0.15, workers: int = 1, limits: Limits = NO_LIMITS, past: int = 0) -> None:
        """`past`: how many runs of the same model the site has seen."""
        self.seed, self.past = seed, past
        self.time = VirtualTime(seed)
        database.secrets, database.time = _Entropy(random.Random(seed)), _Clock(self.time)  # type: ignore[assignment, attr-defined]
        lease.time = LeaseClock(self.time)  # type: ignore[attr-defined, assignment]
        effects.render_config_drive = render_drive  # type: ignore[attr-defined]
        self.disk = Disk(lambda: self.time.now)
        self.wire = Wire(self.time)
        images, manifest, digest = shared_image()
        store = self.disk.open_store()
        project = store.access.add_project("default")
        self.credential, _, _ = store.access.add_credential(project.id, "op", Role.OPERATOR)
        self.image = Image(database.new_id(), project.id, "img", "Linux", "amd64", "uefi", digest, manifest.size_bytes, 512, 1000, 1000, START)
        store.images.add_image(self.image)
        self.system = digest[:12]
        self.machines: dict[str, Machine] = {}
        self.instances: dict[str, Instance] = {}
        self.seen: dict[str, Seen] = {}
        self.rounds: list[Round] = []
        self.broken: list[str] = []  # what observers said while the world turned
        rng = self.time.rng
        for number in range(servers):
            name, blank = f"m{number}", rng.random() < blank_share
            server = Server(
                database.new_id(), name, project.id, f"https://bmc-{name}.invalid", "admin", "true", None, None, "Lab", "M1", f"SER-{name}",
                f"uuid-{name}", (f"mac-{name}",), "amd64", "uefi", f"r{number % 2}", str(number), {}, None, START,
            )  # fmt: skip
            self.instances[name] = store.servers.add_server(server, bmc_password="Canary-bmc", blank=blank)
            root, data = SimDisk(f"ROOT-{name}", "" if blank else "old-os"), SimDisk(f"DATA-{name}", "", size_bytes=50 * GIB)
            data.places["body-0"] = "precious"
            machine = Machine(self.time, name, self.wire, root, data, on=not blank, runs_now="" if blank else "old-os")
            machine.live_runs, machine.is_stale = functools.partial(self._live_runs, server.id), self._is_stale
            self.machines[name] = machine
            self.seen[name] = Seen()
        if past:
            give_past(store, server, self.image, past)
        self.service = self.wire.service = Service(self.time, self.disk, self.machines, images, workers=workers, limits=limits)
        for worker in self.service.workers:
            self.service.start(worker)

    def _live_runs(self, server_id: str) -> frozenset[str]:
        return frozenset(r[0] for r in self.disk.rows("SELECT id FROM runs WHERE server_id = ? AND ended_at IS NULL", server_id))

    def _is_stale(self, executor_id: str) -> bool:
        """Past its lease by the database's clock, or another one has its runs already."""
        row = self.disk.rows("SELECT beat_at_ms, reaped FROM workers WHERE executor_id = ?", executor_id)
        return len(self.service.workers) > 1 and (not row or bool(row[0][1]) or row[0][0] / 1000 + TIMES.lease_s < self.time.now)

    # ---- what happens ----

    def play(self, *, chance: float, rounds: int = ROUNDS) -> None:
        """The rounds, one after the other, and sometimes another try of what failed. `chance`: of trouble, for each reinstall."""
        rng, names = self.time.rng, list(self.machines)[:ACTIVE]
        self.service.yields = chance > 0
        for _ in range(rounds):
            asked = acts.draw(rng, names, may_cancel=chance > 0)
            self.play_round(names, {n: trouble.draw(rng, chance=chance, now=self.time.now) for n in names}, asked=asked, stormy=chance > 0)
        last = self.rounds[-1]
        if failed := self._list_failed(last) if rng.random() < 0.4 else []:
            troubles = {n: trouble.draw(rng, chance=chance / 2, now=self.time.now) for n in failed}
            self.play_round(failed, troubles, asked=Asked(retry=last.batch_id), stormy=chance > 0)

    def _list_failed(self, this: Round) -> list[str]:
        """The servers whose run in this round left no proved new system: what a retry must try, and nothing else."""
        names = {i.id: n for n, i in self.instances.items()}
        rows = self.disk.rows("SELECT instance_id, outcome FROM runs WHERE batch_id = ? ORDER BY number", this.batch_id)
        return [names[instance_id] for instance_id, outcome in rows if outcome not in (None, "proved", "late-proof")]

    def play_round(self, names: list[str], troubles: dict[str, Trouble], *, asked: Asked | None = None, stormy: bool = False, settles: bool = True) -> Round:
        """`settles`: the world is left to come to rest, and what it then is can be judged."""
        rng, now = self.time.rng, self.time.now
        ids = [self.instances[n].id for n in names]
        disks = {n: m.root.content() for n, m in self.machines.items()}
        found = {n: m.runs_now for n, m in self.machines.items()}
        drives = {n: (m.media, m.override) for n, m in self.machines.items()}
        this = Round(now, ids, Answer(), troubles, disks, found, drives, asked or Asked())
        self.rounds.append(this)
        lives, refusals = self.service.lives, self.service.refusals
        for name in names:
            machine = self.machines[name]
            machine.trouble = troubles[name]
            for kind in ("power-cut", "reset"):
                if machine.trouble.has(kind):
                    self.time.spawn(f"{name} {kind}", lambda m=machine, k=kind: self._third_party(m, k), after=machine.trouble.get(kind)["at"] - now)
        if stormy:
            self._storm(this, rng)
        self.time.spawn("client", lambda: self._client(this, names))
        self.time.run(lambda: len(this.ended) == len(names) or self._refused(this), until=now + ROUND_S)
        if not settles:
            return this
        settled = self.time.now + SETTLE_S + (1300 if any(t.has("late-proof") for t in troubles.values()) else 0)
        self.time.spawn("settled", lambda: None, after=settled - self.time.now)
        self.time.run(lambda: self.time.now >= settled, until=settled + 1)
        self._poll(names)
        for name in names:
            m = self.machines[name]
            this.crashes, this.busy = self.service.lives - lives, self.service.refusals - refusals
            this.after[name] = {"on": m.on, "runs": m.runs_now, "media": m.media, "override": m.override, "disk": m.root.content(), "config": m.root.config}
        return this

    def _storm(self, this: Round, rng: random.Random) -> None:
        """The service dies and the database is busy, at times of the seed's choosing."""
        if rng.random() < 0.35:
            for _ in range(rng.choice((1, 1, 2, 3, 5))):
                self.time.spawn(
                    "crash", lambda: self.service.die(rng.choice(self.service.workers), rng.choice((1, 5, 30, 200, 900))), after=rng.uniform(0, 900)
                )
        if len(self.service.workers) > 1 and rng.random() < 0.6:
            for _ in range(rng.choice((1, 1, 2, 3))):
                self.time.spawn("stop", lambda: self._stop_one(this), after=rng.uniform(0, 900))
        if rng.random() < 0.3:
            self.service.crashes.at.append(f"commit {rng.choice(('before', 'after'))} #{self.service.crashes.seen['commit before'] + rng.randint(1, 120)}")
        if rng.random() < 0.2:

            def busy() -> None:
                self.service.busy_until, self.service.busy_count = self.time.now + rng.choice((2, 10, 40)), rng.choice((3, 20, 100))

            self.time.spawn("busy", busy, after=rng.uniform(0, 600))

    def _stop_one(self, this: Round) -> None:
        this.stops += 1
        rng = self.time.rng
        seconds = rng.choice((60, 170, 200, 230, 300, 700))
        if rng.random() < 0.5:
            self.service.stop_in_call_s = seconds
        else:
            self.service.stop_for(rng.choice(self.service.workers), seconds)

    def _third_party(self, machine: Machine, kind: str) -> None:
        if machine.on and machine.trouble.has(kind):
            machine.trouble.fire(kind)
            machine.cut() if kind == "power-cut" else machine.reset()

    def _client(self, this: Round, names: list[str]) -> None:
        """Asks, repeats what was not answered, tries once what must be refused, and polls until all have ended."""
        for _ in range(200):
            this.answer = self._ask(functools.partial(acts.begin, ids=this.ids, image_id=self.image.id, asked=this.asked))
            if this.answer.status in (202, 409):
                break
            self.time.sleep(10)
        if self._refused(this) and not self._was_accepted(this):
            return
        row = self.disk.rows("SELECT batch_id FROM runs WHERE instance_id = ? ORDER BY epoch DESC LIMIT 1", this.ids[0])
        this.batch_id = row[0][0] if row else ""
        if not this.asked.retry:
            self._ask_again(this)
        if this.asked.pause:
            self.time.spawn("pause", lambda: self._pause(this, this.asked.pause[1]), after=this.asked.pause[0])
        if this.asked.cancel:
            self.time.spawn("cancel", lambda: self._cancel(this, this.asked.cancel[1]), after=this.asked.cancel[0])
        while len(this.ended) < len(names):
            for name, state in self._poll(names).items():
                if state != "pending":
                    this.ended.setdefault(name, self.time.now)
            self.time.sleep(POLL_S)

    def _ask(self, what: Callable[[Any], Any]) -> Answer:
        """One request; no status where there was no answer."""
        answer = Answer()
        if self.service.ask(what, self.credential, answer) and not answer.status:
            self.time.wait(answer.signal, self.time.now + 30)
        return answer

    def _insist(self, what: Callable[[Any], Any]) -> Any:
        """Asked until it is answered."""
        while (answer := self._ask(what)).status != 202:
            if answer.status == 409:
                self.broken.append(f"I17 refused: {answer.body}")
            self.time.sleep(10)
        return answer.body

    def _pause(self, this: Round, seconds: float) -> None:
        self._insist(functools.partial(acts.pause, batch_id=this.batch_id))
        began = self.time.now
        self.time.sleep(seconds)
        this.asked.paused.append((began, self.time.now))
        self._insist(functools.partial(acts.resume, batch_id=this.batch_id))

    def _cancel(self, this: Round, names: list[str]) -> None:
        asked_at = self.time.now
        done = self._insist(functools.partial(acts.cancel, batch_id=this.batch_id, names=names))
        this.asked.cancelled = {run_id: (asked_at, self.time.now, what) for run_id, what in done.items()}
        self.time.note(f"cancelled {sorted(w for _, _, w in this.asked.cancelled.values())}")

    def _was_accepted(self, this: Round) -> bool:
        """A 409 after an answer that never came: the first request was taken."""
        made = self.disk.rows("SELECT count(*) FROM runs WHERE created_at >= ?", (START_TEXT(this.began)))
        return bool(made[0][0])

    def _refused(self, this: Round) -> bool:
        return this.answer.status == 409 and not self._was_accepted(this)

    def _ask_again(self, this: Round) -> None:
        """I7: a request for what is under way is refused, and changes nothing at all."""
        answer, calls = Answer(), sum(len(m.calls) for m in self.machines.values())
        states = self._poll([n for n, i in self.instances.items() if i.id in this.ids])
        if not any(w.works(self.time.now) for w in self.service.workers) or set(states.values()) != {"pending"}:
            return
        before = self.disk.dump()
        keys = dict(self.disk.sealer.salts)
        self.time.atomic = True
        self.service.answer(functools.partial(acts.begin, ids=this.ids, image_id=self.image.id, asked=Asked()), self.credential, answer)
        self.time.atomic = False
        if answer.status == 202 or before != self.disk.dump() or keys != self.disk.sealer.salts or calls != sum(len(m.calls) for m in self.machines.values()):
            self.broken.append(f"I7 a request for what is under way got {answer.status} or changed something")

    def _poll(self, names: list[str]) -> dict[str, str]:
        """The state of each, which the client remembers where it is another one than before."""
        rows = {row[0]: row[1:] for row in self.disk.rows("SELECT id, state, operation_state, error FROM instances")}
        states = {}
        for name in names:
            state, operation, error = rows[self.instances[name].id]
            seen, polls = (state, operation, json.loads(error) if error else None), self.seen[name].polls
            if not polls or polls[-1][1:] != seen:
                polls.append((self.time.now, *seen))
                self.time.note(f"{name} {state} {operation}")
            states[name] = state
        return states

    def close(self) -> None:
        self.disk.close()
        self.time.close()


def START_TEXT(seconds: float) -> str:
    from datetime import timedelta

    return (START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


__all__ = ["HASH", "Round", "Stuck", "World"]
