"""Each observer's twin: a bug of one line in a copy of the source, and the scene that must turn its observer red on a real service and rack."""

from __future__ import annotations

from planting import Bug

_EFFECTS, _RUNS, _FLEET = "src/repave/workflow/effects.py", "src/repave/store/runs.py", "src/repave/workflow/fleet.py"
_WAVES = "src/repave/domain/waves.py"
_AGENT, _CROSS = "src/repave/agent/main.py", "                lease = self._cross(plan)\n"
_WRITE = "__import__('os').pwrite(__import__('os').open(opened.path, 1), b'x', 1 << 20); __import__('os').sync(); __import__('time').sleep(1.5)"
_EARLY = f"                {_WRITE}\n{_CROSS}"
_PASSWORD = "find_password(store, server, functools.partial(probe_bmc, count=metrics.count_bmc)))"
_REHEARSE = "                if plan.rehearse:"
_INSERT, _SAY = "            bmc.insert_media(", "            __import__('sys').stderr.write"
_END = "        self.store.sealer.destroy_run(run_id)\n"


def _scene(says: str, path: str, old: str, new: str, finds: str, scene: tuple[str, ...] = ("lab01",), **also: tuple[str, str, str]) -> Bug:
    """`finds` is what must be said of the scene with these machines."""
    return Bug(says, path, old, new, finds, ("scene.py", *scene), "tests/outside", **also)


