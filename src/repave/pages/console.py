"""/s/NAME/console: what a server's console said in one of its runs, from the first byte. The stream goes on where the page ends, until the run has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from repave.api.operator.batches import get_run, list_runs
from repave.api.operator.console import choose_source, follow_console
from repave.api.operator.scope import Scope
from repave.errors import RequestError
from repave.pages.door import PageRoute, Visits, show
from repave.pages.snapshot import Snapshot

router = APIRouter(route_class=PageRoute)
Json = dict[str, Any]
_TAIL_CHARS, _TAIL_LINES = 2000, 12
_LARGEST = 2**53


def read_tail(scope: Scope, run_id: str) -> str:
    """The last lines that were said."""
    source = choose_source(scope, run_id)
    end = scope.store.consoles.find_end(run_id, source)
    text = scope.store.consoles.read(run_id, source, after=max(0, end - _TAIL_CHARS)).text
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


@router.get("/s/{name}/console")
def show_console(request: Request, who: Visits, name: str, run: str = "") -> Response:
    """Of the newest run, or the one named."""
    scope, snapshot = who.scope, Snapshot(who.scope)
    server = snapshot.find_server(name)
    runs: list[Json] = list_runs(scope, server=server["name"], limit=20)["items"]
    chosen = next((r for r in runs if r["id"] == run), None) if run else next(iter(runs), None)
    if chosen is None:
        raise RequestError("not-found", f"{server['name']} has no such run.", kind="run")
    found = scope.store.consoles.read(chosen["id"], choose_source(scope, chosen["id"]), most=_LARGEST)
    asked = urlencode({"run": chosen["id"], "after": found.next_at} | who.naming)
    stream = "" if chosen["ended_at"] else f"/live/s/{quote(server['name'])}/console?{asked}"
    frame = snapshot.frame(f"{server['name']} console")
    return show(request, who, "console.html", frame, server=server, runs=runs, chosen=chosen, text=found.text, stream=stream)


@router.get("/live/s/{name}/console")
def follow(
    who: Visits, name: str, run: str, after: Annotated[int, Query(ge=0, le=_LARGEST)] = 0, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """What is said from `after` on; then that it is over."""
    run_id = get_run(who.scope, run).id
    source = choose_source(who.scope, run_id)
    begin = int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 16 else after

    async def messages() -> AsyncIterator[str]:
        async for message in follow_console(who.scope, run_id, source, begin):
            if await run_in_threadpool(who.house.logins.find, who.token) is None:
                return
            yield message
        yield "event: over\ndata: 1\n\n"

    return StreamingResponse(messages(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
