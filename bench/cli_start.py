"""How long the command line takes to say something, beside an interpreter that does nothing: `python -c pass`, in the same rounds.

`--help` needs no service. `batch ls` asks one that answers at once, so that what is measured is ours: start, imports, one request, a table.
Goals: 6 times and 10 times `python -c pass`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench.scripted_batch import describe_machine

ROUNDS = 15
GOALS = {"--help": 6.0, "batch ls": 10.0}
_BATCH = {
    "id": "b1", "state": "succeeded", "image": "tiny", "created_at": "2026-11-24T14:00:00Z", "created_by": "me",
    "counts": {"running": 12, "working": 0, "waiting": 0, "failed": 0, "cancelled": 0},
}  # fmt: skip


def main(rounds: int = ROUNDS) -> None:
    seconds: dict[str, list[float]] = {"pass": [], **{name: [] for name in GOALS}}
    with answer_with({"items": [_BATCH] * 20, "next": None}) as url, tempfile.TemporaryDirectory() as compiled:
        env = _as_installed() | {"REPAVE_ENDPOINT": url, "REPAVE_TOKEN": "t", "PYTHONPYCACHEPREFIX": compiled}
        for number in range(rounds + 1):
            for name, taken in seconds.items():
                argv = ["-c", "pass"] if name == "pass" else ["-m", "repave.cli.main", *name.split()]
                began = time.perf_counter()
                subprocess.run([sys.executable, *argv], check=True, env=env, stdout=subprocess.DEVNULL)
                if number:  # the first round fills the caches
                    taken.append(time.perf_counter() - began)
    base = statistics.median(seconds["pass"])
    print(f"wall time, median of {rounds}; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}")
    print(f"  python -c pass   {1000 * base:6.0f} ms")
    for name, goal in GOALS.items():
        took = statistics.median(seconds[name])
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds["pass"], strict=True)]
        told = f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), goal {goal:.0f}"
        print(f"  repave {name:9} {1000 * took:6.0f} ms  {told}", flush=True)


def _as_installed() -> dict[str, str]:
    """The environment of whoever has Repave installed: what is imported was compiled before, also where this environment forbids to keep that."""
    return {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_") and k != "PYTHONDONTWRITEBYTECODE"}


@contextlib.contextmanager
def answer_with(value: object) -> Iterator[str]:
    """A service that has one answer."""
    body = json.dumps(value).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
