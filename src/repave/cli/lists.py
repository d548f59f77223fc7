"""Lists: a table for people, names for a shell, CSV for a sheet, JSON for a program. Every list command takes the same options."""

from __future__ import annotations

import csv
import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from repave.cli.output import Json, say, show, show_json


@Parameter(name="*")
@dataclass(frozen=True)
class Form:
    """How a list is printed."""

    output: Annotated[Literal["table", "name", "csv", "json"], Parameter(name=["--output", "-o"])] = "table"
    "table; name: one name a line, nothing else; csv: the table's columns; json: {items, next}, all that is known of each."
    json: bool = False
    "The same as -o json."

    @property
    def is_json(self) -> bool:
        return self.json or self.output == "json"


TABLE = Form()


def show_list(items: Sequence[Json], columns: dict[str, str], form: Form) -> None:
    """`columns`: title -> key, dots for inner keys; the first is what `-o name` prints."""
    if form.is_json:
        show_json({"items": items, "next": None})
        return
    if form.output == "name":
        for item in items:
            show(_cell(item, next(iter(columns.values()))))
        return
    rows = [[_cell(item, key, empty="-" if form.output == "table" else "") for key in columns.values()] for item in items]
    if form.output == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([[title.lower().replace(" ", "_") for title in columns], *map(_tame, rows)])
        return
    if not rows:
        say("Nothing here yet.")
        return
    rows.insert(0, list(columns))
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _tame(row: Sequence[str]) -> list[str]:
    """A sheet takes a cell that begins so for a formula. Source: OWASP, CSV injection."""
    return ["'" + cell if cell.startswith(("=", "+", "-", "@")) else cell for cell in row]


def _cell(item: Any, key: str, *, empty: str = "-") -> str:
    for part in key.split("."):
        item = item.get(part) if isinstance(item, dict) else None
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, list | dict):
        return jsonlib.dumps(item)
    return empty if item in (None, "") else str(item)
