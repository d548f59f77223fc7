"""Reinstalls with faults on the real service, one batch after the other: its memory and its open files must stay what they are.

Compared are the two minutes around a sixth of the time (minute 10 of an hour) and the last two. Waits are seconds here, so that a machine that
never speaks costs no half hour; everything else is as in service.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import requests

from bench.scripted_batch import Json, describe_machine, read_rss_bytes, send_put
from repave.cli.client import Client, Endpoint
from repave.lab.rack import find_service, rack_down, rack_up
from repave.lab.scripted import set_faults

MACHINES = 10
FAULTS = ("no-hello", "never-home", "ignore-graceful", "ignore-override")
FAULTY_SHARE = 0.3
WAITS = {"REPAVE_AGENT_READY_S": "20", "REPAVE_PROOF_S": "20", "REPAVE_GRACEFUL_S": "2"}
BATCH_S = 300.0  # no batch may last so long
SAMPLE_S = 2.0
MOST = 1.05


@dataclass
class Samples:
    """Of the service, each with its second since the beginning."""

    pid: int
    began: float = field(default_factory=time.monotonic)
    seen: list[tuple[float, int, int]] = field(default_factory=list)  # second, RSS in bytes, open files
    over: threading.Event = field(default_factory=threading.Event)

    def take(self) -> None:
        while not self.over.wait(SAMPLE_S):
            self.seen.append((time.monotonic() - self.began, read_rss_bytes(self.pid), len(os.listdir(f"/proc/{self.pid}/fd"))))

    def around(self, second: float) -> tuple[float, float]:
        """Medians of RSS and open files in the two minutes around it, or less where the whole is short."""
        half = min(60.0, self.seen[-1][0] / 12)
        near = [s for s in self.seen if abs(s[0] - second) <= half]
        return statistics.median(s[1] for s in near), statistics.median(s[2] for s in near)


def main(minutes: int = 60) -> None:
    """Its last line says what was counted; the exit status is 1 where memory or open files grew by more than 5 %."""
    folder = Path(tempfile.mkdtemp(prefix="rps-", dir="/tmp"))
    os.environ.update(WAITS)
    try:
        lab = rack_up(MACHINES, scripted=True, folder=folder, debian=False)
        service = find_service(folder)
        assert service is not None
        samples = Samples(service.pid)
        sampler = threading.Thread(target=samples.take)
        sampler.start()
        try:
            ends, faulty = reinstall_for(60.0 * minutes, lab, folder)
        finally:
            samples.over.set()
            sampler.join()
        if not report(minutes, samples, ends, faulty):
            sys.exit(1)
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def reinstall_for(seconds: float, lab: Json, folder: Path) -> tuple[Counter[str], int]:
    """How the runs ended, and how many had a fault. Raises RuntimeError where a batch does not end."""
    rng = random.Random(20261124)  # noqa: S311  faults, not secrets
    client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
    image = next(i["id"] for i in lab["images"] if i["name"] == "tiny-1")
    machines = [i for i in lab["instances"] if i["name"].startswith("lab")][:MACHINES]
    ends, faulty, deadline = Counter[str](), 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        faults = {m["name"]: [rng.choice(FAULTS)] for m in machines if rng.random() < FAULTY_SHARE}
        set_faults(folder / "rack", faults)
        faulty += len(faults)
        with requests.Session() as session:
            session.trust_env = False
            session.headers["X-Auth-Token"] = lab["token"]
            batch, _ = send_put(session, f"{lab['endpoint']}/v1/{lab['project_id']}/instances", image, [m["id"] for m in machines])
        latest = time.monotonic() + BATCH_S
        while (said := client.get(f"/batches/{batch}"))["state"] == "working":
            if time.monotonic() > latest:
                raise RuntimeError(f"a batch does not end: {said['counts']}")
            time.sleep(0.5)
        ends.update({name: n for name, n in said["counts"].items() if n})
    return ends, faulty


def report(minutes: int, samples: Samples, ends: Counter[str], faulty: int) -> bool:
    early, late = samples.around(samples.seen[-1][0] / 6), samples.around(samples.seen[-1][0])
    peak = max(s[1] for s in samples.seen)
    print(f"soak; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}; {dict(ends)}; RSS at most {peak / 1e6:.0f} MB")
    grown = [after / before for before, after in zip(early, late, strict=True)]
    memory = f"RSS {early[0] / 1e6:.0f} to {late[0] / 1e6:.0f} MB ({100 * grown[0] - 100:+.1f} %)"
    files = f"open files {early[1]:.0f} to {late[1]:.0f} ({100 * grown[1] - 100:+.1f} %)"
    counted = f"{minutes} minutes, {sum(ends.values())} reinstalls, {faulty} with faults"
    print(f"soak: {counted}; from minute {minutes / 6:.1f} to the end {memory}, {files}", flush=True)
    return max(grown) <= MOST
