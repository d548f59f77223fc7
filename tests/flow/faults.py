"""`make faults`: every cell, of the driver's requests and of whole reinstalls. The last line says what was counted."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import fault_cells
import fault_driver
import pytest
from fault_rig import run_cells, start_fault_rig
from fault_scenes import SCENES

from repave.lab.processes import end_on_sigterm

MACHINES = 24  # most of the time most of them wait


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--only", default="", help="cells whose name has this text, as it is printed")
    only = parser.parse_args().only
    count, wrong = 0, []
    cells = [cell for cell in fault_cells.list_cells() if only in str(cell)]
    scenes = [scene for scene in SCENES if only in scene.__name__]
    with start_fault_rig(MACHINES) as rig:
        wrong += run_cells(rig, cells, make_say(len(cells)))
        say = make_say(len(scenes))
        for scene in scenes:
            try:
                scene(rig)
                say(f"{scene.__name__}: ended well")
            except (AssertionError, pytest.fail.Exception) as error:
                wrong.append(f"{scene.__name__}: {error}")
                say(f"WRONG: {wrong[-1]}")
    count += len(cells) + len(scenes)
    with fault_driver.start_benches() as benches:
        requests = [cell for cell in fault_driver.list_cells(benches[0]) if only in str(cell)]
        wrong += fault_driver.run_cells(benches, requests, make_say(len(requests)))
        count += len(requests)
    for line in wrong:
        print(f"WRONG  {line}")
    print(f"faults: {count} cells, {count - len(wrong)} ended as the matrix says")
    return 1 if wrong else 0


def make_say(of: int) -> Callable[[str], None]:
    done, started = iter(range(1, of + 1)), time.monotonic()
    return lambda text: print(f"{time.monotonic() - started:7.1f} s {next(done):>4}/{of}  {text}", flush=True)


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
