"""THE workflow: one reinstall, from the first look at the BMC to the new OS's own proof. Read it top to bottom.

It knows nothing of time, network or disk: effects are `effects.Effects`, time and durability are the `Run` port. Each effect asks for
a state, so doing it twice is harmless. It catches RunFailed and nothing wider, and has no `finally`: a bug must end the engine's
workflow, not power a server off (engines.md 4, pitfalls 1 and 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from repave.domain.states import Ending
from repave.domain.timing import choose_wait
from repave.errors import RunFailed, Who
from repave.workflow.run import Json, Run


@dataclass(frozen=True)
class Waits:
    """How long a run waits, in seconds; settings of the site (config.py) may say otherwise. `agent_ready_s` and `proof_s` are ceilings (docs/adr/0003)."""

    # Large servers spend 5 to 12 minutes in firmware before they look at boot media (peers.md 4); BMC virtual media reads 30 MB at 0.5 MB/s.
    agent_ready_s: float = 30 * 60
    # A ceiling: 400 GB at 5 MB/s, the slowest disk that still works. A silent agent is found by its lease, one that stands still by the run's deadline.
    written_s: float = 24 * 60 * 60
    # Firmware again, then the OS's own first boot (54 s for Debian in the lab; a relabelling or updating OS takes many minutes).
    proof_s: float = 30 * 60
    # Between tries before the line: a worker that served the boot media starts anew, a BMC lost a request. The server is off meanwhile.
    forward_pause_s: float = 10.0
    # Putting back the old OS: the BMC may just be rebooting itself, which takes up to 3 minutes on iDRAC and iLO.
    return_pause_s: float = 60.0


DEFAULT_WAITS = Waits()
TRIES = 4


class Effects(Protocol):
    """What a run does to the world; `effects.py` is the one implementation. Each is repeatable and blocks."""

    def preflight(self, run_id: str) -> Json: ...
    def power_off(self, run_id: str) -> Json: ...
    def insert_media(self, run_id: str) -> Json: ...
    def boot_ramdisk(self, run_id: str) -> Json: ...
    def plan(self, run_id: str) -> Json: ...
    def close_before_line(self, run_id: str) -> bool: ...
    def boot_new_os(self, run_id: str) -> Json: ...
    def verify_proof(self, run_id: str) -> Json: ...
    def return_what_was_found(self, run_id: str) -> Json: ...
    def power_off_and_eject(self, run_id: str) -> Json: ...
    def end(self, run_id: str, ending: Ending, error: dict[str, Json] | None) -> Json: ...


async def reinstall(run: Run, do: Effects, waits: Waits = DEFAULT_WAITS) -> str:
    """The run has ended, its instance's state says how. Returns the Ending's value."""
    touched = False
    try:
        await run.step("preflight", do.preflight)
        touched = True
        await run.step("power-off", do.power_off)
        await insist(run, "insert-media", do.insert_media, waits.forward_pause_s, on=is_passing)
        known = await insist(run, "boot-ramdisk", do.boot_ramdisk, waits.forward_pause_s, on=is_passing)
        await run.wait_for("agent-ready", *choose_wait("agent_ready_s", waits.agent_ready_s, known))
        await run.step("plan", do.plan)
        # ════ the line: in here the agent asks to cross, and the store commits it ════
        told = await run.wait_for("written", waits.written_s)
    except RunFailed as error:
        if await run.step("close-before-line", do.close_before_line):
            return await return_what_was_found(run, do, error, waits, touched=touched)
        return await stop_half_written(run, do, error, waits)
    if told.get("rehearsed"):  # all was checked and nothing written; the store lets no rehearsal cross
        await run.step("close-before-line", do.close_before_line)
        return await return_what_was_found(run, do, None, waits, touched=True)

    # The image is verified on the disk: from here on the server stays on, whatever happens, unless another disk booted.
    try:
        known = await insist(run, "boot-new-os", do.boot_new_os, waits.return_pause_s)
        await run.wait_for("proof", *choose_wait("proof_s", waits.proof_s, known))
        await run.step("verify-proof", do.verify_proof)
    except RunFailed as error:
        if error.slug == "wrong-disk-booted":
            return await stop_half_written(run, do, error, waits)
        cause = error if error.slug != "deadline" else RunFailed("no-proof", error.detail)
        return await end(run, do, Ending.UNPROVED, cause)
    return await end(run, do, Ending.PROVED, None)


async def return_what_was_found(run: Run, do: Effects, cause: RunFailed | None, waits: Waits, *, touched: bool) -> str:
    """Before the line: the old OS runs again (or, where there was none, the server is off), read back. The disk was never written.

    `cause` None: a rehearsal that went well.
    """
    ending = Ending.RETURNED if cause else Ending.REHEARSED
    if not touched:
        return await end(run, do, ending, cause)
    try:
        await insist(run, "return", do.return_what_was_found, waits.return_pause_s)
    except RunFailed as failure:
        first = f"First: {cause} " if cause else "The rehearsal itself went well. "
        return await end(run, do, Ending.RETURN_FAILED, RunFailed(choose_slug("restore-failed", failure, cause), f"{first}Then: {failure}"))
    return await end(run, do, ending, cause)


async def stop_half_written(run: Run, do: Effects, cause: RunFailed, waits: Waits) -> str:
    """After the line without a verified image, or with a proof from another disk: power off, media out, error."""
    try:
        await insist(run, "stop", do.power_off_and_eject, waits.return_pause_s)
    except RunFailed as failure:
        cause = RunFailed(choose_slug(cause.slug, failure), f"{cause.detail} It could not be powered off: {failure}".strip(), **cause.context)
    return await end(run, do, Ending.WRITE_FAILED, cause)


def choose_slug(otherwise: str, *met: RunFailed | None) -> str:
    """Where another server was met, that is what the end says, whatever else went wrong: nothing more is sent there until an operator has looked."""
    return "wrong-server" if any(error is not None and error.slug == "wrong-server" for error in met) else otherwise


async def insist(run: Run, name: str, effect: Callable[[str], Json], pause_s: float, *, on: Callable[[RunFailed], bool] = lambda _: True) -> Json:
    """The step is done, its result returned; where it failed with what `on` holds for, it is tried again, `TRIES` in all. Raises the last RunFailed."""
    for attempt in range(1, TRIES):
        try:
            return await run.step(f"{name}-{attempt}", effect)
        except RunFailed as error:
            if not on(error):
                raise
            await run.sleep(pause_s)
    return await run.step(f"{name}-{TRIES}", effect)


def is_passing(error: RunFailed) -> bool:
    """A BMC that was busy or away, or did not do what it was asked: it may at the next try. Not a cancel, a deadline, a wrong password."""
    return error.problem.who is Who.BMC and error.problem.retryable


async def end(run: Run, do: Effects, ending: Ending, error: RunFailed | None) -> str:
    """The last step: run, instance and batch say how it ended; the run's keys are gone."""
    reason = error.as_json() if error else None
    await run.step("end", lambda run_id: do.end(run_id, ending, reason))
    return ending.value
