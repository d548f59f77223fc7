"""What one paint shows, read once: counts, rows, the chips of live batches and the strip of what happened last agree with each other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from repave.api.operator.batches import show_batch
from repave.api.operator.events import list_newest
from repave.api.operator.scope import Scope
from repave.api.operator.servers import list_servers
from repave.errors import RequestError
from repave.folding import fold
from repave.pages.frame import Frame
from repave.pages.render import parts

Json = dict[str, Any]
_QUIET = ("run.step", "run.plan", "run.report", "run.proof", "run.media-out", "user.logged-in")  # the strip has room for three
_STRIP = 3


class Snapshot:
    """One look at a project. What is not asked for is not read."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._batches: dict[str, Json] = {}

    def batch(self, batch_id: str) -> Json:
        """With its runs. Raises not-found."""
        if batch_id not in self._batches:
            self._batches[batch_id] = show_batch(self.scope, batch_id)
        return self._batches[batch_id]

    @functools.cached_property
    def live_batches(self) -> list[Json]:
        """Newest first."""
        ids = {run.batch_id for run in self.scope.store.runs.list_runs(project_id=self.scope.project_id, live=True)}
        return [self.batch(batch_id) for batch_id in sorted(ids, reverse=True)]

    @functools.cached_property
    def live_runs(self) -> dict[str, Json]:
        """By server."""
        return {run["server"]: run for batch in self.live_batches for run in batch["runs"] if run["ended_at"] is None}

    @functools.cached_property
    def servers(self) -> list[Json]:
        found: list[Json] = list_servers(self.scope)["items"]
        return found

    def find_server(self, name: str) -> Json:
        """Raises not-found."""
        for server in self.servers:
            if name in (server["name"], server["id"]):
                return server
        raise RequestError("not-found", f"There is no server {name!r} in this project.", kind="server")

    def frame(self, title: str) -> Frame:
        """A frame that has what every page has."""
        frame = Frame(title, moving=bool(self.live_batches))
        part = parts(self.scope.named)
        frame.put("chips", part.chips(self.live_batches))
        events = list_newest(self.scope, limit=40)
        loud = [e for e in events if e["type"] not in _QUIET] or events
        frame.put("strip", part.strip(fold_events(loud)[:_STRIP]))
        return frame


_SENTENCES = {
    "batch.ended": "batch ended", "batch.paused": "batch paused", "batch.resumed": "batch goes on", "batch.stopped": "batch stopped: {why}",
    "image.added": "image {name} imported", "image.removed": "image {name} removed", "image.doubted": "image {name} may be damaged",
    "image.whole": "image {name} is whole", "key.added": "key {name} added", "key.removed": "a key removed", "project.added": "project {name} added",
    "run.accepted": "reinstall accepted",
    "run.cancelled": "cancelled", "run.crossed": "crossed the line", "run.plan": "plan made", "run.report": "image written",
    "run.ended": "{outcome}{code}",
    "run.late": "late in {step}", "run.media-out": "boot media out", "run.proof": "called home from the new OS",
    "run.second-agent": "a second agent was refused",
    "run.step": "begins {step}", "server.added": "server added", "server.changed": "server changed",
    "server.password-rotated": "its BMC has a new password", "server.password-refused": "its BMC refused a new password", "server.locked": "locked: {reason}",
    "server.power-ordered": "power by hand: {order}",
    "server.unlocked": "unlocked", "server.removed": "server {name} removed", "user.added": "{name} may log in as {role}",
    "user.removed": "{name} may not log in any more",
    "user.logged-in": "{name} logged in",
}  # fmt: skip
_OUTCOMES = {
    "proved": "runs the new OS", "returned": "not reinstalled, what was there runs again", "rehearsed": "rehearsed, nothing written",
    "return-failed": "not reinstalled, could not be started again", "write-failed": "write failed", "unproved": "the new OS did not call home",
    "restored": "ended by a restore", "late-proof": "runs the new OS, proved late",
}  # fmt: skip


def fold_events(events: Sequence[Json]) -> list[tuple[Json, str]]:
    """Each with its sentence; neighbours that say the same of several servers are one."""
    groups: list[list[Json]] = []
    for event in events:
        last = groups[-1][0] if groups else {}
        alike = all(last.get(name) == event.get(name) for name in ("type", "batch", "actor")) and _words(last) == _words(event)
        if alike and event.get("server"):
            groups[-1].append(event)
        else:
            groups.append([event])
    return [(group[0], sentence(group[0] | ({"server": fold(e["server"] for e in group)} if len(group) > 1 else {}))) for group in groups]


class _Said(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return ""


def sentence(event: Json) -> str:
    """What happened, in a few words; the event's own type where it is not one of these."""
    words = _words(event)
    return f"{event['server']} {words}" if event.get("server") and str(event["server"]) not in words else words


def _words(event: Json) -> str:
    code = f" {event['error']['code']}" if isinstance(event.get("error"), dict) else ""
    said = _Said(event | {"code": code, "outcome": _OUTCOMES.get(str(event.get("outcome")), str(event.get("outcome", "")))})
    return _SENTENCES.get(event["type"], str(event["type"])).format_map(said).strip().removesuffix(":")
