"""One scripted rack for all tests that send batches: six machines, the real agent, the real service, killed and started at will.

Asked from outside only: the official SDK, the API, the BMCs' Redfish, the disks' bytes, the consoles.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from bmc_log import read_bmc
from disks import differences, digest_of
from places import place_of_rack
from watch import Watch

from repave.cli.client import Client, Endpoint
from repave.images.manifest import Manifest
from repave.images.store import ImageStore
from repave.lab import scripted_os
from repave.lab.demo import send_reinstall
from repave.lab.postgres import make_database, start_postgres
from repave.lab.processes import is_alive
from repave.lab.rack import find_service, rack_down, rack_up, start_service_again
from repave.lab.scripted import set_faults
from repave.lab.service import import_image
from repave.lab.state import Machine, find_state

COUNT = 6
MIB = 1 << 20
SECTOR = 512
HEAVY_BYTES = 96 * MIB  # writing it takes about a second: long enough to be killed in
PASSWORD = "Flow-7!canary"
_numbers = itertools.count(1)

Json = dict[str, Any]


class Lab:
    """The rack as a client, an operator and the machines' owner see it."""

    watch: Watch

    def __init__(self, folder: Path, values: Json) -> None:
        self.folder, self.values = folder, values
        state = find_state(folder / "rack")
        assert state is not None
        self.names = [f"lab{n:02}" for n in range(1, COUNT + 1)]
        self.machines: dict[str, Machine] = {m.name: m for m in state.machines}
        self.ids: dict[str, str] = {i["name"]: i["id"] for i in values["instances"]}
        self.client = Client(None, Endpoint(values["endpoint"], values["token"]))
        self.images = ImageStore(folder / "site/repave-data/images")
        self.watch = Watch(place_of_rack(folder, values, [PASSWORD, "Canary+7/x!9Zq"]))

    # ---- what a client does ----

    def reinstall(self, names: list[str], image: str, *, password: str = "") -> list[str]:
        """One PUT by the official SDK; the ids of the 202. Without a password it has one of its own: signed twice within a second, it were one request."""
        password, sent_at = password or f"{PASSWORD}-{next(_numbers)}", time.time()
        ids = send_reinstall(self.values, self.image(image)["id"], password, [self.ids[n] for n in names])
        self.watch.accepted.append((sent_at, time.time(), ids))
        return ids

    def image(self, name: str) -> Json:
        return next(i for i in self.client.items("/images") if i["name"] == name)

    def status(self, name: str) -> Json:
        """CloudDC's GET status."""
        url = f"{self.values['endpoint']}/v1/{self.values['project_id']}/instances/{self.ids[name]}/status"
        answer = requests.get(url, headers={"X-Auth-Token": self.values["token"]}, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def newest_batch(self) -> str:
        return self.client.items("/batches", limit=1)[0]["id"]

    def batches(self) -> int:
        return len(self.client.items("/batches", limit=1000))

    def runs(self, batch: str) -> dict[str, Json]:
        """By server."""
        return {run["server"]: run for run in self.client.get(f"/batches/{batch}")["runs"]}

    def wait_for_end(self, batch: str, *, deadline_s: float = 120) -> dict[str, Json]:
        wait_until(lambda: self.client.get(f"/batches/{batch}")["state"] != "working", deadline_s=deadline_s, what=lambda: self.describe(batch))
        return self.runs(batch)

    def events(self, batch: str) -> list[Json]:
        return self.client.items("/events", batch=batch)

    def wait_for_event(self, batch: str, type_: str, **data: str) -> Json:
        """The first event of this type with these values."""

        def find() -> Json | None:
            return next((e for e in self.events(batch) if e["type"] == type_ and data.items() <= e.items()), None)

        return wait_until(find, deadline_s=60, what=lambda: f"{type_} {data}: {self.describe(batch)}")

    def describe(self, batch: str) -> str:
        runs = [f"{r['server']} {r['step']} {r['state']} {(r['error'] or {}).get('code', '')}" for r in self.runs(batch).values()]
        return f"{runs}\n" + "\n".join(f"{n}: {self.console(n)[-600:]}" for n in self.runs(batch))

    # ---- the service ----

    def kill_service(self) -> None:
        """SIGKILL: nothing of it has a say any more."""
        service = find_service(self.folder)
        assert service is not None
        os.kill(service.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(service), deadline_s=10, what=lambda: "the service survived SIGKILL")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(service.pid, 0)

    def start_service(self) -> None:
        start_service_again(self.folder)

    @contextlib.contextmanager
    def short_waits(self, seconds: float) -> Iterator[None]:
        """A service that waits so long for a hello and for a proof; afterwards one with its usual patience."""
        with self.settings(agent_ready_s=seconds, proof_s=seconds):
            yield

    @contextlib.contextmanager
    def settings(self, **values: float) -> Iterator[None]:
        """A service with these settings; afterwards one with its usual ones."""
        environment = {f"REPAVE_{name.upper()}": str(value) for name, value in values.items()}
        self.kill_service()
        os.environ.update(environment)
        try:
            self.start_service()
            yield
        finally:
            for name in environment:
                del os.environ[name]
            if find_service(self.folder):
                self.kill_service()
            self.start_service()

    def keys(self) -> list[str]:
        """The files of live runs' keys."""
        return sorted(p.name for p in (self.folder / "site/secret/run-keys").iterdir())

    # ---- machines ----

    def set_faults(self, **faults: str) -> None:
        set_faults(self.folder / "rack", {name: [fault] for name, fault in faults.items()})

    def console(self, name: str) -> str:
        return self.machines[name].console.read_text()

    def bmc(self, name: str) -> Json:
        """What its BMC says: power, boot (the override's target), media (what is in the drive)."""
        return read_bmc(self.machines[name])

    def scribble(self, name: str) -> None:
        """Old data where the image's zeros will be."""
        with self.machines[name].root_disk.open("r+b") as disk:
            disk.seek(MIB)
            disk.write(b"\xa5" * (15 * MIB))
        self.watch.look_again(name)

    def first_sector(self, name: str) -> bytes:
        with self.machines[name].root_disk.open("rb") as disk:
            return disk.read(SECTOR)

    def disk_digest(self, name: str) -> str:
        """Of every byte that is not in a hole, and where it is."""
        return digest_of(self.machines[name].root_disk)

    def heavy_manifest(self) -> Manifest:
        manifests = [self.images.read_manifest(m) for m in self.images.list_manifests()]
        return next(m for m in manifests if m.size_bytes == HEAVY_BYTES)

    def differences(self, name: str, raw: Path) -> list[int]:
        """The MiB of the disk that are not the image's, from the second to its last partition's end; the first has the tables."""
        return differences(self.machines[name].root_disk, raw)


def wait_until(question: Callable[[], Any], *, deadline_s: float, what: Callable[[], str]) -> Any:
    """The first true answer. Fails with `what` when the time is over."""
    deadline = time.monotonic() + deadline_s
    while not (answer := question()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {deadline_s:.0f} s: {what()}")
        time.sleep(0.05)
    return answer


def build_heavy_image(path: Path) -> Path:
    """A scripted OS with a second partition that no compressor makes smaller."""
    scripted_os.build_image(path, "heavy")
    with path.open("r+b") as out:
        out.truncate(HEAVY_BYTES)
        out.seek(10 * MIB)
        for _ in range(10, 90):
            out.write(os.urandom(MIB))
    table = f"label: gpt\nstart=2048, size=16384, type=uefi\nstart={10 * MIB // SECTOR}, size={80 * MIB // SECTOR}, type=linux\n"
    subprocess.run(["/sbin/sfdisk", "-q", "--wipe=never", "--wipe-partitions=never", path], input=table, text=True, capture_output=True, check=True)
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a private PostgreSQL's first database; others are made beside it."""
    folder = Path(tempfile.mkdtemp(prefix="rpg-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    try:
        with start_postgres(folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'repave.db'}"
    return make_database(request.getfixturevalue("postgres"), f"t{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Six machines with a scripted old OS, all `running`, images tiny-1, tiny-2 and heavy in the store."""
    folder = Path(tempfile.mkdtemp(prefix="rpv-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPAVE_CACHE", os.environ.get("REPAVE_CACHE", str(Path(__file__).parents[2] / ".repave/cache")))
        patch.setenv("HUAWEICLOUD_SDK_HOME", str(folder))
        try:
            lab = Lab(folder, rack_up(COUNT, scripted=True, folder=folder, debian=False))
            import_image(lab.client, build_heavy_image(folder / "heavy.raw"), name="heavy")
            lab.watch.begin()
            yield lab
            lab.watch.close()
        finally:
            rack_down(folder)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _well_behaved(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault lasts as long as its test; at its end, the observers judge all that happened since the last one's."""
    yield
    for name in {"lab", "small", "plain"} & set(request.fixturenames):
        lab = request.getfixturevalue(name)
        lab.set_faults()
        lab.watch.assert_nothing_broken()
