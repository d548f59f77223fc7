"""/repave/v1/batches, /reinstall and /plans: what would be done, doing it, and how far it is."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from repave.api.asgi import incoming
from repave.api.batch_views import Beside, batch_json, estimate_json, run_durations, run_json, run_state, when_given_up
from repave.api.clouddc import POLL_AFTER_S
from repave.api.idempotency import REPLAYED, name_request
from repave.api.operator.answers import After, Body, Json, PageLimit, ProblemRoute, cut_page, must_exist, render_list
from repave.api.operator.images import get_image
from repave.api.operator.scope import Operator, Scope, Viewer
from repave.api.operator.servers import get_server
from repave.domain.model import Batch, Image, Instance, RunRow, Server, Step
from repave.domain.root_disk import find_known_misfit, is_candidate
from repave.domain.states import may_reinstall
from repave.domain.timing import slow_durations, usual_durations
from repave.domain.waves import Waves
from repave.errors import RepaveError, RequestError
from repave.store import Cancelled
from repave.workflow.fleet import AS_THE_BATCH, Override, check_passwords

router = APIRouter(route_class=ProblemRoute)
NO_KEYS: Mapping[str, str] = {}
_MAX_NAMED = 50
_PUBLIC_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\r\n]*)?")  # sshd(8), AUTHORIZED_KEYS FILE FORMAT, without options


class PlannedOverride(Body):
    """What differs for one server and shows in a plan. `hostname`: of the new OS, instead of the instance's name."""

    image: str | None = None
    hostname: str | None = Field(default=None, pattern=r"^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$")


class ServerOverride(PlannedOverride):
    """What differs for one server; what is absent is as for the batch. Each password that differs takes a tenth of a second to hash."""

    password: str | None = Field(default=None, max_length=200)
    ssh_keys: list[str] | None = Field(default=None, max_length=20)
    user_data: str | None = Field(default=None, max_length=32_768)


class Target(Body):
    """Which servers, and which image (name or id; absent = the one each has now). `retry`: those of a batch that did not end well, each its image.

    `each`: what differs, by the name or instance id of a server among them.
    """

    each: Mapping[str, PlannedOverride] = Field(default={}, max_length=_MAX_NAMED)
    servers: list[str] = Field(default=[], max_length=_MAX_NAMED)
    instance_ids: list[str] = Field(default=[], max_length=_MAX_NAMED)
    image: str | None = None
    retry: str | None = None


class Reinstall(Target):
    """`rehearse`: everything up to the line, nothing written, no password. Waves: domain/waves.py."""

    each: Mapping[str, ServerOverride] = Field(default={}, max_length=_MAX_NAMED)
    password: str = Field(default="", max_length=200)
    ssh_keys: list[str] = Field(default=[], max_length=20)
    user_data: str = Field(default="", max_length=32_768)
    plan: str | None = None  # refuse unless this is still the plan's id
    rehearse: bool = False
    canary: int | None = Field(default=None, ge=1, le=_MAX_NAMED)
    at_once: int | None = Field(default=None, ge=1, le=_MAX_NAMED)
    max_failed: int | None = Field(default=None, ge=0, le=_MAX_NAMED)


class Chosen(Body):
    """Which runs of a batch, by their servers' names; none = all."""

    servers: list[str] = Field(default=[], max_length=_MAX_NAMED)


# ---- what was asked ----


def _resolve(scope: Scope, target: Target) -> list[tuple[Server, Instance]]:
    """All of the servers named, each once, in the order given. Raises not-found for the first one unknown here."""
    if target.retry is not None:
        if target.servers or target.instance_ids or target.image:
            raise RequestError("bad-request", "retry: the batch says which servers and images; name none.", field="retry")
        target = Target(instance_ids=[run.instance_id for run in _retryable(scope, target.retry)])
    if not target.servers and not target.instance_ids:
        raise RequestError("bad-request", "servers: none were named; empty never means all.", field="servers")
    servers = [get_server(scope, name) for name in target.servers]
    for instance_id in target.instance_ids:
        instance = must_exist(scope.store.servers.find_instance(scope.project_id, instance_id), "instance", instance_id)
        servers.append(scope.store.servers.get_server(instance.server_id))
    if len({s.id for s in servers}) != len(servers):
        raise RequestError("bad-request", "servers: one is named twice.", field="servers")
    by_server = {i.server_id: i for i in scope.store.servers.list_instances(scope.project_id, server_ids=[s.id for s in servers])[0]}
    return [(s, by_server[s.id]) for s in servers]


