"""The agent as a process, against a scripted server: what it writes, what it leaves alone, what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import ipaddress
import json
import os
import random
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from repave.agent.log import KEPT_BYTES, Console
from repave.agent.protocol import ASK_HEADER, LOG_BYTES
from repave.images.manifest import Chunk, Manifest, render_manifest

MIB = 2**20
WINDOW_BYTES = 256 * 1024
TOKEN, SESSION = "media-token-canary-1", "session-token-canary-2"
CHUNK_TOKENS = ("chunk-token-canary-3", "chunk-token-canary-4")  # the plan's, and that of each answer to progress
OLD = b"\xaa" * 512  # what the disk holds before


@dataclasses.dataclass(frozen=True)
class Certificate:
    pem: str
    key_pem: str


def make_certificate(*, days_from_now: int = -1) -> Certificate:
    """Its own CA, for 127.0.0.1, valid for ten days from `days_from_now`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "repave test")])
    begins = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days_from_now)
    built = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(begins).not_valid_after(begins + datetime.timedelta(days=10))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificate(built.public_bytes(serialization.Encoding.PEM).decode(), key_pem.decode())


class FarEnd(http.server.ThreadingHTTPServer):
    """A provisioning listener that does what the test tells it, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, certificate: Certificate, folder: Path, image: bytes, *, disk_serial: str, disk_bytes: int) -> None:
        self.asked: list[tuple[str, str]] = []  # (bearer token, "POST /path")
        self.bodies: dict[str, list[dict[str, Any]]] = {}
        self.logs: list[tuple[str, str]] = []  # (bearer token, lines) of each batch of the agent's console
        self.log_status = 200
        self.hello_status = self.plan_status = self.cross_status = self.chunk_status = 200
        self.stop_in_stage = ""  # 410 to progress in this stage
        self.chunk_delay_s, self.lease_s = 0.0, 60.0
        self.lost: dict[str, int] = {}  # path -> how many answers get lost
        self.mixed_up: set[str] = set()  # paths answered, once, with what was meant for another request
        self.long_once: set[str] = set()  # paths whose next answer is longer than it may be
        self.then = "power-off"
        self.damage: set[str] = set()  # paths answered with other bytes
        self.damage_once: set[str] = set()
        self.config_drive = b"CONFIG-DRIVE" * 1000
        self.manifest, self.chunks = split_image(image)
        self.plan = {
            "plan_id": "plan-1", "disk_path": "/dev/somewhere", "disk_serial": disk_serial, "disk_wwn": "", "disk_size_bytes": disk_bytes,
            "manifest_sha256": hashlib.sha256(self.manifest).hexdigest(), "config_drive_sha256": hashlib.sha256(self.config_drive).hexdigest(),
            "config_drive_bytes": len(self.config_drive), "boot_label": "repave",
        }  # fmt: skip
        super().__init__(("127.0.0.1", 0), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (folder / "server.pem").write_text(certificate.pem + certificate.key_pem)
        context.load_cert_chain(folder / "server.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.plan |= {"chunk_urls": [f"{self.url}/chunks"], "chunk_token": CHUNK_TOKENS[0]}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.asked]

    @property
    def reports(self) -> list[dict[str, Any]]:
        return self.bodies.get("/agent/v1/report", [])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FarEnd
    timeout = 30

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        end = self.server
        end.asked.append((self.headers["Authorization"].removeprefix("Bearer "), f"GET {self.path}"))
        if self.path == "/agent/v1/plan":
            first = end.paths.count("GET /agent/v1/plan") == 1
            return self.answer(204 if first else end.plan_status, b"" if first else json.dumps(end.plan).encode())
        if self.path == "/agent/v1/manifest":
            return self.answer(200, end.manifest)
        if self.path == "/agent/v1/config-drive":
            return self.answer(200, end.config_drive)
        time.sleep(end.chunk_delay_s)
        return self.answer(end.chunk_status, end.chunks[self.path.rpartition("/")[2]])

    def do_POST(self) -> None:
        end = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/agent/v1/log":  # not in `asked`: it comes whenever there is something to say
            end.logs.append((self.headers["Authorization"].removeprefix("Bearer "), body["text"]))
            return self.answer(end.log_status, b"{}")
        end.asked.append((self.headers["Authorization"].removeprefix("Bearer "), f"POST {self.path}"))
        end.bodies.setdefault(self.path, []).append(body)
        status, value = {
            "/agent/v1/hello": (end.hello_status, {"session": SESSION, "poll_s": 0.05}),
            "/agent/v1/cross": (end.cross_status, {"epoch": 7, "lease_s": end.lease_s}),
            "/agent/v1/progress": (410 if body.get("stage") == end.stop_in_stage else 200, {"lease_s": end.lease_s, "chunk_token": CHUNK_TOKENS[1]}),
            "/agent/v1/report": (200, {"then": end.then}),
        }[self.path]
        return self.answer(status, json.dumps(value).encode())

    def answer(self, status: int, body: bytes) -> None:
        if self.server.lost.get(self.path, 0) > 0:
            self.server.lost[self.path] -= 1
            self.close_connection = True
            return
        if self.path in self.server.damage | self.server.damage_once:
            self.server.damage_once.discard(self.path)
            body = body[:-1] + b"?"
        if self.path in self.server.long_once:
            self.server.long_once.discard(self.path)
            body += bytes(2 * MIB)
        self.send_response(status)
        self.send_header(ASK_HEADER, "another" if self.path in self.server.mixed_up else self.headers[ASK_HEADER])
        self.server.mixed_up.discard(self.path)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204:
            self.wfile.write(body)


def split_image(image: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The manifest and the chunks by SHA-256, of an image in small windows."""
    chunks, files = [], {}
    for at in range(0, len(image), WINDOW_BYTES):
        window = image[at : at + WINDOW_BYTES]
        compressed = zstandard.compress(window)
        sha256 = hashlib.sha256(compressed).hexdigest()
        files[sha256] = compressed
        grains = [o for o in range(0, len(window), 65536) if any(window[o : o + 65536])]
        chunks.append(Chunk(sha256, len(compressed), hashlib.sha256(window).hexdigest(), tuple((o, min(65536, len(window) - o)) for o in grains)))
    return render_manifest(Manifest(len(image), 512, "amd64", "uefi", tuple(chunks), WINDOW_BYTES)), files


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """12 MiB with a GPT, an ESP and a root partition of random bytes with a hole."""
    path = tmp_path_factory.mktemp("image") / "image"
    path.touch()
    os.truncate(path, 12 * MIB)
    table = "label: gpt\nstart=2048, size=4096, type=uefi\nstart=6144, size=14336, type=linux\n"
    subprocess.run(["/sbin/sfdisk", "-q", path], input=table, text=True, check=True)
    data = bytearray(path.read_bytes())
    data[MIB : 5 * MIB] = random.Random(1).randbytes(4 * MIB)
    data[6 * MIB : 9 * MIB] = random.Random(2).randbytes(3 * MIB)
    return bytes(data)


