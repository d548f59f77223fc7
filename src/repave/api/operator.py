"""The operator API, /repave/v1: projects, keys, servers, images, batches, plans, events.

Lists are {"items": [...], "next": null}; errors are RFC 9457 problem+json with the fields of RepaveError.as_json. Whoever asks is
known by the same token or signature as on CloudDC's routes, and sees one project: their own, or, for an admin of project `default`
(the site's admin), the one that ?project= names.
"""

import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from repave.api.asgi import incoming
from repave.auth import Caller
from repave.auth.aksk import Presented
from repave.bmc import BmcAddress, BmcFacts
from repave.domain.model import Credential, Image, Role, Server, Step, Webhook
from repave.domain.waves import Waves
from repave.errors import RepaveError, RequestError, Who
from repave.images.fetch import ImageSources
from repave.store import Store
from repave.workflow.fleet import Override
from repave.workflow.power import PowerSwitch

SITE_PROJECT = "default"
Json = dict[str, Any]
T = TypeVar("T")


class Admits(Protocol):
    """What these routes ask of workflow.fleet."""

    def admit(
        self, *, credential: Credential, instance_ids: list[str], image_id: str | None, password: str,
        ssh_keys: tuple[str, ...] = (), user_data: str = "", answer_keys: Mapping[str, str] = ..., rehearse: bool = False,
        waves: Waves = ..., overrides: Mapping[str, Override] = ...,
    ) -> Any: ...  # fmt: skip

    def refuse_protected(self, servers: Sequence[Server]) -> None:
        """Raises RequestError locked or own-host."""


class Images(Protocol):
    """What these routes ask of the image store: room for a file, that file made into an image, and its chunks gone."""

    folder: Path
    over: threading.Event  # the service ends: no import goes on
    sources: ImageSources

    def room_bytes(self) -> int:
        """Bytes that may still be stored."""

    def add(
        self, file: Path | int, *, name: str, os_type: str, arch: str, project_id: str, image_id: str, created_at: datetime,
        progress: Callable[[int, int], None],
    ) -> Image:  # fmt: skip
        """The image of this file, its chunks stored. Blocks for minutes. Raises ImageError."""

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else imports or removes, on any worker: an image whose row is not there yet must not be swept. Blocks while an import runs."""

    def verify(self, manifest_sha256: str) -> None:
        """Every chunk has its digest. Blocks 0.8 s per GB. Raises ImageError."""

    def sweep(self, manifests_in_use: list[str]) -> int:
        """Manifests not in use are gone, and the chunks that no other needs. How many."""


@dataclass
class ImportProgress:
    """One import under way, as GET /imports shows it. `total_bytes` 0: not known."""

    project_id: str
    name: str
    begun_at: datetime
    stage: Literal["receive", "fetch", "check", "wait", "store"] = "receive"  # wait: for another import
    done_bytes: int = 0
    total_bytes: int = 0

    def begin(self, stage: Literal["fetch", "check", "wait", "store"]) -> None:
        self.stage, self.done_bytes, self.total_bytes = stage, 0, 0

    def tell(self, done: int, total: int) -> None:
        self.done_bytes, self.total_bytes = done, total


@dataclass(frozen=True)
class Desk:
    """What the routes work with."""

    store: Store
    fleet: Admits
    images: Images
    identify: Callable[[Presented], Caller]
    probe: Callable[[BmcAddress], BmcFacts]  # asks a BMC what it is and touches nothing; raises BmcError
    find_unreachable: Callable[[str], str | None]  # by a BMC's URL: the setting whose address can not be reached from there
    set_bmc_password: Callable[[BmcAddress, str], None]
    power: PowerSwitch
    send_test: Callable[[Webhook], None]
    imports: list[ImportProgress]  # under way in this process
    waits_s: Mapping[Step, float] = field(default_factory=dict)  # how long a step may wait for the outside, by the site's settings
    describe_site: Callable[[], Json] = dict  # versions, and settings without secrets


@dataclass(frozen=True)
class Scope:
    """Who asks, in which project, and what to work with. `credential.project_id` is the project looked at."""

    credential: Credential
    desk: Desk
    replay_key: str | None = None  # names the signed request, where it was signed
    named: str = ""  # the project's name, where it is not their own: what they do there by a command says it too

    @property
    def store(self) -> Store:
        return self.desk.store

    @property
    def project_id(self) -> str:
        return self.credential.project_id

    @property
    def actor(self) -> str:
        return self.credential.name


class Body(BaseModel):
    """A request body: unknown fields are refused, so that a typing error never means the default."""

    model_config = ConfigDict(extra="forbid")


# ---- who may, and how it fails ----


def is_site_admin(credential: Credential, store: Store) -> bool:
    site = store.access.find_project(SITE_PROJECT)
    return site is not None and credential.project_id == site.id and credential.role is Role.ADMIN


def check_role(credential: Credential, role: Role) -> None:
    """Raises not-allowed where this is less."""
    if not credential.role.includes(role):
        raise RequestError("not-allowed", f"This needs the role {role.value}; this is {credential.role.value}.", role=role.value)


def open_scope(credential: Credential, desk: Desk, project: str | None, replay_key: str | None = None) -> Scope:
    """In the project that is named: their own, or any for the site's admin. Raises not-allowed, not-found."""
    named = desk.store.access.find_project(project) if project is not None else None
    if project is None or (named is not None and named.id == credential.project_id):
        return Scope(credential, desk, replay_key)
    if not is_site_admin(credential, desk.store):
        raise RequestError("not-allowed", "Another project may be named by an admin of project default only.", field="project")
    if named is None:
        raise RequestError("not-found", f"There is no project {project!r}.", field="project")
    return Scope(replace(credential, project_id=named.id), desk, replay_key, named.name)


