"""/errors/CODE: what an error means. Anyone may read it: it is what the `type` of a problem names."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from repave.errors import CATALOGUE, RequestError
from repave.pages.door import PageRoute, find_visitor, show
from repave.pages.frame import Frame

router = APIRouter(route_class=PageRoute)


@router.get("/errors/{code}")
def show_error(request: Request, code: str) -> Response:
    """By code (Repave.2110) or class."""
    problem = next((p for slug, p in CATALOGUE.items() if code in (p.code, slug)), None)
    if problem is None:
        raise RequestError("not-found", f"There is no error {code[:50]!r}.")
    return show(request, find_visitor(request), "explain.html", Frame(problem.code), problem=problem)
