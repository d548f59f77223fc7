"""`repave-agent write` as a user runs it, from web servers that misbehave: never a success that is not, no partition table before all is verified."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_images import MIB, make_disk, old_disk

from repave.images.importer import import_image
from repave.images.manifest import Manifest
from repave.images.store import ImageStore

IMAGE_BYTES, DISK_BYTES = 40 * MIB, 48 * MIB
WRITE = [sys.executable, "-c", "from repave.agent.cli import main; main()", "write"]
Answer = Callable[["Handler", bytes], None]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin  # type: ignore[assignment]

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        self.server.asked.append(path.name)
        body = path.read_bytes()
        answer = self.server.answers.get(path.name)
        if answer is None:
            self.send_body(body)
        else:
            answer(self, body)

    def send_body(self, body: bytes, *, said: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if said is None else said))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Origin(http.server.ThreadingHTTPServer):
    """The folder of `repave image pack`, at a web server. `answers`: what it does instead, by chunk."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.answers, self.asked = root, dict[str, Answer](), list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Manifest, bytes]:
    folder = tmp_path_factory.mktemp("packed")
    image = make_disk(folder / "image", IMAGE_BYTES, seed=11)
    store = ImageStore(folder / "pack")
    made = import_image(image, store, max_bytes=1 << 30)
    return folder / "pack", made.manifest_sha256, store.read_manifest(made.manifest_sha256), image.read_bytes()


