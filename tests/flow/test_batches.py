"""Whole batches on scripted machines: what a client is told, what is on the disks, what the BMCs show, and that no secret stays."""

from __future__ import annotations

import base64
import gzip
import tomllib
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import zstandard
from secret_scan import CRYPT_HASH, encodings_of, find_secret

from repave.lab import scripted_os
from repave.secrets import Sealer

CANARY = "Canary+7/x!9Zq"
SHORT_S = 20  # on two busy cores an agent says hello after 1 to 8 s


# ---- a batch that goes well ----


@pytest.fixture(scope="module")
def batch_of_six(lab):
    """One PUT for all six; what the first read said, and the runs at their end."""
    for name in lab.names:
        lab.scribble(name)
    boots = {name: lab.console(name).count("first boot as") for name in lab.names}
    accepted = lab.reinstall(lab.names, "tiny-1", password=CANARY)
    first = {name: lab.status(name) for name in lab.names}
    return {"accepted": accepted, "boots": boots, "first": first, "batch": lab.newest_batch(), "runs": lab.wait_for_end(lab.newest_batch())}


def test_the_202_names_the_ids_in_the_order_of_the_request(lab, batch_of_six):
    assert batch_of_six["accepted"] == [lab.ids[name] for name in lab.names]


def test_every_instance_is_pending_on_the_first_read_and_running_at_the_end(lab, batch_of_six):
    assert {(s["state"], s["operation_state"]) for s in batch_of_six["first"].values()} == {("pending", "reinstall-processing")}
    for name in lab.names:
        assert lab.status(name) == {"state": "running", "operation_state": "reinstall-succeed"}


def test_every_disk_holds_the_image_also_where_it_is_zero_and_no_config_drive(lab, batch_of_six):
    for name in lab.names:
        assert lab.differences(name, lab.folder / "tiny-1.raw") == []
        assert scripted_os.find_os(lab.machines[name].root_disk) == "new OS"
        assert scripted_os.find_config_drive(lab.machines[name].root_disk) is None
        assert lab.console(name).count("first boot as") == batch_of_six["boots"][name] + 1


def test_media_are_out_the_override_is_off_and_the_power_is_on(lab, batch_of_six):
    for name in lab.names:
        assert lab.bmc(name) == {"power": "On", "boot": "Hdd", "media": ""}


def test_the_proof_names_the_disk_of_the_plan_and_the_host_key_is_kept(lab, batch_of_six):
    for name, run in batch_of_six["runs"].items():
        assert run["proof"]["root_disk_serial"] == run["disk_serial"] == lab.machines[name].root_serial
        assert run["proof"]["ssh_host_keys"][0].startswith("ssh-ed25519 ")


def test_the_service_counts_what_it_did(lab, batch_of_six):
    answer = requests.get(f"{lab.values['endpoint']}/metrics", headers={"Authorization": f"Bearer {lab.values['token']}"}, timeout=30)
    found = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(found['repave_runs_total{outcome="proved"}']) >= 6
    image = lab.image("tiny-1")
    assert float(found["repave_chunk_bytes_total"]) >= 6 * image["stored_bytes"]
    assert float(found['repave_bmc_requests_total{method="POST",outcome="2xx"}']) > 0
    assert float(found['repave_healthy{part="database"}']) == 1
    document = requests.get(f"{lab.values['endpoint']}/repave/v1/openapi.json", timeout=30).json()
    assert {"/v1/{project_id}/instances/reinstall", "/repave/v1/reinstall", "/repave/v1/health"} <= document["paths"].keys()


def test_no_key_of_an_ended_run_is_left_also_after_a_restart(lab, batch_of_six):
    assert lab.keys() == []
    lab.kill_service()
    lab.start_service()
    assert lab.keys() == []


# ---- no secret leaves ----


def site_files(lab) -> list[Path]:
    """Everything that Repave wrote, and all that machines and BMCs showed. The images are public, and large."""
    files = [p for p in (lab.folder / "site").rglob("*") if p.is_file() and "chunks" not in p.parts]
    return [*files, *lab.folder.glob("*.log"), *(lab.folder / "rack").glob("*.log"), *(m.console for m in lab.machines.values())]


