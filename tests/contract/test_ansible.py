"""The Ansible collection, run by Ansible itself against a service: check mode changes nothing, a second run changes nothing, and no secret is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_site import BMC_PASSWORD, NEW_PASSWORD, Site, start_site

from repave.domain.states import Ending
from repave.errors import RepaveError

BIN = Path(sys.executable).parent
COLLECTION = Path(__file__).parents[2] / "integrations/ansible"
MIB = 1024 * 1024
OWN_PASSWORD = "Own-Start-43"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path / "site") as site:
        yield site


def ansible(site: Site, folder: Path, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("REPAVE_", "ANSIBLE_"))} | {
        "ANSIBLE_COLLECTIONS_PATH": str(COLLECTION), "ANSIBLE_HOME": str(folder / "home"), "ANSIBLE_LOCALHOST_WARNING": "false", "HOME": str(folder),
        "ANSIBLE_LOCAL_TEMP": str(folder / "tmp"), "ANSIBLE_REMOTE_TEMP": str(folder / "tmp"), "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
        "REPAVE_ENDPOINT": site.url, "REPAVE_TOKEN": site.tokens["admin"], "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return subprocess.run(command, env=env | more, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=180)


def play(site: Site, folder: Path, *tasks: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    """Each task is a module with its arguments and, in `that`, what is true of its result `r`; `check`: in check mode; `fails`: it does."""
    steps: list[dict[str, Any]] = []
    for task in tasks:
        task = dict(task)
        that, check, fails = task.pop("that"), task.pop("check", False), task.pop("fails", False)
        steps.append({f"repave.baremetal.{name}": of for name, of in task.items()} | {"register": "r", "check_mode": check, "ignore_errors": fails})
        steps.append({"ansible.builtin.assert": {"that": [that, "r is failed" if fails else "r is not failed"]}})
    variables = {"ansible_python_interpreter": sys.executable}
    (folder / "play.yml").write_text(json.dumps([{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": variables, "tasks": steps}]))
    return ansible(site, folder, BIN / "ansible-playbook", "-vvv", folder / "play.yml", **more)


def test_servers_and_images_come_change_and_go_and_nothing_is_done_twice(site: Site, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(6 * MIB) + os.urandom(2 * MIB) + bytes(16 * MIB))
    subprocess.run(["sfdisk", "-q", disk], input=b"label: gpt\nstart=1MiB, size=4MiB, type=uefi\ntype=linux\n", check=True)
    site.bmcs.known["https://web01.bmc.invalid"] = "SN1"
    server = {"name": "web01", "bmc_url": "https://web01.bmc.invalid", "bmc_username": "root", "bmc_password": BMC_PASSWORD, "root_disk": "serial=S1"}
    image = {"name": "debian", "src": str(disk)}
    said = play(
        site, tmp_path,
        {"repave_server": {"name": "web01"}, "that": "'bmc_url' in r.msg", "fails": True},
        {"repave_server": server, "check": True, "that": "r is changed and r.server is undefined"},
        {"repave_server": server, "that": "r is changed and r.server.serial == 'SN1'"},
        {"repave_server": server, "that": "r is not changed and r.server.name == 'web01'"},
        {"repave_server": server | {"rack": "R7", "locked": True, "lock_reason": "db"}, "check": True, "that": "r is changed and r.server.rack == ''"},
        {"repave_server": server | {"rack": "R7", "locked": True, "lock_reason": "db"}, "that": "r is changed and r.server.lock.reason == 'db'"},
        {"repave_server": {"name": "web01", "rack": "R7", "locked": True}, "that": "r is not changed"},
        {"repave_image": image, "check": True, "that": "r is changed and r.image is undefined"},
        {"repave_image": image, "that": "r is changed and r.image.size_bytes == 24 * 1024 * 1024"},
        {"repave_image": image, "that": "r is not changed"},
        {"repave_image": {"name": "debian", "state": "absent"}, "that": "r is changed"},
        {"repave_server": {"name": "web01", "state": "absent"}, "check": True, "that": "r is changed"},
        {"repave_server": {"name": "web01", "state": "absent"}, "that": "r is changed"},
        {"repave_server": {"name": "web01", "state": "absent"}, "that": "r is not changed"},
    )  # fmt: skip
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]
    assert BMC_PASSWORD not in said.stdout + said.stderr
    changes = [e["type"] for e in site.ask("GET", "/events").json()["items"] if e["type"].startswith(("server.", "image."))]
    assert changes == ["server.added", "server.changed", "server.locked", "image.added", "image.removed", "server.removed"]


def test_a_reinstall_is_planned_waited_for_left_out_where_it_is_done_and_fails_with_its_runs(site: Site, tmp_path: Path) -> None:
    for name in ("web01", "web02"):
        site.add_server(name)
    site.add_image("tiny")
    site.add_image("next")
    over, bad = threading.Event(), {"web02": RepaveError("no-proof").as_json()}

    def machines() -> None:
        """Every run ends well; with `next` web02's does not."""
        while not over.wait(0.05):
            for run in site.store.runs.list_runs(live=True):
                name = site.store.servers.get_server(run.server_id).name
                image = site.store.images.find_image(run.project_id, run.image_id)
                fails = image is not None and image.name == "next" and name in bad
                site.store.runs.record_ending(run.id, Ending.RETURNED if fails else Ending.PROVED, bad[name] if fails else None)

    thread = threading.Thread(target=machines, daemon=True)
    thread.start()
    asked = {
        "servers": ["web01", "web02"], "image": "tiny", "password": NEW_PASSWORD,
        "each": [{"server": "web02", "password": OWN_PASSWORD, "hostname": "db-7"}],
    }  # fmt: skip
    said = play(
        site, tmp_path,
        {"repave_reinstall": asked, "check": True, "that": "r is changed and r.plan.erased | map(attribute='hostname') | list == ['web01', 'db-7']"},
        {"repave_reinstall": asked, "that": "r is changed and r.batch.state == 'succeeded' and r.batch.counts.running == 2"},
        {"repave_reinstall": asked, "that": "r is not changed"},
        {"repave_reinstall": asked | {"password": "weak"}, "that": "r is not changed"},
        {"repave_reinstall": asked | {"force": True, "password": "weak", "each": []}, "check": True, "that": "r.problem.class == 'bad-request'", "fails": True},
        {"repave_reinstall": asked | {"image": "next"}, "that": "'web02: failed' in r.msg and r.batch.counts.running == 1", "fails": True},
        {"repave_reinstall": {**asked, "image": "none"}, "that": "r.problem.class == 'not-found'", "fails": True},
    )  # fmt: skip
    over.set()
    thread.join()
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]
    assert NEW_PASSWORD not in said.stdout and OWN_PASSWORD not in said.stdout
    batches = site.ask("GET", "/batches").json()["items"]
    assert [(b["image"], b["state"]) for b in batches] == [("next", "failed"), ("tiny", "succeeded")]


