import contextlib
import functools
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from operator_site import NEW_PASSWORD, Site, start_site

from repave.images.fetch import ImageSources
from repave.images.importer import RESERVE_BYTES

MIB = 1024 * 1024


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path) as site:
        yield site


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A GPT disk made by sfdisk, with some data in it."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(6 * MIB) + os.urandom(2 * MIB) + bytes(16 * MIB))
    subprocess.run(["sfdisk", "-q", path], input=b"label: gpt\nstart=1MiB, size=4MiB, type=uefi\ntype=linux\n", check=True)
    return path


def test_a_streamed_file_becomes_an_image_and_goes_again(site: Site, disk: Path) -> None:
    sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
    with disk.open("rb") as body:
        answer = site.ask("POST", "/images?name=tiny", data=body, headers={"X-Repave-SHA256": sha256}, as_="operator")
    assert answer.status_code == 201, answer.text
    image = answer.json()
    assert (image["name"], image["size_bytes"], image["os_type"]) == ("tiny", 24 * MIB, "Linux")
    assert site.ask("GET", "/images/tiny").json()["id"] == image["id"] == site.ask("GET", "/images").json()["items"][0]["id"]
    assert not any(p.name.startswith("tmp") for p in (site.images.folder / "uploads").iterdir())
    assert site.ask("DELETE", "/images/tiny").status_code == 204
    assert site.files() == []


@pytest.mark.parametrize(
    ("query", "headers", "body", "status", "slug"),
    [
        ("name=tiny", {"X-Repave-SHA256": "0" * 64}, b"disk", 422, "image-refused"),
        ("name=tiny", {}, b"not a disk" * 1000, 422, "image-refused"),
        ("name=tiny", {}, b"", 422, "image-refused"),
        ("name=tiny", {}, bytes(65 * MIB), 507, "image-quota"),
        ("name=../x", {}, b"disk", 400, "bad-request"),
        ("name=taken", {}, b"disk", 409, "conflict"),
    ],
)
def test_a_refused_upload_leaves_nothing(site: Site, query: str, headers: dict[str, str], body: bytes, status: int, slug: str) -> None:
    site.add_image("taken")
    answer = site.ask("POST", f"/images?{query}", data=body, headers=headers)
    assert (answer.status_code, answer.json()["class"]) == (status, slug), answer.text
    assert site.files() == []
    assert [i["name"] for i in site.ask("GET", "/images").json()["items"]] == ["taken"]


def test_what_can_not_fit_is_refused_by_its_length_alone(site: Site) -> None:
    at = urlsplit(site.url)
    head = f"POST /repave/v1/images?name=big HTTP/1.1\r\nHost: x\r\nX-Auth-Token: {site.tokens['admin']}\r\nContent-Length: {65 * MIB}\r\n\r\n"
    with socket.create_connection((at.hostname or "", at.port or 0), timeout=20) as sock:
        sock.sendall(head.encode())  # and not a byte of the image
        assert b"507" in sock.recv(4096).splitlines()[0]
    assert site.files() == []


def test_a_reserve_of_the_disk_is_never_given_to_images(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.images.store, "free_bytes", lambda: RESERVE_BYTES + 5)
    assert site.images.room_bytes() == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: only root may")
def test_a_disk_that_fills_up_during_an_upload_leaves_nothing_and_gives_its_room_back(tmp_path: Path) -> None:
    (tmp_path / "site/images").mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", tmp_path / "site/images"], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        with start_site(tmp_path / "site") as site:
            # The check by length sees a large disk, as when somebody else fills it meanwhile.
            site.images.store.free_bytes = lambda: 1 << 40
            before = os.statvfs(tmp_path / "site/images").f_bfree
            answer = site.ask("POST", "/images?name=big", data=os.urandom(24 * MIB))
            assert (answer.status_code, answer.json()["class"]) == (507, "image-quota"), answer.text
            assert site.files() == [] and site.ask("GET", "/images").json()["items"] == []
            assert abs(os.statvfs(tmp_path / "site/images").f_bfree - before) < 16  # but for folders
    finally:
        subprocess.run(["umount", "-l", tmp_path / "site/images"], check=True)


@contextlib.contextmanager
def half_an_upload(site: Site) -> Iterator[None]:
    """3 of 8 MiB are sent; then the connection is closed."""
    at = urlsplit(site.url)
    head = f"POST /repave/v1/images?name=half HTTP/1.1\r\nHost: x\r\nX-Auth-Token: {site.tokens['admin']}\r\nContent-Length: {8 * MIB}\r\n\r\n"
    with socket.create_connection((at.hostname or "", at.port or 0)) as sock:
        sock.sendall(head.encode() + bytes(3 * MIB))
        yield