def _needs(role: Role) -> Callable[[Request, str | None], Scope]:
    def scope(request: Request, project: str | None = None) -> Scope:
        desk: Desk = request.state.desk
        caller = desk.identify(incoming(request).presented)
        check_role(caller.credential, role)
        return open_scope(caller.credential, desk, project, caller.replay_key)

    return scope


Viewer = Annotated[Scope, Depends(_needs(Role.VIEWER))]
Operator = Annotated[Scope, Depends(_needs(Role.OPERATOR))]
Admin = Annotated[Scope, Depends(_needs(Role.ADMIN))]

_STATUS = {
    "bad-request": 400, "not-logged-in": 401, "not-allowed": 403, "not-found": 404, "image-missing": 404, "conflict": 409,
    "in-progress": 409, "too-many": 429, "locked": 409, "own-host": 409, "past-the-line": 409, "key-used": 422, "image-refused": 422,
    "image-quota": 507, "service-unreachable": 503, "webhook-failed": 502, "database-unavailable": 503, "database-corrupt": 503,
}  # fmt: skip
_STATUS_BY_WHO = {Who.REQUEST: 400, Who.BMC: 502, Who.IMAGE: 422, Who.US: 500}


def status_of(error: RepaveError) -> int:
    return _STATUS.get(error.slug) or _STATUS_BY_WHO.get(error.problem.who, 409)


def render_problem(error: RepaveError) -> JSONResponse:
    """RFC 9457, with our own fields beside the standard ones."""
    status = status_of(error)
    body = error.as_json() | {"type": f"/errors/{error.code}", "status": status, "detail": str(error)}
    headers = {"WWW-Authenticate": "SDK-HMAC-SHA256"} if status == 401 else None  # the one HTTP scheme taken; X-Auth-Token is none
    return JSONResponse(body, status, headers, media_type="application/problem+json")


