"""A rack watched from outside while it works: a client that polls with its own clock, the disks' bytes and the times of their writes, the BMCs' own
words and logs, the files.

`Watch` gathers; `invariants.py` judges. Of the product it reads the rows that an operator could read, never its code's opinion of them; only the
tokens of live runs, which it looks for in files, it derives as the product does.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import sqlalchemy as sa
from bmc_log import read_bmc, read_calls
from disks import Disks
from invariants import find_broken, find_broken_of, find_broken_of_site
from secret_scan import Scanner, find_in

from repave.errors import RunFailed
from repave.lab.state import Machine
from repave.secrets import Sealer

POLL_S, LOOK_S = 0.5, 0.1
REST_S = 120.0
DISK_BOOTS = ("booting the local disk", "boot: disk")  # a console's words: what runs from here on may write
TOKENS = ("agent", "session", "nonce", "media")
Json = dict[str, Any]
_RUNS = (
    "id", "batch_id", "instance_id", "server_id", "image_id", "epoch", "found_state", "created_at", "released_at", "deadline_at", "crossed_at",
    "verified_at", "ended_at", "outcome", "error", "rehearse",
)  # fmt: skip


@dataclass
class Place:
    """What is watched. `kept`: every file that the product wrote or a machine showed; `secrets`: each with the names of the files that it must be in."""

    machines: dict[str, Machine]
    ids: dict[str, str]  # instance by server
    database_url: str
    endpoints: Callable[[], Sequence[str]]
    project_id: str
    token: str
    refused_token: str  # may read only
    bmc_logs: Mapping[str, Path]  # by server
    run_keys: Path
    kept: Callable[[], Sequence[Path]]
    secrets: Mapping[str, Collection[str]]
    media_told: Collection[str]  # files of BMCs: they are told the URL of a run's media, and may log it
    find_raw: Callable[[str], Path | None]  # an image's raw file, by name
    services: Callable[[], Sequence[int]]  # their processes
    scripted: bool = True
    at_once: int = 0  # the site allows so many of its runs; 0 = more than there are


@dataclass
class Seen:
    """What the client saw of an instance, from its first look to its last one at the same: when those were asked for, and when the first was answered."""

    at: float
    answered_at: float
    state: str
    operation: str | None
    has_error: bool
    until: float


@dataclass
class Facts:
    """One stretch of time, and what all were at its end. By server, but for what is the site's."""

    began_at: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[Json]] = field(default_factory=dict)  # those created in it, with `name`, `image` and `events`
    polls: dict[str, list[Seen]] = field(default_factory=dict)
    calls: dict[str, list[Json]] = field(default_factory=dict)
    by_hand: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # when a test asked the BMC itself
    digests: dict[str, tuple[str, str]] = field(default_factory=dict)  # of root disks, before and now; "" where an OS writes
    data_disks: dict[str, tuple[str, str]] = field(default_factory=dict)
    writes: dict[str, list[float]] = field(default_factory=dict)  # of root disks
    disk_boots: dict[str, list[float]] = field(default_factory=dict)
    bmcs: dict[str, Json] = field(default_factory=dict)
    power_before: dict[str, str] = field(default_factory=dict)
    consoles: dict[str, str] = field(default_factory=dict)  # what was said in it
    locked_at: dict[str, str | None] = field(default_factory=dict)
    batches: list[Json] = field(default_factory=list)
    accepted: list[tuple[float, float, list[str]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # what a refused request changed
    leftovers: list[str] = field(default_factory=list)
    unchained: int | None = None  # the first event of the audit that does not follow the one before it


class Watch:
    """`begin`, then the work, then `judge`: what is broken. `excuse` names what a test does itself, for this once.

    Where machines are at work side by side, each has its own stretch: `begin_of`, `judge_of`; the site's is judged when all rest.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.accepted: list[tuple[float, float, list[str]]] = []
        self._engine = sa.create_engine(_read_only(place.database_url), poolclass=sa.NullPool)
        self._scanner, self._excused, self._disks = Scanner(), set[str](), Disks()
        self._polls: dict[str, list[Seen]] = {}
        self._leaks: list[str] = []
        self._tokens: dict[str, dict[str, str]] = {}  # by run, then purpose
        self._open: dict[int, Counter[str]] = {}
        self._begun, self._site_began_at = Facts(), ""
        self._console_at: dict[str, int] = {}
        self._log_at: dict[str, int] = {}
        self._looked_at: dict[str, int] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._sealer = Sealer.open(place.run_keys.parent / "key")
        self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in (self._poll_forever, self._look_forever)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._engine.dispose()

    def excuse(self, *words: str) -> None:
        """A violation with one of these words is this test's own doing: it powers a server, or writes a disk, by hand."""
        self._excused |= set(words)

    def look_again(self, name: str) -> None:
        """What is on this disk now was written by the test itself."""
        disk = self.place.machines[name].root_disk
        with self._lock:
            self._disks.forget(disk)
        self._begun.digests[name] = (self._disks.digest(disk), "")

    @contextlib.contextmanager
    def by_hand(self, name: str) -> Iterator[None]:
        """The test itself asks this BMC."""
        began = time.time()
        try:
            yield
        finally:
            self._begun.by_hand.setdefault(name, []).append((began, time.time()))

    def begin(self) -> None:
        """What is there now is what the next judgement compares with."""
        self.accepted, self._excused, self._leaks = [], set(), []
        self._site_began_at = _now()
        with self._lock:
            self._tokens = {}
        for name in self.place.machines:
            self.begin_of(name)
        for pid in self.place.services():
            if pid not in self._open:
                with contextlib.suppress(OSError):
                    self._open[pid] = count_open(pid)

    def begin_of(self, name: str) -> None:
        machine, facts = self.place.machines[name], self._begun
        with self._lock:
            instance = self.place.ids.get(name, "")
            self._polls[instance] = self._polls.get(instance, [])[-1:]
            self._disks.forget(machine.root_disk)
            self._looked_at[name] = self._console_at[name] = machine.console.stat().st_size
            facts.disk_boots[name] = []
        facts.began_at[name], facts.by_hand[name] = _now(), []
        bmc = read_bmc(machine)
        facts.power_before[name] = bmc["power"]
        facts.digests[name] = (self._root_digest(machine, bmc), "")
        if machine.data_disk:
            facts.data_disks[name] = (self._disks.digest(machine.data_disk), "")
        log = self.place.bmc_logs[name]
        self._log_at[name] = log.stat().st_size if log.exists() else 0

    @property
    def began_at(self) -> str:
        return self._site_began_at

    def judge(self) -> list[str]:
        """Everything broken since `begin`, once nothing is under way any more."""
        self.wait_for_rest()
        for name in self.place.machines:
            self._gather(name)
        self._gather_site()
        return [b for b in find_broken(self._begun, self.place) if not any(word in b for word in self._excused)]

    def judge_of(self, name: str) -> list[str]:
        """Everything broken at this machine since `begin_of`."""
        self._gather(name)
        return find_broken_of(self._begun, self.place, name)

    def judge_site(self) -> list[str]:
        """Everything broken that is no single machine's, since `begin`; machines had stretches of their own."""
        self.wait_for_rest()
        self._gather_site()
        return find_broken_of_site(self._begun, self.place)

    def assert_nothing_broken(self) -> None:
        """At a test's end: judges what happened since the last one's, and begins anew."""
        broken = self.judge()
        self.begin()
        assert not broken, "\n".join(broken)

    def wait_for_rest(self) -> None:
        """No run is live, or the time is over: then the judgement says so."""
        deadline = time.monotonic() + REST_S
        while self.rows("SELECT id FROM runs WHERE ended_at IS NULL") and time.monotonic() < deadline:
            time.sleep(0.2)

    def _gather(self, name: str) -> None:
        facts, machine, instance = self._begun, self.place.machines[name], self.place.ids.get(name, "")
        with contextlib.suppress(requests.RequestException, IndexError):
            self._poll()
        facts.runs[name] = self._runs(f"instance_id = '{instance}' AND created_at > '{facts.began_at[name]}'")
        lock = self.rows(f"SELECT s.locked_at FROM servers s JOIN instances i ON i.server_id = s.id WHERE i.id = '{instance}'")
        facts.locked_at[name] = lock[0]["locked_at"] if lock else None
        self._look(name)
        with self._lock:
            facts.polls[name] = list(self._polls.get(instance, ()))
            facts.writes[name] = self._disks.writes(machine.root_disk)
        facts.calls[name] = read_calls(self.place.bmc_logs[name], name, self._log_at[name])
        facts.bmcs[name] = read_bmc(machine)
        facts.digests[name] = (facts.digests[name][0], self._root_digest(machine, facts.bmcs[name]))
        if machine.data_disk:
            facts.data_disks[name] = (facts.data_disks[name][0], self._disks.digest(machine.data_disk))
        with machine.console.open("rb") as f:
            f.seek(self._console_at[name])
            facts.consoles[name] = f.read().decode(errors="replace")

    def _gather_site(self) -> None:
        facts = self._begun
        facts.batches = self.rows(f"SELECT id, created_at, at_once FROM batches WHERE created_at > '{self._site_began_at}'")
        for batch in facts.batches:
            batch["runs"] = self._runs(f"batch_id = '{batch['id']}'")
        facts.accepted = self.accepted
        facts.keys = sorted(p.name for p in self.place.run_keys.iterdir())
        facts.refusals = self._try_refused()
        facts.leaks = self._leaks + self._scan()
        facts.leftovers = self._find_leftovers()
        facts.unchained = self._find_unchained()

    def _runs(self, where: str) -> list[Json]:
        names = {i: n for n, i in self.place.ids.items()}
        runs = self.rows(f"SELECT {', '.join(_RUNS)} FROM runs WHERE {where} ORDER BY server_id, epoch")
        images = {r["id"]: r["name"] for r in self.rows("SELECT id, name FROM images")} if runs else {}
        for run in runs:
            run["name"], run["image"] = names.get(run["instance_id"], ""), images.get(run["image_id"], "")
            run["events"] = self.rows(f"SELECT seq, type, at, data FROM events WHERE run_id = '{run['id']}' ORDER BY seq")
        return runs

    # ---- the client ----

    def _poll_forever(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(requests.RequestException, ValueError, LookupError):  # a service that is killed: the next look may do better
                self._poll()

    def _poll(self) -> None:
        url = f"{self.place.endpoints()[0]}/v1/{self.place.project_id}/instances"
        asked_at = time.time()
        answer = requests.get(url, params={"limit": 100}, headers={"X-Auth-Token": self.place.refused_token}, timeout=10)
        answered_at = time.time()
        if answer.status_code != 200:
            return
        if found := find_in(answer.content, self.place.secrets):
            self._leaks.append(f"an answer: {found}")
        with self._lock:
            for one in answer.json()["instances"]:
                seen, now = self._polls.setdefault(one["id"], []), (one["state"], one.get("operation_state"), "error" in one)
                if not seen or (seen[-1].state, seen[-1].operation, seen[-1].has_error) != now:
                    seen.append(Seen(asked_at, answered_at, *now, until=asked_at))
                seen[-1].until = asked_at

    def _try_refused(self) -> list[str]:
        """A good request without the right, and one with an id that is nobody's: what is different afterwards."""
        if not self.place.services():
            return []
        endpoint = next(iter(self.place.endpoints()))
        url, some = f"{endpoint}/v1/{self.place.project_id}/instances/reinstall", next(iter(self.place.ids.values()))
        image = next(iter(self.rows("SELECT id FROM images")))["id"]
        body = {"image_id": image, "password": "Refused-7!canary", "instance_id_set": [some]}
        before = self._all_there_is()
        for token, ids in ((self.place.refused_token, [some]), (self.place.token, [some, "0" * 8 + "-0000-4000-8000-" + "0" * 12])):
            answer = requests.put(url, json=body | {"instance_id_set": ids}, headers={"X-Auth-Token": token}, timeout=30)
            if answer.status_code not in (400, 403, 404, 429):
                return [f"a request to be refused was answered {answer.status_code}"]
        after = self._all_there_is()
        return [name for name in before if before[name] != after[name]]

    def _all_there_is(self) -> Json:
        tables = ("batches", "runs", "events", "answers", "instances")
        with self._engine.connect() as conn:
            found: Json = {t: conn.execute(sa.text(f"SELECT count(*) FROM {t}")).scalar_one() for t in tables}
            found["states"] = sorted(map(tuple, conn.execute(sa.text("SELECT id, state, operation_state, updated_at FROM instances")).all()))
        found["keys"] = sorted(p.name for p in self.place.run_keys.iterdir())
        calls = [c for name, log in self.place.bmc_logs.items() for c in read_calls(log, name, self._log_at[name])]
        found["calls"] = sum(c["method"] != "GET" for c in calls)
        return found

    # ---- what lies there ----

    def _look_forever(self) -> None:
        while not self._stop.wait(LOOK_S):
            with contextlib.suppress(OSError):
                for name in self.place.machines:
                    self._look(name)
                self._learn_tokens()

    def _look(self, name: str) -> None:
        """The root disk's last write, and whether the console says that something else than the ramdisk runs from now on."""
        machine = self.place.machines[name]
        with self._lock:
            self._disks.look(machine.root_disk)
            began = self._looked_at.get(name)
            if began is None or machine.console.stat().st_size <= began:
                return
            with machine.console.open("rb") as f:
                f.seek(began)
                said = f.read()
            self._looked_at[name] = began + len(said)
            if any(words.encode() in said for words in DISK_BOOTS):
                self._begun.disk_boots.setdefault(name, []).append(time.time())

    def _learn_tokens(self) -> None:
        for path in self.place.run_keys.iterdir():
            if "." not in path.name and path.name not in self._tokens:
                with contextlib.suppress(RunFailed):  # it ended meanwhile
                    learnt = {purpose: self._sealer.derive_for_run(path.name, purpose) for purpose in TOKENS}
                    with self._lock:
                        self._tokens[path.name] = learnt

    def rows(self, query: str) -> list[Json]:
        with self._engine.connect() as conn:
            return [{k: _plain(k, v) for k, v in row._mapping.items()} for row in conn.execute(sa.text(query))]

    def _root_digest(self, machine: Machine, bmc: Json) -> str:
        """A real OS that runs writes its own disk all the time: there, a digest says nothing."""
        return self._disks.digest(machine.root_disk) if self.place.scripted or bmc["power"] == "Off" else ""

    def _scan(self) -> list[str]:
        files = [
            path for root in self.place.kept() for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file() and "chunks" not in path.parts
        ]
        with self._lock:
            tokens = {t: self.place.media_told if what == "media" else () for of_run in self._tokens.values() for what, t in of_run.items()}
        secrets = {**self.place.secrets, **tokens}
        found = self._scanner.scan(files, secrets)
        for pid in self.place.services():
            with contextlib.suppress(OSError):
                shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
                found += [f"process {name}" for name in find_in(shown, secrets)]
        return found

    def _half_written(self) -> set[tuple[Path, int]]:
        """Each with the time of its last write."""
        found = set[tuple[Path, int]]()
        for path in (p for root in self.place.kept() if root.is_dir() for p in root.rglob("*") if p.name.endswith((".new", ".part"))):
            with contextlib.suppress(FileNotFoundError):
                found.add((path, path.stat().st_mtime_ns))
        return found

    def _find_unchained(self) -> int | None:
        before = ""
        for e in self.rows("SELECT seq, at, project_id, type, batch_id, run_id, server_id, actor, data, mac FROM events ORDER BY seq"):
            said = [e[name] for name in ("project_id", "type", "batch_id", "run_id", "server_id", "actor", "data")]
            text = json.dumps([before, e["at"].replace("Z", "+00:00"), *said], sort_keys=True)
            if e["mac"] != (before := self._sealer.authenticate(text, about="event")):
                return int(e["seq"])
        return None

    def _find_leftovers(self) -> list[str]:
        """Half-written files, and what a process has opened and not closed: pools grow as much as so few runs make them, nothing else does."""
        if half := self._half_written():
            time.sleep(1)  # the file `generation` follows the database: one that is just being written is gone by then
            half &= self._half_written()
        found = sorted(path.name for path, _ in half)
        connections = 32  # store/database.py keeps 8 on SQLite and 32 on PostgreSQL, DBOS 20 of its own
        pools = {"thread": 40, "socket": 8, "file repave.db": connections, "file repave.db-wal": connections}
        if not self.place.database_url.startswith("sqlite"):
            pools["socket"] += connections
        for pid in self.place.services():
            with contextlib.suppress(OSError):
                now = count_open(pid)
                first = self._open.setdefault(pid, now)
                found += [f"process {pid} has {n} of {what}, had {first[what]}" for what, n in now.items() if n > first[what] + pools.get(what, 0)]
        return found


def count_open(pid: int) -> Counter[str]:
    """The process's threads, and its descriptors by what they are."""
    found = Counter({"thread": len(os.listdir(f"/proc/{pid}/task"))})
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(link)
            found[target.partition(":")[0] if ":" in target else "file " + Path(target).name] += 1
    return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _read_only(url: str) -> str:
    return url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true" if url.startswith("sqlite") else url


def _plain(name: str, value: Any) -> Any:
    """JSON is text on one database and decoded on the other."""
    return json.loads(value) if name in ("error", "data") and isinstance(value, str) else value
