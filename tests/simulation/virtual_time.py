"""Virtual time: a heap of wake-ups, and tasks that are stepped by hand. No threads, no real sleep; one seed, one order of events.

A task is a greenlet, so that the product's blocking code (effects, the store, routes) may stop in the middle of a call, as it does in a thread.
A life is a process, or a machine's time of being on: when it ends its tasks are never stepped again, wherever they stand. No `finally` runs,
as after SIGKILL. They are kept until `close`, so that nothing of them is unwound while the world still turns.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet


class Life:
    """What tasks live in. `ended` is final; until `stopped_until` none of them goes on, as after SIGSTOP."""

    def __init__(self, name: str) -> None:
        self.name, self.ended, self.stopped_until = name, False, 0.0


class Task:
    """One line of execution. `token` tells a wake-up that is due from one that came too late."""

    __slots__ = ("about", "greenlet", "life", "name", "token")

    def __init__(self, name: str, life: Life | None, about: str) -> None:
        self.name, self.life, self.about, self.token = name, life, about, 0
        self.greenlet: Any = None


class Signal:
    """Something to wait for."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: list[tuple[Task, int]] = []


class Stuck(Exception):
    """The world turned longer than any run may last."""


class VirtualTime:
    """The clock and all that waits for it."""

    def __init__(self, seed: int) -> None:
        self.now, self.events = 0.0, 0
        self.rng = random.Random(seed)
        self.lines: list[str] | None = None  # kept where somebody will read them
        self._heap: list[tuple[float, int, Task, int]] = []
        self._count = 0
        self._hub = getcurrent()
        self._tasks: list[Task] = []
        self._current: Task | None = None
        self._closed = False
        self._hash = hashlib.blake2b(digest_size=16)
        self.atomic = False  # while True nobody yields: for looking at the world without letting it move

    def note(self, text: str) -> None:
        """An event of the world; the hash of all of them is the run's fingerprint."""
        self.events += 1
        line = f"{self.now:.3f} {text}"
        self._hash.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    def spawn(self, name: str, code: Callable[[], object], *, life: Life | None = None, after: float = 0.0, about: str = "") -> Task:
        """`code` runs as a task of `life`, `after` seconds from now. `about`: the run it works for."""
        task = Task(name, life, about)
        task.greenlet = greenlet(code, self._hub)
        self._tasks.append(task)
        self._wake_at(self.now + after, task)
        return task

    def sleep(self, seconds: float) -> None:
        if self.atomic or self._closed or getcurrent() is self._hub:
            return self._leave_if_closed()
        task = self._here()
        self._wake_at(self.now + seconds, task)
        self._hub.switch()
        return self._leave_if_closed()

    def wait(self, signal: Signal, until: float) -> None:
        """Until the signal is given, or the time `until`; the caller looks which."""
        task = self._here()
        self._wake_at(until, task)
        signal.waiting.append((task, task.token))
        self._hub.switch()
        self._leave_if_closed()

    def give(self, signal: Signal) -> None:
        """All who wait for it go on, in the order in which they came."""
        for task, token in signal.waiting:
            if token == task.token:
                self._count += 1
                heapq.heappush(self._heap, (self.now, self._count, task, token))
        signal.waiting.clear()

    def leave(self) -> None:
        """The running task never goes on: its life has ended."""
        if self._here().life is not None:
            self._hub.switch()
        self._leave_if_closed()

    @property
    def life(self) -> Life | None:
        """The running task's."""
        return self._current.life if self._current is not None else None

    @property
    def about(self) -> str:
        """The run that the running task works for."""
        return self._current.about if self._current is not None else ""

    def run(self, done: Callable[[], bool], *, until: float) -> None:
        """The world turns until `done()` (asked after each event). Raises Stuck after `until`."""
        while self._heap and not done():
            at, _, task, token = heapq.heappop(self._heap)
            if token != task.token or task.greenlet.dead or (task.life is not None and task.life.ended):
                continue
            if task.life is not None and task.life.stopped_until > at:
                self._count += 1
                heapq.heappush(self._heap, (task.life.stopped_until, self._count, task, token))
                continue
            if at > until:
                raise Stuck(f"at {self.now:.0f} s: next is {task.name}")
            self.now = max(self.now, at)
            task.token += 1
            self._current = task
            task.greenlet.switch()
            self._current = None

    def close(self) -> None:
        """Nothing of this world is left to run. What tasks leave behind (`finally`, `with`) is done now, and reaches nothing."""
        self._closed = True
        for task in self._tasks:
            if task.greenlet and not task.greenlet.dead:
                try:
                    task.greenlet.throw(GreenletExit)
                except BaseException:  # whatever a dead process's last words are
                    continue
        self._tasks.clear()
        self._heap.clear()

    def _here(self) -> Task:
        assert self._current is not None
        return self._current

    def _wake_at(self, at: float, task: Task) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, task, task.token))

    def _leave_if_closed(self) -> None:
        if self._closed:
            raise GreenletExit
