"""What machines say during a run is kept with it: whole, bounded, in order, and without the run's secrets."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import requests
from conftest import PASSWORD, wait_until
from secret_scan import find_in

from repave.secrets import Sealer


@pytest.fixture
def console_of(lab):
    """GET console of a run: the answer."""

    def ask(run_id, as_="token", **params):
        url = f"{lab.values['endpoint']}/repave/v1/runs/{run_id}/console"
        return requests.get(url, params=params, headers={"X-Auth-Token": lab.values[as_]}, timeout=30)

    return ask


def test_a_run_keeps_what_its_server_said_from_the_first_byte_and_what_its_agent_said(lab, console_of):
    before = lab.console("lab01")
    lab.reinstall(["lab01"], "tiny-1")
    run = lab.wait_for_end(lab.newest_batch())["lab01"]
    added = lab.console("lab01").removeprefix(before)
    wait_until(lambda: console_of(run["id"]).text == added, deadline_s=10, what=lambda: console_of(run["id"]).text)
    whole = console_of(run["id"])
    assert whole.headers["X-Repave-Source"] == "serial" and "boot: CD" in added and "home: taken" in added
    agents = console_of(run["id"], source="agent").text
    assert agents == "".join(line for line in added.splitlines(keepends=True) if line.startswith("repave-agent")) and "then power-off" in agents
    part = console_of(run["id"], after=100)
    assert part.text == added[100:] and part.headers["X-Repave-Next"] == str(len(added))


def test_a_console_is_followed_live_and_the_stream_ends_with_the_run(lab, console_of):
    lab.set_faults(lab02="hold-disk-boot")  # the new OS comes up when the test says so
    lab.reinstall(["lab02"], "tiny-1")
    batch = lab.newest_batch()
    lab.wait_for_event(batch, "run.step", step="power-off")
    command = [sys.executable, "-m", "repave.cli.main", "console", "lab02", "--follow"]
    follower = subprocess.Popen(
        command,
        cwd=lab.folder,
        env=os.environ | {"REPAVE_ENDPOINT": lab.values["endpoint"], "REPAVE_TOKEN": lab.values["token"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(follower.stdout.readline, "")))
    reader.start()
    wait_until(lambda: any("boot: disk" in line for line in said), deadline_s=60, what=lambda: "".join(said))
    assert lab.runs(batch)["lab02"]["state"] == "working"
    lab.set_faults()
    assert follower.wait(60) == 0
    reader.join()
    assert "boot: CD" in "".join(said) and said[-1] == "home: taken\n"


def test_a_secret_that_a_console_says_is_masked_in_what_is_kept(lab, console_of):
    """A canary: the machine itself says the run's tokens and a key, as a debugging OS might."""
    lab.set_faults(lab03="no-hello")
    lab.reinstall(["lab03"], "tiny-1", password=f"{PASSWORD}-console")
    batch = lab.newest_batch()
    lab.wait_for_event(batch, "run.step", step="boot-ramdisk")
    run_id = lab.runs(batch)["lab03"]["id"]
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcw\n-----END PRIVATE KEY-----\n"
    sealer = Sealer.open(lab.folder / "site/secret/key")
    tokens = [sealer.derive_for_run(run_id, purpose) for purpose in ("agent", "session", "media", "nonce")]
    written = "\n".join(f"{token} {token.encode().hex()} {base64.b64encode(token.encode()).decode()}" for token in tokens)
    file = lab.machines["lab03"].console
    said_before = file.stat().st_size
    with file.open("a") as console:
        console.write(f"{'.' * 5000}\n{written[:25]}")  # a look in the middle of a token
        console.flush()
        wait_until(lambda: "." * 5000 in console_of(run_id).text, deadline_s=10, what=lambda: console_of(run_id).text)
        console.write(f"{written[25:]}\n{key}\x1b[31mred\x1b[0m and the end\n")
    wait_until(lambda: "and the end" in console_of(run_id).text, deadline_s=10, what=lambda: console_of(run_id).text)
    lab.client.post(f"/batches/{batch}/cancel", {})
    lab.wait_for_end(batch)
    os.truncate(file, said_before)  # or the observers would find in it what this test put there
    shown = console_of(run_id).content
    assert b"red and the end" in shown and b"MIIE" not in shown and b"\x1b" not in shown
    assert find_in(shown, [f"{PASSWORD}-console", *tokens]) == []


