"""/s/NAME: one server. What it runs and on which side of the line it is, its last runs, what is in it, what happened to it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from repave.api.operator.batches import list_runs
from repave.api.operator.events import list_newest
from repave.api.operator.scope import Scope
from repave.domain.model import Role, Step
from repave.pages.console import read_tail
from repave.pages.door import PageRoute, add_view
from repave.pages.fleet import tile_of
from repave.pages.frame import Frame
from repave.pages.render import parts
from repave.pages.snapshot import Snapshot, sentence

router = APIRouter(route_class=PageRoute)
Json = dict[str, Any]


def view_server(scope: Scope, asked: dict[str, str]) -> Frame:
    part = parts(scope.named)
    snapshot = Snapshot(scope)
    server = snapshot.find_server(asked["name"])
    runs: list[Json] = list_runs(scope, server=server["name"], limit=5)["items"]
    live = snapshot.live_runs.get(server["name"])
    frame = snapshot.frame(server["name"])
    may = scope.credential.role.includes(Role.OPERATOR)
    frame.put("now", part.server_now(server, tile_of(server, live), live, runs[0] if runs else None))
    frame.put("lock", part.server_lock(server, may, live))
    for number, run in enumerate(runs):
        frame.add("runs", f"run-{run['id']}", part.server_run(run, _steps(run), number == 0, number == 0 and live is None))
    frame.put("console", part.console_tail(server, runs[0] if runs else None, read_tail(scope, runs[0]["id"]) if runs else ""))
    inventory = scope.store.runs.find_inventory(server["id"])
    frame.put("inventory", part.inventory(server, inventory, runs[0].get("disk_serial") if runs else None))
    events = list_newest(scope, server_id=server["id"], limit=15)
    frame.put("events", part.event_table([(e, sentence(e)) for e in events]))
    frame.fixed = {"server": server}
    return frame


def _steps(run: Json) -> list[tuple[str, str, float | None, float | None]]:
    """Each step: its mark (done, now, failed, not begun), name, seconds, usual seconds."""
    found = []
    for step in Step:
        seconds = run["durations_s"].get(step.value)
        here = step.value == run["step"] and run["state"] not in ("running", "rehearsed")
        failed = here and run["state"] in ("failed", "cancelled")
        mark = "failed" if failed else "now" if here and run["started_at"] else "done" if seconds is not None else "later"
        found.append((mark, step.value, seconds, run["usual_durations_s"].get(step.value)))
    return found


add_view(router, "/s/{name}", "server.html", view_server)
