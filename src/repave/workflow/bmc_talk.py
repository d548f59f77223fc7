"""What was said to a BMC during a run, and what it answered: kept with the run, a JSON object a line, bounded and without secrets.

A step's talk is written down when the step has ended, well or not, in one transaction. An answer like the last one to the same question is not
written down again: a driver that waits for a state asks the same thing many times.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from repave.bmc.connector import Exchange
from repave.domain.model import Source
from repave.domain.redaction import Redactor
from repave.store import Store
from repave.store.database import OF_THE_STORE

BODY_CHARS = 4096
_READ_BYTES = 256 * 1024  # the largest real answer in the corpus has 60 KiB
_MOST_LINES = 400  # of one step: a power state that is waited for a minute is read 60 times


class BmcTalk:
    """The lines of one step. Call it with each exchange."""

    def __init__(self, redactor: Redactor, now: Callable[[], datetime]) -> None:
        self.lines: list[str] = []
        self._redactor, self._now = redactor, now
        self._last: dict[str, bytes] = {}

    def __call__(self, exchange: Exchange) -> None:
        clean, answer = self._redactor.clean, exchange.answer[:_READ_BYTES]
        line: dict[str, Any] = {"at": self._now().isoformat(timespec="milliseconds"), "method": exchange.method, "path": clean(exchange.path)}
        line |= {"status": exchange.status, "ms": round(1000 * exchange.seconds)} | ({"why": clean(exchange.why)} if exchange.why else {})
        if exchange.sent is not None:
            line["sent"] = self._redactor.clean_json(exchange.sent)
        if answer:
            line["answer"] = "as before" if exchange.method == "GET" and self._last.get(exchange.path) == answer else self._body(exchange.answer)
        self._last[exchange.path] = answer
        self.lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if len(self.lines) > _MOST_LINES:
            del self.lines[_MOST_LINES // 2]  # the middle: how it began and how it ended tell more

    def _body(self, data: bytes) -> Any:
        """As JSON where it is small enough, else the beginning of it as a text."""
        if len(data) > _READ_BYTES:
            return f"{len(data)} bytes"
        try:
            value = self._redactor.clean_json(json.loads(data))
            text = json.dumps(value, ensure_ascii=False)
        except (ValueError, RecursionError):
            return f"{len(data)} bytes that are not JSON"
        return value if len(text) <= BODY_CHARS else f"{text[:BODY_CHARS]}… ({len(text)} characters)"


@contextlib.contextmanager
def keep_talk(store: Store, run_id: str, *, also_secret: str) -> Iterator[BmcTalk]:
    """What is observed in the block is kept with the run, however the block ends; of no run ("") nothing is.

    A database that takes nothing now costs the talk, not the step.
    """
    talk = BmcTalk(Redactor([*(store.runs.list_run_secrets(run_id) if run_id else ()), also_secret]), store.now)
    try:
        yield talk
    finally:
        with contextlib.suppress(*OF_THE_STORE):
            if run_id and talk.lines:
                store.consoles.append(run_id, Source.BMC, "".join(talk.lines))
