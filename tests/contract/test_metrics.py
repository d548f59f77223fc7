"""/metrics: who may read it, what it counts, and that no restart forgets what happened."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import requests
from operator_site import BMC_PASSWORD, NEW_PASSWORD, Site, start_site
from prometheus_client.parser import text_string_to_metric_families
from redfish_fake import FakeBmc, small_bmc, start_bmc

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.chunk_process import ChunkBytes
from repave.domain.model import Step
from repave.domain.states import Ending
from repave.errors import BmcError, RepaveError
from repave.metrics import MODELS_MAX, Metrics
from repave.store.tables import WORKERS

Samples = dict[str, float]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path / "site") as site:
        for name in ("web01", "web02", "web03"):
            site.add_server(name)
        site.add_image("tiny")
        yield site


def parse(text: bytes) -> Samples:
    """By name and labels as Prometheus writes them."""
    return {
        s.name + (f"{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}" if s.labels else ""): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


def scrape(site: Site, token: str) -> requests.Response:
    return requests.get(f"{site.url}/metrics", headers={"Authorization": f"Bearer {token}"}, timeout=20)


def reinstall(site: Site, *names: str) -> dict[str, str]:
    answer = site.ask("POST", "/reinstall", json={"servers": names, "image": "tiny", "password": NEW_PASSWORD})
    return {run["server"]: run["id"] for run in answer.json()["runs"]}


def test_a_viewer_of_the_sites_project_reads_it_by_bearer_token_and_nobody_else(site: Site) -> None:
    answer = scrape(site, site.tokens["viewer"])
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert requests.get(f"{site.url}/metrics", headers={"X-Auth-Token": site.tokens["admin"]}, timeout=20).status_code == 200
    assert scrape(site, "wrong").status_code == scrape(site, "").status_code == requests.get(f"{site.url}/metrics", timeout=20).status_code == 401
    assert scrape(site, site.tokens["other"]).status_code == 403


def test_it_counts_endings_causes_steps_live_and_late_runs(site: Site) -> None:
    runs = reinstall(site, "web01", "web02", "web03")
    for name in ("web01", "web02"):
        site.store.runs.record_step(runs[name], Step.PREFLIGHT)
        site.store.runs.record_step(runs[name], Step.BOOT_RAMDISK)
    now = site.store.now
    site.store.now = lambda: now() + timedelta(seconds=2000)
    site.store.runs.tell_late({})
    found = parse(scrape(site, site.tokens["viewer"]).content)
    assert (found["repave_runs_live{step=boot-ramdisk}"], found["repave_runs_waiting"], found["repave_runs_late"]) == (2, 1, 2)
    assert (found["repave_instances{state=pending}"], found["repave_late_steps_total{step=boot-ramdisk}"]) == (3, 2)
    site.store.runs.record_ending(runs["web01"], Ending.PROVED, None)
    site.store.runs.record_ending(runs["web02"], Ending.RETURNED, RepaveError("agent-silent").as_json())
    found = parse(scrape(site, site.tokens["viewer"]).content)
    assert [found[f"repave_runs_total{{outcome={o}}}"] for o in ("proved", "returned", "write-failed")] == [1, 1, 0]
    assert (found["repave_run_errors_total{cause=agent-silent}"], found["repave_run_errors_total{cause=no-proof}"]) == (1, 0)
    assert found["repave_step_seconds_count{model=R1,step=boot-ramdisk}"] == 1
    assert (
        found["repave_step_seconds_bucket{le=1800.0,model=R1,step=boot-ramdisk}"],
        found["repave_step_seconds_bucket{le=3600.0,model=R1,step=boot-ramdisk}"],
    ) == (0, 1)
    assert 2000 <= found["repave_step_seconds_sum{model=R1,step=boot-ramdisk}"] < 2100
    assert (found["repave_images_imported_total"], found["repave_store_readable"], found["repave_runs_waiting"]) == (1, 1, 1)
    assert found["repave_database_seconds_count{kind=write}"] > 0 and any(name.startswith("repave_build_info{") for name in found)


def test_what_happened_is_counted_alike_after_a_restart_and_on_every_worker(site: Site) -> None:
    for _ in range(3):
        for run in reinstall(site, "web01", "web02").values():
            site.store.runs.record_step(run, Step.PREFLIGHT)
            site.store.runs.record_ending(run, Ending.PROVED, None)

    def happened(metrics: Metrics) -> Samples:
        names = ("repave_runs_total", "repave_step_seconds", "repave_images", "repave_late")
        return {name: value for name, value in parse(metrics.render()).items() if name.startswith(names)}

    def begin() -> Metrics:
        return Metrics(site.store, health=dict, chunk_bytes=lambda: 0, imports=[])

    first = begin()
    before = happened(first)
    assert before["repave_runs_total{outcome=proved}"] == 6 and happened(begin()) == happened(first) == before


def test_labels_are_few_and_no_value_of_a_secret_is_there(site: Site) -> None:
    for number in range(MODELS_MAX + 5):
        server = site.add_server(f"odd{number:02}")
        site.store.servers.set_server(server["id"], model=f"Model {number}")
    names = [f"odd{n:02}" for n in range(MODELS_MAX + 5)]
    for run in reinstall(site, *names).values():
        site.store.runs.record_step(run, Step.PREFLIGHT)
        site.store.runs.record_ending(run, Ending.PROVED, None)
    text = scrape(site, site.tokens["viewer"]).text
    models = set(re.findall(r'model="([^"]*)"', text))
    assert len(models) == MODELS_MAX + 1 and "other" in models
    assert len(text.splitlines()) < 2000
    for secret in (NEW_PASSWORD, BMC_PASSWORD, "bmc.invalid", site.project.id, *site.tokens.values()):
        assert secret not in text


def test_a_database_that_takes_nothing_leaves_the_rest_readable(site: Site) -> None:
    metrics = Metrics(site.store, health=dict, chunk_bytes=lambda: 7, imports=[])
    site.store.close()
    Path(str(site.store.engine.url.database)).rename(site.images.folder.parent / "away")
    Path(str(site.store.engine.url.database)).mkdir()
    found = parse(metrics.render())
    assert (found["repave_store_readable"], found["repave_chunk_bytes_total"]) == (0, 7) and "repave_runs_waiting" not in found


def test_requests_to_bmcs_are_counted_by_how_they_ended(site: Site) -> None:
    metrics = Metrics(site.store, health=dict, chunk_bytes=lambda: 0, imports=[])
    fake = FakeBmc("small", resources=small_bmc())
    with start_bmc(fake), RedfishBmc(BmcAddress(fake.url, "admin", "secret"), deadline_s=10, count=metrics.count_bmc) as bmc:
        bmc.probe()
    with RedfishBmc(BmcAddress("http://127.0.0.1:1", "admin", "secret"), deadline_s=2, count=metrics.count_bmc) as bmc, pytest.raises(BmcError):
        bmc.probe()
    found = parse(metrics.render())
    assert found["repave_bmc_requests_total{method=GET,outcome=2xx}"] >= 3 and found["repave_bmc_requests_total{method=GET,outcome=unreachable}"] >= 1


def test_a_workers_beat_ages_and_chunk_bytes_are_seen_through_shared_memory(site: Site) -> None:
    with site.store.write() as conn:
        beat = {"executor_id": "w-1", "slot": "boot/1/77", "host": "ctl1", "application_version": "3", "reaped": False}
        conn.execute(WORKERS.insert().values(**beat, beat_at_ms=round((time.time() - 42) * 1000)))
    sent = ChunkBytes()
    sent._counters[3] += 5
    found = parse(Metrics(site.store, health=dict, chunk_bytes=sent.read, imports=[object()]).render())
    assert 42 <= found["repave_worker_beat_age_seconds{worker=ctl1/77}"] < 50
    assert (found["repave_chunk_bytes_total"], found["repave_imports_under_way"]) == (5, 1)
