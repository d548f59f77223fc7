"""What the service itself costs: batches of 50 scripted machines, beside one machine alone in the same run.

The machines' work (agents, BMCs, disks) shares the cores with the service, so the makespan says more of the machine measured on than
of Repave; the answer times and the memory are Repave's. PUT includes the password's hash (0.11 s, once a batch).
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import requests

from repave.lab.processes import ProcessRef
from repave.lab.rack import find_service, rack_down, rack_up

BATCHES = 5
PASSWORD = "Bench-7!scripted"  # noqa: S105  of scripted machines
DEADLINE_S = 600
POLL_S = 0.05  # 20 a second: under the rate limit of one key, and as a busy client would

Json = dict[str, Any]


def main(count: int = 50) -> None:
    """Prints one table. 2 minutes on 2 cores."""
    folder = Path(tempfile.mkdtemp(prefix="rpb-", dir="/tmp"))
    try:
        lab = rack_up(count, scripted=True, folder=folder, debian=False)
        service = find_service(folder)
        assert service is not None
        measure(lab, service, count)
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def measure(lab: Json, service: ProcessRef, count: int) -> None:
    ids = [i["id"] for i in lab["instances"]][:count]
    with requests.Session() as session:
        session.trust_env = False
        session.headers["X-Auth-Token"] = lab["token"]
        _, alone_s, _ = run_batch(session, lab, ids[:1])
        rss_before = read_rss_bytes(service.pid)
        puts, makespans, statuses, peak = [], [], [], rss_before
        for number in range(BATCHES):
            put_s, makespan_s, status_s = run_batch(session, lab, ids)
            puts.append(put_s)
            makespans.append(makespan_s)
            statuses += status_s
            peak = max(peak, read_rss_bytes(service.pid))
            print(f"batch {number + 1}/{BATCHES}: {makespan_s:.1f} s", flush=True)
    print(f"\nscripted batch, {count} machines, {BATCHES} batches; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n")
    rows = [
        ("PUT answered, p50", f"{1000 * statistics.median(puts):.0f} ms"),
        ("PUT answered, slowest", f"{1000 * max(puts):.0f} ms of {len(puts)}"),
        (f"GET status while {count} run, p50", f"{1000 * statistics.median(statuses):.1f} ms of {len(statuses)}"),
        (f"GET status while {count} run, p99", f"{1000 * percentile(statuses, 99):.1f} ms"),
        ("one machine, PUT to running", f"{alone_s:.1f} s"),
        (f"{count} machines, PUT to the last running, median", f"{statistics.median(makespans):.1f} s ({statistics.median(makespans) / alone_s:.1f} x)"),
        ("service RSS before, and at most", f"{rss_before / 1e6:.0f} MB, {peak / 1e6:.0f} MB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows), flush=True)


def run_batch(session: requests.Session, lab: Json, ids: Sequence[str]) -> tuple[float, float, list[float]]:
    """Seconds until the 202, until the last is running, and of each GET status in between. Raises RuntimeError where one is not running."""
    base = f"{lab['endpoint']}/v1/{lab['project_id']}/instances"
    image = next(i["id"] for i in lab["images"] if i["name"] == "tiny-1")
    began = time.monotonic()
    batch_id, put_s = send_put(session, base, image, ids)
    over, took = threading.Event(), list[float]()
    watcher = threading.Thread(target=_ask_status, args=(lab["token"], [f"{base}/{i}/status" for i in ids], over, took))
    watcher.start()
    try:
        while time.monotonic() - began < DEADLINE_S:
            batch = session.get(f"{lab['endpoint']}/repave/v1/batches/{batch_id}", timeout=60).json()
            if batch["state"] != "working":
                break
            time.sleep(0.5)
        makespan_s = time.monotonic() - began
    finally:
        over.set()
        watcher.join()
    if batch["counts"]["running"] != len(ids):
        raise RuntimeError(f"not all run: {batch['counts']}")
    return put_s, makespan_s, took


def send_put(session: requests.Session, instances_url: str, image_id: str, ids: Sequence[str]) -> tuple[str, float]:
    """CloudDC's PUT: the batch's id, and the seconds until the 202. Raises RuntimeError for any other answer."""
    body = {"image_id": image_id, "password": PASSWORD, "instance_id_set": list(ids)}
    began = time.monotonic()
    answer = session.put(f"{instances_url}/reinstall", json=body, timeout=60)
    took = time.monotonic() - began
    if answer.status_code != 202:
        raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")
    return answer.headers["Link"].partition(">")[0].rpartition("/")[2], took


def _ask_status(token: str, urls: Sequence[str], over: threading.Event, took: list[float]) -> None:
    with requests.Session() as session:
        session.trust_env = False
        session.headers["X-Auth-Token"] = token
        while not over.wait(POLL_S):
            began = time.monotonic()
            session.get(urls[len(took) % len(urls)], timeout=60).raise_for_status()
            took.append(time.monotonic() - began)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def read_rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def describe_machine() -> str:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    return f"{os.cpu_count()} x {model}, Linux {platform.release().split('-')[0]}, load {os.getloadavg()[0]:.1f} at the end"
