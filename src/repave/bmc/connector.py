"""The HTTP under sushy: what a BMC may make us do, and what not.

sushy's own connector repeated a power action ten times when the answer was lost, gave the login to any host that a link
named and followed redirects (trust.md finding 4). Here instead:

- POST and PATCH are sent once. A lost answer is `LostAnswer`: the caller reads the state, it never sends again blindly.
- GET is tried `GET_TRIES` times, inside the deadline of the call.
- Only the BMC's own origin is asked. Redirects are refused, not followed. No proxy, no .netrc, no cookies kept.
- An answer has at most `MAX_BODY_BYTES` and `MAX_JSON_DEPTH`; the deadline also ends a body or header that only drips.
- A pinned certificate is checked in the handshake, so before the request with the login is sent.
- A refused login is not repeated; after `MAX_BAD_LOGINS` in a row nothing is sent any more (accounts get locked).

HTTP errors leave as sushy's exceptions (its quirk handling needs them), everything else as `BmcError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests import exceptions as requests_errors
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from requests.cookies import RequestsCookieJar
from sushy import connector as sushy_connector
from sushy import exceptions as sushy_errors
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from repave.bmc import BmcAddress
from repave.domain.urls import find_url_fault
from repave.errors import BmcError

MAX_BODY_BYTES = 4 << 20  # the largest real answer in the corpus has 60 KiB; a BIOS attribute registry may have 2 MiB
MAX_JSON_DEPTH = 64  # the deepest real answer in the corpus has 9
CONNECT_TIMEOUT_S = 5.0  # a BMC is on the management network, milliseconds away
READ_TIMEOUT_S = 20.0  # BMCs answer a GET in 0.2-3 s; a busy iDRAC takes up to 15 s
WRITE_TIMEOUT_S = 45.0  # some fetch the image before they answer InsertMedia
GET_TRIES = 3
GET_PAUSE_S = 0.5
MAX_BAD_LOGINS = 3
_TRY_AGAIN = (500, 502, 503, 504)


@dataclass(frozen=True)
class Exchange:
    """One request and what came of it. `status` is 0 and `why` is said where no answer came. Bodies may hold secrets; logins are not in them."""

    method: str
    path: str
    status: int
    seconds: float
    sent: Any = None
    answer: bytes = b""
    why: str = ""


class LostAnswer(BmcError):
    """A POST or PATCH went out, or may have, and no answer came back: read the state to know its effect."""


class NotJson(BmcError):
    """A good status with a body that is no JSON object: not Redfish, or a broken BMC."""


class TooLarge(Exception):
    """More than MAX_BODY_BYTES came."""


class _Wire:
    """The connection of the request under way, so that a timer can end it and the certificate can be told."""

    def __init__(self) -> None:
        self.connection: HTTPConnection | None = None  # None until connected, TLS handshake and pin included
        self.certificate_sha256: str | None = None
        self.was_cut = False
        self.may_send: Callable[[], None] = lambda: None

    def opened(self, connection: HTTPConnection) -> None:
        self.connection = connection
        if isinstance(connection.sock, ssl.SSLSocket):
            certificate = connection.sock.getpeercert(binary_form=True) or b""
            self.certificate_sha256 = hashlib.sha256(certificate).hexdigest()

    def cut(self) -> None:
        """From the timer's thread: whoever reads the socket sees its end."""
        self.was_cut = True
        sock = self.connection.sock if self.connection else None
        if sock is not None:
            with contextlib.suppress(OSError, ValueError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Never used again: some BMCs keep a connection they no longer serve, and a POST on it would look lost."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _watched(base: type[HTTPConnection], wire: _Wire) -> type[Any]:
    """urllib3's connection, which tells `wire` when it is open and asks it before anything is sent."""

    class Watched(base):  # type: ignore[valid-type, misc]
        def connect(self) -> None:
            super().connect()
            wire.opened(self)

        def send(self, data: Any) -> None:
            if self.sock is None:
                self.connect()
            wire.may_send()
            super().send(data)

    return Watched


class _Adapter(HTTPAdapter):
    """A requests adapter that pins the certificate and tells `_Wire` of each connection."""

    def __init__(self, wire: _Wire, fingerprint: str | None) -> None:
        self._wire = wire
        self._fingerprint = fingerprint
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        wire = self._wire

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = _watched(HTTPConnection, wire)

        class TlsPool(HTTPSConnectionPool):
            ConnectionCls = _watched(HTTPSConnection, wire)

        if self._fingerprint:
            kwargs["assert_fingerprint"] = self._fingerprint
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}


CountRequest = Callable[[str, str], None]  # (method, outcome): 2xx, 4xx, ..., or the class of the error where there was no answer