def _retryable(scope: Scope, batch_id: str) -> list[RunRow]:
    """Raises conflict where there is nothing to try again."""
    runs = scope.store.batches.list_retryable(_get_batch(scope, batch_id))
    if not runs:
        raise RequestError("conflict", "No ended run of this batch needs another try: they run, or were reinstalled since.", field="retry")
    return runs


def _overrides(scope: Scope, target: Target, pairs: Sequence[tuple[Server, Instance]]) -> dict[str, Override]:
    """By instance: what its run of the retried batch had, then what was said of it. Raises bad-request where something is said of another server."""
    again = _retryable(scope, target.retry) if target.retry is not None else []
    found = {run.instance_id: Override(image_id=run.image_id, hostname=run.hostname) for run in again}
    named = {name: instance.id for server, instance in pairs for name in (server.name, instance.id)}
    for name, said in target.each.items():
        if name not in named:
            raise RequestError("bad-request", f"each.{name}: there is no such server in this request.", field="each")
        if named[name] in [named[other] for other in target.each if other != name]:
            raise RequestError("bad-request", f"each.{name}: it is there by its name and by its id.", field="each")
        given = {field: value for field, value in said.model_dump(exclude={"image"}).items() if value is not None}
        if isinstance(said, ServerOverride) and said.ssh_keys is not None:
            _check_ssh_keys(said.ssh_keys, f"each.{name}.ssh_keys")
            given["ssh_keys"] = tuple(said.ssh_keys)
        if said.image:
            given["image_id"] = get_image(scope, said.image).id
        found[named[name]] = replace(found.get(named[name], AS_THE_BATCH), **given)
    return found


def _plan(scope: Scope, target: Target) -> Json:
    """What would be erased and what kept. Reads the store only. Its id changes when image, servers, states or disk rules do."""
    pairs = _resolve(scope, target)
    asked = get_image(scope, target.image) if target.image else None
    images = {i.id: i for i in scope.store.images.list_images(scope.project_id)}
    disks = {s.id: (scope.store.runs.find_inventory(s.id) or {}).get("disks", []) for s, _ in pairs}
    overrides = _overrides(scope, target, pairs)
    history = {model: scope.store.runs.list_durations(model) for model in {s.model for s, _ in pairs}}
    usual, slow = ({model: round(sum(of(runs).values())) or None for model, runs in history.items()} for of in (usual_durations, slow_durations))
    erased, problems, facts = [], [], []
    for server, instance in pairs:
        own = overrides.get(instance.id, AS_THE_BATCH)
        image = images.get(own.image_id or (asked.id if asked else instance.image_id) or "")
        seen = [d for d in disks[server.id] if is_candidate(d)]
        known = images.get(instance.image_id or "")
        os_now = known.name if known else "an image that was removed" if instance.image_id else None
        rule = ",".join(f"{k}={v}" for k, v in server.root_disk.items())
        erased.append({
            "server": server.name, "instance_id": instance.id, "model": server.model, "state": instance.state.value, "os_now": os_now,
            "image": image.name if image else None, "os_type": image.os_type if image else None, "hostname": own.hostname or instance.name,
            "root_disk": rule or "the one that boots, or the only one", "disks_seen": len(seen) or None, "keeps": server.keep_partitions,
            "usual_s": usual[server.model], "usual_high_s": slow[server.model], "usual_runs": len(history[server.model]),
            "careful": _cautions(server, instance, image, seen),
        })  # fmt: skip
        problems += [{"server": server.name} | p.as_json() for p in _problems(scope, server, instance, image, disks[server.id])]
        facts.append([
            instance.id, instance.state.value, instance.image_id, image.manifest_sha256 if image else None, server.root_disk, server.keep_partitions,
            [d.get("serial") for d in seen],
        ])  # fmt: skip
    locked = sorted(s.name for s in scope.store.servers.list_servers(scope.project_id)[0] if s.locked_at and s.id not in disks)
    total = scope.store.servers.list_servers(scope.project_id, limit=1)[1]
    data_disks = sum(max(0, len([d for d in of if is_candidate(d)]) - 1) for of in disks.values())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {
        "id": f"p-{digest[:8]}", "erased": erased, "problems": problems, "image": asked.name if asked else None,
        "kept": {"other_servers": total - len(pairs), "data_disks_seen": data_disks, "locked": locked},
    }  # fmt: skip