@dataclasses.dataclass
class Rack:
    """One scripted server: two disks, the second one with data that must stay."""

    folder: Path
    end: FarEnd
    ca_pem: str
    give_up_s: float = 20
    output: str = ""

    @property
    def disk(self) -> Path:
        return self.folder / "root.img"

    @property
    def data_disk(self) -> Path:
        return self.folder / "data.img"

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "machine.json.state").read_text())  # type: ignore[no-any-return]

    def run(self) -> int:
        slot = {"run_id": "run-1", "agent_url": self.end.url, "token": TOKEN, "ca_pem": self.ca_pem, "give_up_s": self.give_up_s}
        (self.folder / "slot.json").write_text(json.dumps(slot))
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "repave.agent.cli",
            "run",
            "--slot",
            self.folder / "slot.json",
            "--machine-file",
            self.folder / "machine.json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        self.output = done.stdout + done.stderr
        assert not any(token in self.output for token in (TOKEN, SESSION, *CHUNK_TOKENS))
        assert "Traceback" not in self.output
        assert not any(self.data_disk.read_bytes()[at : at + 512] != OLD for at in range(0, MIB, 512))
        return done.returncode

    def untouched(self) -> bool:
        return self.disk.read_bytes() == OLD * (20 * MIB // 512)


@contextlib.contextmanager
def open_rack(folder: Path, image: bytes, certificate: Certificate) -> Iterator[Rack]:
    (folder / "root.img").write_bytes(OLD * (20 * MIB // 512))
    (folder / "data.img").write_bytes(OLD * (MIB // 512))
    disks = [{"path": str(folder / f"{name}.img"), "serial": f"{name.upper()}-1"} for name in ("data", "root")]
    (folder / "machine.json").write_text(json.dumps({"serial": "SRV-1", "uuid": "u-1", "macs": ["52:54:00:00:00:01"], "disks": disks}))
    with FarEnd(certificate, folder, image, disk_serial="ROOT-1", disk_bytes=20 * MIB) as end:
        thread = threading.Thread(target=end.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Rack(folder, end, certificate.pem)
        finally:
            end.shutdown()
            thread.join()


@pytest.fixture
def rack(tmp_path: Path, image: bytes) -> Iterator[Rack]:
    with open_rack(tmp_path, image, make_certificate()) as rack:
        yield rack


def test_a_run_writes_the_image_to_the_planned_disk_and_reports_it(rack: Rack, image: bytes) -> None:
    assert rack.run() == 0
    written = rack.disk.read_bytes()
    assert written[MIB : 9 * MIB] == image[MIB : 9 * MIB]
    assert written[510:512] == b"\x55\xaa" and rack.end.config_drive in written[12 * MIB :]
    parts = json.loads(subprocess.run(["/sbin/sfdisk", "-J", rack.disk], capture_output=True, check=True).stdout)["partitiontable"]["partitions"]
    assert [p.get("name", "") for p in parts][-1] == "config-2" and len(parts) == 3
    (report,) = rack.end.reports
    assert report["verified"] and report["error"] is None and report["disk_serial"] == "ROOT-1" and report["epoch"] == 7
    assert report["bytes_fetched"] > 0 and set(report["stages_s"]) >= {"clear", "write", "config-drive", "read-back", "boot-entry", "seal"}
    assert rack.state == {"ended": "power-off", "boot_entry": "repave", "read_only": [str(rack.data_disk)]}
    assert {token for token, path in rack.end.asked if path == "POST /agent/v1/hello"} == {TOKEN}
    chunks = {token for token, path in rack.end.asked if "/chunks/" in path}
    assert chunks and chunks <= set(CHUNK_TOKENS)
    assert {token for token, path in rack.end.asked if "/hello" not in path and "/chunks/" not in path} == {SESSION}


def test_everything_that_can_be_known_is_known_before_the_line(rack: Rack) -> None:
    rack.run()
    order = rack.end.paths
    assert order.index("GET /agent/v1/manifest") < order.index("POST /agent/v1/cross") < order.index("GET /agent/v1/config-drive")


def test_lost_answers_are_asked_for_again_and_the_run_goes_on(rack: Rack) -> None:
    rack.end.lost = {"/agent/v1/hello": 1, "/agent/v1/plan": 1, "/agent/v1/cross": 2, "/agent/v1/report": 1, chunk_path(rack, 5): 3}
    assert rack.run() == 0
    assert len(set(map(str, rack.end.bodies["/agent/v1/cross"]))) == 1 and len(rack.end.bodies["/agent/v1/cross"]) == 3
    assert rack.end.reports[-1]["verified"]


def test_answers_to_somebody_elses_requests_are_none_and_the_run_goes_on(rack: Rack) -> None:
    """The bug: an agent that was given another run's answer to cross wrote its disk, and its own run had never crossed."""
    once = {"/agent/v1/hello", "/agent/v1/cross", "/agent/v1/manifest", "/agent/v1/config-drive", "/agent/v1/report"}
    rack.end.mixed_up = set(once)
    assert rack.run() == 0
    asked = [path.partition(" ")[2] for path in rack.end.paths]
    assert {path: asked.count(path) for path in once} == dict.fromkeys(once, 2)
    assert rack.end.reports[-1]["verified"]


def test_a_long_answer_to_somebody_elses_request_is_none_either(rack: Rack) -> None:
    """It was too long for this request's, and that ended the run."""
    rack.end.mixed_up, rack.end.long_once = {"/agent/v1/config-drive"}, {"/agent/v1/config-drive"}
    assert rack.run() == 0
    assert rack.end.reports[-1]["verified"]


def test_a_refused_crossing_leaves_the_disk_alone_and_boots_it(rack: Rack) -> None:
    rack.end.cross_status = 410
    assert rack.run() == 1
    assert rack.untouched() and rack.state["ended"] == "boot-local" and not rack.end.reports


def test_a_crossing_that_is_never_answered_leaves_the_disk_alone(rack: Rack) -> None:
    rack.end.lost, rack.give_up_s = {"/agent/v1/cross": 99}, 1
    assert rack.run() == 1
    assert rack.untouched() and rack.state["ended"] == "boot-local"


def test_an_agent_told_to_stop_stops_and_its_disk_cannot_boot(rack: Rack) -> None:
    rack.end.stop_in_stage, rack.end.chunk_delay_s, rack.end.lease_s = "write", 0.2, 4.0
    assert rack.run() == 1
    assert rack.disk.read_bytes()[:MIB] == bytes(MIB)
    assert not any(r["verified"] for r in rack.end.reports) and rack.state["ended"] == "power-off"


def test_an_agent_whose_lease_ran_out_stops_and_its_disk_cannot_boot(rack: Rack) -> None:
    rack.end.lost, rack.end.chunk_delay_s, rack.end.lease_s = {"/agent/v1/progress": 999}, 0.3, 1.0
    assert rack.run() == 1
    assert rack.disk.read_bytes()[:MIB] == bytes(MIB)
    assert [r["error"]["class"] for r in rack.end.reports] == ["stale-run"] and rack.state["ended"] == "power-off"


@pytest.mark.parametrize("status", [401, 410])
def test_a_refused_hello_boots_the_local_disk(rack: Rack, status: int) -> None:
    rack.end.hello_status = status
    assert rack.run() == 1
    assert rack.untouched() and rack.state["ended"] == "boot-local" and rack.end.paths == ["POST /agent/v1/hello"]


def test_an_agent_started_again_after_one_that_wrote_powers_off_where_it_is_refused(rack: Rack) -> None:
    (rack.folder / "slot.json.wrote").touch()
    rack.end.hello_status = 410
    rack.run()
    assert rack.state["ended"] == "power-off"


def test_a_run_that_ended_before_the_plan_boots_the_local_disk(rack: Rack) -> None:
    rack.end.plan_status = 410
    assert rack.run() == 1
    assert rack.untouched() and rack.state["ended"] == "boot-local"


@pytest.mark.parametrize("change", [{"disk_serial": "OTHER-1"}, {"disk_size_bytes": 19 * MIB}, {"disk_wwn": "naa.5"}, {"disk_serial": ""}])
def test_a_plan_for_another_disk_writes_nothing_and_is_reported(rack: Rack, change: dict[str, Any]) -> None:
    rack.end.plan |= change
    rack.end.then = "boot-local"
    assert rack.run() == 1
    assert rack.untouched() and [r["error"]["class"] for r in rack.end.reports] == ["disk-changed"]
    assert rack.state["ended"] == "boot-local" and "POST /agent/v1/cross" not in rack.end.paths


def test_a_damaged_manifest_is_found_before_the_line(rack: Rack) -> None:
    rack.end.damage = {"/agent/v1/manifest"}
    assert rack.run() == 1
    assert rack.untouched() and [r["error"]["class"] for r in rack.end.reports] == ["image-damaged"]
    assert "POST /agent/v1/cross" not in rack.end.paths


def test_a_manifest_and_a_config_drive_that_came_wrong_once_are_fetched_again(rack: Rack) -> None:
    rack.end.damage_once = {"/agent/v1/manifest", "/agent/v1/config-drive"}
    assert rack.run() == 0
    assert rack.end.paths.count("GET /agent/v1/manifest") == rack.end.paths.count("GET /agent/v1/config-drive") == 2


def test_a_config_drive_that_is_longer_than_planned_is_none(rack: Rack) -> None:
    rack.end.config_drive += bytes(MIB)
    assert rack.run() == 1
    assert rack.untouched() and [r["error"]["class"] for r in rack.end.reports] == ["agent-failed"]


def test_a_redirect_is_not_followed(rack: Rack) -> None:
    rack.end.hello_status, rack.give_up_s = 307, 0.5
    assert rack.run() == 1
    assert rack.untouched() and rack.state["ended"] == "boot-local" and set(rack.end.paths) == {"POST /agent/v1/hello"}


def chunk_path(rack: Rack, number: int) -> str:
    sha256 = list(rack.end.chunks)[number]
    return f"/chunks/{sha256[:2]}/{sha256}"


def test_the_right_to_chunks_is_renewed_with_the_lease(rack: Rack) -> None:
    rack.end.chunk_delay_s, rack.end.lease_s = 0.3, 2.0
    assert rack.run() == 0
    used = [token for token, path in rack.end.asked if "/chunks/" in path]
    assert (used[0], used[-1]) == CHUNK_TOKENS


def test_a_dead_cache_and_a_lying_one_do_not_keep_an_agent_from_its_chunks(rack: Rack) -> None:
    liar = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)  # answers 404
    thread = threading.Thread(target=liar.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        rack.end.plan["chunk_urls"] = ["http://127.0.0.1:1/chunks", f"http://127.0.0.1:{liar.server_port}/chunks", *rack.end.plan["chunk_urls"]]
        assert rack.run() == 0
    finally:
        liar.shutdown()
        thread.join()
        liar.server_close()
    assert rack.end.reports[-1]["verified"]


@pytest.mark.parametrize("status", [401, 404])
def test_an_agent_that_can_not_have_chunks_finds_out_before_the_line(rack: Rack, status: int) -> None:
    """The bug: the chunk server was first asked past the line, so that a wrong chunks_url cost the server its OS."""
    rack.end.chunk_status = status
    assert rack.run() == 1
    assert [r["error"]["class"] for r in rack.end.reports] == ["chunks-unreachable"] and rack.untouched()
    assert "/agent/v1/cross" not in rack.end.bodies


def test_a_damaged_chunk_ends_the_run_and_the_disk_cannot_boot(rack: Rack) -> None:
    rack.end.damage = {chunk_path(rack, 7)}
    assert rack.run() == 1
    assert rack.disk.read_bytes()[:MIB] == bytes(MIB)
    assert [r["error"]["class"] for r in rack.end.reports] == ["image-damaged"] and rack.state["ended"] == "power-off"


def test_a_server_with_another_ca_is_told_nothing(rack: Rack) -> None:
    rack.ca_pem, rack.give_up_s = make_certificate().pem, 1
    assert rack.run() == 1
    assert rack.untouched() and rack.state["ended"] == "boot-local" and rack.end.asked == []


def test_a_clock_that_is_years_behind_does_not_keep_a_server_from_its_run(tmp_path: Path, image: bytes) -> None:
    with open_rack(tmp_path, image, make_certificate(days_from_now=4000)) as rack:
        assert rack.run() == 0
        assert rack.end.reports[-1]["verified"]


def test_a_rehearsal_checks_and_measures_and_stops_before_the_line(rack: Rack) -> None:
    rack.end.plan["rehearse"] = True
    assert rack.run() == 0
    assert rack.untouched()
    assert "POST /agent/v1/cross" not in rack.end.paths
    (report,) = rack.end.reports
    assert (report["verified"], report["error"], report["disk_serial"]) == (False, None, "ROOT-1")
    assert report["rehearsal"]["fetched_bytes"] > 0 and report["rehearsal"]["data_bytes"] > 0
    assert rack.state["ended"] == "power-off"


def test_what_the_agent_says_is_sent_to_its_last_line(rack: Rack) -> None:
    rack.run()
    sent = "".join(dict.fromkeys(text for _, text in rack.end.logs))
    printed = [line for line in rack.output.splitlines(keepends=True) if line.startswith("repave-agent")]
    assert sent == "".join(printed) and "hello:" in sent and "then power-off" in sent
    assert {token for token, _ in rack.end.logs} == {SESSION}


def test_lines_whose_answer_was_lost_are_sent_again_as_they_were(rack: Rack) -> None:
    rack.end.lost = {"/agent/v1/log": 1}
    assert rack.run() == 0
    batches = [text for _, text in rack.end.logs]
    assert batches[0] == batches[1] and "".join(dict.fromkeys(batches)).count("hello was answered") == 1


@pytest.mark.parametrize("status", [404, 410, 500])
def test_a_service_that_takes_no_lines_costs_the_run_nothing(rack: Rack, status: int) -> None:
    rack.end.log_status = status
    started = time.monotonic()
    assert rack.run() == 0 and rack.end.reports[-1]["verified"] and time.monotonic() - started < 15
    assert len(rack.end.logs) <= 2


def test_a_console_that_says_too_much_keeps_its_newest_lines_and_says_how_many_are_missing() -> None:
    console = Console()
    for number in range(3000):
        console.say(f"line {number} {'x' * 60}")
    batches = list(iter(console.take, ""))
    assert max(len(batch.encode()) for batch in batches) <= LOG_BYTES and sum(map(len, batches)) <= KEPT_BYTES + 100
    missing = int(batches[0].split()[0].removeprefix("["))
    assert f"line {missing} x" in batches[0] and f"line {missing - 1} x" not in "".join(batches) and "line 2999 x" in batches[-1]