def test_the_inventory_has_each_server_its_address_and_its_groups(site: Site, tmp_path: Path) -> None:
    network = {"mac": "aa:bb:cc:00:00:01", "address": "10.0.0.11", "prefix": 24}
    site.add_server("web01", rack="R07", network=network)
    site.add_server("web02")
    (tmp_path / "repave.yml").write_text(
        json.dumps({"plugin": "repave.baremetal.repave", "keyed_groups": [{"key": "repave.arch", "prefix": "arch"}], "compose": {"serial": "repave.serial"}})
    )
    said = ansible(site, tmp_path, BIN / "ansible-inventory", "-i", "repave.yml", "--list")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout, object_hook=lambda of: of.get("__ansible_unsafe", of))  # what a service says is no template
    hosts = found["_meta"]["hostvars"]
    assert (hosts["web01"]["ansible_host"], hosts["web01"]["repave"]["rack"], hosts["web02"]["serial"]) == ("10.0.0.11", "R07", "SN2")
    groups = {name: of["hosts"] for name, of in found.items() if "hosts" in of}
    assert groups["repave_rack_R07"] == ["web01"] and groups["arch_amd64"] == groups["repave_state_running"] == ["web01", "web02"]
    assert "bmc.invalid" not in said.stdout
    wrong = ansible(site, tmp_path, BIN / "ansible-inventory", "-i", "repave.yml", "--list", REPAVE_TOKEN="wrong")
    assert "Who you are is not known" in wrong.stderr


def test_every_module_documents_itself(site: Site, tmp_path: Path) -> None:
    names = ["repave_server", "repave_image", "repave_reinstall"]
    said = ansible(site, tmp_path, BIN / "ansible-doc", "--json", *(f"repave.baremetal.{name}" for name in names))
    assert said.returncode == 0, said.stderr
    documents = json.loads(said.stdout)
    for name in names:
        document = documents[f"repave.baremetal.{name}"]
        assert {"endpoint", "token"} <= document["doc"]["options"].keys() and document["examples"] and document["return"]
    assert "ERROR" not in ansible(site, tmp_path, BIN / "ansible-doc", "-t", "inventory", "repave.baremetal.repave").stderr