@pytest.mark.parametrize("kind", sorted(encodings_of(CANARY)))
def test_the_scanner_finds_the_secret_however_it_is_encoded(tmp_path, kind):
    file = tmp_path / "file"
    text = f'{{"password": "{CANARY}"}}'
    wholes = {"raw": text.encode(), "hex": text.encode().hex().encode(), "HEX": text.encode().hex().upper().encode(), "url": urllib.parse.quote(text).encode()}
    wholes |= {"url": urllib.parse.quote(text, safe="").encode(), "utf-16-le": text.encode("utf-16-le"), "utf-16-be": text.encode("utf-16-be")}
    for shift in range(3):
        padding = "x" * ((shift - text.index(CANARY)) % 3)
        wholes[f"base64+{shift}"] = base64.b64encode((padding + text).encode())
        wholes[f"base64url+{shift}"] = base64.urlsafe_b64encode((padding + text).encode())
    for pack, prefix in ((bytes, ""), (gzip.compress, "packed "), (zstandard.ZstdCompressor().compress, "packed ")):
        file.write_bytes(b"\xff\0" * 1000 + pack(wholes[kind]) + b"\0" * 1000)
        assert f"file: {prefix}{kind}" in find_secret(iter([file]), CANARY)


def test_password_its_hash_and_bmc_passwords_are_nowhere_after_the_batch(lab, batch_of_six):
    files = site_files(lab)
    names = {p.name for p in files}
    assert {"repave.db", "repave.db-wal", "service.log", "lab01.console"} <= names
    for secret in (CANARY, *(lab.machines[name].bmc_password for name in lab.names)):
        assert find_secret(iter(files), secret) == []
    assert [p.name for p in files if CRYPT_HASH.search(p.read_bytes())] == []


def test_a_windows_run_ends_running_and_its_password_is_nowhere_in_the_site_at_any_time(lab):
    """Windows gets the password itself, sealed while its run lasts. (The scripted OS reads the drive as cloudbase-init would.)"""
    lab.set_faults(lab07="hold-disk-boot")
    lab.reinstall(["lab07"], "windows-2022", password=CANARY)
    batch = lab.newest_batch()
    lab.wait_for_event(batch, "run.step", server="lab07", step="first-boot")
    assert find_secret(iter(site_files(lab)), CANARY) == []
    lab.set_faults()
    assert {r["state"] for r in lab.wait_for_end(batch).values()} == {"running"}
    assert lab.status("lab07") == {"state": "running", "operation_state": "reinstall-succeed"}
    assert find_secret(iter(site_files(lab)), CANARY) == []
    assert scripted_os.find_config_drive(lab.machines["lab07"].root_disk) is None
    assert lab.keys() == []


def test_what_each_server_got_of_its_own_is_nowhere_in_clear_and_its_key_holds_over_a_kill(lab):
    """Passwords and user data that differ by server; the same request again, with its Idempotency-Key, once the service was killed."""
    own = {name: {"password": f"{CANARY}-{number}", "user_data": f"#!/bin/true {CANARY}", "hostname": f"own-{number}"} for number, name in enumerate(lab.names)}
    body = {"servers": lab.names, "image": "tiny-1", "password": CANARY, "each": own}

    def ask() -> requests.Response:
        headers = {"X-Auth-Token": lab.values["token"], "Idempotency-Key": f"key-{CANARY}"}
        return requests.post(f"{lab.values['endpoint']}/repave/v1/reinstall", json=body, headers=headers, timeout=60)

    first = ask()
    assert first.status_code == 202, first.text
    lab.kill_service()
    assert find_secret(iter(site_files(lab)), CANARY) == []
    lab.start_service()
    again = ask()
    assert (again.status_code, again.json()["id"], again.headers["idempotent-replayed"]) == (202, first.json()["id"], "true")
    assert {r["state"] for r in lab.wait_for_end(first.json()["id"]).values()} == {"running"}
    for number, name in enumerate(lab.names):
        assert f"first boot as own-{number};" in lab.console(name)
    assert find_secret(iter(site_files(lab)), CANARY) == []


# ---- a second request for the same instances ----


def test_a_put_for_instances_under_way_is_refused_naming_them_and_starts_nothing(lab):
    from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException

    busy, idle = ["lab01", "lab02"], "lab03"
    lab.reinstall(busy, "heavy")
    batch, batches = lab.newest_batch(), lab.batches()
    with pytest.raises(ClientRequestException) as refused:
        lab.reinstall([*busy, idle], "tiny-2")
    assert (refused.value.status_code, refused.value.error_code) == (400, "iMetal.0201")
    assert all(lab.ids[name] in refused.value.error_msg for name in busy) and lab.ids[idle] not in refused.value.error_msg
    assert lab.batches() == batches and lab.status(idle)["state"] == "running"
    assert {r["state"] for r in lab.wait_for_end(batch).values()} == {"running"}
    assert lab.differences("lab01", lab.folder / "heavy.raw") == []


# ---- batches that go wrong ----


