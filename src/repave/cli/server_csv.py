"""Servers from a CSV file, one a line. Every wrong field of the whole file is told, by line and column, before anything is sent.

A BMC's password never stands in the file: `secret_env` names the environment variable that holds it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repave.cli.output import Json, Usage

# Column -> the API's field (api/operator_servers.py, NewServer).
FIELDS = {
    "name": "name", "bmc": "bmc_url", "user": "bmc_username", "secret_env": "bmc_password", "rack": "rack", "unit": "unit",
    "mac": "network.mac", "address": "network.address", "prefix": "network.prefix", "gateway": "network.gateway", "dns": "network.dns",
    "vlan": "network.vlan", "root_disk": "root_disk", "keep_partitions": "keep_partitions",
    "blank": "blank", "tls_verify": "tls_verify", "fingerprint": "certificate_sha256",
    "system": "system_uri", "arch": "arch", "os_type": "os_type", "image": "image",
}  # fmt: skip
_NEEDED = ("name", "bmc", "user", "secret_env")
_ONCE = ("name", "bmc", "mac", "address")  # two servers never share these; one BMC with several systems says which
_SHOWN = 20


def read_servers(path: Path) -> list[Json]:
    """The bodies of POST /servers, in the file's order. Raises Usage with all that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets put a byte order mark before the first name
            reader = csv.DictReader(f, strict=True)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Usage(f"{path}: {error}.") from None
    if unknown := [c for c in columns if c not in FIELDS]:
        raise Usage(f"{path}:1: unknown column {unknown[0]!r}; known: {', '.join(FIELDS)}.")
    if missing := [c for c in _NEEDED if c not in columns]:
        raise Usage(f"{path}:1: the column {missing[0]!r} is missing.")
    if not rows:
        raise Usage(f"{path}: no servers.")
    bodies, wrong = [], []
    first_seen: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        body, faults = _read_row(row)
        for column in _ONCE:
            # .get: a column that is not in the file; "" in a line of fewer fields.
            value = (column, (row.get(column) or "").strip().lower(), (row.get("system") or "") if column == "bmc" else "")
            if value[1] and first_seen.setdefault(value, line) != line:
                faults.append((column, f"is the same as in line {first_seen[value]}"))
        bodies.append(body)
        wrong += [f"{path}:{line}: {column}: {fault}." for column, fault in faults]
    if wrong:
        more = f"\n… and {len(wrong) - _SHOWN} more." if len(wrong) > _SHOWN else ""
        raise Usage("\n".join(wrong[:_SHOWN]) + more)
    return bodies


def _read_row(row: dict[str | Any, Any]) -> tuple[Json, list[tuple[str, str]]]:
    """The row as the API wants it, and what is wrong: (column, fault)."""
    if row.get(None):
        return {}, [(str(list(row)[-2]), f"is followed by {len(row[None])} fields too many")]
    given = {column: value.strip() for column, value in row.items() if value and value.strip()}
    faults = [(column, "is empty") for column in _NEEDED if column not in given]
    variable = given.get("secret_env")
    if variable is not None and variable not in os.environ:
        faults.append(("secret_env", f"the environment has no {variable}"))
    body: Json = {}
    for column, value in given.items():
        outer, _, name = FIELDS[column].rpartition(".")
        into = body.setdefault(outer, {}) if outer else body
        into[name] = value.replace(",", " ").split() if column == "dns" else os.environ.get(value, "") if column == "secret_env" else value
    told = {column for column, _ in faults}
    return body, faults + [fault for fault in _validate(body) if fault[0] not in told]


def _validate(body: Json) -> list[tuple[str, str]]:
    """The service's own rules, asked before it is: a file is refused whole or sent whole."""
    from pydantic import ValidationError

    from repave.api.operator_servers import NewServer

    try:
        NewServer.model_validate(body)
    except ValidationError as error:
        return [(_column(e["loc"]), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return []


def _column(place: Sequence[int | str]) -> str:
    field = ".".join(str(part) for part in place if not isinstance(part, int))
    return next((column for column, name in FIELDS.items() if name == field), field)
