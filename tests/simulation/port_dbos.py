"""`python port_dbos.py FOLDER LIFE`: the cases of port_cases.py on DBOS, as one life of a process. It ends by itself, the first time in the middle of all.

In each life somebody sets the host's clock a day ahead while the cases wait.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from port_cases import CASES, TOLD, TOLD_LATER

from repave.secrets import Sealer
from repave.steady_clock import SteadyClock
from repave.store import Store
from repave.workflow.engine import Engine
from repave.workflow.run import Run

DAY_S = 24 * 3600
read_clock = time.time


class Life:
    """All cases of this process. `settled`: those that came to their end, to their death, or wait."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number, self.settled, self._lock = number, set[str](), threading.Lock()
        self.file = folder / "log"

    def write(self, case: str, what: str) -> None:
        with self._lock, self.file.open("a") as f:
            f.write(json.dumps([case, self.number, read_clock(), what]) + "\n")

    def here(self, case: str) -> Any:
        def die() -> None:
            if self.number == 1:
                self.settled.add(case)
                threading.Event().wait()

        def count(what: str) -> int:
            return sum(json.loads(line)[::3] == [case, what] for line in self.file.read_text().splitlines())

        def is_waiting() -> None:
            if self.number == 1:
                self.settled.add(case)

        return SimpleNamespace(log=lambda what: self.write(case, what), count=count, die=die, is_waiting=is_waiting)


def set_clock() -> None:
    time.time = lambda: read_clock() + DAY_S


def main(folder: Path, number: int) -> None:
    url, life = f"sqlite:///{folder}/db", Life(folder, number)
    names = dict(zip((f"case-{n}" for n in range(len(CASES))), CASES, strict=True))

    async def workflow(run: Run, *_: object) -> str:
        case = names[run.run_id]
        result = await CASES[case](run, life.here(case))
        life.write(case, f"result {json.dumps(result)}")
        life.settled.add(case)
        return "done"

    store = Store.open(url, sealer=Sealer.open(folder / "key"), now=SteadyClock(lambda: time.time()))
    engine = Engine(store, url, folder / "lock", workflow=workflow)
    engine.start(None)  # type: ignore[arg-type]
    threading.Timer(1.0, set_clock).start()
    with store.write() as conn:
        if number == 1:
            engine.enqueue(conn, [SimpleNamespace(id=run_id) for run_id in names])  # type: ignore[misc]
        for run_id, case in names.items():
            for event, message in (TOLD if number == 1 else TOLD_LATER).get(case, ()):
                store.tell(conn, run_id, event, message)
    ended = {case for case, _, _, what in map(json.loads, life.file.read_text().splitlines()) if what.startswith("result")}  # in the life before
    until = time.monotonic() + 60
    while missing := set(CASES) - ended - life.settled:
        if time.monotonic() > until:
            print("not settled:", missing)
            os._exit(3)
        time.sleep(0.05)
    time.sleep(0.5)  # waits have begun
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
