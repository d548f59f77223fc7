"""Single keys, taken from the terminal while something is drawn on it. Ctrl-C stays a signal.

The terminal's settings are as before when `open_keys` is left: by an end, an exception, Ctrl-C, SIGTERM or SIGHUP. What was typed before, for the
next command, is no key. In the background nothing is taken
or set: who reads or sets a terminal from there is stopped by SIGTTIN and SIGTTOU.

Source: termios(3), "Canonical and noncanonical mode"; credentials(7), "Sessions".
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any

_ENDS = (signal.SIGTERM, signal.SIGHUP)
_MOST_BYTES = 64


class Keys:
    """The keys of the terminal at `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd, self._open = fd, True
        self._before: list[Any] | None = None  # as it was found
        self._take()

    def wait(self, seconds: float) -> str:
        """The key that was typed, as soon as there is one; "" when this time has passed. Several bytes at once are an arrow or pasted text: no key."""
        if not self._take():
            time.sleep(seconds)
            return ""
        if not select.select([self._fd], [], [], seconds)[0] or not self._in_foreground():
            return ""
        typed = os.read(self._fd, _MOST_BYTES)
        self._open = bool(typed)  # nothing to read: the terminal is gone
        return typed.decode("ascii", "ignore") if len(typed) == 1 else ""

    def restore(self) -> None:
        if self._before is not None and self._in_foreground():
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)

    def _take(self) -> bool:
        """Keys come one by one and are not shown, also after a shell had the terminal in between (Ctrl-Z, fg)."""
        if not self._open or not self._in_foreground():
            return False
        now = termios.tcgetattr(self._fd)
        if now[tty.LFLAG] & termios.ICANON:
            tty.setcbreak(self._fd, termios.TCSAFLUSH if self._before is None else termios.TCSADRAIN)
        if self._before is None:
            self._before = now
        return True

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # not our terminal, or hung up
            return False


@contextlib.contextmanager
def open_keys() -> Iterator[Keys | None]:
    """The keys of standard input; None where that is no terminal. In the main thread only."""
    if not sys.stdin.isatty():
        yield None
        return
    keys = Keys(sys.stdin.fileno())
    before = {number: signal.signal(number, _leave) for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL}  # nohup's stays ignored
    try:
        yield keys
    finally:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_ENDS})  # a second one waits until the terminal is as it was
        keys.restore()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _leave(number: int, frame: FrameType | None) -> None:
    """By an exception, so that whoever has something to put back does; a second one is not needed for that."""
    for each in _ENDS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)