def _cautions(server: Server, instance: Instance, image: Image | None, seen: Sequence[Json]) -> list[str]:
    """What stands in no reinstall's way and should be known before it: each true of this server."""
    found = []
    if instance.state.value == "error":
        found.append("it runs no OS: a run that ends before the line leaves it off")
    if not seen and not server.root_disk:
        found.append("its disks were never seen: which one is the root disk is known when the ramdisk looks, and nothing is written where that is not clear")
    if image is not None and image.doubted_at is not None:
        found.append("a run met this image damaged: it is read whole first")
    return found


def _problems(scope: Scope, server: Server, instance: Instance, image: Image | None, disks: Sequence[Json]) -> list[RepaveError]:
    found: list[RepaveError] = []
    if not may_reinstall(instance.state):
        live = next((r for r in scope.store.runs.list_newest_of(server.id, limit=1) if r.ended_at is None), None)
        batch = scope.store.runs.find_batch(scope.project_id, live.batch_id) if live else None
        found.append(RequestError("in-progress", f"Batch {batch.id}, by {batch.created_by}.", batch=batch.id) if batch else RequestError("in-progress"))
    try:
        scope.desk.fleet.refuse_protected([server])
    except RequestError as protected:
        found.append(protected)
    if place := scope.desk.find_unreachable(server.bmc_url):
        found.append(RepaveError("loopback-address", f"{place} is a loopback address; the server is elsewhere."))
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
def reinstall(scope: Operator, request: Request, asked: Reinstall, response: Response, dry_run: bool = False) -> Json:
    """All of them are accepted, each with one run; or nothing happened. The same rules as CloudDC's route.

    `dry_run`: 200 and the plan, nothing is begun. With an `Idempotency-Key` the same request sent again within a day begins nothing: it is answered with
    the batch that it began, as that now stands, and `Idempotent-Replayed: true`; 422 `key-used` where the key came with another request.
    A request that comes again with the same signature (AK/SK) is answered alike.
    """
    keys = {} if dry_run else name_request(incoming(request), scope.credential, scope.store.sealer) | ({scope.replay_key: ""} if scope.replay_key else {})
    try:
        return _find_begun(scope, keys, response) or begin_reinstall(scope, asked, response, keys, dry_run=dry_run)
    except RepaveError:
        # Two copies at once: the second finds the first's servers busy, and its batch.
        if again := _find_begun(scope, keys, response):
            return again
        raise


def _find_begun(scope: Scope, keys: Mapping[str, str], response: Response) -> Json | None:
    """The batch that this request began before, where it did."""
    answer = next((found for key, named in keys.items() if (found := scope.store.access.find_answer(key, named))), None)
    if answer is None:
        return None
    response.headers.update(REPLAYED)
    return _answer_accepted(scope, answer["batch_id"], response)


def _answer_accepted(scope: Scope, batch_id: str, response: Response) -> Json:
    response.headers["Location"] = f"/repave/v1/batches/{batch_id}"
    response.headers["Retry-After"] = str(POLL_AFTER_S)
    return show_batch(scope, batch_id)


def begin_reinstall(scope: Scope, asked: Reinstall, response: Response, keys: Mapping[str, str] = NO_KEYS, *, dry_run: bool = False) -> Json:
    """As `reinstall`, for who asks without a request that could come twice."""
    if asked.plan is not None and asked.plan != _plan(scope, asked)["id"]:
        raise RequestError("conflict", "The plan is out of date: image, servers or states have changed since.", field="plan")
    _check_ssh_keys(asked.ssh_keys, "ssh_keys")
    pairs = _resolve(scope, asked)
    overrides = _overrides(scope, asked, pairs)
    if asked.retry is not None and _get_batch(scope, asked.retry).rehearse and not asked.rehearse:
        raise RequestError("bad-request", "rehearse: that batch was a rehearsal, and so is its retry; to reinstall its servers name them.", field="rehearse")
    if dry_run:
        response.status_code = 200
        return _dry_run(scope, asked, overrides)
    image_id = get_image(scope, asked.image).id if asked.image else None
    admitted = scope.desk.fleet.admit(
        credential=scope.credential, instance_ids=[i.id for _, i in pairs], image_id=image_id, password=asked.password,
        ssh_keys=tuple(asked.ssh_keys), user_data=asked.user_data, rehearse=asked.rehearse,
        waves=Waves(asked.canary, asked.at_once, asked.max_failed), overrides=overrides, answer_keys=keys,
    )  # fmt: skip
    return _answer_accepted(scope, admitted.batch_id, response)