class ProblemRoute(APIRoute):
    """A route whose errors are problem+json. What a client sent is never repeated: it may be a password."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"][1:]) or "body"
                return render_problem(RequestError("bad-request", f"{field}: {first['msg'].removeprefix('Value error, ')}.", field=field))
            except RepaveError as error:
                return render_problem(error)

        return guarded


def render_list(items: list[Json], next_: int | str | None = None) -> Json:
    return {"items": items, "next": next_}


MAX_PAGE = 1000
After = Annotated[str | None, Query(max_length=200, description="Where to go on: the `next` of the page before. Stable under what is added meanwhile.")]
Limit = Annotated[int | None, Query(ge=1, le=MAX_PAGE, description="How many at most; without it all.")]
PageLimit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="How many at most.")]


def one_more(limit: int | None) -> int | None:
    """What to ask the store for, so that it is known whether another page follows."""
    return None if limit is None else limit + 1


def cut_page(found: Sequence[T], limit: int | None, key: Callable[[T], str]) -> tuple[Sequence[T], str | None]:
    """The page and its `next`, out of a list of one more than `limit` where there is one more."""
    return (found[:limit], key(found[limit - 1])) if limit is not None and len(found) > limit else (found, None)


# ---- whoami, projects, keys ----

router = APIRouter(route_class=ProblemRoute)


def _credential_json(credential: Credential) -> Json:
    return asdict(credential) | {"role": credential.role.value}


@router.get("/whoami")
def whoami(scope: Viewer) -> Json:
    project = scope.store.access.find_project(scope.project_id)
    assert project is not None
    return {
        "name": scope.actor, "role": scope.credential.role.value, "project": project.name, "project_id": project.id,
        "site_admin": is_site_admin(scope.credential, scope.store), "expires_at": scope.credential.expires_at,
    }  # fmt: skip


@router.get("/room")
def show_room(scope: Viewer) -> Json:
    """Bytes that images may still take, by quota and disk."""
    return {"image_bytes": scope.desk.images.room_bytes()}


@router.get("/projects")
def list_projects(scope: Viewer) -> Json:
    """All projects for the site's admin, one's own for the others."""
    everything = is_site_admin(scope.credential, scope.store)
    return render_list([asdict(p) for p in scope.store.access.list_projects() if everything or p.id == scope.project_id])


class NewProject(Body):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")


@router.post("/projects", status_code=201)
def add_project(scope: Admin, new: NewProject) -> Json:
    if not is_site_admin(scope.credential, scope.store):
        raise RequestError("not-allowed", "Projects are added by an admin of project default.", role="admin")
    return asdict(scope.store.access.add_project(new.name))


class NewKey(Body):
    name: str = Field(min_length=1, max_length=100)
    role: Role
    expires_at: datetime | None = None


@router.get("/keys")
def list_keys(scope: Admin, after: After = None, limit: Limit = None) -> Json:
    """Oldest first."""
    found, following = cut_page(scope.store.access.list_credentials(scope.project_id, after=after, limit=one_more(limit)), limit, lambda c: c.id)
    return render_list([_credential_json(c) for c in found], following)


@router.post("/keys", status_code=201)
def add_key(scope: Admin, new: NewKey) -> Json:
    """SK and token are in this answer and never again."""
    if new.expires_at is not None and new.expires_at.tzinfo is None:
        raise RequestError("bad-request", "expires_at: needs a time zone, as in 2027-01-31T00:00:00Z.", field="expires_at")
    made, sk, token = scope.store.access.add_credential(scope.project_id, new.name, new.role, expires_at=new.expires_at)
    return _credential_json(made) | {"sk": sk, "token": token}


@router.delete("/keys/{key_id}", status_code=204)
def remove_key(scope: Admin, key_id: str) -> None:
    scope.store.access.remove_credential(scope.project_id, key_id)


def build_operator_router(desk: Desk) -> APIRouter:
    """All routes under /repave/v1."""
    # The resources use what this module defines, so they are imported when it is complete.
    from repave.api import operator_batches, operator_console, operator_events, operator_images, operator_servers, operator_users, operator_webhooks

    async def attach(request: Request) -> None:
        request.state.desk = desk

    everything = APIRouter(prefix="/repave/v1", dependencies=[Depends(attach)], tags=["operator"])
    for part in (
        router, operator_users.router, operator_servers.router, operator_images.router, operator_images.imports, operator_batches.router,
        operator_console.router, operator_events.router, operator_webhooks.router,
    ):  # fmt: skip
        everything.include_router(part)
    return everything
