"""A scripted rack with a fault proxy on every wire, and how one cell is run on one of its machines and judged.

    BMC of each machine <- proxy <- service -> listeners <- proxies (TLS with the site's CA) <- agents, new operating systems, BMCs fetching media

Judged from outside: what the client reads, the bytes of the disk before and after, the emulator asked past the proxy, the machine's console.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from conftest import SECTOR, Lab, wait_until
from fault_cells import Cell
from places import place_of_rack
from watch import Watch
from wide_image import build_wide_image

from repave.app import init_site
from repave.ca import make_certificate
from repave.cli.client import Client, Endpoint
from repave.errors import RunFailed
from repave.lab import scripted_os
from repave.lab.fault_proxy import FaultProxy, start_fault_proxy
from repave.lab.processes import find_free_ports, stop_processes
from repave.lab.rack import find_service, power_on, start_service_again
from repave.lab.scripted import start_scripted_rack
from repave.lab.service import import_image, register_machine
from repave.lab.state import write_auth_file
from repave.secrets import Sealer, write_private

CELL_S = 900.0  # four tries to go on and four to go back, each with a BMC at its slowest
WAITS = {"agent_ready_s": 60, "written_s": 150, "proof_s": 60, "graceful_s": 5, "return_pause_s": 5}
Json = dict[str, Any]


class FaultRig(Lab):
    """What a cell needs. `names`: machines free for cells."""

    def __init__(self, folder: Path, count: int, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        rack = stack.enter_context(start_scripted_rack(folder / "rack", count=count + 1))
        first = rack.machines[0]
        # One password for all BMCs: another machine behind an address lets us in.
        machines = [dataclasses.replace(m, bmc_username=first.bmc_username, bmc_password=first.bmc_password) for m in rack.machines]
        for m in machines:
            write_auth_file(folder / "rack", m)
            scripted_os.write_old_os(m.root_disk)
        self.machines = {m.name: m for m in machines[:count]}
        self.other = machines[count]
        self.names = list(self.machines)
        api, provisioning, media, chunks, agents_seen, media_seen = find_free_ports(6)
        first_key = init_site(
            folder / "site", api_listen=f"127.0.0.1:{api}", provisioning_listen=f"127.0.0.1:{provisioning}", media_listen=f"127.0.0.1:{media}",
            media_url=f"http://127.0.0.1:{media_seen}", agent_url=f"https://127.0.0.1:{agents_seen}",
            chunks_listen=f"127.0.0.1:{chunks}", chunks_url=f"https://127.0.0.1:{agents_seen}/chunks",
            boot_iso=str(scripted_os.build_disc(folder / "boot.iso")), **WAITS,
        )  # fmt: skip
        endpoint = f"http://127.0.0.1:{api}"
        write_private(folder / "site/admin.json", f'{{"endpoint": "{endpoint}"}}'.encode())
        self.values = {"endpoint": endpoint, "project_id": first_key.project.id, "token": first_key.token}
        self.client = Client(None, Endpoint(endpoint, first_key.token))
        self.ca = folder / "site/secret/ca.pem"
        certificate = make_certificate(self.ca.parent, ["127.0.0.1"], folder / "proxy.pem")
        start = stack.enter_context
        routes = {"/chunks/": f"https://127.0.0.1:{chunks}"}
        upstream = f"https://127.0.0.1:{provisioning}"
        self.agents = start(start_fault_proxy(upstream, ca=self.ca, certificate=certificate, port=agents_seen, routes=routes))
        self.media = start(start_fault_proxy(f"http://127.0.0.1:{media}", port=media_seen))
        self.bmcs = {name: start(start_fault_proxy(m.bmc_url)) for name, m in self.machines.items()}
        self.agents.name_caller = self.media.name_caller = self._name_caller
        self._callers: dict[str, str] = {}
        self._sealer = Sealer.open(folder / "site/secret/key")
        start_service_again(folder)
        stack.callback(lambda: stop_processes(filter(None, [find_service(folder)]), grace_s=10))
        self.ids = {}
        for unit, (name, m) in enumerate(self.machines.items(), 1):
            power_on(m)
            seen = dataclasses.replace(m, bmc_url=self.bmcs[name].url)
            self.ids[name] = register_machine(self.client, seen, unit=unit)["instance"]["id"]
        for name in ("tiny-1", "wide"):
            raw = (build_wide_image if name == "wide" else scripted_os.build_image)(folder / f"{name}.raw", name)
            import_image(self.client, raw, name=name)
        self.image_ids = {i["name"]: i["id"] for i in self.client.items("/images")}
        lab = self.values | {"sk": first_key.sk, "instances": [{"id": i, "name": n} for n, i in self.ids.items()]}
        place = place_of_rack(folder, lab, ["Cell-7!"])
        self.watch = Watch(dataclasses.replace(place, machines=self.machines, bmc_logs={n: place.bmc_logs[n] for n in self.machines}))
        stack.callback(self.watch.close)
        self.watch.begin()

    def _name_caller(self, path: str, bearer: str) -> str:
        """The server whose run this is: by the run in the path, or by its token, which only the run's own key gives."""
        if path.startswith("/media/"):
            key = path.split("/")[2]
        elif path.startswith("/home/"):
            key = path.rpartition("/")[2]
        elif path.startswith("/chunks/"):
            key = bearer.partition(".")[2].partition(".")[0]  # images/chunk_token.py
        else:
            key = bearer
        if key not in self._callers:
            with contextlib.closing(sqlite3.connect(f"file:{self.folder}/site/repave-data/repave.db?mode=ro", uri=True, timeout=10)) as db:
                live = db.execute("SELECT r.id, s.name FROM runs r JOIN servers s ON s.id = r.server_id WHERE r.ended_at IS NULL").fetchall()
            for run, name in live:
                with contextlib.suppress(RunFailed):  # it ended meanwhile
                    tokens = (self._sealer.derive_for_run(run, purpose) for purpose in ("agent", "session"))
                    self._callers.update(dict.fromkeys((run, *tokens), name))
        return self._callers.get(key, "")

    def media_token(self, run: str) -> str:
        """What this run's boot media carry."""
        return self._sealer.derive_for_run(run, "agent")

    def bmc(self, name: str) -> Json:
        """The driver knows two ways to boot the disk: naming it, and no override."""
        seen = super().bmc(name)
        return seen | {"boot": "Hdd"} if seen["boot"] == "None" else seen

    # ---- one cell ----

    def proxy_of(self, cell: Cell, name: str) -> FaultProxy:
        return {"agent": self.agents, "media": self.media}.get(cell.call.at) or self.bmcs[name]

    def set_cell(self, cell: Cell | None, name: str) -> None:
        for proxy in (self.agents, self.media, self.bmcs[name]):
            proxy.set_rules((), caller=name)
        if cell is not None:
            caller = "" if cell.call.at == "bmc" else name
            rules = [dataclasses.replace(r, caller=caller, other_url=self.other.bmc_url) for r in cell.rules()]
            self.proxy_of(cell, name).set_rules(rules, caller=caller)
        else:
            self.bmcs[name].set_rules(())

    def settle(self, name: str) -> None:
        """It is `running`, no fault is set."""
        self.set_cell(None, name)
        self.unlock(name)
        if self.status(name)["state"] != "running":
            self.wait_for_run(self.start_run(name, "tiny-1"), name)
            assert self.status(name)["state"] == "running"

    def unlock(self, name: str) -> None:
        """As an operator who has looked, where another machine had answered for it."""
        if self.client.get(f"/servers/{name}")["lock"]:
            self.client.post(f"/servers/{name}/unlock", {})

    def put(self, name: str, image: str, *, also: Sequence[str] = ()) -> requests.Response:
        """CloudDC's."""
        url = f"{self.values['endpoint']}/v1/{self.values['project_id']}/instances/reinstall"
        body = {"image_id": self.image_ids[image], "password": f"Cell-7!{os.urandom(6).hex()}", "instance_id_set": [self.ids[n] for n in (name, *also)]}
        return requests.put(url, json=body, headers={"X-Auth-Token": self.values["token"]}, timeout=60)

    def start_run(self, name: str, image: str, *, also: Sequence[str] = ()) -> str:
        """The 202's batch."""
        answer = self.put(name, image, also=also)
        assert answer.status_code == 202, answer.text
        return answer.headers["link"].partition("/batches/")[2].partition(">")[0]

    def wait_for_run(self, batch: str, name: str) -> Json:
        end = time.monotonic() + CELL_S
        while (run := self.runs(batch)[name])["ended_at"] is None:
            if time.monotonic() > end:
                raise AssertionError(f"no end within {CELL_S:.0f} s; at {run['step']}")
            time.sleep(0.5)
        return run

    def judge(self, cell: Cell, name: str) -> str:
        """What is wrong with how the cell ended, "" where nothing is."""
        self.settle(name)
        self.scribble(name)
        self.watch.begin_of(name)
        before = Before(self.disk_digest(name), len(self.console(name)), len(self.proxy_of(cell, name).read_log()))
        self.set_cell(None if cell.since else cell, name)
        batch = self.start_run(name, cell.image)
        if cell.since:
            self.wait_for_event(batch, "run.step", step=cell.since)
            self.set_cell(cell, name)
        run = self.wait_for_run(batch, name)
        wrong = JUDGES[cell.ends](self, cell, name, run, before)
        log = self.proxy_of(cell, name).read_log()[before.log :]
        if not any(s.fault == cell.fault and s.caller in ("", name) for s in log):
            wrong = f"{wrong}; the fault never came"
        crossed = [e for e in self.events(batch) if e["type"] == "run.crossed"]
        if len(crossed) > 1:
            wrong = f"{wrong}; crossed {len(crossed)} times"
        if not run["error"] and cell.ends != "running":
            wrong = f"{wrong}; no cause"
        broken = [b for b in self.watch.judge_of(name) if not b.startswith("I10 ")]  # all BMCs have one password here
        wrong = "; ".join([wrong, *broken])
        self.set_cell(None, name)
        self.unlock(name)
        if not wrong and self.status(name)["state"] == "error":  # from error another reinstall is always allowed
            again = self.wait_for_run(self.start_run(name, "tiny-1"), name)
            wrong = _judge_running(self, cell, name, again, dataclasses.replace(before, console=len(self.console(name))), "tiny-1")
            wrong = wrong and f"the reinstall after it: {wrong}"
        return f"{wrong.strip('; ')}; {_tell(run)}" if wrong else ""


