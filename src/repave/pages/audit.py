"""/events: the audit, newest first."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from repave.api.operator.events import list_newest
from repave.api.operator.scope import Scope
from repave.api.operator.servers import get_server
from repave.errors import RequestError
from repave.pages.door import PageRoute, add_view
from repave.pages.frame import Frame
from repave.pages.render import parts
from repave.pages.snapshot import Snapshot, sentence

router = APIRouter(route_class=PageRoute)
_PAGE = 50


def view_events(scope: Scope, asked: dict[str, str]) -> Frame:
    part = parts(scope.named)
    frame = Snapshot(scope).frame("Audit")
    server, batch, before = asked.get("server", "").strip(), asked.get("batch", "").strip(), asked.get("before", "")
    if before and (not before.isdecimal() or len(before) > 18):
        raise RequestError("bad-request", "before: must be a number.", field="before")
    server_id = get_server(scope, server).id if server else None
    events: list[dict[str, Any]] = list_newest(scope, before=int(before) if before else None, batch=batch or None, server_id=server_id, limit=_PAGE)
    for event in events:
        frame.add("audit", f"e-{event['seq']}", part.audit_row(event, sentence(event)))
    frame.lists.setdefault("audit", [])
    frame.fixed = {"server": server, "batch": batch, "before": before, "older": events[-1]["seq"] if len(events) == _PAGE else None}
    return frame


add_view(router, "/events", "events.html", view_events)
