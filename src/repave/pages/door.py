"""Who comes in. Login and logout, the cookie, the token in each form, the headers of each answer, and errors as pages.

The cookie holds a random token, whose SHA-256 the database has. A form carries a MAC of it, made with the site's key: another site can neither read the
cookie nor make the MAC. SameSite=Strict keeps the cookie from requests that other sites begin; a link from a chat is followed once more from here.

The site's admin chooses a project by ?project=, and another cookie remembers it. A form names the one that its page showed, in its token: a button never acts
in a project that was chosen meanwhile in another window.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from repave.api.asgi import fault_of, incoming
from repave.api.limits import Limiter
from repave.api.operator.answers import status_of
from repave.api.operator.desk import Desk
from repave.api.operator.scope import Scope, check_role, is_site_admin, open_scope
from repave.auth.login import LASTS, Logins
from repave.domain.model import Role
from repave.errors import RepaveError, RequestError
from repave.pages.frame import Frame
from repave.pages.live import Live
from repave.pages.render import render

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip
_FORM_COOKIE = "repave-form"  # before there is a login: what the login form's token is a MAC of; `_cookie_name` has its prefix
_PROJECT_COOKIE = "repave-project"
_MOST_FIELDS = 500
_LONGEST_NAME = 100
_THEMES = ("system", "light", "dark")


class House:
    """What the pages work with. Guessing is slow: a few tries at once for a name from one address, then one in half a minute."""

    def __init__(self, desk: Desk, logins: Logins, live: Live) -> None:
        self.desk, self.logins, self.live = desk, logins, live
        self.tries_of_name, self.tries_from = Limiter(1 / 30, 5), Limiter(1 / 5, 20)

    def form_token(self, of: str) -> str:
        return self.desk.store.sealer.authenticate(of, about="form")


@dataclass(frozen=True)
class Posted:
    """The fields of a form."""

    fields: dict[str, list[str]]

    def one(self, name: str) -> str:
        return self.fields.get(name, [""])[0].strip()

    def secret(self, name: str) -> str:
        """As it was typed: blanks at its ends are part of it."""
        return self.fields.get(name, [""])[0]

    def lines(self, name: str) -> list[str]:
        return [line.strip() for line in self.one(name).splitlines() if line.strip()]

    def number(self, name: str) -> int | None:
        return parse_number(name, self.one(name))


def parse_number(name: str, text: str) -> int | None:
    """None where nothing was typed. Raises bad-request."""
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 4:
        raise RequestError("bad-request", f"{name}: must be a number.", field=name)
    return int(text)


@dataclass(frozen=True)
class Visitor:
    """Who is logged in, with which token, and in which project. `projects`: the names of those that they may choose from; none for who has but one."""

    house: House
    scope: Scope
    token: str
    project: str = ""
    projects: tuple[str, ...] = ()

    @property
    def form_token(self) -> str:
        return f"{self.house.form_token(f'{self.token} {self.scope.project_id}')}.{self.scope.project_id}"

    @property
    def naming(self) -> dict[str, str]:
        """What an address carries that must go on in this project."""
        return {"project": self.project} if self.projects else {}

    def needs(self, role: Role) -> Scope:
        """Raises not-allowed."""
        check_role(self.scope.credential, role)
        return self.scope

    def why_not(self, role: Role) -> str:
        """Why a button that needs this role is no use to them; "" = it is."""
        mine = self.scope.credential.role
        return "" if mine.includes(role) else f"needs the role {role.value}; yours is {mine.value}"


# ---- who asks, and what they sent ----


def _is_tls(request: Request) -> bool:
    return request.url.scheme == "https"


def _cookie_name(request: Request, name: str = "repave") -> str:
    """With TLS no other host of the domain can set it."""
    return f"__Host-{name}" if _is_tls(request) else name


def _set_cookie(request: Request, answer: Response, name: str, value: str, *, seconds: int) -> None:
    answer.set_cookie(name, value, max_age=seconds, path="/", secure=_is_tls(request), httponly=True, samesite="strict")


def posted(request: Request) -> Posted:
    body = incoming(request)
    if body.too_large:
        raise RequestError("bad-request", "The form is too large: 64 KiB at most.")
    try:
        return Posted(parse_qs(body.body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError:
        raise RequestError("bad-request", f"The form has more than {_MOST_FIELDS} fields.") from None


def visitor_of(request: Request, *, at_home: bool = False) -> Visitor:
    """Who is logged in, whatever they send, in the project that was chosen. Raises not-logged-in; not-allowed, not-found for a project that is named."""
    house: House = request.state.house
    token = request.cookies.get(_cookie_name(request), "")
    credential = house.logins.find(token)
    if credential is None:
        raise RequestError("not-logged-in")
    store = house.desk.store
    projects = {p.name: p.id for p in store.access.list_projects()} if is_site_admin(credential, store) else {}
    named = None if at_home else _named_project(request)
    if named is None and (remembered := request.cookies.get(_cookie_name(request, _PROJECT_COOKIE), "")) in projects:
        named = remembered
    scope = open_scope(credential, house.desk, named)
    if len(projects) < 2:
        return Visitor(house, scope, token)
    return Visitor(house, scope, token, next((name for name, its in projects.items() if its == scope.project_id), scope.named), tuple(projects))


def _named_project(request: Request) -> str | None:
    """By the address, or by the form's page."""
    if request.method == "POST":
        return posted(request).one("form").partition(".")[2] or None
    return request.query_params.get("project")


