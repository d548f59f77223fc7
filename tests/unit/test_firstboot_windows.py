"""The config drive of a Windows run, read by cloudbase-init's own code. No Windows was ever there: the far end's disks and processes are played."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_drives import read_drive

from repave.domain import password as password_rule
from repave.firstboot import FirstBoot, render_config_drive

PASSWORD = "Canary-!@$%^_=+[{}]:,./?7"
NETWORK = {"mac": "52:54:00:AA:BB:CC", "address": "10.1.2.3", "prefix": 24, "gateway": "10.1.2.1", "dns": ["10.1.2.9"]}
FIRST_BOOT = FirstBoot(
    hostname="win-1",
    instance_id="r-1",
    os_type="Windows",
    user="Administrator",
    password=PASSWORD,
    ssh_keys=("ssh-ed25519 AAAA op",),
    user_data="#ps1_sysnative\nWrite-Output 'of the operator'\n",
    network=NETWORK,
    home_url="https://192.0.2.1:8471/home/v1/r-1",
    nonce="nonce-of-run-1",
    ca_pem="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
)


class Partition:
    """A partition of a fixed disk as cloudbase-init's `utils.windows.disk` opens it: reads begin at whole sectors."""

    fixed, SECTOR = True, 512

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def seek(self, offset: int) -> int:
        self.at = offset // self.SECTOR * self.SECTOR
        return self.at

    def read(self, size: int, skip: int = 0) -> bytes:
        return self.data[self.at + skip : self.at + skip + size]


class Windows:
    """What cloudbase-init asks of Windows on the way from the disk to scripts and accounts, and what it did to them."""

    def __init__(self, partitions: list[Partition]) -> None:
        self.partitions = partitions
        self.passwords: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.restart_after: str | None = None

    def Disk(self, path: str) -> Any:
        disk = Partition(b"")
        disk.partitions = lambda: self.partitions  # type: ignore[attr-defined]
        return disk

    def get_physical_disks(self) -> list[str]:
        return [r"\\.\PHYSICALDRIVE0"]

    def get_cdrom_drives(self) -> list[str]:
        return []

    def get_volumes(self) -> list[str]:
        return []

    def execute_process(self, arguments: list[str], shell: bool = True) -> tuple[bytes, bytes, int]:
        done = subprocess.run(arguments, capture_output=True, check=False)
        return done.stdout, done.stderr, done.returncode

    def execute_powershell_script(self, path: str, sysnative: bool = True) -> tuple[bytes, bytes, int]:
        self.scripts.append(Path(path).read_text())
        return b"", b"", 1001 if self.restart_after and self.restart_after in self.scripts[-1] else 0

    def user_exists(self, user: str) -> bool:
        return user == "Administrator"

    def enum_users(self) -> list[str]:
        return ["Administrator"]

    def generate_random_password(self, length: int) -> str:
        return "?" * length

    def set_user_password(self, user: str, password: str) -> None:
        self.passwords.append((user, password))

    def change_password_next_logon(self, user: str) -> None:
        pass

    def create_user_logon_session(self, *_: object) -> None:
        pass

    def close_user_logon_session(self, *_: object) -> None:
        pass

    def add_user_to_local_group(self, *_: object) -> None:
        pass


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Windows]:
    """A Windows whose disk has an EFI partition and the config drive. Only modules that call Windows itself are not cloudbase-init's own."""
    played = Windows([Partition(bytes(1 << 20)), Partition(render_config_drive(FIRST_BOOT).ljust(1 << 20, b"\0"))])
    for name in ("disk", "vfat"):  # they load Windows' own libraries
        monkeypatch.setitem(sys.modules, f"cloudbaseinit.utils.windows.{name}", types.ModuleType(name))
    from cloudbaseinit import conf
    from cloudbaseinit.metadata.services.osconfigdrive import factory
    from cloudbaseinit.metadata.services.osconfigdrive import windows as manager
    from cloudbaseinit.osutils import factory as osutils

    monkeypatch.setattr(manager, "disk", types.SimpleNamespace(Disk=played.Disk))
    monkeypatch.setattr(manager, "vfat", types.SimpleNamespace(is_vfat_drive=lambda *_: False))
    monkeypatch.setattr(osutils, "get_os_utils", lambda: played)
    monkeypatch.setattr(factory, "get_config_drive_manager", manager.WindowsConfigDriveManager)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    conf.CONF([], project="cloudbase-init", default_config_files=[])
    conf.CONF.set_override("bsdtar_path", "/usr/bin/bsdtar")
    yield played
    conf.CONF.clear_override("bsdtar_path")


@pytest.fixture
def service(windows: Windows) -> Any:
    """cloudbase-init's config drive service, loaded from the partition."""
    from cloudbaseinit.metadata.services.configdrive import ConfigDriveService

    service = ConfigDriveService()
    assert service.load()
    return service


