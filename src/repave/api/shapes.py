"""What our own routes answer, for `openapi.json`: documentation, not a filter. The routes make their answers themselves.

A client must bear fields that it does not know; that none is missing here and none is wrong is checked on each answer of the contract tests
(tests/contract/openapi_answers.py).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

RunState = Literal["running", "working", "waiting", "failed", "rehearsed", "cancelled"]
Role = Literal["viewer", "operator", "admin"]


class Listed(BaseModel):
    """`next`: the `after` of the next page; null on the last one."""

    next: int | str | None


class Problem(BaseModel):
    """What went wrong, and who must act (docs/errors.md). In an answer it is problem+json (RFC 9457), with `type`, `status` and `detail` beside it."""

    code: str
    class_: str = Field(alias="class")
    title: str
    cause: str
    who: Literal["request", "bmc", "server", "image", "new-os", "repave"]
    retryable: bool
    untouched: str
    do: str
    context: dict[str, Any] = Field(default={}, description="What it is about: field, ids, kind.")
    type: str | None = None
    status: int | None = None
    detail: str | None = None


class Whoami(BaseModel):
    name: str
    role: Role
    project: str
    project_id: str
    site_admin: bool
    expires_at: datetime | None


class Project(BaseModel):
    id: str
    name: str
    domain_id: str


class Key(BaseModel):
    id: str
    project_id: str
    name: str
    role: Role
    ak: str
    expires_at: datetime | None
    created_at: datetime


class NewKeyShown(Key):
    """SK and token are shown this once."""

    sk: str
    token: str


class User(BaseModel):
    id: str
    project_id: str
    name: str
    role: Role
    created_at: datetime


class UserList(Listed):
    items: list[User]


class Room(BaseModel):
    image_bytes: int


class Instance(BaseModel):
    id: str
    state: str
    operation_state: str | None
    image_id: str | None
    image: str | None
    os_type: str
    error: Problem | None
    updated_at: datetime
    launched_at: datetime | None
    ssh_host_keys: list[str]


class ServerLock(BaseModel):
    reason: str | None
    by: str | None
    at: datetime


class PowerSeen(BaseModel):
    state: str
    at: datetime


class BmcAccess(BaseModel):
    url: str
    username: str
    tls_verify: str
    certificate_sha256: str | None
    system_uri: str | None


class Server(BaseModel):
    id: str
    name: str
    rack: str
    unit: str
    manufacturer: str
    model: str
    serial: str
    uuid: str
    macs: list[str]
    arch: str
    boot: str
    root_disk: dict[str, Any]
    keep_partitions: list[str] = Field(description="Of the root disk, by name or GUID: they outlive a reinstall.")
    network: dict[str, Any] | None
    created_at: datetime
    lock: ServerLock | None
    power: PowerSeen | None
    instance: Instance
    bmc: BmcAccess | None = Field(default=None, description="For operators.")


class Probed(BaseModel):
    """What a BMC shows now."""

    server: str
    same: bool = Field(description="It is the server that we know.")
    power: str
    manufacturer: str
    model: str
    serial: str
    uuid: str
    macs: list[str]
    carrier: Literal["http", "media"] | None = Field(description="How our boot media would come; null where neither can be.")
    media: list[str]
    certificate_sha256: str | None
    pinned: bool
    unreachable: str | None = Field(description="The setting whose address can not be reached from there.")


class Switched(BaseModel):
    """What an order about its power came to, as read back."""

    server: str
    power: Literal["on", "off"]


class Identity(BaseModel):
    serial: str
    uuid: str
    macs: list[str]
    manufacturer: str
    model: str


class Replaced(BaseModel):
    server: str
    before: Identity
    after: Identity
    replaced: bool


class Image(BaseModel):
    id: str
    project_id: str
    name: str
    os_type: str
    arch: str
    boot: str
    manifest_sha256: str
    size_bytes: int
    sector_bytes: int
    stored_bytes: int
    data_bytes: int
    created_at: datetime
    doubted_at: datetime | None


class ImageShown(Image):
    servers: list[str]


class Import(BaseModel):
    project_id: str
    name: str
    begun_at: datetime
    stage: Literal["receive", "fetch", "check", "wait", "store"]
    done_bytes: int
    total_bytes: int = Field(description="0: not known.")


class Erased(BaseModel):
    server: str
    instance_id: str
    model: str
    state: str
    os_now: str | None
    image: str | None
    os_type: str | None
    hostname: str
    root_disk: str
    disks_seen: int | None
    keeps: list[str]
    usual_s: int | None
    usual_high_s: int | None
    usual_runs: int
    careful: list[str]


class ServerProblem(Problem):
    server: str


class Kept(BaseModel):
    other_servers: int
    data_disks_seen: int
    locked: list[str]


class Plan(BaseModel):
    id: str
    erased: list[Erased]
    problems: list[ServerProblem]
    image: str | None
    kept: Kept


class Run(BaseModel):
    id: str
    batch: str
    server: str
    instance_id: str
    state: RunState
    step: str
    step_index: int
    steps: int
    past_the_line: bool
    stage: str | None
    percent: int | None
    bytes_written: int
    bytes_total: int | None
    rate_bytes_per_s: int | None
    attempt: int
    created_at: datetime
    started_at: datetime | None
    deadline_at: datetime
    ended_at: datetime | None
    outcome: str | None
    os_now: str | None
    disk_serial: str | None
    error: Problem | None
    proof: dict[str, Any] | None
    durations_s: dict[str, float]
    write_stages_s: dict[str, float] | None
    waits_for: str | None
    usual_s: float | None
    usual_durations_s: dict[str, float]
    late: bool
    done_percent: int
    eta_s: float | None
    eta_high_s: float | None
    gives_up_at: datetime | None
    cancelling: bool
    rehearse: bool
    rehearsal: dict[str, Any] | None


class Counts(BaseModel):
    running: int
    working: int
    waiting: int
    failed: int
    rehearsed: int
    cancelled: int


class Batch(BaseModel):
    id: str
    state: Literal["working", "succeeded", "failed", "cancelled"]
    image_id: str | None
    image: str | None
    created_at: datetime
    created_by: str
    ended_at: datetime | None
    counts: Counts
    rehearse: bool
    canary: int | None
    at_once: int | None
    max_failed: int | None
    paused_at: datetime | None
    stopped: str | None


class BatchShown(Batch):
    percent: int
    eta_s: float | None
    eta_high_s: float | None
    runs: list[Run]


class CancelledRun(BaseModel):
    run: str
    server: str
    result: Literal["not-started", "returning", "past-the-line", "ended"]
    meaning: str


class Event(BaseModel):
    """Beside these, what the type of event says."""

    model_config = ConfigDict(extra="allow")

    seq: int
    at: datetime
    type: str
    actor: str
    batch: str | None = None
    run: str | None = None
    server: str | None = None
    server_id: str | None = None


class Webhook(BaseModel):
    id: str
    name: str
    host: str
    shape: Literal["standard", "slack"]
    events: list[str]
    created_by: str
    created_at: datetime
    tries: int = Field(description="Of the next event, so far in vain.")
    next_at: datetime
    trouble: str | None = Field(description="Why it was not taken.")
    delivered_at: datetime | None


class NewWebhookShown(Webhook):
    """The secret is shown this once."""

    secret: str


class WebhookList(Listed):
    items: list[Webhook]


class Part(BaseModel):
    ok: bool
    text: str
    since: datetime


class Health(BaseModel):
    status: Literal["ok", "failing"]
    parts: dict[str, Part]


class ProjectList(Listed):
    items: list[Project]


class KeyList(Listed):
    items: list[Key]


class ServerList(Listed):
    items: list[Server]


class ImageList(Listed):
    items: list[Image]


class ImportList(Listed):
    items: list[Import]


class BatchList(Listed):
    items: list[Batch]


class CancelledRunList(Listed):
    items: list[CancelledRun]


class RunList(Listed):
    items: list[Run]


class EventList(Listed):
    items: list[Event]


# By the name of the route's function: the answer where all went well; a media type where that is no JSON. None: no body.
ANSWERS: dict[str, type[BaseModel] | str | None] = {
    "whoami": Whoami, "show_room": Room, "list_users": UserList, "add_user": User, "remove_user": None,
    "list_projects": ProjectList, "add_project": Project, "list_keys": KeyList, "add_key": NewKeyShown, "remove_key": None,
    "list_servers": ServerList, "show_server": Server, "add_server": Server, "set_server": Server, "lock_server": Server, "unlock_server": Server,
    "replace_server": Replaced, "probe_server": Probed, "rotate_server": Server, "switch_power": Switched, "remove_server": None,
    "list_images": ImageList, "show_image": ImageShown, "add_image": Image, "verify_image": Image, "remove_image": None, "list_imports": ImportList,
    "plan": Plan, "reinstall": BatchShown, "list_batches": BatchList, "show_batch": BatchShown, "pause_batch": BatchShown, "resume_batch": BatchShown,
    "cancel_batch": CancelledRunList, "cancel_run": CancelledRunList, "list_runs": RunList, "show_run": Run,
    "show_console": "text/plain", "fetch_case": "application/gzip",
    "list_webhooks": WebhookList, "show_webhook": Webhook, "add_webhook": NewWebhookShown, "send_test": Webhook, "remove_webhook": None,
    "list_events": EventList, "health": Health,
}  # fmt: skip