def test_who_may_not_see_a_run_does_not_see_its_console(lab, console_of):
    lab.reinstall(["lab04"], "tiny-1")
    run = lab.wait_for_end(lab.newest_batch())["lab04"]
    assert console_of(run["id"], as_="readonly_token").status_code == 200 and console_of(run["id"], as_="expired_token").status_code == 401
    theirs = requests.get(f"{lab.values['endpoint']}/repave/v1/runs/{run['id']}/console", headers={"X-Auth-Token": lab.values["other"]["token"]}, timeout=30)
    assert theirs.status_code == 404
    assert console_of(run["id"], source="bmc").status_code == 400


def test_a_failed_run_is_one_file_with_cause_next_command_and_all_that_was_seen_and_no_secret(lab, tmp_path):
    password = f"{PASSWORD}-case"
    lab.set_faults(lab05="ignore-override")
    before = len(lab.console("lab05"))
    with lab.short_waits(4):
        lab.reinstall(["lab05"], "tiny-1", password=password)
        batch = lab.newest_batch()
        lab.wait_for_event(batch, "run.step", step="insert-media")
        run_id = lab.runs(batch)["lab05"]["id"]
        sealer = Sealer.open(lab.folder / "site/secret/key")
        tokens = [sealer.derive_for_run(run_id, purpose) for purpose in ("agent", "session", "media", "nonce")]
        assert lab.wait_for_end(batch)["lab05"]["state"] == "failed"
        shown = wait_until(lambda: _all_said(lab, "lab05", run_id, after=before), deadline_s=10, what=lambda: "its console's last lines are not there")
        assert "boot: disk" in shown
        env = os.environ | {"REPAVE_ENDPOINT": lab.values["endpoint"], "REPAVE_TOKEN": lab.values["token"]}
        files = []
        for folder in ("one", "two"):
            done = subprocess.run([sys.executable, "-m", "repave.cli.main", "case", batch, "--to", tmp_path / folder], env=env, capture_output=True, text=True)
            assert done.returncode == 0 and "Next: repave explain Repave.2110" in done.stderr, done.stderr
            files.append(Path(done.stdout.strip()))
    parts, again = (_read_parts(file) for file in files)
    assert parts == again
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {"README.txt", "run.json", "events.jsonl", "console-serial.txt", "bmc.jsonl", "server.json", "site.json"} <= set(parts)
    assert all(word in parts["README.txt"] for word in ("Repave.2110", "before the line", "root disk was not written", f"repave batch retry {batch}"))
    talk = [json.loads(line) for line in parts["bmc.jsonl"].splitlines()]
    insert = next(e for e in talk if e["path"].endswith("InsertMedia"))
    assert insert["method"] == "POST" and insert["status"] < 300 and insert["sent"]["Image"].endswith(f"/media/{run_id}/***/boot.iso") and insert["ms"] >= 0
    assert "as before" in [e.get("answer") for e in talk] and {e["method"] for e in talk} == {"GET", "POST", "PATCH"}
    assert "boot: disk" in parts["console-serial.txt"] and json.loads(parts["site.json"])["versions"]["dbos"]
    steps = [json.loads(line)["data"].get("step") for line in parts["events.jsonl"].splitlines()]
    assert [s for s in steps if s] == ["preflight", "power-off", "insert-media", "boot-ramdisk"]
    machine, admin = lab.machines["lab05"], json.loads((lab.folder / "site/admin.json").read_text())
    secrets = [password, machine.bmc_password, admin["token"], admin["sk"], *tokens]
    assert find_in(files[0].read_bytes(), secrets) == [] and all(find_in(text.encode(), secrets) == [] for text in parts.values())


def _read_parts(case_file):
    with tarfile.open(case_file) as tar:
        return {entry.name.partition("/")[2]: tar.extractfile(entry).read().decode() for entry in tar}


def _all_said(lab, name, run_id, *, after):
    """The run's console, where it has all that the server's file has since then."""
    shown = lab.client.fetch(f"/runs/{run_id}/console").decode()
    return shown if shown == lab.console(name)[after:] else None
