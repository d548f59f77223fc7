"""What cloud-init is on Debian, for the tiny OS: the config drive's host name, password hash, keys, network and scripts become files.

Repeatable: while the drive is there, each boot does the same again. What the files need to be in is /, on the disk, so later boots have it.
"""

from __future__ import annotations

import email
import ipaddress
import json
import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from typing import Any

MOUNT = Path("/run/config-2")
LATEST = MOUNT / "openstack/latest"
SCRIPTS = Path("/var/lib/cloud/instance/scripts")  # as cloud-init's, so that the call home cleans up the same places


def main() -> int:
    device = find_device()
    if device is None:
        return 0
    MOUNT.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "iso9660", "-o", "ro", device, str(MOUNT)], check=True)
    try:
        apply(json.loads((LATEST / "meta_data.json").read_text()), email.message_from_bytes((LATEST / "user_data").read_bytes()))
        network = LATEST / "network_data.json"
        if network.exists():
            write(Path("/etc/network.sh"), render_network(json.loads(network.read_text())), 0o755)
    finally:
        subprocess.run(["umount", str(MOUNT)], check=True)
    os.sync()
    return 0


def find_device() -> str | None:
    """The block device with an ISO 9660 volume labelled config-2 (ECMA-119, 8.4)."""
    for block in sorted(os.listdir("/sys/class/block")):
        try:
            with open(f"/dev/{block}", "rb") as f:
                f.seek(32768)
                head = f.read(72)
        except OSError:
            continue
        if head[1:6] == b"CD001" and head[40:72].strip(b" \0") == b"config-2":
            return f"/dev/{block}"
    return None


def apply(meta: dict[str, Any], user_data: Message) -> None:
    write(Path("/etc/hostname"), meta["hostname"] + "\n", 0o644)
    keys = "".join(key + "\n" for key in meta.get("public_keys", {}).values())
    write(Path("/root/.ssh/authorized_keys"), keys, 0o600)
    for part in user_data.walk():
        text = part.get_payload()
        if part.get_content_type() == "text/cloud-config" and isinstance(text, str) and "#cloud-config\n{" in text:
            for account in json.loads(text.partition("\n")[2])["chpasswd"]["users"]:
                set_hash(account["name"], account["password"])
        elif part.get_content_type() == "text/x-shellscript" and isinstance(text, str):
            write(SCRIPTS / os.path.basename(part.get_filename() or "part"), text, 0o700)


def set_hash(user: str, password_hash: str) -> None:
    lines = [line for line in Path("/etc/shadow").read_text().splitlines() if not line.startswith(user + ":")]
    write(Path("/etc/shadow"), "\n".join([f"{user}:{password_hash}:19000:0:99999:7:::", *lines]) + "\n", 0o600)


def render_network(data: dict[str, Any]) -> str:
    """A script for OpenStack's network_data.json, NICs known by their MAC."""
    names = {Path(f"/sys/class/net/{nic}/address").read_text().strip(): nic for nic in os.listdir("/sys/class/net")}
    macs = {link["id"]: link["ethernet_mac_address"] for link in data["links"]}
    lines = ["#!/bin/sh"]
    for network in data["networks"]:
        nic = names[macs[network["link"]]]
        address = ipaddress.ip_interface(f"{network['ip_address']}/{network['netmask']}")
        lines.append(f"ip addr replace {address} dev {nic}")
        lines += [f"ip route replace default via {route['gateway']} dev {nic}" for route in network["routes"]]
    lines += [f"echo nameserver {service['address']} >> /run/resolv.conf" for service in data["services"]]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


if __name__ == "__main__":
    sys.exit(main())
