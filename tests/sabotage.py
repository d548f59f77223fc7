"""`make sabotage`: every planted bug, of the simulator and of the real product, must be found by the observer it is meant for."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

LISTS = ("simulation/planted_bugs.py", "outside/planted.py")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="append", choices=LISTS)
    parser.add_argument("--only", default="", help="bugs whose name has this in it")
    args = parser.parse_args()
    here, planted = Path(__file__).parent, []
    for name in args.list or LISTS:
        module = _load(here / name)
        planted += [(module.plant, bug) for bug in module.BUGS if args.only in bug.says]
    hits = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for (_, bug), (was_found, said) in zip(planted, pool.map(lambda p: p[0](p[1]), planted), strict=True):
            hits += was_found
            print(f"{'found' if was_found else 'MISSED':8}{bug.says}: {said.strip()[: 200 if was_found else 2000]}", flush=True)
    print(f"sabotage: {len(planted)} planted, {hits} found")
    sys.exit(hits != len(planted))


if __name__ == "__main__":
    main()
