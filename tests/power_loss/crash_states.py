"""What a power loss can leave: for every point of a write log, which sectors of the writes since the last flush are on the disk.

The rule: what was written before a flush that has returned is there. Of what came after it, any sector may be there or not, in any order; a
sector is whole or not there at all. So a state is an epoch (the writes between two flushes) and, for each of its writes, the sectors that
landed. Where two writes of one epoch have a sector in common, each outcome is a state too: the later one lost is the earlier one last.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bootable_disks import MIB
from write_log import Epoch, Write

Landed = tuple[int, ...]  # a bit mask of sectors for each write of the epoch


@dataclass(frozen=True)
class State:
    """A power loss. `how` is for people: what kind of loss it is."""

    epoch: int
    landed: Landed
    how: str = ""


@dataclass(frozen=True)
class Recording:
    """One write of one image to one disk. `ways_in`: byte offsets whose sectors the boot rules look at, besides the tables'."""

    name: str
    sector_bytes: int
    before: Path  # the disk as it was
    epochs: list[Epoch]
    new_name: str  # what the new OS's loader says
    old_name: str  # the old one's; "" where the disk did not boot
    variables: Path | None = None  # the firmware's, as the agent left them
    ways_in: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        return self.before.stat().st_size

    @property
    def table_bytes(self) -> int:
        """A GPT's header and 128 entries."""
        return self.sector_bytes + -(-128 * 128 // self.sector_bytes) * self.sector_bytes

    def sectors(self, write: Write) -> int:
        return len(write.data) // self.sector_bytes

    def full(self, epoch: int) -> Landed:
        return tuple((1 << self.sectors(w)) - 1 for w in self.epochs[epoch])

    @property
    def after_the_end(self) -> State:
        last = len(self.epochs) - 1
        return State(last, self.full(last), "all of it")

    @property
    def untouched(self) -> State:
        return State(0, tuple(0 for _ in self.epochs[0]), "nothing of it")

    def normal(self, state: State) -> State:
        """One name for each state: all of an epoch is nothing of the next one."""
        if state.epoch + 1 < len(self.epochs) and state.landed == self.full(state.epoch):
            return State(state.epoch + 1, tuple(0 for _ in self.epochs[state.epoch + 1]), state.how)
        return state


def plan_states(recording: Recording, count: int, rng: random.Random) -> list[State]:
    """`count` different states or all there are: first those that are listed whole, then random ones, from every epoch alike."""
    found: dict[tuple[int, Landed], State] = {}

    def take(states: Iterable[State], until: int) -> None:
        for state in states:
            if len(found) >= until:
                return
            state = recording.normal(state)
            found.setdefault((state.epoch, state.landed), state)

    must = [recording.untouched, recording.after_the_end]
    take(must, count)
    listed = [list(_listed(recording, epoch)) for epoch in range(len(recording.epochs))]
    take((s for states in listed for s in states if s.how == "prefix"), count)
    # From the epochs in turn, so that none crowds out the others however small `count` is.
    for ways_in, until in ((True, count // 2), (False, count * 3 // 4)):
        rest = [[s for s in states if (s.how == "ways in") == ways_in] for states in listed]
        shuffled = [rng.sample(states, len(states)) for states in rest]
        take((s for turn in itertools.zip_longest(*shuffled) for s in turn if s is not None), until)
    epochs = [e for e in range(len(recording.epochs)) if sum(recording.sectors(w) for w in recording.epochs[e]) > 12]
    for _ in range(20 * count):  # a short log has fewer states than asked for
        if len(found) >= count or not epochs:
            break
        take([_random(recording, rng.choice(epochs), rng)], count)
    return list(found.values())


def _listed(recording: Recording, epoch: int) -> Iterator[State]:
    """Every prefix and suffix of the writes, each one alone, each one lost, tears of each at every sector, all subsets of the ways in."""
    full = recording.full(epoch)
    nothing = tuple(0 for _ in full)
    for n in range(len(full) + 1):
        yield State(epoch, full[:n] + nothing[n:], "prefix")
    for n in range(1, len(full)):
        yield State(epoch, nothing[:n] + full[n:], "suffix")
    for n, whole in enumerate(full):
        yield State(epoch, (*nothing[:n], whole, *nothing[n + 1 :]), "one alone")
        yield State(epoch, (*full[:n], 0, *full[n + 1 :]), "one lost")
    yield from _ways_in(recording, epoch, full, nothing)
    for n, whole in enumerate(full):
        sectors = whole.bit_length()
        for at in range(1, sectors):
            head = (1 << at) - 1
            yield State(epoch, (*full[:n], head, *nothing[n + 1 :]), "torn")
            yield State(epoch, (*full[:n], whole ^ head, *nothing[n + 1 :]), "torn from behind")


def _ways_in(recording: Recording, epoch: int, full: Landed, nothing: Landed) -> Iterator[State]:
    """Every subset of the sectors that firmware looks at, with all the rest of the epoch and with nothing of it."""
    places = []
    for offset in sorted({*_table_offsets(recording), *recording.ways_in}):
        for n, write in enumerate(recording.epochs[epoch]):
            if write.offset <= offset < write.offset + len(write.data):
                places.append((n, 1 << (offset - write.offset) // recording.sector_bytes))
    for rest in (nothing, full):
        for chosen in itertools.product((False, True), repeat=len(places)):
            landed = list(rest)
            for (n, bit), there in zip(places, chosen, strict=True):
                landed[n] = landed[n] | bit if there else landed[n] & ~bit
            yield State(epoch, tuple(landed), "ways in")


def _table_offsets(recording: Recording) -> list[int]:
    """MBR, both headers, the first sectors of both entry arrays, a CD's first two descriptors."""
    sector, size = recording.sector_bytes, recording.size_bytes
    return [0, sector, 2 * sector, size - sector, size - recording.table_bytes, 32768, 32768 + 2048]


def _random(recording: Recording, epoch: int, rng: random.Random) -> State:
    """Each write lost, whole, torn, or riddled."""
    landed = []
    for whole in recording.full(epoch):
        sectors = whole.bit_length()
        landed.append(rng.choice((0, whole, (1 << rng.randint(0, sectors)) - 1, rng.getrandbits(sectors))))
    return State(epoch, tuple(landed), "random")


class CrashedDisk:
    """A recording's disk, moved from state to state; the states must come epoch by epoch."""

    def __init__(self, recording: Recording) -> None:
        self.sector_bytes, self.size_bytes = recording.sector_bytes, recording.size_bytes
        self._recording = recording
        self._durable = bytearray(recording.before.read_bytes())  # all epochs before the state's
        self._epoch = 0
        self._state = recording.untouched

    def go_to(self, state: State) -> None:
        if state.epoch < self._epoch:
            raise ValueError("back in time")
        while self._epoch < state.epoch:
            for write in self._recording.epochs[self._epoch]:
                self._durable[write.offset : write.offset + len(write.data)] = write.data
            self._epoch += 1
        self._state = state

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size_bytes)
        view = bytearray(self._durable[offset:end])
        sector = self.sector_bytes
        for write, landed in zip(self._recording.epochs[self._epoch], self._state.landed, strict=True):
            low, high = max(offset, write.offset), min(end, write.offset + len(write.data))
            if low >= high or not landed:
                continue
            if landed == (1 << len(write.data) // sector) - 1:
                view[low - offset : high - offset] = write.data[low - write.offset : high - write.offset]
                continue
            for n in range((low - write.offset) // sector, -(-(high - write.offset) // sector)):
                if landed >> n & 1:
                    a, b = max(low, write.offset + n * sector), min(high, write.offset + (n + 1) * sector)
                    view[a - offset : b - offset] = write.data[a - write.offset : b - write.offset]
        return bytes(view)

    def save(self, path: Path) -> None:
        """The whole disk as a sparse file."""
        with path.open("wb") as out:
            out.truncate(self.size_bytes)
            for at in range(0, self.size_bytes, 1 << 20):
                block = self.read(at, 1 << 20)
                if any(block):
                    out.seek(at)
                    out.write(block)


def is_the_old_os(recording: Recording, state: State) -> bool:
    """All that landed are sectors of the tables and a CD's descriptor: whatever boots is the old OS, and it is whole."""
    sector, size = recording.sector_bytes, recording.size_bytes
    ways_in = ((0, sector + recording.table_bytes), (32768, 32768 + sector), (size - recording.table_bytes, size))
    landed = ((w, full) for e in range(state.epoch) for w, full in zip(recording.epochs[e], recording.full(e), strict=True))
    return all(not mask & ~_mask(recording, w, ways_in) for w, mask in itertools.chain(landed, zip(recording.epochs[state.epoch], state.landed, strict=True)))


def holds_the_new_data(recording: Recording, state: State) -> bool:
    """All that is missing is the first MiB and the backup table: image and config drive are whole."""
    size = recording.size_bytes
    tables = ((0, MIB), (size - recording.table_bytes, size))
    now = zip(recording.epochs[state.epoch], (f & ~m for f, m in zip(recording.full(state.epoch), state.landed, strict=True)), strict=True)
    later = ((w, full) for e in range(state.epoch + 1, len(recording.epochs)) for w, full in zip(recording.epochs[e], recording.full(e), strict=True))
    return all(not mask & ~_mask(recording, w, tables) for w, mask in itertools.chain(now, later))


def _mask(recording: Recording, write: Write, spans: tuple[tuple[int, int], ...]) -> int:
    """The write's sectors that lie in `spans`."""
    mask = 0
    for start, end in spans:
        low, high = (min(max(at - write.offset, 0), len(write.data)) // recording.sector_bytes for at in (start, end))
        mask |= (1 << high) - (1 << low)
    return mask
