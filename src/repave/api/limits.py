"""How often one credential may ask: a token bucket each, reads apart from changes, in memory of this process.

CloudDC publishes no rate (clouddc-api.md 5.4); the sibling BMS reinstall allows 50 a second a tenant. Ours are settings.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Literal

Kind = Literal["read", "change"]
_MANY = 10_000  # buckets before full ones are forgotten: a few MB at most


class Limiter:
    """One bucket a credential and kind: `burst` requests at once, refilled at `per_s`. Safe in threads."""

    def __init__(self, per_s: float = 50, burst: int = 200, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: dict[tuple[str, Kind], tuple[float, float]] = {}  # level, as of
        self._lock = threading.Lock()

    def take(self, credential_id: str, kind: Kind) -> int | None:
        """None: go ahead. Else the whole seconds after which one more will be allowed; a refused request costs nothing."""
        now = self._clock()
        with self._lock:
            level, at = self._buckets.get((credential_id, kind), (float(self._burst), now))
            level = min(self._burst, level + (now - at) * self._per_s)
            allowed = level >= 1
            self._buckets[credential_id, kind] = (level - 1 if allowed else level, now)
            if len(self._buckets) > _MANY:
                self._forget_full(now)
        return None if allowed else max(1, math.ceil((1 - level) / self._per_s))

    def _forget_full(self, now: float) -> None:
        for key, (level, at) in list(self._buckets.items()):
            if level + (now - at) * self._per_s >= self._burst:
                del self._buckets[key]