def _dry_run(scope: Scope, asked: Reinstall, overrides: Mapping[str, Override]) -> Json:
    """The plan, where the request itself could be taken. Raises bad-request for a password that would be refused."""
    plan = _plan(scope, asked)
    if not asked.rehearse:
        own = {e["instance_id"]: overrides.get(e["instance_id"], AS_THE_BATCH).password for e in plan["erased"]}
        check_passwords({
            e["instance_id"]: (e["os_type"] or "Linux", asked.password if own[e["instance_id"]] is None else str(own[e["instance_id"]]))
            for e in plan["erased"]
        })  # fmt: skip
    return plan


def _check_ssh_keys(keys: Sequence[str], field: str) -> None:
    """Each is a public key. Raises bad-request, which never repeats what may be a private one."""
    for number, key in enumerate(keys):
        if not _PUBLIC_KEY.fullmatch(key):
            raise RequestError("bad-request", f"{field}[{number}]: no public key of one line (TYPE BASE64 COMMENT); give the .pub file.", field=field)


# ---- what may still be done to it ----

_CANCEL_SAYS = {
    Cancelled.NOT_STARTED: "not started: it has ended, its server was not touched",
    Cancelled.RETURNING: "before the line: media out, what was found comes back",
    Cancelled.PAST_THE_LINE: "past the line: stopping would leave half a system; it finishes",
    Cancelled.ENDED: "had ended already; unchanged",
}


@router.post("/batches/{batch_id}/cancel")
def cancel_batch(scope: Operator, batch_id: str, chosen: Chosen) -> Json:
    """What became of each run. Raises past-the-line where all that were named are: nothing was cancelled then."""
    batch = _get_batch(scope, batch_id)
    runs = scope.store.runs.list_runs(batch_id=batch.id)
    names = _server_names(scope, runs)
    if unknown := set(chosen.servers) - set(names.values()):
        raise RequestError("not-found", f"There is no server {min(unknown)!r} in this batch.", kind="server")
    wanted = [r for r in runs if not chosen.servers or names[r.server_id] in chosen.servers]
    return _cancel(scope, batch, wanted, names)


@router.post("/runs/{run_id}/cancel")
def cancel_run(scope: Operator, run_id: str) -> Json:
    run = get_run(scope, run_id)
    return _cancel(scope, _get_batch(scope, run.batch_id), [run], _server_names(scope, [run]))


def _cancel(scope: Scope, batch: Batch, runs: Sequence[RunRow], names: dict[str, str]) -> Json:
    done = scope.store.batches.cancel(batch.id, [r.id for r in runs], actor=scope.actor)
    if done and set(done.values()) == {Cancelled.PAST_THE_LINE}:
        raise RequestError("past-the-line", ", ".join(sorted(names[r.server_id] for r in runs)) + ".", kind="run")
    items = [{"run": r.id, "server": names[r.server_id], "result": done[r.id].value, "meaning": _CANCEL_SAYS[done[r.id]]} for r in runs]
    return render_list(sorted(items, key=lambda i: i["server"]))


@router.post("/batches/{batch_id}/pause")
def pause_batch(scope: Operator, batch_id: str) -> Json:
    """Nothing of it begins; what is under way goes on."""
    scope.store.batches.pause(_get_batch(scope, batch_id).id, actor=scope.actor)
    return show_batch(scope, batch_id)


@router.post("/batches/{batch_id}/resume")
def resume_batch(scope: Operator, batch_id: str) -> Json:
    scope.store.batches.resume(_get_batch(scope, batch_id).id, actor=scope.actor)
    return show_batch(scope, batch_id)


# ---- how far it is ----


def _get_batch(scope: Scope, batch_id: str) -> Batch:
    return must_exist(scope.store.runs.find_batch(scope.project_id, batch_id), "batch", batch_id)


def get_run(scope: Scope, run_id: str) -> RunRow:
    run = scope.store.runs.find_run(run_id)
    return must_exist(run if run is not None and run.project_id == scope.project_id else None, "run", run_id)


def _server_names(scope: Scope, runs: Sequence[RunRow]) -> dict[str, str]:
    return {s.id: s.name for s in scope.store.servers.get_servers([r.server_id for r in runs]).values()}


