"""What goes wrong, drawn from the seed: which faults a reinstall of one machine meets, and when.

A fault is a name and its parameters. `fired` holds those that really happened: only they count. `SPOILS` says which of our observers' promises
a fault makes impossible for that machine (nobody can eject media through a BMC that is gone); everything else must hold in spite of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

# name -> how its parameters are drawn
BMC = ("bmc-lost-request", "bmc-lost-answer", "bmc-late", "bmc-busy", "bmc-away", "bmc-refuses", "bmc-slow", "insert-empty", "override-ignored",
       "graceful-ignored", "other-machine", "off-is-late")  # fmt: skip
WIRE = ("request-lost", "answer-lost", "twice", "late-twice", "cut", "wire-slow", "home-lost")
MACHINE = ("no-hello", "agent-dies", "agent-reboots", "power-cut", "reset", "disk-error", "disk-swapped", "media-fails", "clone", "thief",
           "chunk-damaged", "other-disk", "no-proof", "late-proof", "password-unusable")  # fmt: skip
SERVICE = ("crash", "crash-at-commit", "database-busy")
KINDS = (*BMC, *WIRE, *MACHINE)

ACTIONS = ("probe", "check_media", "power_off", "insert_media", "boot_from_media_once", "power_on", "eject_media", "boot_from_disk")
STAGES = ("hello", "plan", "manifest", "cross", "crossed", "clear", "body-0", "body-2", "config-drive", "read-back", "table", "lba0", "report")


@dataclass
class Trouble:
    """The faults of one machine during one reinstall."""

    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        return name in self.faults

    def get(self, name: str) -> dict[str, Any]:
        return self.faults[name]

    def fire(self, name: str) -> bool:
        """The fault happens now."""
        self.fired.add(name)
        return True

    def once(self, name: str) -> bool:
        """Whether the fault is there and happens now, one time less from here on."""
        fault = self.faults.get(name)
        if fault is None or fault.get("times", 1) <= 0:
            return False
        fault["times"] = fault.get("times", 1) - 1
        return self.fire(name)


def draw(rng: random.Random, *, chance: float, now: float) -> Trouble:
    """One to four faults with this chance, else none."""
    made = Trouble()
    if rng.random() >= chance:
        return made
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        kind = rng.choice(KINDS)
        made.faults[kind] = _parameters(rng, kind, now)
    return made


def _parameters(rng: random.Random, kind: str, now: float) -> dict[str, Any]:
    action, times = rng.choice(ACTIONS[2:]), rng.choice((1, 1, 2, 3, 5))
    if kind in ("bmc-lost-request", "bmc-lost-answer", "bmc-late", "bmc-busy"):
        return {"action": action, "times": times, "late_s": rng.uniform(1, 40)}
    if kind == "other-machine":
        return {"action": rng.choice(("probe", *ACTIONS[2:]))}
    if kind == "bmc-refuses":
        return {"action": rng.choice(ACTIONS)}
    if kind in ("bmc-away", "cut"):
        start = now + rng.uniform(0, 600)
        return {"from": start, "until": start + rng.choice((20, 60, 200, 600, 2400))}
    if kind in ("power-cut", "reset"):
        return {"at": now + rng.uniform(5, 700)}
    if kind in ("agent-dies", "agent-reboots"):
        return {"stage": rng.choice(STAGES)}
    if kind in ("request-lost", "answer-lost", "twice", "late-twice"):
        return {"share": rng.choice((0.1, 0.3, 0.5))}
    if kind == "home-lost":
        return {"times": rng.choice((1, 3, 10))}
    if kind == "insert-empty":
        return {"times": rng.choice((1, 2, 99))}
    if kind == "disk-error":
        return {"stage": rng.choice(STAGES[5:-1])}
    if kind in ("clone", "thief"):
        return {"after_s": rng.choice((0.0, 5.0, 30.0, 100.0))}
    if kind == "late-proof":
        return {"late_s": rng.choice((1790.0, 1900.0, 2500.0))}
    return {}
