"""GET /metrics, for Prometheus: with a key of the site's project, sent as a bearer token, which is the form that Prometheus can send.

Not open to loopback: whoever comes through a proxy on this machine comes from there too.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from repave.api.asgi import incoming
from repave.api.operator.scope import SITE_PROJECT
from repave.auth import Authenticator, Presented
from repave.domain.model import Role
from repave.errors import RequestError
from repave.store import Store

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_metrics_router(store: Store, authenticator: Authenticator, render: Callable[[], bytes]) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    def metrics(request: Request) -> Response:
        credential = authenticator.identify(_with_bearer(incoming(request).presented)).credential
        site = store.access.find_project(SITE_PROJECT)
        if site is None or credential.project_id != site.id or not credential.role.includes(Role.VIEWER):
            raise RequestError("not-allowed", f"this needs a key of project {SITE_PROJECT}: it tells of all projects")
        return Response(render(), media_type=CONTENT_TYPE)

    return router


def _with_bearer(presented: Presented) -> Presented:
    """The same request with its bearer token, where it has one, as the token that all other routes take."""
    headers = [
        (b"x-auth-token", value[7:]) if name == b"authorization" and value[:7].lower() == b"bearer " else (name, value) for name, value in presented.headers
    ]
    return Presented(presented.method, presented.raw_path, presented.raw_query, headers, presented.body_sha256)
