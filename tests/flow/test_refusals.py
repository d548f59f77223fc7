"""What can not fit is refused with its own code: before any power action where it can be known, else before the line; nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import requests

from repave.agent.protocol import ASK_HEADER
from repave.lab import scripted_os
from repave.lab.service import import_image

NAME = "lab05"
MIB = 1 << 20


@pytest.fixture(scope="module")
def seen(lab):
    """lab05 has been in the ramdisk, so that its disk is known; the images that will not fit are in the store."""
    assert reinstall(lab, "tiny-1")["state"] == "running"
    import_image(lab.client, build_4k_image(lab.folder / "four-k.raw"), name="four-k")
    large = scripted_os.build_image(lab.folder / "large.raw", "large")
    os.truncate(large, 600 * MIB)  # the disk has 512
    subprocess.run(["/sbin/sfdisk", "-q", "--relocate", "gpt-bak-std", large], check=True)
    import_image(lab.client, large, name="large")


def build_4k_image(path: Path) -> Path:
    """A GPT for sectors of 4096 bytes. Debian 12's sfdisk knows no other than 512; fdisk does."""
    with path.open("wb") as out:
        out.truncate(16 * MIB)
    answers = "\n".join(["g", "n", "1", "256", "+8M", "t", "uefi", "w", ""])
    subprocess.run(["/sbin/fdisk", "--sector-size=4096", path], input=answers, capture_output=True, text=True, check=True)
    assert path.read_bytes()[4096:4104] == b"EFI PART"
    return path


def reinstall(lab, image: str) -> dict:
    """One reinstall of lab05 to its end; its run."""
    lab.reinstall([NAME], image)
    batch = lab.newest_batch()
    return lab.wait_for_end(batch)[NAME]


def run_cli(lab, *argv: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"REPAVE_ENDPOINT": lab.values["endpoint"], "REPAVE_TOKEN": lab.values["token"]}
    return subprocess.run([sys.executable, "-m", "repave.cli.main", *argv], capture_output=True, text=True, env=env, timeout=60)


def assert_refused_untouched(lab, image: str, code: str) -> None:
    """In preflight: the machine was not even asked to shut down."""
    before = (lab.console(NAME), lab.disk_digest(NAME))
    planned = run_cli(lab, "reinstall", NAME, "--image", image, "--plan-only")
    assert planned.returncode == 3 and code in planned.stdout, planned.stdout + planned.stderr
    run = reinstall(lab, image)
    assert (run["step"], run["error"]["code"], run["past_the_line"]) == ("preflight", code, False)
    assert (lab.console(NAME), lab.disk_digest(NAME)) == before
    status = lab.status(NAME)
    assert (status["state"], status["operation_state"], status["error"]["error_code"]) == ("running", "reinstall-failed", code)
    assert lab.bmc(NAME)["power"] == "On"


def test_an_image_for_other_sectors_is_refused_before_any_power_action_and_says_its_sectors(lab, seen):
    shown = run_cli(lab, "image", "ls").stdout
    assert [line.split()[4] for line in shown.splitlines() if line.startswith(("four-k", "tiny-1"))] == ["4096", "512"]
    assert json.loads(run_cli(lab, "image", "show", "four-k", "--json").stdout)["sector_bytes"] == 4096
    assert_refused_untouched(lab, "four-k", "Repave.3105")


def test_an_image_larger_than_the_disk_is_refused_before_any_power_action(lab, seen):
    assert_refused_untouched(lab, "large", "Repave.3104")


def test_an_image_for_another_architecture_or_for_bios_alone_is_refused_before_any_power_action(lab, seen):
    """The bug: each was taken for amd64 and UEFI, and written."""
    bios = scripted_os.build_image(lab.folder / "bios.raw", "bios")
    subprocess.run(["/sbin/sfdisk", "-q", "--part-type", bios, "1", "linux"], check=True)
    for name, path, options, shown in (("bios", bios, (), "amd64/bios"), ("arm", lab.folder / "tiny-2.raw", ("--arch", "arm64"), "arm64/uefi")):
        imported = run_cli(lab, "image", "import", str(path), "--name", name, *options)
        assert imported.returncode == 0 and shown in imported.stdout + imported.stderr, imported
        assert_refused_untouched(lab, name, "Repave.3106")


def test_an_image_of_another_architecture_is_refused_before_any_power_action(lab, seen):
    lab.client.patch(f"/servers/{NAME}", {"arch": "arm64"})
    try:
        assert_refused_untouched(lab, "tiny-2", "Repave.3106")
    finally:
        lab.client.patch(f"/servers/{NAME}", {"arch": "amd64"})


def test_other_sectors_that_only_the_ramdisk_sees_are_refused_before_the_line_and_the_old_os_runs_again(lab, seen):
    before = lab.disk_digest(NAME)
    lab.set_faults(**{NAME: "4k-sectors"})
    run = reinstall(lab, "tiny-2")
    assert (run["step"], run["error"]["code"], run["past_the_line"]) == ("boot-ramdisk", "Repave.3105", False)
    assert lab.disk_digest(NAME) == before
    assert lab.bmc(NAME) == {"power": "On", "boot": "Hdd", "media": ""}
    assert lab.console(NAME).rstrip().splitlines()[-1].startswith("boot: disk")
    lab.set_faults()
    # Now the disk is known as one of 4096 bytes. Another disk in its place is found by a rule that does not name the old one.
    assert_refused_untouched(lab, "tiny-2", "Repave.3105")
    lab.client.patch(f"/servers/{NAME}", {"root_disk": "hctl=0:0:0:0"})
    assert reinstall(lab, "tiny-2")["state"] == "running"
    lab.client.patch(f"/servers/{NAME}", {"root_disk": f"serial={lab.machines[NAME].root_serial}"})


def test_the_agents_listener_names_the_request_in_its_refusals_too(lab):
    """Or an agent that is told to stop would take it for no answer, and write on until its lease is over."""
    listen = tomllib.loads((lab.folder / "site/repave.toml").read_text())["provisioning_listen"]
    with requests.Session() as session:
        session.trust_env, session.verify = False, str(lab.folder / "site/secret/ca.pem")
        for n, (method, path, body, status) in enumerate((
            ("POST", "/agent/v1/hello", b"{}", 401), ("POST", "/agent/v1/progress", b"no json", 400), ("GET", "/agent/v1/plan", None, 401),
            ("GET", "/agent/v1/nothing", None, 404), ("GET", "/agent/v1/hello", None, 405), ("GET", "/agent/v1/manifest", None, 401),
        )):  # fmt: skip
            asked = {ASK_HEADER: f"ask-{n}", "Content-Type": "application/json", "Authorization": "Bearer unknown"}
            answer = session.request(method, f"https://{listen}{path}", data=body, headers=asked, timeout=30)
            assert (answer.status_code, answer.headers.get(ASK_HEADER)) == (status, f"ask-{n}"), path
