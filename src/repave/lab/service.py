"""Repave in the rack: a site of its own, started as an operator would, its servers registered over its own API.

What an outside client needs to judge the service is in lab.json: endpoint, projects, keys of every kind, instances, images, limits.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from repave.api.limits import list_rate
from repave.cli.client import Client, Endpoint
from repave.config import load_settings
from repave.lab.processes import ProcessRef, find_free_ports, start_detached, wait_for_port
from repave.lab.state import Machine
from repave.secrets import write_private

LAB_FILE = "lab.json"
REINSTALL_TIMEOUT_S = 1800  # what an outside client should allow one batch: two Debian machines under emulation take 3 to 6 minutes


@dataclass(frozen=True)
class Service:
    """A running `repave serve`."""

    endpoint: str
    token: str
    project_id: str
    ak: str
    sk: str
    process: ProcessRef

    def client(self, project: str | None = None) -> Client:
        return Client(project, Endpoint(self.endpoint, self.token))


def start_service(folder: Path, *, agent_host: str, boot_iso: Path, graceful_s: float = 20) -> Service:
    """`repave serve` runs on loopback, on a new or an earlier site in `folder`/site. `agent_host`: how machines see this host."""
    from repave.app import init_site

    site, admin_path = folder / "site", folder / "site" / "admin.json"
    if not admin_path.exists():
        api, provisioning, media, chunks = find_free_ports(4)
        first = init_site(
            site, api_listen=f"127.0.0.1:{api}", provisioning_listen=f"127.0.0.1:{provisioning}", media_listen=f"127.0.0.1:{media}",
            media_url=f"http://127.0.0.1:{media}", agent_url=f"https://{agent_host}:{provisioning}", boot_iso=str(boot_iso.resolve()),
            chunks_listen=f"127.0.0.1:{chunks}", graceful_s=graceful_s,
            console_files=str(folder.resolve() / "rack" / "{server}.console"),
        )  # fmt: skip
        admin = {"endpoint": f"http://127.0.0.1:{api}", "project_id": first.project.id, "token": first.token, "ak": first.credential.ak, "sk": first.sk}
        write_private(admin_path, json.dumps(admin).encode())
    admin = json.loads(admin_path.read_text())
    process = restart_service(folder)
    return Service(admin["endpoint"], admin["token"], admin["project_id"], admin["ak"], admin["sk"], process)


def restart_service(folder: Path) -> ProcessRef:
    """The service of this folder runs (again) and answers."""
    site, log = folder / "site", folder / "service.log"
    port = int(json.loads((site / "admin.json").read_text())["endpoint"].rpartition(":")[2])
    command = [sys.executable, "-m", "repave.cli.main", "serve", str(site)]
    process = start_detached("repave-serve", command, log=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    wait_for_port(port, process=process, log=log, deadline_s=60)
    wait_for_answer(f"http://127.0.0.1:{port}/", log)
    return process


def wait_for_answer(url: str, log: Path, *, deadline_s: float = 60) -> None:
    """It answers, so its engine runs. An open port is not enough: it opens first, and a killed process that is still dying holds its own for a moment."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        try:
            requests.get(url, timeout=5)
            return
        except requests.RequestException:
            time.sleep(0.1)
    raise RuntimeError(f"the service does not answer; see {log}")


def register_machine(
    client: Client, machine: Machine, *, unit: int, os_type: str = "Linux", image: str | None = None, blank: bool = False, system_uri: str | None = None
) -> dict[str, Any]:
    """The server as `repave server add` makes it; returns it with its instance."""
    body = {
        "name": machine.name, "bmc_url": machine.bmc_url, "bmc_username": machine.bmc_username, "bmc_password": machine.bmc_password,
        "rack": "lab", "unit": str(unit), "os_type": os_type, "image": image, "blank": blank, "root_disk": f"serial={machine.root_serial}",
    }  # fmt: skip
    if client.project:
        raise ValueError("a server is added by a key of its own project")
    return client.post("/servers", body | ({"system_uri": system_uri} if system_uri else {}))


def import_image(client: Client, path: Path, *, name: str, os_type: str = "Linux") -> dict[str, Any]:
    """The image is in the store, sent as `repave image import` sends it; an image of that name is kept."""
    known = [i for i in client.items("/images") if i["name"] == name]
    if known:
        return known[0]
    with path.open("rb") as f:
        made: dict[str, Any] = client.upload("/images", f, {"name": name, "os_type": os_type}, {})
    return made


def add_key(client: Client, name: str, role: str, *, project: str | None = None, expires_at: str | None = None) -> dict[str, Any]:
    body = {"name": name, "role": role} | ({"expires_at": expires_at} if expires_at else {})
    return client.post(f"/keys?project={project}" if project else "/keys", body)


def write_lab_file(
    folder: Path,
    service: Service,
    *,
    scripted: bool,
    instances: Sequence[tuple[dict[str, Any], int]],
    other: Machine | None,
    other_system_uri: str | None = None,
) -> dict[str, Any]:
    """lab.json of this rack; keys are made anew each time. `instances`: a server as the API shows it, and its SSH port."""
    client = service.client()
    expired = add_key(client, "expired", "operator", expires_at="2020-01-01T00:00:00Z")
    reader = add_key(client, "reader", "viewer")
    settings = load_settings(folder / "site")
    per_s, burst = list_rate(settings.rate_per_s, settings.rate_burst)
    lab: dict[str, Any] = {
        "endpoint": service.endpoint, "project_id": service.project_id, "token": service.token, "ak": service.ak, "sk": service.sk,
        "instances": [
            {
                "id": server["instance"]["id"], "name": server["name"], "server_id": server["id"], "os_type": server["instance"]["os_type"],
                "ssh": {"host": "127.0.0.1", "port": port},
            }
            for server, port in instances
        ],
        "images": [{"id": i["id"], "name": i["name"], "os_type": i["os_type"]} for i in client.items("/images")],
        "expired_token": expired["token"], "readonly_token": reader["token"], "readonly_aksk": {"ak": reader["ak"], "sk": reader["sk"]},
        "rate_limit": {"requests": burst, "per_s": math.ceil(per_s), "method": "GET", "path": f"/v1/{service.project_id}/instances"},
        "reinstall_timeout_s": REINSTALL_TIMEOUT_S, "scripted": scripted,
    }  # fmt: skip
    if other is not None:
        project = client.post("/projects", {"name": "other"})
        key = add_key(client, "other-admin", "admin", project="other")
        theirs = Client(None, Endpoint(service.endpoint, key["token"]))
        server = register_machine(theirs, other, unit=99, system_uri=other_system_uri)
        lab["other"] = {"project_id": project["id"], "token": key["token"], "instance_id": server["instance"]["id"]}
    write_private(folder / LAB_FILE, json.dumps(lab, indent=2).encode())
    return lab
