"""Media of ours that could not be taken out when their run ended, because the BMC was away or nobody was there to do it, are taken out later.

A thread of its own: a rack of BMCs that are away must not hold up the reconciler. It looks at start and every few minutes, and does nothing on a
server that is locked or that a run owns. Only media whose URL is that run's are taken out, and power is never touched. Every worker looks; to
take media out twice is harmless.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta

import structlog

from repave.errors import RunFailed
from repave.store import Store
from repave.workflow.effects import OpenBmc, media_folder
from repave.workflow.lease import LeaseGiven, LeaseLapsed

LONGEST_PAUSE = 12  # looks: a BMC that is gone for good is asked once an hour
NEVER = timedelta(days=3650)  # in this life

log = structlog.get_logger()


class MediaSweep:
    """Looks for media that were left, every `every_s` seconds."""

    def __init__(self, store: Store, open_bmc: OpenBmc, *, every_s: float) -> None:
        self._store, self._open_bmc, self._every = store, open_bmc, timedelta(seconds=every_s)
        self._failed: dict[str, tuple[int, datetime]] = {}  # by run: how often it was tried for nothing, and when it is tried again
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """It looks, from now until the end of the block."""
        thread = threading.Thread(target=self._look_forever, name="media-sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(timeout=1)  # it sends nothing any more: the lease is given

    def look(self) -> None:
        """What was left is out, where its BMC lets us and it is time to ask it again."""
        left = self._store.servers.list_left_media()
        self._failed = {run_id: failed for run_id, failed in self._failed.items() if run_id in left.values()}
        for server_id, run_id in sorted(left.items(), key=lambda item: self._failed.get(item[1], (0,))[0]):  # those that are away cost seconds each
            times, again_at = self._failed.get(run_id, (0, None))
            if self._stop.is_set() or (again_at is not None and self._store.now() < again_at):
                continue
            try:
                self._take_out(server_id, run_id)
            except (LeaseLapsed, LeaseGiven):  # other workers look too
                return
            except Exception as error:  # one server's trouble is not the others'
                why = error.slug if isinstance(error, RunFailed) else type(error).__name__
                if why == "stale-run":
                    continue
                if times == 0:  # later ones say nothing new
                    say = log.info if isinstance(error, RunFailed) else log.warning
                    say("media stay in until the BMC lets us", server_id=server_id, run_id=run_id, why=why)
                pause = NEVER if why == "auth" else self._every * min(2**times, LONGEST_PAUSE)  # a refused login locks the account in the end
                self._failed[run_id] = (times + 1, self._store.now() + pause)

    def _take_out(self, server_id: str, run_id: str) -> None:
        def is_left() -> bool:
            return self._store.servers.is_left_media(server_id, run_id)

        def require() -> None:
            if not is_left():  # a run was admitted meanwhile, or the server locked
                raise RunFailed("stale-run")

        if not is_left():  # the look may have taken minutes
            return
        with self._open_bmc(self._store.servers.get_server(server_id), require) as bmc:
            found = bmc.withdraw_media(media_folder(run_id))
        self._store.servers.record_left_media_out(server_id, run_id, found=found)
        if found:
            log.info("media taken out after the end", server_id=server_id, run_id=run_id)

    def _look_forever(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:  # the next look may do better; a sweep that died would be silence
                log.warning("no look for media that were left", error=type(error).__name__)
            if self._stop.wait(self._every.total_seconds()):
                return
