"""What the config drive holds, and what the call home leaves behind on a tree of files."""

from __future__ import annotations

import email
import hashlib
import json
import os
from pathlib import Path

import pytest
from config_drives import read_drive

from repave import home_call
from repave.firstboot import FirstBoot, render_config_drive, render_home_call_script, render_network_data, render_user_data

HASH = "$6$rounds=300000$abcdefghijklmnop$" + "Zz9./" * 17 + "a"
HASH_SHA256 = hashlib.sha256(HASH.encode()).hexdigest()
FIRST_BOOT = FirstBoot(
    hostname="web-1",
    instance_id="i-1",
    password_hash=HASH,
    ssh_keys=("ssh-ed25519 AAAA op",),
    network={"mac": "52:54:00:AA:BB:CC", "address": "10.1.2.3", "prefix": 24, "gateway": "10.1.2.1", "dns": ["10.1.2.1"]},
    home_url="https://192.0.2.1:8471/home/v1/r-1",
    nonce="nonce-of-run-1",
    ca_pem="-----BEGIN CERTIFICATE-----\n",
)


def test_the_drive_is_labelled_config_2_and_says_who_the_machine_is() -> None:
    drive = render_config_drive(FIRST_BOOT)
    assert drive[32768 + 40 : 32768 + 72].rstrip() == b"config-2"
    meta = json.loads(read_drive(drive)["meta_data.json"])
    assert (meta["uuid"], meta["hostname"], list(meta["public_keys"].values())) == ("i-1", "web-1", ["ssh-ed25519 AAAA op"])


def test_ours_comes_after_the_operators_part_so_ours_stands() -> None:
    theirs = "#cloud-config\nssh_pwauth: false\n"
    parts = email.message_from_bytes(render_user_data(FirstBoot(**(vars(FIRST_BOOT) | {"user_data": theirs})))).get_payload()
    assert [p.get_content_type() for p in parts] == ["text/plain", "text/cloud-config", "text/cloud-boothook", "text/x-shellscript"]
    assert parts[0].get_payload() == theirs
    config = json.loads(parts[1].get_payload().removeprefix("#cloud-config\n"))
    assert config["ssh_pwauth"] and config["chpasswd"]["users"] == [{"name": "root", "password": HASH}]
    assert parts[3].get_filename() < "runcmd"  # cloud-init runs scripts sorted by name


def test_an_operators_mime_message_and_non_ascii_script_arrive_as_they_were_given() -> None:
    mime = 'Content-Type: multipart/mixed; boundary="b"\nMIME-Version: 1.0\n\n--b\nContent-Type: text/cloud-config\n\n#cloud-config\n{}\n--b--\n'
    message = email.message_from_bytes(render_user_data(FirstBoot(**(vars(FIRST_BOOT) | {"user_data": mime}))))
    assert [p.get_content_type() for p in message.walk()][1:3] == ["multipart/mixed", "text/cloud-config"]
    script = "#!/bin/sh\necho Grüße\n"
    first = email.message_from_bytes(render_user_data(FirstBoot(**(vars(FIRST_BOOT) | {"user_data": script})))).get_payload()[0]
    assert first.get_payload(decode=True).decode() == script


def test_without_a_home_url_nothing_calls_home() -> None:
    quiet = FirstBoot(hostname="old", instance_id="old", password_hash=HASH)
    assert b"x-shellscript" not in render_user_data(quiet)


def test_the_script_knows_the_hash_only_by_its_digest() -> None:
    script = render_home_call_script(FIRST_BOOT)
    compile(script, "home-call", "exec")
    assert HASH not in script and HASH_SHA256 in script and "nonce-of-run-1" in script


@pytest.mark.parametrize(
    ("address", "prefix", "kind", "netmask", "anywhere"),
    [("10.1.2.3", 20, "ipv4", "255.255.240.0", "0.0.0.0"), ("2001:db8::3", 64, "ipv6", "ffff:ffff:ffff:ffff::", "::")],
)
def test_static_network_is_given_by_mac(address: str, prefix: int, kind: str, netmask: str, anywhere: str) -> None:
    data = render_network_data({"mac": "52:54:00:AA:BB:CC", "address": address, "prefix": prefix, "gateway": "gw", "dns": []})
    assert data["links"][0]["ethernet_mac_address"] == "52:54:00:aa:bb:cc"
    network = data["networks"][0]
    assert (network["type"], network["ip_address"], network["netmask"]) == (kind, address, netmask)
    assert network["routes"] == [{"network": anywhere, "netmask": anywhere, "gateway": "gw"}]
    assert network["gateway"] == "gw"  # the route alone left Debian's ifupdown without a default route


