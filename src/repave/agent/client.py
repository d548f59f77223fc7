"""The agent's side of the wire: HTTPS to one address, trusting one CA. Paths and shapes: `repave.agent.protocol`.

One connection per thread, kept open. Redirects are never followed, proxies never used, answers never longer than their cap.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from repave.agent.http_client import BACKOFF_S, HEAD_CAP_BYTES, TIMEOUT_S, Connection, Refused, Unreachable, make_room, parse_address
from repave.agent.protocol import ASK_HEADER
from repave.agent.tls import trust_only

JSON_CAP_BYTES = 1024 * 1024  # protocol.py: bodies are at most 1 MiB
TRIES = 3  # a body with a wrong digest: a bad transfer is over after one more, a bad store never


class Answer(NamedTuple):
    status: int
    body: bytes

    def json(self) -> dict[str, Any]:
        value = json.loads(self.body or b"{}")
        if not isinstance(value, dict):
            raise ValueError("the answer is not a JSON object")
        return value


class Client:
    """Speaks to one provisioning listener as the bearer of `token`; threads may share it."""

    def __init__(self, url: str, *, ca_pem: str, token: str) -> None:
        self._address = parse_address(url)
        if not self._address.is_tls:
            raise ValueError("agent_url must be https://HOST:PORT")
        self._tls = trust_only(ca_pem)
        self._mine = _OfThread()
        self.token = token

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, cap_bytes: int = JSON_CAP_BYTES) -> Answer:
        """One try, and one more where a kept connection turns out to be closed: every message may be repeated (protocol.py).

        Raises: Refused on 4xx; Unreachable on no answer, 3xx and 5xx; ValueError on an answer longer than `cap_bytes`.
        """
        kept = self._mine.connection is not None
        try:
            answer = self._exchange(method, path, body, cap_bytes)
        except Unreachable:
            if not kept:
                raise
            answer = self._exchange(method, path, body, cap_bytes)
        if 400 <= answer.status < 500:
            raise Refused(answer.status, path)
        if not 200 <= answer.status < 300:
            raise Unreachable(f"{path} was answered with {answer.status}")
        return answer

    def insist(self, method: str, path: str, body: dict[str, Any] | None = None, *, while_true: Callable[[], bool], cap_bytes: int = JSON_CAP_BYTES) -> Answer:
        """`call`, again and again while nobody answers and `while_true()`; then the last Unreachable."""
        tries = 0
        while True:
            try:
                return self.call(method, path, body, cap_bytes=cap_bytes)
            except Unreachable:
                time.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                tries += 1
                if not while_true():
                    raise

    def get_bytes(self, path: str, *, sha256: str, cap_bytes: int, while_true: Callable[[], bool]) -> bytes:
        """The body of `path`. Raises ValueError where it is longer than `cap_bytes`, or came thrice with another digest."""
        for _ in range(TRIES):
            body = self.insist("GET", path, while_true=while_true, cap_bytes=cap_bytes).body
            if hashlib.sha256(body).hexdigest() == sha256:
                return body
        raise ValueError(f"{path} has another digest than the plan names")

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, cap_bytes: int) -> Answer:
        asked = os.urandom(8).hex()
        fields = {ASK_HEADER: asked} | ({} if body is None else {"Content-Type": "application/json"})
        data = b"" if body is None else json.dumps(body).encode()
        room = make_room(HEAD_CAP_BYTES + cap_bytes)  # no memory is no fault of the server
        try:
            connection = self._mine.connection = self._mine.connection or Connection(self._address, self._tls, connect_s=TIMEOUT_S, read_s=TIMEOUT_S)
            connection.ask(path, method=method, token=self.token, fields=fields, body=data)
            status, content = connection.read(room, must_have=(ASK_HEADER, asked))
            if len(content) > cap_bytes:
                raise ValueError(f"the answer to {path} is longer than {cap_bytes} bytes")
        except BaseException:
            self._drop()
            raise
        if connection.will_close:
            self._drop()
        return Answer(status, bytes(content))

    def _drop(self) -> None:
        if self._mine.connection is not None:
            self._mine.connection.close()
        self._mine.connection = None


class _OfThread(threading.local):
    connection: Connection | None = None
