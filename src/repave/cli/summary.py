"""How a batch ended, for people: failures first, one block a cause, then what runs now, then the next command."""

from __future__ import annotations

from collections.abc import Sequence

from repave.cli.output import Json, show
from repave.folding import GLYPHS, count, duration, fold, fold_failures, headline, size, took

_MOST_REHEARSED = 8  # whose findings are told one by one


def show_summary(batch: Json) -> None:
    runs = batch["runs"]
    bad, good, rehearsed = ([r for r in runs if r["state"] in states] for states in (("failed", "cancelled"), ("running",), ("rehearsed",)))
    show(f"{headline(batch)} · ended")
    for same in fold_failures(runs):
        show(_failed_lines(same, batch["id"]))
    for image in dict.fromkeys(r["os_now"] for r in good):
        same = [r for r in good if r["os_now"] == image]
        show(f"  ✓ {fold(r['server'] for r in same)}  runs {image or 'the image'} after {took(same)} · proved: root-disk serial and one-time key matched")
    for run in rehearsed[:_MOST_REHEARSED]:
        show(_rehearsed_lines(run))
    if others := rehearsed[_MOST_REHEARSED:]:
        show(f"  ✓ {fold(r['server'] for r in others)}  rehearsed too, nothing written; what each taught: repave run SERVER")
    if bad:
        show(f"Next: repave explain {bad[0]['error']['code'] if bad[0]['error'] else 'internal'}; then repave batch retry {batch['id']}")
    elif rehearsed:
        image = f" --image {batch['image']}" if batch["image"] else ""
        show(f"Next: repave reinstall '{fold(r['server'] for r in rehearsed)}'{image}")


def _failed_lines(same: Sequence[Json], batch_id: str) -> str:
    first, error = same[0], same[0]["error"]
    side = "past the line" if first["past_the_line"] else "before the line"
    where = f"{first['step_index']}/{first['steps']} {first['step']} · {side}" if first["started_at"] else "not started"
    others = len({r["error"]["cause"] for r in same}) - 1
    more = f" ({count(others, 'other')} beside it: repave report {batch_id})" if others else ""
    return (
        f"  {GLYPHS[first['state']]} {fold(r['server'] for r in same)}  {where} · {error['code']} {error['title']}\n"
        f"      cause      {error['cause']}{more}\n      untouched  {error['untouched']}\n      do         {error['do']}"
    )


def _rehearsed_lines(run: Json) -> str:
    """What one rehearsal learnt: where it would write, how much, how long; and that nothing was written."""
    learnt = run["rehearsal"]
    disk, seconds = learnt["disk"], learnt["durations_s"]
    others = count(max(0, learnt["disks"] - 1), "other disk")
    rate = f" at {size(learnt['fetched_bytes'] / learnt['fetch_s'])}/s" if learnt.get("fetch_s") and learnt.get("fetched_bytes") else ""
    times = " · ".join(f"{name} {duration(seconds[name])}" for name in ("power-off", "insert-media", "boot-ramdisk") if name in seconds)
    return (
        f"  ✓ {run['server']}  rehearsed: nothing written, what was there runs again after {took([run])}\n"
        f"      disk       {disk['path']}, serial {disk['serial']}, {size(disk['size_bytes'] or 0)}; {others}, left alone\n"
        f"      to write   {size(learnt.get('data_bytes', 0))}, fetched as {size(learnt.get('stored_bytes', 0))}{rate}\n"
        f"      times      {times}; a reinstall should take about {duration(learnt['expected_s'])}"
    )
