"""/repave/v1/runs/{id}/console and /case: what was said during a run, from the first byte, as text or as a live stream; and all of a run in one file."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from repave.api.case_file import MEDIA_TYPE, Case, build_case, case_name
from repave.api.operator.answers import ProblemRoute
from repave.api.operator.batches import get_run, show_run
from repave.api.operator.scope import Operator, Scope, Viewer
from repave.domain.model import Source
from repave.errors import RequestError

router = APIRouter(route_class=ProblemRoute)
_POLL_S = 0.5
_COMMENT_S = 15.0
_AFTER_END_S = 2.0  # the last lines come after the run's end: a file is looked at each second
_LARGEST = 2**53


@router.get("/runs/{run_id}/console")
def show_console(
    scope: Viewer,
    request: Request,
    run_id: str,
    source: Literal["agent", "serial"] | None = None,
    after: Annotated[int, Query(ge=0, le=_LARGEST)] = 0,
    most: Annotated[int, Query(ge=1, le=1 << 20)] = 1 << 20,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Text from character `after` on. `source` absent: serial where there is one, which has the agent's lines too, else the agent's.

    The header X-Repave-Next is the `after` of what comes next. With Accept: text/event-stream it follows until the run has ended.
    """
    run = get_run(scope, run_id)
    consoles = scope.store.consoles
    which = Source(source) if source else choose_source(scope, run.id)
    if last_event_id is not None:
        if not re.fullmatch("[0-9]{1,15}", last_event_id):
            raise RequestError("bad-request", "Last-Event-ID: must be what a stream gave.", field="Last-Event-ID")
        after = int(last_event_id)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Repave-Source": which.value}
    if "text/event-stream" in request.headers.get("accept", ""):
        return StreamingResponse(follow_console(scope, run.id, which, after), media_type="text/event-stream", headers=headers)
    found = consoles.read(run.id, which, after=after, most=most)
    return Response(found.text, media_type="text/plain; charset=utf-8", headers=headers | {"X-Repave-Next": str(found.next_at)})


@router.get("/runs/{run_id}/case")
def fetch_case(scope: Operator, run_id: str) -> Response:
    """One tar.gz (case_file.py). An operator's: it has serial numbers, addresses and settings."""
    run = get_run(scope, run_id)
    store = scope.store
    case = Case(
        run, show_run(scope, run_id), store.servers.get_server(run.server_id), store.images.find_image(run.project_id, run.image_id),
        store.events.list_events(scope.project_id, batch_id=run.batch_id, limit=100_000), scope.desk.describe_site(),
    )  # fmt: skip
    headers = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{case_name(run, case.server)}.tar.gz"'}
    return Response(build_case(store, case), media_type=MEDIA_TYPE, headers=headers)


def choose_source(scope: Scope, run_id: str) -> Source:
    """The serial console, which has the agent's lines too, where there is one."""
    return Source.SERIAL if scope.store.consoles.has(run_id, Source.SERIAL) else Source.AGENT


async def follow_console(scope: Scope, run_id: str, source: Source, after: int) -> AsyncIterator[str]:
    """Each piece once, in order, until the reader goes away or the run has been over for a moment."""
    spoke = time.monotonic()
    over_since: float | None = None
    yield ": repave\n\n"
    while True:
        run = await run_in_threadpool(scope.store.runs.find_run, run_id)
        over_since = None if run is not None and run.ended_at is None else over_since or time.monotonic()
        found = await run_in_threadpool(scope.store.consoles.read, run_id, source, after=after)
        if found.next_at > after:
            after = found.next_at
            yield f"id: {after}\nevent: console\ndata: {json.dumps({'text': found.text, 'source': source.value})}\n\n"
            spoke = time.monotonic()
            continue
        if over_since is not None and time.monotonic() - over_since > _AFTER_END_S:
            return
        if time.monotonic() - spoke > _COMMENT_S:
            yield ": still here\n\n"
            spoke = time.monotonic()
        await asyncio.sleep(_POLL_S)
