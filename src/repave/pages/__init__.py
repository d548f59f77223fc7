"""The pages for people: server-drawn HTML that reads without JavaScript and is live with it.

A page is a view: a function of who asks and of the address that gives a Frame, the page's parts as HTML. The page is made of them once; its live
stream sends those that changed since. Views read and acts change through the functions of /repave/v1, so a button does what its command does.

    door.py       login, logout, the cookie, the token in each form, the headers of each answer, errors as pages
    frame.py      Frame: parts and lists of rows, and what changed between two
    live.py       one reader of the store for all open pages of the same thing; server-sent events
    snapshot.py   what one paint shows, read once
    waterfall.py  runs as bars on one axis of time; pure
    fleet.py batches.py servers.py images.py audit.py    the views
    console.py    a console from its first byte
    errors.py     what an error means, for everybody
    reinstall.py acts.py    plan and typed words; pause, resume, cancel, lock, unlock
"""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from repave.api.operator.desk import Desk
from repave.auth.login import Logins
from repave.pages import acts, audit, batches, console, door, errors, fleet, images, reinstall, render, servers
from repave.pages.live import Live


def build_pages_router(desk: Desk, logins: Logins) -> APIRouter:
    """All pages, their streams and their files."""
    house = door.House(desk, logins, Live(desk.store))

    async def attach(request: Request) -> None:
        request.state.house = house

    everything = APIRouter(dependencies=[Depends(attach)], tags=["pages"], include_in_schema=False)
    for part in (
        door.router, fleet.router, batches.router, console.router, servers.router, images.router, audit.router, reinstall.router, acts.router,
        errors.router, render.router,
    ):  # fmt: skip
        everything.include_router(part)
    return everything
