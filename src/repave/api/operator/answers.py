"""What bodies and answers have in common: lists are {"items": [...], "next": null}; errors are RFC 9457 problem+json with the fields of RepaveError.as_json."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from repave.errors import RepaveError, RequestError, Who

Json = dict[str, Any]
T = TypeVar("T")


class Body(BaseModel):
    """A request body: unknown fields are refused, so that a typing error never means the default."""

    model_config = ConfigDict(extra="forbid")


_STATUS = {
    "bad-request": 400, "not-logged-in": 401, "not-allowed": 403, "not-found": 404, "image-missing": 404, "conflict": 409,
    "in-progress": 409, "too-many": 429, "locked": 409, "own-host": 409, "past-the-line": 409, "key-used": 422, "image-refused": 422,
    "image-quota": 507, "service-unreachable": 503, "order-cut-short": 503, "service-ending": 503, "webhook-failed": 502,
    "database-unavailable": 503, "database-corrupt": 503,
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


def must_exist(found: T | None, kind: str, reference: str) -> T:
    """What was looked for in the project. Raises not-found."""
    if found is None:
        raise RequestError("not-found", f"There is no {kind} {reference!r} in this project.", kind=kind)
    return found


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
