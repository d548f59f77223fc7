"""The service's clock against one that is set."""

from __future__ import annotations

import pytest

from repave.steady_clock import SteadyClock

DAY_S = 24 * 3600.0


class Host:
    wall, elapsed = 1_800_000_000.0, 100.0

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_clock_that_is_set_by_a_day_moves_no_deadline_until_nothing_is_under_way(jump_s: float) -> None:
    host = Host()
    now = SteadyClock(lambda: host.wall, lambda: host.elapsed)
    began = now()
    host.pass_s(60)
    host.wall += jump_s
    assert (now() - began).total_seconds() == 60
    host.pass_s(60)
    assert (now() - began).total_seconds() == 120
    now.follow()
    assert now().timestamp() == host.wall


def test_a_correction_of_some_seconds_is_followed() -> None:
    host = Host()
    now = SteadyClock(lambda: host.wall, lambda: host.elapsed)
    for _ in range(100):
        host.pass_s(10)
        host.wall += 1
        assert now().timestamp() == host.wall
