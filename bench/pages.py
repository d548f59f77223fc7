"""Live pages beside a page that polls JSON: what 20 open pages of a batch of fifty cost server, wire and browser while every run moves four times a second.

The reference asks GET /repave/v1/batches/ID four times a second and draws the same rows anew from it: what a page without a stream does. Both are taken in
the same run, in turns. The server is a process of its own, on the browser tests' site; the readers of the 20 pages are threads here that count bytes, and
one page is a real browser, whose main thread is traced. Total size of all files, and the first paint of each page.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import requests
import sqlalchemy as sa

from bench.scripted_batch import describe_machine, percentile
from repave.store.tables import RUNS as RUNS_TABLE

PAGES = 20
SECONDS = 20.0
RUNS = 50
UPDATE_S = 0.25
STATIC = Path(__file__).parent.parent / "src/repave/pages/static"
_REFERENCE = """<!doctype html><meta charset="utf-8"><title>reference</title><h1></h1><ol id="rows"></ol><script>
const cell = (x) => String(x ?? "").replace(/[&<>]/g, (c) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[c]);
function draw(batch) {
  document.querySelector("h1").textContent = Object.entries(batch.counts).filter((c) => c[1]).map((c) => c.join(" ")).join(", ");
  document.getElementById("rows").innerHTML = batch.runs.map((run) => {
    let x = 0;
    const place = run.past_the_line ? "past the line" : "before the line";
    const bars = Object.entries(run.durations_s).map(([step, s]) => {
      const bar = `<rect x="${x / 4}%" width="${s / 4}%" y="5" height="10"><title>${cell(step)} ${s}</title></rect>`;
      x += s;
      return bar;
    });
    const text = `${run.step_index}/${run.steps} ${cell(run.step)} ${cell(run.percent)} % ${cell(run.rate_bytes_per_s)} ${place}`;
    return `<li><a href="/s/${cell(run.server)}">${cell(run.server)}</a> <svg width="60%" height="20">${bars.join("")}</svg> ${text}</li>`;
  }).join("");
}
setInterval(async () => draw(await (await fetch("/repave/v1/batches/BATCH", {headers: {"X-Auth-Token": "TOKEN"}})).json()), 250);
</script>"""


def main(rounds: int = 3) -> None:
    """Prints the figures. 3 minutes on 2 cores."""
    folder = Path(tempfile.mkdtemp(prefix="rpp-", dir="/tmp"))
    try:
        print(f"pages; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}; load {os.getloadavg()[0]:.1f}\n", flush=True)
        with start_server(folder) as server:
            show_files()
            show_first_paints(server)
            compare(server, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- the server ----


def _import_scene() -> Any:
    tests = Path(__file__).parent.parent / "tests"
    sys.path[:0] = [str(tests / "browser"), str(tests / "contract")]
    import operator_site
    import scene

    return operator_site, scene


def _serve(folder: Path, pipe: Connection) -> None:
    """A site with a batch of fifty, every run of which moves four times a second."""
    operator_site, scene = _import_scene()
    clock = scene.Clock()
    with operator_site.start_site(folder, now=clock) as site:
        scene.add_person(site, "ann")
        scene.add_image(site, "tiny")
        names = [f"web{n:02}" for n in range(1, RUNS + 1)]
        scene.add_rack(site, "r1", names, model="R650", image="tiny")
        batch = scene.begin(site, names, image="tiny")
        scene.play(site, clock, batch, {n: scene.Script([4, 12, 6, 130, 20]) for n in names}, seconds=180)
        runs = [r["id"] for r in site.ask("GET", f"/batches/{batch}").json()["runs"]]
        pipe.send((os.getpid(), site.url, batch, site.tokens["viewer"]))
        done = 0
        while not pipe.poll(UPDATE_S):
            done += 1
            clock.add(UPDATE_S)
            with site.store.write() as conn:  # one transaction for all: what fifty agents cost is not asked here
                for number, run in enumerate(runs):
                    progress = {"stage": "write", "bytes_done": done * 1_000_000 + number * 17_000, "bytes_total": 1_000_000_000}
                    conn.execute(sa.update(RUNS_TABLE).where(RUNS_TABLE.c.id == run).values(progress=progress, seen_at=clock()))


class Server:
    def __init__(self, pid: int, url: str, batch: str, token: str) -> None:
        self.pid, self.url, self.batch, self.token = pid, url, batch, token

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def start_server(folder: Path) -> Iterator[Server]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder / "site", theirs))
    process.start()
    try:
        yield Server(*ours.recv())
    finally:
        ours.send("over")
        process.join(30)


# ---- what is measured ----


def show_files() -> None:
    files = [path.read_bytes() for path in sorted(STATIC.iterdir())]
    packed = sum(len(gzip.compress(file)) for file in files)
    print(f"all files of the pages: {sum(map(len, files)):,} bytes in {len(files)} files ({packed:,} if they were packed)\n", flush=True)


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


def log_in(server: Server, page: Any) -> None:
    _, scene = _import_scene()
    page.goto(f"{server.url}/login")
    page.fill("[name=name]", "ann")
    page.fill("[name=password]", scene.PERSON_PASSWORD)
    page.click("button.main")
    page.wait_for_selector("#counts")


def show_first_paints(server: Server) -> None:
    print("| page | bytes | first paint, median of 5 |\n|---|---|---|")
    with open_browser() as browser:
        page = browser.new_context(viewport={"width": 1366, "height": 768}).new_page()
        log_in(server, page)
        paths = {
            "fleet of 50": "/",
            "batch, folded": f"/b/{server.batch}",
            "batch, 50 rows": f"/b/{server.batch}?unfold=1",
            "server": "/s/web07",
            "audit": "/events",
        }
        for name, path in paths.items():
            paints, size = [], 0
            for _ in range(5):
                answer = page.goto(server.url + path)
                size = len(answer.body())
                page.wait_for_timeout(300)
                paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            print(f"| {name} | {size:,} | {statistics.median(paints):.0f} ms |", flush=True)
    print()


def compare(server: Server, rounds: int) -> None:
    """Each in turns: 20 readers first, then one browser page, traced."""
    wire: dict[str, list[tuple[float, float, float]]] = {"live": [], "polling": []}
    blocked: dict[str, list[float]] = {"live": [], "polling": []}
    for _ in range(rounds):
        for name, read in (("live", _follow), ("polling", _poll)):
            wire[name].append(_measure_readers(server, read))
        for name in blocked:
            blocked[name] += _trace(server, name)
    print(f"{PAGES} pages open, {RUNS} runs, each moving {1 / UPDATE_S:.0f} times a second, {rounds} x {SECONDS:.0f} s\n")
    print("| | live page | page that polls JSON | ratio |\n|---|---|---|---|")
    cpu, size, rate = ({name: statistics.median(r[at] for r in of) for name, of in wire.items()} for at in range(3))
    busy = {name: percentile(of, 95) for name, of in blocked.items()}
    middle = {name: statistics.median(of) for name, of in blocked.items()}
    for what, values, unit in (
        ("updates a second that came", rate, "{:.1f}"), ("server CPU, % of a core", cpu, "{:.0f} %"), ("MB a minute and page", size, "{:.2f}"), 
        ("main thread an update, p95", busy, "{:.1f} ms"),
        ("the same, median", middle, "{:.1f} ms"),
    ):  # fmt: skip
        cells = [unit.format(values[name]) for name in ("live", "polling")]
        print(f"| {what} | {cells[0]} | {cells[1]} | {values['polling'] / values['live']:.1f} x |")


def _session(server: Server) -> requests.Session:
    _, scene = _import_scene()
    from person import Person

    person = Person(server.url)
    assert person.log_in(password=scene.PERSON_PASSWORD).status_code == 303
    return person.session


def _follow(server: Server, over: threading.Event, count: list[tuple[int, int]], session: requests.Session) -> None:
    with session.get(f"{server.url}/live/b/{server.batch}?unfold=1", stream=True, timeout=30) as answer:
        for piece in answer.iter_content(None):
            count.append((len(piece), piece.count(b"event: frame")))
            if over.is_set():
                return


def _poll(server: Server, over: threading.Event, count: list[tuple[int, int]], session: requests.Session) -> None:
    while not over.wait(UPDATE_S):
        size = len(session.get(f"{server.url}/repave/v1/batches/{server.batch}", headers={"X-Auth-Token": server.token}, timeout=30).content)
        count.append((size, 1))


def _measure_readers(server: Server, read: Any) -> tuple[float, float, float]:
    """Percent of a core that the server takes for all pages; MB a minute and updates a second of one page. What the moving itself costs is taken off."""
    session = _session(server)
    before = server.cpu_s()
    time.sleep(5)
    idle = (server.cpu_s() - before) / 5
    over, counts = threading.Event(), [list[tuple[int, int]]() for _ in range(PAGES)]
    threads = [threading.Thread(target=read, args=(server, over, count, _clone(session))) for count in counts]
    for thread in threads:
        thread.start()
    time.sleep(2)
    start, seen, came = server.cpu_s(), *_sums(counts)
    time.sleep(SECONDS)
    cpu, size, updates = (server.cpu_s() - start) / SECONDS - idle, *_sums(counts)
    over.set()
    for thread in threads:
        thread.join()
    return 100 * cpu, (size - seen) / PAGES / SECONDS * 60 / 1e6, (updates - came) / PAGES / SECONDS


def _sums(counts: list[list[tuple[int, int]]]) -> tuple[int, int]:
    """Bytes and updates of all pages so far."""
    pairs = [pair for count in counts for pair in list(count)]
    return sum(size for size, _ in pairs), sum(updates for _, updates in pairs)


def _clone(session: requests.Session) -> requests.Session:
    own = requests.Session()
    own.trust_env = False
    own.cookies.update(session.cookies)
    return own


def _trace(server: Server, name: str) -> list[float]:
    """Milliseconds of CPU that the main thread took in each quarter of a second in which it took more than one."""
    with open_browser() as browser:
        page = browser.new_context(viewport={"width": 1366, "height": 768}).new_page()
        log_in(server, page)
        if name == "polling":
            body = _REFERENCE.replace("BATCH", server.batch).replace("TOKEN", server.token)
            page.route("**/reference", lambda route: route.fulfill(content_type="text/html", body=body))
        page.goto(f"{server.url}/b/{server.batch}?unfold=1" if name == "live" else f"{server.url}/reference")
        page.wait_for_timeout(2000)
        browser.start_tracing(page=page, categories=["toplevel", "disabled-by-default-devtools.timeline", "__metadata"])
        page.wait_for_timeout(SECONDS * 1000)
        events = json.loads(browser.stop_tracing())["traceEvents"]
    mains = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and e["args"].get("name") == "CrRendererMain"}
    tasks = [e for e in events if e.get("name") in ("RunTask", "ThreadControllerImpl::RunTask") and e.get("ph") == "X" and (e["pid"], e["tid"]) in mains]
    busiest = max(mains, key=lambda main: sum(e["dur"] for e in tasks if (e["pid"], e["tid"]) == main))  # the page's, not an empty one's
    windows: dict[int, float] = {}
    for event in tasks:
        if (event["pid"], event["tid"]) == busiest:
            window = int(event["ts"] / (UPDATE_S * 1e6))
            windows[window] = windows.get(window, 0.0) + event.get("tdur", event["dur"]) / 1000
    return [busy for busy in windows.values() if busy > 1]