BUGS = (
    _scene("the plan names another disk", _EFFECTS, 'choose_root_disk(found["disks"], server.root_disk)', 'found["disks"][-1]', "I1 lab01: the data disk"),
    _scene("an instance under way may be reinstalled", "src/repave/domain/states.py", "    (_S.ERROR, Ending.ACCEPTED, None):",
        '    (_S.PENDING, Ending.ACCEPTED, None): (Situation(_S.PENDING, _O.REINSTALL_PROCESSING), ""),\n    (_S.ERROR, Ending.ACCEPTED, None):',
        "I2 ", ("--twice", "lab01")),
    _scene("a failed write leaves the server on", _EFFECTS, "            self._take_media_out(bmc, server, run_id)\n        self.store",
        "            self._take_media_out(bmc, server, run_id)\n            bmc.power_on()\n        self.store", "I2 ", ("lab04",)),
    _scene("the old system's first sector stays until the end", "src/repave/agent/writer.py",
        "        self.disk.write_zeros(0, sector)\n        self.disk.flush()\n        table = sector + -(-TABLE_BYTES // sector) * sector\n",
        "        table = sector + -(-TABLE_BYTES // sector) * sector\n        return\n", "I3 ", ("lab04",)),
    _scene("an ending loses its cause", _EFFECTS, "record_ending(run_id, ending, error)", "record_ending(run_id, ending, None)", "I4 ", ("lab04",)),
    _scene("no call home is a success", "src/repave/workflow/reinstall.py", "do, Ending.UNPROVED, cause)", "do, Ending.PROVED, None)", "I5 ", ("lab03",)),
    _scene("another image is written", _EFFECTS, "manifest_sha256=image.manifest_sha256",
        "manifest_sha256=next(i.manifest_sha256 for i in self.store.images.list_images(run.project_id) if i.id != image.id)", "I5 "),
    _scene("the old system is not started again", _EFFECTS, "            if run.found_state is InstanceState.RUNNING:\n                bmc.power_on()",
        "            if False:\n                bmc.power_on()", "I6 ", ("lab02",)),
    _scene("a refused request leaves keys", _FLEET, "        instances = self._find_instances(",
        "        self.store.sealer.make_run_keys([new_id()])\n        instances = self._find_instances(", "I7 ", ("--nothing",)),
    _scene("the hash is stored in clear", _FLEET, "sealer.seal_for_run(run_id, json.dumps(", "str(json.dumps(", "I8 ", ("lab01",)),
    _scene("the password is logged, in base64", _FLEET, "        instances = self._find_instances(",
        "        __import__('sys').stderr.write(__import__('base64').b64encode(f'x{password}'.encode()).decode())\n"
        "        instances = self._find_instances(", "I8 ", ("lab01",)),
    _scene("one id has no run", _RUNS, "for n, run in enumerate(runs, 1)]", "for n, run in enumerate(runs[1:], 1)]", "I9 ", ("lab01", "lab03")),
    _scene("a BMC is shown another's login", "src/repave/app.py", _PASSWORD,
        _PASSWORD.replace("store, server,", "store, store.servers.list_servers(server.project_id)[0][-1],"), "I10 ", ("lab01",)),
    _scene("a server is touched after the end", _EFFECTS, _END,
        _END + "        with self.open_bmc(self.store.servers.get_server(self.store.runs.get_run(run_id).server_id)) as bmc:\n            bmc.power_off()\n",
        "I11 ", ("lab01",)),
    _scene("operation_state is lost", "src/repave/store/endings.py", "after.operation.value if after.operation else None", "None", "I12 ", ("lab01",)),
    _scene("a run's keys outlive it", _EFFECTS, _END, "", "I13 ", ("lab01",)),
    _scene("media stay in", _EFFECTS, "        bmc.boot_from_disk()\n        bmc.eject_media()\n", "        bmc.boot_from_disk()\n", "I13 ", ("lab01",)),
    _scene("another server is powered off", _EFFECTS, "            forced = bmc.power_off(",
        "            with self.open_bmc(self.store.servers.list_servers(server.project_id)[0][-1]) as other:\n                other.power_off()\n"
        "            forced = bmc.power_off(", "I14 ", ("lab01",)),
    _scene("the crossing is not audited", _RUNS, "            if row.crossed_at is None:\n                self._run_event",
        "            if False:\n                self._run_event", "I15 ", ("lab01",)),
    _scene("the agent writes before it asks to cross", _AGENT, _CROSS, _EARLY, "I15 lab01: the root disk was written", ("lab01",)),
    _scene("a rehearsal writes on a real disk", _AGENT, _REHEARSE, f"                {_WRITE}\n{_REHEARSE}", "I6 ",
        ("--real", "--rehearse", "lab01")),
    _scene("another image is written to a real disk", _EFFECTS, "manifest_sha256=image.manifest_sha256",
        "manifest_sha256=next(i.manifest_sha256 for i in self.store.images.list_images(run.project_id) if i.id != image.id)", "I5 ", ("--real", "lab01")),
    _scene("the agent's token is logged", _EFFECTS, _INSERT, f"{_SAY}(self.store.sealer.derive_for_run(run_id, 'agent'))\n{_INSERT}", "I8 ", ("lab01",)),
    _scene("the hash is stored in clear, on PostgreSQL", _FLEET, "sealer.seal_for_run(run_id, json.dumps(", "str(json.dumps(", "I8 ", ("--postgres", "lab01")),
    _scene("a run is said to have ended later than it did", "src/repave/store/endings.py", "    ended_at = row.ended_at or now\n",
        "    ended_at = row.ended_at or now + __import__('datetime').timedelta(seconds=60)\n", "I4 lab01: the client saw", ("lab01",)),
    _scene("a file stays open for each look at a BMC", "src/repave/app.py", "        recognize = functools.partial(verify_system, server)\n",
        "        __import__('builtins').__dict__.setdefault('kept', []).append(open('/dev/null'))\n"
        "        recognize = functools.partial(verify_system, server)\n", "I13 process"),
    _scene("what begins is not counted for its batch", _WAVES, "                at_once += 1\n", "", "I14 ",
        ("--at-once", "1", "lab01", "lab03")),
    _scene("the power-off is not audited", _EFFECTS, "        self.store.runs.record_step(run_id, Step.POWER_OFF)\n", "", "I15 lab01: POST", ("lab01",)),
    _scene("an event does not say which came before it", "src/repave/store/database.py", "link(self.sealer, mac, event)", 'link(self.sealer, "", event)',
        "I15 event", ("lab01",)),
    _scene("a locked server is reinstalled", _FLEET, "[s for s in servers if s.locked_at is not None]", "[]", "I14 lab01: it is locked", ("--locked", "lab01"),
        also=(_RUNS, "expanding=True)), SERVERS.c.locked_at.is_(None))", "expanding=True)))")),
    _scene("what begins is not counted for the site", _WAVES, "racks.total() >= limits.runs_at_once", "False", "I14 2 servers of the site",
        ("--limits", "1", "0", "lab01", "lab03")),
    _scene("what begins is not counted for its rack", _WAVES, "racks[place.rack] >= limits.rack_at_once", "False", "I14 2 servers of the site",
        ("--limits", "0", "1", "lab01", "lab03")),
    _scene("a BMC is shown a wrong password", "src/repave/app.py", _PASSWORD,
        f'{_PASSWORD[:-1]} + "x")', "I10 lab01: was shown", ("--real", "lab01")),
)  # fmt: skip
