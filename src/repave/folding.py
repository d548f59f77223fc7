"""How CLI and pages tell many servers in few lines: names as nodesets, equal runs in one row, numbers in words, a plan in lines.

Input is what /repave/v1 answers with, with times as text or as datetimes; nothing is asked or printed here. Nodesets are ClusterShell's, which is loaded
when the first one is folded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from repave.domain.waves import Waves
from repave.errors import RequestError

Json = dict[str, Any]
ALL_AT_ONCE = Waves()
MOST_NAMES = 100_000  # in a nodeset
ORDER = ("failed", "cancelled", "working", "waiting", "rehearsed", "running")
GLYPHS = {"failed": "✗", "cancelled": "-", "working": "▶", "waiting": "·", "rehearsed": "✓", "running": "✓"}
LATE = "▲"
_BAR = 30
_MOST_CAUSES = 8


# ---- names and numbers ----


def fold(names: Iterable[str]) -> str:
    """The nodeset of these names: web[01-06,08]."""
    from ClusterShell.NodeSet import NodeSet

    return str(NodeSet.fromlist(sorted(names)))


def unfold(text: str) -> list[str]:
    """The names of a nodeset, in its order. Raises ValueError, which says how one is written."""
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    if _names_in(text) > MOST_NAMES:
        raise ValueError(f"{text[:100]!r} has more than {MOST_NAMES} names.")
    try:
        return [str(name) for name in NodeSet(text, resolver=RESOLVER_NOGROUP)]
    except NodeSetException as error:
        raise ValueError(f"{text!r} is no nodeset: {error}. Write it as 'web[01-12]' or web01,web02.") from None


def _names_in(text: str) -> int:
    """At least as many names as there are; counted before ClusterShell makes each of them, in memory."""
    number = 1
    for group in re.findall(r"\[([^\]]*)\]?", text):
        ends = [[int(n[:12]) for n in re.findall(r"[0-9]+", part.partition("/")[0])] for part in group.split(",")]
        number *= max(1, sum(max(each) - min(each) + 1 if each else 1 for each in ends))
    return number


def check_known(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises RequestError naming the unknown ones and what may have been meant."""
    missing = [name for name in wanted if name not in known]
    if missing:
        from difflib import get_close_matches

        meant = get_close_matches(missing[0], known, 1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        raise RequestError("not-found", f"Unknown: {fold(missing)}.{hint}")


def count(number: int, noun: str) -> str:
    """ "1 server", "2 servers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def parse_time(at: str | datetime) -> datetime:
    return at if isinstance(at, datetime) else datetime.fromisoformat(at)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# ---- batches ----


def headline(batch: Json) -> str:
    numbers = [f"{number} {name}" for name, number in batch["counts"].items() if number]
    words = [batch["id"], count(len(batch["runs"]), "server"), image_of(batch), *batch_time(batch, datetime.now(UTC)), *numbers, *batch_rules(batch)]
    return " · ".join(words)


def image_of(batch: Json) -> str:
    return str(batch["image"]) if batch["image"] else "removed image" if batch.get("image_id") else "current image"


def batch_time(batch: Json, now: datetime) -> list[str]:
    """How long it has taken, and how much longer where that is known."""
    ended = parse_time(batch["ended_at"]) if batch["ended_at"] else now
    return [duration((ended - parse_time(batch["created_at"])).total_seconds()), *time_left(batch)]


def batch_rules(batch: Json) -> list[str]:
    """What is special about it."""
    return [
        *(["rehearsal"] if batch["rehearse"] else []), *(["paused"] if batch["paused_at"] and not batch["ended_at"] else []),
        *([f"stopped: {batch['stopped']}"] if batch["stopped"] else []),
    ]  # fmt: skip


def time_left(batch: Json) -> list[str]:
    """A range until its ends meet. Nothing where it is not known, or was known and is no longer true."""
    low, high = batch.get("eta_s"), batch.get("eta_high_s")
    if low is None:
        return []
    return [f"about {duration(low)} left" if high is None or high <= low * 1.1 + 5 else f"about {duration(low)} to {duration(high)} left"]


def counts_line(batch: Json, width: int) -> str:
    """How far the whole is, by the usual time of its steps, and every count; the bar is what room they leave."""
    numbers = {name: number for name, number in batch["counts"].items() if number or name in ("running", "working", "waiting", "failed")}
    limit = f" (stops above {batch['max_failed']})" if batch.get("max_failed") is not None else ""
    counts = "   ".join(f"{name} {number}{limit if name == 'failed' else ''}" for name, number in numbers.items())
    if batch.get("percent") is None:
        return counts
    told = f"{batch['percent']} %   {counts}"
    bar = max(0, min(_BAR, width - len(told) - 1))
    full = round(batch["percent"] / 100 * bar)
    return f"{'█' * full}{'░' * (bar - full)} {told}"


def more_line(groups: Sequence[Sequence[Json]]) -> str:
    """What stands for rows that there is no room for."""
    states = Counter(run["state"] for group in groups for run in group)
    return f"  and {states.total()} more   " + " · ".join(f"{states[name]} {name}" for name in ORDER if states[name])


def folded_rows(runs: Sequence[Json]) -> list[list[str]]:
    """Equal runs share a row: glyph and names, step, percent, rate, seconds in the step, side of the line and cause. Failures first."""
    return [folded_row(group) for group in fold_runs(runs)]


def folded_row(group: Sequence[Json]) -> list[str]:
    """Of runs that share it."""
    return [f"{glyph(group[0])} {fold(r['server'] for r in group)}", *row_cells(group)]


def fold_runs(runs: Sequence[Json]) -> list[list[Json]]:
    """Runs that a row can stand for together, failures first."""
    groups: dict[tuple[int, int, str], list[Json]] = {}
    few = len({run["error"]["cause"] for run in runs if run["error"]}) <= _MOST_CAUSES
    for run in runs:
        at, cause = (run["step_index"], str(run["past_the_line"])) if run["state"] in ("failed", "cancelled", "working") else (0, str(run["os_now"]))
        if run["error"]:
            cause = run["error"]["code"] + (run["error"]["cause"] if few else "")
        elif run["state"] == "waiting":
            cause = run["waits_for"] or ""
        elif run["late"]:
            at, cause = 0, f"{cause} {run['step_index']}"  # before those that are in time
        groups.setdefault((ORDER.index(run["state"]), at, cause), []).append(run)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def fold_failures(runs: Sequence[Json]) -> list[list[Json]]:
    """Runs that ended with an error, those of one cause together; where nearly each has words of its own, those of one code."""
    bad = [run for run in runs if run["error"] and run["state"] in ("failed", "cancelled")]
    few = len({(r["error"]["code"], r["error"]["cause"]) for r in bad}) <= _MOST_CAUSES
    causes: dict[tuple[str, str], list[Json]] = {}
    for run in bad:
        causes.setdefault((run["error"]["code"], run["error"]["cause"] if few else ""), []).append(run)
    return list(causes.values())


def glyph(run: Json) -> str:
    return LATE if run["late"] else GLYPHS[run["state"]]


def row_cells(group: Sequence[Json], now: datetime | None = None) -> list[str]:
    """Step, percent, rate, seconds in the step, side of the line and cause, of runs that share a row."""
    first = group[0]
    if first["state"] == "running":
        return [f"running {first['os_now'] or ''}".rstrip(), "", "", took(group), "proved by the new OS"]
    if first["state"] == "rehearsed":
        return ["rehearsed", "", "", took(group), "nothing written, what was there runs again"]
    if first["state"] == "waiting":
        return ["waiting", "", "", "", first["waits_for"] or ""]
    step = f"{first['step_index']}/{first['steps']} {first['step']}"
    side = "past the line" if first["past_the_line"] else "before the line"
    if first["error"]:
        return [step, "", "", "", f"{first['error']['code']} {first['error']['title']} · {side}"]
    percents = [run["percent"] for run in group if run["percent"] is not None]
    rate = sum(run["rate_bytes_per_s"] or 0 for run in group)
    seconds = [run["durations_s"].get(run["step"], 0) for run in group]
    if first["late"]:
        now_s = max(seconds)
        told = f"late: now {duration(now_s)}, usual {duration(first['usual_s'])}{_gives_up(group, now_s, now or datetime.now(UTC))}"
        return [step, span(percents, "%"), f"{size(rate)}/s" if rate else "", "", f"{told} · {side}"]
    if first["cancelling"]:
        side += " · going back"
    return [step, span(percents, "%"), f"{size(rate)}/s" if rate else "", duration(max(seconds)), side]


def _gives_up(group: Sequence[Json], now_s: float, now: datetime) -> str:
    """The time in this step at which the first of them is given up."""
    ends = [parse_time(run["gives_up_at"]) for run in group if run.get("gives_up_at")]
    return f", gives up at {duration(now_s + max(0.0, (min(ends) - now).total_seconds()))}" if ends else ""


def span(values: Sequence[int], unit: str) -> str:
    low, high = (min(values), max(values)) if values else (0, 0)
    return "" if not values else f"{low} {unit}" if low == high else f"{low}-{high} {unit}"


def took(runs: Sequence[Json]) -> str:
    seconds = [(parse_time(r["ended_at"]) - parse_time(r["created_at"])).total_seconds() for r in runs if r["ended_at"]]
    low, high = (duration(min(seconds)), duration(max(seconds))) if seconds else ("-", "-")
    return low if low == high else f"{low}-{high}"


# ---- what a cancel will do ----

CANCEL_ROWS = (
    ("before the line", "media out, what was there boots again", "→ cancelled"),
    ("not started", "ends at once, its server is not touched", "→ cancelled"),
    ("past the line", "stopping would leave half a system: they finish", "→ the new OS"),
    ("already ended", "unchanged", ""),
)


def cancel_kind(run: Json) -> str:
    """The first word of its row in CANCEL_ROWS."""
    if run["ended_at"]:
        return "already ended"
    if run["past_the_line"]:
        return "past the line"
    return "not started" if run["state"] == "waiting" else "before the line"


# ---- plans ----


def _alike(erased: list[Json]) -> list[list[Json]]:
    """Servers with the same model, OS, state, image and kind of root-disk rule."""
    groups: dict[tuple[object, ...], list[Json]] = {}
    for e in erased:
        kind = tuple(part.partition("=")[0] for part in e["root_disk"].split(","))
        groups.setdefault((e["model"], e["os_now"], e["state"], e["image"], kind), []).append(e)
    return list(groups.values())


def _usual_time(erased: list[Json], waves: Waves) -> list[tuple[str, str]]:
    """The usual time by model, where there is history; none is invented."""
    words, whole_s = [], 0.0
    models = {e["model"]: e for e in erased}
    for model, first in models.items():
        names = fold(e["server"] for e in erased if e["model"] == model)
        if first.get("usual_s"):
            high = f", nine of ten in {duration(first['usual_high_s'])}" if first["usual_high_s"] > first["usual_s"] * 1.1 else ""
            words.append(f"{names} usual {duration(first['usual_s'])}{high} ({count(first['usual_runs'], 'run')})")
            whole_s = max(whole_s, first["usual_s"])
        else:
            words.append(f"{names} not known: too few runs of this model")
    if all(e.get("usual_s") for e in models.values()):
        rounds = _rounds(len(erased), waves)
        how = "all at once" if rounds == 1 else f"{rounds} one after the other"
        words.append(f"{how}, done in about {duration(rounds * whole_s)}")
    return [("TIME", " · ".join(words))]


def _rounds(servers: int, waves: Waves) -> int:
    """How many runs follow each other at least."""
    canary = min(waves.canary or 0, servers)
    return sum(-(-number // (waves.at_once or number)) for number in (canary, servers - canary) if number)


def _stops(waves: Waves) -> list[tuple[str, str]]:
    stops = []
    if waves.canary:
        stops.append(f"{count(waves.canary, 'server')} first, and if one of them does not run then the others do not start")
    if waves.at_once:
        stops.append(f"{waves.at_once} at once")
    if waves.max_failed is not None:
        stops.append(f"when more than {waves.max_failed} fail: waiting runs do not start, runs before the line go back")
    return [("STOPS", " · ".join(stops) or "never by itself: --max-failed N, --canary N")]


def plan_headline(plan: Json, *, rehearse: bool = False) -> str:
    what = [plan["image"] or "the image each has now", *(["rehearsal"] if rehearse else []), "nothing touched yet"]
    return " · ".join([f"PLAN {plan['id']}", count(len(plan["erased"]), "server"), *what])


def plan_lines(plan: Json, waves: Waves = ALL_AT_ONCE, *, rehearse: bool = False) -> list[tuple[str, str]]:
    """Erased, kept, time, what stops it, what to be careful about, problems: a label and a text each, equal servers in one."""
    erased, kept = plan["erased"], plan["kept"]
    lines: list[tuple[str, str]] = []
    for same in _alike(erased):
        first, rules = same[0], sorted({e["root_disk"] for e in same})
        own = ", ".join(part.partition("=")[0] for part in rules[0].split(","))
        disk = f": {rules[0]}" if len(rules) == 1 else f", by its own {own} (--json names them)"
        what = f"{first['model'] or 'unknown model'} · one root disk{' each' if len(same) > 1 else ''}{disk}"
        lines.append(("LOOKED AT" if rehearse else "ERASED", f"{fold(e['server'] for e in same)}  {what}"))
        lines.append(("", f"now: {first['os_now'] or 'an OS we did not install'}, {first['state']} → {first['image'] or '?'}"))
    seen = f"{count(kept['data_disks_seen'], 'data disk')} seen before" if kept["data_disks_seen"] else "all data disks"
    locked = f" · {fold(kept['locked'])} locked" if kept.get("locked") else ""
    lines.append(("KEPT", f"{seen} (read-only for the whole run) · {count(kept['other_servers'], 'other server')}{locked}"))
    for partitions in dict.fromkeys(tuple(e["keeps"]) for e in erased if e["keeps"]):
        lines.append(("", f"{fold(e['server'] for e in erased if tuple(e['keeps']) == partitions)}: the root disk's partitions {', '.join(partitions)}"))
    lines += ([] if rehearse else _usual_time(erased, waves)) + _stops(waves)
    if rehearse:
        lines.append(("WRITTEN", "nothing: steps 1-4, then what was there boots again; the servers are down meanwhile"))
    for caution in dict.fromkeys(c for e in erased for c in e.get("careful", ())):
        lines.append(("CAREFUL", f"{fold(e['server'] for e in erased if caution in e.get('careful', ()))}: {caution}"))
    for cause in dict.fromkeys((p["code"], p["title"], p["cause"], p["do"]) for p in plan["problems"]):
        names = [p["server"] for p in plan["problems"] if (p["code"], p["title"], p["cause"], p["do"]) == cause]
        lines.append(("PROBLEM", f"{fold(names)}  {cause[0]} {cause[1]} {cause[2]}  → {cause[3]}"))
    return lines
