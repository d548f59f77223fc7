"""The agent's side of the wire: HTTPS to one address, trusting one CA. Paths and shapes: `repave.agent.protocol`.

One connection per thread, kept open. Redirects are never followed, proxies never used, answers never longer than their cap.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple

from repave.agent.protocol import ASK_HEADER

JSON_CAP_BYTES = 1024 * 1024  # protocol.py: bodies are at most 1 MiB
TIMEOUT_S = 10.0  # to connect, and for each read; well under a lease of 60 s
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 5.0)  # then 5 s each
TRIES = 3  # a body with a wrong digest: a bad transfer is over after one more, a bad store never
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, openssl/x509_vfy.h


class Refused(Exception):
    """The server answered, and the answer is no: 401 unknown token, 410 ended run, or another 4xx."""

    def __init__(self, status: int, path: str) -> None:
        self.status = status
        super().__init__(f"{path} was answered with {status}")


class Unreachable(Exception):
    """No answer, half an answer, an answer of somebody else (TLS) or to another request, or 5xx. Worth another try."""


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
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise ValueError("agent_url must be https://HOST:PORT")
        self._address = (parts.hostname, parts.port or 443)
        self._tls = trust_only(ca_pem)
        self._local = threading.local()
        self.token = token

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, cap_bytes: int = JSON_CAP_BYTES) -> Answer:
        """One try, and one more where a kept connection turns out to be closed: every message may be repeated (protocol.py).

        Raises: Refused on 4xx; Unreachable on no answer, 3xx and 5xx; ValueError on an answer longer than `cap_bytes`.
        """
        kept = getattr(self._local, "connection", None) is not None
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
        connection: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            host, port = self._address
            connection = self._local.connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._tls)
        asked = os.urandom(8).hex()
        headers = {"Authorization": f"Bearer {self.token}", ASK_HEADER: asked}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            connection.request(method, path, body=data, headers=headers)
            response = connection.getresponse()
            if response.headers.get(ASK_HEADER) != asked:
                raise Unreachable(f"{path}: the answer ({response.status}) is not to this request")
            content = response.read(cap_bytes + 1)
            if len(content) > cap_bytes:
                raise ValueError(f"the answer to {path} is longer than {cap_bytes} bytes")
            if response.length:  # read(n) does not complain about a body that ends early
                raise Unreachable(f"the answer to {path} ended early")
            response.read()  # lets the connection be used again
            return Answer(response.status, content)
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise Unreachable(f"{type(error).__name__}: {error}") from None
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        self._local.connection.close()
        self._local.connection = None


def trust_only(ca_pem: str) -> ssl.SSLContext:
    """TLS 1.2 or later, host name or address checked, our CA and no other.

    Dates in certificates are not checked: a server with an empty clock battery believes it is 2000 or so, and the CA came with this
    very boot. `create_default_context` is avoided: it would write keys to SSLKEYLOGFILE.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # CERT_REQUIRED and check_hostname
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca_pem)
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    return context
