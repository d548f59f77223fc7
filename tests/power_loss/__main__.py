"""`make power-loss`: the long lane. IMAGES and BOOTS say how much of it; the last line says what was counted."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from crash_states import Recording
from doctored import DOCTORED, make_doctored
from firmware import make_disk_behind
from lane import Judged, Say, Tally, boot_chosen, boot_one, choose_to_boot, judge_recording
from planted_bugs import PLANTED, plant
from recordings import OLD_DISKS, record_on_host, record_on_machine

from repave.lab.processes import end_on_sigterm

HOST_RECORDINGS = 24


def main() -> int:
    parser = argparse.ArgumentParser(prog="make power-loss", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000, help="crash images asked of the model")
    parser.add_argument("--boots", type=int, default=104, help="of them booted in OVMF, and up to half as many controls; 5 to 10 s each without KVM")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("REPAVE_CACHE", ".repave/cache")))
    chosen = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="power-loss-") as folder:
        tally = run(Path(folder), images=chosen.images, boots=chosen.boots, seed=chosen.seed, cache=chosen.cache.resolve())
    for failure in tally.failures[:20]:
        print(f"FAILED  {failure}")
    print(tally.line())
    return 1 if tally.failures else 0


def run(folder: Path, *, images: int, boots: int, seed: int, cache: Path) -> Tally:
    tally, rng, started = Tally(), random.Random(seed), time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    behind = make_disk_behind(folder / "behind")
    recordings = []
    for sector in (512, 4096):
        recordings.append(record_on_machine(folder / f"machine-{sector}", sector, seed, cache=cache))
        say(f"recorded by the agent in QEMU, {sector}-byte sectors: {[len(e) for e in recordings[-1].epochs]} writes between flushes")
    for n in range(HOST_RECORDINGS):
        sector = (512, 4096)[n // len(OLD_DISKS) % 2]
        kind = OLD_DISKS[n % len(OLD_DISKS)]
        recordings.append(record_on_host(folder / f"host-{n}", "gpt" if (kind, sector) == ("cd", 4096) else kind, sector, seed * 100 + n))
    say(f"recorded {HOST_RECORDINGS} more on the host")

    # The two of the real agent count for four; what is booted of each recording comes from what was judged.
    shares = [4 if recording.variables else 1 for recording in recordings]
    to_boot = []
    for n, (recording, share) in enumerate(zip(recordings, shares, strict=True)):
        judged = judge_recording(recording, -(-images * share // sum(shares)), seed + n, tally)
        to_boot.append((recording, choose_to_boot(recording, judged, -(-boots * share // sum(shares)), rng)))
    say(f"judged {tally.judged:,} images: {len(tally.early)} boot early; {tally.without_mbr} would boot, whole, where no protective MBR is asked for")

    controls = boots // 2
    bugs = find_planted(folder, tally, rng, min(3, -(-controls // 2 // len(PLANTED))), say)
    while sum(len(chosen) for _, chosen in to_boot) > boots:  # the ends come first in each, so they stay
        max(to_boot, key=lambda pair: len(pair[1]))[1].pop()
    for recording, chosen in to_boot:
        boot_chosen(recording, chosen, folder, behind, tally, say)
    for recording, chosen in bugs:
        boot_chosen(recording, chosen, folder, behind, tally, say, control=True)
    for name in list(DOCTORED)[: max(0, controls - tally.controls)]:
        disk, sector, verdict = make_doctored(name, folder)
        boot_one(disk, verdict, name, folder, behind, tally, say, sector_bytes=sector, control=True)
    return tally


def find_planted(folder: Path, tally: Tally, rng: random.Random, each: int, say: Say) -> list[tuple[Recording, list[Judged]]]:
    """Recordings of the writers with a bug, and which of their states to boot: those that the model says boot."""
    found = []
    for n, name in enumerate(PLANTED):
        source = plant(name, folder / f"bug-{n}")
        recording = record_on_host(folder / f"bug-{n}/recording", "esp-behind", 512, 900 + n, source=source)
        own = Tally()
        judged = judge_recording(recording, 1000, n, own)
        tally.planted += 1
        tally.found += bool(own.early)
        say(f"planted: {name}: {len(own.early)} of {own.judged} images boot early")
        boots = [j for j in judged if j.verdict.loader and j.state != recording.after_the_end]
        found.append((recording, rng.sample(boots, min(each, len(boots)))))
    return found


if __name__ == "__main__":
    sys.exit(main())
