"""Templates and files. What a template prints is escaped; no page has a script, a style or a file from elsewhere."""

from __future__ import annotations

import functools
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from fastapi import APIRouter
from fastapi.responses import Response

from repave import __version__, folding
from repave.errors import RequestError

router = APIRouter()
_HERE = Path(__file__).parent
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


def clock(at: str | datetime | None) -> str:
    """The time of day, in UTC."""
    return folding.parse_time(at).astimezone(UTC).strftime("%H:%M:%S") if at else ""


def moment(at: str | datetime | None) -> str:
    """Date and time, in UTC."""
    return folding.parse_time(at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if at else ""


def iso(at: str | datetime | None) -> str:
    return folding.parse_time(at).astimezone(UTC).isoformat(timespec="seconds") if at else ""


@functools.cache
def _file(name: str) -> tuple[bytes, str]:
    """Its content and a short digest of it. Raises not-found."""
    path = _HERE / "static" / name
    if path.parent != _HERE / "static" or path.suffix not in _TYPES or not path.is_file():
        raise RequestError("not-found", "There is no such file.")
    content = path.read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:12]


def static(name: str) -> str:
    """The address of a file; it changes with the file."""
    return f"/static/{name}?{_file(name)[1]}"


@functools.cache
def templates() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"duration": folding.duration, "size": folding.size, "clock": clock, "moment": moment, "iso": iso, "fold": folding.fold}
    env.globals |= {"count": folding.count, "static": static, "version": __version__, "took": folding.took}
    return env


@functools.lru_cache(64)
def parts(named: str = "") -> Any:
    """The macros that draw parts of pages: `parts().headline(batch)`. `named`: the project that commands must name (Scope.named)."""
    return templates().get_template("parts.html").make_module({"named": named})


def render(template: str, **values: Any) -> str:
    return templates().get_template(template).render(**{"named": "", **values})


@router.get("/static/{name}")
def send_file(name: str) -> Response:
    try:
        content, _ = _file(name)
    except RequestError:
        return Response(status_code=404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Cross-Origin-Resource-Policy": "same-origin"}
    return Response(content, media_type=_TYPES[Path(name).suffix], headers=headers)
