"""What an operator may still do to a batch, on scripted machines: the real agent, the real service, the command line's own API."""

from __future__ import annotations

import itertools

import pytest

from repave.errors import RepaveError

PASSWORD = "Flow-7!canary"


def begin(lab, names: list[str], **how) -> str:
    password = "" if how.get("rehearse") else PASSWORD
    batch = lab.client.post("/reinstall", {"servers": names, "image": "tiny-2", "password": password} | how)
    return str(batch["id"])


def digests(lab, names: list[str]) -> list[str]:
    return [lab.disk_digest(name) for name in names]


def test_a_rehearsal_goes_up_to_the_line_writes_no_byte_and_the_old_os_runs_again(lab):
    names = ["lab01", "lab02"]
    before, said = digests(lab, names), {n: lab.status(n) for n in names}  # what an earlier reinstall ended with is said until the next one
    batch = begin(lab, names, rehearse=True)
    assert {lab.status(n)["state"] for n in names} == {"pending"}
    runs = lab.wait_for_end(batch)
    for name in names:
        run = runs[name]
        assert (run["state"], run["error"], run["past_the_line"]) == ("rehearsed", None, False), lab.describe(batch)
        assert run["rehearsal"]["disk"]["serial"] == lab.machines[name].root_serial
        assert run["rehearsal"]["fetched_bytes"] > 0 and run["rehearsal"]["expected_s"] > 0
        assert {"preflight", "power-off", "insert-media", "boot-ramdisk"} <= run["durations_s"].keys()
        assert "crossed the line" not in lab.console(name).rpartition("boot: CD")[2]
        assert lab.status(name) == {key: value for key, value in said[name].items() if key != "operation_state"}
        assert lab.bmc(name) == {"power": "On", "boot": "Hdd", "media": ""}
    assert digests(lab, names) == before
    assert lab.keys() == []


def test_a_run_cancelled_before_the_line_has_its_old_os_again_and_can_be_retried(lab):
    before = digests(lab, ["lab03"])
    lab.set_faults(lab03="no-hello")
    batch = begin(lab, ["lab03"])
    lab.wait_for_event(batch, "run.step", step="boot-ramdisk")
    said = lab.client.post(f"/batches/{batch}/cancel", {})["items"]
    assert [(i["server"], i["result"]) for i in said] == [("lab03", "returning")]
    run = lab.wait_for_end(batch, deadline_s=60)["lab03"]
    assert (run["state"], run["outcome"], run["error"]["class"]) == ("cancelled", "returned", "cancelled")
    assert lab.bmc("lab03") == {"power": "On", "boot": "Hdd", "media": ""}
    assert digests(lab, ["lab03"]) == before
    assert lab.status("lab03")["operation_state"] == "reinstall-failed"

    lab.set_faults()
    again = lab.client.post("/reinstall", {"retry": batch, "password": PASSWORD})
    assert lab.wait_for_end(again["id"])["lab03"]["state"] == "running"
    with pytest.raises(RepaveError) as refused:
        lab.client.post(f"/batches/{again['id']}/cancel", {"servers": ["lab09"]})
    assert refused.value.slug == "not-found"


def test_a_canary_that_fails_stops_the_batch_and_the_others_were_never_touched(lab):
    others = ["lab05", "lab06"]
    before, consoles = digests(lab, others), [lab.console(n) for n in others]
    lab.set_faults(lab04="ignore-override")
    with lab.short_waits(8):
        batch = begin(lab, ["lab04", *others], canary=1, max_failed=0)
        assert {r["waits_for"] for r in lab.runs(batch).values() if r["server"] in others} == {"the 1 canaries go first"}
        runs = lab.wait_for_end(batch)
    assert runs["lab04"]["error"]["class"] == "boot_override_ignored"
    for name in others:
        assert (runs[name]["state"], runs[name]["started_at"], runs[name]["error"]["class"]) == ("cancelled", None, "batch-stopped")
        assert runs[name]["error"]["cause"] == "not started: 1 of 3 failed, max-failed 0"
        assert lab.status(name)["state"] == "running"
    assert (digests(lab, others), [lab.console(n) for n in others]) == (before, consoles)


def test_waiting_runs_survive_a_killed_service_and_begin_one_after_the_other(lab):
    names = ["lab01", "lab02", "lab03"]
    batch = begin(lab, names, at_once=1)
    lab.wait_for_event(batch, "run.step", step="power-off")
    lab.kill_service()
    lab.start_service()
    runs = lab.wait_for_end(batch, deadline_s=180)
    assert {r["state"] for r in runs.values()} == {"running"}, lab.describe(batch)
    spans = sorted((r["started_at"], r["ended_at"]) for r in runs.values())
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(spans))
