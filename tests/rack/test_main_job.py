"""The main job on real firmware, kernels and disks: two QEMU machines behind sushy-emulator, the service as an operator starts it.

The tests share one rack and follow each other: each begins with what the one before left.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from rack_site import PASSWORDS, Site, open_site

from repave.bmc import Power
from repave.domain.redaction import Redactor
from repave.images.store import ImageStore
from repave.lab.faults import set_fault
from repave.lab.rack import OLD_PASSWORD, start_service_again
from repave.lab.ssh import SshRefused, ssh_login

pytestmark = pytest.mark.timeout(1500)  # the first test waits for the ramdisk and the images to be built

# The prefix and the second name server are nothing that QEMU's DHCP ever says.
STATIC = {"address": "10.0.2.15", "prefix": 25, "gateway": "10.0.2.2", "dns": ["10.0.2.3", "192.0.2.53"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("lab"), 2, debian=True) as made:
        yield made


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
        said = site.client.fetch(f"/runs/{runs[name]['id']}/console").decode()
        assert said.index("repave-agent") > said.index("BdsDxe") >= 0, said[:500]  # from the firmware's first words on
        assert said.replace("\n", "") in Redactor().clean(machine.console.read_text(errors="replace")).replace("\n", "")
    assert not list((site.folder / "site/secret/run-keys").iterdir())


def test_a_machine_that_is_told_to_misbehave_does_so_until_it_is_told_none(site: Site) -> None:
    folder = site.folder / "rack"
    with contextlib.closing(sqlite3.connect(site.folder / "site/repave-data/repave.db")) as database:  # the API shows nobody where a BMC is
        roots = {name: f"{url}/redfish/v1/" for name, url in database.execute("SELECT name, bmc_url FROM servers")}
    set_fault(folder, "lab01", "silent-bmc")
    wait_until(lambda: not answers(roots["lab01"]))
    assert answers(roots["lab02"])
    set_fault(folder, "lab01", "none")
    wait_until(lambda: answers(roots["lab01"]))


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False


def wait_until(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
