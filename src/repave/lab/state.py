"""What is in a rack, kept in its folder so that a later process can find it and take it down.

`machines.json` (mode 0600: it holds the BMCs' passwords): processes by pid and start time, machines, libvirt's folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bcrypt

from repave.lab.processes import ProcessRef, is_alive

STATE_FILE = "machines.json"


@dataclass(frozen=True)
class Machine:
    """One machine of the rack, real or scripted. `ssh_port` is 0 where there is no SSH."""

    name: str
    uuid: str
    serial: str
    mac: str
    bmc_url: str
    bmc_username: str
    bmc_password: str
    ssh_port: int
    root_disk: Path
    root_serial: str
    console: Path
    data_disk: Path | None = None
    data_serial: str = ""

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self.bmc_url!r})"

    @property
    def bmc_port(self) -> int:
        return int(self.bmc_url.rpartition(":")[2])


@dataclass
class RackState:
    """`runtime` is the short folder in /tmp that holds libvirt's own files; None in a scripted rack."""

    scripted: bool
    machines: list[Machine] = field(default_factory=list)
    processes: list[ProcessRef] = field(default_factory=list)
    runtime: Path | None = None

    def is_up(self) -> bool:
        """Whether all its processes run."""
        return bool(self.processes) and all(is_alive(p) for p in self.processes)


def create_machine(folder: Path, name: str, *, bmc_port: int, ssh_port: int = 0, data_disk: bool = False) -> Machine:
    """A machine with a new identity and new credentials; nothing is on disk yet."""
    tag = secrets.token_hex(3)
    return Machine(
        name=name,
        uuid=str(uuid.uuid4()),
        serial=f"RPV{tag.upper()}",
        mac=f"52:54:00:{tag[0:2]}:{tag[2:4]}:{tag[4:6]}",
        bmc_url=f"http://127.0.0.1:{bmc_port}",
        bmc_username="admin",
        bmc_password=secrets.token_urlsafe(12),
        ssh_port=ssh_port,
        root_disk=folder / f"{name}.root.img",
        root_serial=f"ROOT{tag.upper()}",
        console=folder / f"{name}.console",
        data_disk=folder / f"{name}.data.img" if data_disk else None,
        data_serial=f"DATA{tag.upper()}" if data_disk else "",
    )


def clear_machine(folder: Path, name: str) -> None:
    """Nothing of an earlier machine of this name is left. Destroys: its disks, NVRAM and console."""
    for path in folder.glob(f"{name}.*"):
        path.unlink()


def create_disk(path: Path, size_bytes: int) -> None:
    """A sparse file of zeros is there."""
    with path.open("wb") as out:
        out.truncate(size_bytes)


def write_auth_file(folder: Path, machine: Machine) -> Path:
    """The emulator's file of one user, in Apache's format with bcrypt, the only digest it takes.

    4 rounds: the password is checked with each request, and the default of 12 costs 0.25 s of a core each time.
    """
    path = folder / f"{machine.name}.htpasswd"
    digest = bcrypt.hashpw(machine.bmc_password.encode(), bcrypt.gensalt(rounds=4)).decode()
    write_private(path, f"{machine.bmc_username}:{digest}\n")
    return path


def write_private(path: Path, text: str) -> None:
    """The file holds `text`, whole or not at all, readable by its owner alone."""
    new = path.with_name(path.name + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
    new.replace(path)


def write_state(folder: Path, state: RackState) -> None:
    """What `find_state` reads back."""
    write_private(folder / STATE_FILE, json.dumps(dataclasses.asdict(state), indent=1, default=str))


def find_state(folder: Path) -> RackState | None:
    """The rack in this folder, or None. It may be down: see `RackState.is_up`."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    return RackState(
        scripted=value["scripted"],
        machines=[_parse_machine(m) for m in value["machines"]],
        processes=[ProcessRef(**p) for p in value["processes"]],
        runtime=Path(value["runtime"]) if value["runtime"] else None,
    )


def _parse_machine(value: dict[str, Any]) -> Machine:
    paths = {k: Path(value[k]) for k in ("root_disk", "console", "data_disk") if value[k] is not None}
    return Machine(**(value | paths))
