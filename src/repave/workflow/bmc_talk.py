"""What was said to a BMC during a run, and what it answered: kept with the run, a JSON object a line, bounded and without secrets.

A step's talk is written down when the step has ended, well or not, in one transaction. An answer like the last one to the same question is not
written down again: a driver that waits for a state asks the same thing many times.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from repave.bmc.connector import Exchange
from repave.domain.model import Source
from repave.domain.redaction import Redactor
from repave.store import Store
from repave.store.database import OF_THE_STORE

BODY_CHARS = 4096
_MOST = 400  # of one step: a power state that is waited for a minute is read 60 times


class BmcTalk:
    """The talk of one step. Call it with each exchange."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._exchanges: list[tuple[datetime, Exchange]] = []

    def __call__(self, exchange: Exchange) -> None:
        self._exchanges.append((self._store.now(), exchange))
        if len(self._exchanges) > _MOST:
            del self._exchanges[_MOST // 2]  # the middle: how it began and how it ended tell more

    def render(self, redactor: Redactor) -> str:
        last: dict[str, bytes] = {}
        lines = []
        for at, e in self._exchanges:
            line: dict[str, Any] = {"at": at.isoformat(timespec="milliseconds"), "method": e.method, "path": redactor.clean(e.path)}
            line |= {"status": e.status, "ms": round(1000 * e.seconds)} | ({"why": redactor.clean(e.why)} if e.why else {})
            if e.sent is not None:
                line["sent"] = redactor.clean_json(e.sent)
            if e.answer and e.method == "GET" and last.get(e.path) == e.answer:
                line["answer"] = "as before"
            elif e.answer:
                line["answer"] = _body(e.answer, redactor)
            last[e.path] = e.answer
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return "".join(lines)


@contextlib.contextmanager
def keep_talk(store: Store, run_id: str, *, also_secret: str) -> Iterator[BmcTalk]:
    """What is observed in the block is kept with the run, however the block ends. A database that takes nothing now costs the talk, not the step."""
    talk = BmcTalk(store)
    try:
        yield talk
    finally:
        with contextlib.suppress(*OF_THE_STORE):
            if text := talk.render(Redactor([*store.runs.list_run_secrets(run_id), also_secret])):
                store.consoles.append(run_id, Source.BMC, text)


def _body(data: bytes, redactor: Redactor) -> Any:
    """As JSON where it is that and small enough, else the beginning of its text."""
    try:
        value = redactor.clean_json(json.loads(data))
    except (ValueError, RecursionError):
        value = redactor.clean(data.decode(errors="replace"))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return value if len(text) <= BODY_CHARS else f"{text[:BODY_CHARS]}… ({len(text)} characters)"
