"""A slice of `make sabotage`: bugs planted in a copy of the product, found by the observers on a real service and rack."""

from __future__ import annotations

import planted
import pytest
from planting import plant

SLICE = ("the agent's token is logged", "a file stays open for each look at a BMC")


@pytest.mark.parametrize("name", SLICE)
def test_a_planted_bug_is_found(name: str) -> None:
    found, said = plant(next(bug for bug in planted.BUGS if bug.says == name))
    assert found, said
