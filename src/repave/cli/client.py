"""The operator API, asked by the command line like anyone else would. Where and as whom:

1. --context NAME (REPAVE_CONTEXT): NAME.json in ~/.config/repave, as `repave login` writes it; an admin.json of `repave init` will do too
2. REPAVE_ENDPOINT (default http://127.0.0.1:8470) with REPAVE_TOKEN; REPAVE_CA names a CA bundle for https
3. .repave/lab.json here: the virtual rack
4. admin.json of the site in REPAVE_SITE, or here: what `repave init` wrote

Python's own HTTP client, a connection for each request: `requests` alone takes longer to import than all else that a short command does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from repave.cli.output import Json, Usage, say
from repave.errors import CATALOGUE, RepaveError

DEFAULT_ENDPOINT = "http://127.0.0.1:8470"
LAB_FILE = Path(".repave/lab.json")
ADMIN_FILE = "admin.json"
_CONNECT_S = 5.0
_ANSWER_S = 120.0  # adding a server waits for its BMC
_UPLOAD_S = 8 * 3600.0  # the answer comes when the image is fetched (six hours at most) and stored; /imports tells how far it is
_AGAIN_AFTER_S = (0.5, 1.0, 2.0, 4.0, 4.0)  # a service that is started again is back by then
_GATEWAY = (502, 503, 504)  # who stands between had no answer: RFC 9110, 15.6.3 to 15.6.5
_STREAM_S = 60.0  # the service says something every 15 s


@dataclass(frozen=True)
class Endpoint:
    url: str
    token: str


def context_file(name: str) -> Path:
    """Where the site is kept that --context NAME means. Raises Usage."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise Usage(f"{name!r} is no name of a context: letters, digits, dots, hyphens.")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "repave" / f"{name}.json"


def find_endpoint() -> Endpoint:
    if name := os.environ.get("REPAVE_CONTEXT"):
        path = context_file(name)
        if not path.is_file():
            raise Usage(f"There is no {path}; make it with repave login URL --name {name}.")
        found = json.loads(path.read_text())
        return Endpoint(found["endpoint"], found["token"])
    for path in (LAB_FILE, Path(os.environ.get("REPAVE_SITE", ".")) / ADMIN_FILE):
        if "REPAVE_TOKEN" in os.environ:
            break
        if path.is_file() and os.access(path, os.R_OK):
            found = json.loads(path.read_text())
            return Endpoint(os.environ.get("REPAVE_ENDPOINT", found["endpoint"]), found["token"])
    return Endpoint(os.environ.get("REPAVE_ENDPOINT", DEFAULT_ENDPOINT), os.environ.get("REPAVE_TOKEN", ""))


class NotSent(RepaveError):
    """Nobody took the connection."""


