"""The invariants I1-I15, I20 and I21 (trust.md D), from outside: disks, power, BMC logs, systems that ran, a client's polls; of the database only its rows.

Each returns what is broken, in sentences that begin with the invariant's name. What a fault makes impossible (nobody ejects media through a BMC
that is gone for good) is excused by name, for that machine and that round; nothing else is.
"""

from __future__ import annotations

import itertools
import json
import re
from datetime import datetime
from typing import Any

import past
from durable import START
from far_end import CHANGES
from fleet_observers import observe_fleet
from service import HASH
from world import Round, World

from repave.domain.states import TABLE
from repave.workflow.reinstall import DEFAULT_WAITS, TRIES

GRACE_S = 2400.0  # past a run's deadline: the tries of its ending, and the reaper's own grace
BOOT_S = 200.0
# The server could not be reached or was moved by somebody else: what it is at the end is not ours to promise.
NO_HAND = {"bmc-away", "bmc-refuses", "bmc-busy", "bmc-lost-request", "bmc-lost-answer", "bmc-late", "power-cut", "reset", "off-is-late", "login-refused",
           "other-machine"}  # fmt: skip
AWAY = {"bmc-away", "bmc-late", "other-machine"}  # it may be away still, or put media in when all was done


def seconds(text: str) -> float:
    return (datetime.fromisoformat(text.replace("Z", "+00:00")) - START).total_seconds()


def observe(world: World) -> list[str]:
    """Everything that is broken in this world, now that it has come to rest."""
    broken = list(world.broken)
    broken += [f"I0 nobody foresaw: {e}" for e in world.service.errors]
    broken += world.service.broken
    runs = _runs(world)
    for name, machine in world.machines.items():
        broken += machine.horrors
        mine = [r for r in runs if r["instance_id"] == world.instances[name].id]
        for check in (writes, ends, truth, before_line, calls, history, audit, logins, waits):
            broken += check(world, name, mine)
    return broken + observe_fleet(world, runs, seconds) + count(world, runs) + leftovers(world, runs) + secrets(world) + chain(world) + bystanders(world)


def _runs(world: World) -> list[dict[str, Any]]:
    names = ("id", "batch_id", "instance_id", "server_id", "epoch", "found_state", "created_at", "deadline_at", "crossed_at", "ended_at", "outcome", "error",
             "plan", "released_at", "number", "closed_at")  # fmt: skip
    return [dict(zip(names, row, strict=True)) for row in world.disk.rows(f"SELECT {', '.join(names)} FROM runs WHERE epoch > 0 ORDER BY server_id, epoch")]


def _round_of(world: World, run: dict[str, Any]) -> Round:
    """By time: a request whose answer was lost may have ended before it was repeated, and then both were of one round."""
    return [this for this in world.rounds if this.began <= seconds(run["created_at"]) + 0.001][-1]


