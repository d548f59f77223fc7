"""The phases of bringing up a rack, as a person sees them: what goes on, and when it goes wrong the last words of its log, the cause and what to do."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from repave.errors import RepaveError

LAST_LINES = 5


def say(text: str) -> None:
    """Progress: standard error, so that --json stays clean."""
    print(text, file=sys.stderr, flush=True)


class PhaseFailed(Exception):
    """A phase did not end well; the text is all that a person needs."""


@contextlib.contextmanager
def phase(
    name: str, why: str, *, log: Callable[[], Path | None] = lambda: None, fix: str, goes_on: str = "what was made before is kept"
) -> Iterator[Callable[[], str]]:
    """`why` is told first: what for, how long, what is kept. Gives the seconds so far, as a text. Raises PhaseFailed for any error in the block but Ctrl-C."""
    started = time.monotonic()
    say(f"{name:<12} {why}")
    try:
        yield lambda: f"{time.monotonic() - started:.0f} s"
    except PhaseFailed:
        raise
    except Exception as error:
        cause = str(error) if isinstance(error, RepaveError | RuntimeError) else f"{type(error).__name__}: {error}"
        lines = [f"✗ {name} failed after {time.monotonic() - started:.0f} s"]
        if (path := log()) is not None and path.exists():
            lines += [f"  {path}:", *(f"  | {line}" for line in path.read_text(errors="replace").splitlines()[-LAST_LINES:])]
        lines += [f"  cause  {cause}", f"  fix    {fix}", f"  then   the same command again; {goes_on}"]
        raise PhaseFailed("\n".join(lines)) from error
