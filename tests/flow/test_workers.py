"""Two workers on one PostgreSQL, real processes: one is killed, stopped or restarted in the middle of a batch, and every run still ends `running`, once."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import sqlalchemy as sa
from conftest import wait_until
from dbos import DBOSClient
from places import place_of_workers
from watch import Watch

import repave
from repave.lab import scripted_os
from repave.lab.workers import Worker, Workers, start_workers
from repave.workflow.engine import APPLICATION_VERSION

PASSWORD = "Flow-7!canary"
COUNT = 6
LEASE_S, FENCE_S, BEAT_S = 6.0, 4.0, 0.5  # other tests share the cores: a beat must never be this late


@pytest.fixture(scope="module")
def site() -> Iterator[Workers]:
    """Six machines, two workers, leases of a few seconds."""
    folder = Path(tempfile.mkdtemp(prefix="rpw-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with start_workers(folder, machines=COUNT, worker_beat_s=BEAT_S, worker_fence_s=FENCE_S, worker_lease_s=LEASE_S) as site:
            site.watch = Watch(place_of_workers(site, [PASSWORD]))
            site.watch.begin()
            yield site
            site.watch.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _both_up(site: Workers) -> Iterator[None]:
    for worker in site.workers:
        if worker.process is None or worker.process.poll() is not None:
            site.start(worker)
    yield
    site.watch.assert_nothing_broken()


def names(site: Workers) -> list[str]:
    return [m.name for m in site.machines]


def begin(site: Workers) -> tuple[str, dict[str, int]]:
    """A batch of all machines, and how long each console was before."""
    consoles = {m.name: len(m.console.read_text()) for m in site.machines}
    return site.reinstall(names(site), PASSWORD), consoles


def busiest(site: Workers) -> Worker:
    """The worker that has most runs under way, once most runs are under way."""
    owners = wait_until(lambda: len(site.owners()) >= COUNT - 1 and site.owners(), deadline_s=60, what=lambda: str(site.owners()))
    owned = list(owners.values())
    return max(site.workers, key=lambda w: owned.count(w.executor_id))


def other(site: Workers, worker: Worker) -> Worker:
    return next(w for w in site.workers if w is not worker)


def end_in_order(site: Workers, worker: Worker) -> None:
    assert worker.process is not None
    worker.kill(signal.SIGTERM)
    site.balance(without=[worker])
    assert worker.process.wait(30) == 0, worker.log.read_text()[-2000:]


def wait_for_step(site: Workers, worker: Worker, batch: str, step: str) -> None:
    events = lambda: site.client(worker).items("/events", batch=batch)  # noqa: E731
    wait_until(lambda: any(e["type"] == "run.step" and e["step"] == step for e in events()), deadline_s=60, what=lambda: step)


def assert_ended_once(site: Workers, worker: Worker, batch: str, consoles: dict[str, int]) -> None:
    """Asked of `worker`: each instance had one run; it crossed once, its machine wrote once and started the new OS once."""
    client = site.client(worker)
    wait_until(lambda: client.get(f"/batches/{batch}")["state"] != "working", deadline_s=180, what=lambda: str(client.get(f"/batches/{batch}")))
    runs = {r["server"]: r for r in client.get(f"/batches/{batch}")["runs"]}
    events = client.items("/events", batch=batch)
    for machine in site.machines:
        since = machine.console.read_text()[consoles[machine.name] :]
        assert runs[machine.name]["state"] == "running", (runs[machine.name], since)
        types = [e["type"] for e in events if e.get("server") == machine.name]
        assert (types.count("run.accepted"), types.count("run.crossed"), types.count("run.ended")) == (1, 1, 1), types
        assert (since.count("crossed the line"), since.count("first boot as"), since.count("home: taken")) == (1, 1, 1), since
        assert scripted_os.find_config_drive(machine.root_disk) is None
    assert [p for p in (site.folder / "secret/run-keys").iterdir()] == []


def test_one_batch_runs_on_both_workers_whoever_hears_the_agents(site):
    batch, consoles = begin(site)
    assert_ended_once(site, site.workers[1], batch, consoles)


@pytest.mark.parametrize("step", ["power-off", "boot-ramdisk", "write-image"])
def test_a_worker_killed_for_good_is_taken_over_within_its_lease(site, step):
    batch, consoles = begin(site)
    dead = busiest(site)
    left = other(site, dead)
    if step != "write-image":  # that one is the agent's word, told right after its crossing
        wait_for_step(site, left, batch, step)
    else:
        wait_until(lambda: any(e["type"] == "run.crossed" for e in site.client(left).items("/events", batch=batch)), deadline_s=60, what=lambda: step)
    dead.kill()
    site.balance()
    took_s = site.wait_until_taken_over(dead.executor_id)
    print(f"takeover after a kill at {step}: {took_s:.1f} s with a lease of {LEASE_S:.0f} s")
    assert took_s < LEASE_S + 2 * BEAT_S + 5
    assert_ended_once(site, left, batch, consoles)


def test_a_worker_started_again_on_its_machine_goes_on_at_once(site):
    batch, consoles = begin(site)
    dead = busiest(site)
    wait_for_step(site, other(site, dead), batch, "boot-ramdisk")
    id_before = dead.executor_id
    other(site, dead).kill()  # nobody else could take the runs over
    dead.kill()
    began = time.monotonic()
    site.start(dead)
    assert dead.executor_id != id_before
    assert site.owners() == {} or id_before not in site.owners().values()
    print(f"gone on {time.monotonic() - began:.1f} s after the restart began")
    assert_ended_once(site, dead, batch, consoles)


def test_a_worker_that_was_stopped_past_its_lease_ends_itself_without_a_further_effect(site):
    batch, consoles = begin(site)
    frozen = busiest(site)
    left = other(site, frozen)
    wait_for_step(site, left, batch, "power-off")
    frozen.kill(signal.SIGSTOP)
    site.balance(without=[frozen])
    site.wait_until_taken_over(frozen.executor_id)
    assert_ended_once(site, left, batch, consoles)
    seen = {m.name: m.console.read_bytes() for m in site.machines}
    asked = site.bmc_writes()
    assert len(asked) >= 3 * COUNT
    frozen.kill(signal.SIGCONT)
    assert frozen.process is not None
    began = time.monotonic()
    assert frozen.process.wait(30) == 76, frozen.log.read_text()[-1000:]
    print(f"ended itself {time.monotonic() - began:.2f} s after it went on")
    assert {m.name: m.console.read_bytes() for m in site.machines} == seen
    assert site.bmc_writes() == asked


def test_a_database_that_is_away_longer_than_the_lease_costs_no_worker_and_no_run(site):
    """Nobody could renew, so nobody is declared dead: both do nothing until it is back, and the interrupted steps are done again."""
    batch, consoles = begin(site)
    reaped = site.reaped()
    wait_for_step(site, site.workers[0], batch, "power-off")
    backends = site.database.backends
    site.database.cut()
    time.sleep(0.5)  # what was sent before is through
    time.sleep(FENCE_S)
    asked = site.bmc_writes()
    time.sleep(LEASE_S)
    assert site.bmc_writes() == asked
    site.database.backends = backends
    assert_ended_once(site, site.workers[1], batch, consoles)
    assert site.reaped() == reaped
    assert [w.process.poll() for w in site.workers] == [None, None]


def test_a_postgresql_that_is_stopped_under_its_workers_gives_no_202_and_all_goes_on_when_it_is_back(site):
    """Each worker says it in its own health. What an agent was writing is written, what was asked meanwhile left nothing."""
    batch, consoles = begin(site)
    wait_until(lambda: any(e["type"] == "run.crossed" for e in site.client().items("/events", batch=batch)), deadline_s=60, what=lambda: batch)
    before, keys = len(site.client().items("/batches", limit=1000)), sorted(p.name for p in (site.folder / "secret/run-keys").iterdir())
    body = {"image_id": site.client().items("/images")[0]["id"], "password": PASSWORD, "instance_id_set": list(site.ids.values())}
    site.postgres.stop()
    try:
        for worker in site.workers:
            url = f"http://127.0.0.1:{worker.api}/v1/{site.project_id}/instances/reinstall"
            answer = requests.put(url, json=body, headers={"X-Auth-Token": site.token}, timeout=60)
            assert (answer.status_code, answer.json()["error_code"]) == (503, "iMetal.0099"), answer.text
            assert "Retry-After" in answer.headers and "Traceback" not in answer.text
            wait_until(lambda worker=worker: not health(worker)[1]["parts"]["database"]["ok"], deadline_s=45, what=lambda worker=worker: str(health(worker)))
            status, said = health(worker)
            assert (status, said["parts"]["database"]["text"]) == (503, "the database does not answer, or takes nothing")
            assert "ALARM" in worker.log.read_text()
        assert sorted(p.name for p in (site.folder / "secret/run-keys").iterdir()) == keys
    finally:
        site.postgres.start()
    for worker in site.workers:
        wait_until(lambda worker=worker: health(worker)[0] == 200, deadline_s=45, what=lambda worker=worker: str(health(worker)))
    assert_ended_once(site, site.workers[1], batch, consoles)
    assert len(site.client().items("/batches", limit=1000)) == before
    assert [w.process.poll() for w in site.workers] == [None, None]


def health(worker: Worker) -> tuple[int, dict]:
    answer = requests.get(f"http://127.0.0.1:{worker.api}/repave/v1/health", timeout=60)
    return answer.status_code, answer.json()


def test_a_worker_that_ends_in_order_leaves_its_runs_to_the_other_at_once(site):
    """A rolling upgrade within one application version: one worker after the other is ended and started, with runs in flight."""
    batch, consoles = begin(site)
    leaving = busiest(site)
    stays = other(site, leaving)
    wait_for_step(site, stays, batch, "boot-ramdisk")
    end_in_order(site, leaving)
    took_s = site.wait_until_taken_over(leaving.executor_id)
    print(f"handed over {took_s:.1f} s after the end")
    assert took_s < LEASE_S
    site.start(leaving)
    assert_ended_once(site, leaving, batch, consoles)


def test_an_upgrade_to_another_version_of_the_workflow_ends_each_run_in_the_version_it_began_in(site, tmp_path):
    """As docs/operations.md says it: the new beside the old, the old one ended when no run of its version is left; and the way back."""
    before, consoles = begin(site)
    upgraded = busiest(site)
    stays = other(site, upgraded)
    wait_for_step(site, stays, before, "boot-ramdisk")
    end_in_order(site, upgraded)
    site.start(upgraded, PYTHONPATH=str(copy_with_version(tmp_path, "next")))
    try:
        assert_ended_once(site, stays, before, consoles)
        after, consoles = begin(site)
        end_in_order(site, stays)
        assert_ended_once(site, upgraded, after, consoles)
        assert [versions_of(site, batch) for batch in (before, after)] == [{APPLICATION_VERSION}, {"next"}]
    finally:
        upgraded.kill()
        DBOSClient(system_database_url=site.url).set_latest_application_version(APPLICATION_VERSION)
        for worker in site.workers:
            if worker.process.poll() is not None:
                site.start(worker)


def test_a_worker_of_another_version_that_died_within_its_lease_does_not_count_for_its_runs(site, tmp_path):
    """The bug: its row still stood for its version, so the start went well and nothing would have gone on with its runs until their deadline."""
    batch, consoles = begin(site)
    dead = busiest(site)
    upgraded = other(site, dead)
    end_in_order(site, upgraded)
    dead.kill()
    with pytest.raises(RuntimeError):
        site.start(upgraded, PYTHONPATH=str(copy_with_version(tmp_path, "next")))
    assert "Repave.9026" in (said := upgraded.log.read_text()), said[-1000:]
    site.start(dead)
    assert_ended_once(site, dead, batch, consoles)


def copy_with_version(folder: Path, version: str) -> Path:
    """A folder for PYTHONPATH with this product, its workflow said to be of another version."""
    shutil.copytree(Path(repave.__file__).parent, folder / "repave", ignore=shutil.ignore_patterns("__pycache__"))
    engine = folder / "repave/workflow/engine.py"
    text, said = engine.read_text(), f'APPLICATION_VERSION = "{APPLICATION_VERSION}"'
    assert text.count(said) == 1
    engine.write_text(text.replace(said, f'APPLICATION_VERSION = "{version}"'))
    return folder


def versions_of(site: Workers, batch: str) -> set[str]:
    query = "SELECT DISTINCT w.application_version FROM dbos.workflow_status w JOIN runs r ON r.id = w.workflow_uuid WHERE r.batch_id = :batch"
    with site.engine.connect() as conn:
        return set(conn.execute(sa.text(query), {"batch": batch}).scalars())


def test_a_second_worker_with_another_key_or_other_folders_is_refused(site, tmp_path):
    def refusal(**changes: str) -> str:
        worker = site.add()
        site.workers.remove(worker)
        for name, value in changes.items():
            text = (worker.folder / "repave.toml").read_text().splitlines()
            text = [f'{name} = "{value}"' if line.startswith(f"{name} =") else line for line in text]
            (worker.folder / "repave.toml").write_text("\n".join(text))
        with pytest.raises(RuntimeError):
            site.start(worker)
        said = worker.log.read_text()
        shutil.rmtree(worker.folder)
        return said

    assert "Repave.9008" in (said := refusal(key_file=str(tmp_path / "a/key"))) and "key file" in said
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("key", "ca.pem", "ca.key"):
        shutil.copy(site.folder / "secret" / name, copied / name)
    assert "Repave.9008" in (said := refusal(key_file=str(copied / "key"))) and "share it" in said
    (copied / "ca.pem").write_text("another")
    assert "Repave.9008" in (said := refusal(key_file=str(copied / "key"))) and "CA" in said
    assert "Repave.9008" in (said := refusal(images_dir=str(tmp_path / "images"))) and "images" in said
