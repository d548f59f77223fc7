"""Open pages kept true: server-sent events, at most four paints a second, one reader of the store for all pages that show the same.

Each message has the frame's digest as its id, so a page that comes back (Last-Event-ID) is sent nothing if nothing changed, else all of it. Between
messages there is a beat: a page that hears none knows that what it shows is old.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool

from repave.pages.frame import Frame
from repave.store import Store

PAINT_S = 0.25
TICK_S = 1.0  # what moves by time alone
BEAT_S = 5.0
Version = tuple[Any, ...]


class Room:
    """All open pages that show one thing. It reads only while there is one."""

    def __init__(self, read_version: Callable[[], Version], paint: Callable[[], Frame]) -> None:
        self._read_version, self._paint = read_version, paint
        self.frame: Frame | None = None
        self.error: Exception | None = None
        self.pages = 0
        self._changed = asyncio.Condition()
        self._painter: asyncio.Task[None] | None = None

    def enter(self) -> None:
        self.pages += 1
        if self._painter is None:
            self._painter = asyncio.create_task(self._keep_painted())

    def leave(self) -> None:
        self.pages -= 1
        if self.pages == 0 and self._painter is not None:
            self._painter.cancel()
            self._painter = None

    async def next(self, shown: Frame | None) -> Frame:
        """The first frame that is not `shown`. Raises what a paint raised."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.error is not None or (self.frame is not None and self.frame is not shown))
        if self.error is not None:
            raise self.error
        assert self.frame is not None
        return self.frame

    async def _keep_painted(self) -> None:
        version, painted_at = None, 0.0
        try:
            while True:
                now, before = await run_in_threadpool(self._read_version), time.monotonic()
                if now != version or ((self.frame is None or self.frame.moving) and before - painted_at >= TICK_S):
                    frame = await run_in_threadpool(self._paint)
                    version, painted_at = now, before
                    if self.frame is None or frame.digest != self.frame.digest:
                        async with self._changed:
                            self.frame = frame
                            self._changed.notify_all()
                await asyncio.sleep(PAINT_S)
        except Exception as error:  # the pages are told by their streams' ends, and ask again
            async with self._changed:
                self.error = error
                self._changed.notify_all()


class Live:
    """The rooms."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rooms: dict[tuple[str, ...], Room] = {}

    async def stream(
        self, key: tuple[str, ...], project_id: str, paint: Callable[[], Frame], *, last_id: str, is_welcome: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[str]:
        """The messages for one page that shows the frame `last_id`, until it goes away or is not welcome any more (asked at each beat)."""
        room = self._rooms.get(key)
        if room is None or room.error is not None:
            room = self._rooms[key] = Room(lambda: self._read_version(project_id), paint)
        room.enter()
        try:
            shown: Frame | None = None
            asked_at = time.monotonic()
            yield f"retry: {round(TICK_S * 1000)}\n\n"
            while True:
                try:
                    frame = await asyncio.wait_for(room.next(shown), BEAT_S)
                    if shown is not None or frame.digest != last_id:
                        body = json.dumps(frame.changes(shown), ensure_ascii=False, separators=(",", ":"))
                        yield f"id: {frame.digest}\nevent: frame\ndata: {body}\n\n"
                    else:
                        yield "event: beat\ndata: 1\n\n"
                    shown = frame
                except TimeoutError:
                    yield "event: beat\ndata: 1\n\n"
                if time.monotonic() - asked_at >= BEAT_S:
                    asked_at = time.monotonic()
                    if not await is_welcome():
                        return
        finally:
            room.leave()
            if room.pages == 0 and self._rooms.get(key) is room:
                del self._rooms[key]

    def _read_version(self, project_id: str) -> Version:
        """Differs when something happened: an event, or a word from an agent."""
        return self._store.events.last_seq(project_id), self._store.runs.find_last_word(project_id)
