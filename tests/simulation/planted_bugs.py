"""Sabotage: each observer's twin, a bug of one line in a copy of the source, which must turn it red. `make sabotage`."""

from __future__ import annotations

from planting import Bug

WORLDS = (".", "--seeds", "400", "--jobs", "1", "--until-broken")
_EFFECTS, _RUNS, _FLEET = "src/repave/workflow/effects.py", "src/repave/store/runs.py", "src/repave/workflow/fleet.py"
_WAVES, _ENDINGS, _LEASE = "src/repave/domain/waves.py", "src/repave/store/endings.py", "src/repave/workflow/lease.py"
_REINSTALL, _TIMING = "src/repave/workflow/reinstall.py", "src/repave/domain/timing.py"
_SWEEP = "src/repave/workflow/media_sweep.py"
_OLD_PROOF = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "returned: an old proof comes")
_LOGIN = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "return-failed: login refused")
_SLOW = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "proved: slow, learnt")
_CRASH = ("crash_points.py", "--pairs", "0", "--jobs", "1", "--only", "proved", "--down", "120")


def _world(says: str, path: str, old: str, new: str, finds: str, lane: tuple[str, ...] = WORLDS) -> Bug:
    """`finds` is what must be in a line; `lane` the program that must say it."""
    return Bug(says, path, old, new, f"*{finds}", lane, "tests/simulation")


