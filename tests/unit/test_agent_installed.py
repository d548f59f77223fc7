"""`repave-agent` is installed beside `repave`: on a machine that is no ramdisk it must refuse, whatever it is given."""

import subprocess
import sys
from pathlib import Path

import pytest

from repave.agent.machine import is_ramdisk


@pytest.mark.parametrize("slot", [None, "{}"])
def test_the_agent_refuses_to_run_on_an_installed_system(tmp_path: Path, slot: str | None) -> None:
    """The bug: a slot that could not be read made it reboot the machine. PATH is empty, so that no `reboot` would be found."""
    file = tmp_path / "slot.json"
    if slot:
        file.write_text(slot)
    argv = [sys.executable, "-m", "repave.agent.cli", "run", "--slot", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, env={"PATH": str(tmp_path)}, timeout=30)
    assert done.returncode == 2 and "not Repave's ramdisk" in done.stderr and "nothing was touched" in done.stderr
    assert done.stdout == ""


def test_what_the_ramdisk_starts_refuses_on_an_installed_system_too(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "from repave.agent.main import run_in_ramdisk; run_in_ramdisk()"]
    done = subprocess.run(argv, capture_output=True, text=True, env={"PATH": str(tmp_path)}, timeout=30)
    assert done.returncode == 1 and "nothing was touched" in done.stderr and done.stdout == ""


def test_a_ramdisk_is_told_by_its_root_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    for text, found in (("rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n", True), ("rootfs / rootfs rw 0 0\n/dev/vda2 / ext4 rw 0 0\n", False), ("", False)):
        mounts.write_text(text)
        assert is_ramdisk(mounts) is found
    assert not is_ramdisk(tmp_path / "none")
