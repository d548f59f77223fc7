"""Rows in, dataclasses out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repave.domain.model import (
    Batch,
    Credential,
    Event,
    Host,
    Image,
    Instance,
    InstanceState,
    OperationState,
    Project,
    Role,
    RunRow,
    Server,
    Step,
    User,
    Webhook,
)

Row = Mapping[Any, Any]


def _pick(kind: type, row: Row, **given: Any) -> Any:
    """The fields of `kind` that the row has under the same name, and the ones given."""
    had = {**row}  # looked up by name several times: SQLAlchemy's own mapping is slow at that
    fields: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind(**{name: had[name] for name in fields if name in had and name not in given}, **given)


def project(row: Row) -> Project:
    return _pick(Project, row)  # type: ignore[no-any-return]


def credential(row: Row) -> Credential:
    return _pick(Credential, row, role=Role(row["role"]))  # type: ignore[no-any-return]


def user(row: Row) -> User:
    return _pick(User, row, role=Role(row["role"]))  # type: ignore[no-any-return]


def server(row: Row) -> Server:
    return _pick(Server, row, macs=tuple(row["macs"] or ()), root_disk=row["root_disk"] or {}, keep_partitions=tuple(row["keep_partitions"] or ()))  # type: ignore[no-any-return]


def host(row: Row) -> Host:
    return _pick(Host, row, macs=tuple(row["macs"] or ()))  # type: ignore[no-any-return]


def image(row: Row) -> Image:
    return _pick(Image, row)  # type: ignore[no-any-return]


def instance(row: Row) -> Instance:
    operation = row["operation_state"]
    return _pick(  # type: ignore[no-any-return]
        Instance, row, state=InstanceState(row["state"]), operation_state=OperationState(operation) if operation else None,
        ssh_host_keys=tuple(row["ssh_host_keys"] or ()),
    )  # fmt: skip


def batch(row: Row) -> Batch:
    return _pick(Batch, row)  # type: ignore[no-any-return]


def run(row: Row) -> RunRow:
    return _pick(  # type: ignore[no-any-return]
        RunRow,
        row,
        found_state=InstanceState(row["found_state"]),
        step=Step(row["step"]),
        ssh_keys=tuple(row["ssh_keys"] or ()),
    )


def webhook(row: Row) -> Webhook:
    return _pick(Webhook, row, events=tuple(row["events"] or ()))  # type: ignore[no-any-return]


def event(row: Row) -> Event:
    return _pick(Event, row, data=row["data"] or {})  # type: ignore[no-any-return]
