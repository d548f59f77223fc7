"""All routes under /repave/v1."""

from fastapi import APIRouter, Depends, Request

from repave.api.operator import access, batches, console, events, images, servers, webhooks
from repave.api.operator.desk import Desk


def build_operator_router(desk: Desk) -> APIRouter:
    async def attach(request: Request) -> None:
        request.state.desk = desk

    everything = APIRouter(prefix="/repave/v1", dependencies=[Depends(attach)], tags=["operator"])
    for part in (
        access.router, servers.router, images.router, images.imports, batches.router, console.router, events.router, webhooks.router,
    ):  # fmt: skip
        everything.include_router(part)
    return everything
