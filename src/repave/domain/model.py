"""The things Repave knows, as values. Rows become these at the store's edge; nothing here talks to anything.

Times are aware UTC datetimes. Ids are lower-case UUIDs; project ids are 32 hex characters (clouddc-api.md section 1).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


class Role(enum.StrEnum):
    """What a credential may do in its project. Each includes the ones before it."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, needed: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(needed)


class InstanceState(enum.StrEnum):
    """`state` on the wire: CloudDC ShowInstanceStatus, the values every SDK version knows, and `error` (>= 3.1.193)."""

    PENDING = "pending"
    RUNNING = "running"
    ERROR = "error"


class OperationState(enum.StrEnum):
    """`operation_state` on the wire: SDK model/instance_operation_status.py."""

    REINSTALL_PROCESSING = "reinstall-processing"
    REINSTALL_SUCCEED = "reinstall-succeed"
    REINSTALL_FAILED = "reinstall-failed"


class Step(enum.StrEnum):
    """The eight steps of a run, the same words in code, API, CLI, pages and metrics."""

    PREFLIGHT = "preflight"
    POWER_OFF = "power-off"
    INSERT_MEDIA = "insert-media"
    BOOT_RAMDISK = "boot-ramdisk"
    WRITE_IMAGE = "write-image"
    BOOT_NEW_OS = "boot-new-os"
    FIRST_BOOT = "first-boot"
    PROOF = "proof"

    @property
    def number(self) -> int:
        return list(Step).index(self) + 1


class Source(enum.StrEnum):
    """Who speaks in a stream of a run's console."""

    AGENT = "agent"
    SERIAL = "serial"
    BMC = "bmc"


@dataclass(frozen=True)
class Project:
    id: str
    name: str
    domain_id: str


@dataclass(frozen=True)
class Credential:
    """A key pair and a token of one project. `sk` and `token` are never stored in clear."""

    id: str
    project_id: str
    name: str
    role: Role
    ak: str
    expires_at: datetime | None
    created_at: datetime


@dataclass(frozen=True)
class User:
    """A person with a login of their own, in one project. The password is kept as its argon2id hash only."""

    id: str
    project_id: str
    name: str
    role: Role
    created_at: datetime


@dataclass(frozen=True)
class Server:
    """A physical machine. `bmc_password` is sealed in the store and opened only for the driver."""

    id: str
    name: str
    project_id: str
    bmc_url: str
    bmc_username: str
    bmc_tls_verify: str  # "true", "false" or a path
    bmc_certificate_sha256: str | None
    bmc_system_uri: str | None
    manufacturer: str
    model: str
    serial: str
    uuid: str
    macs: tuple[str, ...]
    arch: str
    boot: str
    rack: str
    unit: str
    root_disk: dict[str, Any]  # hints in Ironic's words: serial, wwn, model, size, hctl, by_path, rotational
    network: dict[str, Any] | None  # static settings of the provisioning NIC and of the OS
    created_at: datetime
    keep_partitions: tuple[str, ...] = ()  # of the root disk, by name or GUID: they outlive a reinstall
    locked_at: datetime | None = None  # a locked server is not reinstalled
    locked_by: str | None = None
    lock_reason: str | None = None


@dataclass(frozen=True)
class Image:
    id: str
    project_id: str
    name: str
    os_type: str  # Linux, Windows
    arch: str
    boot: str
    manifest_sha256: str
    size_bytes: int
    sector_bytes: int
    stored_bytes: int
    data_bytes: int
    created_at: datetime
    doubted_at: datetime | None = None  # when a run said that it is damaged; None: nobody has, or all chunks were right since


@dataclass(frozen=True)
class Instance:
    """The OS a tenant owns, on one server. `image_id` None = unknown (adopted)."""

    id: str
    name: str
    project_id: str
    server_id: str
    image_id: str | None
    state: InstanceState
    operation_state: OperationState | None
    error: dict[str, Any] | None  # RepaveError.as_json
    created_at: datetime
    updated_at: datetime
    launched_at: datetime | None
    ssh_host_keys: tuple[str, ...] = ()
    os_type: str = "Linux"


@dataclass(frozen=True)
class Batch:
    """One API request for many."""

    id: str
    project_id: str
    image_id: str | None
    created_at: datetime
    created_by: str
    ended_at: datetime | None
    rehearse: bool = False
    canary: int | None = None  # domain/waves.py says what these three mean
    at_once: int | None = None
    max_failed: int | None = None
    paused_at: datetime | None = None
    stop_reason: str | None = None


@dataclass(frozen=True)
class Host:
    """A machine that Repave itself runs on."""

    id: str
    name: str
    serial: str
    uuid: str
    macs: tuple[str, ...]


@dataclass(frozen=True)
class RunRow:
    """One try for one instance: what was asked, what happened so far."""

    id: str
    batch_id: str
    project_id: str
    instance_id: str
    server_id: str
    image_id: str
    epoch: int
    found_state: InstanceState
    found_image_id: str | None
    step: Step
    created_at: datetime
    started_at: datetime | None
    deadline_at: datetime
    ready_at: datetime | None  # the agent said hello
    crossed_at: datetime | None  # the line
    verified_at: datetime | None  # read back, LBA 0 written
    ended_at: datetime | None
    outcome: str | None  # an Ending of domain/states.py
    error: dict[str, Any] | None
    ssh_keys: tuple[str, ...]
    inventory: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    seen_at: datetime | None = None  # last word from the agent
    proof: dict[str, Any] | None = None
    number: int = 1  # its place in the request
    rehearse: bool = False  # everything up to the line, then what was found again
    released_at: datetime | None = None  # it may begin: its workflow is queued
    cancel: dict[str, Any] | None = None  # why it was told to stop before the line (RepaveError.as_json)
    durations_s: dict[str, float] | None = None  # by step, written at the end
    late_step: str | None = None  # the last step that was said to be late
    hostname: str | None = None  # of the new OS; None = the instance's name

    @property
    def past_the_line(self) -> bool:
        return self.crossed_at is not None


@dataclass(frozen=True)
class Webhook:
    """Who is told of some events of a project. URL and secret are sealed in the store and opened only to send."""

    id: str
    project_id: str
    name: str
    host: str
    shape: str  # standard, slack
    events: tuple[str, ...]
    created_by: str
    created_at: datetime
    after_seq: int  # all events up to here are told
    tries: int  # of the next one, so far in vain
    next_at: datetime
    trouble: str | None
    delivered_at: datetime | None


@dataclass(frozen=True)
class Event:
    """One audited fact. `data` holds no secret and no BMC address."""

    seq: int
    at: datetime
    project_id: str
    type: str
    batch_id: str | None
    run_id: str | None
    server_id: str | None
    actor: str
    data: dict[str, Any] = field(default_factory=dict)
