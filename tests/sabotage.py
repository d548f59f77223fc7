"""`make sabotage`: every planted bug, of the simulator and of the real product, must be found by the observer it is meant for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repave.lab.processes import end_on_sigterm

LISTS = {"simulator": "planted_bugs", "racks": "planted"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="append", choices=LISTS)
    parser.add_argument("--only", default="", help="bugs whose name has this in it")
    args = parser.parse_args()
    here = Path(__file__).parent
    sys.path[1:1] = [str(here / "outside"), str(here / "simulation")]
    plant = importlib.import_module("planting").plant
    lists = [importlib.import_module(LISTS[name]).BUGS for name in args.list or LISTS]
    bugs = [bug for bugs in lists for bug in bugs if args.only in bug.says]
    hits = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for bug, (was_found, said) in zip(bugs, pool.map(plant, bugs), strict=True):
            hits += was_found
            print(f"{'found' if was_found else 'MISSED':8}{bug.says}: {said.strip()[: 200 if was_found else 2000]}", flush=True)
    print(f"sabotage: {len(bugs)} planted, {hits} found")
    sys.exit(hits != len(bugs))


if __name__ == "__main__":
    end_on_sigterm()
    main()
