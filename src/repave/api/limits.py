"""How often one credential may ask: a token bucket each for reads, changes and lists, in memory of this process.

A list costs what many reads cost, so it has a fifth of their rate: a client that polls fifty instances is not slowed by one that lists.

CloudDC publishes no rate (clouddc-api.md 5.4); the sibling BMS reinstall allows 50 a second a tenant. Ours are settings.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Literal

Kind = Literal["read", "change", "list"]
_LIST_SHARE, _LIST_BURST_SHARE = 5, 2
_MANY = 10_000  # buckets before full ones are forgotten: a few MB at most


class Limiter:
    """One bucket a credential and kind: `burst` requests at once, refilled at `per_s`; for lists a part of both. Safe in threads."""

    def __init__(self, per_s: float = 50, burst: int = 200, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: dict[Kind, tuple[float, int]] = {"read": (per_s, burst), "change": (per_s, burst), "list": list_rate(per_s, burst)}
        self._buckets: dict[tuple[str, Kind], tuple[float, float]] = {}  # level, as of
        self._lock = threading.Lock()

    def take(self, credential_id: str, kind: Kind) -> int | None:
        """None: go ahead. Else the whole seconds after which one more will be allowed; a refused request costs nothing."""
        now, (per_s, burst) = self._clock(), self._rates[kind]
        with self._lock:
            level, at = self._buckets.get((credential_id, kind), (float(burst), now))
            level = min(burst, level + (now - at) * per_s)
            allowed = level >= 1
            self._buckets[credential_id, kind] = (level - 1 if allowed else level, now)
            if len(self._buckets) > _MANY:
                self._forget_full(now)
        return None if allowed else max(1, math.ceil((1 - level) / per_s))

    def _forget_full(self, now: float) -> None:
        for key, (level, at) in list(self._buckets.items()):
            per_s, burst = self._rates[key[1]]
            if level + (now - at) * per_s >= burst:
                del self._buckets[key]


def list_rate(per_s: float, burst: int) -> tuple[float, int]:
    """Lists a second, and at once."""
    return per_s / _LIST_SHARE, max(1, burst // _LIST_BURST_SHARE)
