"""Fifty servers against the slowest of them alone: firmware takes minutes and is different in each, and a batch should cost no more than that.

Medians of 3.6 to 13.2 minutes of firmware were told for cloud bare metal; the times here are drawn evenly from that range and shortened
20 times. Each reinstall waits for firmware twice. What the fifty add by sharing this machine's cores is shortened by nothing.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

import requests

from bench.scripted_batch import Json, describe_machine, run_batch
from repave.lab.rack import rack_down, rack_up
from repave.lab.scripted import set_firmware

FIRMWARE_S = (3.6 * 60, 13.2 * 60)
SCALE = 20


def main(count: int = 50) -> None:
    """Prints one table. 4 minutes on 2 cores."""
    folder = Path(tempfile.mkdtemp(prefix="rp5-", dir="/tmp"))
    try:
        measure(rack_up(count, scripted=True, folder=folder, debian=False), folder, count)
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def measure(lab: Json, folder: Path, count: int) -> None:
    rng = random.Random(20261124)  # noqa: S311  times, not secrets
    names = {i["name"]: i["id"] for i in lab["instances"][:count]}
    with requests.Session() as session:
        session.trust_env = False
        session.headers["X-Auth-Token"] = lab["token"]
        run_batch(session, lab, list(names.values())[:1])  # without firmware: what is done once is done
        firmware = {name: rng.uniform(*FIRMWARE_S) / SCALE for name in names}
        set_firmware(folder / "rack", firmware)
        slowest = max(firmware, key=lambda name: firmware[name])
        _, alone_s, _ = run_batch(session, lab, [names[slowest]])
        print(f"the slowest alone: {alone_s:.1f} s", flush=True)
        _, all_s, _ = run_batch(session, lab, list(names.values()))
    print(f"\n{count} against 1; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n")
    fastest, times = min(firmware.values()), sorted(firmware.values())
    print(f"  firmware, each of two boots     {fastest:.1f} to {times[-1]:.1f} s, median {times[count // 2]:.1f} s")
    print(f"  the slowest alone               {alone_s:.1f} s, {2 * firmware[slowest]:.1f} s of it firmware")
    print(f"  all {count}, PUT to the last running  {all_s:.1f} s")
    print(f"  ratio                           {all_s / alone_s:.2f}", flush=True)
