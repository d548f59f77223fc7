"""What the command line prints and how it ends: data on stdout, everything else on stderr, no escape codes in a pipe."""

from __future__ import annotations

import enum
import json
import os
import sys
from typing import Any

from repave.errors import RepaveError, Who
from repave.folding import check_known as check_known
from repave.folding import count as count
from repave.folding import fold as fold
from repave.folding import size as size
from repave.folding import unfold as unfold_names

Json = dict[str, Any]


class Exit(enum.IntEnum):
    """How a command ends: what a script reads. docs/cli.md and `repave --help` are made from here. Source: ux.md 2."""

    meaning: str

    OK = 0, "all went as asked"
    OURS = 1, "Repave's fault, or `health` found a part that is not well"
    USAGE = 2, "wrong use; nothing was sent"
    REFUSED = 3, "refused or not confirmed, or a plan has problems; nothing was touched"
    NOT_ALLOWED = 4, "not logged in, or this key may not do that"
    UNREACHABLE = 5, "the service does not answer"
    FAILED = 10, "ended, and some of several failed; `repave bmc`: the BMC did not do it"
    ALL_FAILED = 11, "ended, and all of several failed"
    STOPPED = 12, "the batch was stopped by its own limit"
    CANCELLED = 13, "the batch was cancelled"
    TIMEOUT = 124, "--timeout passed; the batch goes on"
    CTRL_C = 130, "Ctrl-C; a batch goes on"

    def __new__(cls, code: int, meaning: str) -> Exit:
        made = int.__new__(cls, code)
        made._value_, made.meaning = code, meaning
        return made


class Usage(Exception):
    """Wrong use; nothing was sent."""


class Refused(Exception):
    """Refused or not confirmed; nothing was touched."""


def exit_code(error: RepaveError) -> Exit:
    if error.slug in ("not-logged-in", "not-allowed"):
        return Exit.NOT_ALLOWED
    if error.slug in ("service-unreachable", "answer-lost"):
        return Exit.UNREACHABLE
    return Exit.OURS if error.problem.who is Who.US else Exit.REFUSED


PROGRESS = ("auto", "plain", "json", "none")


def is_quiet() -> bool:
    """-q was given."""
    return bool(os.environ.get("REPAVE_QUIET"))


def progress_mode() -> str:
    """One of PROGRESS: what --progress says; with -q none."""
    return "none" if is_quiet() else os.environ.get("REPAVE_PROGRESS", "auto")


def say(text: str = "") -> None:
    """Progress and hints, for people: stderr. Nothing with -q."""
    if not is_quiet():
        warn(text)


def warn(text: str) -> None:
    """What must be read, also with -q: errors, and what is about to be confirmed."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Data: stdout."""
    print(text, flush=True)


def show_json(value: Any) -> None:
    show(json.dumps(value, indent=2, ensure_ascii=False))


def show_fields(value: Json, inner: str = "") -> None:
    """One thing for people: a line a field, dots for inner names, what is empty left out."""
    for name, item in value.items():
        if isinstance(item, dict):
            show_fields(item, f"{inner}{name}.")
        elif item not in (None, "", []):
            shown = ", ".join(str(i) for i in item) if isinstance(item, list) else ("no", "yes")[item] if isinstance(item, bool) else str(item)
            show(f"{inner}{name}".ljust(26) + f" {shown}")


def show_error(error: RepaveError) -> None:
    p = error.problem
    warn(f"{p.code}  {p.title} {error.detail}".rstrip())
    warn(f"  do         {p.do}\n  untouched  {p.untouched}")


def is_terminal() -> bool:
    """Both ends are a person's: may ask, may redraw."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def may_redraw() -> bool:
    dumb = os.environ.get("TERM") == "dumb" or any(os.environ.get(n) for n in ("CI", "ACCESSIBLE"))
    return progress_mode() == "auto" and sys.stderr.isatty() and not dumb


def confirm(question: str, wanted: str, *, yes: bool) -> None:
    """Returns when the words were typed, or --yes was given. Raises Refused."""
    if yes:
        return
    if not is_terminal():
        raise Refused("Not confirmed: there is no terminal to ask on, and no --yes.")
    if input_line(question) != wanted:
        raise Refused("Not confirmed; nothing was sent.")


def input_line(question: str) -> str:
    """What was typed. The question goes to stderr, so that stdout stays data."""
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip()


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
    try:
        return unfold_names(text)
    except ValueError as error:
        raise Usage(str(error)) from None
