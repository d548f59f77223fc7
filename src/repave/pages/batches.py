"""/b and /b/ID: batches, and one of them: how far it is, what failed and what to do about it, when which step was."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from repave.api.batch_views import STATES
from repave.api.operator.batches import list_batches
from repave.api.operator.scope import Scope
from repave.folding import GLYPHS, LATE, batch_rules, batch_time, count, fold, fold_failures, fold_runs, glyph, row_cells
from repave.pages.door import PageRoute, add_view
from repave.pages.frame import Frame
from repave.pages.render import parts
from repave.pages.snapshot import Snapshot
from repave.pages.waterfall import FOLD_ABOVE, draw

router = APIRouter(route_class=PageRoute)
Json = dict[str, Any]
_LISTED = 50


def view_batches(scope: Scope, asked: dict[str, str]) -> Frame:
    part = parts(scope.named)
    frame = Snapshot(scope).frame("Batches")
    batches: list[Json] = list_batches(scope, limit=_LISTED)["items"]
    for batch in batches:
        frame.add("batches", f"b-{batch['id']}", part.batch_row(batch))
    frame.fixed = {"any": bool(batches), "listed": _LISTED}
    return frame


def view_batch(scope: Scope, asked: dict[str, str]) -> Frame:
    part = parts(scope.named)
    snapshot = Snapshot(scope)
    batch = snapshot.batch(asked["batch_id"])
    runs, counts = batch["runs"], batch["counts"]
    frame = snapshot.frame(f"Batch {batch['id'][-8:]}")
    frame.moving = batch["ended_at"] is None or frame.moving
    now = scope.store.now()
    late = sum(1 for run in runs if run["late"])
    frame.put("headline", part.headline(batch, [count(len(runs), "server"), *batch_time(batch, now), *batch_rules(batch)]))
    frame.put("counts", part.batch_counts(batch, [(name, counts[name]) for name in STATES], late, GLYPHS | {"late": LATE}))
    frame.put("said", part.said(", ".join(f"{number} {name}" for name, number in counts.items() if number) + (f", {late} late" if late else "")))
    frame.put("actions", part.batch_actions(batch, _what_may_be_done(batch), scope.credential.role.value))
    for same in fold_failures(runs):
        first = same[0]
        error_id = f"f-{first['error']['code'].replace('.', '-')}-{sum(map(ord, first['error']['cause'])) % 997}"
        frame.add("failures", error_id, part.failure(error_id, same, fold(r["server"] for r in same), batch))
    frame.lists.setdefault("failures", [])
    unfold = asked.get("unfold") == "1"
    if table := asked.get("view") == "table":
        groups = [[run] for run in runs] if unfold or len(runs) <= FOLD_ABOVE else fold_runs(runs)
        frame.put(
            "twin",
            part.twin([(glyph(g[0]), "late" if g[0]["late"] else g[0]["state"], [r["server"] for r in g], row_cells(g, now)) for g in groups]),
        )
    else:
        axis, rows = draw(batch, now=now, unfold=unfold)
        frame.put("axis", part.axis(axis))
        for row in rows:
            moving = {f"{row.id}-bar": part.moving_bar(row), f"{row.id}-text": part.row_text(row)}
            frame.add("rows", row.id, part.waterfall_row(row, *moving.values()), moving)
    frame.put("learnt", part.learnt([run for run in runs if run["rehearsal"]]))
    frame.fixed = {"batch_id": batch["id"], "unfold": unfold, "may_unfold": len(runs) > FOLD_ABOVE, "table": table}
    return frame


def _what_may_be_done(batch: Json) -> Json:
    """By verb: "" where it may, else why not."""
    live, counts = batch["ended_at"] is None, batch["counts"]
    before = [r for r in batch["runs"] if r["ended_at"] is None and not r["past_the_line"]]
    bad = [r for r in batch["runs"] if r["state"] in ("failed", "cancelled")]
    return {
        "pause": "" if live and not batch["paused_at"] and counts["waiting"] else "it has ended" if not live else "nothing waits to begin",
        "resume": "" if batch["paused_at"] and live else "it is not paused",
        "cancel": "" if before else "it has ended" if not live else "all that is left is past the line, and finishes",
        "retry": "" if bad else "nothing of it has failed",
    }  # fmt: skip


add_view(router, "/b", "batches.html", view_batches)
add_view(router, "/b/{batch_id}", "batch.html", view_batch)
