"""What happened: the audit, newest last; or as it happens."""

from __future__ import annotations

import json as jsonlib

from repave.cli.client import Client
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import Project
from repave.cli.output import Exit, Json, show
from repave.errors import RepaveError
from repave.folding import parse_time

_COLUMNS = {"SEQ": "seq", "AT": "at", "TYPE": "type", "SERVER": "server", "ACTOR": "actor", "WHAT": "what"}
_NAMED = ("seq", "at", "type", "actor", "server", "server_id", "batch", "run")


def events(*, follow: bool = False, batch: str | None = None, after: int | None = None, limit: int = 50, project: Project = None, form: Form = TABLE) -> int:
    """The newest events, oldest of them first.

    Parameters
    ----------
    follow
        Go on with what happens, one event a line (-o json: one object a line), until Ctrl-C; of a batch until it has ended.
    batch
        Of this batch only.
    after
        Those that came after this seq instead of the newest.
    limit
        At most so many of those that happened already.
    """
    client = Client(project)
    past = client.items("/events", batch=batch, limit=limit, **({"newest": True} if after is None else {"after": after}))
    if not follow:
        show_list(past if form.is_json else [e | {"what": _rest(e), "at": _second(e["at"])} for e in past], _COLUMNS, form)
        return Exit.OK
    seq = after or 0
    for event in past:
        seq = event["seq"]
        _tell(event, form)
    while True:
        try:
            for event in client.follow(seq, batch=batch):
                seq = event["seq"]
                _tell(event, form)
            return Exit.OK
        except RepaveError as error:
            if error.slug != "service-unreachable" or "broke off" not in error.detail:
                raise


def _tell(event: Json, form: Form) -> None:
    if form.is_json:
        show(jsonlib.dumps(event, ensure_ascii=False))
    elif form.output == "name":
        show(str(event["seq"]))
    else:
        words = (_second(event["at"]), event["type"], event.get("server"), f"by {event['actor']}" if event["actor"] != "repave" else "", _rest(event))
        show(" ".join(word for word in words if word))


def _second(at: str) -> str:
    return f"{parse_time(at):%Y-%m-%dT%H:%M:%SZ}"


def _rest(event: Json) -> str:
    """What this kind of event says beside who, when and where."""
    told = {k: v for k, v in event.items() if k not in _NAMED and v not in (None, "", [], {})}
    return " ".join(f"{k}={v if isinstance(v, str | int | float) else jsonlib.dumps(v, ensure_ascii=False)}" for k, v in told.items())