def test_an_address_on_a_tagged_vlan_is_not_given_to_the_nic_itself() -> None:
    """The bug: the VLAN was taken and never told to anybody."""
    data = render_network_data(FIRST_BOOT.network | {"vlan": 42})
    assert data["links"][1] == {
        "id": "vlan0", "type": "vlan", "vlan_link": "nic0", "vlan_id": 42, "vlan_mac_address": "52:54:00:aa:bb:cc", "mtu": None,
    }  # fmt: skip
    assert [network["link"] for network in data["networks"]] == ["vlan0"]


def test_static_dns_is_written_where_nothing_else_does() -> None:
    """The bug: Debian's ifupdown without resolvconf kept the resolv.conf of the machine that its image was built on."""

    def boothook(first_boot: FirstBoot) -> str:
        return next(p for p in email.message_from_bytes(render_user_data(first_boot)).walk() if p.get_content_subtype() == "cloud-boothook").get_payload()

    assert "printf 'nameserver 10.1.2.1\\n' > /etc/resolv.conf" in boothook(FIRST_BOOT)
    assert "resolv" not in boothook(FirstBoot(**(vars(FIRST_BOOT) | {"network": None})))


def test_copies_of_the_hash_and_the_nonce_are_gone_and_everything_else_stays(tmp_path: Path) -> None:
    instance = tmp_path / "var/lib/cloud/instances/i-1"
    kept = {"etc/shadow": f"root:{HASH}:1:::::", "var/lib/cloud/data/instance-id": "i-1", "var/log/cloud-init.log": "$6$other$" + "x" * 86}
    gone = {"obj.pkl": b"\x80\x04" + HASH.encode() + b"\x94", "user-data.txt": render_user_data(FIRST_BOOT), "run.json": b'{"p": "%s"}' % HASH.encode()}
    for name, text in kept.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    instance.mkdir(parents=True)
    os.mkfifo(instance / "hook")  # cloud-init has one; it must not be waited for
    for name, data in gone.items():
        (instance / name).write_bytes(data)
    assert {p.name for p in home_call.erase_copies(tmp_path, "nonce-of-run-1", HASH_SHA256)} == set(gone)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(kept)


def test_only_a_drive_with_this_runs_nonce_is_ours(tmp_path: Path) -> None:
    drive = tmp_path / "sda4"
    drive.write_bytes(render_config_drive(FIRST_BOOT))
    assert home_call.is_our_drive(drive, "nonce-of-run-1")
    assert not home_call.is_our_drive(drive, "nonce-of-run-2")
    drive.write_bytes(bytes(65536) + b"nonce-of-run-1")
    assert not home_call.is_our_drive(drive, "nonce-of-run-1")


@pytest.mark.parametrize(
    ("files", "serial"),
    [
        ({"serial": b"VIRT-1\n"}, "VIRT-1"),
        ({"device/serial": b"  NVME-1        \n"}, "NVME-1"),
        ({"device/vpd_pg80": b"\x00\x80\x00\x08  SATA-1 "}, "SATA-1"),
        ({"size": b"8\n"}, ""),
    ],
)
def test_the_serial_is_the_disks_under_a_partition_under_lvm(tmp_path: Path, files: dict[str, bytes], serial: str) -> None:
    partition, volume = tmp_path / "sda/sda2", tmp_path / "dm-0"
    for name, data in {"sda2/partition": b"2\n", **files}.items():
        (tmp_path / "sda" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sda" / name).write_bytes(data)
    (volume / "slaves").mkdir(parents=True)
    (volume / "slaves/sda2").symlink_to(partition)
    assert home_call.find_serial(volume) == serial


def test_the_password_is_usable_only_when_shadow_holds_the_very_hash(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for field, usable in ((HASH, True), ("!" + HASH, False), ("*", False)):
        (tmp_path / "etc/shadow").write_text(f"root:{field}:19000:0:99999:7:::\nweb:{HASH}:::\n")
        assert home_call.is_password_usable(tmp_path, "root", HASH_SHA256) is usable
