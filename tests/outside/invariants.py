"""The invariants of a rack (trust.md D), judged from `watch.Facts`. Each sentence begins with the invariant's name.

I3 is judged here for disks of failed writes as they lie; for every write and crash in between, tests/power_loss does. I10 is what the BMCs' own
log says of logins; wrong certificates and thieves are in tests/contract.
"""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repave.domain.states import TABLE
from repave.domain.timing import REAP_GRACE_S
from repave.lab import scripted_os

if TYPE_CHECKING:
    from watch import Facts, Place

MIB = 1 << 20
Json = dict[str, Any]
_GOOD = ("proved", "late-proof")
_BACK = ("returned", "rehearsed")
_AFTER_LINE = (*_GOOD, "write-failed", "unproved")
_SITUATIONS = {(after.state.value, after.operation.value if after.operation else None) for after, _ in TABLE.values()} | {("running", None), ("error", None)}


def find_broken(facts: Facts, place: Place) -> list[str]:
    broken = []
    for name in place.machines:
        runs = [r for r in facts.runs if r["name"] == name]
        for check in (disks, one_writer, ends, truth, before_line, calls, history, audit):
            broken += check(facts, place, name, runs)
        broken += (after_the_end if runs else bystander)(facts, place, name, runs)
    broken += [f"I7 a refused request changed {what}" for what in facts.refusals]
    broken += [f"I8 a secret is in {where}" for where in facts.leaks]
    broken += count(facts)
    broken += [f"I13 the keys of run {key} are still there" for key in facts.keys]
    return broken + [f"I13 {what}" for what in facts.leftovers]


def seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()