def run_plugins(service: Any) -> dict[str, Any]:
    """The plugins that make the account, run user data and set the password, in cloudbase-init's own order."""
    from cloudbaseinit.conf import CONF
    from cloudbaseinit.utils.classloader import ClassLoader

    shared: dict[str, Any] = {}
    for path in CONF.plugins:
        if path.rpartition(".")[2] in ("CreateUserPlugin", "UserDataPlugin", "SetUserPasswordPlugin"):
            ClassLoader().load_class(path)().execute(service, shared)
    return shared


def test_cloudbase_init_finds_the_drive_in_its_partition_and_reads_every_byte_of_it(service: Any) -> None:
    for name, data in read_drive(render_config_drive(FIRST_BOOT)).items():
        assert service._get_data(f"openstack/latest/{name}") == data
    assert (service.get_instance_id(), service.get_host_name(), service.get_public_keys()) == ("r-1", "win-1", ["ssh-ed25519 AAAA op"])
    assert (service.get_admin_username(), service.get_admin_password()) == ("Administrator", PASSWORD)


@pytest.mark.parametrize("vlan", [None, 42])
def test_cloudbase_init_reads_the_static_network(service: Any, windows: Windows, vlan: int | None) -> None:
    windows.partitions[1] = Partition(render_config_drive(FirstBoot(**(vars(FIRST_BOOT) | {"network": NETWORK | {"vlan": vlan}}))).ljust(1 << 20, b"\0"))
    assert service.load()
    details = service.get_network_details_v2()
    assert [link.mac_address for link in details.links] == ["52:54:00:aa:bb:cc"] * (2 if vlan else 1)
    assert details.links[-1].vlan_id == vlan
    (network,) = details.networks
    assert (network.link, network.address_cidr) == (details.links[-1].id, "10.1.2.3/24")
    assert [(route.network_cidr, route.gateway) for route in network.routes] == [("0.0.0.0/0", "10.1.2.1")]
    assert [s.addresses for s in details.services] == [["10.1.2.9"]]


def test_administrator_gets_the_password_after_the_call_home_was_left_as_a_task(service: Any, windows: Windows) -> None:
    run_plugins(service)
    assert windows.passwords[-1] == ("Administrator", PASSWORD)
    home, operators = windows.scripts
    assert "Register-ScheduledTask" in home and "of the operator" in operators
    assert PASSWORD not in home and FIRST_BOOT.nonce in home


def test_an_operators_script_that_asks_for_a_restart_does_not_cost_the_call_home(service: Any, windows: Windows) -> None:
    """cloudbase-init reads no further part after one that asks for a restart, and never comes back to them."""
    windows.restart_after = "of the operator"
    run_plugins(service)
    assert "Register-ScheduledTask" in windows.scripts[0]


def test_the_task_waits_for_the_mark_that_cloudbase_init_sets(service: Any) -> None:
    """Registry: the key, the instance and the plugin's name as cloudbase-init writes them."""
    import cloudbaseinit
    from cloudbaseinit.init import InitManager
    from cloudbaseinit.plugins.common.base import PLUGIN_EXECUTION_DONE
    from cloudbaseinit.plugins.common.setuserpassword import SetUserPasswordPlugin

    script = (importlib.resources.files("repave") / "home_call.ps1").read_text()
    (key,) = (line for line in (Path(cloudbaseinit.__file__).parent / "osutils/windows.py").read_text().splitlines() if "_config_key = " in line)
    path = key.split("'")[1].replace("\\\\", "\\").removeprefix("SOFTWARE\\")
    section = InitManager()._get_plugins_section("$($Config.instance_id)").replace("/", "\\")
    assert f"{path}{section}" in script
    assert f"{SetUserPasswordPlugin().get_name()} -eq {PLUGIN_EXECUTION_DONE}" in script


def test_what_the_script_zeroes_of_cloudbase_inits_copies_it_no_longer_needs(service: Any) -> None:
    """The call home may zero the unpacked files while cloudbase-init still runs."""
    run_plugins(service)
    for path in Path(service._metadata_path).rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    assert service.get_admin_password() == PASSWORD
    assert service.get_client_auth_certs() == []


def test_the_script_reads_the_password_from_the_drives_own_bytes() -> None:
    """The script looks for these very characters; what a password may hold needs no escape in JSON."""
    script = (importlib.resources.files("repave") / "home_call.ps1").read_text()
    assert """'"admin_pass": "([^"]*)"'""" in script
    assert f'"admin_pass": "{PASSWORD}"'.encode() in render_config_drive(FIRST_BOOT)


def test_every_character_that_a_password_may_hold_needs_no_escape_in_json() -> None:
    for letter in password_rule._ALLOWED:
        assert json.dumps(letter) == f'"{letter}"'


def test_no_password_is_shown_of_a_first_boot() -> None:
    assert PASSWORD not in repr(FIRST_BOOT) and FIRST_BOOT.nonce not in repr(FIRST_BOOT)
