"""What `make run` does when something comes between: an earlier batch that ends badly, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from repave.cli.client import Client
from repave.lab.demo import follow_unfinished


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
    assert (demo.returncode, said.strip()) == (130, "stopping")
    assert not waits_here.exists()
