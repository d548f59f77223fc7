"""GET /repave/v1/health: whether new reinstalls can be taken. For monitors and load balancers, so without a key; it says nothing of servers or tenants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse


class Part(Protocol):
    """One part of the service, as last looked at."""

    @property
    def ok(self) -> bool: ...
    @property
    def text(self) -> str: ...
    @property
    def since(self) -> datetime: ...


def build_health_router(look: Callable[[], Mapping[str, Part]]) -> APIRouter:
    """200 when all parts are well, 503 when one is not."""
    router = APIRouter(tags=["operator"])

    @router.get("/repave/v1/health")
    async def health() -> JSONResponse:  # it reads what is known: it must answer also while every thread waits for the database
        parts = look()
        well = all(part.ok for part in parts.values())
        body = {"status": "ok" if well else "failing", "parts": {n: {"ok": p.ok, "text": p.text, "since": p.since.isoformat()} for n, p in parts.items()}}
        return JSONResponse(body, 200 if well else 503)

    return router
