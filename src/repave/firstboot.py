"""The config drive of a reinstall: what the new OS is told at its first boot (design.md, decisions 13 and 14).

An ISO 9660 image labelled `config-2` in OpenStack's layout, read by cloud-init (datasource ConfigDrive) and by the lab's tiny OS. User data is
one MIME message; cloud-init 22.4 treats its parts in the order in which they come:

    the operator's part, as it was given    first: where both set a key, the later part's value stands (merge rule dict(replace))
    cloud-config, as JSON                   password hash, SSH login; JSON is YAML
    boothook                                lets root log in by password, before sshd starts; writes resolv.conf where nothing else does
    000-repave-home                         the call home (`home_call`), sorted before the operator's own scripts and runcmd

So what the operator gives can add to ours and can not undo it by accident; it runs as root, so on purpose it can. Static network settings go into
network_data.json; without them cloud-init asks DHCP.

Windows: the same drive, read by cloudbase-init (1.1.9). Its password plugin takes no hash, so meta_data.json holds user and password. Its user data
plugin stops at the first part that asks for a restart, so the call home (`home_call.ps1`) comes before the operator's part.
"""

from __future__ import annotations

import email
import hashlib
import importlib.resources
import io
import ipaddress
import json
from dataclasses import dataclass, field
from email.message import Message
from email.mime.base import MIMEBase
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import Any

import pycdlib

LABEL = "config-2"
HOME_CALL_NAME = "000-repave-home"
WINDOWS_HOME_CALL_NAME = HOME_CALL_NAME + ".ps1"  # cloudbase-init tells a script's language by its ending, or else by its first line
_MARK = "CONFIG: dict[str, Any] = {}"
_WINDOWS_MARK = "$Config = '{}' | ConvertFrom-Json"
_SSHD = """#!/bin/sh
mkdir -p /etc/ssh/sshd_config.d
printf 'PermitRootLogin yes\\nPasswordAuthentication yes\\n' > /etc/ssh/sshd_config.d/00-repave.conf
"""
# Debian's ifupdown without resolvconf ignores dns-nameservers: the image's own resolv.conf, from where it was built, stayed (seen, Debian 12).
_RESOLV_CONF = """if [ -f /etc/network/interfaces ] && [ ! -L /etc/resolv.conf ] && ! command -v resolvconf > /dev/null; then
    printf '@LINES@' > /etc/resolv.conf
fi
"""


@dataclass(frozen=True)
class FirstBoot:
    """What one first boot needs. `network` is {"mac","address","prefix","gateway","dns":[],"vlan"} or None (DHCP); an empty `home_url` asks for no call."""

    hostname: str
    instance_id: str
    password_hash: str = field(default="", repr=False)  # crypt(5); Linux alone
    password: str = field(default="", repr=False)  # Windows alone
    os_type: str = "Linux"
    user: str = "root"
    ssh_keys: tuple[str, ...] = ()
    user_data: str = field(default="", repr=False)
    network: dict[str, Any] | None = None
    home_url: str = ""
    nonce: str = field(default="", repr=False)
    ca_pem: str = ""


def render_config_drive(first_boot: FirstBoot) -> bytes:
    """The drive's bytes, about 400 KiB. Not the same bytes twice: ISO 9660 dates its files."""
    files = {
        "meta_data.json": _render_json(_render_meta_data(first_boot)),
        "user_data": render_user_data(first_boot),
        "vendor_data.json": b"{}\n",
    }
    if first_boot.network:
        files["network_data.json"] = _render_json(render_network_data(first_boot.network))
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident=LABEL, joliet=3, rock_ridge="1.09")
    for path, name in (("/OPENSTACK", "openstack"), ("/OPENSTACK/LATEST", "latest")):
        iso.add_directory(path, rr_name=name, joliet_path=path.lower())
    for number, (name, data) in enumerate(files.items()):
        iso.add_fp(io.BytesIO(data), len(data), f"/OPENSTACK/LATEST/FILE{number}.;1", rr_name=name, joliet_path=f"/openstack/latest/{name}")
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()


def render_user_data(first_boot: FirstBoot) -> bytes:
    """The MIME message of the module docstring. Our parts are ASCII and not encoded, so that the call home finds copies of their text."""
    if first_boot.os_type == "Windows":
        return _render_windows_user_data(first_boot)
    message = _start_message(first_boot)
    if first_boot.user_data.strip():
        message.attach(_wrap_operators(first_boot.user_data))
    message.attach(_part("cloud-config", "000-repave.cfg", "#cloud-config\n" + json.dumps(_render_cloud_config(first_boot), indent=1) + "\n"))
    message.attach(_part("cloud-boothook", "000-repave-boot", _SSHD + _render_resolv_conf(first_boot.network or {})))
    if first_boot.home_url:
        message.attach(_part("x-shellscript", HOME_CALL_NAME, render_home_call_script(first_boot)))
    return message.as_bytes()


def _render_windows_user_data(first_boot: FirstBoot) -> bytes:
    message = _start_message(first_boot)
    if first_boot.home_url:
        message.attach(_part("x-shellscript", WINDOWS_HOME_CALL_NAME, _render_windows_home_call(first_boot)))
    if first_boot.user_data.strip():
        message.attach(_wrap_windows_operators(first_boot.user_data))
    return message.as_bytes()


def _start_message(first_boot: FirstBoot) -> MIMEMultipart:
    """With a boundary that is the same each time, and that nobody can guess who does not know the nonce."""
    seed = hashlib.sha256(first_boot.instance_id.encode() + first_boot.nonce.encode()).hexdigest()[:32]
    return MIMEMultipart(boundary=f"=={seed}==")


