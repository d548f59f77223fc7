"""`repave bmc` as a user runs it, against OpenStack's emulator and against a BMC that takes no writes."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from redfish_fake import FakeBmc, refusal, small_bmc, start_bmc

ENV = {"REPAVE_BMC_USERNAME": "admin", "REPAVE_BMC_PASSWORD": "secret", "PATH": os.environ["PATH"]}
ISO = "http://10.9.8.7:8472/boot.iso"


def repave_bmc(*words: str, status: int = 0, **env: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "repave.cli.bmc", *words, "--json"], env=ENV | env, capture_output=True, text=True, timeout=95, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def start_emulator(folder: Path) -> Iterator[str]:
    """sushy-emulator with its fake driver (one system, off, no libvirt)."""
    port = free_port()
    (folder / "emulator.conf").write_text(f"SUSHY_EMULATOR_FAKE_DRIVER = True\nSUSHY_EMULATOR_STATE_DIR = {str(folder)!r}\n")
    program = Path(sys.executable).with_name("sushy-emulator")
    with (folder / "emulator.log").open("w") as log:
        process = subprocess.Popen(
            [program, "--config", folder / "emulator.conf", "-i", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(folder)},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(100):
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{url}/redfish/v1/", timeout=5)
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def iso_url(tmp_path: Path) -> Iterator[str]:
    """A web server with an image: the emulator fetches it."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "boot.iso").write_bytes(b"\0" * 4096)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "media"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/boot.iso"
    server.shutdown()
    server.server_close()


def test_boot_media_eject_and_power_work_on_the_emulator_and_may_be_repeated(tmp_path: Path, iso_url: str) -> None:
    with start_emulator(tmp_path) as url:
        found = repave_bmc("probe", url)
        assert found["system"]["manufacturer"] == "Sushy Emulator" and found["power"] == "off"
        assert found["virtual_media"] and "Cd" in found["boot_targets"]
        assert repave_bmc("boot-media", url, iso_url)["media"] == iso_url
        system = requests.get(url + found["system"]["uri"], timeout=5).json()
        slot = requests.get(url + found["virtual_media"][0], timeout=5).json()
        assert (system["PowerState"], system["Boot"]["BootSourceOverrideTarget"]) == ("On", "Cd")
        assert (slot["Inserted"], slot["Image"]) == (True, iso_url)
        for _ in range(2):
            assert repave_bmc("eject", url)["result"] == "ok"
            assert repave_bmc("power", "off", url) | {"forced": None} == {"result": "ok", "power": "off", "forced": None}
        assert requests.get(url + found["system"]["uri"], timeout=5).json()["PowerState"] == "Off"
        assert not requests.get(url + found["virtual_media"][0], timeout=5).json()["Inserted"]


def test_what_can_be_known_to_fail_leaves_the_machine_running() -> None:
    resources = small_bmc()
    resources["/redfish/v1/systems/1/virtualmedia/cd"]["MediaTypes"] = ["USBStick"]
    with start_bmc(FakeBmc("small", resources=resources)) as fake:
        error = repave_bmc("boot-media", fake.url, ISO, status=10)["error"]
        assert (error["class"], error["step"]) == ("no_virtual_media", "probe")
        assert {s.method for s in fake.seen} == {"GET"}


def test_media_that_are_refused_after_power_off_leave_the_machine_off() -> None:
    with start_bmc(FakeBmc("small", resources=small_bmc())) as fake:
        fake.rule("POST", "VirtualMedia.InsertMedia", lambda handler, apply: (500, refusal("IDRAC.2.8.SYS446", "Unable to fetch the image.")))
        error = repave_bmc("boot-media", fake.url, ISO, status=10)["error"]
        assert (error["class"], error["step"]) == ("media_rejected", "insert-media")
        assert [b["ResetType"] for b in fake.sent("POST", "ComputerSystem.Reset")] == ["ForceOff"]


def test_a_refused_login_is_said_once_and_sent_at_most_three_times() -> None:
    with start_bmc(FakeBmc("small", resources=small_bmc())) as fake:
        fake.rule("GET", "/Systems", lambda handler, apply: (401, None))
        assert repave_bmc("boot-media", fake.url, ISO, status=10)["error"]["class"] == "auth"
        assert len([s for s in fake.seen if s.login]) <= 3


def test_nobody_there_is_unreachable_and_a_missing_ca_is_tls() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert repave_bmc("probe", url, status=10)["error"]["class"] == "unreachable"
    assert repave_bmc("probe", url, status=10, REPAVE_BMC_TLS_VERIFY="/no/such/ca.pem")["error"]["class"] == "tls"


@pytest.mark.parametrize(
    ("url", "said"), [("ftp://example.net", "must be http://HOST"), ("http://127.0.0.1:99999", "port"), ("http://[::1", "HOST"), ("http://", "HOST")]
)
def test_an_address_that_is_none_is_said_to_be_one(url: str, said: str) -> None:
    error = repave_bmc("probe", url, status=10)["error"]
    assert error["class"] == "not_redfish" and said in error["message"]


@pytest.mark.parametrize("iso_url", ["foo", "htp://10.9.8.7/boot.iso", "/srv/boot.iso", "http://10.9.8.7:84722/boot.iso"])
def test_an_image_that_is_no_url_is_refused_before_the_machine_is_touched(iso_url: str) -> None:
    with start_bmc(FakeBmc("small", resources=small_bmc())) as fake:
        error = repave_bmc("boot-media", fake.url, ISO, iso_url, status=10)["error"]
        assert (error["class"], error["step"]) == ("media_protocol", "probe") and "ISO URL 2" in error["message"]
        assert not fake.seen
