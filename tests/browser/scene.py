"""A fleet in the middle of its day, for pages to show: a clock that is told the time, servers in racks, runs played step by step from a script.

The site is the contract tests' own: store, admission, API and pages are real, no BMC and no workflow is there. What a run did is recorded as the workflow
and the agent would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from operator_site import NEW_PASSWORD, Site

from repave.auth.login import hash_password
from repave.domain.model import Image, Role, Source, Step
from repave.domain.states import Ending
from repave.errors import RepaveError
from repave.store import new_id

Json = dict[str, Any]
PERSON_PASSWORD = "correct-horse-battery"
START = datetime(2026, 11, 24, 7, 20, tzinfo=UTC)
GIB = 1 << 30
STEPS = list(Step)
USUAL = {"R650": (4, 12, 6, 130, 48, 95, 70, 8), "2288H V5": (5, 20, 9, 370, 120, 240, 75, 8)}  # seconds by step
_HASHES: dict[str, str] = {}


class Clock:
    """The site's time. It stands still until it is told."""

    def __init__(self, at: datetime = START) -> None:
        self.at = at

    def __call__(self) -> datetime:
        return self.at

    def add(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


def add_person(site: Site, name: str, role: Role = Role.OPERATOR) -> None:
    """They log in with PERSON_PASSWORD."""
    hashed = _HASHES.setdefault("all", hash_password(PERSON_PASSWORD))  # once: it is slow on purpose
    site.store.people.add_user(site.project.id, name, role, hashed, actor="test")


def add_image(site: Site, name: str, *, digest: str = "7c1e", gib: int = 20) -> Image:
    image = Image(
        new_id(), site.project.id, name, "Linux", "amd64", "uefi", digest * 16, gib * GIB, 512, 2_900_000_000, 8_160_437_862, site.store.now()
    )  # fmt: skip
    site.store.images.add_image(image)
    return image


def add_rack(site: Site, rack: str, names: Sequence[str], *, model: str, image: str, top: int = 42) -> None:
    site.bmcs.model = model
    for number, name in enumerate(names):
        site.add_server(name, rack=rack, unit=str(top - number), image=image)


@dataclass(frozen=True)
class Script:
    """How one run goes. `seconds`: in each step it comes to; the last one is where it is now, or ends. `then`: "", proved or an error's slug."""

    seconds: Sequence[float]
    then: str = ""
    percent: int | None = None


def begin(site: Site, names: Sequence[str], *, image: str | None = "deb12-gpu", **more: Any) -> str:
    body = {"servers": list(names), "image": image, "password": "" if more.get("rehearse") else NEW_PASSWORD} | more
    answer = site.ask("POST", "/reinstall", json=body, as_="operator")
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def play(site: Site, clock: Clock, batch_id: str, scripts: dict[str, Script], *, seconds: float) -> None:
    """`seconds` of a batch: each run goes through its steps as scripted, from now."""
    began, runs = clock.at, {r["server"]: r["id"] for r in site.ask("GET", f"/batches/{batch_id}").json()["runs"]}
    moments: list[tuple[float, str, int]] = []
    for name, script in scripts.items():
        at = 0.0
        for number, taken in enumerate(script.seconds):
            moments.append((at, name, number))
            at += taken
        if script.then:
            moments.append((at, name, len(script.seconds)))
    for at, name, number in sorted(moments):
        if at <= seconds:
            clock.at = began + timedelta(seconds=at)
            _happen(site, runs[name], scripts[name], number)
    clock.at = began + timedelta(seconds=seconds)
    for name, script in scripts.items():
        if script.percent is not None:
            progress = {"stage": "write", "bytes_done": 8_160_437_862 * script.percent // 100, "bytes_total": 8_160_437_862}
            site.store.runs.record_progress(runs[name], progress)


def _happen(site: Site, run_id: str, script: Script, number: int) -> None:
    runs = site.store.runs
    if number == len(script.seconds):
        end(site, run_id, script.then)
        return
    step = STEPS[number]
    if step is Step.WRITE_IMAGE:
        say_hello(site, run_id)
        runs.record_plan(run_id, {"plan_id": "p1", "disk_path": "/dev/nvme0n1", "disk_serial": f"S4417{run_id[-4:]}"})
        assert runs.record_crossing(run_id, "p1")
    else:
        runs.record_step(run_id, step)


CONSOLE = "".join(f"[{n:6}.000] firmware: step {n} of the self test\n" for n in range(60)) + "Booting from disk 0 <deb11>\n"


def say_hello(site: Site, run_id: str) -> None:
    disk = {
        "path": "/dev/nvme0n1",
        "serial": f"S4417{run_id[-4:]}",
        "model": "PM9A3 480 GB",
        "size_bytes": 480_103_981_056,
        "wwn": None,
        "removable": False,
        "virtual": False,
        "read_only": False,
        "sector_bytes": 512,
    }
    data = [disk | {"path": f"/dev/nvme{n}n1", "serial": f"S88{n}1", "model": "PM9A3 3.84 TB", "size_bytes": 3_840_755_982_336} for n in (1, 2)]
    inventory = {"boot_id": "b", "macs": ["b8:59:9f:00:00:01"], "memory_bytes": 512 * GIB, "firmware": "UEFI", "disks": [disk, *data]}
    site.store.runs.record_hello(run_id, "b", inventory)


def end(site: Site, run_id: str, how: str) -> None:
    """`how`: proved, or the slug of the error it ended with."""
    runs, row = site.store.runs, site.store.runs.get_run(run_id)
    site.store.consoles.append(run_id, Source.SERIAL, CONSOLE)
    if how == "proved":
        runs.record_proof(run_id, {"root_disk_serial": (row.plan or {}).get("disk_serial")})
        runs.record_ending(run_id, Ending.PROVED, None)
        return
    causes = {
        "boot_override_ignored": "The BMC accepted the one-time boot from CD, the firmware (BIOS 1.6.11) booted the disk",
        "read-back": "Chunk 118 of 158 reads back as other bytes than were written",
    }  # fmt: skip
    ending = Ending.WRITE_FAILED if row.past_the_line else Ending.RETURNED
    runs.record_ending(run_id, ending, RepaveError(how, causes.get(how, "")).as_json())


def learn(site: Site, clock: Clock, names: Sequence[str], *, model: str, image: str) -> None:
    """A batch of the past on these servers, all of them well: what is usual for the model is known."""
    batch = begin(site, names, image=image)
    scripts = {n: Script([s * (0.95 + 0.02 * i) for s in USUAL[model]], "proved") for i, n in enumerate(names)}
    play(site, clock, batch, scripts, seconds=sum(USUAL[model]) * 1.2)
    clock.add(600)


def busy_day(site: Site, clock: Clock) -> str:
    """Fifty servers in three racks; one batch of twelve under way at 6:20, with a failure and a late one. Returns its id."""
    clock.at = START - timedelta(hours=3)
    for name, digest in (("deb11-gpu", "01aa"), ("deb12-gpu", "7c1e"), ("rocky-9", "22d0")):
        add_image(site, name, digest=digest)
    names = [f"web{n:02}" for n in range(1, 51)]
    add_rack(site, "r1", [*names[0:8], *names[12:22]], model="R650", image="deb11-gpu")
    add_rack(site, "r2", [*names[8:12], *names[22:34]], model="2288H V5", image="deb11-gpu")
    add_rack(site, "r3", names[34:50], model="R650", image="deb11-gpu")
    learn(site, clock, names[12:18], model="R650", image="deb11-gpu")
    learn(site, clock, names[22:28], model="2288H V5", image="deb11-gpu")
    site.ask("POST", "/servers/web13/lock", json={"reason": "database, ask first"}, as_="operator")
    site.ask("POST", "/servers/web14/lock", json={"reason": "database, ask first"}, as_="operator")
    bad = begin(site, ["web40"], image="rocky-9")
    play(site, clock, bad, {"web40": Script([4, 12, 6, 130, 48], "read-back")}, seconds=300)
    clock.at = START
    batch = begin(site, names[:12], max_failed=2)
    r650, huawei = USUAL["R650"], USUAL["2288H V5"]
    quick = [s * 0.95 for s in r650]
    scripts = {n: Script(quick, "proved") for n in ("web01", "web03", "web05")}
    scripts |= {n: Script([*r650[:4], 55, 95, 80]) for n in ("web02", "web04", "web06")}
    scripts["web07"] = Script([4, 12, 6, 156], "boot_override_ignored")
    scripts["web08"] = Script([*r650[:5], 185])
    scripts |= {n: Script([5, 16, 9, 295, 60], percent=46) for n in ("web09", "web10")}
    scripts |= {n: Script([*huawei[:3], 400]) for n in ("web11", "web12")}
    play(site, clock, batch, scripts, seconds=380)
    return batch


def break_a_row(site: Site) -> None:
    """Something that no code of ours foresaw: an instance is in a state that there is not."""
    with site.store.engine.begin() as conn:
        conn.exec_driver_sql("UPDATE instances SET state = 'canary-state'")