def disks(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I1: no other disk's byte; the root disk's only past the line, by a plan that names it."""
    broken = []
    if len(set(facts.data_disks.get(name, ()))) == 2:
        broken.append(f"I1 {name}: the data disk was written")
    if len(set(facts.digests[name])) == 2 and not any(r["crossed_at"] for r in runs):
        broken.append(f"I1 {name}: the root disk was written, and no run crossed the line")
    for run in runs:
        planned = [e["data"]["disk_serial"] for e in run["events"] if e["type"] == "run.plan"]
        if run["crossed_at"] and planned[-1:] != [place.machines[name].root_serial]:
            broken.append(f"I1 {name}: the plan named {planned}")
    return broken


def one_writer(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I2: one run after the other; a run crosses at most once, and after a failed write nobody is left to write."""
    broken = []
    for before, after in itertools.pairwise(runs):
        if before["ended_at"] is None or before["ended_at"] > after["created_at"]:
            broken.append(f"I2 {name}: run {after['epoch']} began before run {before['epoch']} ended")
    if facts.consoles[name].count("crossed the line") > sum(bool(r["crossed_at"]) for r in runs):
        broken.append(f"I2 {name}: more agents wrote than runs crossed")
    if runs and runs[-1]["outcome"] == "write-failed" and facts.bmcs[name]["power"] != "Off":
        broken.append(f"I2 {name}: the write failed, and the server with its agent is on")
    return broken


def ends(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I4: an end by its deadline, with a cause where it failed; the client sees it."""
    broken = []
    for run in runs:
        if run["ended_at"] is None:
            broken.append(f"I4 {name}: run {run['epoch']} has no end")
        elif seconds(run["ended_at"]) > seconds(run["deadline_at"]) + REAP_GRACE_S + 30:
            broken.append(f"I4 {name}: ended past its deadline")
        if run["outcome"] not in (*_GOOD, "rehearsed") and not (run["error"] or {}).get("cause"):
            broken.append(f"I4 {name}: {run['outcome']} without a cause")
    if runs and facts.polls.get(name) and facts.polls[name][-1][1] == "pending":
        broken.append(f"I4 {name}: the client sees it pending, and nothing is under way")
    return broken


def truth(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I3: a failed write does not boot. I5: `running` = the image is on the disk, the new OS started from it and called home; its drive is erased."""
    if not runs or not place.scripted:
        return []
    run, disk, broken = runs[-1], place.machines[name].root_disk, []
    booted = scripted_os.find_os(disk)
    if run["outcome"] == "write-failed" and booted is not None:
        broken.append(f"I3 {name}: the write failed, and the disk boots {booted}")
    if run["outcome"] not in _GOOD:
        return broken
    if booted != "new OS" or "first boot as" not in facts.consoles[name] or "home: taken" not in facts.consoles[name]:
        broken.append(f"I5 {name}: running, and no new OS called home")
    if scripted_os.find_config_drive(disk) is not None:
        broken.append(f"I5 {name}: running, and its config drive holds its secrets")
    raw = place.images / f"{run['image']}.raw"
    if raw.exists() and (wrong := differences(disk, raw)):
        broken.append(f"I5 {name}: running, and MiB {wrong[:5]} of the disk are not the image's")
    return broken


def before_line(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I6: what ended before the line left the disk as it was, and what ran before runs again."""
    broken = [f"I6 {name}: {r['outcome']}, and the line was crossed" for r in runs if (r["outcome"] in _AFTER_LINE) != bool(r["crossed_at"])]
    if not runs or any(r["crossed_at"] for r in runs):
        return broken
    if len(set(facts.digests[name])) == 2:
        broken.append(f"I6 {name}: {runs[-1]['outcome']} before the line, and the disk was written")
    if runs[-1]["outcome"] in _BACK:
        power = "On" if runs[-1]["found_state"] == "running" else "Off"
        if facts.bmcs[name]["power"] != power and facts.power_before[name] == power:
            broken.append(f"I6 {name}: {runs[-1]['outcome']}, and its power is {facts.bmcs[name]['power']}")
    return broken


def calls(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I10: a login reaches only its own BMC. I11: what changes a server belongs to a run that is live, or takes out the media that one left."""
    broken = []
    taken_out = [seconds(e["at"]) for r in runs for e in r["events"] if e["type"] == "run.media-out"]
    for call in (c for c in facts.calls if c["machine"] == name):
        if call["login_of"] not in ("", name):
            broken.append(f"I10 {name}: was shown the login of {call['login_of']}")
        live = [r for r in runs if seconds(r["created_at"]) <= call["at"] <= seconds(r["ended_at"] or r["deadline_at"])]
        last_ones = any(at - 60 <= call["at"] <= at for at in taken_out) and (call["path"].endswith("EjectMedia") or call["method"] == "PATCH")
        if call["method"] != "GET" and not live and not last_ones:
            broken.append(f"I11 {name}: {call['method']} {call['path']} without a live run")
    return broken


def history(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I12: what the client saw is a path of the table; an end is left only by a new run, or by a late proof."""
    broken, polls = [], facts.polls.get(name, [])
    for (_, state, operation, _), (at, after, after_operation, error) in itertools.pairwise(polls):
        if (after, after_operation) not in _SITUATIONS:
            broken.append(f"I12 {name}: {after}/{after_operation} is no row of the table")
        late = any(r["outcome"] == "late-proof" for r in runs) and (state, after) == ("error", "running")
        began = any(seconds(r["created_at"]) <= at + 1 for r in runs)
        if "pending" not in (state, after) and (state, operation) != (after, after_operation) and not (late or began):
            broken.append(f"I12 {name}: {state}/{operation} became {after}/{after_operation} without a run")
        if after == "error" and not error:
            broken.append(f"I12 {name}: error without a cause")
    if runs and polls and runs[-1]["outcome"]:
        ought = next(row for (_, event, found), (row, _) in TABLE.items() if event == runs[-1]["outcome"] and found in (None, runs[-1]["found_state"]))
        if polls[-1][1:3] != (ought.state, ought.operation):
            broken.append(f"I12 {name}: {runs[-1]['outcome']}, and the client sees {polls[-1][1]}/{polls[-1][2]}")
    return broken


def audit(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I9: accepted once, ended once (twice with a late proof). I15: in order, and the crossing is there before the first byte."""
    broken = []
    for run in runs:
        kinds, times = Counter(e["type"] for e in run["events"]), [e["at"] for e in run["events"]]
        if kinds["run.accepted"] != 1 or kinds["run.ended"] != (2 if run["outcome"] == "late-proof" else 1):
            broken.append(f"I9 {name}: accepted {kinds['run.accepted']} times, ended {kinds['run.ended']} times ({run['outcome']})")
        if times != sorted(times):
            broken.append(f"I15 {name}: the audit is out of order")
        if kinds["run.crossed"] != bool(run["crossed_at"]):
            broken.append(f"I15 {name}: the audit has {kinds['run.crossed']} crossings")
    crossings = sum(e["type"] == "run.crossed" for r in runs for e in r["events"])
    if facts.consoles[name].count("crossed the line") > crossings:
        broken.append(f"I15 {name}: a disk was written, and no crossing is in the audit")
    return broken


def after_the_end(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I13: no media of ours in the drive, no override; `return-failed` is where that could not be."""
    bmc = facts.bmcs[name]
    if runs[-1]["outcome"] == "return-failed" or (bmc["media"], bmc["boot"]) == ("", "Hdd"):
        return []
    return [f"I13 {name}: {runs[-1]['outcome']}, and media {bmc['media'] != ''}, override {bmc['boot']}"]


def bystander(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I14: what nobody asked for was not touched."""
    touched = facts.power_before[name] != facts.bmcs[name]["power"] or len(set(facts.digests[name])) == 2
    return [f"I14 {name} was touched: nobody asked for it"] if touched or any(c["machine"] == name and c["method"] != "GET" for c in facts.calls) else []


def count(facts: Facts) -> list[str]:
    """I9: a 202 made one run for each of its ids."""
    broken, asked = [], {b["id"]: sorted(r["instance_id"] for r in facts.runs if r["batch_id"] == b["id"]) for b in facts.batches}
    for sent_at, answered_at, ids in facts.accepted:
        made = [asked[b["id"]] for b in facts.batches if sent_at - 1 <= seconds(b["created_at"]) <= answered_at + 1]
        if sorted(ids) not in made:
            broken.append(f"I9 {len(ids)} ids were accepted, and no batch has a run for each: {[len(m) for m in made]}")
    return broken


def differences(disk: Path, raw: Path) -> list[int]:
    """The MiB of the disk that are not the image's, from the second to its last partition's end; the first has the tables."""
    end, found = partition_end(raw), []
    with raw.open("rb") as image, disk.open("rb") as there:
        image.seek(MIB)
        there.seek(MIB)
        for at in range(MIB, end, MIB):
            size = min(MIB, end - at)
            if image.read(size) != there.read(size):
                found.append(at // MIB)
    return found


@cache
def partition_end(raw: Path) -> int:
    """Bytes up to the end of the image's last partition, as sfdisk sees it."""
    import subprocess

    listed = subprocess.run(["/sbin/sfdisk", "--dump", raw], capture_output=True, text=True, check=True).stdout
    parts = [line.split(":", 1)[1] for line in listed.splitlines() if "start=" in line]
    fields = [dict(f.strip().split("=", 1) for f in part.split(",") if "=" in f) for part in parts]
    return max(int(f["start"]) + int(f["size"]) for f in fields) * 512
