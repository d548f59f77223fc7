"""For every lane."""

from __future__ import annotations

import os
import signal


def pytest_configure() -> None:
    """SIGTERM to a run's process group ends it as Ctrl-C does: what it started is ended too, as far as that takes xdist's workers less than 10 s."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # a child that a test forks has nothing to tear down