@dataclasses.dataclass(frozen=True)
class Before:
    """The machine as a cell found it."""

    digest: str
    console: int
    log: int


def _tell(run: Json) -> str:
    return f"it ended {run['outcome']} at {run['step']}: {run['error']}"


def _differ(**pairs: tuple[Any, Any]) -> str:
    return "; ".join(f"{name} is {is_!r:.200}, not {should!r:.200}" for name, (is_, should) in pairs.items() if is_ != should)


AT_REST = {"boot": "Hdd", "media": ""}


def _judge_running(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before, image: str = "") -> str:
    status = rig.status(name)
    wrong = _differ(
        outcome=(run["outcome"], "proved"),
        state=((status["state"], status["operation_state"]), ("running", "reinstall-succeed")),
        bmc=(rig.bmc(name), AT_REST | {"power": "On"}),
    )
    return wrong or _differ(
        proof=(run["proof"]["root_disk_serial"], rig.machines[name].root_serial),
        differences=(rig.differences(name, rig.folder / f"{image or cell.image}.raw"), []),
        drive=(scripted_os.find_config_drive(rig.machines[name].root_disk), None),
    )


def _judge_returned(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before) -> str:
    status, console = rig.status(name), rig.console(name)[before.console :]
    booted = [line for line in console.splitlines() if line.startswith("boot: ")]
    return _differ(
        outcome=(run["outcome"], "returned"),
        state=((status["state"], status["operation_state"]), ("running", "reinstall-failed")),
        disk=(rig.disk_digest(name) == before.digest, True),
        bmc=(rig.bmc(name), AT_REST | {"power": "On"}),
        last_boot=("disk" in (booted or ["disk: never off"])[-1], True),
    )


