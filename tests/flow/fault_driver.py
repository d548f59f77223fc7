"""Every request that the driver makes of the real BMC emulator, with each fault at the wire: it ends in time, and never says what is not so.

The requests are those of a clean conversation, read from the proxy's log: none is listed by hand. A cell is one fault on one request.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.errors import BmcError
from repave.lab.fault_proxy import FaultProxy, Rule, Seen, start_fault_proxy
from repave.lab.scripted import start_scripted_rack
from repave.lab.state import Machine

MACHINES = 12
DEADLINE_S = 8.0
SLACK_S = 2.5  # the driver's timer, and two busy cores
ISO_BYTES = 4096
ON_ALL = ("latency", "black-hole", "reset", "status", "truncated", "elsewhere", "lost-answer")
ON_READS, ON_WRITES = ("stale",), ("twice", "ignored")


@dataclass(frozen=True)
class Call:
    """One call of the driver, and what the machine must be afterwards: power, override, whether media are in."""

    name: str
    do: Callable[[RedfishBmc, str], object]
    after: dict[str, Any]


CALLS = (
    Call("power-off", lambda bmc, iso: bmc.power_off(), {"power": "Off"}),
    Call("insert-media", lambda bmc, iso: bmc.insert_media([iso]), {"media": True}),
    Call("boot-from-media", lambda bmc, iso: bmc.boot_from_media_once(), {"boot": "Cd"}),
    Call("power-on", lambda bmc, iso: bmc.power_on(), {"power": "On"}),
    Call("eject-media", lambda bmc, iso: bmc.eject_media(), {"media": False}),
    Call("boot-from-disk", lambda bmc, iso: bmc.boot_from_disk(), {"boot": "disk"}),
)


@dataclass(frozen=True)
class Cell:
    call: Call
    request: int  # the how-manyeth of its call
    method: str
    path: str
    fault: str

    def __str__(self) -> str:
        return f"{self.fault} at {self.call.name} {self.request}: {self.method} {self.path}"


class Bench:
    """One machine, its BMC behind a proxy."""

    def __init__(self, machine: Machine, proxy: FaultProxy, iso: str, other_url: str) -> None:
        self.machine, self.proxy, self.iso, self.other_url = machine, proxy, iso, other_url

    def open(self, url: str) -> RedfishBmc:
        m = self.machine
        return RedfishBmc(BmcAddress(url, m.bmc_username, m.bmc_password), deadline_s=DEADLINE_S)

    def truth(self) -> dict[str, Any]:
        """What the emulator itself says, asked past the proxy."""
        m = self.machine
        with requests.Session() as session:
            session.trust_env, session.auth = False, (m.bmc_username, m.bmc_password)
            system = session.get(f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}", timeout=30).json()
            cd = session.get(f"{m.bmc_url}/redfish/v1/Systems/{m.uuid}/VirtualMedia/Cd", timeout=30).json()
        boot = "Cd" if system["Boot"]["BootSourceOverrideTarget"] == "Cd" else "disk"  # None and Hdd both: the driver knows two ways
        return {"power": system["PowerState"], "boot": boot, "media": bool(cd["Inserted"])}

    def prepare(self, call: Call) -> None:
        """All of the conversation before `call` has happened, without faults."""
        self.proxy.set_rules(())
        with self.open(self.machine.bmc_url) as bmc:
            bmc.power_on()
            bmc.eject_media()
            bmc.boot_from_disk()
            for earlier in CALLS[: CALLS.index(call)]:
                earlier.do(bmc, self.iso)

    def run(self, call: Call, *rules: Rule) -> tuple[BmcError | None, list[Seen], float]:
        """How `call` ended, what it asked for, how long it took."""
        before = len(self.proxy.read_log())
        self.proxy.set_rules(rules)
        began = time.monotonic()
        error = None
        with self.open(self.proxy.url) as bmc:
            try:
                call.do(bmc, self.iso)
            except BmcError as e:
                error = e
        took = time.monotonic() - began
        self.proxy.set_rules(())
        return error, self.proxy.read_log()[before:], took


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@contextlib.contextmanager
def start_benches() -> Iterator[list[Bench]]:
    """Machines whose BMCs are real emulators; the last one is the other machine that answers in their place."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rpf-", dir="/tmp")))
        (folder / "boot.iso").write_bytes(b"no disc" + bytes(ISO_BYTES))
        media = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))))
        threading.Thread(target=media.serve_forever, daemon=True).start()
        stack.callback(media.shutdown)
        rack = stack.enter_context(start_scripted_rack(folder / "rack", count=MACHINES + 1))
        *machines, other = rack.machines
        iso = f"http://127.0.0.1:{media.server_port}/boot.iso"
        yield [Bench(m, stack.enter_context(start_fault_proxy(m.bmc_url)), iso, other.bmc_url) for m in machines]


def list_cells(bench: Bench) -> list[Cell]:
    """Each fault on each request of a clean conversation."""
    cells = []
    for call in CALLS:
        bench.prepare(call)
        error, seen, _ = bench.run(call)
        assert error is None, error
        for number, request in enumerate(seen, 1):
            faults = ON_ALL + (ON_READS if request.method == "GET" else ON_WRITES)
            cells += [Cell(call, number, request.method, re.sub(r"[0-9a-f-]{36}", "ID", request.path), fault) for fault in faults]
    return cells


def judge(bench: Bench, cell: Cell) -> str:
    """What is wrong with how the cell ended, "" where nothing is."""
    bench.prepare(cell.call)
    rule = Rule(cell.fault, nth=cell.request, seconds=1.0, status=500, other_url=bench.other_url)
    error, seen, took = bench.run(cell.call, rule)
    if not any(s.fault == cell.fault for s in seen):
        return "the fault never came"
    if took > DEADLINE_S + SLACK_S:
        return f"took {took:.1f} s of {DEADLINE_S:.0f}"
    truth = bench.truth()
    if error is None and not cell.call.after.items() <= truth.items():
        return f"said done; it is {truth}"
    if error is not None and (not str(error) or bench.machine.bmc_password in str(error.as_json()) or bench.machine.bmc_url in str(error)):
        return f"a poor cause: {error}"
    writes = collections.Counter((s.method, s.path) for s in seen if s.method != "GET")
    # A POST (power, media) goes out once. A PATCH names a state: it may be said in the driver's second way, or without its ETag.
    if any(times > (2 if method == "PATCH" else 1) for (method, _), times in writes.items()):
        return f"a write was sent again: {writes}"
    error, _, _ = bench.run(cell.call)
    truth = bench.truth()
    return "" if error is None and cell.call.after.items() <= truth.items() else f"asked again without a fault: {error}, {truth}"


def choose_slice(cells: Sequence[Cell]) -> list[Cell]:
    """Each fault once at each method."""
    return list({(cell.fault, cell.method): cell for cell in reversed(cells)}.values())


def run_cells(benches: list[Bench], cells: Sequence[Cell], say: Callable[[str], None]) -> list[str]:
    """Each cell on the next free machine. Returns what is wrong, a line a cell."""
    free: queue.Queue[Bench] = queue.Queue()
    for bench in benches:
        free.put(bench)

    def one(cell: Cell) -> str:
        bench = free.get()
        try:
            wrong = judge(bench, cell)
        except Exception as e:
            wrong = f"{type(e).__name__}: {e}"
        finally:
            free.put(bench)
        say(f"{cell}: {f'WRONG: {wrong}' if wrong else 'ended well'}")
        return f"{cell}: {wrong}" if wrong else ""

    with ThreadPoolExecutor(len(benches)) as pool:
        return [w for w in pool.map(one, cells) if w]
