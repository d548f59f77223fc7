"""How CLI and pages tell many servers in few lines: names as nodesets, equal runs in one row, numbers in words, a plan in lines.

Input is what /repave/v1 answers with, with times as text or as datetimes; nothing is asked or printed here. Nodesets are ClusterShell's, which is loaded
when the first one is folded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

from repave.domain.waves import Waves
from repave.errors import RequestError

Json = dict[str, Any]
ALL_AT_ONCE = Waves()
MOST_NAMES = 100_000  # in a nodeset
ORDER = ("failed", "cancelled", "working", "waiting", "rehearsed", "running")
GLYPHS = {"failed": "✗", "cancelled": "-", "working": "▶", "waiting": "·", "rehearsed": "✓", "running": "✓"}
LATE = "▲"


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
    """At most so many names; counted before ClusterShell makes each of them, in memory."""
    number = 1
    for group in re.findall(r"\[([^\]]*)\]", text):
        ends = [part.partition("/")[0].partition("-") for part in group.split(",")]
        number *= sum(int(high) - int(low) + 1 if low.isdecimal() and high.isdecimal() else 1 for low, _, high in ends)
    return number


def check_known(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises RequestError naming the unknown ones and what may have been meant."""
    missing = [name for name in wanted if name not in known]
    if missing:
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
    runs, counts = batch["runs"], batch["counts"]
    ended = parse_time(batch["ended_at"]) if batch["ended_at"] else now
    lasted = duration((ended - parse_time(batch["created_at"])).total_seconds())
    left = [run["eta_s"] for run in runs if run["state"] == "working"]
    about = [f"about {duration(max(left))} left"] if left and not counts["waiting"] and all(eta is not None for eta in left) else []
    return [lasted, *about]


def batch_rules(batch: Json) -> list[str]:
    """What is special about it."""
    return [
        *(["rehearsal"] if batch["rehearse"] else []), *(["paused"] if batch["paused_at"] and not batch["ended_at"] else []),
        *([f"stopped: {batch['stopped']}"] if batch["stopped"] else []),
    ]  # fmt: skip


def folded_rows(runs: Sequence[Json]) -> list[list[str]]:
    """Equal runs share a row: glyph and names, step, percent, rate, seconds in the step, side of the line and cause. Failures first."""
    return [[f"{glyph(group[0])} {fold(r['server'] for r in group)}", *row_cells(group)] for group in fold_runs(runs)]


def fold_runs(runs: Sequence[Json]) -> list[list[Json]]:
    """Runs that a row can stand for together, failures first."""
    groups: dict[tuple[int, int, str], list[Json]] = {}
    for run in runs:
        at, cause = (run["step_index"], str(run["past_the_line"])) if run["state"] in ("failed", "cancelled", "working") else (0, str(run["os_now"]))
        if run["error"]:
            cause = run["error"]["code"] + run["error"]["cause"]
        elif run["state"] == "waiting":
            cause = run["waits_for"] or ""
        elif run["late"]:
            cause += " late"
        groups.setdefault((ORDER.index(run["state"]), at, cause), []).append(run)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def fold_failures(runs: Sequence[Json]) -> list[list[Json]]:
    """Runs that ended with an error, those of one cause together."""
    causes: dict[tuple[str, str], list[Json]] = {}
    for run in runs:
        if run["error"] and run["state"] in ("failed", "cancelled"):
            causes.setdefault((run["error"]["code"], run["error"]["cause"]), []).append(run)
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
        gives_up = (parse_time(first["deadline_at"]) - (now or datetime.now(UTC))).total_seconds()
        side += f" · late, usual {duration(first['usual_s'])}, gives up in {duration(max(0, gives_up))}"
    elif first["cancelling"]:
        side += " · going back"
    return [step, span(percents, "%"), f"{size(rate)}/s" if rate else "", duration(max(seconds)), side]


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
    known = {e["model"]: e["usual_s"] for e in erased if e.get("usual_s")}
    if not known:
        return []
    models = " · ".join(f"{fold(e['server'] for e in erased if e['model'] == model)} usual {duration(usual)}" for model, usual in known.items())
    whole = len(known) == len({e["model"] for e in erased}) and waves == ALL_AT_ONCE
    return [("TIME", models + (f" · all at once, done in about {duration(max(known.values()))}" if whole else ""))]


def _stops(waves: Waves) -> list[tuple[str, str]]:
    stops = []
    if waves.canary:
        stops.append(f"{count(waves.canary, 'server')} first, and if one of them does not run then the others do not start")
    if waves.at_once:
        stops.append(f"{waves.at_once} at once")
    if waves.max_failed is not None:
        stops.append(f"when more than {waves.max_failed} fail: waiting runs do not start, runs before the line go back")
    return [("STOPS", " · ".join(stops))] if stops else []


def plan_headline(plan: Json, *, rehearse: bool = False) -> str:
    what = [plan["image"] or "the image each has now", *(["rehearsal"] if rehearse else []), "nothing touched yet"]
    return " · ".join([f"PLAN {plan['id']}", count(len(plan["erased"]), "server"), *what])


def plan_lines(plan: Json, waves: Waves = ALL_AT_ONCE, *, rehearse: bool = False) -> list[tuple[str, str]]:
    """Erased, kept, time, what stops it, problems: a label and a text each, equal servers in one."""
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
    lines.append(("KEPT", f"{seen} (read-only for the whole run) · {count(kept['other_servers'], 'other server')}"))
    lines += ([] if rehearse else _usual_time(erased, waves)) + _stops(waves)
    if rehearse:
        lines.append(("WRITTEN", "nothing: steps 1-4, then what was there boots again; the servers are down meanwhile"))
    for cause in dict.fromkeys((p["code"], p["title"], p["cause"], p["do"]) for p in plan["problems"]):
        names = [p["server"] for p in plan["problems"] if (p["code"], p["title"], p["cause"], p["do"]) == cause]
        lines.append(("PROBLEM", f"{fold(names)}  {cause[0]} {cause[1]} {cause[2]}  → {cause[3]}"))
    return lines
