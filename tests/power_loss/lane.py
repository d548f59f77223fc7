"""The lane: recordings are judged, a sample of what was judged is booted, planted bugs are found, and all of it is counted.

The promise (design decision 12): no state boots before the last sector has landed, the state after it does. A state in which nothing but the
old OS's own tables were harmed may boot that old OS, which is whole: it is counted apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import firmware
from boot_rules import Verdict, judge
from crash_states import CrashedDisk, Recording, State, holds_the_new_data, is_the_old_os, plan_states

Say = Callable[[str], None]


@dataclass
class Tally:
    judged: int = 0
    early: list[str] = field(default_factory=list)  # states that boot before the end
    still_old: int = 0
    ends: int = 0  # after the end, by the model
    ends_not: list[str] = field(default_factory=list)  # after the end and not booting
    without_mbr: int = 0  # taken by a firmware that wants no protective MBR, with all data whole
    without_mbr_torn: list[str] = field(default_factory=list)
    booted: int = 0
    booted_ends: int = 0
    booted_otherwise: list[str] = field(default_factory=list)  # the firmware did not do what the model says
    controls: int = 0  # booted from planted bugs and doctored tables, where the model says that it boots or nearly
    planted: int = 0
    found: int = 0

    def line(self) -> str:
        ends = f"all {self.ends}" if not self.ends_not else f"{self.ends - len(self.ends_not)} of {self.ends}"
        boots = self.booted + self.controls
        parts = [
            f"{self.judged:,} images judged, {self.booted} booted, {len(self.early)} boot early, {ends} boot after the end ({self.booted_ends} in OVMF)",
            f"{self.still_old} still the whole old OS",
            f"{boots - len(self.booted_otherwise)} of {boots} boots as the model says, {self.controls} of them controls",
        ]
        if self.planted:
            parts.append(f"sabotage: {self.planted} planted, {self.found} found")
        return f"power-loss: {'; '.join(parts)}"

    @property
    def failures(self) -> list[str]:
        missed = [] if self.found == self.planted else [f"{self.planted - self.found} planted bugs were not found"]
        return [*self.early, *self.ends_not, *self.without_mbr_torn, *self.booted_otherwise, *missed]


@dataclass(frozen=True)
class Judged:
    state: State
    verdict: Verdict


def judge_recording(recording: Recording, count: int, seed: int, tally: Tally) -> list[Judged]:
    """Every state judged and counted, in the order of the log."""
    disk, judged = CrashedDisk(recording), []
    for state in sorted(plan_states(recording, count, random.Random(seed)), key=lambda s: s.epoch):
        disk.go_to(state)
        verdict = judge(disk)
        judged.append(Judged(state, verdict))
        tally.judged += 1
        where = f"{recording.name}: {describe(recording, state)}: {verdict}"
        if state.landed == recording.after_the_end.landed and state.epoch == recording.after_the_end.epoch:
            tally.ends += 1
            if not (verdict.loader and verdict.says == recording.new_name):
                tally.ends_not.append(f"does not boot after the end: {where}")
            continue
        if verdict.boots and is_the_old_os(recording, state):
            tally.still_old += 1
        elif verdict.boots:
            tally.early.append(f"boots early: {where}")
        if judge(disk, needs_mbr=False).boots and not is_the_old_os(recording, state):
            tally.without_mbr += 1
            if not holds_the_new_data(recording, state):
                tally.without_mbr_torn.append(f"boots half-written where no protective MBR is asked for: {where}")
    return judged


def choose_to_boot(recording: Recording, judged: list[Judged], count: int, rng: random.Random) -> list[Judged]:
    """The end; the state one sector before it; then at random from each epoch in turn, the start of each (all before it, nothing of it) as well."""
    end = recording.after_the_end
    ends = [j for j in judged if (j.state.epoch, j.state.landed) == (end.epoch, end.landed)]
    before = [j for j in judged if j.state.epoch == end.epoch and not any(j.state.landed)]
    epochs = [[j for j in judged if j.state.epoch == e] for e in range(end.epoch)]
    starts = [j for states in epochs for j in states if not any(j.state.landed)]
    rest = [j for states in epochs for j in rng.sample(states, min(len(states), 1 + count // len(epochs))) if j not in starts]
    return [*ends, *before, *rng.sample(starts + rest, len(starts + rest))][:count]


def boot_chosen(recording: Recording, chosen: Iterable[Judged], folder: Path, behind: Path, tally: Tally, say: Say, *, control: bool = False) -> None:
    disk = CrashedDisk(recording)
    for judged in sorted(chosen, key=lambda j: j.state.epoch):
        disk.go_to(judged.state)
        disk.save(folder / "crashed")
        is_end = (judged.state.epoch, judged.state.landed) == (recording.after_the_end.epoch, recording.after_the_end.landed)
        # The boot entry that the agent made is there from the stage before the seal on; it must not make a difference before the end either.
        variables = recording.variables or firmware.VARIABLES
        boot_one(
            folder / "crashed", judged.verdict, f"{recording.name}: {describe(recording, judged.state)}", folder, behind, tally, say,
            sector_bytes=recording.sector_bytes, variables=variables, control=control,
        )  # fmt: skip
        tally.booted_ends += is_end and not control


def boot_one(
    disk: Path,
    verdict: Verdict,
    what: str,
    folder: Path,
    behind: Path,
    tally: Tally,
    say: Say,
    *,
    sector_bytes: int,
    variables: Path = firmware.VARIABLES,
    control: bool = False,
) -> None:
    """OVMF must do what the model says: start this loader or pass the disk by; and write only to a disk whose table it takes."""
    expected = (verdict.says or "nothing") if verdict.loader else firmware.NOTHING
    booted = firmware.boot(disk, behind, folder, sector_bytes=sector_bytes, variables=variables)
    if booted.says != expected or (booted.wrote and not verdict.boots):
        tally.booted_otherwise.append(f"OVMF says {booted.says!r}{' and wrote to the disk' if booted.wrote else ''}, the model {expected!r}: {what}: {verdict}")
    if control:
        tally.controls += 1
    else:
        tally.booted += 1
    say(f"booted {tally.booted + tally.controls:4}  {booted.seconds:5.1f} s  {booted.says:18} {what}")


def describe(recording: Recording, state: State) -> str:
    """Enough to make the state again."""
    full = recording.full(state.epoch)
    landed = ["all" if m == f else "lost" if not m else f"{m.bit_count()} of {f.bit_length()}" for m, f in zip(state.landed, full, strict=True)]
    return f"epoch {state.epoch} of {len(recording.epochs)} ({state.how}), landed: {', '.join(landed)}"
