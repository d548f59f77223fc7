"""A watcher and a service that goes away and comes back: the far end is a few lines of HTTP that answer with one batch."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

RUN = {
    "id": "r1", "server": "web01", "state": "working", "step": "write-image", "step_index": 5, "steps": 8, "past_the_line": True, "percent": 40,
    "rate_bytes_per_s": 2e8, "error": None, "os_now": "tiny", "durations_s": {"write-image": 3.0}, "created_at": "2026-11-24T14:00:00Z", "ended_at": None,
    "late": False, "usual_s": None, "eta_s": None, "waits_for": None, "rehearsal": None,
}  # fmt: skip
COUNTS = {"running": 0, "working": 1, "waiting": 0, "failed": 0, "cancelled": 0}
SINCE = {"created_at": "2026-11-24T14:00:00Z", "paused_at": None, "stopped": None, "rehearse": False}
WORKING = {"id": "b1", "state": "working", "image": "tiny", "counts": COUNTS, "ended_at": None, "runs": [RUN]} | SINCE
ENDED_AT = "2026-11-24T14:01:05Z"
ENDED = WORKING | {"state": "succeeded", "ended_at": ENDED_AT, "runs": [RUN | {"state": "running", "step": "proof", "step_index": 8, "ended_at": ENDED_AT}]}


@contextlib.contextmanager
def start_service(batch: dict[str, object], port: int = 0) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(batch).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_watcher_says_that_it_is_not_live_and_goes_on_when_the_service_is_back(tmp_path: Path) -> None:
    with start_service(WORKING) as port:
        env = {**os.environ, "REPAVE_ENDPOINT": f"http://127.0.0.1:{port}", "REPAVE_TOKEN": "t"}
        argv = [sys.executable, "-m", "repave.cli.main", "watch", "b1"]
        watcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
        assert watcher.stdout is not None and watcher.stderr is not None
        first = watcher.stdout.readline()
    try:
        assert "web01 working 5/8 write-image past-the-line" in first
        assert "Not live since" in watcher.stderr.readline()
        with start_service(ENDED, port):
            out, err = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert watcher.returncode == 0
    assert "The service is back." in err
    assert "web01 running 1:05" in out and "✓ web01  runs tiny after 1:05" in out
