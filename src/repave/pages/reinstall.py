"""/plan and POST /reinstall: what would be erased, then the typed words. The plan and what is sent under its id are /repave/v1's, as for the command line."""

from __future__ import annotations

import shlex
from typing import Any

from fastapi import APIRouter, Request, Response

from repave.api.operator.batches import Reinstall, Target, begin_reinstall, plan, show_batch
from repave.api.operator.scope import Scope
from repave.domain.model import Role
from repave.domain.password import find_password_fault, user_for
from repave.domain.waves import Waves
from repave.errors import RepaveError, RequestError
from repave.folding import check_known, count, fold, plan_headline, plan_lines, unfold
from repave.pages.door import Form, PageRoute, Posted, Visitor, Visits, go, show
from repave.pages.snapshot import Snapshot

router = APIRouter(route_class=PageRoute)
Json = dict[str, Any]


def chosen_servers(scope: Scope, typed: str, ticked: list[str]) -> list[str]:
    """The names in the nodeset and the boxes ticked, each once. Raises bad-request, not-found."""
    try:
        names = list(dict.fromkeys([*(unfold(typed) if typed else []), *ticked]))
    except ValueError as error:
        raise RequestError("bad-request", str(error), field="servers") from None
    check_known(names, [s.name for s in scope.store.servers.list_servers(scope.project_id)[0]])
    return names


def _target(scope: Scope, form: Posted) -> Target:
    if form.one("retry"):
        return Target(retry=form.one("retry"))
    return Target(servers=chosen_servers(scope, form.one("servers"), form.fields.get("tick", [])), image=form.one("image") or None)


def _waves(form: Posted) -> Waves:
    return Waves(form.number("canary"), form.number("at_once"), form.number("max_failed"))


def _is_rehearsal(scope: Scope, form: Posted) -> bool:
    """A rehearsal's retry is one."""
    return form.one("rehearse") == "1" or (bool(form.one("retry")) and bool(show_batch(scope, form.one("retry"))["rehearse"]))


@router.get("/plan")
def show_plan(request: Request, who: Visits) -> Response:
    """Touches nothing."""
    form = Posted({name: request.query_params.getlist(name) for name in request.query_params})
    return _plan_page(request, who, form)


def _plan_page(request: Request, who: Visitor, form: Posted, fault: RepaveError | None = None) -> Response:
    scope, frame = who.scope, Snapshot(who.scope).frame("Plan")
    target, waves, rehearse = _target(scope, form), _waves(form), _is_rehearsal(scope, form)
    made = plan(scope, target)
    names = [e["server"] for e in made["erased"]]
    words = f"{'rehearse' if rehearse else 'erase'} {len(names)}"
    accounts = sorted({user_for(e["os_type"]) for e in made["erased"] if e["os_type"]})
    lines = [(label, text.replace(" (--json names them)", "")) for label, text in plan_lines(made, waves, rehearse=rehearse)]
    why_not = who.why_not(Role.OPERATOR) or ("the plan has problems" if made["problems"] else "")
    return show(
        request, who, "plan.html", frame, plan=made, lines=lines, headline=plan_headline(made, rehearse=rehearse), waves=waves, rehearse=rehearse, words=words,
        nodeset=fold(names), retry=form.one("retry"), image=form.one("image"), images=scope.store.images.list_images(scope.project_id), accounts=accounts,
        command=_command(fold(names), form, waves, rehearse=rehearse), why_not=why_not, fault=fault.as_json() if fault else None,
        keys=form.one("ssh_keys"), number=count(len(names), "server"),
    )  # fmt: skip


def _command(nodeset: str, form: Posted, waves: Waves, *, rehearse: bool) -> str:
    """What does the same on the command line."""
    words = ["repave", "batch", "retry", form.one("retry")] if form.one("retry") else ["repave", "reinstall", shlex.quote(nodeset)]
    if form.one("image") and not form.one("retry"):
        words += ["--image", shlex.quote(form.one("image"))]
    words += ["--rehearse"] if rehearse else []
    for flag, value in (("--canary", waves.canary), ("--at-once", waves.at_once), ("--max-failed", waves.max_failed)):
        words += [flag, str(value)] if value is not None else []
    return " ".join(words)


@router.post("/reinstall")
def start(request: Request, who: Visits, form: Form) -> Response:
    """The batch has begun, and its page is shown; or the plan is shown again and says why not, nothing touched."""
    scope = who.needs(Role.OPERATOR)
    try:
        batch = _start(scope, form)
    except RepaveError as fault:
        answer = _plan_page(request, who, form, fault)
        answer.status_code = 409
        return answer
    return go(f"/b/{batch['id']}")


def _start(scope: Scope, form: Posted) -> Json:
    target, waves, rehearse = _target(scope, form), _waves(form), _is_rehearsal(scope, form)
    made = plan(scope, target)
    words = f"{'rehearse' if rehearse else 'erase'} {len(made['erased'])}"
    if form.one("words") != words:
        raise RequestError("bad-request", f"Type {words!r} to start: what was typed is something else.", field="words")
    if made["problems"]:
        raise RequestError("conflict", "The plan has problems.", field="plan")
    password = "" if rehearse else form.secret("password")
    if not rehearse:
        if password != form.secret("again"):
            raise RequestError("bad-request", "The two passwords are different.", field="password")
        for os_type in sorted({e["os_type"] for e in made["erased"] if e["os_type"]}):
            if fault := find_password_fault(password, user=user_for(os_type)):
                raise RequestError("bad-request", f"The password {fault}.", field="password")
    asked = Reinstall(
        **target.model_dump(), password=password, ssh_keys=form.lines("ssh_keys"), plan=form.one("plan"), rehearse=rehearse,
        canary=waves.canary, at_once=waves.at_once, max_failed=waves.max_failed,
    )  # fmt: skip
    return begin_reinstall(scope, asked, Response())
