"""Slices of the long lanes: simulated worlds, deaths at points, and the same seed twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SEEDS = 2000  # about two minutes on two cores; the cap is three times that


def run(*command: str, hash_seed: str = "random") -> str:
    """What it prints; it must say that nothing is broken."""
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_seed_is_one_run_whatever_the_order_of_sets():
    fingerprints = {re.findall("fingerprint (.*)", run(".", "--seed", "17", hash_seed=h))[0] for h in ("1", "2")}
    assert len(fingerprints) == 1


def test_simulated_worlds_with_faults_break_no_invariant(capsys):
    last = run(".", "--seeds", str(SEEDS), "--at-most-s", "400").splitlines()[-1]
    with capsys.disabled():
        print(f"\n{last}")
    assert re.search(r"\b0 violations", last)
    assert int(re.findall(r"simulation: ([\d,]+) seeds", last)[0].replace(",", "")) >= SEEDS, "this machine is too slow for the lane"
    assert int(re.findall(r"(\d+) % with faults", last)[0]) >= 33
    assert not re.search(r"\b0 (?!violations)", last), "something was never played"


def test_a_late_proof_that_comes_twice_at_once_ends_its_run_once():
    run(".", "--seed", "1333")


def test_a_death_at_every_point_of_every_ending_changes_no_end(capsys):
    said = run("crash_points.py", "--pairs", "50")
    last = said.splitlines()[-1]
    with capsys.disabled():
        print(f"\n{last}")
    tries = re.findall("tries that were met: (.*)", said)[0].split()
    assert {"insert-media-2", "insert-media-3", "insert-media-4", "boot-ramdisk-2", "boot-ramdisk-3", "boot-ramdisk-4"} <= set(tries)
    assert int(re.findall(r"(\d+) discovered", last)[0]) >= 250
