"""The states of an instance: a table and one pure function. docs/states.md is generated from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from repave.domain.model import InstanceState, OperationState


class Ending(enum.StrEnum):
    """How a run ends (design.md, "One reinstall"), and the two events around it."""

    ACCEPTED = "accepted"  # a reinstall was admitted
    PROVED = "proved"  # the new OS called home, its root-disk serial is the plan's
    RETURNED = "returned"  # before the line: what was found is there again, read back
    REHEARSED = "rehearsed"  # a rehearsal went up to the line and back: what was found is there again, read back
    RETURN_FAILED = "return-failed"  # before the line: could not be confirmed by its deadline
    WRITE_FAILED = "write-failed"  # after the line: image not verified, or the proof names another disk; power off, media out
    UNPROVED = "unproved"  # after the line: image verified, no proof in time; media out, the server stays on
    RESTORED = "restored"  # the run was under way in a backup that was put back: what it did since then nobody knows
    LATE_PROOF = "late-proof"  # a valid proof after UNPROVED, before a new run


GOOD_ENDINGS = (Ending.PROVED, Ending.LATE_PROOF, Ending.REHEARSED)


@dataclass(frozen=True)
class Situation:
    """State and operation state together, and the state that a run found when it began (where one is under way)."""

    state: InstanceState
    operation: OperationState | None


_S, _O = InstanceState, OperationState
_FAILED = _O.REINSTALL_FAILED

# (state now, event, state the run found) -> what follows. None in the third place: it does not matter.
TABLE: dict[tuple[InstanceState, Ending, InstanceState | None], tuple[Situation, str]] = {
    (_S.RUNNING, Ending.ACCEPTED, None): (Situation(_S.PENDING, _O.REINSTALL_PROCESSING), "a reinstall is under way"),
    (_S.ERROR, Ending.ACCEPTED, None): (Situation(_S.PENDING, _O.REINSTALL_PROCESSING), "a reinstall from error is always allowed"),
    (_S.PENDING, Ending.PROVED, None): (Situation(_S.RUNNING, _O.REINSTALL_SUCCEED), "the new OS proved itself"),
    (_S.PENDING, Ending.RETURNED, _S.RUNNING): (Situation(_S.RUNNING, _FAILED), "before the line; the old OS is powered on again, disk untouched"),
    (_S.PENDING, Ending.RETURNED, _S.ERROR): (Situation(_S.ERROR, _FAILED), "before the line; there was no OS, the server is off, disk untouched"),
    # No operation_state: nothing was reinstalled, so neither succeed (there is no new password) nor failed (all went well) would be true.
    (_S.PENDING, Ending.REHEARSED, _S.RUNNING): (Situation(_S.RUNNING, None), "a rehearsal; the old OS is powered on again, disk untouched"),
    (_S.PENDING, Ending.REHEARSED, _S.ERROR): (Situation(_S.ERROR, None), "a rehearsal; there was no OS, the server is off, its old error is back"),
    (_S.PENDING, Ending.RETURN_FAILED, None): (Situation(_S.ERROR, _FAILED), "before the line; disk untouched, could not be powered on again"),
    (_S.PENDING, Ending.WRITE_FAILED, None): (Situation(_S.ERROR, _FAILED), "after the line; the root disk is erased and can not boot; power off, media out"),
    (_S.PENDING, Ending.UNPROVED, None): (Situation(_S.ERROR, _FAILED), "after the line; the image is verified on disk; media out, the server stays on"),
    (_S.PENDING, Ending.RESTORED, None): (Situation(_S.ERROR, _FAILED), "under way in a backup that was put back; the server is left as it is"),
    (_S.ERROR, Ending.LATE_PROOF, None): (Situation(_S.RUNNING, _O.REINSTALL_SUCCEED), "a valid proof that came late"),
}  # fmt: skip


class NotAllowed(ValueError):
    """The pair of state and event is not in the table."""


def next_situation(state: InstanceState, event: Ending, found: InstanceState | None = None) -> Situation:
    """What follows `event` in `state`. Raises NotAllowed."""
    row = TABLE.get((state, event, None)) or TABLE.get((state, event, found))
    if row is None:
        raise NotAllowed(f"{event.value} is not possible in {state.value}")
    return row[0]


def may_reinstall(state: InstanceState) -> bool:
    """Reinstall wants `running`; from `error` it is always allowed (design.md)."""
    return (state, Ending.ACCEPTED, None) in TABLE


def render_table() -> str:
    """docs/states.md's table, in Markdown."""
    lines = ["| state | event | run found | next state | operation_state | meaning |", "|---|---|---|---|---|---|"]
    for (state, event, found), (after, meaning) in TABLE.items():
        operation = after.operation.value if after.operation else ""
        lines.append(f"| `{state.value}` | {event.value} | {found.value if found else 'any'} | `{after.state.value}` | `{operation}` | {meaning} |")
    return "\n".join(lines)
