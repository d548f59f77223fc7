"""How often one credential may ask: a token bucket each, reads apart from changes, in memory of this process.

CloudDC publishes no rate (clouddc-api.md 5.4); the sibling BMS reinstall allows 50 a second a tenant. Ours are settings.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["read", "change"]
_MANY = 10_000  # buckets before full ones are forgotten: a few MB at most


@dataclass(frozen=True)
class Rate:
    """`burst` requests at once, refilled at `per_s`."""

    per_s: float
    burst: int


class Limiter:
    """One bucket a credential and kind; safe in threads. Changes have their own, never wider than that of reads."""

    def __init__(self, per_s: float = 50, burst: int = 200, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates: dict[Kind, Rate] = {"read": Rate(per_s, burst), "change": Rate(min(per_s, 10), min(burst, 50))}
        self._clock = clock
        self._buckets: dict[tuple[str, Kind], tuple[float, float]] = {}  # level, as of
        self._lock = threading.Lock()

    def take(self, credential_id: str, kind: Kind) -> int | None:
        """None: go ahead. Else the whole seconds after which one more will be allowed; a refused request costs nothing."""
        rate, now = self._rates[kind], self._clock()
        with self._lock:
            level, at = self._buckets.get((credential_id, kind), (float(rate.burst), now))
            level = min(rate.burst, level + (now - at) * rate.per_s)
            allowed = level >= 1
            self._buckets[credential_id, kind] = (level - 1 if allowed else level, now)
            if len(self._buckets) > _MANY:
                self._forget_full(now)
        return None if allowed else max(1, math.ceil((1 - level) / rate.per_s))

    def _forget_full(self, now: float) -> None:
        for key, (level, at) in list(self._buckets.items()):
            rate = self._rates[key[1]]
            if level + (now - at) * rate.per_s >= rate.burst:
                del self._buckets[key]