@pytest.fixture(scope="module")
def troubles(lab):
    """One batch of three: lab01 never says hello, lab02 never calls home, lab03 does well. The waits are short."""
    lab.set_faults(lab01="no-hello", lab02="never-home")
    before = {"digest": lab.disk_digest("lab01"), "console": len(lab.console("lab01"))}
    with lab.short_waits(SHORT_S):
        lab.reinstall(["lab01", "lab02", "lab03"], "tiny-2")
        batch = lab.newest_batch()
        lab.wait_for_event(batch, "run.crossed", server="lab02")
        run = lab.runs(batch)["lab02"]["id"]
        # What the config drive carries, and the new OS would show as its proof.
        nonce = Sealer.open(lab.folder / "site/secret/key").derive_for_run(run, "nonce")
        lab.wait_for_end(batch)
        return {"batch": batch, "before": before, "nonce": nonce, "run": run}


def test_a_machine_that_never_says_hello_runs_its_old_os_again_and_its_disk_is_untouched(lab, troubles):
    assert lab.disk_digest("lab01") == troubles["before"]["digest"]
    assert lab.bmc("lab01") == {"power": "On", "boot": "Hdd", "media": ""}
    assert lab.console("lab01")[troubles["before"]["console"] :].rstrip().splitlines()[-1].startswith("boot: disk")
    status = lab.status("lab01")
    assert (status["state"], status["operation_state"], status["error"]["error_code"]) == ("running", "reinstall-failed", "Repave.2110")


def test_one_machine_in_trouble_does_not_stop_the_others(lab, troubles):
    assert lab.status("lab03") == {"state": "running", "operation_state": "reinstall-succeed"}
    assert lab.differences("lab03", lab.folder / "tiny-2.raw") == []


def test_a_new_os_that_never_calls_home_is_an_error_and_its_late_proof_ends_it(lab, troubles):
    lab.watch.excuse("I12 lab02: error/")  # left by a proof of a run that an earlier test began
    lab.watch.excuse("I5 lab02: running, and no new OS called home")  # this test calls home in its place
    status = lab.status("lab02")
    assert (status["state"], status["operation_state"], status["error"]["error_code"]) == ("error", "reinstall-failed", "Repave.5101")
    assert lab.bmc("lab02") == {"power": "On", "boot": "Hdd", "media": ""}

    settings = tomllib.loads((lab.folder / "site/repave.toml").read_text())
    home = {"boot_id": "5e3f", "root_disk_serial": lab.machines["lab02"].root_serial, "ssh_host_keys": [], "password_usable": True}
    url, ca = f"{settings['agent_url']}/home/v1/{troubles['run']}", lab.folder / "site/secret/ca.pem"
    assert requests.post(url, json=home, headers={"Authorization": "Bearer wrong"}, verify=ca, timeout=30).status_code == 401
    assert lab.status("lab02")["state"] == "error"
    assert requests.post(url, json=home, headers={"Authorization": f"Bearer {troubles['nonce']}"}, verify=ca, timeout=30).status_code == 200
    assert lab.status("lab02") == {"state": "running", "operation_state": "reinstall-succeed"}


@contextmanager
def damaged_chunk(lab) -> Iterator[None]:
    """One bit of the heavy image's last chunk is wrong in the store; its size is right."""
    path = lab.images.chunk_path(next(c for c in reversed(lab.heavy_manifest().chunks) if c.extents).sha256)
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        yield
    finally:
        path.write_bytes(good)


def test_a_chunk_damaged_before_the_batch_is_found_before_a_machine_is_touched(lab):
    before = (lab.console("lab05"), lab.disk_digest("lab05"))
    with damaged_chunk(lab):
        lab.reinstall(["lab05"], "heavy")
        lab.wait_for_end(lab.newest_batch())
    status = lab.status("lab05")
    assert (status["state"], status["operation_state"], status["error"]["error_code"]) == ("running", "reinstall-failed", "Repave.4102")
    assert (lab.console("lab05"), lab.disk_digest("lab05")) == before
    assert lab.bmc("lab05")["power"] == "On"


def test_a_chunk_damaged_after_preflight_is_never_written_and_the_half_written_disk_can_not_boot(lab):
    lab.reinstall(["lab04"], "heavy")
    batch = lab.newest_batch()
    lab.wait_for_event(batch, "run.step", step="power-off")
    with damaged_chunk(lab):
        lab.wait_for_end(batch)
    status = lab.status("lab04")
    assert (status["state"], status["operation_state"], status["error"]["error_code"]) == ("error", "reinstall-failed", "Repave.4102")
    assert lab.first_sector("lab04") == bytes(512)
    assert lab.bmc("lab04") == {"power": "Off", "boot": "Hdd", "media": ""}
    assert lab.keys() == []
    assert lab.image("heavy")["doubted_at"]
    lab.client.post("/images/heavy/verify", {})
    assert lab.image("heavy")["doubted_at"] is None

    lab.reinstall(["lab04"], "heavy")
    lab.wait_for_end(lab.newest_batch())
    assert lab.status("lab04") == {"state": "running", "operation_state": "reinstall-succeed"}
    assert lab.differences("lab04", lab.folder / "heavy.raw") == []
