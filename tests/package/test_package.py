"""Repave outside its tree: the wheel in an empty environment, and the Debian package on a copy of this machine that nobody else sees.

The copy is an overlay over / in memory, in mount and network namespaces of its own; this machine is not touched. It needs root, as dpkg does.
`make package-test` runs it; a slice without building the package is tests/unit/test_packaging.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repave.lab import scripted_os
from repave.lab.processes import find_free_ports

TREE = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside.sh"
_FAR = pytest.mark.skipif(os.geteuid() != 0, reason="dpkg needs root")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with wheel and package."""
    folder = tmp_path_factory.mktemp("dist")
    build(folder)
    return folder


def build(folder: Path) -> None:
    done = subprocess.run([TREE / "tools/build-deb", folder], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable, "DEB_LEVEL": "3"})
    assert done.returncode == 0, done.stderr


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_tree_gives_the_same_bytes(built, tmp_path):
    build(tmp_path)
    assert digests(tmp_path) == digests(built) and len(digests(built)) == 2


def test_the_wheel_serves_in_an_empty_environment(built, tmp_path):
    subprocess.run(["/usr/bin/python3", "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--require-hashes", "-r", TREE / "requirements-service.txt"], check=True, capture_output=True)
    subprocess.run([*pip, "--no-deps", *built.glob("*.whl")], check=True, capture_output=True)
    repave, site = tmp_path / "venv/bin/repave", tmp_path / "site"
    api, provisioning, media, chunks = find_free_ports(4)
    env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path), "REPAVE_SITE": str(site)}
    listen = {"PROVISIONING": provisioning, "MEDIA": media, "CHUNKS": chunks}
    serving = env | {f"REPAVE_{name}_LISTEN": f"127.0.0.1:{port}" for name, port in listen.items()}
    subprocess.run([repave, "init", "--api-listen", f"127.0.0.1:{api}"], env=env, cwd=tmp_path, check=True, capture_output=True)
    scripted_os.build_disc(site / "repave-data/boot.iso")  # what builds the real one is in the wheel; the packages it is made of are far
    service = subprocess.Popen([repave, "serve"], env=serving, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: subprocess.run([repave, "health"], env=env, cwd=tmp_path, capture_output=True).returncode == 0)
        assert "site_admin" in subprocess.run([repave, "whoami", "--json"], env=env, cwd=tmp_path, capture_output=True, text=True).stdout
        rack = subprocess.run([repave, "rack", "up"], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert rack.returncode == 2 and "source tree" in rack.stderr
    finally:
        service.send_signal(signal.SIGTERM)
        said = service.communicate(timeout=30)[1]
    assert service.returncode == 0, said


@_FAR
def test_the_package_is_installed_serves_and_is_purged(built, tmp_path):
    """Prints what systemd thinks of the unit, too."""
    (package,) = built.glob("*.deb")
    disc = scripted_os.build_disc(tmp_path / "boot.iso")
    done = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "bash", INSIDE, package, disc], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = [line.removeprefix("fact: ") for line in done.stdout.splitlines() if line.startswith("fact: ")]
    assert facts == ["installed", "not started without settings", "served", "settings are read-only for it", "stopped", "verified", "removed", "purged"]
    exposure = next(line for line in done.stdout.splitlines() if "Overall exposure level" in line)
    assert float(exposure.split(":")[1].split()[0]) < 2.5
    assert not Path("/opt/repave").exists() and shutil.which("systemd-analyze")


def wait_for(question, deadline_s: float = 60) -> None:
    deadline = time.monotonic() + deadline_s
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.2)