def _judge_off(rig: FaultRig, name: str, run: Json) -> str:
    status = rig.status(name)
    return _differ(
        outcome=(run["outcome"], "write-failed"),
        state=((status["state"], status["operation_state"]), ("error", "reinstall-failed")),
        bmc=(rig.bmc(name), AT_REST | {"power": "Off"}),
    )


def _judge_stopped(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before) -> str:
    return _judge_off(rig, name, run) or _differ(first_sector=(rig.first_sector(name), bytes(SECTOR)))


def _judge_stopped_whole(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before) -> str:
    return _judge_off(rig, name, run) or _differ(differences=(rig.differences(name, rig.folder / f"{cell.image}.raw"), []))


def _judge_stopped_clean(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before) -> str:
    return _judge_off(rig, name, run) or _differ(disk=(rig.disk_digest(name) == before.digest, True))


def _judge_unproved(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before) -> str:
    status = rig.status(name)
    wrong = _differ(
        outcome=(run["outcome"], "unproved"),
        state=((status["state"], status["operation_state"]), ("error", "reinstall-failed")),
        bmc=(rig.bmc(name), AT_REST | {"power": "On"}),
        differences=(rig.differences(name, rig.folder / f"{cell.image}.raw"), []),
    )
    rig.set_cell(None, name)
    if not wrong:  # the new OS goes on calling
        wait_until(lambda: rig.status(name)["state"] == "running", deadline_s=60, what=lambda: f"the late proof of {name} did not count")
    return wrong


