"""The four standard tests of the workflow on the real engine, on both databases: `engine_points.py` in a process of its own, a slice of `--whole`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_on_the_real_engine_each_step_dies_runs_twice_or_fails_and_each_wait_runs_out(database_url, tmp_path, capsys):
    command = [sys.executable, str(Path(__file__).with_name("engine_points.py")), str(tmp_path)]
    command += ["--url", database_url] if database_url.startswith("postgresql") else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    last = (done.stdout.splitlines() or [""])[-1]
    with capsys.disabled():
        print(f"\n{last}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.findall(r"(\d+) deaths", last)[0]) >= 12
