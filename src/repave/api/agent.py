"""The provisioning listener's routes: what agents and new operating systems ask (agent/protocol.py has the shapes).

401 = a token we never gave; 410 = a spent token or a run that is over. Nothing here can be asked without a token of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from repave.agent import protocol
from repave.domain.model import RunRow, Source
from repave.domain.redaction import Redactor
from repave.errors import CATALOGUE, RunFailed
from repave.images.chunk_token import render_chunk_token
from repave.images.store import ImageStore
from repave.store import Store
from repave.store.database import is_unavailable
from repave.workflow.effects import record_late_proof

LEASE_S = 60.0
MAX_BODY_BYTES = 1024 * 1024
MOST_LOG_CHARS = 4 * 1024 * 1024  # of one run in all, most of it forgotten; a write of a day says less than 100,000


@dataclass(frozen=True)
class ChunkPlaces:
    """Where agents fetch chunks, and what makes their tokens. `caches`: rack ("" = all) and URL."""

    key: bytes
    origin_url: str
    caches: tuple[tuple[str, str], ...] = ()

    def list_urls(self, rack: str) -> list[str]:
        """The rack's own caches first, the origin last."""
        return [url for of, url in self.caches if of and of == rack] + [url for of, url in self.caches if not of] + [self.origin_url]

    def make_token(self, run: RunRow) -> str:
        """Good until the deadline of `run`, as it is now: one that moves gets another with each word of it."""
        return render_chunk_token(self.key, run.id, run.deadline_at)


