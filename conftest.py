"""For every lane."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """SIGTERM ends a run as Ctrl-C does: what it started is ended too. In each worker of xdist as well."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
