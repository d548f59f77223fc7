"""/repave/v1/batches, /reinstall and /plans: what would be done, doing it, and how far it is."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field

from repave.api.operator import Body, Json, Operator, ProblemRoute, Scope, Viewer, render_list
from repave.api.operator_images import get_image
from repave.api.operator_servers import get_server
from repave.domain.model import Batch, Event, Image, Instance, RunRow, Server, Step
from repave.domain.root_disk import find_known_misfit, is_candidate
from repave.domain.states import Ending, may_reinstall
from repave.errors import RepaveError, RequestError

router = APIRouter(route_class=ProblemRoute)
_GOOD = (Ending.PROVED.value, Ending.LATE_PROOF.value)
_MAX_NAMED = 50


class Target(Body):
    """Which servers, and which image (name or id; absent = the one each has now)."""

    servers: list[str] = Field(default=[], max_length=_MAX_NAMED)
    instance_ids: list[str] = Field(default=[], max_length=_MAX_NAMED)
    image: str | None = None


class Reinstall(Target):
    password: str = Field(max_length=200)
    ssh_keys: list[str] = Field(default=[], max_length=20)
    user_data: str = Field(default="", max_length=32_768)
    plan: str | None = None  # refuse unless this is still the plan's id


# ---- what was asked ----


def _resolve(scope: Scope, target: Target) -> list[tuple[Server, Instance]]:
    """All of the servers named, each once, in the order given. Raises not-found for the first one unknown here."""
    if not target.servers and not target.instance_ids:
        raise RequestError("bad-request", "servers: none were named; empty never means all.", field="servers")
    servers = [get_server(scope, name) for name in target.servers]
    for instance_id in target.instance_ids:
        instance = scope.store.servers.find_instance(scope.project_id, instance_id)
        if instance is None:
            raise RequestError("not-found", f"There is no instance {instance_id!r} in this project.", kind="instance")
        servers.append(scope.store.servers.get_server(instance.server_id))
    if len({s.id for s in servers}) != len(servers):
        raise RequestError("bad-request", "servers: one is named twice.", field="servers")
    by_server = {i.server_id: i for i in scope.store.servers.list_instances(scope.project_id, server_ids=[s.id for s in servers])[0]}
    return [(s, by_server[s.id]) for s in servers]


def _plan(scope: Scope, target: Target) -> Json:
    """What would be erased and what kept. Reads the store only. Its id changes when image, servers, states or disk rules do."""
    pairs = _resolve(scope, target)
    asked = get_image(scope, target.image) if target.image else None
    images = {i.id: i for i in scope.store.images.list_images(scope.project_id)}
    disks = {s.id: (scope.store.runs.find_inventory(s.id) or {}).get("disks", []) for s, _ in pairs}
    erased, problems, facts = [], [], []
    for server, instance in pairs:
        image = asked or images.get(instance.image_id or "")
        seen = [d for d in disks[server.id] if is_candidate(d)]
        known = images.get(instance.image_id or "")
        os_now = known.name if known else "an image that was removed" if instance.image_id else None
        rule = ",".join(f"{k}={v}" for k, v in server.root_disk.items())
        erased.append({
            "server": server.name, "instance_id": instance.id, "model": server.model, "state": instance.state.value, "os_now": os_now,
            "image": image.name if image else None, "root_disk": rule or "the one that boots, or the only one", "disks_seen": len(seen) or None,
        })  # fmt: skip
        problems += [{"server": server.name} | p.as_json() for p in _problems(server, instance, image, disks[server.id])]
        facts.append([instance.id, instance.state.value, instance.image_id, image.manifest_sha256 if image else None, server.root_disk])
    total = scope.store.servers.list_servers(scope.project_id, limit=1)[1]
    data_disks = sum(max(0, len([d for d in of if is_candidate(d)]) - 1) for of in disks.values())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {
        "id": f"p-{digest[:8]}", "erased": erased, "problems": problems, "image": asked.name if asked else None,
        "kept": {"other_servers": total - len(pairs), "data_disks_seen": data_disks},
    }  # fmt: skip


def _problems(server: Server, instance: Instance, image: Image | None, disks: Sequence[Json]) -> list[RepaveError]:
    found: list[RepaveError] = []
    if not may_reinstall(instance.state):
        found.append(RequestError("in-progress"))
    if image is None:
        found.append(RequestError("bad-request", "image: is needed; the image it has now is not known.", field="image"))
    elif (server.arch, server.boot) != (image.arch, image.boot):
        found.append(RequestError("arch-mismatch", f"The server is {server.arch} {server.boot}, the image {image.arch} {image.boot}."))
    elif misfit := find_known_misfit(disks, server.root_disk, sector_bytes=image.sector_bytes, needed_bytes=image.size_bytes):
        found.append(misfit)
    return found


@router.post("/plans")
def plan(scope: Viewer, target: Target) -> Json:
    return _plan(scope, target)


@router.post("/reinstall", status_code=202)
def reinstall(scope: Operator, asked: Reinstall, response: Response) -> Json:
    """All of them are accepted, each with one run; or nothing happened. The same rules as CloudDC's route."""
    if asked.plan is not None and asked.plan != _plan(scope, asked)["id"]:
        raise RequestError("conflict", "The plan is out of date: image, servers or states have changed since.", field="plan")
    image_id = get_image(scope, asked.image).id if asked.image else None
    admitted = scope.desk.fleet.admit(
        credential=scope.credential, instance_ids=[i.id for _, i in _resolve(scope, asked)], image_id=image_id, password=asked.password,
        ssh_keys=tuple(asked.ssh_keys), user_data=asked.user_data,
    )  # fmt: skip
    response.headers["Location"] = f"/repave/v1/batches/{admitted.batch_id}"
    return show_batch(scope, admitted.batch_id)


