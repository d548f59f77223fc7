"""The one place where errors become answers: iMetal codes on the CloudDC routes, problem+json on our own.

CloudDC: `{"error_code","error_msg"}`, 429 a bare JSON string (clouddc-api.md 4.1, 4.2). No value of a request is ever repeated
but ids that have the form of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import Response

from repave.errors import RepaveError, RequestError

OWN_PREFIX = "/repave/"


class WireError(Exception):
    """One error answer of a CloudDC route, finished."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})
        super().__init__(f"{status} {code} {message}")

    def answer(self) -> Response:
        body: Any = {"error_code": self.code, "error_msg": self.message}
        if self.status == 429:
            body = self.message  # documented as a bare string; the SDK reads the status alone
        return json_answer(self.status, body, self.headers)


def json_answer(status: int, body: Any, headers: Mapping[str, str] | None = None, *, media_type: str = "application/json") -> Response:
    return Response(json.dumps(body), status, dict(headers or {}), media_type)


def bad_value(name: str, why: str) -> WireError:
    return WireError(400, "iMetal.0001", f"A request parameter contains invalid or unsupported value: {name} ({why})")


def missing(*names: str) -> WireError:
    return WireError(400, "iMetal.0002", f"Missing required parameters: {', '.join(names)}")


def unauthorized(why: str) -> WireError:
    return WireError(401, "iMetal.0003", f"Unauthorized: {why}" if why else "Unauthorized", {"WWW-Authenticate": "SDK-HMAC-SHA256"})


def forbidden(why: str) -> WireError:
    return WireError(403, "iMetal.0004", f"Insufficient permissions: {why}")


def too_many(retry_after_s: int) -> WireError:
    return WireError(429, "iMetal.0005", "Too many requests", {"Retry-After": str(retry_after_s)})


def internal() -> WireError:
    return WireError(500, "iMetal.0099", "Internal server error")


def unavailable() -> WireError:
    """The database takes nothing now. The page knows no code for it; the status is what clients act on, and the SDK sends a 503 again if told to."""
    return WireError(503, "iMetal.0099", "Internal server error: the database can not be used now", {"Retry-After": "10"})


def no_server(ids: Iterable[str] = ()) -> WireError:
    return WireError(404, "iMetal.0100", f"Physical servers ID not found: {_listed(ids)}")


def not_ready(ids: Iterable[str], why: str) -> WireError:
    return WireError(400, "iMetal.0101", f"Physical servers state is not ready: {_listed(ids)} ({why})")


def no_instance(ids: Iterable[str] = ()) -> WireError:
    return WireError(404, "iMetal.0200", f"Instances not found: {_listed(ids)}")


def wrong_state(ids: Iterable[str]) -> WireError:
    # The page is cut off after "In"; ours follows the pattern of iMetal.0101 (clouddc-api.md 4.2).
    return WireError(400, "iMetal.0201", f"Instances state is not running: {_listed(ids)}")


def from_status(status: int, headers: Mapping[str, str] | None = None) -> WireError:
    """The answer for what the router and the gateway in front of the service would refuse; APIGW codes are the gateway's."""
    code, message = {
        404: ("APIGW.0101", "API does not exist"),
        405: ("APIGW.0101", "API does not exist: this path takes another method"),
        408: ("APIGW.0201", "API request error: the request did not arrive in time"),
        413: ("APIGW.0201", "Request entity too large: 64 KiB at most"),
    }.get(status, ("APIGW.0201", "API request error"))
    return internal() if status >= 500 else WireError(status, code, message, headers)


def to_wire(error: RepaveError) -> WireError:
    """A RepaveError on a CloudDC route. Client texts only where the client must act."""
    kind, ids = error.context.get("kind"), error.context.get("ids", ())
    match error.slug, kind:
        case "not-logged-in", _:
            return unauthorized(error.detail)
        case "not-allowed", _:
            return forbidden(error.detail)
        case "not-found", "instance":
            return no_instance(ids)
        case "not-found", "image":
            return bad_value("image_id", "there is no such image")
        case (("locked" | "own-host"), _):
            return not_ready(ids, str(error))
        case (("conflict" | "in-progress"), _):
            return wrong_state(ids)
        case "bad-request", _:
            return bad_value(str(error.context.get("field", "request")), error.detail or error.problem.cause)
        case "key-used", _:
            return bad_value("Idempotency-Key", "it came with another request")
        case "not-found", _:
            return from_status(404)
        case (("database-unavailable" | "database-corrupt"), _):
            return unavailable()
    return internal()


def answer_for(path: str, error: RepaveError | WireError) -> Response:
    """The error in the words of the route that was asked: RFC 9457 on our own routes, CloudDC's shape everywhere else."""
    wire = to_wire(error) if isinstance(error, RepaveError) else error
    if not path.startswith(OWN_PREFIX):
        return wire.answer()
    slug = {404: "not-found", 500: "internal"}.get(wire.status, "bad-request")
    known = error if isinstance(error, RepaveError) else RequestError(slug, wire.message)
    problem = known.as_json() | {"type": f"/errors/{known.code}", "status": wire.status, "detail": str(known)}
    return json_answer(wire.status, problem, wire.headers, media_type="application/problem+json")


def _listed(ids: Iterable[str]) -> str:
    return f"[{', '.join(ids)}]"