BUGS = (
    _world("the plan names another disk", _EFFECTS, 'choose_root_disk(found["disks"], server.root_disk)', 'found["disks"][-1]', "I1 "),
    _world("LBA 0 is not cleared first", "tests/simulation/far_end.py", 'for place in ("lba0", "table", "backup")', 'for place in ("table", "backup")', "I3 "),
    _world("an ending loses its cause", _EFFECTS, "record_ending(run_id, ending, error)", "record_ending(run_id, ending, None)", "I4 "),
    _world("the proof is not compared", _EFFECTS, "        verify_proof(run)\n        return None", "        return None", "I5 "),
    _world("the old system is not started again", _EFFECTS, "            if run.found_state is InstanceState.RUNNING:\n                bmc.power_on()",
        "            if False:\n                bmc.power_on()", "I6 "),
    _world("the line is not asked for on the way back", _RUNS, ".scalar_one() is None", ".scalar_one() is None or True", "I6 "),
    _world("a refused request leaves keys", _FLEET, "        busy = [", "        self.store.sealer.make_run_keys([new_id()])\n        busy = [", "I7 "),
    _world("the hash is stored in clear", _FLEET, "sealer.seal_for_run(run_id, json.dumps(", "str(json.dumps(", "I8 "),
    _world("one id has no run", _RUNS, "for n, run in enumerate(runs, 1)]", "for n, run in enumerate(runs[1:], 1)]", "I9 "),
    _world("a server is touched after the end", _EFFECTS, "        self.store.sealer.destroy_run(run_id)\n",
        "        self.store.sealer.destroy_run(run_id)\n"
        "        with self.open_bmc(self.store.servers.get_server(self.store.runs.get_run(run_id).server_id)) as bmc:\n            bmc.eject_media()\n",
        "I11 "),
    _world("who answers at a BMC's address is not looked at", _EFFECTS,
        'if are_of_two(known, seen):\n            raise RunFailed("wrong-server", f"The BMC',
        'if False:\n            raise RunFailed("wrong-server", f"The BMC', "went to another machine"),
    _world("operation_state is lost", "src/repave/store/endings.py", "after.operation.value if after.operation else None", "None", "I12 "),
    _world("a run's keys outlive it", _EFFECTS, "        self.store.sealer.destroy_run(run_id)\n", "", "I13 "),
    _world("media stay in", _EFFECTS, "        bmc.boot_from_disk()\n        bmc.eject_media()\n", "        bmc.boot_from_disk()\n", "I13 "),
    _world("media that a BMC kept are forgotten", _SWEEP, "            found = bmc.withdraw_media(media_folder(run_id))",
        "            found = False", "I13 "),
    _world("another server is powered off", _EFFECTS, "            forced = bmc.power_off(",
        "            with self.open_bmc(self.store.servers.list_servers(server.project_id)[0][-1]) as other:\n                other.power_off()\n"
        "            forced = bmc.power_off(", "I14 "),
    _world("the crossing is not audited", _RUNS, "            if row.crossed_at is None:\n                self._run_event",
        "            if False:\n                self._run_event", "I15 "),
    _world("an event does not say which came before it", "src/repave/store/database.py",
        "link(self.sealer, mac, event)", 'link(self.sealer, "", event)', "I15 "),
    _world("a repeated step cuts the first boot", _EFFECTS, "if run.step is not Step.FIRST_BOOT:", "if True:", "ended unproved, not proved", _CRASH),
    _world("an old run's proof counts", _RUNS, 'return row is not None and row["epoch"] == run.epoch', "return True", "I5 ", _OLD_PROOF),
    _world("what a stopped batch left does not say so", _ENDINGS, 'f"not started: {reason}"', "reason", "I17 a run that was not started"),
    _world("a pause is overlooked", _WAVES, "if batch.paused:", "if False:", "I17 a run began at"),
    _world("the canaries do not go first", _WAVES, "if canaries_open and", "if False and", "I17 a run began before all canaries"),
    _world("what begins is not counted for its batch", _WAVES, "                at_once += 1\n", "", "I17 "),
    _world("what begins is not counted for its rack", _WAVES, "                racks[place.rack] += 1\n", "", "I17 "),
    _world("one failure too many is allowed", _WAVES, "failed > waves.max_failed", "failed > waves.max_failed + 1", "and the batch was not stopped"),
    _world("a cancel stops what has crossed", _ENDINGS, "RUNS.c.crossed_at.is_(None), RUNS.c.closed_at.is_(None)", "RUNS.c.closed_at.is_(None)", "I18 "),
    _world("a cancelled run still sends what was under way", _EFFECTS, "            self._refuse_over(self._get_live(run_id))",
        "            self._get_live(run_id)", "after a cancel was answered"),
    _world("a rehearsal is admitted as a reinstall", _FLEET, "rehearse=rehearse,", "rehearse=False,", "I19 "),
    _world("the plan does not say that it is a rehearsal", _EFFECTS, "rehearse=run.rehearse", "rehearse=False", "nothing went wrong, and a run ended"),
    _world("a retry takes what went well too", "src/repave/store/batches.py", "RUNS.c.outcome.not_in(good)", "RUNS.c.outcome.is_not(None)", "I9 "),
    _world("what can not pass is tried again", _REINSTALL, "do.insert_media, waits.forward_pause_s, on=is_passing)", "do.insert_media, waits.forward_pause_s)",
        "I20 ", _LOGIN),
    _world("what was learnt is not used", _TIMING, 'if "learnt_s" in known:', "if False:", "longer than what was learnt"),
    _world("what was learnt is from too few", _TIMING, "ALIKE_ENOUGH, ALIKE_NEWEST = 8,", "ALIKE_ENOUGH, ALIKE_NEWEST = 1,", "by what was not learnt"),
    _world("what was learnt leaves no time for a firmware update", _TIMING, "PATIENCE, PATIENCE_S = 3.0, 10 * 60.0", "PATIENCE, PATIENCE_S = 3.0, 0.0",
        "ended returned", _SLOW),
    _world("a server that failed is not waited for longer", _RUNS, 'last["outcome"] not in GOOD_ENDINGS', "False", "though its last run"),
    _world("a worker acts without its lease", _LEASE, "_boot_s() - self._renewed_at < self._times.fence_s)", "True)", "I16 "),
    _world("a worker whose runs were taken goes on", _LEASE, 'self._end("another worker owns our runs now", REAPED)', "pass", "I16 "),
    _world("the runs of a living worker are taken", _LEASE, "int(self._times.lease_s * 1000)", "int(self._times.lease_s * 100)", "I16 "),
)  # fmt: skip
