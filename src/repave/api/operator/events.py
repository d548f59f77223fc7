"""/repave/v1/events: the audit, as a list or as a live stream (server-sent events; `seq` is the id to go on from)."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from repave.api.operator.answers import Json, ProblemRoute, must_exist, render_list
from repave.api.operator.scope import Scope, Viewer
from repave.domain.model import Event
from repave.errors import RequestError

router = APIRouter(route_class=ProblemRoute)
_POLL_S = 0.3
_COMMENT_S = 15.0  # ux.md 2; proxies drop what is silent for a minute
_PAGE = 1000
_LAST_SEQ = 2**63 - 1  # SQLite's and PostgreSQL's largest


def event_json(event: Event, servers: dict[str, str]) -> Json:
    named = {"batch": event.batch_id, "run": event.run_id, "server": servers.get(event.server_id or ""), "server_id": event.server_id}
    about = {"seq": event.seq, "at": event.at, "type": event.type, "actor": event.actor} | {k: v for k, v in named.items() if v}
    return about | event.data | about  # first in order, and never overwritten by what an event carries


def _read(scope: Scope, after: int, batch: str | None, limit: int, *, newest: bool = False) -> list[Json]:
    if newest:
        events = scope.store.events.list_newest(scope.project_id, batch_id=batch, limit=limit)[::-1]
    else:
        events = scope.store.events.list_events(scope.project_id, after=after, batch_id=batch, limit=limit)
    if not events:
        return []
    servers = {s.id: s.name for s in scope.store.servers.list_servers(scope.project_id)[0]}
    return [event_json(e, servers) for e in events]


def list_newest(scope: Scope, *, before: int | None = None, batch: str | None = None, server_id: str | None = None, limit: int = 50) -> list[Json]:
    """Newest first."""
    events = scope.store.events.list_newest(scope.project_id, before=before, batch_id=batch, server_id=server_id, limit=limit)
    servers = {s.id: s.name for s in scope.store.servers.list_servers(scope.project_id)[0]} if events else {}
    return [event_json(e, servers) for e in events]


@router.get("/events")
def list_events(
    scope: Viewer,
    request: Request,
    after: Annotated[int, Query(ge=0, le=_LAST_SEQ)] = 0,
    batch: str | None = None,
    limit: int = _PAGE,
    newest: bool = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Oldest first, after `after` (or Last-Event-ID). `next` is the `after` of the next page. `newest`: the last `limit` of them.

    With Accept: text/event-stream it follows."""
    if batch is not None:
        must_exist(scope.store.runs.find_batch(scope.project_id, batch), "batch", batch)
    if last_event_id is not None:
        if not re.fullmatch(f"[0-9]{{1,{len(str(_LAST_SEQ))}}}", last_event_id) or int(last_event_id) > _LAST_SEQ:
            raise RequestError("bad-request", "Last-Event-ID: must be a seq.", field="Last-Event-ID")
        after = int(last_event_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        return StreamingResponse(_follow(scope, after, batch), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    limit = max(1, min(limit, _PAGE))
    items = _read(scope, after, batch, limit, newest=newest)
    body = json.dumps(jsonable_encoder(render_list(items, items[-1]["seq"] if len(items) == limit and not newest else None)))
    return Response(body, media_type="application/json")


async def _follow(scope: Scope, after: int, batch: str | None) -> AsyncIterator[str]:
    """Every event once, in order, until the reader goes away or the batch has ended."""
    spoke = time.monotonic()
    yield ": repave\n\n"
    while True:
        # Read before the events: what is there when a batch has ended is all there will be.
        over = batch is not None and await run_in_threadpool(_has_ended, scope, batch)
        events = await run_in_threadpool(_read, scope, after, batch, _PAGE)
        for event in events:
            after = event["seq"]
            yield f"id: {after}\nevent: {event['type']}\ndata: {json.dumps(jsonable_encoder(event))}\n\n"
            spoke = time.monotonic()
        if over and len(events) < _PAGE:
            return
        if time.monotonic() - spoke > _COMMENT_S:
            yield ": still here\n\n"
            spoke = time.monotonic()
        if len(events) < _PAGE:
            await asyncio.sleep(_POLL_S)


def _has_ended(scope: Scope, batch_id: str) -> bool:
    batch = scope.store.runs.find_batch(scope.project_id, batch_id)
    return batch is None or batch.ended_at is not None