@router.get("/batches")
def list_batches(scope: Viewer, after: After = None, limit: PageLimit = 100) -> Json:
    """Newest first."""
    names = {i.id: i.name for i in scope.store.images.list_images(scope.project_id)}
    batches, following = cut_page(scope.store.runs.list_batches(scope.project_id, after=after, limit=limit + 1), limit, lambda b: b.id)
    return render_list([batch_json(b, scope.store.runs.list_runs(batch_id=b.id), names.get(b.image_id or "")) for b in batches], following)


@router.get("/batches/{batch_id}")
def show_batch(scope: Viewer, batch_id: str) -> Json:
    batch = _get_batch(scope, batch_id)
    runs = scope.store.runs.list_runs(batch_id=batch.id)
    image = scope.store.images.find_image(scope.project_id, batch.image_id or "")
    shown = sorted(_show(scope, batch, runs), key=lambda r: str(r["server"]))
    return batch_json(batch, runs, image.name if image else None) | estimate_json(shown) | {"runs": shown}


@router.get("/runs")
def list_runs(
    scope: Viewer, state: Literal["running", "working", "waiting", "failed", "rehearsed", "cancelled"] | None = None, server: str | None = None,
    batch: str | None = None, after: After = None, limit: PageLimit = 100,
) -> Json:  # fmt: skip
    """Newest first, each as its batch shows it; of one state, one server (name or id), one batch where asked."""
    server_id = get_server(scope, server).id if server is not None else None
    if batch is not None:
        _get_batch(scope, batch)
    asked = scope.store.runs.page_runs(scope.project_id, state=state, server_id=server_id, batch_id=batch, after=after, limit=limit + 1)
    runs, following = cut_page(asked, limit, lambda r: r.id)
    shown: dict[str, Json] = {}
    for batch_id in {r.batch_id for r in runs}:
        of_batch = [r for r in runs if r.batch_id == batch_id]
        shown |= {run["id"]: run for run in _show(scope, _get_batch(scope, batch_id), of_batch)}
    return render_list([shown[r.id] for r in runs], following)


@router.get("/runs/{run_id}")
def show_run(scope: Viewer, run_id: str) -> Json:
    """As its batch shows it."""
    run = get_run(scope, run_id)
    return _show(scope, _get_batch(scope, run.batch_id), [run])[0]


def _show(scope: Scope, batch: Batch, runs: Sequence[RunRow]) -> list[Json]:
    """These runs of this batch."""
    live = any(r.durations_s is None for r in runs)  # the others know their seconds
    events = scope.store.events.list_events(scope.project_id, batch_id=batch.id, limit=100_000) if live else []
    servers = scope.store.servers.get_servers([r.server_id for r in runs])
    history = {model: scope.store.runs.list_durations(model) for model in {s.model for s in servers.values()}}
    usual, slow = ({model: of(runs) for model, runs in history.items()} for of in (usual_durations, slow_durations))
    images = {i.id: i.name for i in scope.store.images.list_images(scope.project_id)}
    instances = {i.id: i for i in scope.store.servers.list_instances(scope.project_id, ids=[r.instance_id for r in runs])[0]}
    waiting = scope.store.batches.why_waiting(batch) if any(run_state(r) == "waiting" for r in runs) else {}
    now = scope.store.now()
    took = {run.id: run_durations(run, events, now) for run in runs}
    gives_up = {run.id: _when_given_up(scope, run, servers[run.server_id], took[run.id], now) for run in runs if run_state(run) == "working"}
    return [
        run_json(run, Beside(
            server=servers[run.server_id].name, durations_s=took[run.id], usual=usual[servers[run.server_id].model],
            slow=slow[servers[run.server_id].model], gives_up_at=gives_up.get(run.id),
            os_now=images.get(instances[run.instance_id].image_id or "") if run.instance_id in instances else None,
            why_waiting=waiting.get(run.id, ""),
        ))
        for run in runs
    ]  # fmt: skip


def _when_given_up(scope: Scope, run: RunRow, server: Server, took: dict[str, float], now: datetime) -> datetime:
    """Asked of the history only where a step waits by it (workflow/effects.py, `_know_wait`)."""
    image_id = run.image_id if run.step is Step.FIRST_BOOT else None
    alike = scope.store.runs.list_seconds_alike(server, run.step, image_id=image_id) if run.step in (Step.BOOT_RAMDISK, Step.FIRST_BOOT) else []
    return when_given_up(run, took.get(run.step.value, 0.0), now, waits_s=scope.desk.waits_s, alike_s=alike)