def test_an_upload_broken_half_way_leaves_nothing(site: Site) -> None:
    with half_an_upload(site):
        deadline = time.monotonic() + 10
        while not site.files() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(site.files()) == 1
    deadline = time.monotonic() + 10
    while site.files() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert site.files() == []
    assert site.ask("GET", "/images").json()["items"] == []


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Site]:
    """A site whose folder of images to import is `tmp_path`/shelf, and that may fetch from this machine."""
    (tmp_path / "shelf").mkdir()
    with start_site(tmp_path / "site", sources=ImageSources(tmp_path / "shelf", None, True)) as site:
        yield site


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def order(site: Site, name: str, as_: str = "operator", **source: str) -> requests.Response:
    return site.ask("POST", f"/images?name={name}", json={"source": source}, as_=as_)


def test_a_file_of_the_services_machine_and_one_from_a_url_are_the_image_that_an_upload_is(open_site: Site, disk: Path, tmp_path: Path, web: str) -> None:
    shutil.copy(disk, tmp_path / "shelf" / "tiny.raw")
    sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
    answers = [
        open_site.ask("POST", "/images?name=sent", data=disk.read_bytes()),
        order(open_site, "shelf", path="tiny.raw"),
        order(open_site, "summed", path="tiny.raw", sha256=sha256),
        order(open_site, "web", url=f"{web}/disk.raw", sha256=sha256),
    ]
    assert [a.status_code for a in answers] == [201] * 4, [a.text for a in answers]
    assert len({a.json()["manifest_sha256"] for a in answers}) == 1
    assert open_site.ask("GET", "/imports").json()["items"] == []
    assert not any((open_site.images.folder / "uploads").iterdir())


@pytest.mark.parametrize(
    ("source", "status", "slug"),
    [
        ({}, 400, "bad-request"),
        ({"path": "tiny.raw", "url": "http://x/"}, 400, "bad-request"),
        ({"url": "http://x/disk.raw"}, 400, "bad-request"),
        ({"path": "tiny.raw", "other": "x"}, 400, "bad-request"),
        ({"path": "../disk.raw"}, 422, "image-refused"),
        ({"path": "/etc/passwd"}, 422, "image-refused"),
        ({"path": "link"}, 422, "image-refused"),
        ({"path": "none"}, 422, "image-refused"),
        ({"path": "tiny.raw", "sha256": "0" * 64}, 422, "image-refused"),
        ({"url": "{web}/disk.raw", "sha256": "0" * 64}, 422, "image-refused"),
        ({"url": "{web}/none", "sha256": "0" * 64}, 422, "image-refused"),
        ({"url": "{web}/disk.raw", "signature_url": "{web}/sig"}, 403, "not-allowed"),
    ],
)
def test_a_refused_source_leaves_nothing(open_site: Site, disk: Path, tmp_path: Path, web: str, source: dict[str, str], status: int, slug: str) -> None:
    shutil.copy(disk, tmp_path / "shelf" / "tiny.raw")
    (tmp_path / "shelf" / "link").symlink_to(disk)
    answer = order(open_site, "x", **{k: v.replace("{web}", web) for k, v in source.items()})
    assert (answer.status_code, answer.json()["class"]) == (status, slug), answer.text
    assert open_site.files() == [] and open_site.ask("GET", "/images").json()["items"] == []
    assert str(tmp_path) not in answer.text


def test_without_a_setting_no_file_of_the_machine_and_nothing_on_it_is_imported(site: Site, web: str) -> None:
    assert order(site, "x", path="tiny.raw").status_code == 403
    local = order(site, "x", url=f"{web}/disk.raw", sha256="0" * 64)
    assert local.status_code == 422 and "import_local_addresses" in local.text
    assert order(site, "x", as_="viewer", path="tiny.raw").status_code == 403


def test_an_import_ends_with_the_service_and_leaves_nothing(open_site: Site, disk: Path, tmp_path: Path) -> None:
    """The bug: a fetch that had begun kept a service that was told to end, for up to six hours."""
    went_on, data = threading.Event(), disk.read_bytes()

    class Slow(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:MIB])
            went_on.wait(20)
            self.wfile.write(data[MIB : 2 * MIB])

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server, ThreadPoolExecutor(1) as pool:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        asked = pool.submit(order, open_site, "slow", url=f"http://127.0.0.1:{server.server_port}/x", sha256="0" * 64)
        deadline = time.monotonic() + 10
        while not (found := open_site.ask("GET", "/imports").json()["items"]) or found[0]["done_bytes"] < MIB // 2:
            assert time.monotonic() < deadline
        open_site.images.over.set()
        went_on.set()
        assert "ending" in asked.result(10).text
        server.shutdown()
    assert not any((open_site.images.folder / "uploads").iterdir())


