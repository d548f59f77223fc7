"""Two rack machines at once, the tiny image, beside one of them alone in the same run: where the time goes, step by step, machine by machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

from bench.rack import reinstall, render_waterfall
from bench.scripted_batch import describe_machine
from repave.cli.client import Client, Endpoint
from repave.lab.rack import rack_down, rack_up


def main(count: int = 2) -> None:
    """Prints one waterfall a machine. Takes about 4 minutes for two on 2 cores without KVM."""
    folder = Path(tempfile.mkdtemp(prefix="rpb-", dir="/tmp"))
    os.environ.setdefault("REPAVE_CACHE", str(Path(".repave/cache").resolve()))
    try:
        lab = rack_up(count, scripted=False, folder=folder, debian=False)
        client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
        alone = sum(reinstall(client, lab, 1)[0]["durations_s"].values())
        print(f"one alone: {alone:.1f} s", flush=True)
        runs = reinstall(client, lab, count)
        print(f"\n{count} rack machines at once; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}")
        for run in runs:
            seconds = sum(run["durations_s"].values())
            print(f"\n  {run['server']}: {seconds:.1f} s from 202 to running, {seconds / alone:.2f} x one alone")
            for line in render_waterfall(run):
                print(f"    {line}")
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)
