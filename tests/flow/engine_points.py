"""The four standard tests of a workflow (style.md) on the real engine: real DBOS, real database, and processes that really die.

`python engine_points.py FOLDER [--url POSTGRESQL] [--whole]` plays one server again and again: each step's process dies before its effect and after its
effect (before the engine's record), each step runs twice, each fails for good, each wait runs out. The steps are discovered by a first run. Lives are
forks of one process, so that only the first pays for imports. A life that finds a run of the one before takes it up, and then begins the next.
Without FOLDER (`make crashes`): in a new one, on SQLite and then on a PostgreSQL of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from test_reinstall_workflow import PASSWORD, World

from repave.bmc import Power
from repave.domain.model import InstanceState
from repave.domain.states import Ending
from repave.errors import RunFailed
from repave.lab.postgres import start_postgres
from repave.lab.processes import end_on_sigterm
from repave.secrets import Sealer
from repave.store import Store
from repave.workflow.engine import Engine
from repave.workflow.fleet import Fleet
from repave.workflow.reinstall import Waits

PATIENT = Waits(agent_ready_s=30, written_s=30, proof_s=30, forward_pause_s=0.05, return_pause_s=0.05)
HASTY_S = 1.0
WAITS = {"agent-ready": "agent_ready_s", "written": "written_s", "report": "written_s", "proof": "proof_s"}
AFTER_SILENCE = {"agent-ready": "returned", "written": "returned", "report": "write-failed", "proof": "unproved"}
_DIED = 42


@dataclass(frozen=True)
class Act:
    """One run: where its process dies or what goes wrong, and how it must end."""

    name: str
    ends: str = "proved"
    dies_before: str = ""
    dies_after: str = ""
    twice: bool = False
    fails: str = ""
    silent: str = ""  # what the machine never does


class Steps:
    """The effects of a run; the process dies, or the effect fails, where the act says. `spared`: the run of an earlier life, its act without the death."""

    def __init__(self, world: World, act: Act, spared: str, before: Act) -> None:
        self._world, self._act, self._spared = world, act, spared
        self._before = replace(before, dies_before="", dies_after="")
        self.heard: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        effect = getattr(self._world.effects, name)

        def do(run_id: str, *how: Any) -> Any:
            act = self._before if run_id == self._spared else self._act
            if name == act.dies_before:
                os._exit(_DIED)
            if run_id != self._spared:
                self.heard.append(name)
            if name == act.fails:
                raise RunFailed("unreachable", "for good")
            for _ in range(2 if act.twice else 1):
                done = effect(run_id, *how)
            save(self._world)
            if name == act.dies_after:
                os._exit(_DIED)
            return done

        return do


def save(world: World) -> None:
    """The machine outlives our processes."""
    value = asdict(world.machine) | {"power": world.machine.power.value, "silent": [], "refuses": [], "refuses_once": [], "actions": []}
    new = world.folder / f"machine.{threading.get_ident()}"
    new.write_text(json.dumps(value))
    new.replace(world.folder / "machine.json")


def load(world: World) -> None:
    value = json.loads((world.folder / "machine.json").read_text())
    world.machine.__dict__.update(value | {"power": Power(value["power"]), "silent": set(), "refuses": set(), "refuses_once": set()})


def play_machine(world: World) -> None:
    """What the ramdisk and the new OS report, each once. For ever."""
    while True:
        time.sleep(0.02)
        with contextlib.suppress(IndexError, sa.exc.OperationalError):  # no run yet, or a database that is busy: again
            run = world.store.runs.list_runs(live=True)[0]
            world.run_id = run.id
            if run.ready_at is None:
                world.machine_turn("agent-ready")
            elif run.plan is not None and run.report is None:
                world.machine_turn("written")
                save(world)
            elif run.verified_at is not None and run.proof is None and world.machine.os == "new-os":
                world.machine_turn("proof")


def live(world: World, url: str, act: Act | None, before: Act | None, tell: Callable[[list[str], list[str]], None]) -> None:
    """One life: the run of the life `before` goes on to its end, then `act` is begun. Each run that ended is told: what is wrong, and its steps.

    It may die in the act, so what became of the run before is told first.
    """
    store = Store.open(url, sealer=Sealer.open(world.folder / "secret" / "key"), now=lambda: datetime.now(UTC))
    world.store = world.effects.store = store
    load(world)
    spared = store.runs.list_runs()[-1].id if before else ""
    steps = Steps(world, act or Act(""), spared, before or Act(""))
    silent = {a.silent for a in (before, act) if a and a.silent}  # one at most: see `Theatre.play`
    waits = Waits(**(asdict(PATIENT) | {WAITS[s]: HASTY_S for s in silent}))
    world.machine.silent = silent
    engine = Engine(store, url, world.folder / "worker.lock", waits=waits)
    fleet = Fleet(store, engine.enqueue, run_timeout_s=3600)
    engine.start(steps)  # type: ignore[arg-type]
    threading.Thread(target=play_machine, args=(world,), daemon=True).start()
    if before:
        tell(judge(world, engine, spared, before), [])
    if act:
        world.machine.silent = {act.silent} - {""}
        batch = fleet.admit(credential=world.credential, instance_ids=[world.instance.id], image_id=world.image.id, password=PASSWORD).batch_id
        tell(judge(world, engine, store.runs.list_runs(batch_id=batch)[0].id, act), steps.heard)


def judge(world: World, engine: Engine, run_id: str, act: Act) -> list[str]:
    """The run is over, and so is its workflow: what is not as it must be."""
    store, machine, deadline = world.store, world.machine, time.monotonic() + 60
    while store.runs.get_run(run_id).ended_at is None or engine._workflow_statuses([run_id]).get(run_id) in ("ENQUEUED", "PENDING"):
        if time.monotonic() > deadline:
            return [f"{act.name}: still in {store.runs.get_run(run_id).step}"]
        time.sleep(0.02)
    run, state = store.runs.get_run(run_id), world.state()
    kinds = Counter(e.type for e in store.events.list_events(world.credential.project_id, batch_id=run.batch_id))
    good = act.ends in ("proved", "late-proof", "returned")
    seen = {
        "outcome": (run.outcome, act.ends),
        "state": (state.state, InstanceState.RUNNING if good else InstanceState.ERROR),
        "power": (machine.power, Power.OFF if act.ends == "write-failed" else Power.ON),
        "system": (machine.os, "" if act.ends == "write-failed" else machine.disk),
        "media": ((machine.media, machine.override), ("", False)),
        "accepted, crossed, ended": (
            (kinds["run.accepted"], kinds["run.crossed"], kinds["run.ended"]), (1, int(act.ends != "returned"), 2 if act.ends == "late-proof" else 1),
        ),
        "workflow": (engine._workflow_statuses([run_id])[run_id], "SUCCESS"),
        "keys": (sorted(p.name for p in (world.folder / "secret/run-keys").iterdir()), []),
    }  # fmt: skip
    if act.fails == "boot_new_os":  # nobody takes the media out of a server whose BMC does nothing
        del seen["media"], seen["system"]
    return [f"{act.name}: {what} is {is_}, not {ought}" for what, (is_, ought) in seen.items() if is_ != ought]


class Theatre:
    """One server and its database; each life is a fork."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url or f"sqlite:///{folder / 'repave.db'}"
        self.world = World(folder, url=self.url)
        self.world.store.runs.record_ending(self.world.run_id, Ending.RETURNED, RunFailed("unreachable").as_json())  # it has no workflow
        self.world.effects.end(self.world.run_id, Ending.RETURNED, None)
        self.world.machine.disk = self.world.machine.os = "new-os"
        save(self.world)
        self.world.store.close()
        self.wrong: list[str] = []
        self.deaths = self.runs = self.judged = 0
        self._before: Act | None = None

    def play(self, act: Act) -> list[str]:
        """The act's steps, [] where its life ended in it."""
        if self._before and self._before.silent != act.silent:
            self.rest()
        self.runs += 1
        return self._fork(act)

    def rest(self) -> None:
        """What a dead life left has ended."""
        if self._before:
            self._fork(None)

    def _fork(self, act: Act | None) -> list[str]:
        before, self._before = self._before, None
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                live(self.world, self.url, act, before, lambda *told: os.write(writer, f"{json.dumps(told)}\n".encode()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        try:
            with os.fdopen(reader) as pipe:
                said = pipe.read()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if os.environ.get("VERBOSE"):
            print(f"{time.monotonic():.1f} {act} {status} {said}", flush=True)
        told = [json.loads(line) for line in said.splitlines()]
        self.wrong += [line for wrong, _ in told for line in wrong]
        self.judged += len(told)
        if status == _DIED:
            self.deaths, self._before = self.deaths + 1, act
            return []
        dies = act is not None and (act.dies_before or act.dies_after)
        if status or dies:
            self.wrong.append(f"{act.name if act else 'rest'}: the life ended with status {status}")
            return []
        return list(told[-1][1])


PATHS = (
    Act("proved"),
    Act("returned", "returned", fails="plan"),
    Act("write-failed", "write-failed", silent="report"),
    Act("unproved", "unproved", silent="proof"),
)


def play_all(theatre: Theatre, *, whole: bool) -> str:
    """Every act. Not `whole`: a death after each step, and before those steps only that no other path has."""
    known: set[str] = set()
    for path in PATHS:
        steps = list(dict.fromkeys(theatre.play(path)))
        new = [s for s in steps if s not in known or s == "end"] if not whole else steps
        if path.name == "unproved" and not whole:
            new = []
        known |= set(steps)
        for step in new:
            if step != path.fails:  # that one has no effect to die after
                theatre.play(replace(path, name=f"{path.name}, dies after {step}", dies_after=step))
            if whole:
                theatre.play(replace(path, name=f"{path.name}, dies before {step}", dies_before=step))
        theatre.rest()
    twice = theatre.play(Act("each step twice", twice=True))
    for step in (s for s in twice if s != "end"):
        ends = {"boot_new_os": "unproved", "verify_proof": "late-proof"}.get(step, "returned")  # the proof itself is good, and counts
        theatre.play(Act(f"{step} fails for good", ends, fails=step))
    for event, ends in AFTER_SILENCE.items():
        if whole or event in ("agent-ready", "written"):  # the other two are paths of their own
            theatre.play(Act(f"no {event}", ends, silent=event))
    if theatre.judged != theatre.runs:
        theatre.wrong.append(f"{theatre.runs - theatre.judged} runs were not judged")
    return f"engine points: {theatre.deaths} deaths of the process, {theatre.runs} runs, {len(theatre.wrong)} violations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--url", default="")
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    wrong = False
    with contextlib.ExitStack() as stack:
        for folder, url in [(args.folder, args.url)] if args.folder else start_databases(stack):
            theatre = Theatre(folder, url)
            last = play_all(theatre, whole=args.whole)
            print(*theatre.wrong, last, sep="\n", flush=True)
            wrong = wrong or bool(theatre.wrong)
    sys.exit(wrong)


def start_databases(stack: contextlib.ExitStack) -> Iterator[tuple[Path, str]]:
    """A folder for each kind of database, and its URL ("": a file in the folder)."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rpe-", dir="/tmp")))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    for name in ("sqlite", "postgresql"):
        (folder / name).mkdir()
    yield folder / "sqlite", ""
    yield folder / "postgresql", stack.enter_context(start_postgres(folder / "server"))


if __name__ == "__main__":
    end_on_sigterm()
    main()
