"""A slice of `make faults`: each fault of the wire at each kind of request to a BMC, and whole reinstalls with the faults that end quickly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fault_cells
import fault_driver
import pytest
from fault_rig import FaultRig, run_cells, start_fault_rig


def quiet(line: str) -> None: ...


def test_every_faulty_request_to_a_bmc_ends_in_time_and_is_never_a_false_success(capsys: Any) -> None:
    with fault_driver.start_benches() as benches:
        cells = fault_driver.choose_slice(fault_driver.list_cells(benches[0]))
        wrong = fault_driver.run_cells(benches, cells, quiet)
    with capsys.disabled():
        print(f"\nBMC faults: {len(cells)} cells, {len(cells) - len(wrong)} ended as the matrix says")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def rig() -> Iterator[FaultRig]:
    with start_fault_rig(8) as rig:
        yield rig


def test_a_reinstall_with_a_fault_at_the_wire_ends_as_the_matrix_says(rig: FaultRig, capsys: Any) -> None:
    cells = fault_cells.choose_slice(fault_cells.list_cells())
    wrong = run_cells(rig, cells, quiet)
    with capsys.disabled():
        print(f"\nfaults: {len(cells)} cells, {len(cells) - len(wrong)} ended as the matrix says")
    assert not wrong, "\n".join(wrong)
