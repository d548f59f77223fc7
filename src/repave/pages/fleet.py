"""/: all servers, by rack. The elevation is the status: a tile is glyph, name and word, and a colour beside them. Counts are of the tiles shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from repave.api.operator.scope import Scope
from repave.errors import RequestError
from repave.folding import GLYPHS, LATE, count, fold, unfold
from repave.pages.door import PageRoute, Visits, add_view
from repave.pages.frame import Frame
from repave.pages.render import parts
from repave.pages.snapshot import Snapshot

router = APIRouter(route_class=PageRoute)
Json = dict[str, Any]
STATES = ("failed", "late", "working", "waiting", "running")


@dataclass(frozen=True)
class Tile:
    """One server. `detail` is what it says when there is room."""

    name: str
    state: str
    glyph: str
    word: str
    detail: str
    rack: str
    unit: str
    os_now: str
    model: str
    locked: str
    dim: bool = False


def tile_of(server: Json, run: Json | None) -> Tile:
    instance, lock = server["instance"], server["lock"]
    os_now = instance["image"] or ("an image that was removed" if instance["image_id"] else "an OS we did not install")
    error = instance["error"] or {}
    if run is not None:
        state = "late" if run["late"] else run["state"]
        glyph = LATE if run["late"] else GLYPHS[run["state"]]
        percent = f" {run['percent']} %" if run["percent"] is not None else ""
        word = "waiting" if state == "waiting" else f"{run['step_index']}/{run['steps']}{percent}{' late' if run['late'] else ''}"
        side = "past the line" if run["past_the_line"] else "before the line"
        detail = f"{'rehearsal, ' if run['rehearse'] else ''}{run['step']} · {side}"
    elif instance["state"] == "error" or instance["operation_state"] == "reinstall-failed":
        code = str(error.get("code", "")).rpartition(".")[2]
        state, glyph, word = "failed", GLYPHS["failed"], code or "failed"
        detail = f"{error.get('title', 'The last reinstall failed.')} · now: {os_now if instance['state'] == 'running' else 'no OS runs'}"
    else:
        state, glyph, word, detail = "running", GLYPHS["running"], "", f"runs {os_now}"
    locked = f"locked by {lock['by']}: {lock['reason']}" if lock else ""
    shown_os = os_now if instance["state"] == "running" else "-"
    return Tile(server["name"], state, glyph, word, detail, server["rack"] or "", server["unit"] or "", shown_os, server["model"], locked)


def _matches(query: str, names: list[str]) -> set[str]:
    """The names that a search means: a nodeset of them, or a part of a name."""
    try:
        exact = set(unfold(query)) & set(names)
    except ValueError:
        exact = set()
    return exact or {name for name in names if query.lower() in name.lower()}


def view_fleet(scope: Scope, asked: dict[str, str]) -> Frame:
    part = parts(scope.named)
    snapshot = Snapshot(scope)
    frame = snapshot.frame("Fleet")
    tiles = [tile_of(s, snapshot.live_runs.get(s["name"])) for s in snapshot.servers]
    query, table = asked.get("q", "").strip(), asked.get("view") == "table"
    wanted = _matches(query, [t.name for t in tiles]) if query else {t.name for t in tiles}
    numbers = {state: sum(t.state == state for t in tiles) for state in STATES}
    frame.put("counts", part.fleet_counts(count(len(tiles), "server"), numbers, sum(bool(t.locked) for t in tiles), GLYPHS | {"late": LATE}))
    frame.put("said", part.said(", ".join(f"{number} {state}" for state, number in numbers.items() if number)))
    for tile in tiles if table else []:
        frame.add("tiles", f"t-{tile.name}", part.tile_row(tile, tile.name not in wanted))
    racks: dict[str, list[Tile]] = {}
    for tile in tiles:
        racks.setdefault(tile.rack, []).append(tile)
    for number, rack in enumerate(sorted(racks, key=_natural)):
        for tile in sorted(racks[rack], key=lambda t: (-_unit(t.unit), _natural(t.name))) if not table else []:
            frame.add(f"rack-{number}", f"t-{tile.name}", part.tile(tile, tile.name not in wanted))
    frame.fixed = {
        "servers": tiles, "table": table, "query": query, "found": len(wanted), "racks": list(enumerate(sorted(racks, key=_natural))),
        "selected": asked.get("sel", ""), "images": scope.store.images.list_images(scope.project_id),
    }  # fmt: skip
    return frame


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", text) if part]


def _unit(text: str) -> int:
    """Where the server sits in its rack; what has no number goes below."""
    found = re.search(r"\d+", text)
    return int(found.group()) if found else -1


add_view(router, "/", "fleet.html", view_fleet)


@router.get("/fold")
def fold_names(who: Visits, names: str = "", nodeset: str = "") -> Response:
    """Names as a nodeset, or a nodeset as names: what was clicked and what was typed are one selection."""
    try:
        chosen = unfold(nodeset) if nodeset else [n for n in names.split(",") if n]
        return JSONResponse({"nodeset": fold(chosen) if chosen else "", "names": chosen})
    except ValueError as error:
        raise RequestError("bad-request", str(error), field="nodeset") from None
