"""The service's time, which nobody can set while runs are under way: deadlines are minutes to hours, and a clock that jumps by a day would end every run.

It is the wall's time as it was, plus the seconds since then on CLOCK_BOOTTIME. Corrections of some seconds (NTP) are followed at once, a
jump is kept out until no run is under way. Logins and signatures are judged by the wall's own time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

FOLLOWED_S = 5.0  # ntpd steps by 0.128 s and more, and slews what is less; a minute's deadline may bear this much
log = structlog.get_logger()


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SteadyClock:
    """Call it for the time. Threads may share it."""

    def __init__(self, wall: Callable[[], float] = time.time, elapsed: Callable[[], float] = _boot_clock) -> None:
        self._wall, self._elapsed = wall, elapsed
        self._lock = threading.Lock()
        self._offset = wall() - elapsed()
        self._said = False

    def __call__(self) -> datetime:
        with self._lock:
            elapsed = self._elapsed()
            jump_s = self._wall() - elapsed - self._offset
            if abs(jump_s) <= FOLLOWED_S:
                self._offset, self._said = self._offset + jump_s, False
            elif not self._said:
                log.error("the host's clock was set; runs under way keep their time", jump_s=round(jump_s))
                self._said = True
            return datetime.fromtimestamp(self._offset + elapsed, UTC)

    def follow(self) -> None:
        """No run is under way: the wall's time from now on."""
        with self._lock:
            self._offset = self._wall() - self._elapsed()
