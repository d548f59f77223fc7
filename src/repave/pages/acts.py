"""What a button does to a batch or to servers: pause, resume, cancel; lock, unlock. Each through the function that /repave/v1 has for it."""

from __future__ import annotations

import shlex

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from repave.api.operator.batches import Chosen, cancel_batch, pause_batch, resume_batch, show_batch
from repave.api.operator.servers import Lock, lock_server, unlock_server
from repave.domain.model import Role
from repave.errors import RequestError
from repave.folding import CANCEL_ROWS, cancel_kind, fold
from repave.pages.door import Form, PageRoute, Visits, go, show
from repave.pages.reinstall import chosen_servers
from repave.pages.snapshot import Snapshot

router = APIRouter(route_class=PageRoute, default_response_class=HTMLResponse)


@router.post("/b/{batch_id}/pause")
def pause(who: Visits, batch_id: str) -> Response:
    pause_batch(who.needs(Role.OPERATOR), batch_id)
    return go(f"/b/{batch_id}")


@router.post("/b/{batch_id}/resume")
def resume(who: Visits, batch_id: str) -> Response:
    resume_batch(who.needs(Role.OPERATOR), batch_id)
    return go(f"/b/{batch_id}")


@router.get("/b/{batch_id}/cancel")
def show_cancel(request: Request, who: Visits, batch_id: str) -> Response:
    """What a cancel would do to each server. Touches nothing."""
    frame, batch = Snapshot(who.scope).frame("Cancel"), show_batch(who.scope, batch_id)
    kinds = {run["server"]: cancel_kind(run) for run in batch["runs"]}
    of_kind = {kind: [name for name, its in kinds.items() if its == kind] for kind, _, _ in CANCEL_ROWS}
    rows = [(kind, what, then, fold(of_kind[kind])) for kind, what, then in CANCEL_ROWS if of_kind[kind]]
    number = len(of_kind["before the line"]) + len(of_kind["not started"])
    why_not = who.why_not(Role.OPERATOR) or ("" if number else "nothing of it can be cancelled any more")
    return show(request, who, "cancel.html", frame, batch=batch, rows=rows, number=number, why_not=why_not)


@router.post("/b/{batch_id}/cancel")
def cancel(who: Visits, batch_id: str) -> Response:
    """What has not crossed the line goes back; what has, finishes."""
    cancel_batch(who.needs(Role.OPERATOR), batch_id, Chosen())
    return go(f"/b/{batch_id}")


@router.get("/lock")
def show_lock(request: Request, who: Visits, servers: str = "") -> Response:
    names = chosen_servers(who.scope, servers, request.query_params.getlist("tick"))
    if not names:
        raise RequestError("bad-request", "servers: none were named; empty never means all.", field="servers")
    command = f"repave server lock {shlex.quote(fold(names))} --reason TEXT"
    frame = Snapshot(who.scope).frame("Lock")
    return show(request, who, "lock.html", frame, nodeset=fold(names), number=len(names), command=command, why_not=who.why_not(Role.OPERATOR))


@router.post("/lock")
def lock(who: Visits, form: Form) -> Response:
    """Each of them is locked, and nobody reinstalls it by mistake."""
    scope = who.needs(Role.OPERATOR)
    names, reason = chosen_servers(scope, form.one("servers"), []), form.one("reason")
    if not 1 <= len(reason) <= 200:
        raise RequestError("bad-request", "reason: 1 to 200 characters are needed.", field="reason")
    for name in names:
        lock_server(scope, name, Lock(reason=reason))
    return go(f"/s/{names[0]}" if len(names) == 1 else "/")


@router.post("/s/{name}/unlock")
def unlock(who: Visits, name: str) -> Response:
    unlock_server(who.needs(Role.OPERATOR), name)
    return go(f"/s/{name}")
