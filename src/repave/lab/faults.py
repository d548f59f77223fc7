"""`repave rack fault MACHINE KIND`: a machine of the rack that stands misbehaves, until it is told `none`. Words and firmware as operators know them.

A scripted machine reads what it is told from a file and does it itself. Before the BMC of a QEMU machine stands a fault proxy, which follows such a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from repave.lab.fault_proxy import Rule, start_fault_proxy
from repave.lab.processes import ProcessRef, find_free_ports, start_detached, wait_for_port
from repave.lab.scripted import FAULTS_FILE, FIRMWARE_FILE, set_faults, set_firmware
from repave.lab.state import Machine, find_state, write_private

SLOW_S = 30.0
_SCRIPTED = {"ignore-boot-override": "ignore-override", "no-hello": "no-hello", "never-home": "never-home", "slow-firmware": ""}
_AT_THE_BMC = {
    # Answered well, and nothing happens: reading back shows it.
    "ignore-boot-override": Rule("ignored", method="PATCH", path="/Systems/", times=None),
    # Power on shows no effect for so long, as with firmware that counts its memory first.
    "slow-firmware": Rule("latency", method="POST", path="ComputerSystem.Reset", times=None, seconds=SLOW_S),
    "silent-bmc": Rule("reset", times=None),
}
NONE = "none"
_LOOK_S = 0.2


def list_kinds(*, scripted: bool) -> list[str]:
    return [*(_SCRIPTED if scripted else _AT_THE_BMC), NONE]


def set_fault(folder: Path, name: str, kind: str) -> None:
    """The machine behaves so from its next boot or request on. Raises ValueError where the rack has no such machine or kind."""
    state = find_state(folder)
    if state is None or name not in [m.name for m in state.machines]:
        known = ", ".join(m.name for m in state.machines) if state else "none: no rack is up"
        raise ValueError(f"There is no machine {name!r} here; there is: {known}.")
    if kind not in list_kinds(scripted=state.scripted):
        raise ValueError(f"There is no fault {kind!r}; there is: {', '.join(list_kinds(scripted=state.scripted))}.")
    faults = {machine: of for machine, of in _read(folder / FAULTS_FILE).items() if machine != name}
    if not state.scripted:
        write_private(folder / FAULTS_FILE, json.dumps(faults | ({} if kind == NONE else {name: [kind]})))
        return
    firmware = {machine: s for machine, s in _read(folder / FIRMWARE_FILE).items() if machine != name}
    set_firmware(folder, firmware | ({name: SLOW_S} if kind == "slow-firmware" else {}))
    set_faults(folder, faults | ({name: [own]} if (own := _SCRIPTED.get(kind, "")) else {}))


def start_proxies(folder: Path, machines: list[Machine]) -> tuple[ProcessRef, dict[str, str]]:
    """A process with a fault proxy before each BMC; its addresses by machine."""
    ports = dict(zip([m.name for m in machines], find_free_ports(len(machines)), strict=True))
    log = folder / "faults.log"
    process = start_detached("faults", [sys.executable, "-m", "repave.lab.faults", str(folder), json.dumps(ports)], log=log)
    for port in ports.values():
        wait_for_port(port, process=process, log=log)
    return process, {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}


def _serve(folder: Path, ports: dict[str, int]) -> None:
    """The proxies, until the process is ended."""
    state = find_state(folder)
    assert state is not None
    with contextlib.ExitStack() as stack:
        proxies = {m.name: stack.enter_context(start_fault_proxy(m.bmc_url, port=ports[m.name])) for m in state.machines}
        told: dict[str, list[str]] = {}
        while True:
            now = _read(folder / FAULTS_FILE)
            for name, proxy in proxies.items():
                if now.get(name) != told.get(name):
                    proxy.set_rules([_AT_THE_BMC[kind] for kind in now.get(name, [])])
            told = now
            time.sleep(_LOOK_S)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("ports", type=json.loads)
    asked = parser.parse_args()
    _serve(asked.folder, asked.ports)
