"""What `make run` does when something comes between: an earlier batch that ends badly, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from repave.cli.client import Client
from repave.lab.demo import follow_unfinished, render_next
from repave.lab.phases import PhaseFailed, phase
from repave.lab.rack import digest_disk


def test_an_earlier_batch_that_ends_badly_is_told_and_does_not_stop_a_new_one(lab, capsys):
    lab.set_faults(lab01="no-hello")
    lab.reinstall(["lab01"], "tiny-1")
    batch = lab.newest_batch()
    lab.wait_for_event(batch, "run.step", step="boot-ramdisk")
    cancel = threading.Timer(1, lambda: Client(None, lab.client.endpoint).post(f"/batches/{batch}/cancel", {}))
    cancel.start()
    follow_unfinished(lab.client)
    cancel.join()
    assert "ended badly (lab01: Repave.1010" in capsys.readouterr().out
    assert lab.runs(batch)["lab01"]["state"] == "cancelled"


def test_ctrl_c_while_it_is_under_way_leaves_nothing_and_ends_with_130(tmp_path):
    waits_here = tmp_path / ".repave/lab.json"  # nobody has written what it is about to read
    waits_here.parent.mkdir()
    os.mkfifo(waits_here)
    demo = subprocess.Popen([sys.executable, "-m", "repave.lab.demo"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with waits_here.open("w"):  # opens when the reader is there
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=120)
    assert (demo.returncode, said.splitlines()[-1]) == (130, "stopping")
    assert not waits_here.exists()


def run_repave(lab, folder, *argv):
    """`repave` in a folder whose rack is the tests' own."""
    if not (folder / ".repave").exists():
        (folder / ".repave").symlink_to(lab.folder)
    return subprocess.run([sys.executable, "-m", "repave.cli.main", *argv], cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_machine_is_told_its_fault_and_a_wrong_word_lists_the_right_ones(lab, tmp_path):
    assert "It ends with" in run_repave(lab, tmp_path, "rack", "fault", "lab06", "ignore-boot-override").stderr
    assert run_repave(lab, tmp_path, "rack", "fault", "lab05", "slow-firmware").returncode == 0
    faults, firmware = (json.loads((lab.folder / "rack" / name).read_text()) for name in ("faults.json", "firmware.json"))
    assert faults == {"lab06": ["ignore-override"]} and firmware == {"lab05": 30.0}
    for name in ("lab05", "lab06"):
        run_repave(lab, tmp_path, "rack", "fault", name, "none")
    faults, firmware = (json.loads((lab.folder / "rack" / name).read_text()) for name in ("faults.json", "firmware.json"))
    assert faults == firmware == {}
    wrong = run_repave(lab, tmp_path, "rack", "fault", "lab06", "on-fire")
    assert wrong.returncode == 2 and "ignore-boot-override, no-hello, never-home, slow-firmware, none" in wrong.stderr
    assert "lab01, lab02" in run_repave(lab, tmp_path, "rack", "fault", "web01", "none").stderr


def test_the_digest_of_a_disk_says_whether_anything_was_written(lab, tmp_path):
    def digests():
        return {i["name"]: i["digest"] for i in json.loads(run_repave(lab, tmp_path, "rack", "ls", "--digest", "--json").stdout)["items"]}

    before = digests()
    lab.scribble("lab06")
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"lab06"} and len(before) == 7


def test_zeros_that_were_written_count_as_the_hole_they_replace(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"x")
    os.truncate(disk, 8 << 20)
    before = digest_disk(disk)
    with disk.open("r+b") as out:
        out.seek(4 << 20)
        out.write(bytes(1 << 20))
    assert digest_disk(disk) == before


def test_an_own_sdk_gets_what_it_needs_as_shell_exports(lab, tmp_path):
    said = run_repave(lab, tmp_path, "rack", "env").stdout
    shell = subprocess.run(["sh", "-c", f'{said}\nprintf "%s %s" "$CLOUDDC_ENDPOINT" "$HUAWEICLOUD_SDK_AK"'], capture_output=True, text=True)
    assert shell.stdout == f"{lab.values['endpoint']} {lab.values['ak']}"


def test_the_last_thing_on_the_screen_says_where_it_runs_and_what_to_type_next(lab):
    lines = render_next(lab.values, "a1b2-c3d4-e5f6").splitlines()
    assert (
        lines[0].startswith("Repave is running")
        and lab.values["endpoint"] in lines[1]
        and "password a1b2" in lines[1]
        and "make env" in lines[-2]
        and "docs/first-real-server.md" in lines[-1]
    )
    assert all((Path(__file__).parents[2] / word).exists() for word in lines[-1].split() if word.startswith("docs/"))


def test_a_phase_that_fails_shows_the_end_of_its_log_the_cause_the_fix_and_what_then(tmp_path):
    log = tmp_path / "libvirtd.log"
    log.write_text("".join(f"line {n}\n" for n in range(9)))
    with pytest.raises(PhaseFailed) as failed, phase("5/6 rack", "two machines", log=lambda: log, fix="free some memory"):
        raise RuntimeError("libvirtd does not answer")
    shown = str(failed.value)
    assert "5/6 rack failed" in shown and [line for line in shown.splitlines() if "|" in line] == [f"  | line {n}" for n in range(4, 9)]
    assert "cause  libvirtd does not answer" in shown and "fix    free some memory" in shown and "then   the same command again" in shown
