"""Scripted machines against a far end of the test's own: what a rack of them does, without Repave's server."""

from __future__ import annotations

import hashlib
import http.server
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from repave.agent.protocol import ASK_HEADER
from repave.bmc import BmcAddress, Power
from repave.bmc.redfish import RedfishBmc
from repave.ca import make_ca, make_certificate
from repave.firstboot import FirstBoot, render_config_drive
from repave.images.importer import import_image
from repave.images.store import ImageStore
from repave.lab import scripted_os
from repave.lab.scripted import Player, ScriptedRack, set_faults, start_scripted_rack
from repave.lab.state import Machine, create_disk, create_machine

MIB = 1 << 20
RUN_TOKEN, SESSION, CHUNK_TOKEN, NONCE = "media-token", "session-token", "chunk-token", "nonce-of-the-run"


class FarEnd:
    """Media over HTTP, the agent's messages and the call home over TLS, as Repave would answer for one run."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.homes: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.image = scripted_os.build_image(folder / "new.raw", "new")
        self._images = ImageStore(folder / "images")
        self._manifest = import_image(self.image, self._images, max_bytes=64 * MIB).manifest_sha256
        make_ca(folder)
        self.ca_pem = (folder / "ca.pem").read_text()
        self._tls = self._serve(_answer_tls, tls=make_certificate(folder, ["127.0.0.1"], folder / "provisioning.pem"))
        self._media = self._serve(_answer_media)
        self._drive = render_config_drive(
            FirstBoot(
                hostname="node-7", instance_id="run-1", password_hash="$6$salt$hash", home_url=f"{self.url}/home/v1/run-1", nonce=NONCE, ca_pem=self.ca_pem
            )
        )
        self.plan: dict[str, Any] | None = {
            "plan_id": "p-1", "disk_path": str(machine.root_disk), "disk_serial": machine.root_serial, "disk_wwn": "",
            "disk_size_bytes": machine.root_disk.stat().st_size, "manifest_sha256": self._manifest,
            "config_drive_sha256": hashlib.sha256(self._drive).hexdigest(), "config_drive_bytes": len(self._drive),
            "chunk_urls": [f"{self.url}/chunks"], "chunk_token": CHUNK_TOKEN,
        }  # fmt: skip
        slot = {"run_id": "run-1", "agent_url": self.url, "token": RUN_TOKEN, "ca_pem": self.ca_pem}
        (folder / "repave-slot.json").write_text(json.dumps(slot))
        archive = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=b"repave-slot.json\n", cwd=folder, capture_output=True, check=True).stdout
        self.discs = {"/live.iso": b"kernel".ljust(4096) + archive.ljust(65536, b"\0"), "/inert.iso": b"kernel".ljust(70000)}

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._tls.server_address[1]}"

    def media(self, name: str) -> str:
        return f"http://127.0.0.1:{self._media.server_address[1]}/{name}.iso"

    def close(self) -> None:
        for server in (self._tls, self._media):
            server.shutdown()
            server.server_close()

    def answer(self, path: str, token: str, body: dict[str, Any]) -> bytes | None:
        """The body, empty for 204, None for 401."""
        name = path.removeprefix("/agent/v1/")
        if name.startswith("/chunks/"):
            return self._images.chunk_path(name.rpartition("/")[2]).read_bytes() if token == CHUNK_TOKEN else None
        if token != {"hello": RUN_TOKEN, "/home/v1/run-1": NONCE}.get(name, SESSION):
            return None
        if name == "plan" and self.plan is None:
            return b""
        if name == "report":
            self.reports.append(body)
        if name == "/home/v1/run-1":
            self.homes.append(body)
        values = {
            "hello": {"session": SESSION, "poll_s": 0.1},
            "plan": self.plan,
            "cross": {"epoch": 1, "lease_s": 60},
            "progress": {"lease_s": 60, "chunk_token": CHUNK_TOKEN},
        }
        files = {"manifest": self._images.read_manifest_bytes(self._manifest), "config-drive": self._drive}
        return files.get(name) or json.dumps(values.get(name, {"then": "power-off"})).encode()

    def _serve(self, answer: Callable[[FarEnd, http.server.BaseHTTPRequestHandler], bytes | None], tls: Path | None = None) -> http.server.ThreadingHTTPServer:
        end = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = answer(end, self)
                self.send_response(401 if body is None else 200 if body else 204)
                self.send_header(ASK_HEADER, self.headers.get(ASK_HEADER, ""))
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            do_POST = do_GET

            def log_message(self, *_: Any) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def _answer_media(end: FarEnd, request: http.server.BaseHTTPRequestHandler) -> bytes | None:
    return end.discs.get(request.path)


def _answer_tls(end: FarEnd, request: http.server.BaseHTTPRequestHandler) -> bytes | None:
    length = int(request.headers.get("Content-Length") or 0)
    body = json.loads(request.rfile.read(length)) if length else {}
    return end.answer(request.path, request.headers.get("Authorization", "").removeprefix("Bearer "), body)


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedRack]:
    with start_scripted_rack(tmp_path_factory.mktemp("rack"), count=2) as rack:
        yield rack


@pytest.fixture
def machine(rack: ScriptedRack) -> Iterator[Machine]:
    """The first machine, off, with its old OS."""
    first = rack.machines[0]
    scripted_os.write_old_os(first.root_disk)
    first.console.write_text("")
    yield first
    set_faults(rack.folder, {})
    bmc = _bmc(first)
    bmc.power_off()
    bmc.eject_media()
    bmc.boot_from_disk()


@contextmanager
def open_far_end(folder: Path, machine: Machine) -> Iterator[FarEnd]:
    end = FarEnd(folder, machine)
    try:
        yield end
    finally:
        end.close()


def _bmc(machine: Machine) -> RedfishBmc:
    return RedfishBmc(BmcAddress(machine.bmc_url, machine.bmc_username, machine.bmc_password))


def boot_from(machine: Machine, url: str) -> RedfishBmc:
    bmc = _bmc(machine)
    bmc.insert_media([url])
    bmc.boot_from_media_once()
    bmc.power_on()
    return bmc


def wait_for(what: Callable[[], object], deadline_s: float = 30) -> None:
    deadline = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_bmc_shows_its_own_machine_and_takes_its_own_password(rack: ScriptedRack) -> None:
    one, two = rack.machines
    members = requests.get(f"{one.bmc_url}/redfish/v1/Systems", auth=(one.bmc_username, one.bmc_password), timeout=5).json()["Members"]
    assert [m["@odata.id"] for m in members] == [f"/redfish/v1/Systems/{one.uuid}"]
    assert requests.get(f"{one.bmc_url}/redfish/v1/Systems/{two.uuid}", auth=(one.bmc_username, one.bmc_password), timeout=5).status_code == 404
    assert _bmc(one).probe().macs == (one.mac,)
    assert requests.get(f"{one.bmc_url}/redfish/v1/Systems", auth=(two.bmc_username, two.bmc_password), timeout=5).status_code == 401


def test_the_agent_writes_the_image_and_the_new_os_calls_home_once(machine: Machine, tmp_path: Path) -> None:
    with open_far_end(tmp_path, machine) as end:
        bmc = boot_from(machine, end.media("live"))
        wait_for(lambda: bmc.read_power() is Power.OFF)
        assert [(r["verified"], r["error"]) for r in end.reports] == [(True, None)], machine.console.read_text()
        with machine.root_disk.open("rb") as disk, end.image.open("rb") as image:
            disk.seek(MIB)
            image.seek(MIB)
            assert disk.read(8 * MIB) == image.read(8 * MIB)
        assert scripted_os.find_config_drive(machine.root_disk) is not None
        bmc.eject_media()
        bmc.boot_from_disk()
        bmc.power_on()
        wait_for(lambda: "home: taken" in machine.console.read_text())
        assert [(h["root_disk_serial"], h["password_usable"]) for h in end.homes] == [(machine.root_serial, True)]
        assert scripted_os.find_config_drive(machine.root_disk) is None and NONCE.encode() not in machine.root_disk.read_bytes()
        bmc.power_off(graceful_s=5)
        bmc.power_on()
        wait_for(lambda: machine.console.read_text().count("boot: disk, new OS") == 2)
        assert len(end.homes) == 1


class LateLock:
    """The machine's lock; its boot's own thread gets it for switching off only when `go` is set. Any scheduler may order two threads so."""

    def __init__(self, boot_thread: str) -> None:
        self._lock, self._boot_thread = threading.Lock(), boot_thread
        self.arrived, self.go = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread().name == self._boot_thread and sys._getframe(1).f_code.co_name == "_power_off":
            self.arrived.set()
            assert self.go.wait(30)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_an_agent_that_switches_off_late_does_not_switch_off_the_next_boot(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    machine = create_machine(tmp_path, "lab01", bmc_port=1)
    create_disk(machine.root_disk, 64 * MIB)
    player = Player(tmp_path, machine)
    lock = LateLock(machine.name)
    player._lock = lock  # type: ignore[assignment]
    with open_far_end(tmp_path, machine) as end:
        player.cd, player.boot_target = tmp_path / "live.iso", "Cd"
        player.cd.write_bytes(end.discs["/live.iso"])
        player.reset("On")
        assert lock.arrived.wait(30)  # the agent has ended; before that is acted on, the server powers off, and on again
        player.reset("ForceOff")
        player.cd, player.boot_target = None, "Hdd"
        player.reset("On")
        lock.go.set()
        wait_for(lambda: "home:" in machine.console.read_text())
        assert player.is_on and "home: taken" in machine.console.read_text() and len(end.homes) == 1
        player.reset("ForceOff")


def test_media_without_a_live_run_boot_the_local_disk(machine: Machine, tmp_path: Path) -> None:
    with open_far_end(tmp_path, machine) as end:
        boot_from(machine, end.media("inert"))
        wait_for(lambda: "boot: disk, old OS" in machine.console.read_text())
        assert machine.console.read_text().startswith("boot: CD\n")


def test_a_spent_token_boots_the_old_os(machine: Machine, tmp_path: Path) -> None:
    with open_far_end(tmp_path, machine) as end:
        end.discs["/live.iso"] = end.discs["/live.iso"].replace(RUN_TOKEN.encode(), b"spent-token")
        boot_from(machine, end.media("live"))
        wait_for(lambda: "boot: disk, old OS" in machine.console.read_text())
        assert not end.reports


def test_faults_are_what_they_say(rack: ScriptedRack, machine: Machine, tmp_path: Path) -> None:
    with open_far_end(tmp_path, machine) as end:
        set_faults(rack.folder, {machine.name: ["ignore-override", "ignore-graceful"]})
        bmc = boot_from(machine, end.media("live"))
        wait_for(lambda: machine.console.read_text() == "boot: disk, old OS\n")
        assert bmc.power_off(graceful_s=0.5) is True
        set_faults(rack.folder, {machine.name: ["no-hello"]})
        bmc.power_on()
        wait_for(lambda: "ramdisk: hangs" in machine.console.read_text())
        assert bmc.read_power() is Power.ON and not end.reports


def test_bmcs_that_are_asked_by_many_at_once_keep_no_file_open(rack: ScriptedRack) -> None:
    [process] = rack._state.processes
    open_files = Path(f"/proc/{process.pid}/fd")
    before = len(list(open_files.iterdir()))

    def ask() -> None:
        for _ in range(50):
            for machine in rack.machines:
                _bmc(machine).read_power()

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(list(open_files.iterdir())) <= before + 10


def test_a_stopped_rack_leaves_no_process_not_even_an_agent(tmp_path: Path) -> None:
    with start_scripted_rack(tmp_path / "rack", count=1) as rack:
        only = rack.machines[0]
        with open_far_end(tmp_path, only) as end:
            end.plan = None  # the agent asks again and again
            boot_from(only, end.media("live"))
            wait_for(lambda: _processes_of(rack.folder) >= 2)
            ScriptedRack(rack.folder).stop()
    wait_for(lambda: _processes_of(tmp_path / "rack") == 0, 5)


def _processes_of(folder: Path) -> int:
    """How many processes name the folder on their command lines."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += str(folder).encode() in path.read_bytes()
        except OSError:
            continue
    return found
