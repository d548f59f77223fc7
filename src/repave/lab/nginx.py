"""A real nginx with the configurations of docs/nginx, on loopback: as a big site's server of chunks, and as a rack's cache of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from repave.lab.processes import find_process, wait_for_port

DOCS = Path(__file__).parents[3] / "docs/nginx"
_MAIN = """daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; {user} worker_processes 1;
events {{ worker_connections 4096; }}
http {{
    access_log {folder}/access.log combined buffer=64k flush=1s;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/ours.conf;
}}
"""


@contextlib.contextmanager
def start_nginx(folder: Path, name: str, changes: Mapping[str, str], *, port: int, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """docs/nginx/`name` is served for as long as the block runs, with its example's values replaced. `before`: what runs it (a network namespace).

    Raises: ValueError where the example does not hold a value that is to be replaced; RuntimeError where nginx does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = (DOCS / name).read_text().replace("/var/cache/nginx", str(folder))
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{name} has no {old}")
        text = text.replace(old, new)
    (folder / "ours.conf").write_text(text)
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder, user="user root;" if os.getuid() == 0 else ""))
    log = folder / "start.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*before, "/usr/sbin/nginx", "-e", folder / "error.log", "-c", folder / "nginx.conf"], stdout=out, stderr=out)
    try:
        if not before:
            found = find_process(process.pid, "nginx")
            if found is None:
                raise RuntimeError(log.read_text())
            wait_for_port(port, process=found, log=log)
        else:
            time.sleep(0.5)
        yield process
    finally:
        process.terminate()
        process.wait(10)
