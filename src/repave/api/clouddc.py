"""The CloudDC routes under /v1: five operations of Huawei's contract, as the official SDK speaks them.

Owns shapes, filters and paging. Order of every request (clouddc-api.md 10): authentication, project and role, rate, body,
validation, lookup. Each endpoint is a sync function in FastAPI's thread pool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from repave.api.asgi import incoming
from repave.api.body import UUID, ReinstallOptions, check_content_type, parse_reinstall
from repave.api.idempotency import REPLAYED, name_request
from repave.api.limits import Kind, Limiter
from repave.api.wire_errors import bad_value, from_status, json_answer, no_instance, no_server, too_many
from repave.auth import Authenticator, Caller, check_may
from repave.domain.model import Image, Instance, Project, Role, Server
from repave.domain.password import find_password_fault, user_for
from repave.errors import RepaveError
from repave.store import Store
from repave.workflow.fleet import Fleet

MIN_PAGE, MAX_PAGE = 10, 1000  # clouddc-api.md 2.5, 3.1
MAX_FILTER_IDS = 100
NO_HEADERS: Mapping[str, str] = {}
POLL_AFTER_S = 5  # a hint on the 202: nothing changes faster
# Every value that a page or an SDK names (2.2, 3.1): asking for one that we never use gives an empty list.
INSTANCE_STATES = frozenset((
    "pending", "running", "stopping", "stopped", "reinstalling", "shutting-down", "terminated", "failed", "modifyIping", "switch-installing", "error",
))  # fmt: skip
MANAGE_STATES = frozenset(("delivering", "received", "onboard", "os-ready", "ready", "in-use", "frozen", "maintain", "offboarding"))


class ErrorBody(BaseModel):
    error_code: str
    error_msg: str


class InstanceRef(BaseModel):
    id: str


class Accepted(BaseModel):
    instances: list[InstanceRef]


class Failure(ErrorBody):
    error_type: str = "reinstall_error"  # the enum's rest is unseen; by the pattern of create_instance_error (2.2)


class InstanceStatus(BaseModel):
    state: str
    operation_state: str | None = None
    error: Failure | None = None


class ImageRef(BaseModel):
    id: str
    name: str
    os_type: str


class InstanceView(InstanceStatus):
    """QueryInstanceResponseBody. Repave has no VPCs and no tags: those are empty, as the SDK wants them there."""

    id: str
    name: str
    vpc_id: str = ""
    network_interfaces: list[dict[str, str]] = []
    tags: list[dict[str, str]] = []
    image: ImageRef
    description: str = ""
    metadata: dict[str, str] = {}
    server_id: str
    created_at: str
    updated_at: str
    launched_at: str


class PageInfo(BaseModel):
    """`next_marker` is the id of the last record, absent on the last page (3.8). There is no way back: `previous_marker` is never sent."""

    next_marker: str | None = None
    current_count: int


class InstancePage(BaseModel):
    instances: list[InstanceView]
    page_info: PageInfo
    count: int


class Location(BaseModel):
    dc: str = ""
    rack: str
    unit: str


class Hardware(BaseModel):
    sn: str
    manufacturer: str
    model: str


class ServerView(BaseModel):
    """PhysicalServer. `power_state` as last observed; absent where nobody has looked yet."""

    id: str
    name: str
    project_id: str
    domain_id: str
    manage_state: str = "in-use"  # a server here always has its instance (section 10)
    power_state: str | None = None
    health_state: str = "Unknown"
    onboard_time: str
    location: Location
    hardware_attributes: Hardware
    tags: list[dict[str, str]] = []


class ServerPage(BaseModel):
    servers: list[ServerView]
    page_info: PageInfo
    count: int


_REINSTALL_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {
    "type": "object",
    "required": ["password", "instance_id_set"],
    "properties": {
        "image_id": {"type": ["string", "null"], "description": "absent, null or empty: the current image of each instance"},
        "password": {"type": "string", "minLength": 8, "maxLength": 26, "writeOnly": True},
        "instance_id_set": {"type": "array", "minItems": 1, "maxItems": 50, "uniqueItems": True, "items": {"type": "string", "format": "uuid"}},
    },
}}}}}  # fmt: skip
_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 413, 415, 500)},
    429: {"model": str},
}


def build_clouddc_router(store: Store, fleet: Fleet, *, authenticate: Authenticator, limiter: Limiter) -> APIRouter:
    """The five operations. The app that takes them needs `install_wire`."""
    router = APIRouter(prefix="/v1/{project_id}", tags=["CloudDC"], responses=_ERRORS, redirect_slashes=False)

    def admit_caller(request: Request, project_id: str, needed: Role, kind: Kind) -> Caller:
        """Who it is, whether they may, whether now: in this order."""
        caller = authenticate.identify(incoming(request).presented)
        check_may(caller.credential, needed, project_id=project_id)
        retry_after_s = limiter.take(caller.credential.id, kind)
        if retry_after_s is not None:
            raise too_many(retry_after_s)
        return caller

    def check_passwords(project_id: str, wanted: ReinstallOptions) -> None:
        """The image is there, and the password is good for the user it will be set for; ids that are not known come later."""
        image = store.images.find_image(project_id, wanted.image_id) if wanted.image_id else None
        if wanted.image_id and image is None:
            raise bad_value("image_id", "there is no such image")
        known = [] if image else store.servers.list_instances(project_id, ids=wanted.instance_ids)[0]
        for os_type in sorted({image.os_type} if image else {i.os_type for i in known} or {"Linux"}):
            if fault := find_password_fault(wanted.password, user=user_for(os_type)):
                raise bad_value("password", fault)

    @router.put("/instances/reinstall", status_code=202, response_model=Accepted, openapi_extra=_REINSTALL_BODY)
    def reinstall_os(request: Request, project_id: str) -> Response:
        caller, sent = admit_caller(request, project_id, Role.OPERATOR, "change"), incoming(request)
        if sent.too_large:
            raise from_status(413)
        keys = name_request(sent, caller.credential, store.sealer) | ({caller.replay_key: ""} if caller.replay_key else {})
        if answer := _find_answer(store, keys):
            return _accepted_before(answer)
        check_content_type(sent.presented.values("content-type"), sent.presented.values("content-encoding"))
        wanted = parse_reinstall(sent.body)
        check_passwords(project_id, wanted)
        try:
            admitted = fleet.admit(
                credential=caller.credential, instance_ids=wanted.instance_ids, image_id=wanted.image_id,
                password=wanted.password, answer_keys=keys,
            )  # fmt: skip
        except RepaveError:
            # Two copies of one request at once: the second finds the first's instances busy, and its answer stored.
            if answer := _find_answer(store, keys):
                return _accepted_before(answer)
            raise
        return _accepted({"instances": [{"id": i} for i in admitted.instance_ids]}, admitted.batch_id)

    @router.get("/instances/{instance_id}/status", response_model=InstanceStatus)
    def show_instance_status(request: Request, project_id: str, instance_id: str) -> Response:
        admit_caller(request, project_id, Role.VIEWER, "read")
        found = store.servers.find_instance(project_id, instance_id) if UUID.fullmatch(instance_id) else None
        if found is None:
            raise no_instance([instance_id] if UUID.fullmatch(instance_id) else [])
        # Polled more than all else: written here, in this thread; FastAPI would go to another one for it.
        return Response(_status(found).model_dump_json(exclude_none=True), media_type="application/json")

    @router.get("/instances", response_model_exclude_none=True)
    def list_instances(request: Request, project_id: str) -> InstancePage:
        admit_caller(request, project_id, Role.VIEWER, "list")
        query = _query(request)
        ids, server_ids = _ids(query, "instance_id"), _ids(query, "server_id")
        if ids is not None and server_ids is not None:
            raise bad_value("server_id", "not together with instance_id")
        state, limit = _one_of(query, "instance_state", INSTANCE_STATES), _limit(query)
        found, total = store.servers.list_instances(project_id, state=state, ids=ids, server_ids=server_ids, after=_marker(query), limit=limit + 1)
        images = {image.id: image for image in store.images.list_images(project_id)}
        views = [_instance_view(i, images.get(i.image_id or "")) for i in found[:limit]]
        return InstancePage(instances=views, page_info=_page_info([v.id for v in views], len(found) > limit), count=total)

    @router.get("/physicalservers", response_model_exclude_none=True)
    def list_servers(request: Request, project_id: str) -> ServerPage:
        admit_caller(request, project_id, Role.VIEWER, "list")
        query = _query(request)
        state, after, limit = _one_of(query, "manage_state", MANAGE_STATES), _marker(query), _limit(query)
        found, total = store.servers.list_servers(project_id, after=after, limit=limit + 1) if state in (None, "in-use") else ([], 0)
        project = store.access.find_project(project_id)
        views = [_server_view(s, project, store.servers.read_power_seen(s.id)) for s in found[:limit]]
        return ServerPage(servers=views, page_info=_page_info([v.id for v in views], len(found) > limit), count=total)

    @router.get("/physicalservers/{server_id}", response_model_exclude_none=True)
    def show_server(request: Request, project_id: str, server_id: str) -> ServerView:
        admit_caller(request, project_id, Role.VIEWER, "read")
        found = store.servers.find_server(project_id, server_id) if UUID.fullmatch(server_id) else None
        if found is None:
            raise no_server([server_id] if UUID.fullmatch(server_id) else [])
        return _server_view(found, store.access.find_project(project_id), store.servers.read_power_seen(server_id))

    return router


def _find_answer(store: Store, keys: Mapping[str, str]) -> dict[str, Any] | None:
    """The answer that one of the keys has already; from now on each has it, so that a signature which came second opens nothing later."""
    found = {key: store.access.find_answer(key, request) for key, request in keys.items()}
    answer = next(filter(None, found.values()), None)
    for key in (key for key, request in keys.items() if answer and not found[key] and not request):
        store.access.keep_answer(key, answer or {})
    return answer


def _accepted_before(answer: dict[str, Any]) -> Response:
    return _accepted(answer["body"], answer.get("batch_id"), REPLAYED)


def _accepted(body: dict[str, Any], batch_id: str | None, more: Mapping[str, str] = NO_HEADERS) -> Response:
    link = {"Link": f'</repave/v1/batches/{batch_id}>; rel="monitor"'} if batch_id else {}
    return json_answer(202, body, {"Retry-After": str(POLL_AFTER_S), **link, **more})


def _status(instance: Instance) -> InstanceStatus:
    error = instance.error
    failure = Failure(error_code=error["code"], error_msg=f"{error['title']} {error['cause']}") if error else None
    operation = instance.operation_state.value if instance.operation_state else None
    return InstanceStatus(state=instance.state.value, operation_state=operation, error=failure)


def _instance_view(instance: Instance, image: Image | None) -> InstanceView:
    # An adopted instance has an unknown image: the SDK wants the object, so its id and name are empty.
    known = ImageRef(id=instance.image_id or "", name=image.name if image else "", os_type=image.os_type if image else instance.os_type)
    return InstanceView(
        **_status(instance).model_dump(), id=instance.id, name=instance.name, image=known, server_id=instance.server_id,
        created_at=_time(instance.created_at), updated_at=_time(instance.updated_at), launched_at=_time(instance.launched_at),
    )  # fmt: skip


def _server_view(server: Server, project: Project | None, power: tuple[str, datetime] | None) -> ServerView:
    seen = power[0].lower() if power else None
    return ServerView(
        id=server.id, name=server.name, project_id=server.project_id, domain_id=project.domain_id if project else "",
        power_state=seen if seen in ("on", "off") else None, onboard_time=_time(server.created_at),
        location=Location(rack=server.rack, unit=server.unit),
        hardware_attributes=Hardware(sn=server.serial, manufacturer=server.manufacturer, model=server.model),
    )  # fmt: skip


def _time(at: datetime | None) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ") if at else ""


def _page_info(ids: Sequence[str], more: bool) -> PageInfo:
    return PageInfo(next_marker=ids[-1] if more else None, current_count=len(ids))


def _query(request: Request) -> dict[str, str]:
    """The parameters, decoded as the signature's check decodes them; one sent twice is refused, an empty one is absent."""
    pairs = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    query = dict(pairs)
    if len(query) != len(pairs):
        raise bad_value("query", "a parameter is there twice")
    return {name: value for name, value in query.items() if value}


def _limit(query: dict[str, str]) -> int:
    found = re.fullmatch(r"(-?)0*([0-9]*)", text := query.get("limit", str(MIN_PAGE)))
    if not found or text == "-":
        raise bad_value("limit", "not a number")
    sign, digits = found.groups()
    return MIN_PAGE if sign else min(max(int(digits[:18] or 0), MIN_PAGE), MAX_PAGE)  # 18 digits say enough; Python parses 4300 at most


def _marker(query: dict[str, str]) -> str | None:
    marker = query.get("marker")
    if marker is not None and not UUID.fullmatch(marker):
        raise bad_value("marker", "not the id of a record")
    return marker


def _ids(query: dict[str, str], name: str) -> list[str] | None:
    """A list of ids; one that is not known, well-formed or not, finds nothing."""
    if name not in query:
        return None
    ids = query[name].split(",")
    if len(ids) > MAX_FILTER_IDS:
        raise bad_value(name, f"more than {MAX_FILTER_IDS} ids")
    return [i for i in ids if UUID.fullmatch(i)]


def _one_of(query: dict[str, str], name: str, values: frozenset[str]) -> str | None:
    value = query.get(name)
    if value is not None and value not in values:
        raise bad_value(name, "there is no such state")
    return value
