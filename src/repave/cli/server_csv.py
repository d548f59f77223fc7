"""Servers from a CSV file, one a line. A BMC's password never stands in the file: `secret_env` names the environment variable that holds it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from repave.cli.output import Json, Usage
from repave.cli.server_rows import FIELDS, Row, read_bodies

_NEEDED = ("name", "bmc", "user", "secret_env")


def read_servers(path: Path) -> list[Json]:
    """The bodies of POST /servers, in the file's order. Raises Usage with all that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets put a byte order mark before the first name
            reader = csv.DictReader(f, strict=True)
            columns = list(reader.fieldnames or ())
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Usage(f"{path}: {error}.") from None
    if unknown := [c for c in columns if c not in FIELDS]:
        raise Usage(f"{path}:1: unknown column {unknown[0]!r}; known: {', '.join(FIELDS)}.")
    if missing := [c for c in _NEEDED if c not in columns]:
        raise Usage(f"{path}:1: the column {missing[0]!r} is missing.")
    if not lines:
        raise Usage(f"{path}: no servers.")
    return read_bodies([_row(f"{path}:{number}", line) for number, line in lines], needed=_NEEDED)


def _row(place: str, line: dict[str | Any, Any]) -> Row:
    """A line has fewer fields than columns, or more: those are under None."""
    if line.get(None):
        return Row(place, {}, (str(list(line)[-2]), f"is followed by {len(line[None])} fields too many"))
    return Row(place, {column: value.strip() for column, value in line.items() if value and value.strip()})
