"""A private PostgreSQL from the distribution's package: a folder, a loopback port, no password, gone when the block ends.

PostgreSQL refuses to run as root; then it runs as the user `postgres`, whom the package makes. It is told by the kernel when its
starter's thread dies, so that a killed test leaves no server behind.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from repave.lab.processes import find_free_ports

_START_S = 30.0


def find_programs() -> Path:
    """The folder of initdb and postgres, newest version. Raises RuntimeError where the package is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    if not found:
        raise RuntimeError("PostgreSQL is not installed: make install")
    return found[-1].parent


@dataclass
class Server:
    """A PostgreSQL that can be stopped and started again. `url` of its empty database `repave`."""

    url: str
    port: int
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """It takes connections. Raises RuntimeError with the log where it does not come up."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.log.parent)
        _wait(self.port, self.process, self.log)

    def stop(self) -> None:
        """It is gone at once, without a checkpoint; every connection is ended."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGQUIT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def start_postgres(folder: Path, *, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """SQLAlchemy URL of the empty database `repave`; every path up to `folder` must be open to other users. fsync is on, as in service."""
    with start_server(folder, settings=settings) as server:
        yield server.url


@contextmanager
def start_server(folder: Path, *, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """As `start_postgres`, for whoever stops it in between."""
    programs, port = find_programs(), find_free_ports(1)[0]
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if os.geteuid() == 0 else ["setpriv"]
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        account = pwd.getpwnam(user)
        os.chown(folder, account.pw_uid, account.pw_gid)
    data = folder / "data"
    made = ["--pgdata", str(data), "--username", "repave", "--auth", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8"]
    subprocess.run([*drop, str(programs / "initdb"), *made], check=True, capture_output=True, cwd=folder)
    options = {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": "", "max_connections": "300", **(settings or {})}
    command = [*drop, "--pdeathsig", "QUIT", str(programs / "postgres"), "-D", str(data), *(f"--{name}={value}" for name, value in options.items())]
    server = Server(f"postgresql+psycopg://repave@127.0.0.1:{port}/repave", port, command, folder / "postgres.log")
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """The database `repave` is there. Raises RuntimeError with the log where the server does not come up."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with contextlib.suppress(psycopg.errors.DuplicateDatabase):  # it was started again
                make_database(f"postgresql+psycopg://repave@127.0.0.1:{port}/postgres", "repave")
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)


def make_database(url: str, name: str) -> str:
    """URL of a new, empty database beside the one of `url`."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    return f"{url.rpartition('/')[0]}/{name}"
