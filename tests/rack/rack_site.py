"""A real rack and its service, from outside: two or fewer QEMU machines behind sushy-emulator, the service as an operator starts it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from places import place_of_rack
from watch import Watch

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.cli.client import Client, Endpoint
from repave.lab.demo import send_reinstall
from repave.lab.machines import QemuRack
from repave.lab.processes import find_free_ports, stop_processes
from repave.lab.rack import OLD_PASSWORD, find_service, rack_down, rack_up, start_service_again
from repave.lab.ssh import SshFailed, SshRefused, ssh_login
from repave.lab.state import Machine

CACHE = Path(os.environ.get("REPAVE_CACHE", Path(__file__).parents[2] / ".repave/cache"))
BATCH_S = 600  # two tiny reinstalls take 80 s on two quiet cores, four times that beside other work
PASSWORDS = ["Rack-first-1A", "Rack-second-2B", "Rack-third-3C"]


class Site:
    """The rack and its service, from outside."""

    def __init__(self, folder: Path, lab: dict[str, Any]) -> None:
        self.folder, self.lab = folder, lab
        self.machines: dict[str, Machine] = {m.name: m for m in QemuRack(folder / "rack").machines}
        self.watch = Watch(place_of_rack(folder, lab, [*PASSWORDS, OLD_PASSWORD], scripted=False))

    @property
    def client(self) -> Client:
        """A new one each time: the service is killed between two questions, and a kept connection would be dead."""
        return Client(None, Endpoint(self.lab["endpoint"], self.lab["token"]))

    def put(self, password: str, *names: str, image: str = "tiny-2") -> str:
        """One PUT of the official SDK; returns the batch's id."""
        ids = [i["id"] for i in self.lab["instances"] if i["name"] in names]
        image_id = next(i["id"] for i in self.lab["images"] if i["name"] == image)
        sent_at = time.time()
        assert send_reinstall(self.lab, image_id, password, ids) == ids
        self.watch.accepted.append((sent_at, time.time(), ids))
        return str(self.client.items("/batches", limit=1)[0]["id"])

    def post(self, password: str, *names: str, image: str, **extras: Any) -> str:
        """By the operator's route, which takes more than CloudDC's; returns the batch's id."""
        sent_at = time.time()
        made = self.client.post("/reinstall", {"servers": names, "image": image, "password": password, **extras})
        self.watch.accepted.append((sent_at, time.time(), [i["id"] for i in self.lab["instances"] if i["name"] in names]))
        return str(made["id"])

    def runs(self, batch: str) -> dict[str, dict[str, Any]]:
        return {r["server"]: r for r in self.client.get(f"/batches/{batch}")["runs"]}

    def wait(self, batch: str, until, what: str) -> dict[str, dict[str, Any]]:
        deadline = time.monotonic() + BATCH_S
        while time.monotonic() < deadline:
            runs = self.runs(batch)
            if until(runs):
                return runs
            time.sleep(0.3)
        shown = json.dumps(runs, indent=1)
        pytest.fail(f"{what} within {BATCH_S} s: {shown}\n" + "\n".join(m.console.read_text(errors="replace")[-1500:] for m in self.machines.values()))

    def wait_for_end(self, batch: str) -> dict[str, dict[str, Any]]:
        return self.wait(batch, lambda runs: all(r["ended_at"] for r in runs.values()), "the batch did not end")

    def state(self, name: str) -> tuple[str, str | None]:
        instance = self.client.get(f"/servers/{name}")["instance"]
        return instance["state"], instance["operation_state"]

    def bmc(self, name: str) -> RedfishBmc:
        m = self.machines[name]
        return RedfishBmc(BmcAddress(m.bmc_url, m.bmc_username, m.bmc_password))

    def login(self, name: str, password: str, command: str, *, deadline_s: float = 120) -> str:
        """By SSH, when the OS is up. A refused password raises at once."""
        deadline = time.monotonic() + deadline_s
        while True:
            try:
                return ssh_login("127.0.0.1", self.machines[name].ssh_port, password, command)
            except SshRefused:
                raise
            except SshFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def wait_until_changed(self, read: Callable[[], str], before: str) -> None:
        deadline = time.monotonic() + BATCH_S
        while read().split() == before.split():
            assert time.monotonic() < deadline
            time.sleep(1)

    def restart_with_https_media(self, monkeypatch: pytest.MonkeyPatch) -> None:
        [port] = find_free_ports(1)
        monkeypatch.setenv("REPAVE_MEDIA_HTTPS_LISTEN", f"127.0.0.1:{port}")
        monkeypatch.setenv("REPAVE_MEDIA_URL", f"https://127.0.0.1:{port}")
        self.kill_service()
        start_service_again(self.folder)

    def kill_service(self) -> None:
        service = find_service(self.folder)
        assert service is not None
        os.kill(service.pid, 9)
        stop_processes([service])

    def digest(self, path: Path | None) -> str:
        assert path is not None
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def open_site(folder: Path, count: int, *, debian: bool) -> Iterator[Site]:
    """Machines with a data disk each, watched; all of it is gone afterwards."""
    os.environ["REPAVE_CACHE"] = str(CACHE)
    lab = rack_up(count, scripted=False, folder=folder, data_disk=True, debian=debian)
    made = Site(folder, lab)
    for machine in made.machines.values():
        assert machine.data_disk is not None
        with machine.data_disk.open("r+b") as f:
            f.write(os.urandom(1 << 20))
    made.watch.begin()
    yield made
    made.watch.close()
    rack_down(folder)
    assert find_service(folder) is None