def find_visitor(request: Request) -> Visitor | None:
    """None for a stranger, and where the database can not tell: for pages that need neither, as those of errors."""
    with contextlib.suppress(Exception):
        return visitor_of(request)
    with contextlib.suppress(Exception):  # the project was the error
        return visitor_of(request, at_home=True)
    return None


def visitor(request: Request) -> Visitor:
    """Raises not-logged-in; not-allowed where a form is not from one of our pages, or a project not theirs; not-found for none."""
    who = visitor_of(request)
    if request.method == "POST":
        _check_form(posted(request), who.form_token)
    request.state.visitor = who
    return who


def _check_form(form: Posted, wanted: str) -> None:
    if not hmac.compare_digest(form.one("form").encode(), wanted.encode()):
        raise RequestError("not-allowed", "This form is not from a page of yours, or you have logged in anew since. Open the page again.", field="form")


Visits = Annotated[Visitor, Depends(visitor)]
Form = Annotated[Posted, Depends(posted)]


# ---- answers ----


class PageRoute(APIRoute):
    """A route whose errors are pages, and whose answers have the headers that keep everything else out."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                answer = await handle(request)
            except RequestValidationError as error:
                answer = await run_in_threadpool(_error_page, request, RequestError("bad-request", f"{error.errors()[0]['loc'][-1]} is not valid."))
            except RepaveError as error:
                answer = await run_in_threadpool(_error_page, request, error)
            except HTTPException:
                raise
            except Exception as error:  # ours, or the database's
                answer = await run_in_threadpool(_fault_page, request, fault_of(error, incoming(request).request_id))
            answer.headers.update(HEADERS)
            if (who := getattr(request.state, "visitor", None)) and who.projects and answer.status_code < 400 and not request.url.path.startswith("/live/"):
                _set_cookie(request, answer, _PROJECT_COOKIE, who.project, seconds=round(LASTS.total_seconds()))
            return answer

        return guarded


def _error_page(request: Request, error: RepaveError) -> Response:
    if error.slug == "not-logged-in" and not request.url.path.startswith("/live/"):
        if request.method != "GET":
            return RedirectResponse("/login", 303)
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        if request.headers.get("sec-fetch-site") == "cross-site":  # a link elsewhere: the browser kept the cookie back, and will send it from here
            return HTMLResponse(render("again.html", here=here, theme=_theme(request)))
        return RedirectResponse(f"/login?{urlencode({'next': here})}" if here != "/" else "/login", 303)
    return show(
        request,
        find_visitor(request),
        "error.html",
        Frame("That did not work"),
        error=error.as_json(),
        request_id=incoming(request).request_id,
        status=status_of(error),
    )


def _fault_page(request: Request, error: RepaveError) -> Response:
    more: dict[str, Any] = {"error": error.as_json(), "request_id": incoming(request).request_id, "asked": request.method}
    answer = show(request, find_visitor(request), "fault.html", Frame("Our fault"), status=status_of(error), **more)
    if error.problem.retryable and answer.status_code == 503:
        answer.headers["Retry-After"] = "10"
    return answer


def _theme(request: Request) -> str:
    chosen = request.cookies.get("repave-theme", "")
    return chosen if chosen in _THEMES else "system"


def show(request: Request, who: Visitor | None, template: str, frame: Frame, *, status: int = 200, live: str = "", **more: Any) -> Response:
    """The page, made of the frame's parts. `live`: the address of its stream."""
    here = request.url.path + (f"?{request.url.query}" if request.url.query and request.method == "GET" else "")
    theme, now = _theme(request), request.state.house.desk.store.now()
    values = {
        "who": who,
        "named": who.scope.named if who else "",
        "frame": frame,
        "live": live,
        "here": here if request.method == "GET" else "/",
        "theme": theme,
    }
    following = _THEMES[(_THEMES.index(theme) + 1) % len(_THEMES)]
    return HTMLResponse(render(template, **values, next_theme=following, now=now, **frame.fixed, **more), status)


