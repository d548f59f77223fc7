"""The invariants of a rack (trust.md D), judged from `watch.Facts`. Each sentence begins with the invariant's name.

I3 is judged here for disks of failed writes as they lie; for every write and crash in between, tests/power_loss does. I10 is what the BMCs' own
log says of logins; wrong certificates and thieves are in tests/contract.
"""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from disks import differences, find_strange

from repave.domain.states import TABLE
from repave.domain.timing import REAP_GRACE_S
from repave.lab import scripted_os

if TYPE_CHECKING:
    from watch import Facts, Place, Seen

TICK_S = 0.05  # a file's times come from the kernel's coarse clock
CLOCK_S = 3.0  # a look of the client's and a commit on busy cores
Json = dict[str, Any]
_GOOD = ("proved", "late-proof")
_BACK = ("returned", "rehearsed")
_AFTER_LINE = (*_GOOD, "write-failed", "unproved")
_SITUATIONS = {(after.state.value, after.operation.value if after.operation else None) for after, _ in TABLE.values()} | {("running", None), ("error", None)}


def find_broken(facts: Facts, place: Place) -> list[str]:
    return [line for name in place.machines for line in find_broken_of(facts, place, name)] + find_broken_of_site(facts, place)


def find_broken_of(facts: Facts, place: Place, name: str) -> list[str]:
    broken, runs = [], facts.runs[name]
    for check in (writes_to_disks, early_writes, one_writer, ends, truth, before_line, calls, history, audit):
        broken += check(facts, place, name, runs)
    return broken + (after_the_end if runs else bystander)(facts, place, name, runs)


def find_broken_of_site(facts: Facts, place: Place) -> list[str]:
    broken = [f"I7 a refused request changed {what}" for what in facts.refusals]
    broken += [f"I8 a secret is in {where}" for where in facts.leaks]
    broken += count(facts) + at_once(facts, place)
    broken += [f"I15 event {facts.unchained} does not follow the one before it"] if facts.unchained is not None else []
    broken += [f"I13 the keys of run {key} are still there" for key in facts.keys]
    return broken + [f"I13 {what}" for what in facts.leftovers]


def seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()


def events(run: Json, type_: str, **data: str) -> list[float]:
    """When."""
    return [seconds(e["at"]) for e in run["events"] if e["type"] == type_ and data.items() <= e["data"].items()]


def was_written(pair: tuple[str, str]) -> bool:
    """Whether digests differ; "" is of a disk that an OS writes."""
    return all(pair) and len(set(pair)) == 2


