"""/i: images, where they run, and imports under way."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from repave.api.operator.images import list_images, list_imports
from repave.api.operator.scope import Scope
from repave.folding import fold
from repave.pages.door import PageRoute, add_view
from repave.pages.frame import Frame
from repave.pages.render import parts
from repave.pages.snapshot import Snapshot

router = APIRouter(route_class=PageRoute)
Json = dict[str, Any]


def view_images(scope: Scope, asked: dict[str, str]) -> Frame:
    part = parts(scope.named)
    snapshot = Snapshot(scope)
    frame = snapshot.frame("Images")
    images: list[Json] = sorted(list_images(scope)["items"], key=lambda i: str(i["name"]))
    imports: list[Json] = list_imports(scope)["items"]
    frame.moving = frame.moving or bool(imports)
    for image in images:
        on = [s["name"] for s in snapshot.servers if s["instance"]["image_id"] == image["id"]]
        frame.add("images", f"i-{image['id']}", part.image_row(image, fold(on) if on else "", len(on)))
    frame.put("imports", part.imports(imports))
    frame.fixed = {"any": bool(images)}
    return frame


add_view(router, "/i", "images.html", view_images)
