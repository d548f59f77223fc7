"""A batch as a table on a terminal: a frame that is drawn over and over, never taller or wider than the terminal, and what its keys do.

Keys change what is looked at; `p` alone asks the service for something. The frame that stays is folded and whole, whatever was looked at last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from repave.cli.client import Client
from repave.cli.keys import Keys
from repave.cli.output import Json
from repave.errors import RepaveError
from repave.folding import batch_rules, batch_time, count, counts_line, fold_runs, folded_row, image_of, more_line

_NAMES_WIDTH = 32
_COLOURS = {"✗": "red", "▲": "yellow", "▶": "blue", "✓": "green"}  # beside glyph and word, never instead
_KEYS_HELP = (
    "  f       failed runs only, or all",
    "  u       a row for each server, or equal ones folded into one",
    "  p       pause what has not begun of the batch, or let it go on; what is under way goes on",
    "  ?       these lines, or none",
    "  Ctrl-C  stop watching; the batch goes on",
)


@dataclass
class View:
    """What is looked at."""

    failed_only: bool = False
    unfolded: bool = False
    shows_keys: bool = False
    said: str = ""  # what came of the last key


class LiveTable:
    """One batch on a terminal. Without `keys` it is looked at only."""

    def __init__(self, client: Client, live: Live, console: Console, keys: Keys | None) -> None:
        self._client, self._live, self._console, self._keys = client, live, console, keys
        self._batch: Json | None = None
        self._view = View()

    def show(self, batch: Json) -> None:
        self._batch = batch
        self._draw(self._view, has_keys=self._keys is not None)

    def leave(self) -> None:
        """The frame that stays."""
        self._draw(View(), has_keys=False)

    def wait(self, seconds: float) -> None:
        """Keys are obeyed as they come, until this time has passed."""
        if self._keys is None:
            time.sleep(seconds)
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if key := self._keys.wait(left):
                self._obey(key)

    def _obey(self, key: str) -> None:
        view, view.said = self._view, ""
        if key == "f":
            view.failed_only = not view.failed_only
        elif key == "u":
            view.unfolded = not view.unfolded
        elif key == "?":
            view.shows_keys = not view.shows_keys
        elif key == "p":
            view.said = self._pause_or_resume()
        self._draw(view, has_keys=True)

    def _pause_or_resume(self) -> str:
        """The batch is paused, or goes on, as the service now says; or why not, in one line."""
        if self._batch is None:
            return ""
        verb = _pause_verb(self._batch)
        try:
            self._batch = self._client.post(f"/batches/{self._batch['id']}/{verb}", {})
        except RepaveError as error:
            return f"Not {verb}d: {error.code} {error.problem.title} {error.detail}".rstrip()
        counts = self._batch["counts"]
        return f"Paused: {counts['waiting']} wait, {counts['working']} under way go on." if verb == "pause" else "It goes on."

    def _draw(self, view: View, *, has_keys: bool) -> None:
        if self._batch is not None:
            size = self._console.size
            self._live.update(render_frame(self._batch, view, size.width, size.height - 1, has_keys=has_keys), refresh=True)


def render_frame(batch: Json, view: View, width: int, height: int, *, has_keys: bool) -> Group:
    """Headline, counts, a row for each kind of run, failures first; the rows there is no room for are one line with their counts."""
    lines = [Text(_headline(batch, view, width, has_keys=has_keys)), Text(counts_line(batch, width))]
    lines += [Text(line) for line in (*([view.said] if view.said else []), *(_KEYS_HELP if view.shows_keys else ()))]
    lines = lines[:height]
    groups = [group for group in fold_runs(batch["runs"]) if not view.failed_only or group[0]["state"] == "failed"]
    if view.unfolded:
        groups = [[run] for group in groups for run in group]
    room = height - len(lines)
    shown = len(groups) if len(groups) <= room else max(0, room - 1)
    for row in aligned([folded_row(group) for group in groups[:shown]]):
        line = Text(row)
        line.stylize(_COLOURS.get(row[0], ""), 0, len(row.split("  ")[0]))
        lines.append(line)
    if shown < len(groups) and room > 0:
        lines.append(Text(more_line(groups[shown:])))
    if not groups and room > 0:
        lines.append(Text("  none has failed"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def _headline(batch: Json, view: View, width: int, *, has_keys: bool) -> str:
    """What the batch is; at the right what the keys would do now, as far as there is room."""
    words = [count(len(batch["runs"]), "server"), image_of(batch), *batch_time(batch, datetime.now(UTC)), *batch_rules(batch)]
    short, whole = " · ".join(words), " · ".join([*words, batch["id"]])
    if not has_keys:
        return whole
    f, u = "all" if view.failed_only else "failed", "fold" if view.unfolded else "unfold"
    every = f"f {f} · u {u} · p {_pause_verb(batch)} · ? keys"
    for told, keys in ((whole, every), (short, every), (whole, "? keys"), (short, "? keys")):  # the id is in the frame that stays
        if len(told) + 3 + len(keys) <= width:
            return told.ljust(width - len(keys)) + keys
    return short


def _pause_verb(batch: Json) -> str:
    return "resume" if batch["paused_at"] else "pause"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line each; a column that is empty in all of them takes no room, and a long list of names leaves some for what is said of them."""
    cut = [[_shorten(row[0]), *row[1:]] for row in rows]
    widths = [max(len(row[i]) for row in cut) for i in range(len(cut[0]))] if cut else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip() for row in cut]


def _shorten(names: str) -> str:
    return names if len(names) <= _NAMES_WIDTH else names[: _NAMES_WIDTH - 1] + "…"