def build_agent_router(store: Store, images: ImageStore, chunks: ChunkPlaces) -> APIRouter:
    """Every route blocks on the store, so FastAPI runs it in its thread pool."""
    router = APIRouter()

    def session_run(request: Request) -> RunRow:
        run = store.runs.find_run_by_session(_bearer(request))
        if run is None:
            raise HTTPException(401)
        return run

    def still_open(run: RunRow) -> RunRow:
        if run.ended_at is not None or run.deadline_at < store.now():
            raise HTTPException(410)
        return run

    @router.post("/agent/v1/hello")
    def hello(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """The media token is exchanged for the session token, once: for any other boot it is spent."""
        run = store.runs.find_run_by_token(_bearer(request))
        if run is None:
            raise HTTPException(401)
        try:
            inventory = protocol.render(protocol.parse_inventory(body))
        except (KeyError, TypeError, ValueError):
            raise HTTPException(400) from None
        still_open(run)
        if not store.runs.record_hello(run.id, inventory["boot_id"], inventory):
            store.runs.record_second_boot(run.id, inventory)
            raise HTTPException(410)
        return {"session": store.sealer.derive_for_run(run.id, "session"), "poll_s": 0.5}

    @router.get("/agent/v1/plan")
    def plan(request: Request) -> Response:
        run = still_open(session_run(request))
        if store.runs.is_closed(run.id):
            raise HTTPException(410)
        store.runs.record_seen(run)
        if not run.plan:
            return Response(status_code=204)
        rack = store.servers.get_server(run.server_id).rack
        return JSONResponse(run.plan | {"chunk_urls": chunks.list_urls(rack), "chunk_token": chunks.make_token(run)})  # the database keeps no token

    @router.post("/agent/v1/cross")
    def cross(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """THE LINE: committed before it is answered; asked again by the same session, it is answered again."""
        run = still_open(session_run(request))
        if not run.plan or (body.get("serial"), body.get("wwn")) != (run.plan["disk_serial"], run.plan["disk_wwn"]):
            raise HTTPException(409)
        if not store.runs.record_crossing(run.id, str(body.get("plan_id"))):
            raise HTTPException(410)
        return {"epoch": run.epoch, "lease_s": LEASE_S}

    @router.get("/agent/v1/manifest")
    def manifest(request: Request) -> Response:
        run = still_open(session_run(request))
        if not run.plan:
            raise HTTPException(409)
        return Response(images.read_manifest_bytes(run.plan["manifest_sha256"]), media_type="application/json")

    @router.get("/agent/v1/config-drive")
    def config_drive(request: Request) -> Response:
        run = still_open(session_run(request))
        if not run.past_the_line:
            raise HTTPException(409)
        return Response(store.sealer.read_for_run(run.id, "config-drive"), media_type="application/octet-stream")

    @router.post("/agent/v1/progress")
    def progress(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        run = session_run(request)
        if body.get("epoch") != run.epoch:
            raise HTTPException(410)
        kept = {name: body.get(name) for name in ("epoch", "stage", "bytes_done", "bytes_total")}
        try:
            live = store.runs.record_progress(run.id, kept)
        except sa.exc.DBAPIError as error:
            # What can not be written down here nobody else can act on either, so the write of the disk may go on: what was just read decides.
            if not is_unavailable(error):
                raise
            live = run.past_the_line and run.ended_at is None and run.deadline_at > store.now() and not store.runs.is_closed(run.id)
        if not live:
            raise HTTPException(410)
        return {"lease_s": LEASE_S, "chunk_token": chunks.make_token(run)}

    @router.post("/agent/v1/report")
    def report(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        run = session_run(request)
        if body.get("error") is None and body.get("epoch") != run.epoch and not run.rehearse:  # a rehearsal never learns its epoch
            raise HTTPException(410)
        kept = {name: body.get(name) for name in protocol.Report._fields}
        kept["error"] = _known_error(body.get("error"))
        kept["rehearsal"] = _known_rehearsal(body.get("rehearsal"))
        if not store.runs.record_report(run.id, kept):
            raise HTTPException(410)
        return {"then": "power-off"}

    @router.post("/agent/v1/log")
    def log(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """What the agent's console said, kept with the run. A batch that comes twice is kept once."""
        run = session_run(request)
        text = body.get("text")
        if not isinstance(text, str) or len(text.encode(errors="replace")) > protocol.LOG_BYTES:
            raise HTTPException(400)
        if run.ended_at is not None or store.consoles.find_end(run.id, Source.AGENT) > MOST_LOG_CHARS:
            raise HTTPException(410)
        store.consoles.append(run.id, Source.AGENT, Redactor(store.runs.list_run_secrets(run.id)).clean(text))
        return {}

    @router.post("/home/v1/{run_id}")
    def home(request: Request, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        """The new OS's own proof. One that comes after `unproved` counts until a new run begins."""
        run = store.runs.find_run_by_nonce(run_id, _bearer(request))
        if run is None:
            raise HTTPException(401)
        if run.verified_at is None or not store.runs.is_latest_run(run):
            raise HTTPException(410)
        proof = {
            "boot_id": str(body.get("boot_id"))[:64],
            "root_disk_serial": str(body.get("root_disk_serial"))[:256],
            "ssh_host_keys": [str(k)[:2000] for k in list(body.get("ssh_host_keys") or ())[:16]],
            "password_usable": bool(body.get("password_usable", False)),
        }
        if run.proof is None:
            store.runs.record_proof(run.id, proof)
        record_late_proof(store, run.id)
        return {}

    return router


def _known_error(error: Any) -> dict[str, Any] | None:
    """The agent's error as one of our own: its class must be in the catalogue, its text is cut."""
    if not isinstance(error, dict):
        return None
    slug = error.get("class") if error.get("class") in CATALOGUE else "agent-failed"
    return RunFailed(str(slug), str(error.get("cause", ""))[:500]).as_json()


def _known_rehearsal(value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict):
        return None
    return {name: value[name] for name in protocol.REHEARSAL if isinstance(value.get(name), int | float)}


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise HTTPException(401)
    return token.strip()


__all__ = ["LEASE_S", "MAX_BODY_BYTES", "ChunkPlaces", "build_agent_router"]