def test_a_file_that_becomes_another_one_after_its_digest_was_compared_is_no_image(open_site: Site, disk: Path, tmp_path: Path) -> None:
    file = tmp_path / "shelf" / "tiny.raw"
    shutil.copy(disk, file)
    sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
    with ThreadPoolExecutor(1) as pool:
        with open_site.images.store.catalogue_lock():  # another worker imports, so ours waits with its digest compared
            asked = pool.submit(order, open_site, "late", path="tiny.raw", sha256=sha256)
            wait_for_stage(open_site, "wait")
            file.write_bytes(disk.read_bytes()[:-MIB] + os.urandom(MIB))
        answer = asked.result(20)
    assert (answer.status_code, answer.json()["class"]) == (422, "image-refused") and "changed while it was read" in answer.text
    assert open_site.files() == []


def wait_for_stage(site: Site, stage: str) -> None:
    deadline = time.monotonic() + 10
    while [i["stage"] for i in site.ask("GET", "/imports").json()["items"]] != [stage]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_import_that_waits_for_another_workers_ends_where_the_service_ends(open_site: Site, disk: Path) -> None:
    images = open_site.images
    try:
        with ThreadPoolExecutor(1) as pool, images.store.catalogue_lock():
            asked = pool.submit(open_site.ask, "POST", "/images?name=late", data=disk.read_bytes())
            wait_for_stage(open_site, "wait")
            images.over.set()
            assert "ending" in asked.result(10).text
    finally:
        images.over.clear()
    assert open_site.files() == [] and not any((images.folder / "uploads").iterdir())


def test_how_far_an_import_is_can_be_asked_while_it_goes_on(site: Site) -> None:
    with half_an_upload(site):
        deadline = time.monotonic() + 10
        while not (found := site.ask("GET", "/imports").json()["items"]) or found[0]["done_bytes"] < 2 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (found[0]["name"], found[0]["stage"], found[0]["total_bytes"]) == ("half", "receive", 8 * MIB)
        assert site.ask("GET", "/imports", as_="other").json()["items"] == []
    while site.ask("GET", "/imports").json()["items"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def changed(disk: Path, path: Path, at: int) -> Path:
    """The same disk with one window of other data."""
    shutil.copy(disk, path)
    with path.open("r+b") as f:
        f.seek(at)
        f.write(os.urandom(MIB))
    return path


def test_what_a_live_run_needs_is_never_collected_whatever_else_is_imported_removed_or_dies(site: Site, disk: Path, tmp_path: Path) -> None:
    site.images.quota_bytes = 1 << 30
    needed = site.ask("POST", "/images?name=needed", data=disk.read_bytes()).json()
    site.add_server("web01", root_disk="serial=S1")
    run = site.ask("POST", "/reinstall", json={"servers": ["web01"], "image": "needed", "password": NEW_PASSWORD})
    assert run.status_code == 202, run.text
    store = site.images.store
    manifest = store.read_manifest(needed["manifest_sha256"])

    assert site.ask("DELETE", "/images/needed").status_code == 409
    # An import that died after its manifest was written and before its row was, and one that died half-way.
    orphan = site.images.add(
        changed(disk, tmp_path / "orphan", 9 * MIB), name="orphan", os_type="Linux", arch="amd64", project_id=site.project.id, image_id="x",
        created_at=datetime.now(UTC), progress=lambda done, total: None,
    )  # fmt: skip
    (store.tmp / "half").write_bytes(b"half a chunk")
    others = [changed(disk, tmp_path / f"other{n}", (5 + n) * MIB).read_bytes() for n in range(3)]

    def come_and_go(n: int) -> None:
        for _ in range(3):
            assert site.ask("POST", f"/images?name=other{n}", data=others[n]).status_code == 201
            store.verify(store.read_manifest(site.ask("GET", f"/images/other{n}").json()["manifest_sha256"]), deep=True)
            store.verify(manifest, deep=True)
            assert site.ask("DELETE", f"/images/other{n}").status_code == 204

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come_and_go, range(3)))
    store.verify(manifest, deep=True)
    assert orphan.manifest_sha256 not in store.list_manifests()
    chunks = {c.sha256 for c in manifest.chunks}
    assert set(site.files()) == chunks | {f"{needed['manifest_sha256']}.json"}, "and nothing that is not needed takes room"


def test_an_image_whose_row_is_not_there_yet_is_not_collected_by_another_worker(site: Site, disk: Path) -> None:
    other = site.ask("POST", "/images?name=other", data=disk.read_bytes()).json()
    release, held = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # another worker, between the manifest and its row
        with site.images.store.catalogue_lock():
            os.write(held[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    with ThreadPoolExecutor(1) as pool:
        removed = pool.submit(site.ask, "DELETE", "/images/other")
        time.sleep(0.3)
        assert not removed.done() and other["manifest_sha256"] in site.images.store.list_manifests()
        os.write(release[1], b"x")
        assert removed.result().status_code == 204
    os.waitpid(child, 0)
    assert site.files() == []
