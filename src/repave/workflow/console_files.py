"""Serial consoles of servers, from files: what conserver, conman or the virtual rack append to, one file a server, named by the setting `console_files`.

A run's stream begins where its server's file ended when the run began (`begin_console`), so it has the first byte of the ramdisk's boot. A thread of its own
follows the files of live runs; where it stands is in the database, so a service that starts again, or another worker that sees the same files, goes on
there. A file that can not be read costs its run's console and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog

from repave.domain.model import Server, Source
from repave.domain.redaction import Redactor
from repave.store import Store

POLL_S = 1.0
READ_BYTES = 64 * 1024  # a run and look: no console fills the database faster
_LINE_BYTES = 4096  # without its end a longer one is taken as it is

log = structlog.get_logger()


def console_path(console_files: str, server_name: str) -> Path:
    """`console_files` with the server's name in it. Names have letters, digits and hyphens only, so none leads elsewhere."""
    return Path(console_files.replace("{server}", server_name))


def begin_console(store: Store, console_files: str, run_id: str, server: Server) -> None:
    """The run's serial stream begins at its server's file's end. Repeatable. Nothing, where no files are set or this one is not there."""
    if not console_files:
        return
    with contextlib.suppress(OSError):
        store.consoles.begin(run_id, Source.SERIAL, read_to=console_path(console_files, server.name).stat().st_size)


class ConsoleFiles:
    """Follows the serial consoles of live runs."""

    def __init__(self, store: Store, console_files: str) -> None:
        self._store, self._console_files = store, console_files
        self._redactors: dict[str, tuple[str, Redactor]] = {}  # server's name and secrets of a live run: its last lines come when its keys are gone
        self._failed: set[str] = set()
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """They are followed, from now until the end of the block."""
        if not self._console_files:
            yield
            return
        thread = threading.Thread(target=self._look_forever, name="console-files", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(timeout=2)

    def look(self) -> None:
        """What the files of live runs have more than at the last look is in their streams; of a run that has ended since, all of it, once."""
        live = dict(self._store.consoles.list_followed())
        for run_id, name in live.items():
            if run_id not in self._redactors and (secrets := self._store.runs.list_run_secrets(run_id)):
                self._redactors[run_id] = name, Redactor(secrets)
        for run_id, (name, redactor) in list(self._redactors.items()):
            try:
                self._follow(run_id, name, redactor, ended=run_id not in live)
            except OSError as error:
                if name not in self._failed:
                    self._failed.add(name)
                    log.warning("a serial console can not be read", server=name, why=error.strerror)
            if run_id not in live:
                del self._redactors[run_id]

    def _follow(self, run_id: str, name: str, redactor: Redactor, *, ended: bool) -> None:
        read_to = self._store.consoles.find_read_to(run_id, Source.SERIAL)
        if read_to is None:
            return
        with console_path(self._console_files, name).open("rb") as console:
            size = console.seek(0, 2)
            start = read_to if read_to <= size else 0  # a new file: the old one was put aside
            console.seek(start)
            data = console.read(READ_BYTES)
        whole = data.rfind(b"\n") + 1
        if not ended and (whole or len(data) < _LINE_BYTES):
            data = data[:whole]  # whole lines, so that no secret comes in two halves
        if data:
            text = redactor.clean(data.decode(errors="replace"))
            self._store.consoles.append(run_id, Source.SERIAL, text, read_from=read_to, read_to=start + len(data))

    def _look_forever(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.look()
            except Exception as error:  # the database is away; the next look may do better
                log.warning("no look at serial consoles", error=type(error).__name__)