@pytest.fixture
def origin(packed: tuple[Path, str, Manifest, bytes]) -> Iterator[Origin]:
    with Origin(packed[0]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def write(origin: Origin, sha256: str, disk: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the last line of stdout."""
    command = [*WRITE, f"{origin.url}/manifests/{sha256}.json", str(disk), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def a_chunk(manifest: Manifest) -> str:
    """With data, and late: others are on the disk when it is asked for."""
    return [c for c in manifest.chunks if c.extents][-2].sha256


def test_an_image_becomes_a_file_that_was_not_there_and_the_second_time_only_the_manifest_is_fetched(origin, packed, tmp_path: Path) -> None:
    _, sha256, manifest, image = packed
    code, said = write(origin, sha256, tmp_path / "disk")
    assert code == 0 and (tmp_path / "disk").read_bytes() == image
    assert said["bytes_fetched"] == sum(c.compressed_bytes for c in manifest.chunks if c.extents)
    assert said["bytes_written"] <= 1.01 * manifest.data_bytes + 4 * MIB and said["manifest_pinned"] is True
    assert said["peak_rss_bytes"] < 80e6
    origin.asked.clear()
    code, said = write(origin, sha256, tmp_path / "disk", "--resume")
    assert code == 0 and said["verified"] == "all" and said["bytes_written"] == 0
    assert origin.asked == [f"{sha256}.json"]


def cut(handler: Handler, body: bytes) -> None:
    handler.send_body(body[: len(body) // 2])


def without_length(handler: Handler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def flipped(handler: Handler, body: bytes) -> None:
    middle = len(body) // 2
    handler.send_body(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])


def missing(handler: Handler, body: bytes) -> None:
    handler.send_error(404)


def another_chunk(handler: Handler, body: bytes) -> None:
    other = next(p for p in sorted((handler.server.root / "chunks").glob("*/*")) if p.name != handler.path.rpartition("/")[2])
    handler.send_body(other.read_bytes())


@pytest.mark.parametrize("fault", [cut, without_length, flipped, missing, another_chunk])
def test_what_can_not_get_better_ends_within_seconds_and_the_disk_can_not_boot(origin, packed, tmp_path: Path, fault: Answer) -> None:
    _, sha256, manifest, image = packed
    disk, began = old_disk(tmp_path / "disk", DISK_BYTES), time.monotonic()
    chunk = a_chunk(manifest)
    origin.answers[chunk] = fault
    code, said = write(origin, sha256, disk)
    assert code == 1 and said["error"]["class"] == "image-damaged"
    assert not any(disk.read_bytes()[:MIB]), "no partition table"
    assert origin.asked.count(chunk) <= 3
    assert time.monotonic() - began < 10  # 0.5 s on a quiet machine
    origin.answers.clear()
    before = disk.read_bytes()  # there may be none of the image in it: the bad chunk may come first
    code, said = write(origin, sha256, disk, "--resume")
    assert code == 0 and disk.read_bytes()[:IMAGE_BYTES] == image
    windows = [slice(n * manifest.window_bytes, (n + 1) * manifest.window_bytes) for n in range(len(manifest.chunks))]
    missing = [c for c, window in zip(manifest.chunks, windows, strict=True) if c.extents and before[window] != image[window]]
    assert said["bytes_fetched"] == sum(c.compressed_bytes for c in missing)


def test_a_connection_that_drops_and_an_origin_that_is_away_for_a_while_cost_a_chunk_again_and_no_more(origin, packed, tmp_path: Path) -> None:
    _, sha256, manifest, image = packed
    chunk, dropped = a_chunk(manifest), list[float]()

    def drop(handler: Handler, body: bytes) -> None:
        if dropped and time.monotonic() - dropped[0] > 3:
            handler.send_body(body)
            return
        dropped.append(time.monotonic())
        handler.send_body(body[: len(body) // 2], said=len(body))
        handler.connection.shutdown(socket.SHUT_RDWR)

    origin.answers[chunk] = drop
    code, said = write(origin, sha256, tmp_path / "disk")
    assert code == 0 and (tmp_path / "disk").read_bytes() == image and len(dropped) >= 2
    assert said["bytes_fetched"] == sum(c.compressed_bytes for c in manifest.chunks if c.extents)


def test_an_origin_that_stays_away_ends_the_write(origin, packed, tmp_path: Path) -> None:
    _, sha256, manifest, _ = packed
    origin.answers[a_chunk(manifest)] = lambda handler, body: handler.connection.shutdown(socket.SHUT_RDWR)
    code, said = write(origin, sha256, tmp_path / "disk", "--give-up-s", "2")
    assert code == 1 and "can not be had" in said["error"]["cause"]


def test_a_write_killed_half_way_leaves_no_partition_table_and_goes_on_with_what_is_there(origin, packed, tmp_path: Path) -> None:
    _, sha256, manifest, image = packed
    disk, held = old_disk(tmp_path / "disk", DISK_BYTES), threading.Event()
    last = [c for c in manifest.chunks if c.extents][-1].sha256

    def hold(handler: Handler, body: bytes) -> None:
        held.set()
        time.sleep(20)

    origin.answers[last] = hold
    process = subprocess.Popen([*WRITE, f"{origin.url}/manifests/{sha256}.json", disk], stderr=subprocess.DEVNULL)
    assert held.wait(20)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not any(disk.read_bytes()[:MIB])
    origin.answers.clear()
    code, said = write(origin, sha256, disk, "--resume", "--verify", "full")
    assert code == 0 and disk.read_bytes()[:IMAGE_BYTES] == image
    assert said["bytes_kept"] > manifest.data_bytes // 4


def test_a_manifest_that_is_not_what_its_name_says_is_refused(origin, packed, tmp_path: Path) -> None:
    _, sha256, _, _ = packed
    origin.answers[f"{sha256}.json"] = lambda handler, body: handler.send_body(body.replace(b'"amd64"', b'"arm64"'))
    code, said = write(origin, sha256, tmp_path / "disk")
    assert code == 1 and "another digest" in said["error"]["cause"] and not (tmp_path / "disk").exists()


def test_a_disk_that_is_too_small_and_what_is_no_disk_are_refused_untouched(origin, packed, tmp_path: Path) -> None:
    _, sha256, _, _ = packed
    disk = old_disk(tmp_path / "disk", 32 * MIB)
    old = disk.read_bytes()
    assert write(origin, sha256, disk)[1]["error"]["class"] == "disk-too-small" and disk.read_bytes() == old
    assert write(origin, sha256, Path("/dev/null"))[1]["error"]["class"] == "disk-changed"