def go(to: str) -> Response:
    return RedirectResponse(to, 303)


# ---- views ----

View = Callable[[Scope, dict[str, str]], Frame]


def add_view(router: APIRouter, path: str, template: str, view: View) -> None:
    """`path` shows the view, /live`path` keeps it true. Both give it the address's parts and fields."""

    def page(request: Request, who: Visits) -> Response:
        frame = view(who.scope, _asked(request))
        query = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "project"] + [*who.naming.items()])
        return show(request, who, template, frame, live=f"/live{quote(request.url.path)}{'?' if query else ''}{query}")

    async def stream(request: Request, who: Visits) -> Response:
        scope, asked = who.scope, _asked(request)
        await run_in_threadpool(view, scope, asked)  # what is not there is an answer, not a stream
        key = (view.__module__, view.__name__, scope.project_id, scope.named, scope.credential.role.value, urlencode(sorted(asked.items())))

        async def is_welcome() -> bool:
            return await run_in_threadpool(who.house.logins.find, who.token) is not None

        def messages() -> AsyncIterator[str]:
            last_id = request.headers.get("last-event-id") or request.query_params.get("frame", "")  # the first time it is the page's own
            return who.house.live.stream(key, scope.project_id, lambda: view(scope, asked), last_id=last_id, is_welcome=is_welcome)

        return StreamingResponse(messages(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    router.add_api_route(path, page, methods=["GET"], response_class=HTMLResponse)
    router.add_api_route(f"/live{path}", stream, methods=["GET"])


def _asked(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.query_params.items() if name not in ("frame", "project")} | request.path_params


# ---- login, logout, theme ----

router = APIRouter(route_class=PageRoute)


def _local(address: str) -> str:
    """A path of ours, else the front page: a login never leads elsewhere."""
    fine = address.startswith("/") and not address.startswith("//") and "\\" not in address and address.isprintable()
    return address if fine else "/"


@router.get("/login")
def show_login(request: Request, next: str = "/") -> Response:
    return _login_page(request, next, "")


def _login_page(request: Request, after: str, fault: str, *, name: str = "", status: int = 200) -> Response:
    house: House = request.state.house
    secret = secrets.token_urlsafe(32)
    answer = show(request, None, "login.html", Frame("Log in"), after=_local(after), fault=fault, name=name, form=house.form_token(secret), status=status)
    _set_cookie(request, answer, _cookie_name(request, _FORM_COOKIE), secret, seconds=3600)
    return answer


@router.post("/login")
def log_in(request: Request, form: Form) -> Response:
    house: House = request.state.house
    after, name = _local(form.one("next")), form.one("name")
    try:
        _check_form(form, house.form_token(request.cookies.get(_cookie_name(request, _FORM_COOKIE), "")))
    except RequestError:
        return _login_page(request, after, "This form was open too long. Try again.", name=name, status=403)
    address = request.client.host if request.client else ""
    if len(name) > _LONGEST_NAME:
        return _login_page(request, after, "Name or password is wrong.", status=401)
    if wait := house.tries_from.take(address, "change") or house.tries_of_name.take(f"{address} {name.lower()}", "change"):
        answer = _login_page(request, after, f"Too many tries. Wait {wait} s.", name=name, status=429)
        answer.headers["Retry-After"] = str(wait)
        return answer
    try:
        token = house.logins.log_in(name, form.secret("password"))
    except RequestError as refused:
        return _login_page(request, after, refused.detail, name=name, status=401)
    answer = go(after)
    _set_cookie(request, answer, _cookie_name(request), token, seconds=round(LASTS.total_seconds()))
    answer.delete_cookie(_cookie_name(request, _FORM_COOKIE), path="/", secure=_is_tls(request))
    return answer


@router.post("/logout")
def log_out(request: Request, who: Visits) -> Response:
    who.house.logins.log_out(who.token)
    answer = go("/login")
    answer.delete_cookie(_cookie_name(request), path="/", secure=_is_tls(request), httponly=True, samesite="strict")
    return answer


@router.post("/theme")
def set_theme(request: Request, who: Visits, form: Form) -> Response:
    answer = go(_local(form.one("next")))
    if form.one("theme") in _THEMES:
        _set_cookie(request, answer, "repave-theme", form.one("theme"), seconds=365 * 86400)
    return answer