def _judge_return_failed(rig: FaultRig, cell: Cell, name: str, run: Json, before: Before) -> str:
    status = rig.status(name)
    return _differ(
        outcome=(run["outcome"], "return-failed"),
        state=((status["state"], status["operation_state"]), ("error", "reinstall-failed")),
        disk=(rig.disk_digest(name) == before.digest, True),
    )


JUDGES: dict[str, Callable[[FaultRig, Cell, str, Json, Before], str]] = {
    "running": _judge_running, "returned": _judge_returned, "stopped": _judge_stopped, "stopped-whole": _judge_stopped_whole,
    "stopped-clean": _judge_stopped_clean, "unproved": _judge_unproved, "return-failed": _judge_return_failed,
}  # fmt: skip


@contextlib.contextmanager
def start_fault_rig(count: int) -> Iterator[FaultRig]:
    """`count` machines for cells, all running their old OS."""
    folder = Path(tempfile.mkdtemp(prefix="rpf-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield FaultRig(folder, count, stack)


def run_cells(rig: FaultRig, cells: Sequence[Cell], say: Callable[[str], None]) -> list[str]:
    """Each cell on the next free machine. Returns what is wrong, a line a cell."""
    free: queue.Queue[str] = queue.Queue()
    for name in rig.names:
        free.put(name)

    def one(cell: Cell) -> str:
        name = free.get()
        try:
            wrong = rig.judge(cell, name)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        finally:
            rig.set_cell(None, name)
            free.put(name)
        say(f"{cell}: {f'WRONG: {wrong}' if wrong else cell.ends}")
        return f"{cell}: {wrong}" if wrong else ""

    with ThreadPoolExecutor(len(rig.names)) as pool:
        return [w for w in pool.map(one, cells) if w]
