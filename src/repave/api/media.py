"""The media listener: boot media behind a path that can not be guessed, and nothing else.

One cached ISO; a live run's slot is laid over it while it is streamed. A run that is over gets the inert ISO, which boots the local disk.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response, StreamingResponse

from repave.agent.protocol import Slot
from repave.domain.model import RunRow
from repave.errors import RunFailed
from repave.ramdisk.media import BootMedia, render_slot
from repave.store import Store
from repave.workflow.effects import Places

_BLOCK = 256 * 1024


def build_media_router(store: Store, places: Places, media: Callable[[], BootMedia]) -> APIRouter:
    router = APIRouter()

    @router.api_route("/media/{run_id}/{key}/boot.iso", methods=["GET", "HEAD"])
    def boot_iso(request: Request, run_id: str, key: str) -> Response:
        """GET, HEAD and one Range, as BMCs ask."""
        run = store.runs.find_run(run_id)
        if run is None or not _is_key(store, run, key):
            raise HTTPException(404)
        slot = render_slot(_slot(store, run, places)) if _is_live(store, run) else None
        iso = media()
        first, last = _range(request.headers.get("range"), iso.size)
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(last - first + 1), "Cache-Control": "no-store"}
        partial = "range" in request.headers
        if partial:
            headers["Content-Range"] = f"bytes {first}-{last}/{iso.size}"
        status = 206 if partial else 200
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type="application/octet-stream")

        def blocks() -> Iterator[bytes]:
            for offset in range(first, last + 1, _BLOCK):
                yield iso.read(offset, min(_BLOCK, last + 1 - offset), slot)

        return StreamingResponse(blocks(), status_code=status, headers=headers, media_type="application/octet-stream")

    return router


def _is_key(store: Store, run: RunRow, key: str) -> bool:
    try:
        return hmac.compare_digest(key, store.sealer.derive_for_run(run.id, "media"))
    except RunFailed:  # the run ended and its keys are gone
        return False


def _is_live(store: Store, run: RunRow) -> bool:
    return run.ended_at is None and not store.runs.is_closed(run.id) and not run.past_the_line and run.deadline_at > store.now()


def _slot(store: Store, run: RunRow, places: Places) -> Slot:
    token = store.sealer.derive_for_run(run.id, "agent")
    return Slot(run.id, places.agent_url, token, places.ca_pem, store.servers.get_server(run.server_id).network)


def _range(header: str | None, size: int) -> tuple[int, int]:
    """First and last byte. Raises 416 for what can not be had; more than one range is answered with the whole."""
    if not header or not header.startswith("bytes=") or "," in header:
        return 0, size - 1
    first, _, last = header.removeprefix("bytes=").strip().partition("-")
    try:
        start, end = (size - int(last), size - 1) if not first else (int(first), min(int(last) if last else size - 1, size - 1))
    except ValueError:
        raise HTTPException(416) from None
    if not 0 <= start <= end:
        raise HTTPException(416)
    return start, end
