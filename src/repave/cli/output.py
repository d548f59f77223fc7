"""What the command line prints and how it ends: data on stdout, everything else on stderr, no escape codes in a pipe.

Exit codes (ux.md 2): 0 all as asked · 1 our fault · 2 wrong use, nothing sent · 3 refused or not confirmed, nothing touched · 4 not
logged in or not allowed · 5 service unreachable · 10 ended, some failed · 11 all failed · 12 stopped by its limit · 13 cancelled ·
124 --timeout passed · 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from repave.errors import RepaveError, RequestError, Who

Json = dict[str, Any]


class Usage(Exception):
    """Wrong use; nothing was sent. Exit code 2."""


class Refused(Exception):
    """Refused or not confirmed; nothing was touched. Exit code 3."""


def exit_code(error: RepaveError) -> int:
    if error.slug in ("not-logged-in", "not-allowed"):
        return 4
    if error.slug == "service-unreachable":
        return 5
    return 1 if error.problem.who is Who.US else 3


def say(text: str = "") -> None:
    """For people: stderr."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Data: stdout."""
    print(text, flush=True)


def show_json(value: Any) -> None:
    show(json.dumps(value, indent=2, ensure_ascii=False))


def show_list(items: Sequence[Json], columns: dict[str, str], *, as_json: bool) -> None:
    """Aligned columns (title -> key, dots for inner keys), or {"items", "next"}."""
    if as_json:
        show_json({"items": items, "next": None})
        return
    rows = [list(columns)] + [[_cell(item, key) for key in columns.values()] for item in items]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows if items else []:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not items:
        say("Nothing here yet.")


def _cell(item: Any, key: str) -> str:
    for part in key.split("."):
        item = item.get(part) if isinstance(item, dict) else None
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, list | dict):
        return json.dumps(item)
    return "-" if item in (None, "") else str(item)


def show_fields(value: Json, inner: str = "") -> None:
    """One thing for people: a line a field, dots for inner names, what is empty left out."""
    for name, item in value.items():
        if isinstance(item, dict):
            show_fields(item, f"{inner}{name}.")
        elif item not in (None, "", []):
            shown = ", ".join(str(i) for i in item) if isinstance(item, list) else _cell(value, name)
            show(f"{inner}{name}".ljust(26) + f" {shown}")


def show_error(error: RepaveError) -> None:
    p = error.problem
    say(f"{p.code}  {p.title} {error.detail}".rstrip())
    say(f"  do         {p.do}\n  untouched  {p.untouched}")


def is_terminal() -> bool:
    """Both ends are a person's: may ask, may redraw."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def may_redraw() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not any(os.environ.get(n) for n in ("CI", "ACCESSIBLE"))


def confirm(question: str, wanted: str, *, yes: bool) -> None:
    """Returns when the words were typed, or --yes was given. Raises Refused."""
    if yes:
        return
    if not is_terminal():
        raise Refused("Not confirmed: there is no terminal to ask on, and no --yes.")
    sys.stderr.write(question)
    sys.stderr.flush()
    if sys.stdin.readline().strip() != wanted:
        raise Refused("Not confirmed; nothing was sent.")


def read_secret(prompt: str, *, from_stdin: bool, variable: str | None = None, twice: bool = False) -> str:
    """From stdin's first line, the environment or the terminal; never from the command line."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if variable and variable in os.environ:
        return os.environ[variable]
    if not is_terminal():
        raise Usage(f"{prompt}: give it with --password-stdin" + (f" or {variable}." if variable else "."))
    from getpass import getpass

    secret = getpass(f"{prompt}: ", stream=sys.stderr)
    if twice and getpass("Again: ", stream=sys.stderr) != secret:
        raise Refused("The two were different; nothing was sent.")
    return secret


# ---- nodesets ----


def unfold(text: str) -> list[str]:
    """The names of a nodeset, in its order. Raises Usage."""
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    try:
        return [str(name) for name in NodeSet(text, resolver=RESOLVER_NOGROUP)]
    except NodeSetException as error:
        raise Usage(f"{text!r} is no nodeset: {error}. Write it as 'web[01-12]' or web01,web02.") from None


def fold(names: Iterable[str]) -> str:
    from ClusterShell.NodeSet import NodeSet

    return str(NodeSet.fromlist(sorted(names)))


def check_known(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises RequestError naming the unknown ones and what may have been meant."""
    missing = [name for name in wanted if name not in known]
    if missing:
        from difflib import get_close_matches

        meant = get_close_matches(missing[0], known, 1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        raise RequestError("not-found", f"Unknown: {fold(missing)}.{hint}")


# ---- numbers ----


def count(number: int, noun: str) -> str:
    """ "1 server", "2 servers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