class Connector(sushy_connector.Connector):  # type: ignore[misc]
    """sushy's connector with our rules. One thread at a time: the driver holds the BMC's lock.

    `deadline` is in `time.monotonic()` seconds and is set by the driver for each of its calls.
    """

    def __init__(
        self, address: BmcAddress, *, observe: Callable[[Exchange], None], before_write: Callable[[], None] = lambda: None,
        count: CountRequest = lambda method, outcome: None,
    ) -> None:  # fmt: skip
        """`before_write` is asked before each request but GET, when it is connected and only the sending is left; what it raises is the answer.

        Asked any earlier, a worker that is stopped for minutes while it connects would still send what it may no longer (engines.md 5).
        """
        if fault := find_url_fault(address.url):
            raise BmcError("not_redfish", f"The address {fault}.")
        parts = urlsplit(address.url)
        name = parts.hostname or ""
        host = f"[{name}]" if ":" in name else name
        self.origin = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")
        pin = (address.certificate_sha256 or "").replace(":", "").lower() or None
        super().__init__(self.origin, verify=False if pin else address.tls_verify)
        self._auth_header = HTTPBasicAuth(address.username, address.password) if address.username else None
        self._observe, self._before_write, self._count = observe, before_write, count
        self._wire = _Wire()
        self._session.trust_env = False
        self._session.cookies = RequestsCookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(self._wire, pin))
        self.deadline = time.monotonic()
        self.bad_logins = 0
        self.last_accepted: requests.Response | None = None  # the answer to the last POST or PATCH that was not refused

    @property
    def certificate_sha256(self) -> str | None:
        return self._wire.certificate_sha256

    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    def url_of(self, link: str) -> str:
        """The absolute URL of a link of this BMC. Raises `protocol` when the link leads to another origin."""
        url = urljoin(f"{self.origin}/redfish/v1/", link).split("#")[0]
        ours, theirs = urlsplit(self.origin), urlsplit(url)
        try:
            same = (theirs.scheme, theirs.hostname, _port(theirs)) == (ours.scheme, ours.hostname, _port(ours))
        except ValueError:
            same = False
        if not same or theirs.username is not None:
            raise BmcError("protocol", "It links to another host; nothing was sent there.")
        return url

    def _op(
        self, method: str, path: str = "", data: Any = None, headers: dict[str, str | None] | None = None,
        blocking: bool = False, timeout: float | None = None, anonymous: bool = False, **_ignored: Any,
    ) -> requests.Response:  # fmt: skip
        """sushy's one way to the network. Raises sushy's HTTPError family for status >= 400, else BmcError."""
        url = self.url_of(path)
        if self.bad_logins >= MAX_BAD_LOGINS:
            raise BmcError("auth", f"{MAX_BAD_LOGINS} logins were refused; no more are tried, or the account may be locked.")
        sent: dict[str, str | None] = {"OData-Version": "4.0", "Accept": "application/json", "Accept-Encoding": "identity"}
        sent |= {"Content-Type": "application/json"} if data is not None else {}
        sent |= headers or {}
        tries = GET_TRIES if method == "GET" else 1
        self._wire.may_send = self._before_write if method != "GET" else lambda: None
        for attempt in range(1, tries + 1):
            try:
                response = self._send_counted(method, url, data, sent, None if anonymous else self._auth_header)
            except LostAnswer as lost:
                if method != "GET":
                    raise
                if attempt == tries or self.remaining_s() < GET_PAUSE_S * attempt:
                    raise BmcError(lost.slug, lost.detail) from lost
            else:
                if response.status_code not in _TRY_AGAIN or attempt == tries or self.remaining_s() < GET_PAUSE_S * attempt:
                    return self._checked(method, url, response, anonymous)
            time.sleep(GET_PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def _send_counted(self, method: str, url: str, data: Any, headers: dict[str, str | None], auth: Any) -> requests.Response:
        try:
            response = self._send(method, url, data, headers, auth)
        except BmcError as error:
            self._count(method, error.slug)
            raise
        self._count(method, f"{response.status_code // 100}xx")
        return response

    def _send(self, method: str, url: str, data: Any, headers: dict[str, str | None], auth: Any) -> requests.Response:
        """`_exchange`, observed however it ends."""
        begun, path = time.monotonic(), urlsplit(url).path
        try:
            response = self._exchange(method, url, data, headers, auth)
        except BmcError as error:
            self._observe(Exchange(method, path, 0, time.monotonic() - begun, data, why=error.detail))
            raise
        self._observe(Exchange(method, path, response.status_code, time.monotonic() - begun, data, response.content))
        return response

    def _exchange(self, method: str, url: str, data: Any, headers: dict[str, str | None], auth: Any) -> requests.Response:
        """One request, one answer, read whole. Raises LostAnswer, or `tls`, `protocol`, `timeout`."""
        left = self.remaining_s()
        if left <= 0:
            raise BmcError("timeout", "The deadline passed.")
        read_s = min(READ_TIMEOUT_S if method == "GET" else WRITE_TIMEOUT_S, left)
        what = f"{method} {urlsplit(url).path}"
        self._wire.was_cut = False
        timer = threading.Timer(read_s + CONNECT_TIMEOUT_S if read_s < left else left, self._wire.cut)
        timer.daemon = True
        timer.start()
        try:
            response: requests.Response = self._session.request(
                method, url, json=data, headers=headers, auth=auth or _no_auth, verify=self._verify, stream=True,
                allow_redirects=False, timeout=(min(CONNECT_TIMEOUT_S, left), read_s),
            )  # fmt: skip
            response._content = _read_body(response)
            if self._wire.was_cut:  # cut off by us: http.client takes headers that end early for a whole answer
                raise requests_errors.ReadTimeout
        except TooLarge:
            raise self._lost(method, "protocol", f"{what}: the answer is larger than {MAX_BODY_BYTES} bytes.") from None
        except requests_errors.SSLError as e:
            if self._wire.connection is None:  # in the handshake; afterwards it is a broken connection like others
                raise BmcError("tls", _why(e)) from None
            raise LostAnswer("unreachable", f"{what}: the connection broke.") from None
        except requests_errors.Timeout as e:
            slug = "unreachable" if isinstance(e, requests_errors.ConnectTimeout) else "timeout"
            raise LostAnswer(slug, f"{what}: no answer in time.") from None
        except (requests_errors.RequestException, OSError, ValueError) as e:
            slug = "timeout" if self._wire.was_cut or self.remaining_s() <= 0 else "unreachable"
            raise LostAnswer(slug, f"{what}: {_why(e)}") from None
        finally:
            timer.cancel()
            self._wire.close()
        return response

    @staticmethod
    def _lost(method: str, slug: str, detail: str) -> BmcError:
        return BmcError(slug, detail) if method == "GET" else LostAnswer(slug, detail)

    def _checked(self, method: str, url: str, response: requests.Response, anonymous: bool) -> requests.Response:
        path = urlsplit(url).path
        status = response.status_code
        if status == 401 and not anonymous:
            self.bad_logins += 1
            raise BmcError("auth", f"{method} {path}: HTTP 401.")
        if 300 <= status < 400:
            raise BmcError("protocol", f"{method} {path}: HTTP {status} redirects; redirects are not followed.")
        if status >= 400:
            response._content = _tame_error(response.content)
            sushy_errors.raise_for_response(method, url, response)
        if not anonymous:
            self.bad_logins = 0
        if method == "GET":
            parse_json(response.content, path)
        else:
            self.last_accepted = response
        return response


def parse_json(body: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `body`. Raises `protocol` for anything else, or when it is nested too deep."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise NotJson("protocol", f"{what}: the answer is not JSON.") from None
    if not isinstance(value, dict):
        raise NotJson("protocol", f"{what}: the answer is not a JSON object.")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return value
    raise BmcError("protocol", f"{what}: the answer is nested too deep.")


def _children(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (v for v in inner if isinstance(v, dict | list))


def _read_body(response: requests.Response) -> bytes:
    body = bytearray()
    try:
        for piece in response.iter_content(65536):
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise TooLarge
    finally:
        response.close()
    return bytes(body)


def _tame_error(body: bytes) -> bytes:
    """An error body in the shape that sushy's HTTPError expects; it crashes on others (none at all, a list, a string in `error`)."""
    value: dict[str, Any] = {}
    with contextlib.suppress(BmcError):
        value = parse_json(body, "error")
    error = value.get("error")
    error = error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else value
    extended = error.get("@Message.ExtendedInfo")
    extended = [extended] if isinstance(extended, dict) else extended if isinstance(extended, list) else []
    tame: dict[str, Any] = {"code": "", "message": "", "@Message.ExtendedInfo": [m for m in extended if isinstance(m, dict)]}
    tame |= {k: error[k] for k in ("code", "message") if isinstance(error.get(k), str)}
    return json.dumps({"error": tame}).encode()


def _why(error: BaseException) -> str:
    """The innermost reason of a requests error, which holds neither login nor address."""
    text = f"{error!r} {error}"
    for mark, said in (
        ("Fingerprints did not match", "The certificate is not the pinned one."),
        ("CERTIFICATE_VERIFY_FAILED", "The certificate is not trusted."),
        ("WRONG_VERSION_NUMBER", "It does not speak TLS on this port."),
        ("Connection refused", "connection refused."),
        ("NameResolution", "the name is not known."),
        ("No route to host", "no route."),
        ("Network is unreachable", "no route."),
        ("RemoteDisconnected", "it closed the connection without an answer."),
        ("IncompleteRead", "the answer was cut short."),
    ):
        if mark in text:
            return said
    return "the TLS handshake failed." if isinstance(error, requests_errors.SSLError) else "the connection failed."


def _port(parts: Any) -> int:
    return parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
