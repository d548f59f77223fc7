"""What is packaged: everything of the tree, locked to what the tests run with, in a unit that may do little. The package itself: tests/package."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

TREE = Path(__file__).parents[2]


def test_the_wheel_has_every_file_of_the_package(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=TREE, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("repave/")}
    here = {str(p.relative_to(TREE / "src")) for p in (TREE / "src/repave").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert packed == here
    assert {"repave/ramdisk/init", "repave/ramdisk/grub.cfg", "repave/home_call.ps1", "repave/store/migrations/versions/r0001_first_tables.py"} <= packed


def test_the_service_is_locked_to_what_the_tests_run_with():
    def pins(name: str) -> dict[str, str]:
        text = (TREE / name).read_text().replace("\\\n", " ")
        return {line.split()[0]: line.partition("    # via")[0] for line in text.splitlines() if re.match(r"[a-z0-9-]+(\[\w+\])?==", line)}

    service, everything = pins("requirements-service.txt"), pins("requirements.txt")
    assert len(service) > 30 and not {p for p in service if p.startswith(("pytest", "sushy-tools", "hypothesis"))}
    assert {name: set(line.split()) for name, line in service.items()} == {name: set(everything[name].split()) for name in service}


def test_the_unit_may_do_little():
    unit = TREE / "tools/deb/repave.service"
    said = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", unit], capture_output=True, text=True, check=True).stdout
    assert float(re.search(r"Overall exposure level for repave.service: ([\d.]+)", said)[1]) < 2.5
    assert "User=repave\n" in unit.read_text() and "StateDirectory=repave\n" in unit.read_text()
