"""What BMCs say of themselves: their state by Redfish, and their own logs of what they were asked."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import requests

from repave.lab.state import Machine

Json = dict[str, Any]
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ACCESS = re.compile(r'\[(\d+/\w+/\d+ [\d:]+)\] "([A-Z]+) (\S+) HTTP/[\d.]+" (\d+)')  # as werkzeug writes it under sushy-emulator, in local time


def read_bmc(machine: Machine) -> Json:
    """What its BMC says: power, boot (the override's target), media (what is in the drive)."""
    m = machine
    with requests.Session() as session:
        session.trust_env, session.auth = False, (m.bmc_username, m.bmc_password)
        system = session.get(f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}", timeout=30).json()
        cd = session.get(f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}/VirtualMedia/Cd", timeout=30).json()
    return {"power": system["PowerState"], "boot": system["Boot"]["BootSourceOverrideTarget"], "media": cd["Image"] if cd["Inserted"] else ""}


def read_calls(log: Path, name: str, since: int = 0) -> list[Json]:
    """The calls in this log of the machine's BMC from byte `since` on: at (to `within_s` later), method, path, login_of ("" its own, "?" a refused one).

    A scripted rack's log is one for all its BMCs and holds what was to change something. sushy-emulator's own has every call, by the second.
    """
    if not log.exists():
        return []
    with log.open("rb") as f:
        f.seek(since)
        lines = f.read().decode(errors="replace").splitlines()
    calls = [c for line in lines if (c := _parse(line, name)) is not None]
    return [c for c in calls if c["machine"] == name]


def _parse(line: str, name: str) -> Json | None:
    if line.startswith("{"):
        call: Json = json.loads(line)
        return call | {"login_of": "" if call["login_of"] == name else call["login_of"], "within_s": 0.0}
    match = _ACCESS.search(_ANSI.sub("", line))
    if match is None:
        return None
    at, method, path, status = match.groups()
    seconds = time.mktime(time.strptime(at, "%d/%b/%Y %H:%M:%S"))
    return {"at": seconds, "machine": name, "method": method, "path": path, "login_of": "?" if status == "401" else "", "within_s": 1.0}
