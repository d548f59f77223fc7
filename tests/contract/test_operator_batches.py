import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from operator_site import NEW_PASSWORD, Site, start_site

from repave.domain.model import Host, Step
from repave.domain.states import Ending
from repave.errors import RepaveError


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
        ({"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD, "ssh_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----\ncanary-7!"]}, 400),
        ({"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD, "ssh_keys": ["ssh-ed25519 AAAA a\nssh-ed25519 BBBB b"]}, 400),
        ({"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD, "plan": "p-00000000"}, 409),
    ):
        answer = site.ask("POST", "/reinstall", json=body)
        assert answer.status_code == status, answer.text
        assert str(body["password"]) not in answer.text and "canary" not in answer.text
    assert site.ask("GET", "/batches").json()["items"] == []
    plan = site.ask("POST", "/plans", json={"servers": ["web01", "web02"], "image": "tiny"}).json()
    batch = reinstall(site, ["web01"], instance_ids=[second["instance"]["id"]], plan=plan["id"], ssh_keys=["ssh-ed25519 AAAAC3Nz op@desk"])
    assert {r["instance_id"] for r in batch["runs"]} == {first["instance"]["id"], second["instance"]["id"]}
    assert batch["counts"] == {"running": 0, "working": 0, "waiting": 2, "failed": 0, "rehearsed": 0, "cancelled": 0}
    again = site.ask("POST", "/reinstall", json={"servers": ["web02"], "image": "tiny", "password": NEW_PASSWORD})
    assert (again.status_code, again.json()["class"]) == (409, "in-progress")


def test_an_image_that_a_live_run_needs_stays_and_the_refusal_names_the_servers(site: Site) -> None:
    for name in ("web01", "web02", "web03"):
        site.add_server(name)
    site.add_image("tiny")
    batch = reinstall(site, ["web02", "web01"])
    refused = site.ask("DELETE", "/images/tiny")
    assert (refused.status_code, refused.json()["class"]) == (409, "in-progress")
    assert "web01, web02." in refused.text and "web03" not in refused.text
    assert [i["name"] for i in site.ask("GET", "/images").json()["items"]] == ["tiny"]
    for run in batch["runs"]:
        site.store.runs.record_ending(run["id"], Ending.RETURNED, None)
    assert site.ask("DELETE", "/images/tiny").status_code == 204


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
    assert site.ask("GET", f"/runs/{run['id']}", as_="viewer").json() == run
    assert site.ask("GET", f"/runs/{run['id']}", as_="other").status_code == site.ask("GET", "/runs/nothing").status_code == 404
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
    assert site.ask("GET", f"/events?after={10**20}").status_code == 400
    assert site.ask("GET", "/events", headers={"Last-Event-ID": str(10**20)}).status_code == 400
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(listed["next"])}
    with site.ask("GET", f"/events?batch={batch['id']}", headers=headers, stream=True) as stream:
        lines = stream.content.decode().splitlines()  # returns, so the stream has ended by itself
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [e["type"] for e in events] == ["run.accepted", "run.step", "run.ended", "run.step", "run.ended", "batch.ended"]
    assert [int(line[4:]) for line in lines if line.startswith("id: ")] == [e["seq"] for e in events]
    assert not any(e.get("batch") for e in site.ask("GET", "/events", as_="other").json()["items"])
    assert site.ask("GET", f"/events?batch={batch['id']}", as_="other").status_code == 404


# ---- waves, cancel, rehearse, retry, protection ----


def fail(site: Site, run_id: str) -> None:
    site.store.runs.record_step(run_id, Step.BOOT_RAMDISK)
    site.store.runs.record_ending(run_id, Ending.RETURNED, RepaveError("boot_override_ignored").as_json())


def by_server(site: Site, batch_id: str) -> dict[str, dict[str, Any]]:
    return {r["server"]: r for r in site.ask("GET", f"/batches/{batch_id}").json()["runs"]}


@pytest.fixture
def three(site: Site) -> list[str]:
    for name in ("web01", "web02", "web03"):
        site.add_server(name)
    site.add_image("tiny")
    return ["web01", "web02", "web03"]


def test_a_waiting_run_says_why_it_waits_and_a_stopped_batch_what_was_not_started(site: Site, three: list[str]) -> None:
    batch = reinstall(site, three, canary=1, at_once=2, max_failed=0)
    assert (batch["canary"], batch["at_once"], batch["max_failed"], batch["stopped"]) == (1, 2, 0, None)
    assert [r["waits_for"] for r in batch["runs"]] == ["", "the 1 canaries go first", "the 1 canaries go first"]
    fail(site, batch["runs"][0]["id"])
    after = site.ask("GET", f"/batches/{batch['id']}").json()
    assert (after["state"], after["stopped"], after["counts"]["failed"], after["counts"]["cancelled"]) == ("failed", "1 of 3 failed, max-failed 0", 1, 2)
    assert {r["error"]["cause"] for r in after["runs"][1:]} == {"not started: 1 of 3 failed, max-failed 0"}
    types = [e["type"] for e in site.ask("GET", f"/events?batch={batch['id']}").json()["items"]]
    assert types.index("batch.stopped") < types.index("batch.ended")


@pytest.mark.parametrize("bad", [{"canary": 0}, {"at_once": 0}, {"max_failed": -1}, {"canary": "x"}, {"retry": "b"}])
def test_a_wave_that_makes_no_sense_is_refused_by_its_name(site: Site, three: list[str], bad: dict[str, Any]) -> None:
    answer = site.ask("POST", "/reinstall", json={"servers": three, "image": "tiny", "password": NEW_PASSWORD} | bad)
    assert answer.status_code == 400 and next(iter(bad)) in answer.json()["cause"]
    assert site.ask("GET", "/batches").json()["items"] == []


def test_cancel_tells_what_became_of_each_run_and_refuses_what_is_past_the_line(site: Site, three: list[str]) -> None:
    batch = reinstall(site, three, at_once=2)
    runs = {r["server"]: r["id"] for r in batch["runs"]}
    site.store.runs.record_step(runs["web01"], Step.BOOT_RAMDISK)
    site.store.runs.record_plan(runs["web01"], {"plan_id": "p1", "disk_path": "/dev/vda", "disk_serial": "D1"})
    assert site.store.runs.record_crossing(runs["web01"], "p1")
    path = f"/batches/{batch['id']}/cancel"
    assert site.ask("POST", path, json={}, as_="viewer").status_code == 403
    assert site.ask("POST", path, json={"servers": ["web09"]}).status_code == 404
    refused = site.ask("POST", path, json={"servers": ["web01"]}, as_="operator")
    assert (refused.status_code, refused.json()["class"]) == (409, "past-the-line")
    assert "repave watch" in refused.json()["do"]
    assert site.ask("POST", f"/runs/{runs['web01']}/cancel", as_="other").status_code == 404
    done = site.ask("POST", path, json={}, as_="operator").json()["items"]
    assert [(i["server"], i["result"]) for i in done] == [("web01", "past-the-line"), ("web02", "returning"), ("web03", "not-started")]
    assert site.ask("POST", f"/runs/{runs['web03']}/cancel").json()["items"][0]["result"] == "ended"
    after = by_server(site, batch["id"])
    assert (after["web02"]["cancelling"], after["web03"]["state"], after["web03"]["error"]["class"]) == (True, "cancelled", "cancelled")
    assert after["web01"]["state"] == "working"
    status = site.ask("GET", "/servers/web03").json()["instance"]
    assert (status["state"], status["operation_state"]) == ("running", "reinstall-failed")


def test_a_batch_is_paused_and_goes_on(site: Site, three: list[str]) -> None:
    batch = reinstall(site, three, at_once=1)
    paused = site.ask("POST", f"/batches/{batch['id']}/pause", as_="operator").json()
    assert paused["paused_at"] and {r["waits_for"] for r in paused["runs"][1:]} == {"the batch is paused"}
    going = site.ask("POST", f"/batches/{batch['id']}/resume", as_="operator").json()
    assert going["paused_at"] is None
    assert {r["waits_for"] for r in going["runs"][1:]} == {"1 of this batch at once"}
    assert site.ask("POST", f"/batches/{batch['id']}/pause", as_="viewer").status_code == 403
    assert site.ask("POST", f"/batches/{batch['id']}/pause", as_="other").status_code == 404


def test_a_rehearsal_needs_no_password_and_shows_what_it_learnt(site: Site, three: list[str]) -> None:
    batch = reinstall(site, ["web01"], rehearse=True, password="")
    run_id = batch["runs"][0]["id"]
    site.store.runs.record_step(run_id, Step.BOOT_RAMDISK)
    disk = {"path": "/dev/vda", "serial": "D1", "wwn": "", "model": "M", "size_bytes": 2**40}
    site.store.runs.record_hello(run_id, "b", {"boot_id": "b", "macs": ["aa:bb"], "memory_bytes": 5, "firmware": "uefi", "disks": [disk, disk | {"path": "x"}]})
    site.store.runs.record_plan(run_id, {"plan_id": "p1", "disk_path": "/dev/vda", "disk_serial": "D1", "rehearse": True})
    assert not site.store.runs.record_crossing(run_id, "p1")
    learnt = {"data_bytes": 7, "stored_bytes": 5, "chunks": 1, "fetched_bytes": 5, "fetch_s": 0.1, "expected_fetch_s": 3.0}
    site.store.runs.record_report(run_id, {"epoch": 0, "verified": False, "error": None, "rehearsal": learnt})
    assert site.store.runs.get_run(run_id).verified_at is None
    site.store.runs.record_ending(run_id, Ending.REHEARSED, None)
    after = site.ask("GET", f"/batches/{batch['id']}").json()
    run = after["runs"][0]
    assert (after["state"], run["state"], run["outcome"], run["error"]) == ("succeeded", "rehearsed", "rehearsed", None)
    assert (run["rehearsal"]["disk"]["serial"], run["rehearsal"]["disks"], run["rehearsal"]["data_bytes"]) == ("D1", 2, 7)
    assert run["rehearsal"]["expected_s"] >= 3
    shown = site.ask("GET", "/servers/web01").json()["instance"]
    assert (shown["state"], shown["operation_state"], shown["image"]) == ("running", None, None)


def test_a_retry_is_a_new_batch_of_what_did_not_end_well_with_the_same_images(site: Site, three: list[str]) -> None:
    batch = reinstall(site, three)
    runs = {r["server"]: r["id"] for r in batch["runs"]}
    site.store.runs.record_ending(runs["web01"], Ending.PROVED, None)
    assert site.ask("POST", "/plans", json={"retry": batch["id"]}).status_code == 409
    for name in ("web02", "web03"):
        fail(site, runs[name])
    plan = site.ask("POST", "/plans", json={"retry": batch["id"]}).json()
    assert [(e["server"], e["image"]) for e in plan["erased"]] == [("web02", "tiny"), ("web03", "tiny")]
    assert plan["problems"] == []
    asked = {"retry": batch["id"], "password": NEW_PASSWORD, "plan": plan["id"]}
    assert site.ask("POST", "/reinstall", json=asked | {"servers": ["web01"]}).status_code in (400, 409)
    again = site.ask("POST", "/reinstall", json=asked, as_="operator").json()
    assert again["id"] != batch["id"] and [r["server"] for r in again["runs"]] == ["web02", "web03"]
    assert site.ask("POST", "/plans", json={"retry": batch["id"]}, as_="other").status_code == 404


def test_a_retry_of_a_rehearsal_is_a_rehearsal_of_what_failed_and_never_a_reinstall(site: Site, three: list[str]) -> None:
    batch = reinstall(site, three, rehearse=True, password="")
    runs = {r["server"]: r["id"] for r in batch["runs"]}
    for name in ("web01", "web03"):
        site.store.runs.record_ending(runs[name], Ending.REHEARSED, None)
    fail(site, runs["web02"])
    asked = {"retry": batch["id"], "password": NEW_PASSWORD}
    refused = site.ask("POST", "/reinstall", json=asked)
    assert refused.status_code == 400 and "rehearse:" in refused.json()["detail"]
    again = site.ask("POST", "/reinstall", json=asked | {"rehearse": True}).json()
    assert again["rehearse"] and [r["server"] for r in again["runs"]] == ["web02"]


def test_a_server_that_can_not_reach_us_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    with start_site(tmp_path, media_url="http://127.0.0.1:8472") as site:
        site.add_server("web01")
        site.add_image("tiny")
        problems = site.ask("POST", "/plans", json={"servers": ["web01"], "image": "tiny"}).json()["problems"]
        assert [p["class"] for p in problems] == ["loopback-address"] and problems[0]["cause"].startswith("media_url")


def test_a_locked_server_and_our_own_host_are_problems_of_the_plan_and_refused(site: Site, three: list[str]) -> None:
    assert site.ask("POST", "/servers/web02/lock", json={"reason": ""}).status_code == 400
    assert site.ask("POST", "/servers/web02/lock", json={"reason": "database"}, as_="viewer").status_code == 403
    shown = site.ask("POST", "/servers/web02/lock", json={"reason": "database"}, as_="operator").json()
    assert (shown["lock"]["reason"], shown["lock"]["by"]) == ("database", "the operator")
    site.store.servers.record_host(Host("h", "control", "SN3", "", ()))
    plan = site.ask("POST", "/plans", json={"servers": three, "image": "tiny"}).json()
    assert [(p["server"], p["class"]) for p in plan["problems"]] == [("web02", "locked"), ("web03", "own-host")]
    for name, slug in (("web02", "locked"), ("web03", "own-host")):
        answer = site.ask("POST", "/reinstall", json={"servers": ["web01", name], "image": "tiny", "password": NEW_PASSWORD})
        assert (answer.status_code, answer.json()["class"]) == (409, slug)
    assert site.ask("GET", "/batches").json()["items"] == []
    assert site.ask("POST", "/servers/web02/unlock", as_="operator").json()["lock"] is None
    reinstall(site, ["web01", "web02"])


def test_a_step_with_enough_history_shows_what_is_usual_what_is_left_and_what_is_late(site: Site, three: list[str]) -> None:
    clock = datetime.now(UTC)
    site.store.now = lambda: clock
    for _ in range(5):
        run_id = reinstall(site, ["web01"])["runs"][0]["id"]
        for step in Step:
            site.store.runs.record_step(run_id, step)
            clock += timedelta(seconds=60)
        site.store.runs.record_ending(run_id, Ending.PROVED, None)
    assert site.ask("POST", "/plans", json={"servers": ["web02"], "image": "tiny"}).json()["erased"][0]["usual_s"] == 480
    batch = reinstall(site, ["web02"])
    site.store.runs.record_step(batch["runs"][0]["id"], Step.PREFLIGHT)
    clock += timedelta(seconds=30)
    run = by_server(site, batch["id"])["web02"]
    assert (run["usual_s"], run["late"], run["eta_s"]) == (60.0, False, 450.0)
    clock += timedelta(seconds=90)
    run = by_server(site, batch["id"])["web02"]
    assert (run["usual_s"], run["late"], run["eta_s"]) == (60.0, True, None)
