"""The right to write, for some seconds more. Counted on CLOCK_BOOTTIME: it goes on through suspend, and nobody can set it."""

from __future__ import annotations

import threading
import time

RENEW_S = 3.0  # a few seconds: `agent-silent` is found by the lease, the pages show progress by this


def boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """Valid for `lease_s` from when it was asked for, not from when the answer came: so it never outlives the server's own count."""

    def __init__(self, asked_at: float, lease_s: float) -> None:
        self._lock = threading.Lock()
        self._until = asked_at + lease_s
        self._ended = False
        self.renew_s = min(RENEW_S, lease_s / 8)

    def extend(self, asked_at: float, lease_s: float) -> None:
        with self._lock:
            if boot_clock() >= self._until:  # somebody may act on our silence already
                self._ended = True
            self._until = max(self._until, asked_at + lease_s)

    def end(self) -> None:
        """For good; no later answer makes it valid again."""
        with self._lock:
            self._ended = True

    def is_valid(self) -> bool:
        with self._lock:
            return not self._ended and boot_clock() < self._until
