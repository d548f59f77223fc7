"""A slice of `make power-loss`: the agent in QEMU and the writer on the host, every power loss judged, a few booted, planted bugs found."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from crash_states import CrashedDisk, Recording, State, is_the_old_os
from firmware import make_disk_behind
from lane import Tally, boot_chosen, choose_to_boot, judge_recording
from planted_bugs import PLANTED, plant
from recordings import record_on_host, record_on_machine

CACHE = Path(os.environ.get("REPAVE_CACHE", ".repave/cache")).resolve()


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk_behind(tmp_path_factory.mktemp("behind") / "disk")


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record_on_host(tmp_path_factory.mktemp("host") / "512", "esp-behind", 512, 1)


@pytest.mark.timeout(900)
def test_power_lost_under_the_agent_in_its_ramdisk_never_boots_and_ovmf_agrees(tmp_path: Path, behind: Path, tally: Tally) -> None:
    recording = record_on_machine(tmp_path / "machine", 512, 1, cache=CACHE)
    judged = judge_recording(recording, 300, 1, tally)
    # The end, the state one sector before it, and the one before LBA 1 onward.
    chosen = choose_to_boot(recording, judged, 3, random.Random(1))
    boot_chosen(recording, chosen, tmp_path, behind, tally, print)
    assert not tally.failures
    assert (tally.booted, tally.booted_ends) == (3, 1)


@pytest.mark.parametrize(("sector_bytes", "old"), [(4096, "esp-behind"), (512, "cd"), (512, "half-written")])
def test_power_lost_under_the_writer_never_boots(tmp_path: Path, tally: Tally, sector_bytes: int, old: str) -> None:
    judge_recording(record_on_host(tmp_path / "host", old, sector_bytes, 2), 150, 1, tally)
    assert not tally.failures


@pytest.mark.timeout(900)
def test_every_planted_bug_is_found_and_ovmf_really_boots_one(tmp_path: Path, behind: Path, tally: Tally) -> None:
    for n, name in enumerate(PLANTED):
        recording = record_on_host(tmp_path / f"{n}/recording", "esp-behind", 512, 3, source=plant(name, tmp_path / str(n)))
        found = Tally()
        judged = judge_recording(recording, 250, 1, found)
        tally.planted += 1
        tally.found += bool(found.early)
        assert found.early, f"not found: {name}"
        if name == "the old OS is cleared in one go":
            boots = next(j for j in judged if j.verdict.loader and j.verdict.says == recording.old_name and not is_the_old_os(recording, j.state))
            boot_chosen(recording, [boots], tmp_path, behind, tally, print, control=True)
    assert not tally.failures


# The states themselves.


def test_a_state_holds_exactly_the_sectors_that_landed(on_host: Recording) -> None:
    disk, before = CrashedDisk(on_host), on_host.before.read_bytes()
    epoch = next(n for n, writes in enumerate(on_host.epochs) if len(writes) > 4)
    landed = tuple(random.Random(n).getrandbits(full.bit_length()) for n, full in enumerate(on_host.full(epoch)))
    disk.go_to(State(epoch, landed))
    expected = bytearray(before)
    for writes in on_host.epochs[:epoch]:
        for write in writes:
            expected[write.offset : write.offset + len(write.data)] = write.data
    for write, mask in zip(on_host.epochs[epoch], landed, strict=True):
        for n in range(len(write.data) // 512):
            if mask >> n & 1:
                expected[write.offset + n * 512 : write.offset + (n + 1) * 512] = write.data[n * 512 : (n + 1) * 512]
    assert disk.read(0, disk.size_bytes) == expected
    for offset, length in ((0, 1), (on_host.epochs[epoch][1].offset - 3, 5000), (disk.size_bytes - 10, 100)):
        assert disk.read(offset, length) == expected[offset : offset + length]


def test_lba_0_alone_is_the_first_and_the_last_thing_that_reaches_the_disk(on_host: Recording) -> None:
    first, last = on_host.epochs[0], on_host.epochs[-1]
    assert [(w.offset, len(w.data), any(w.data)) for w in first] == [(0, 512, False)]
    assert [(w.offset, len(w.data), any(w.data)) for w in last] == [(0, 512, True)]