# ---- how far it is ----


def run_state(run: RunRow) -> str:
    """One of waiting, working, running, failed: the words of CLI and pages."""
    if run.ended_at is not None:
        return "running" if run.outcome in _GOOD else "failed"
    return "working" if run.started_at else "waiting"


def step_durations(run: RunRow, events: Sequence[Event], now: datetime) -> dict[str, float]:
    """Seconds in each step so far. A step lasts until the next one begins; write-image begins at the line."""
    began: dict[str, datetime] = {}
    for event in events:
        if event.run_id == run.id and event.type in ("run.step", "run.crossed"):
            began.setdefault(event.data.get("step", Step.WRITE_IMAGE.value), event.at)
    steps = sorted(began.items(), key=lambda item: item[1])
    ends = ([at for _, at in steps] + [run.ended_at or now])[1:]
    return {name: round((end - at).total_seconds(), 1) for (name, at), end in zip(steps, ends, strict=True)}


def run_json(run: RunRow, *, server: str, os_now: str | None, durations_s: dict[str, float]) -> Json:
    """The run object of API, CLI and events (ux.md 2)."""
    progress: dict[str, Any] = run.progress or {}
    # A small image is written between two progress messages; then only the report knows.
    done, total = (run.report or {}).get("bytes_written") or progress.get("bytes_done", 0), progress.get("bytes_total")
    writing_s = (run.seen_at - run.crossed_at).total_seconds() if run.seen_at and run.crossed_at else 0.0
    writing = run.step is Step.WRITE_IMAGE and run.ended_at is None and total
    return {
        "id": run.id, "batch": run.batch_id, "server": server, "instance_id": run.instance_id, "state": run_state(run), "step": run.step.value,
        "step_index": run.step.number, "steps": len(Step), "past_the_line": run.past_the_line, "stage": progress.get("stage"),
        "percent": round(100 * done / total) if writing else None, "bytes_written": done, "bytes_total": total,
        "rate_bytes_per_s": round(done / writing_s) if writing and writing_s > 0 else None, "attempt": 1, "created_at": run.created_at,
        "started_at": run.started_at, "deadline_at": run.deadline_at, "ended_at": run.ended_at, "outcome": run.outcome, "os_now": os_now,
        "disk_serial": (run.plan or {}).get("disk_serial"), "error": run.error, "proof": run.proof, "durations_s": durations_s,
        "write_stages_s": (run.report or {}).get("stages_s"),
    }  # fmt: skip


def _batch_json(batch: Batch, runs: Sequence[RunRow], image: str | None) -> Json:
    states = [run_state(r) for r in runs]
    counts = {name: states.count(name) for name in ("running", "working", "waiting", "failed")}
    state = "working" if batch.ended_at is None else "failed" if counts["failed"] else "succeeded"
    return {
        "id": batch.id, "state": state, "image_id": batch.image_id, "image": image, "created_at": batch.created_at,
        "created_by": batch.created_by, "ended_at": batch.ended_at, "counts": counts,
    }  # fmt: skip


@router.get("/batches")
def list_batches(scope: Viewer, limit: int = 100) -> Json:
    """Newest first."""
    names = {i.id: i.name for i in scope.store.images.list_images(scope.project_id)}
    batches = scope.store.runs.list_batches(scope.project_id, limit=max(1, min(limit, 1000)))
    return render_list([_batch_json(b, scope.store.runs.list_runs(batch_id=b.id), names.get(b.image_id or "")) for b in batches])


@router.get("/batches/{batch_id}")
def show_batch(scope: Viewer, batch_id: str) -> Json:
    batch = scope.store.runs.find_batch(scope.project_id, batch_id)
    if batch is None:
        raise RequestError("not-found", f"There is no batch {batch_id!r} in this project.", kind="batch")
    runs = scope.store.runs.list_runs(batch_id=batch.id)
    events = scope.store.events.list_events(scope.project_id, batch_id=batch.id, limit=100_000)
    servers = {s.id: s.name for s in scope.store.servers.list_servers(scope.project_id)[0]}
    images = {i.id: i.name for i in scope.store.images.list_images(scope.project_id)}
    instances = {i.id: i for i in scope.store.servers.list_instances(scope.project_id, ids=[r.instance_id for r in runs])[0]}
    now = scope.store.now()
    shown = [
        run_json(
            run, server=servers.get(run.server_id, ""), durations_s=step_durations(run, events, now),
            os_now=images.get(instances[run.instance_id].image_id or "") if run.instance_id in instances else None,
        )
        for run in runs
    ]  # fmt: skip
    return _batch_json(batch, runs, images.get(batch.image_id or "")) | {"runs": sorted(shown, key=lambda r: str(r["server"]))}