def writes_to_disks(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I1: no other disk's byte; the root disk's only past the line, by a plan that names it."""
    broken = []
    if was_written(facts.data_disks.get(name, ("", ""))):
        broken.append(f"I1 {name}: the data disk was written")
    if was_written(facts.digests[name]) and not any(r["crossed_at"] for r in runs):
        broken.append(f"I1 {name}: the root disk was written, and no run crossed the line")
    for run in runs:
        planned = [e["data"]["disk_serial"] for e in run["events"] if e["type"] == "run.plan"]
        if run["crossed_at"] and planned[-1:] != [place.machines[name].root_serial]:
            broken.append(f"I1 {name}: the plan named {planned}")
    return broken


def early_writes(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I6, I15: from power off to the line, or to the moment the old OS starts again, the root disk is not written.

    Seen by the file's time of its last write, at each look: that sees real machines too, whose old OS writes until it is off and when it starts again.
    """
    broken = []
    for run in runs:
        if off := events(run, "run.power-off")[:1]:
            ended_at = seconds(run["ended_at"] or run["deadline_at"])
            starts = [at for at in facts.disk_boots[name] if at > off[0]]
            resets = [c["at"] for c in facts.calls[name] if c["path"].endswith("Reset") and off[0] < c["at"] <= ended_at and run["found_state"] == "running"]
            until = seconds(run["crossed_at"]) if run["crossed_at"] else min([*starts[:1], *resets[-1:], ended_at])
            early = [at for at in facts.writes[name] if off[0] + TICK_S < at < until - TICK_S]
            if early and run["crossed_at"]:
                broken.append(f"I15 {name}: the root disk was written {until - early[0]:.2f} s before the line was crossed")
            elif early:
                broken.append(f"I6 {name}: {run['outcome']} before the line, and the ramdisk wrote {early[0] - off[0]:.2f} s after power off")
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
        broken += pending_for(facts.polls[name], name, run, runs)
    if runs and facts.polls[name] and facts.polls[name][-1].state == "pending":
        broken.append(f"I4 {name}: the client sees it pending, and nothing is under way")
    return broken


def pending_for(polls: list[Seen], name: str, run: Json, runs: list[Json]) -> list[str]:
    """I4 by the client's own clock: it is pending as long as the run says that it was, to what lies between two looks, and no longer than it may be."""
    began, ended = seconds(run["created_at"]), seconds(run["ended_at"] or run["deadline_at"])
    shared = {n: min(seen.until, ended) - max(seen.at, began) for n, seen in enumerate(polls) if seen.state == "pending"}
    number = max(shared, key=lambda n: shared[n], default=None)
    if number is None or shared[number] < 0 or run["ended_at"] is None:
        return []
    if any(r is not run and seconds(r["created_at"]) < polls[number].until and seconds(r["ended_at"] or r["deadline_at"]) > polls[number].at for r in runs):
        return []  # one followed the other between two looks: to the client they are one
    at_least = polls[number].until - polls[number].at
    at_most = polls[number + 1].answered_at - (polls[number - 1].until if number else began) if number + 1 < len(polls) else float("inf")
    took, allowed = ended - began, seconds(run["deadline_at"]) - began + REAP_GRACE_S + 30
    broken = [f"I4 {name}: the client saw it pending for {at_least:.0f} s, {allowed:.0f} s are allowed"] if at_least > allowed else []
    if not at_least - CLOCK_S <= took <= at_most + CLOCK_S:
        broken.append(f"I4 {name}: the client saw it pending for {at_least:.0f} to {at_most:.0f} s, the run says {took:.0f} s")
    return broken


def truth(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I3: what was not written whole does not boot; where only the report was lost, it is whole.

    I5: `running` = the image is on the disk, the new OS started from it and called home; its drive is erased."""
    if not runs:
        return []
    raw = place.find_raw(runs[-1]["image"])
    if not place.scripted:
        good = runs[-1]["outcome"] in _GOOD and raw is not None
        return [f"I5 {name}: running, and {what}" for what in find_strange(place.machines[name].root_disk, raw)] if good else []
    run, disk, broken = runs[-1], place.machines[name].root_disk, []
    booted = scripted_os.find_os(disk)
    written = run["crossed_at"] and any(at > seconds(run["crossed_at"]) for at in facts.writes[name])
    unheard = (run["error"] or {}).get("class") == "agent-silent" and raw is not None and not differences(disk, raw)
    if run["outcome"] == "write-failed" and written and booted is not None and not unheard:
        broken.append(f"I3 {name}: the write failed, and the disk boots {booted}")
    if run["outcome"] not in _GOOD:
        return broken
    if booted != "new OS" or "first boot as" not in facts.consoles[name] or "calls home" not in facts.consoles[name]:
        broken.append(f"I5 {name}: running, and no new OS called home")
    if scripted_os.find_config_drive(disk) is not None:
        broken.append(f"I5 {name}: running, and its config drive holds its secrets")
    if raw is not None and (wrong := differences(disk, raw)):
        broken.append(f"I5 {name}: running, and MiB {wrong[:5]} of the disk are not the image's")
    return broken


def before_line(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I6: what ended before the line left the disk as it was, and what ran before runs again. `restored`: where it was is not known."""
    known = [r for r in runs if r["outcome"] != "restored"]
    broken = [f"I6 {name}: {r['outcome']}, and the line was crossed" for r in known if (r["outcome"] in _AFTER_LINE) != bool(r["crossed_at"])]
    if not runs or any(r["crossed_at"] for r in runs):
        return broken
    if was_written(facts.digests[name]):
        broken.append(f"I6 {name}: {runs[-1]['outcome']} before the line, and the disk was written")
    if runs[-1]["outcome"] in _BACK:
        power = "On" if runs[-1]["found_state"] == "running" else "Off"
        if facts.bmcs[name]["power"] != power and facts.power_before[name] == power:
            broken.append(f"I6 {name}: {runs[-1]['outcome']}, and its power is {facts.bmcs[name]['power']}")
    return broken


def calls(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I10: a login reaches only its own BMC. I11: what changes a server belongs to a run that is live, or takes out the media that one left.

    I14: none begins while it is locked. I15: what powers it or puts media in comes after the audit's word of it.
    """
    broken, changes = [], [c for c in facts.calls[name] if c["method"] != "GET"]
    taken_out = [at for r in runs for at in events(r, "run.media-out")]
    for call in facts.calls[name]:
        if call["login_of"]:
            broken.append(f"I10 {name}: was shown the login of {call['login_of']}")
    for call in changes:
        early, late = call["at"], call["at"] + call["within_s"]
        if any(began <= late and early <= ended for began, ended in facts.by_hand[name]):
            continue
        live = [r for r in runs if seconds(r["created_at"]) <= late and early <= seconds(r["ended_at"] or r["deadline_at"])]
        last_ones = any(at - 60 <= early <= at for at in taken_out) and (call["path"].endswith("EjectMedia") or call["method"] == "PATCH")
        if not live and not last_ones:
            broken.append(f"I11 {name}: {call['method']} {call['path']} without a live run")
        if live and call["path"].endswith(("Reset", "InsertMedia")) and live[-1]["outcome"] not in ("returned", "return-failed"):
            said = [at for step in ("power-off", "insert-media") for at in events(live[-1], "run.step", step=step)]
            if not any(at <= late for at in said):
                broken.append(f"I15 {name}: {call['method']} {call['path']}, and the audit has no step that does it")
    locked_at = facts.locked_at[name]
    if locked_at and any(run["created_at"] > locked_at for run in runs):
        broken.append(f"I14 {name}: it is locked, and a run of it began")
    return broken


def history(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I12: what the client saw is a path of the table; an end is left only by a new run, or by a late proof."""
    broken, polls = [], facts.polls[name]
    for before, after in itertools.pairwise(polls):
        was, is_ = (before.state, before.operation), (after.state, after.operation)
        if is_ not in _SITUATIONS:
            broken.append(f"I12 {name}: {after.state}/{after.operation} is no row of the table")
        late = any(r["outcome"] == "late-proof" for r in runs) and (before.state, after.state) == ("error", "running")
        began = any(seconds(r["created_at"]) <= after.at + 1 for r in runs)
        if "pending" not in (before.state, after.state) and was != is_ and not (late or began):
            broken.append(f"I12 {name}: {before.state}/{before.operation} became {after.state}/{after.operation} without a run")
        if after.state == "error" and not after.has_error:
            broken.append(f"I12 {name}: error without a cause")
    if runs and polls and runs[-1]["outcome"]:
        ought = next(row for (_, event, found), (row, _) in TABLE.items() if event == runs[-1]["outcome"] and found in (None, runs[-1]["found_state"]))
        if (polls[-1].state, polls[-1].operation) != (ought.state, ought.operation):
            broken.append(f"I12 {name}: {runs[-1]['outcome']}, and the client sees {polls[-1].state}/{polls[-1].operation}")
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
    if runs[-1]["outcome"] == "return-failed" or (bmc["media"] == "" and bmc["boot"] in ("Hdd", "None")):
        return []
    return [f"I13 {name}: {runs[-1]['outcome']}, and media {bmc['media'] != ''}, override {bmc['boot']}"]


def bystander(facts: Facts, place: Place, name: str, runs: list[Json]) -> list[str]:
    """I14: what nobody asked for was not touched."""
    if facts.by_hand[name]:
        return []
    touched = facts.power_before[name] != facts.bmcs[name]["power"] or was_written(facts.digests[name])
    return [f"I14 {name} was touched: nobody asked for it"] if touched or any(c["method"] != "GET" for c in facts.calls[name]) else []


def at_once(facts: Facts, place: Place) -> list[str]:
    """I14: never more servers of a batch, or of the site, under way than allowed, by what their BMCs were asked and when their disks were written."""
    broken, all_runs = [], [run for batch in facts.batches for run in batch["runs"]]
    for what, runs, allowed in (("the site", all_runs, place.at_once), *(("a batch", batch["runs"], batch["at_once"]) for batch in facts.batches)):
        stretches = [s for run in runs if run["name"] and (s := touched(facts, run))]
        most = max((sum(began <= at <= ended for began, ended in stretches) for at, _ in stretches), default=0)
        if allowed and most > allowed:
            broken.append(f"I14 {most} servers of {what} were under way, {allowed} are allowed")
    return broken


def touched(facts: Facts, run: Json) -> tuple[float, float] | None:
    """When this run's server was touched, first and last."""
    began, ended = seconds(run["created_at"]), seconds(run["ended_at"] or run["deadline_at"])
    calls = [c["at"] + c["within_s"] * (c["at"] < began) for c in facts.calls[run["name"]] if c["method"] != "GET"]
    times = [at for at in (*calls, *facts.writes[run["name"]]) if began <= at <= ended]
    return (min(times), max(times)) if times else None


def count(facts: Facts) -> list[str]:
    """I9: a 202 made one run for each of its ids."""
    broken = []
    for sent_at, answered_at, ids in facts.accepted:
        made = [sorted(r["instance_id"] for r in b["runs"]) for b in facts.batches if sent_at - 1 <= seconds(b["created_at"]) <= answered_at + 1]
        if sorted(ids) not in made:
            broken.append(f"I9 {len(ids)} ids were accepted, and no batch has a run for each: {[len(m) for m in made]}")
    return broken
