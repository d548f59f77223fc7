"""The main job on real firmware, kernels and disks: two QEMU machines behind sushy-emulator, the service as an operator starts it.

The tests share one rack and follow each other: each begins with what the one before left.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import place_of_rack
from watch import Watch

from repave.bmc import BmcAddress, Power
from repave.bmc.redfish import RedfishBmc
from repave.cli.client import Client, Endpoint
from repave.images.store import ImageStore
from repave.lab.demo import send_reinstall
from repave.lab.machines import QemuRack
from repave.lab.processes import find_free_ports, stop_processes
from repave.lab.rack import OLD_PASSWORD, find_service, rack_down, rack_up, start_service_again
from repave.lab.ssh import SshFailed, SshRefused, ssh_login
from repave.lab.state import Machine

pytestmark = pytest.mark.timeout(1500)  # the first test waits for the ramdisk and the images to be built

CACHE = Path(os.environ.get("REPAVE_CACHE", Path(__file__).parents[2] / ".repave/cache"))
BATCH_S = 600  # two tiny reinstalls take 80 s on two quiet cores, four times that beside other work
# The prefix and the second name server are nothing that QEMU's DHCP ever says.
STATIC = {"address": "10.0.2.15", "prefix": 25, "gateway": "10.0.2.2", "dns": ["10.0.2.3", "192.0.2.53"]}
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("lab")
    os.environ["REPAVE_CACHE"] = str(CACHE)
    lab = rack_up(2, scripted=False, folder=folder, data_disk=True)
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


@pytest.fixture(autouse=True)
def _observed(site: Site) -> Iterator[None]:
    yield
    site.watch.assert_nothing_broken()


def test_one_put_reinstalls_both_machines_and_touches_no_other_disk(site: Site) -> None:
    before = {name: site.digest(m.data_disk) for name, m in site.machines.items()}
    batch = site.put(PASSWORDS[0], "lab01", "lab02")
    runs = site.wait_for_end(batch)
    for name, machine in site.machines.items():
        assert runs[name]["error"] is None, runs[name]
        assert site.state(name) == ("running", "reinstall-succeed")
        assert "tiny-2" in site.login(name, PASSWORDS[0], "cat /etc/repave-release")
        with pytest.raises(SshRefused):
            site.login(name, OLD_PASSWORD, "true")
        assert site.digest(machine.data_disk) == before[name]
        assert machine.root_serial == runs[name]["proof"]["root_disk_serial"]
    assert not list((site.folder / "site/secret/run-keys").iterdir())


def test_a_service_killed_before_and_after_the_line_finishes_the_batch_and_the_new_os_stays_itself_after_a_reboot(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian with its own cloud-init, boot media by HTTPS alone, and all that an operator can give: static network, SSH key, user data."""
    machine = site.machines["lab02"]
    site.restart_with_https_media(monkeypatch)
    site.client.patch("/servers/lab02", {"network": STATIC | {"mac": machine.mac}})
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    extras = {"ssh_keys": [(tmp_path / "key.pub").read_text().strip()], "user_data": "#!/bin/sh\necho ours >/root/user-data-ran\n"}
    batch = site.post(PASSWORDS[1], "lab02", image="debian-12", **extras)
    site.wait(batch, lambda runs: runs["lab02"]["step"] == "boot-ramdisk", "boot-ramdisk was not reached")
    site.kill_service()
    start_service_again(site.folder)
    site.wait(batch, lambda runs: runs["lab02"]["past_the_line"], "the line was not reached")
    site.kill_service()
    start_service_again(site.folder)
    runs = site.wait_for_end(batch)
    assert runs["lab02"]["error"] is None, runs["lab02"]
    assert site.state("lab02") == ("running", "reinstall-succeed")
    assert "10.0.2.15/25" in machine.console.read_text(errors="replace")  # the ramdisk's word

    look = ". /etc/os-release; echo $ID; hostname; ip -o addr show scope global | cut -d' ' -f2-9; ip route; cat /etc/resolv.conf /root/user-data-ran"
    first = site.login("lab02", PASSWORDS[1], look, deadline_s=300)
    assert {"debian", "lab02", "ours"} <= set(first.splitlines())
    assert "inet 10.0.2.15/25" in first and "default via 10.0.2.2" in first
    assert [line.split()[1] for line in first.splitlines() if line.startswith("nameserver")] == STATIC["dns"]
    by_key = ["-i", tmp_path / "key", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    subprocess.run(["ssh", "-F", "/dev/null", *by_key, "-p", str(machine.ssh_port), "root@127.0.0.1", "true"], check=True, capture_output=True)
    where = 'hash=$(awk -F: \'$1=="root"{print $2}\' /etc/shadow); grep -rlF "$hash" /etc /var /run /root; ls /dev/disk/by-label'
    assert set(site.login("lab02", PASSWORDS[1], where).split()) & {"/etc/shadow", "config-2"} == {"/etc/shadow"}

    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before = site.login("lab02", PASSWORDS[1], f"{boot_id}; systemd-run --quiet --on-active=1 systemctl reboot")
    site.wait_until_changed(lambda: site.login("lab02", PASSWORDS[1], boot_id, deadline_s=300), before)
    again = ssh_login("127.0.0.1", machine.ssh_port, PASSWORDS[1], look, host_keys=runs["lab02"]["proof"]["ssh_host_keys"])
    assert again == first
    with pytest.raises(SshRefused):
        site.login("lab02", PASSWORDS[0], "true")


def test_a_flipped_chunk_is_never_written_and_the_disk_can_not_boot(site: Site) -> None:
    store = ImageStore(site.folder / "site/repave-data/images")
    image = site.client.get("/images/tiny-2")
    largest = max(store.read_manifest(image["manifest_sha256"]).chunks, key=lambda c: c.compressed_bytes)
    chunk = store.chunk_path(largest.sha256)
    good = chunk.read_bytes()
    middle = len(good) // 2
    batch = site.put(PASSWORDS[2], "lab02")
    site.wait(batch, lambda runs: runs["lab02"]["step"] == "boot-ramdisk", "boot-ramdisk was not reached")  # preflight has seen it whole
    chunk.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    try:
        runs = site.wait_for_end(batch)
    finally:
        chunk.write_bytes(good)
    error = runs["lab02"]["error"]
    assert error["code"] == "Repave.4102", error
    assert site.state("lab02") == ("error", "reinstall-failed")
    with site.bmc("lab02") as bmc:
        assert bmc.read_power() is Power.OFF
    with site.machines["lab02"].root_disk.open("rb") as f:
        assert not any(f.read(512)), "LBA 0 must stay zero"


def test_an_agent_that_never_says_hello_gives_the_old_os_back_by_itself(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = site.login("lab01", PASSWORDS[0], "hostname")
    site.kill_service()
    monkeypatch.setenv("REPAVE_AGENT_URL", "https://10.0.2.2:1")  # the agent finds nobody there
    monkeypatch.setenv("REPAVE_AGENT_READY_S", "45")
    start_service_again(site.folder)
    runs = site.wait_for_end(site.put(PASSWORDS[2], "lab01"))
    assert runs["lab01"]["error"]["code"] == "Repave.2110"
    assert not runs["lab01"]["past_the_line"]
    assert site.state("lab01") == ("running", "reinstall-failed")
    assert site.login("lab01", PASSWORDS[0], "hostname") == before
    with site.bmc("lab01") as bmc:
        assert bmc.read_power() is Power.ON