def render_home_call_script(first_boot: FirstBoot) -> str:
    """The text of `home_call`, its settings filled in."""
    config = {
        "home_url": first_boot.home_url,
        "nonce": first_boot.nonce,
        "ca_pem": first_boot.ca_pem,
        "user": first_boot.user,
        "hash_sha256": hashlib.sha256(first_boot.password_hash.encode()).hexdigest(),
    }
    source = (importlib.resources.files("repave") / "home_call.py").read_text(encoding="ascii")
    assert _MARK in source
    return "#!/usr/bin/env python3\n" + source.replace(_MARK, f"CONFIG: dict[str, Any] = json.loads({json.dumps(config)!r})")


def _render_windows_home_call(first_boot: FirstBoot) -> str:
    """The text of `home_call.ps1`, its settings filled in as a here-string: nothing in it is PowerShell's to read."""
    config = {
        "home_url": first_boot.home_url,
        "nonce": first_boot.nonce,
        "ca_pem": first_boot.ca_pem,
        "user": first_boot.user,
        "instance_id": first_boot.instance_id,
    }
    source = (importlib.resources.files("repave") / "home_call.ps1").read_text(encoding="ascii")
    assert _WINDOWS_MARK in source
    return source.replace(_WINDOWS_MARK, f"$Config = @'\n{json.dumps(config)}\n'@ | ConvertFrom-Json")


def render_network_data(network: dict[str, Any]) -> dict[str, Any]:
    """OpenStack's network_data.json for one NIC with a static address, known by its MAC; `vlan`: the address is on this tagged VLAN of it.

    The gateway stands there twice. From the default route alone cloud-init 22.4 makes ifupdown call `route`, which Debian 12 does not
    bring: no default route (seen). The network's own `gateway` becomes ifupdown's; cloudbase-init and the tiny OS read the route.
    """
    interface = ipaddress.ip_interface(f"{network['address']}/{network['prefix']}")
    routes = []
    if network.get("gateway"):
        anywhere = ipaddress.ip_network("0.0.0.0/0" if interface.version == 4 else "::/0")
        routes = [{"network": str(anywhere.network_address), "netmask": str(anywhere.netmask), "gateway": network["gateway"]}]
    mac, vlan = network["mac"].lower(), network.get("vlan")
    links: list[dict[str, Any]] = [{"id": "nic0", "type": "phy", "ethernet_mac_address": mac, "mtu": None}]
    if vlan:
        links.append({"id": "vlan0", "type": "vlan", "vlan_link": "nic0", "vlan_id": vlan, "vlan_mac_address": mac, "mtu": None})
    addressed: dict[str, Any] = {
        "id": "net0",
        "link": links[-1]["id"],
        "type": f"ipv{interface.version}",
        "ip_address": str(interface.ip),
        "netmask": str(interface.netmask),
        "routes": routes,
    }
    if routes:
        addressed["gateway"] = network["gateway"]
    return {
        "links": links,
        "networks": [addressed],
        "services": [{"type": "dns", "address": address} for address in network.get("dns") or ()],
    }


def _render_resolv_conf(network: dict[str, Any]) -> str:
    lines = "".join(f"nameserver {ipaddress.ip_address(address)}\\n" for address in network.get("dns") or ())
    return _RESOLV_CONF.replace("@LINES@", lines) if lines else ""


def _render_meta_data(first_boot: FirstBoot) -> dict[str, Any]:
    keys = {f"repave-{n}": key for n, key in enumerate(first_boot.ssh_keys)}
    meta_data: dict[str, Any] = {"uuid": first_boot.instance_id, "name": first_boot.hostname, "hostname": first_boot.hostname, "public_keys": keys}
    if first_boot.os_type == "Windows":
        meta_data["meta"] = {"admin_username": first_boot.user, "admin_pass": first_boot.password}
    return meta_data


def _render_cloud_config(first_boot: FirstBoot) -> dict[str, Any]:
    """The keys that worked with cloud-init 22.4.2 (chpasswd.users: since 22.3)."""
    return {
        "disable_root": first_boot.user != "root",
        "ssh_pwauth": True,
        "preserve_hostname": False,
        "hostname": first_boot.hostname,
        "chpasswd": {"expire": False, "users": [{"name": first_boot.user, "password": first_boot.password_hash}]},
    }


def _wrap_operators(user_data: str) -> Message:
    """As it was given: a MIME message stays one, anything else is told apart by cloud-init by its first line."""
    if user_data.lstrip().lower().startswith(("content-type:", "mime-version:")):
        return email.message_from_string(user_data.lstrip())
    return MIMEText(user_data, "plain", "us-ascii" if user_data.isascii() else "utf-8")


def _wrap_windows_operators(user_data: str) -> Message:
    """As it was given; cloudbase-init tells scripts apart by their first line (#ps1, rem cmd, <powershell>, ...) where they have no file's ending."""
    given = user_data.lstrip()
    if given.lower().startswith(("content-type:", "mime-version:")):
        return email.message_from_string(given)
    part = MIMEText(given, "cloud-config" if given.startswith("#cloud-config") else "x-shellscript", "us-ascii" if given.isascii() else "utf-8")
    part.add_header("Content-Disposition", "attachment", filename="operators-user-data")
    return part


def _part(subtype: str, name: str, text: str) -> Message:
    part = MIMEBase("text", subtype)
    part.add_header("Content-Disposition", "attachment", filename=name)
    part.set_payload(text)
    return part


def _render_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
