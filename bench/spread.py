"""1 to 48 agents fetch the same image over links that are shaped: from the origin alone, and through one cache a rack of 12. Draws docs/spread.svg.

Each agent is a process in a network namespace with a link of its own, and fetches with the agent's own code (four threads; nothing is written). All
of it is on one machine, so the links are slow enough for its cores. Needs root.

    origin ══ 240 Mbit/s ══ core ── rack 1..4 (nginx as in docs/nginx/cache.conf) ══ 48 Mbit/s each ══ agents 1..12
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bench.plot import Series, render_plot
from bench.scripted_batch import describe_machine
from bench.serving import CHUNK_BYTES, KEY, write_chunks
from repave.ca import make_ca, make_certificate
from repave.images.chunk_token import render_chunk_token
from repave.lab.nginx import start_nginx

RACKS, AGENTS_A_RACK = 4, 12
ORIGIN_MBIT, AGENT_MBIT = 240, 48
IMAGE_CHUNKS = 50
ORIGIN = "10.77.0.1"
AT_ONCE = (1, 3, 12, 24, 48)
NS = "rpspread"
PLOT = Path(__file__).parents[1] / "docs/spread.svg"


def main(agents: int = RACKS * AGENTS_A_RACK) -> None:
    """Prints one table. 7 minutes on 2 cores. `agents`: at most."""
    folder = Path(tempfile.mkdtemp(prefix="rps-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with contextlib.ExitStack() as stack:
            measure(folder, agents, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, agents: int, stack: contextlib.ExitStack) -> None:
    images = folder / "images"
    paths = write_chunks(images)[:IMAGE_CHUNKS]
    (folder / "names").write_text("\n".join(path.rpartition("/")[2] for path in paths))
    make_ca(folder)
    certificate = make_certificate(folder, [ORIGIN, "localhost"], folder / "server.pem")
    (folder / "chunks.key").write_bytes(KEY)
    stack.enter_context(namespaces())
    command = [
        sys.executable, "-m", "repave.cli.main", "serve-chunks", str(images), "--key", str(folder / "chunks.key"), "--certificate", str(certificate),
        "--listen", f"{ORIGIN}:8473",
    ]  # fmt: skip
    origin = subprocess.Popen([*inside("origin"), *command], stderr=subprocess.DEVNULL)
    stack.callback(origin.wait)
    stack.callback(origin.kill)
    found: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}
    everybody = [(rack, number) for number in range(AGENTS_A_RACK) for rack in range(RACKS)][:agents]
    time.sleep(3)
    links = f"an image of {IMAGE_CHUNKS * CHUNK_BYTES / 1e6:.0f} MB; origin {ORIGIN_MBIT} Mbit/s, agents {AGENT_MBIT} each"
    print(f"{links}; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n", flush=True)
    for number, with_caches in itertools.product(sorted({min(n, len(everybody)) for n in AT_ONCE}), found):
        who = everybody[:number]
        with contextlib.ExitStack() as caches:
            if with_caches:
                for rack in range(RACKS):
                    caches.enter_context(start_cache(folder / f"empty-{number}", folder, rack))
            before = read_sent_bytes()
            took = fetch_all(folder, who, with_caches)
            sent = read_sent_bytes() - before
        found[with_caches][number] = took
        title = f"{number} agents, {f'a cache for each {AGENTS_A_RACK}' if with_caches else 'no caches'}"
        print(f"  {title:<36} {statistics.median(took):5.1f} s, the last {max(took):5.1f} s; {sent / 1e6:5.0f} MB out of the origin", flush=True)
    names = {True: f"one cache a rack of {AGENTS_A_RACK}", False: "no caches"}
    lines = [Series(name, [(n, max(took)) for n, took in found[with_caches].items()]) for with_caches, name in names.items()]
    note = f"{links}; {describe_machine()}; {datetime.now():%Y-%m-%d}"
    PLOT.write_text(render_plot("One image to so many agents at once", "agents", "seconds until the last has it", lines, note=note))


def start_cache(empty: Path, folder: Path, rack: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    changes = {"10.9.7.2:8475": f"{cache_address(rack)}:8475", "10.9.0.5:8473": f"{ORIGIN}:8473", "/etc/repave/ca.pem": str(folder / "ca.pem")}
    return start_nginx(empty / f"cache-{rack}", "cache.conf", changes, port=8475, before=inside(f"rack{rack}"))


def fetch_all(folder: Path, who: Sequence[tuple[int, int]], with_caches: bool) -> list[float]:
    """Seconds that each agent took, all begun at once."""
    starts_at = time.time() + 4 + len(who) / 3  # until then Python has started in each
    processes = []
    for rack, number in who:
        urls = [f"http://{cache_address(rack)}:8475/chunks"] * with_caches + [f"https://{ORIGIN}:8473/chunks"]
        token = render_chunk_token(KEY, f"run-{rack}-{number}", datetime.now(UTC) + timedelta(hours=1))
        command = [sys.executable, "-m", "bench.spread_agent", str(folder), str(starts_at), token, *urls]
        processes.append(subprocess.Popen([*inside(f"agent{rack}-{number}"), *command], stdout=subprocess.PIPE))
    return [float(process.communicate(timeout=600)[0]) for process in processes]


# ---- namespaces ----


def cache_address(rack: int) -> str:
    return f"10.77.{rack + 1}.1"


def inside(name: str) -> list[str]:
    return ["ip", "netns", "exec", f"{NS}-{name}"]


def read_sent_bytes() -> int:
    path = "/sys/class/net/uplink/statistics/tx_bytes"
    return int(subprocess.run([*inside("origin"), "cat", path], capture_output=True, check=True).stdout)


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    """One for the origin, the core, each rack and each agent, and the links between them."""
    racks, agents = range(RACKS), list(itertools.product(range(RACKS), range(AGENTS_A_RACK)))
    names = ["core", "origin", *(f"rack{r}" for r in racks), *(f"agent{r}-{n}" for r, n in agents)]
    try:
        for name in names:
            _ip("netns", "add", f"{NS}-{name}")
            _ip("-n", f"{NS}-{name}", "link", "set", "lo", "up")
        for name in ("core", *(f"rack{r}" for r in racks)):
            _ip("-n", f"{NS}-{name}", "link", "add", "bridge0", "type", "bridge")
            _ip("-n", f"{NS}-{name}", "link", "set", "bridge0", "up")
        _link("origin", "uplink", f"{ORIGIN}/16", "core", "origin")
        _shape("origin", "uplink", ORIGIN_MBIT)
        for r in racks:
            _link(f"rack{r}", "uplink", "", "core", f"rack{r}")
            _ip("-n", f"{NS}-rack{r}", "link", "set", "uplink", "master", "bridge0")
            _ip("-n", f"{NS}-rack{r}", "address", "add", f"{cache_address(r)}/16", "dev", "bridge0")
        for r, n in agents:
            _link(f"agent{r}-{n}", "uplink", f"10.77.{r + 1}.{n + 10}/16", f"rack{r}", f"a{n}")
            _shape(f"rack{r}", f"a{n}", AGENT_MBIT)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", f"{NS}-{name}"], capture_output=True, check=False)


def _link(name: str, device: str, address: str, bridge_name: str, port: str) -> None:
    _ip("-n", f"{NS}-{name}", "link", "add", device, "type", "veth", "peer", "name", port, "netns", f"{NS}-{bridge_name}")
    _ip("-n", f"{NS}-{bridge_name}", "link", "set", port, "master", "bridge0", "up")
    if address:
        _ip("-n", f"{NS}-{name}", "address", "add", address, "dev", device)
    _ip("-n", f"{NS}-{name}", "link", "set", device, "up")


def _shape(name: str, device: str, mbit: int) -> None:
    command = ["tc", "-n", f"{NS}-{name}", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
    subprocess.run(command, check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
