"""Sabotage: each observer's twin, a bug of one line in a copy of the source, which must turn it red. `make sabotage`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORLDS = ("--seeds", "400", "--jobs", "1", "--until-broken")


@dataclass(frozen=True)
class Bug:
    """`finds` is what must be said; `lane` the program that must say it."""

    says: str
    path: str
    old: str
    new: str
    finds: str
    lane: tuple[str, ...] = (".", *WORLDS)


_EFFECTS, _RUNS, _FLEET = "src/repave/workflow/effects.py", "src/repave/store/runs.py", "src/repave/workflow/fleet.py"
_WAVES, _ENDINGS, _LEASE = "src/repave/domain/waves.py", "src/repave/store/endings.py", "src/repave/workflow/lease.py"
_REINSTALL, _TIMING = "src/repave/workflow/reinstall.py", "src/repave/domain/timing.py"
_SWEEP = "src/repave/workflow/media_sweep.py"
_OLD_PROOF = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "returned: an old proof comes")
_LOGIN = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "return-failed: login refused")
_SLOW = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "proved: slow, learnt")
_CRASH = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "proved", "--down", "120")
BUGS = (
    Bug("the plan names another disk", _EFFECTS, 'choose_root_disk(found["disks"], server.root_disk)', 'found["disks"][-1]', "I1 "),
    Bug("LBA 0 is not cleared first", "tests/simulation/far_end.py", 'for place in ("lba0", "table", "backup")', 'for place in ("table", "backup")', "I3 "),
    Bug("an ending loses its cause", _EFFECTS, "record_ending(run_id, ending, error)", "record_ending(run_id, ending, None)", "I4 "),
    Bug("the proof is not compared", _EFFECTS, "        verify_proof(run)\n        return None", "        return None", "I5 "),
    Bug("the old system is not started again", _EFFECTS, "            if run.found_state is InstanceState.RUNNING:\n                bmc.power_on()",
        "            if False:\n                bmc.power_on()", "I6 "),
    Bug("the line is not asked for on the way back", _RUNS, ".scalar_one() is None", ".scalar_one() is None or True", "I6 "),
    Bug("a refused request leaves keys", _FLEET, "        busy = [", "        self.store.sealer.make_run_keys([new_id()])\n        busy = [", "I7 "),
    Bug("the hash is stored in clear", _FLEET, "sealer.seal_for_run(run_id, json.dumps(", "str(json.dumps(", "I8 "),
    Bug("one id has no run", _RUNS, "for n, run in enumerate(runs, 1)]", "for n, run in enumerate(runs[1:], 1)]", "I9 "),
    Bug("a server is touched after the end", _EFFECTS, "        self.store.sealer.destroy_run(run_id)\n",
        "        self.store.sealer.destroy_run(run_id)\n"
        "        with self.open_bmc(self.store.servers.get_server(self.store.runs.get_run(run_id).server_id)) as bmc:\n            bmc.eject_media()\n",
        "I11 "),
    Bug("who answers at a BMC's address is not looked at", _EFFECTS,
        'if are_of_two(known, seen):\n            raise RunFailed("wrong-server", f"The BMC',
        'if False:\n            raise RunFailed("wrong-server", f"The BMC', "went to another machine"),
    Bug("operation_state is lost", "src/repave/store/endings.py", "after.operation.value if after.operation else None", "None", "I12 "),
    Bug("a run's keys outlive it", _EFFECTS, "        self.store.sealer.destroy_run(run_id)\n", "", "I13 "),
    Bug("media stay in", _EFFECTS, "        bmc.boot_from_disk()\n        bmc.eject_media()\n", "        bmc.boot_from_disk()\n", "I13 "),
    Bug("media that a BMC kept are forgotten", _SWEEP, "            found = bmc.withdraw_media(media_folder(run_id))",
        "            found = False", "I13 "),
    Bug("another server is powered off", _EFFECTS, "            forced = bmc.power_off(",
        "            with self.open_bmc(self.store.servers.list_servers(server.project_id)[0][-1]) as other:\n                other.power_off()\n"
        "            forced = bmc.power_off(", "I14 "),
    Bug("the crossing is not audited", _RUNS, "            if row.crossed_at is None:\n                self._run_event",
        "            if False:\n                self._run_event", "I15 "),
    Bug("an event does not say which came before it", "src/repave/store/database.py", "link(self.sealer, mac, event)", 'link(self.sealer, "", event)', "I15 "),
    Bug("a repeated step cuts the first boot", _EFFECTS, "if run.step is not Step.FIRST_BOOT:", "if True:", "ended unproved, not proved", _CRASH),
    Bug("an old run's proof counts", _RUNS, 'return row is not None and row["epoch"] == run.epoch', "return True", "I5 ", _OLD_PROOF),
    Bug("what a stopped batch left does not say so", _ENDINGS, 'f"not started: {reason}"', "reason", "I17 a run that was not started"),
    Bug("a pause is overlooked", _WAVES, "if batch.paused:", "if False:", "I17 a run began at"),
    Bug("the canaries do not go first", _WAVES, "if canaries_open and", "if False and", "I17 a run began before all canaries"),
    Bug("what begins is not counted for its batch", _WAVES, "                at_once += 1\n", "", "I17 "),
    Bug("what begins is not counted for its rack", _WAVES, "                racks[place.rack] += 1\n", "", "I17 "),
    Bug("one failure too many is allowed", _WAVES, "failed > waves.max_failed", "failed > waves.max_failed + 1", "and the batch was not stopped"),
    Bug("a cancel stops what has crossed", _ENDINGS, "RUNS.c.crossed_at.is_(None), RUNS.c.closed_at.is_(None)", "RUNS.c.closed_at.is_(None)", "I18 "),
    Bug("a cancelled run still sends what was under way", _EFFECTS, "            self._refuse_over(self._get_live(run_id))",
        "            self._get_live(run_id)", "after a cancel was answered"),
    Bug("a rehearsal is admitted as a reinstall", _FLEET, "rehearse=rehearse,", "rehearse=False,", "I19 "),
    Bug("the plan does not say that it is a rehearsal", _EFFECTS, "rehearse=run.rehearse", "rehearse=False", "nothing went wrong, and a run ended"),
    Bug("a retry takes what went well too", "src/repave/store/batches.py", "RUNS.c.outcome.not_in(good)", "RUNS.c.outcome.is_not(None)", "I9 "),
    Bug("what can not pass is tried again", _REINSTALL, "do.insert_media, waits.forward_pause_s, on=is_passing)", "do.insert_media, waits.forward_pause_s)",
        "I20 ", _LOGIN),
    Bug("what was learnt is not used", _TIMING, 'if "learnt_s" in known:', "if False:", "longer than what was learnt"),
    Bug("what was learnt is from too few", _TIMING, "ALIKE_ENOUGH, ALIKE_NEWEST = 8,", "ALIKE_ENOUGH, ALIKE_NEWEST = 1,", "by what was not learnt"),
    Bug("what was learnt leaves no time for a firmware update", _TIMING, "PATIENCE, PATIENCE_S = 3.0, 10 * 60.0", "PATIENCE, PATIENCE_S = 3.0, 0.0",
        "ended returned", _SLOW),
    Bug("a server that failed is not waited for longer", _RUNS, 'last["outcome"] not in GOOD_ENDINGS', "False", "though its last run"),
    Bug("a worker acts without its lease", _LEASE, "_boot_s() - self._renewed_at < self._times.fence_s)", "True)", "I16 "),
    Bug("a worker whose runs were taken goes on", _LEASE, 'self._end("another worker owns our runs now", REAPED)', "pass", "I16 "),
    Bug("the runs of a living worker are taken", _LEASE, "int(self._times.lease_s * 1000)", "int(self._times.lease_s * 100)", "I16 "),
)  # fmt: skip


def plant(bug: Bug) -> tuple[bool, str]:
    """Whether the bug was found, and what was said."""
    with tempfile.TemporaryDirectory(prefix="repave-sabotage-") as folder:
        for part in ("src", "tests/simulation"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder) / bug.path
        text = path.read_text()
        if text.count(bug.old) < 1:
            return False, f"the line is not there any more: {bug.old!r}"
        path.write_text(text.replace(bug.old, bug.new, 1))
        env = os.environ | {"PYTHONPATH": str(Path(folder) / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *bug.lane], cwd=Path(folder) / "tests/simulation", env=env, capture_output=True, text=True, timeout=900, check=False
        )
        said = [line for line in done.stdout.splitlines() if bug.finds in line]
        return bool(done.returncode) and bool(said), said[0] if said else (done.stdout + done.stderr)[-600:]


def main() -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(plant, BUGS))
    for bug, (found, said) in zip(BUGS, results, strict=True):
        print(f"{'found' if found else 'MISSED':8}{bug.says}: {said.strip()[:200]}")
    hits = sum(found for found, _ in results)
    print(f"sabotage: {len(BUGS)} planted, {hits} found")
    sys.exit(hits != len(BUGS))


if __name__ == "__main__":
    main()