class Client:
    """Asks; raises RepaveError as the service said it, or service-unreachable."""

    def __init__(self, project: str | None = None, endpoint: Endpoint | None = None) -> None:
        self.endpoint, self.project = endpoint or find_endpoint(), project
        self._at = urlsplit(self.endpoint.url)
        if self._at.scheme not in ("http", "https") or not self._at.hostname:
            raise Usage(f"{self.endpoint.url!r} is no address of a service; write it as https://HOST:8470.")

    @property
    def host(self) -> str:
        return self._at.hostname or ""

    def get(self, path: str, **params: Any) -> Json:
        return self._ask("GET", path, params)

    def items(self, path: str, **params: Any) -> list[Json]:
        """All of a list, or as many as `limit` says."""
        answer = self.get(path, **params)
        found: list[Json] = answer["items"]
        while answer["next"] is not None and "limit" not in params:
            answer = self.get(path, **params | {"after": answer["next"]})
            found += answer["items"]
        return found

    def post(self, path: str, body: Json) -> Json:
        return self._ask("POST", path, {}, body)

    def begin(self, path: str, body: Json, *, again_after_s: Sequence[float] = _AGAIN_AFTER_S) -> Json:
        """A post that begins something, once: where no answer comes it is sent again under the same key (api/idempotency.py).

        Raises answer-lost where one of them may have begun it.
        """
        headers = {"Idempotency-Key": os.urandom(16).hex()}
        pauses = iter(again_after_s)
        may_have_begun = False
        while True:
            try:
                return self._ask("POST", path, {}, body, headers=headers)
            except RepaveError as error:
                if error.slug not in ("service-unreachable", "database-unavailable"):
                    raise
                may_have_begun |= error.slug == "service-unreachable" and not isinstance(error, NotSent)
                if (pause_s := next(pauses, None)) is None:
                    raise RepaveError("answer-lost", error.detail) if may_have_begun else error from None
                say(f"{error.detail or error.problem.title} Asking again; what has begun does not begin twice.")
                time.sleep(pause_s)

    def order(self, path: str, body: Json, params: Json) -> Json:
        """A post whose answer comes when all is done, which takes as long as an upload."""
        return self._ask("POST", path, params, body, answer_s=_UPLOAD_S)

    def patch(self, path: str, body: Json) -> Json:
        return self._ask("PATCH", path, {}, body)

    def delete(self, path: str) -> None:
        self._ask("DELETE", path, {})

    def upload(self, path: str, file: Any, params: Json, headers: dict[str, str]) -> Json:
        """`file` is open for reading."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(os.fstat(file.fileno()).st_size)} | headers
        return self._ask("POST", path, params, file, headers=headers, answer_s=_UPLOAD_S)

    def follow(self, after: int = 0, **params: Any) -> Iterator[Json]:
        """Events as they come (SSE), until the service ends the stream."""
        return self.follow_stream("/events", after, params)

    def follow_stream(self, path: str, after: int, params: Json) -> Iterator[Json]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._send("GET", path, params, headers=headers, answer_s=_STREAM_S) as answer:
            try:
                while line := answer.readline():
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
            except (OSError, HTTPException):
                raise RepaveError("service-unreachable", f"The stream from {self.endpoint.url} broke off.") from None

    def fetch(self, path: str, **params: Any) -> bytes:
        """A body that is no JSON."""
        return self._read(self._send("GET", path, params))

    def get_health(self) -> Json:
        """What the service says of itself, well or not; it needs no key."""
        return self._ask("GET", "/health", {}, taken=(503,))

    def ask(self, method: str, path: str, body: Json | None = None) -> Any:
        """Whatever this path answers, None for nothing: `path` begins at the service's root."""
        answer = self._send(method, path, {}, body, whole_path=True)
        text = self._read(answer)
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text.decode(errors="replace")

    def _ask(self, method: str, path: str, params: Json, body: Any = None, **how: Any) -> Json:
        text = self._read(self._send(method, path, params, body, **how))
        try:
            value = json.loads(text) if text else {}
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RepaveError("service-unreachable", f"{self.endpoint.url} gave an answer that is not ours.")
        return value

    def _read(self, answer: HTTPResponse) -> bytes:
        with answer:
            try:
                return answer.read()
            except (OSError, HTTPException):
                raise self._no_answer("broke off") from None

    def _no_answer(self, why: str, kind: type[RepaveError] = RepaveError) -> RepaveError:
        return kind("service-unreachable", f"No answer from {self.endpoint.url} ({why}).")

    def _send(
        self, method: str, path: str, params: Json, body: Any = None, *, headers: dict[str, str] | None = None, answer_s: float = _ANSWER_S,
        whole_path: bool = False, taken: tuple[int, ...] = (),
    ) -> HTTPResponse:  # fmt: skip
        """The answer, not read yet; redirects are not followed. `body`: an object, sent as JSON, or a file open for reading.

        `taken`: statuses beside 2xx that are an answer and no error.
        """
        sent = {"Connection": "close"} | ({"X-Auth-Token": self.endpoint.token} if self.endpoint.token else {})
        if isinstance(body, dict):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        given = {name: value for name, value in (params | ({"project": self.project} if self.project else {})).items() if value is not None}
        root = self._at.path.rstrip("/") + ("" if whole_path else "/repave/v1")
        query = ("&" if "?" in path else "?") + urlencode(given) if given else ""
        connection = self._connect()
        try:
            connection.connect()
        except (OSError, ValueError) as error:
            raise self._no_answer(type(error).__name__, NotSent) from None
        try:
            connection.sock.settimeout(answer_s)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent: the answer says why
                connection.request(method, f"{root}{path}{query}", body, sent | (headers or {}))
            answer = connection.getresponse()
        except (OSError, HTTPException, ValueError) as error:
            raise self._no_answer(type(error).__name__) from None
        if 200 <= answer.status < 300 or answer.status in taken:
            return answer
        raise _error_of(answer.status, self._read(answer))

    def _connect(self) -> HTTPConnection:
        host, port = self._at.hostname or "", self._at.port
        if self._at.scheme == "http":
            return HTTPConnection(host, port, timeout=_CONNECT_S)
        import ssl

        bundle = os.environ.get("REPAVE_CA")
        folder = bool(bundle) and os.path.isdir(bundle or "")
        context = ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
        return HTTPSConnection(host, port, timeout=_CONNECT_S, context=context)


def _error_of(status: int, text: bytes) -> RepaveError:
    try:
        value = json.loads(text)
    except ValueError:
        value = {}
    if isinstance(value, dict) and value.get("class") in CATALOGUE:
        return RepaveError.from_json(value)
    said = f": {value['error_code']} {value['error_msg']}" if isinstance(value, dict) and {"error_code", "error_msg"} <= value.keys() else "."
    slug = "service-unreachable" if status in _GATEWAY and said == "." else "internal" if status >= 500 else "bad-request"
    return RepaveError(slug, f"The service answered {status}{said}")
