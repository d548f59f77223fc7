"""One rack machine, the tiny image or Debian: from the 202 to `running`, beside the sum of what cannot be avoided (by_hand.py), in the same run.

Each repetition does it by hand first, which leaves a running OS on the machine, and then by one PUT. The times of the parts come from the
machine's serial console and from the run's own events; the total is what the service says: `created_at` to `ended_at`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import requests

from bench.by_hand import FETCH, ByHand, start_kit
from bench.console import GRUB, Console, open_console
from bench.scripted_batch import describe_machine
from repave.cli.client import Client, Endpoint
from repave.images.store import ImageStore
from repave.lab.machines import QemuRack
from repave.lab.rack import rack_down, rack_up
from repave.ramdisk.build import BootFiles, build_ramdisk

REPEAT = 3
TINY, DEBIAN = "tiny-2", "debian-12"
PASSWORD = "Bench-7!rack"  # noqa: S105  of lab machines
DEADLINE_S = 900
GOALS = {TINY: 1.15, DEBIAN: 1.10}

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ByRepave:
    """Seconds of each part of a run."""

    before_power_on: float  # preflight, the old OS shuts down, media in, override set
    firmware_cd: float
    to_user_space: float
    to_hello: float  # drivers, network, Python
    to_line: float  # hello, plan, manifest
    write: float  # config drive and read-back too
    to_power_on: float  # report, off, media out
    firmware_disk: float
    os_boot: float  # with the first boot's work, to the proof
    total: float
    kernel_to_hello: float


def main(repeat: int = REPEAT, *, image: str = TINY) -> None:
    """Prints the table. Takes about 2 minutes a repetition on 2 cores without KVM."""
    folder = Path(tempfile.mkdtemp(prefix="rpb-", dir="/tmp"))
    cache = Path(os.environ.setdefault("REPAVE_CACHE", str(Path(".repave/cache").resolve())))
    try:
        lab = rack_up(1, scripted=False, folder=folder, debian=image == DEBIAN)
        files = build_ramdisk(cache, progress=lambda line: None)
        by_hand, by_repave, last = measure(lab, folder, files, repeat, image)
        show(by_hand, by_repave, last, image)
        show_sizes(files, folder / "boot.iso", by_repave)
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def measure(lab: Json, folder: Path, files: BootFiles, repeat: int, image: str) -> tuple[list[ByHand], list[ByRepave], Json]:
    """Both, so many times, and the last run as the API shows it."""
    client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
    machine = QemuRack(folder / "rack").machines[0]
    images = ImageStore(folder / "site/repave-data/images")
    manifest = client.get(f"/images/{image}")["manifest_sha256"]
    by_hand, by_repave = list[ByHand](), list[ByRepave]()
    with start_kit(folder / "kit", files, images, manifest) as kit, open_console(machine.console) as console:
        for number in range(1, repeat + 1):
            by_hand.append(kit.measure(machine, console))
            print(f"{number}/{repeat}: by hand {by_hand[-1].total:.1f} s", end="", flush=True)
            run = reinstall(client, lab, image=image)[0]
            by_repave.append(read_parts(run, client.items(f"/events?batch={run['batch']}"), console))
            print(f", by Repave {by_repave[-1].total:.1f} s", flush=True)
    return by_hand, by_repave, run


def reinstall(client: Client, lab: Json, count: int = 1, *, image: str = TINY) -> list[Json]:
    """One PUT for the first `count` instances; the runs when all have ended. Raises RuntimeError where one is not running."""
    image_id = next(i["id"] for i in lab["images"] if i["name"] == image)
    body = {"image_id": image_id, "password": PASSWORD, "instance_id_set": [i["id"] for i in lab["instances"][:count]]}
    with requests.Session() as session:
        session.trust_env = False
        url = f"{lab['endpoint']}/v1/{lab['project_id']}/instances/reinstall"
        answer = session.put(url, json=body, headers={"X-Auth-Token": lab["token"]}, timeout=60)
    if answer.status_code != 202:
        raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")
    batch_id = client.items("/batches", limit=1)[0]["id"]
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        batch = client.get(f"/batches/{batch_id}")
        if batch["state"] == "succeeded":
            return list(batch["runs"])
        if batch["state"] != "working":
            raise RuntimeError(f"not all run: {[r['error'] for r in batch['runs']]}")
        time.sleep(0.5)
    raise RuntimeError(f"the batch did not end within {DEADLINE_S} s")


def read_parts(run: Json, events: Sequence[Json], console: Console) -> ByRepave:
    began = {e.get("step", e["type"]): _unix(e["at"]) for e in events if e["type"] in ("run.step", "run.crossed", "run.report")}
    on_at, again_at = began["boot-ramdisk"], began["first-boot"]
    grub_at = console.wait_for(GRUB, after=on_at)
    init_at = console.wait_for("repave-init .*user space", after=grub_at)
    hello_at = console.wait_for("repave-agent .*hello: ", after=grub_at)
    kernel_at = init_at - (console.find_number(r"repave-init ([0-9.]+)s +user space", after=grub_at) or 0)
    again_grub_at = console.wait_for(GRUB, after=again_at)
    created_at, ended_at = _unix(run["created_at"]), _unix(run["ended_at"])
    return ByRepave(
        before_power_on=on_at - created_at,
        firmware_cd=grub_at - on_at,
        to_user_space=init_at - grub_at,
        to_hello=hello_at - init_at,
        to_line=began["run.crossed"] - hello_at,
        write=began["run.report"] - began["run.crossed"],
        to_power_on=again_at - began["run.report"],
        firmware_disk=again_grub_at - again_at,
        os_boot=ended_at - again_grub_at,
        total=ended_at - created_at,
        kernel_to_hello=hello_at - kernel_at,
    )


def _unix(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def show(by_hand: Sequence[ByHand], by_repave: Sequence[ByRepave], last: Json, image: str) -> None:
    """The median of each part, ours beside what cannot be avoided."""

    def median(parts: Sequence[Any], name: str) -> float:
        return statistics.median(getattr(p, name) for p in parts)

    print(f"\none rack machine, image {image}, median of {len(by_repave)}; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n")
    rows = (
        ("preflight, old OS off, media in", "before_power_on", ""),
        ("firmware, to the boot loader on the disc", "firmware_cd", "firmware_cd"),
        ("kernel and initramfs from the disc, to user space", "to_user_space", "to_user_space"),
        ("drivers, network, Python, to hello", "to_hello", ""),
        ("hello, plan, manifest, to the line", "to_line", ""),
        (f"the disk written (reference: {FETCH.split()[0]} | zstd -d | dd)", "write", "write"),
        ("report, off, media out", "to_power_on", ""),
        ("firmware, to the boot loader on the disk", "firmware_disk", "firmware_disk"),
        ("the OS's boot, to proof (reference: to its SSH)", "os_boot", "os_boot"),
        ("202 to running (reference: the sum)", "total", "total"),
    )
    print(f"  {'seconds':<58} {'ours':>6} {'ref.':>6} {'ratio':>6}")
    for title, ours, theirs in rows:
        mine = median(by_repave, ours)
        reference = f"{median(by_hand, theirs):6.1f} {mine / median(by_hand, theirs):6.2f}" if theirs else f"{'-':>6} {'-':>6}"
        print(f"  {title:<58} {mine:6.1f} {reference}")
    ratios = [ours.total / theirs.total for ours, theirs in zip(by_repave, by_hand, strict=True)]
    print(f"\n  ratio of each repetition: {', '.join(f'{r:.2f}' for r in ratios)}; goal at most {GOALS[image]}")
    print("\n  the last run, step by step (write stages in brackets):")
    for line in render_waterfall(last):
        print(f"  {line}")


def show_sizes(files: BootFiles, iso: Path, by_repave: Sequence[ByRepave]) -> None:
    sizes = ", ".join(f"{name} {path.stat().st_size / 1e6:.1f} MB" for name, path in (("kernel", files.kernel), ("initramfs", files.initramfs), ("ISO", iso)))
    print(f"\n  ramdisk: {sizes}; {statistics.median(p.kernel_to_hello for p in by_repave):.1f} s from kernel start to hello", flush=True)


def render_waterfall(run: Json, *, columns: int = 60) -> list[str]:
    """One line a step: seconds, share, and a bar where in the run it was."""
    steps: dict[str, float] = run["durations_s"]
    total = sum(steps.values()) or 1.0
    lines, before = [], 0.0
    for name, seconds in steps.items():
        start, end = round(columns * before / total), round(columns * (before + seconds) / total)
        stages = ", ".join(f"{stage} {s:.1f}" for stage, s in (run["write_stages_s"] or {}).items()) if name == "write-image" else ""
        lines.append(
            f"{name:<13} {seconds:6.1f} s {100 * seconds / total:5.1f} %  |{' ' * start}{'█' * max(end - start, 0):<{columns - start}}|"
            + (f"  [{stages}]" if stages else "")
        )
        before += seconds
    return lines
