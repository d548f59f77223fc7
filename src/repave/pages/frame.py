"""What a page shows now: its parts, each one element with its id, and lists of rows in order. The page is made of it, the stream sends what changed.

A row may have parts of its own, for what changes all the time in it: then they are sent and not the row. Fifty moving rows are 11 kB a paint so, a fifth
of the page.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

Json = dict[str, Any]


@dataclass
class Frame:
    """`moving`: something in it changes by time alone. `fixed`: what the page's own template needs and the stream does not send."""

    title: str
    parts: dict[str, Markup] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    inner: dict[str, dict[str, Markup]] = field(default_factory=dict)
    moving: bool = False
    fixed: Json = field(default_factory=dict)

    def put(self, part: str, html: Markup) -> None:
        """`html` is one element whose id is `part`."""
        self.parts[part] = html

    def add(self, to: str, part: str, html: Markup, inner: dict[str, Markup] | None = None) -> None:
        """The next row of a list. `inner`: elements that are in it, by their ids."""
        self.parts[part] = html
        self.inner[part] = inner or {}
        self.lists.setdefault(to, []).append(part)

    def rows(self, of: str) -> Markup:
        return Markup("\n").join(self.parts[part] for part in self.lists.get(of, []))

    def _around(self, part: str) -> str:
        """The row without its own parts."""
        text = str(self.parts.get(part, ""))
        for html in self.inner.get(part, {}).values():
            text = text.replace(html, "")
        return text

    @functools.cached_property
    def digest(self) -> str:
        """Equal for equal content, in every process: a page that reconnects with it needs nothing."""
        whole = repr((list(self.parts.items()), self.lists))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def changes(self, since: Frame | None) -> Json:
        """What a page that shows `since` must change; None: it may show anything."""
        if since is None:
            return {"parts": self.parts, "lists": self.lists}
        parts: dict[str, Markup] = {}
        for part, html in self.parts.items():
            if since.parts.get(part) == html:
                continue
            before, inner = since.inner.get(part, {}), self.inner.get(part, {})
            if inner and self._around(part) == since._around(part):
                parts |= {name: its for name, its in inner.items() if before.get(name) != its}
            else:
                parts[part] = html
        return {"parts": parts, "lists": {name: rows for name, rows in self.lists.items() if since.lists.get(name) != rows}}
