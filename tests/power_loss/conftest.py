"""One tally for the slice of the power-loss lane that `make test` runs; the last line says what was counted."""

from __future__ import annotations

import pytest
from lane import Tally

_TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    return request.config.stash.setdefault(_TALLY, Tally())


def pytest_unconfigure(config: pytest.Config) -> None:
    tally = config.stash.get(_TALLY, None)
    if tally is not None:
        print(tally.line())