def writes(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I1: only the planned disk, after the plan, of a run that was live. I2: never two writers."""
    machine, broken = world.machines[name], []
    if machine.data.writes:
        broken.append(f"I1 {name}: the data disk was written")
    by_boot: dict[str, list[float]] = {}
    for write in machine.root.writes:
        by_boot.setdefault(write.boot_id, []).append(write.at)
        served = [p for at, boot, p in machine.plans if boot == write.boot_id and at <= write.at]
        if not served or served[-1]["disk_serial"] != machine.root.serial:
            broken.append(f"I1 {name}: {write.place} written at {write.at:.0f} s without a plan")
        run = [r for r in runs if seconds(r["created_at"]) <= write.at]
        if not run or not run[-1]["crossed_at"] or seconds(run[-1]["crossed_at"]) > write.at:
            broken.append(f"I1 {name}: {write.place} written at {write.at:.0f} s before the line")
        elif run[-1]["ended_at"] and write.at > seconds(run[-1]["ended_at"]) + 60.5:
            broken.append(f"I2 {name}: {write.place} written at {write.at:.0f} s, after the end and its lease")
    spans = sorted((min(t), max(t)) for t in by_boot.values())
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        broken.append(f"I2 {name}: two wrote at once")
    return broken


def ends(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I4: every run ends by its deadline, with a cause if it failed."""
    broken = []
    for run in runs:
        if run["ended_at"] is None:
            broken.append(f"I4 {name}: run {run['epoch']} has no end")
        elif seconds(run["ended_at"]) > seconds(run["deadline_at"]) + GRACE_S:
            broken.append(f"I4 {name}: ended {seconds(run['ended_at']) - seconds(run['deadline_at']):.0f} s past its deadline")
        error = json.loads(run["error"]) if run["error"] else None
        if run["outcome"] not in ("proved", "late-proof", "rehearsed") and (not error or not error.get("cause")):
            broken.append(f"I4 {name}: {run['outcome']} without a cause")
    return broken


def truth(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I5: `running` after a reinstall = the image on the disk, and a call home of this run from that disk, by the new system. The drive is erased."""
    machine, broken = world.machines[name], []
    for run in runs:
        if run["outcome"] not in ("proved", "late-proof"):
            continue
        calls_ = [h for h in machine.homes if h.run_id == run["id"] and h.serial == machine.root.serial and h.system == world.system]
        if not calls_ or (calls_[0].at > seconds(run["ended_at"]) and run["outcome"] == "proved"):
            broken.append(f"I5 {name}: running without a call home from the planned disk")
        this = _round_of(world, run)
        after = this.after.get(name)
        if after and (set(after["disk"]) != {world.system} or after["config"] is not None):
            broken.append(f"I5 {name}: running, and the disk holds {after['disk']}")
        if after and "password-unusable" in this.troubles[name].fired and machine.trouble.fired:
            broken.append(f"I5 {name}: running, and nobody can log in")
    return broken


def before_line(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I6: what ended before the line left the disk as it was, and gave back what it found."""
    broken = []
    for run in runs:
        this = _round_of(world, run)
        after = this.after.get(name)
        if after is None or run["crossed_at"]:
            if after and run["outcome"] in ("returned", "rehearsed"):
                broken.append(f"I6 {name}: returned, and the line was crossed")
            continue
        if after["disk"] != this.disks[name]:
            broken.append(f"I6 {name}: {run['outcome']} before the line, and the disk was written")
        if run["outcome"] not in ("returned", "rehearsed") or this.troubles[name].fired & NO_HAND:
            continue
        if run["found_state"] == "running" and this.found[name] not in ("", "nothing") and (not after["on"] or after["runs"] != this.found[name]):
            broken.append(f"I6 {name}: {run['outcome']}, and {after['runs'] or 'nothing'} runs, not {this.found[name]}")
        if run["found_state"] == "error" and after["on"] and this.found[name] == "":
            broken.append(f"I6 {name}: there was no system, and the server is on")
        # What an earlier run left behind a BMC that was away is not this one's, where this one rightly touched nothing (seed 204).
        if (after["media"] or after["override"]) and (after["media"], after["override"]) != this.drives[name]:
            broken.append(f"I6 {name}: returned, and media or override are still there")
    return broken


def calls(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I11: every call that changes a server belonged to a run that was live; what takes left media out, to none."""
    changes = [c for c in world.machines[name].calls if c.action in CHANGES]
    return [
        f"I11 {name}: {c.action} at {c.at:.0f} s {'with' if c.live else 'without'} a live run"
        for c in changes
        if bool(c.live) == (c.action == "withdraw_media")
    ]


_SITUATIONS = {(after.state.value, after.operation.value if after.operation else None) for after, _ in TABLE.values()} | {("running", None), ("error", None)}


def history(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I12: what the client saw is a path of the table; nothing leaves an end without a new run, but for a late proof."""
    polls, broken = world.seen[name].polls, []
    for (before, state, operation, _), (at, after, after_operation, error) in itertools.pairwise(polls):
        if (after, after_operation) not in _SITUATIONS:
            broken.append(f"I12 {name}: {after}/{after_operation} is no row of the table")
        late = (state, after, after_operation) == ("error", "running", "reinstall-succeed") and any(h.at <= at for h in world.machines[name].homes)
        if state != "pending" and after != "pending" and (state, operation) != (after, after_operation) and not late:
            began = [r for r in runs if seconds(r["created_at"]) <= at]
            if not any(before - 5 <= seconds(r["created_at"]) for r in began):
                broken.append(f"I12 {name}: {state} became {after} at {at:.0f} s without a run")
        if after == "error" and not error:
            broken.append(f"I12 {name}: error without a cause")
    return broken


def audit(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I15: the plan and the crossing are in the audit before the first byte; each run is accepted once and ends once (twice with a late proof)."""
    broken = []
    for run in runs:
        events = world.disk.rows("SELECT type, at FROM events WHERE run_id = ? ORDER BY seq", run["id"])
        kinds = [e[0] for e in events]
        if kinds.count("run.accepted") != 1 or kinds.count("run.ended") != (2 if run["outcome"] == "late-proof" else 1):
            broken.append(f"I9 {name}: accepted {kinds.count('run.accepted')} times, ended {kinds.count('run.ended')} times ({run['outcome']})")
        later = [r["created_at"] for r in runs if r["epoch"] > run["epoch"]]
        if run["outcome"] == "late-proof" and later and max(e[1] for e in events if e[0] == "run.ended") > later[0]:
            broken.append(f"I5 {name}: the proof of an old run counted after a new one had begun")
        if [e[1] for e in events] != sorted(e[1] for e in events):
            broken.append(f"I15 {name}: the audit is out of order")
        began, ended = seconds(run["created_at"]), seconds(run["ended_at"] or run["deadline_at"])
        first = next((w.at for w in world.machines[name].root.writes if began <= w.at <= ended), None)
        crossed = next((seconds(e[1]) for e in events if e[0] == "run.crossed"), None)
        if first is not None and (crossed is None or crossed > first):
            broken.append(f"I15 {name}: written at {first:.0f} s, the crossing is in the audit at {crossed}")
    return broken


def logins(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I20: what can not pass is not tried again: a login that is refused counts against the account. One step meets it, then the tries of the way back."""
    if world.service.meddling.twice:
        return []
    calm = {r["id"] for r in runs if not (_round_of(world, r).crashes or _round_of(world, r).busy or _round_of(world, r).stops)}
    return [f"I20 {name}: {n} logins of one run were refused" for run_id, n in world.machines[name].refused_logins.items() if run_id in calm and n > 1 + TRIES]


_SILENCE = re.compile(r"No (agent-ready|proof) within \d+ minutes(; that is the setting|; the slowest of \d+ like it took|; the run's deadline left no more)?")
_WAITS = {"agent-ready": ("boot-ramdisk", DEFAULT_WAITS.agent_ready_s), "proof": ("first-boot", DEFAULT_WAITS.proof_s)}
ENOUGH, FACTOR, MORE_S = 8, 3, 600  # docs/adr/0003
SLOWLY_S = 300.0  # until power is on, and until somebody looks
WELL = ("proved", "late-proof", "rehearsed")
DARK = {"no-hello", "override-ignored", "no-proof", "late-proof"}


def waits(world: World, name: str, runs: list[dict[str, Any]]) -> list[str]:
    """I21: a run that ended for silence says by which limit; never before what was learnt, nor long after, nor by it where the server's last run went wrong."""
    broken, last = [], "proved"
    proved = world.disk.rows("SELECT ended_at, durations_s FROM runs WHERE outcome IN ('proved', 'late-proof')")
    for run in runs:
        said, before, last, this = _SILENCE.search(json.loads(run["error"] or "{}").get("cause", "")), last, run["outcome"], _round_of(world, run)
        if said is None:
            continue
        step, ceiling_s = _WAITS[said[1]]
        begun = seconds(world.disk.rows("SELECT min(at) FROM events WHERE run_id = ? AND type = 'run.step' AND data LIKE ?", run["id"], f'%"{step}"%')[0][0])
        waited_s, learnt = seconds(run["closed_at"]) - begun, "like it took" in said[0]
        took = [json.loads(d)[step] for at, d in proved if step in d and seconds(at) < begun + SLOWLY_S]
        where = f"I21 {name}: run {run['epoch']} waited {waited_s:.0f} s for {said[1]}"
        if said[2] is None:
            broken.append(f"{where} and does not say why so long")
        if learnt and (len(took) < ENOUGH or waited_s < past.SLOWEST_S[step] * (world.past > 0) + MORE_S - 1):
            broken.append(f"{where}, by what was not learnt")
        if learnt and before not in WELL:
            broken.append(f"{where}, by what was learnt, though its last run {before}")
        quiet = not (this.crashes or this.busy or this.stops) and this.troubles[name].fired <= DARK
        if quiet and world.past >= ENOUGH and before in WELL and waited_s > min(ceiling_s, max(max(took) * FACTOR, max(took) + MORE_S)) + SLOWLY_S:
            broken.append(f"{where}, longer than what was learnt")
    return broken


def count(world: World, runs: list[dict[str, Any]]) -> list[str]:
    """I9: a request makes one run for each id, or none."""
    broken = []
    for this in world.rounds:
        if this.answer.status == 202 and not this.batch_id:
            broken.append("I9 202, and no batch")
        made = [r for r in runs if r["batch_id"] == this.batch_id]
        if this.batch_id and sorted(r["instance_id"] for r in made) != sorted(this.ids):
            broken.append(f"I9 {len(made)} runs for {len(this.ids)} ids")
    return broken


def leftovers(world: World, runs: list[dict[str, Any]]) -> list[str]:
    """I13: no keys, and in no drive media of ours, nor soon after their BMC is back."""
    broken = [f"I13 the keys of run {run_id} are still there" for run_id in world.disk.sealer.salts if any(r["id"] == run_id and r["ended_at"] for r in runs)]
    locked = {row[0] for row in world.disk.rows("SELECT name FROM servers WHERE locked_at IS NOT NULL")}  # another machine answers there: nothing is sent to it
    for name, machine in world.machines.items():
        if (
            (machine.media or machine.override)
            and name not in locked
            and not any(this.troubles[name].fired & AWAY for this in world.rounds if name in this.troubles)
        ):
            broken.append(f"I13 {name}: media or override are still there")
    return broken


def secrets(world: World) -> list[str]:
    """I8: neither password nor hash is in the database in clear."""
    dump = world.disk.dump()
    return [f"I8 {what} is in the database" for what, value in (("a password", b"Canary-"), ("the hash", HASH.encode())) if value in dump]


def chain(world: World) -> list[str]:
    """I15: each event has the MAC of itself behind the one before it."""
    before = ""
    names = "seq, mac, at, project_id, type, batch_id, run_id, server_id, actor, data"
    for seq, mac, at, *said, data in world.disk.rows(f"SELECT {names} FROM events ORDER BY seq"):
        text = json.dumps([before, at.replace("Z", "+00:00"), *said, json.loads(data)], sort_keys=True)
        if mac != (before := world.disk.sealer.authenticate(text, about="event")):
            return [f"I15 event {seq} does not follow the one before it"]
    return []


def bystanders(world: World) -> list[str]:
    """I14: what nobody asked for was not touched."""
    asked = {i for this in world.rounds for i in this.ids}
    return [f"I14 {n} was touched" for n, m in world.machines.items() if world.instances[n].id not in asked and (m.calls or m.root.writes or m.boots)]
