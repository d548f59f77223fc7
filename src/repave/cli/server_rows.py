"""Servers from rows, those of a file or of another system: checked whole before anything is sent, all that is wrong told at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repave.cli.output import Json, Usage

# Column -> the API's field (api/operator/servers.py, NewServer). `secret_env` names the environment variable that holds the BMC's password.
FIELDS = {
    "name": "name", "bmc": "bmc_url", "user": "bmc_username", "secret_env": "bmc_password", "rack": "rack", "unit": "unit",
    "mac": "network.mac", "address": "network.address", "prefix": "network.prefix", "gateway": "network.gateway", "dns": "network.dns",
    "vlan": "network.vlan", "root_disk": "root_disk", "keep_partitions": "keep_partitions",
    "blank": "blank", "tls_verify": "tls_verify", "fingerprint": "certificate_sha256",
    "system": "system_uri", "arch": "arch", "os_type": "os_type", "image": "image",
}  # fmt: skip
_ONCE = ("name", "bmc", "mac", "address")  # two servers never share these; one BMC with several systems says which
_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One server. `place`: where it was read, for errors. `fault`: a column and what is wrong, where the row itself could not be read."""

    place: str
    given: Mapping[str, str]
    fault: tuple[str, str] | None = None


def read_bodies(rows: Sequence[Row], *, needed: Sequence[str], common: Json | None = None, called: Mapping[str, str] | None = None) -> list[Json]:
    """The bodies of POST /servers, in the rows' order, each with `common`. `called`: what a column is called where the rows come from.

    Raises Usage with all that is wrong.
    """
    bodies, wrong = [], []
    first_seen: dict[tuple[str, ...], str] = {}
    for row in rows:
        body, faults = ({}, [row.fault]) if row.fault else _read_row(row.given, needed, common or {})
        for column in _ONCE:
            value = (column, row.given.get(column, "").lower(), row.given.get("system", "") if column == "bmc" else "")
            if value[1] and first_seen.setdefault(value, row.place) != row.place:
                faults.append((column, f"is the same as in {first_seen[value]}"))
        bodies.append(body)
        wrong += [f"{row.place}: {(called or {}).get(column, column)}: {fault}." for column, fault in faults]
    if wrong:
        more = f"\n… and {len(wrong) - _SHOWN} more." if len(wrong) > _SHOWN else ""
        raise Usage("\n".join(wrong[:_SHOWN]) + more)
    return bodies


def _read_row(given: Mapping[str, str], needed: Sequence[str], common: Json) -> tuple[Json, list[tuple[str, str]]]:
    """The row as the API wants it, and what is wrong: (column, fault)."""
    faults = [(column, "is empty") for column in needed if column not in given]
    variable = given.get("secret_env")
    if variable is not None and variable not in os.environ:
        faults.append(("secret_env", f"the environment has no {variable}"))
    body: Json = dict(common)
    for column, value in given.items():
        outer, _, name = FIELDS[column].rpartition(".")
        into = body.setdefault(outer, {}) if outer else body
        into[name] = value.replace(",", " ").split() if column == "dns" else os.environ.get(value, "") if column == "secret_env" else value
    told = {column for column, _ in faults}
    return body, faults + [fault for fault in _validate(body) if fault[0] not in told]


def _validate(body: Json) -> list[tuple[str, str]]:
    """The service's own rules, asked before it is: all rows are sent, or none."""
    from pydantic import ValidationError

    from repave.api.operator.servers import NewServer

    try:
        NewServer.model_validate(body)
    except ValidationError as error:
        return [(_column(e["loc"]), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return []


def _column(place: Sequence[int | str]) -> str:
    field = ".".join(str(part) for part in place if not isinstance(part, int))
    return next((column for column, name in FIELDS.items() if name == field), field)
