"""Serving chunks: what a GB costs the chunk server beside nginx with the same files, and whether the API's answers wait while 50 agents fetch.

CPU is that of the server's processes; those who fetch are the same for all. In the second part agents run only where nothing else wants to: they stand
for other machines, but share this one's cores and its loopback. They fetch as fast as a link of 1 and of 2.5 Gbit/s gives it, and without any limit:
then all that this machine can do is done. What is compared is taken in turns, round after round.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import requests

from bench.scripted_batch import describe_machine, percentile
from repave.ca import make_ca, make_certificate
from repave.chunk_process import start_chunk_process
from repave.images.chunk_token import render_chunk_token
from repave.images.store import ImageStore
from repave.lab.nginx import start_nginx
from repave.lab.processes import find_free_ports
from repave.lab.rack import rack_down, rack_up

ROUNDS = 5
CHUNKS, CHUNK_BYTES = 200, 1_200_000  # as of a Debian image
ROUND_BYTES = 1e9
CONNECTIONS = 8
AGENTS, AGENT_CONNECTIONS, PROCESSES = 50, 4, 5
LINKS = {"1 Gbit/s": 117e6, "2.5 Gbit/s": 294e6, "no limit": 0.0}  # bytes a second of all agents together
API_S, API_PAUSE_S = 6.0, 0.025  # under the limit of 50 a second
KEY = b"the bench's chunk key"


def main(rounds: int = ROUNDS) -> None:
    """Prints two tables. 6 minutes on 2 cores."""
    folder = Path(tempfile.mkdtemp(prefix="rpc-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        print(f"serving; {describe_machine()}; {datetime.now():%Y-%m-%d %H:%M}\n", flush=True)
        compare_servers(folder / "servers", rounds)
        compare_answers(folder / "service", rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_chunks(images: Path) -> list[str]:
    """The store has as many chunks as an image; their paths on the wire."""
    store, paths = ImageStore(images), []
    for _ in range(CHUNKS):
        data = os.urandom(CHUNK_BYTES)
        sha256 = hashlib.sha256(data).hexdigest()
        path = store.chunk_path(sha256)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        paths.append(f"/chunks/{sha256[:2]}/{sha256}")
    return paths


# ---- CPU ----


def compare_servers(folder: Path, rounds: int) -> None:
    images = folder / "images"
    paths = write_chunks(images)
    make_ca(folder)
    certificate, ca = make_certificate(folder, ["127.0.0.1", "localhost"], folder / "server.pem"), folder / "ca.pem"
    key_path = folder / "chunks.key"
    key_path.write_bytes(KEY)
    token = render_chunk_token(KEY, "run-1", datetime.now(UTC) + timedelta(hours=1))
    costs: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        before = find_children()
        stack.enter_context(start_chunk_process(listener, images, key_path, certificate))
        [ours] = find_children() - before
        chunk_port = listener.getsockname()[1]
        servers = {"chunk server": (chunk_port, ours)}
        for name, with_tokens in (("nginx, files alone", False), ("nginx, tokens checked", True)):
            [port] = find_free_ports(1)
            changes = {
                "10.9.0.5:8474": f"127.0.0.1:{port}", "127.0.0.1:8473": f"127.0.0.1:{chunk_port}", "/srv/repave/repave-data/images": str(images),
                "/srv/repave/repave-data/chunks.pem": str(certificate), "/srv/repave/secret/ca.pem": str(ca),
            } | ({} if with_tokens else {"auth_request /token;": "", "limit_conn repave_runs 8;": ""})  # fmt: skip
            process = stack.enter_context(start_nginx(folder / f"nginx{with_tokens:d}", "chunks.conf", changes, port=port))
            servers[name] = (port, process.pid)
        for number in range(rounds + 1):
            for name, (port, pid) in servers.items():
                began = read_cpu_s(pid)
                fetched = fetch_all(("127.0.0.1", port), ca, [token] * CONNECTIONS, paths, lambda done: done < ROUND_BYTES)
                cost = (read_cpu_s(pid) - began) / (fetched / 1e9)
                if number:  # the first warms up
                    costs.setdefault(name, []).append(cost)
            print(f"round {number}/{rounds}", flush=True)
    reference = statistics.median(costs["nginx, files alone"])
    print(f"\n{rounds} rounds of 1 GB over TLS, {CONNECTIONS} connections: CPU s per GB, median (least to most)\n")
    for name, values in costs.items():
        median = statistics.median(values)
        print(f"  {name:<24} {median:.2f} ({min(values):.2f} to {max(values):.2f})   {median / reference:.2f} x nginx", flush=True)
    print(flush=True)


def find_children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def read_cpu_s(pid: int) -> float:
    """User and system time of the process and of its children, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(read_cpu_s(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def fetch_all(address: tuple[str, int], ca: Path, tokens: Sequence[str], paths: Sequence[str], go_on: Callable[[int], bool]) -> int:
    """One connection a token fetches chunks over TLS while `go_on(bytes so far)`; returns the bytes in all."""
    fetched, tls, lock = 0, ssl.create_default_context(cafile=str(ca)), threading.Lock()
    tls.check_hostname = False

    def loop(number: int, token: str) -> None:
        nonlocal fetched
        with tls.wrap_socket(socket.create_connection(address)) as stream:
            room, at = memoryview(bytearray(1 << 20)), number * 37
            while go_on(fetched):
                at += 1
                stream.sendall(f"GET {paths[at % len(paths)]} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
                head = b""
                while b"\r\n\r\n" not in head:
                    head += stream.recv(4096)
                head, _, body = head.partition(b"\r\n\r\n")
                if b" 200 " not in head.split(b"\r\n")[0]:
                    raise RuntimeError(head.decode())
                left = CHUNK_BYTES - len(body)
                while left:
                    left -= stream.recv_into(room)
                with lock:
                    fetched += CHUNK_BYTES

    threads = [threading.Thread(target=loop, args=item) for item in enumerate(tokens)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return fetched


# ---- the API's answers ----


def compare_answers(folder: Path, rounds: int) -> None:
    lab = rack_up(1, scripted=True, folder=folder, debian=False)
    try:
        site = folder / "site"
        paths = write_chunks(site / "repave-data/images")
        settings = (site / "repave.toml").read_text()
        port = int(next(line for line in settings.splitlines() if line.startswith("chunks_listen")).rpartition(":")[2].strip('"'))
        key = (site / "secret/chunks.key").read_bytes()
        expires_at = datetime.now(UTC) + timedelta(hours=1)
        tokens = [render_chunk_token(key, f"run-{n}", expires_at) for n in range(AGENTS) for _ in range(AGENT_CONNECTIONS)]
        url = f"{lab['endpoint']}/v1/{lab['project_id']}/instances/{lab['instances'][0]['id']}/status"
        idle: dict[str, list[float]] = {link: [] for link in LINKS}
        busy: dict[str, list[float]] = {link: [] for link in LINKS}
        rates: dict[str, list[float]] = {link: [] for link in LINKS}
        read_answers(url, lab["token"], 3)
        for number in range(rounds):
            for link, limit in LINKS.items():
                idle[link] += read_answers(url, lab["token"], API_S)
                with fetching(("127.0.0.1", port), site / "secret/ca.pem", tokens, paths, limit) as count:
                    time.sleep(2)
                    began, before = time.monotonic(), count()
                    busy[link] += read_answers(url, lab["token"], API_S)
                    rates[link].append((count() - before) / (time.monotonic() - began))
            print(f"round {number + 1}/{rounds}", flush=True)
    finally:
        rack_down(folder)
    print(f"\nGET status while {AGENTS} agents fetch, {rounds} rounds of {API_S:.0f} s and as many idle ones, ms\n")
    for link in LINKS:
        print(f"  {link}, {statistics.median(rates[link]) / 1e6:.0f} MB/s together")
        for share in (50, 99):
            quiet, loud = (1000 * percentile(of[link], share) for of in (idle, busy))
            print(f"    p{share:<4} idle {quiet:7.1f}   fetching {loud:7.1f}   {loud / quiet:.2f} x", flush=True)


def read_answers(url: str, token: str, seconds: float) -> list[float]:
    """Seconds that each of the requests took, one after the other with a pause."""
    times, ends_at = [], time.monotonic() + seconds
    with requests.Session() as session:
        session.trust_env = False
        while time.monotonic() < ends_at:
            began = time.monotonic()
            answer = session.get(url, headers={"X-Auth-Token": token}, timeout=30)
            times.append(time.monotonic() - began)
            answer.raise_for_status()
            time.sleep(API_PAUSE_S)
    return times


@contextlib.contextmanager
def fetching(address: tuple[str, int], ca: Path, tokens: Sequence[str], paths: Sequence[str], limit: float) -> Iterator[Callable[[], int]]:
    """The agents fetch for as long as the block runs, together so many bytes a second (0 = no limit); gives the bytes they have so far."""
    context = multiprocessing.get_context("spawn")
    over, counters = context.Event(), [context.Value("q", 0) for _ in range(PROCESSES)]
    processes = [
        context.Process(target=_fetch_until, args=(over, counter, address, ca, list(tokens[n::PROCESSES]), list(paths), limit / PROCESSES))
        for n, counter in enumerate(counters)
    ]
    for process in processes:
        process.start()
    try:
        yield lambda: sum(counter.value for counter in counters)
    finally:
        over.set()
        for process in processes:
            process.join()


def _fetch_until(over, counter, address, ca, tokens, paths, limit) -> None:  # type: ignore[no-untyped-def]
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    began = time.monotonic()

    def go_on(fetched: int) -> bool:
        counter.value = fetched
        while limit and not over.is_set() and fetched > limit * (time.monotonic() - began):
            time.sleep(0.02)
        return not over.is_set()

    fetch_all(address, ca, tokens, paths, go_on)
