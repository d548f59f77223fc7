"""A rack watched from outside while it works: a client that polls with its own clock, the disks' bytes, the BMCs' own words and logs, the files.

`Watch` gathers; `invariants.py` judges. Of the product it reads the rows that an operator could read, never its code's opinion of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import sqlalchemy as sa
from invariants import find_broken
from secret_scan import Scanner, find_in

from repave.lab.state import Machine

POLL_S = 0.5
REST_S = 120.0
Json = dict[str, Any]
_RUNS = (
    "id", "batch_id", "instance_id", "server_id", "image_id", "epoch", "found_state", "created_at", "released_at", "deadline_at", "crossed_at",
    "verified_at", "ended_at", "outcome", "error", "rehearse",
)  # fmt: skip


@dataclass
class Place:
    """What is watched. `kept`: every file that the product wrote or a machine showed; `passwords`: must be in none of them."""

    machines: dict[str, Machine]
    ids: dict[str, str]  # instance by server
    database_url: str
    endpoints: Callable[[], Sequence[str]]
    project_id: str
    token: str
    refused_token: str  # may read only
    bmc_log: Path
    run_keys: Path
    kept: Callable[[], Sequence[Path]]
    passwords: Sequence[str]
    images: Path  # the raw files, by name
    services: Callable[[], Sequence[int]]  # their processes
    scripted: bool = True


@dataclass
class Facts:
    """One stretch of time, and what all were at its end."""

    began_at: str = ""
    runs: list[Json] = field(default_factory=list)  # those created in it, with `name`, `image` and `events`
    batches: list[Json] = field(default_factory=list)
    polls: dict[str, list[tuple[float, str, str | None, bool]]] = field(default_factory=dict)  # at, state, operation_state, has an error
    accepted: list[tuple[float, float, list[str]]] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    digests: dict[str, tuple[str, str]] = field(default_factory=dict)  # of root disks, before and now
    data_disks: dict[str, tuple[str, str]] = field(default_factory=dict)
    bmcs: dict[str, Json] = field(default_factory=dict)
    power_before: dict[str, str] = field(default_factory=dict)
    consoles: dict[str, str] = field(default_factory=dict)  # what was said in it
    keys: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # what a refused request changed
    leftovers: list[str] = field(default_factory=list)


class Watch:
    """`begin`, then the work, then `judge`: what is broken. `excuse` names what a test does itself, for this once."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.accepted: list[tuple[float, float, list[str]]] = []
        self._engine = sa.create_engine(_read_only(place.database_url), poolclass=sa.NullPool)
        self._scanner, self._excused = Scanner(), set[str]()
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}
        self._polls: dict[str, list[tuple[float, str, str | None, bool]]] = {}
        self._leaks: list[str] = []
        self._size: dict[int, tuple[int, int]] = {}
        self._begun = Facts()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._poll_forever, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self._engine.dispose()

    def excuse(self, *words: str) -> None:
        """A violation with one of these words is this test's own doing: it powers a server, or writes a disk, by hand."""
        self._excused |= set(words)

    def look_again(self, name: str) -> None:
        """What is on this disk now was written by the test itself."""
        self._begun.digests[name] = (self.digest(self.place.machines[name].root_disk), "")

    def begin(self) -> None:
        """What is there now is what the next judgement compares with."""
        self.accepted, self._excused, self._leaks = [], set(), []
        with self._lock:
            self._polls = {i: seen[-1:] for i, seen in self._polls.items()}
        machines = self.place.machines
        self._begun = Facts(
            began_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            digests={n: (self._root_digest(m), "") for n, m in machines.items()},
            data_disks={n: (self.digest(m.data_disk), "") for n, m in machines.items() if m.data_disk},
            power_before={n: read_bmc(machines[n])["power"] for n in machines},
        )
        self._console_at = {n: m.console.stat().st_size for n, m in machines.items()}
        self._log_at = self.place.bmc_log.stat().st_size if self.place.bmc_log.exists() else 0

    @property
    def began_at(self) -> str:
        return self._begun.began_at

    def judge(self) -> list[str]:
        """Everything broken since `begin`, once nothing is under way any more."""
        facts = self._gather()
        return [b for b in find_broken(facts, self.place) if not any(word in b for word in self._excused)]

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

    def _gather(self) -> Facts:
        facts, machines = self._begun, self.place.machines
        self.wait_for_rest()
        with contextlib.suppress(requests.RequestException, IndexError):
            self._poll()
        names = {i: n for n, i in self.place.ids.items()}
        images = {r["id"]: r["name"] for r in self.rows("SELECT id, name FROM images")}
        for run in self.rows(f"SELECT {', '.join(_RUNS)} FROM runs WHERE created_at > '{facts.began_at}' ORDER BY server_id, epoch"):
            if run["instance_id"] in names:
                events = self.rows(f"SELECT seq, type, at, data FROM events WHERE run_id = '{run['id']}' ORDER BY seq")
                facts.runs.append(run | {"name": names[run["instance_id"]], "image": images.get(run["image_id"], ""), "events": events})
        facts.batches = self.rows(f"SELECT id, created_at FROM batches WHERE created_at > '{facts.began_at}'")
        with self._lock:
            facts.polls = {names[i]: list(seen) for i, seen in self._polls.items() if i in names}
        facts.accepted = self.accepted
        facts.calls = self._calls()
        for name, machine in machines.items():
            facts.digests[name] = (facts.digests[name][0], self._root_digest(machine))
            if machine.data_disk:
                facts.data_disks[name] = (facts.data_disks[name][0], self.digest(machine.data_disk))
            with machine.console.open("rb") as f:
                f.seek(self._console_at[name])
                facts.consoles[name] = f.read().decode(errors="replace")
            facts.bmcs[name] = read_bmc(self.place.machines[name])
        facts.keys = sorted(p.name for p in self.place.run_keys.iterdir())
        facts.refusals = self._try_refused()
        facts.leaks = self._leaks + self._scan()
        facts.leftovers = self._find_leftovers()
        return facts

    # ---- the client ----

    def _poll_forever(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(requests.RequestException, ValueError, LookupError):  # a service that is killed: the next look may do better
                self._poll()

    def _poll(self) -> None:
        url = f"{self.place.endpoints()[0]}/v1/{self.place.project_id}/instances"
        asked_at = time.time()
        answer = requests.get(url, params={"limit": 100}, headers={"X-Auth-Token": self.place.refused_token}, timeout=10)
        if answer.status_code != 200:
            return
        if found := find_in(answer.content, self.place.passwords):
            self._leaks.append(f"an answer: {found}")
        with self._lock:
            for one in answer.json()["instances"]:
                seen, now = self._polls.setdefault(one["id"], []), (one["state"], one.get("operation_state"), "error" in one)
                if not seen or seen[-1][1:] != now:
                    seen.append((asked_at, *now))

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
        found["calls"] = self.place.bmc_log.stat().st_size if self.place.bmc_log.exists() else 0
        return found

    # ---- what lies there ----

    def rows(self, query: str) -> list[Json]:
        with self._engine.connect() as conn:
            return [{k: _plain(k, v) for k, v in row._mapping.items()} for row in conn.execute(sa.text(query))]

    def digest(self, disk: Path | None) -> str:
        """Of every byte that is not in a hole, and where it is; read again only when the file was written."""
        assert disk is not None
        stat = disk.stat()
        now = (stat.st_mtime_ns, stat.st_size)
        if self._digests.get(disk, (None,))[0] != now:
            self._digests[disk] = (now, digest_of(disk))
        return self._digests[disk][1]

    def _root_digest(self, machine: Machine) -> str:
        """A real OS writes its own disk all the time: there, a digest says nothing."""
        return self.digest(machine.root_disk) if self.place.scripted else ""

    def _calls(self) -> list[Json]:
        if not self.place.bmc_log.exists():
            return []
        with self.place.bmc_log.open() as f:
            f.seek(self._log_at)
            return [json.loads(line) for line in f]

    def _scan(self) -> list[str]:
        files = [
            path for root in self.place.kept() for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file() and "chunks" not in path.parts
        ]
        found = self._scanner.scan(files, self.place.passwords)
        for pid in self.place.services():
            with contextlib.suppress(OSError):
                shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
                found += [f"process {name}" for name in find_in(shown, self.place.passwords)]
        return found

    def _find_leftovers(self) -> list[str]:
        """Half-written files, and a process that has grown by more than its pools."""
        found = [str(p.name) for root in self.place.kept() if root.is_dir() for p in root.rglob("*") if p.name.endswith((".new", ".part"))]
        for pid in self.place.services():
            with contextlib.suppress(OSError):
                now = (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
                first = self._size.setdefault(pid, now)
                found += [f"process {pid} has {n} {what}, had {f}" for n, f, what in zip(now, first, ("descriptors", "threads"), strict=True) if n > f + 150]
        return found


def read_bmc(machine: Machine) -> Json:
    """What its BMC says: power, boot (the override's target), media (what is in the drive)."""
    m = machine
    with requests.Session() as session:
        session.trust_env, session.auth = False, (m.bmc_username, m.bmc_password)
        system = session.get(f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}", timeout=30).json()
        cd = session.get(f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}/VirtualMedia/Cd", timeout=30).json()
    return {"power": system["PowerState"], "boot": system["Boot"]["BootSourceOverrideTarget"], "media": cd["Image"] if cd["Inserted"] else ""}


def digest_of(disk: Path) -> str:
    """Of every byte that is not in a hole, and where it is."""
    digest = hashlib.sha256()
    for offset, data in read_data(disk):
        digest.update(offset.to_bytes(8, "big") + data)
    return digest.hexdigest()


def read_data(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of what the file holds, holes left out, at most 8 MiB at once."""
    with path.open("rb") as file:
        offset, end = 0, os.fstat(file.fileno()).st_size
        while offset < end:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole
                return
            hole = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
            while offset < hole:
                data = os.pread(file.fileno(), min(8 << 20, hole - offset), offset)
                yield offset, data
                offset += len(data)


def _read_only(url: str) -> str:
    return url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true" if url.startswith("sqlite") else url


def _plain(name: str, value: Any) -> Any:
    """JSON is text on one database and decoded on the other."""
    return json.loads(value) if name in ("error", "data") and isinstance(value, str) else value
