import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_site import NEW_PASSWORD, Site, start_site

from repave.domain.model import Step
from repave.domain.states import Ending


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path) as site:
        yield site


def reinstall(site: Site, names: list[str], **more: Any) -> dict[str, Any]:
    answer = site.ask("POST", "/reinstall", json={"servers": names, "image": "tiny", "password": NEW_PASSWORD} | more, as_="operator")
    assert answer.status_code == 202, answer.text
    batch: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/repave/v1/batches/{batch['id']}"
    return batch


def test_a_plan_names_what_is_erased_and_kept_and_touches_nothing(site: Site) -> None:
    for name in ("web01", "web02", "web03"):
        site.add_server(name, root_disk="serial=S1" if name == "web01" else "")
    site.add_image("tiny")
    site.add_image("arm", arch="arm64")
    before = site.ask("GET", "/events").text
    plan = site.ask("POST", "/plans", json={"servers": ["web01", "web02"], "image": "tiny"}, as_="viewer").json()
    assert [(e["server"], e["state"], e["image"]) for e in plan["erased"]] == [("web01", "running", "tiny"), ("web02", "running", "tiny")]
    assert plan["erased"][0]["root_disk"] == "serial=S1"
    assert (plan["kept"]["other_servers"], plan["problems"]) == (1, [])
    arm = site.ask("POST", "/plans", json={"servers": ["web01"], "image": "arm"}).json()
    assert [p["class"] for p in arm["problems"]] == ["arch-mismatch"]
    assert site.ask("POST", "/plans", json={"servers": ["web01"]}).json()["problems"][0]["class"] == "bad-request"
    assert site.ask("GET", "/events").text == before


def test_all_or_none_are_accepted_under_the_rules_of_the_wire(site: Site) -> None:
    first, second = site.add_server("web01"), site.add_server("web02")
    site.add_image("tiny")
    for body, status in (
        ({"servers": [], "image": "tiny", "password": NEW_PASSWORD}, 400),
        ({"servers": ["web01", "web01"], "image": "tiny", "password": NEW_PASSWORD}, 400),
        ({"servers": ["web01", "web09"], "image": "tiny", "password": NEW_PASSWORD}, 404),
        ({"servers": ["web01"], "image": "none", "password": NEW_PASSWORD}, 404),
        ({"servers": ["web01"], "image": "tiny", "password": "weak"}, 400),
        ({"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD, "plan": "p-00000000"}, 409),
    ):
        answer = site.ask("POST", "/reinstall", json=body)
        assert answer.status_code == status, answer.text
        assert str(body["password"]) not in answer.text
    assert site.ask("GET", "/batches").json()["items"] == []
    plan = site.ask("POST", "/plans", json={"servers": ["web01", "web02"], "image": "tiny"}).json()
    batch = reinstall(site, ["web01"], instance_ids=[second["instance"]["id"]], plan=plan["id"])
    assert {r["instance_id"] for r in batch["runs"]} == {first["instance"]["id"], second["instance"]["id"]}
    assert batch["counts"] == {"running": 0, "working": 0, "waiting": 2, "failed": 0}
    again = site.ask("POST", "/reinstall", json={"servers": ["web02"], "image": "tiny", "password": NEW_PASSWORD})
    assert (again.status_code, again.json()["class"]) == (409, "in-progress")


def test_a_run_shows_its_step_its_side_of_the_line_its_progress_and_its_end(site: Site) -> None:
    site.add_server("web01")
    image = site.add_image("tiny")
    batch = reinstall(site, ["web01"])
    run_id = batch["runs"][0]["id"]
    site.store.runs.record_step(run_id, Step.PREFLIGHT)
    site.store.runs.record_step(run_id, Step.BOOT_RAMDISK)
    run = site.ask("GET", f"/batches/{batch['id']}").json()["runs"][0]
    assert (run["state"], run["step"], run["step_index"], run["steps"], run["past_the_line"]) == ("working", "boot-ramdisk", 4, 8, False)
    site.store.runs.record_plan(run_id, {"plan_id": "p1", "disk_path": "/dev/vda", "disk_serial": "D1"})
    assert site.store.runs.record_crossing(run_id, "p1")
    site.store.runs.record_progress(run_id, {"stage": "write", "bytes_done": 25, "bytes_total": 100})
    run = site.ask("GET", f"/batches/{batch['id']}").json()["runs"][0]
    assert (run["past_the_line"], run["percent"], run["bytes_written"], run["bytes_total"], run["disk_serial"]) == (True, 25, 25, 100, "D1")
    site.store.runs.record_proof(run_id, {"root_disk_serial": "D1"})
    site.store.runs.record_ending(run_id, Ending.PROVED, None)
    ended = site.ask("GET", f"/batches/{batch['id']}").json()
    run = ended["runs"][0]
    assert (ended["state"], run["state"], run["os_now"], run["proof"]["root_disk_serial"]) == ("succeeded", "running", "tiny", "D1")
    assert {"preflight", "boot-ramdisk", "write-image"} <= run["durations_s"].keys()
    shown = site.ask("GET", "/servers/web01").json()["instance"]
    assert (shown["image"], shown["image_id"], shown["operation_state"]) == ("tiny", image.id, "reinstall-succeed")


def test_events_are_listed_and_followed_from_any_point_to_the_end_of_the_batch(site: Site) -> None:
    for name in ("web01", "web02"):
        site.add_server(name)
    site.add_image("tiny")
    batch = reinstall(site, ["web01", "web02"])
    listed = site.ask("GET", f"/events?batch={batch['id']}&limit=1").json()
    assert (listed["items"][0]["type"], listed["items"][0]["server"], listed["next"]) == ("run.accepted", "web01", listed["items"][0]["seq"])

    def end_all() -> None:
        for run in batch["runs"]:
            site.store.runs.record_step(run["id"], Step.PREFLIGHT)
            site.store.runs.record_ending(run["id"], Ending.RETURNED, None)

    threading.Timer(0.5, end_all).start()
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(listed["next"])}
    with site.ask("GET", f"/events?batch={batch['id']}", headers=headers, stream=True) as stream:
        lines = stream.content.decode().splitlines()  # returns, so the stream has ended by itself
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [e["type"] for e in events] == ["run.accepted", "run.step", "run.ended", "run.step", "run.ended", "batch.ended"]
    assert [int(line[4:]) for line in lines if line.startswith("id: ")] == [e["seq"] for e in events]
    assert not any(e.get("batch") for e in site.ask("GET", "/events", as_="other").json()["items"])
    assert site.ask("GET", f"/events?batch={batch['id']}", as_="other").status_code == 404
