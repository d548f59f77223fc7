"""The agent's console: lines on stdout, and the same lines sent to the service in small batches, so that they can be read where no serial console is.

It is never in the way: at most one batch in `PAUSE_S`, at most `KEPT_BYTES` waiting (the oldest go first, and a line says how many), no try that
the run waits for but the last one before power goes off. What is refused once is not sent again.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from repave.agent.client import Client
from repave.agent.http_client import Refused, Unreachable
from repave.agent.protocol import LOG_BYTES

PAUSE_S = 2.0
KEPT_BYTES = 4 * LOG_BYTES
_LINE_CHARS = 2000


class Console:
    """Lines on stdout, kept until they are sent. `hide` is replaced wherever it would show, in errors too."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._hidden: list[str] = []
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._waiting_bytes, self._dropped = 0, 0

    def hide(self, secret: str) -> None:
        self._hidden.append(secret)

    def clean(self, text: str) -> str:
        for secret in filter(None, self._hidden):
            text = text.replace(secret, "***")
        return text

    def say(self, text: str) -> None:
        line = f"repave-agent {time.monotonic() - self._started:8.3f}s  {self.clean(text)}"
        print(line, flush=True)
        with self._lock:
            self._waiting.append(line[:_LINE_CHARS] + "\n")
            self._waiting_bytes += _size(self._waiting[-1])
            while self._waiting_bytes > KEPT_BYTES:
                self._waiting_bytes -= _size(self._waiting.popleft())
                self._dropped += 1

    def take(self) -> str:
        """The next lines, at most LOG_BYTES of them. They do not wait any more."""
        with self._lock:
            taken = [f"[{self._dropped} lines were left out]\n"] if self._dropped else []
            size, self._dropped = sum(map(_size, taken)), 0
            while self._waiting and size + _size(self._waiting[0]) <= LOG_BYTES:
                taken.append(self._waiting.popleft())
                size += _size(taken[-1])
                self._waiting_bytes -= _size(taken[-1])
        return "".join(taken)


class LogSender:
    """Sends what `console` says, from `start` until `finish`."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client, self._console = client, console
        self._batch = ""  # taken and not yet known to have arrived: sent again as it is, so that the service knows it
        self._refused = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="log", daemon=True)

    def start(self) -> None:
        """The service knows us: hello was answered."""
        self._thread.start()

    def finish(self) -> None:
        """What was said so far is sent, where the service answers. Repeatable. Blocks for as long as two requests may take."""
        if self._over.is_set() or not self._thread.is_alive():
            return
        self._over.set()
        self._thread.join()
        while not self._refused and self._send():
            pass

    def _loop(self) -> None:
        while not self._refused:
            self._send()
            if self._over.wait(PAUSE_S):
                return

    def _send(self) -> bool:
        """Whether there was something to send, and it arrived."""
        self._batch = self._batch or self._console.take()
        if not self._batch:
            return False
        try:
            self._client.call("POST", "/agent/v1/log", {"text": self._batch})
        except Unreachable:
            return False
        except (Refused, ValueError):
            self._refused = True
            return False
        self._batch = ""
        return True


def _size(line: str) -> int:
    return len(line.encode())
