"""An HTTP(S) proxy that breaks what passes through it, by rules given as data: in front of a BMC or of one of our listeners.

A rule names calls (method, path, whose, the how-manyeth) and one fault. The lies of a BMC are two of them: a call that is `ignored` is answered
well and has no effect (an override, an insert, a power action), and `elsewhere` is another machine behind the address.
Every request is kept with its time, sizes, answer and fault; bodies and logins are not.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

# latency: passed on after `seconds` · black-hole: never passed on or answered · reset: not passed on, RST · status: not passed on, `status`
# truncated: half of the answer's body · twice: passed on two times · stale: the answer to the same request before this one, whoever's it was
# lost-answer: passed on, hung up · ignored: not passed on, answered 204 · elsewhere: passed on to `other_url` · slow: `bytes_per_s`
FAULTS = ("latency", "black-hole", "reset", "status", "truncated", "twice", "stale", "lost-answer", "ignored", "elsewhere", "slow")
_UPSTREAM_S = 120.0
_ID = re.compile("(?:\\b[0-9a-f]{2}/)?[0-9a-f-]{32,}")  # in a path: whose it is, not what is asked; of a chunk, its folder too
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "te", "trailer", "upgrade", "proxy-connection")  # RFC 9110, 7.6.1


@dataclass(frozen=True)
class Rule:
    """`fault` befalls calls `nth` to `nth + times - 1` of those that match, counted from 1; `times` None: all from there on. `path`: a regex."""

    fault: str
    method: str = ""  # "" is any
    path: str = ""
    nth: int = 1
    times: int | None = 1
    seconds: float = 1.0
    status: int = 503
    bytes_per_s: int = 100_000
    other_url: str = ""
    caller: str = ""  # as the proxy's `name_caller` has it; "" is anybody

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"no such fault: {self.fault}")

    def names(self, method: str, path: str, caller: str = "") -> bool:
        return self.method in ("", method) and self.caller in ("", caller) and re.search(self.path, path) is not None


@dataclass(frozen=True)
class Seen:
    """One request. `at` is time.monotonic(); `status` is 0 where no answer was given."""

    at: float
    method: str
    path: str
    request_bytes: int
    status: int
    answer_bytes: int
    fault: str = ""
    caller: str = ""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    length: str | None  # as the far end told it: of a HEAD, more than the body has


class FaultProxy:
    """What stands before `upstream_url`. `ca`: whom to trust there; None with https: anybody, for BMCs with certificates of their own.

    `routes`: begin of a path -> what else stands there.

    `name_caller` tells from path and bearer token whose request it is, so that many machines behind one proxy have faults of their own.
    """

    def __init__(self, upstream_url: str, *, ca: Path | None = None, routes: Mapping[str, str] | None = None) -> None:
        self.upstream_url, self.url = upstream_url, ""
        self._routes = routes or {}
        self.name_caller: Callable[[str, str], str] = lambda path, bearer: ""
        self.over = threading.Event()
        self._ca = ca
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._matched: dict[Rule, int] = {}
        self._seen: list[Seen] = []
        self._last: dict[tuple[str, str], _Answer] = {}

    def set_rules(self, rules: Sequence[Rule], *, caller: str = "") -> None:
        """These faults from now on, counted from the next request. With a `caller`, other callers' rules stay as they are."""
        with self._lock:
            self._rules = [r for r in self._rules if caller and r.caller != caller] + list(rules)
            self._matched = {r: 0 if r in rules else n for r, n in self._matched.items()}

    def read_log(self) -> list[Seen]:
        """What has been answered or dropped so far, oldest first."""
        with self._lock:
            return list(self._seen)

    def find_rule(self, method: str, path: str, caller: str) -> Rule | None:
        """The first rule whose turn this call is. Every rule that names the call counts it."""
        found = None
        with self._lock:
            for rule in self._rules:
                if not rule.names(method, path, caller):
                    continue
                self._matched[rule] = self._matched.get(rule, 0) + 1
                behind = self._matched[rule] - rule.nth
                if found is None and behind >= 0 and (rule.times is None or behind < rule.times):
                    found = rule
        return found

    def note(self, seen: Seen) -> None:
        with self._lock:
            self._seen.append(seen)

    def upstream_of(self, path: str) -> str:
        return next((url for begin, url in self._routes.items() if path.startswith(begin)), self.upstream_url)

    def find_last(self, method: str, path: str) -> _Answer | None:
        with self._lock:
            return self._last.get((method, _ID.sub("ID", path)))

    def ask(self, url: str, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Answer:
        """The far end's answer, read whole."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=_UPSTREAM_S, context=self._tls())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_UPSTREAM_S)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            if body or method in ("POST", "PUT", "PATCH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            response = connection.getresponse()
            kept = tuple((n, v) for n, v in response.getheaders() if n.lower() not in _HOP)
            answer = _Answer(response.status, kept, response.read(), response.getheader("Content-Length"))
        with self._lock:
            self._last[method, _ID.sub("ID", path)] = answer
        return answer

    def _tls(self) -> ssl.SSLContext:
        if self._ca is not None:
            return ssl.create_default_context(cafile=str(self._ca))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultProxy]
    protocol_version = "HTTP/1.1"  # agents keep their connections

    def log_message(self, *args: object) -> None: ...

    def _pass_on(self) -> None:
        at = time.monotonic()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        caller = self.proxy.name_caller(self.path, (self.headers.get("Authorization") or "").removeprefix("Bearer "))
        rule = self.proxy.find_rule(self.command, self.path, caller)
        if rule is not None and rule.fault == "black-hole":
            self.proxy.note(Seen(at, self.command, self.path, len(body), 0, 0, rule.fault, caller))
            self.proxy.over.wait()
            self._hang_up()
            return
        answer = self._answer(rule, body)
        # Noted before it is sent: who has the answer finds the request in the log.
        told = (answer.status, len(answer.body)) if answer else (0, 0)
        self.proxy.note(Seen(at, self.command, self.path, len(body), *told, rule.fault if rule else "", caller))
        if answer is not None:
            self._send(answer, rule)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _answer(self, rule: Rule | None, body: bytes) -> _Answer | None:
        """What the client gets, None where it is hung up on."""
        fault, url = rule.fault if rule else "", self.proxy.upstream_of(self.path)
        if rule is not None and fault == "status":
            return _Answer(rule.status, (), b"", None)
        if fault == "ignored":
            return _Answer(204, (), b"", None)
        if fault == "reset":
            self._reset()
            return None
        if fault == "stale" and (last := self.proxy.find_last(self.command, self.path)) is not None:
            return last
        if rule is not None and fault == "latency":
            self.proxy.over.wait(rule.seconds)
        if rule is not None and fault == "elsewhere":
            url = rule.other_url
        headers = [(n, v) for n, v in self.headers.items() if n.lower() not in _HOP]
        try:
            answer = self.proxy.ask(url, self.command, self.path, headers, body)
            if fault == "twice":
                answer = self.proxy.ask(url, self.command, self.path, headers, body)
        except (OSError, http.client.HTTPException):  # nobody is there: the client sees what it would have seen
            self._hang_up()
            return None
        if fault == "lost-answer":
            self._hang_up()
            return None
        return answer

    def _send(self, answer: _Answer, rule: Rule | None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.status != 204:  # RFC 9110, 8.6
            self.send_header("Content-Length", (answer.length if self.command == "HEAD" else None) or str(len(answer.body)))
        self.end_headers()
        if rule is not None and rule.fault == "truncated":
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self._hang_up()
        elif rule is not None and rule.fault == "slow":
            piece = max(1, rule.bytes_per_s // 10)
            for offset in range(0, len(answer.body), piece):
                self.wfile.write(answer.body[offset : offset + piece])
                if self.proxy.over.wait(0.1):
                    break
        else:
            self.wfile.write(answer.body)

    def _hang_up(self) -> None:
        self.close_connection = True

    def _reset(self) -> None:
        """RST instead of FIN: close(2) with SO_LINGER 0, socket(7)."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None: ...  # clients that go away are the point


@contextlib.contextmanager
def start_fault_proxy(
    upstream_url: str, *, ca: Path | None = None, certificate: Path | None = None, port: int = 0, routes: Mapping[str, str] | None = None
) -> Iterator[FaultProxy]:
    """A proxy on loopback for as long as the block runs. `certificate`: a PEM file with chain and key, to be a TLS listener."""
    proxy = FaultProxy(upstream_url, ca=ca, routes=routes)
    server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"proxy": proxy}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake is made by the connection's own thread: one that never speaks stops nobody else.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="fault-proxy", daemon=True).start()
    proxy.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        proxy.over.set()
        server.shutdown()
        server.server_close()
