"""The operator API, asked by the command line like anyone else would. Where and as whom:

1. REPAVE_ENDPOINT (default http://127.0.0.1:8470) with REPAVE_TOKEN; REPAVE_CA names a CA bundle for https
2. .repave/lab.json here: the virtual rack
3. admin.json of the site in REPAVE_SITE, or here: what `repave init` wrote
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from repave.cli.output import Json
from repave.errors import CATALOGUE, RepaveError

DEFAULT_ENDPOINT = "http://127.0.0.1:8470"
LAB_FILE = Path(".repave/lab.json")
ADMIN_FILE = "admin.json"
_TIMEOUT_S = (5, 120)  # connecting; an answer (adding a server waits for its BMC)
_UPLOAD_TIMEOUT_S = 8 * 3600  # the answer comes when the image is fetched (six hours at most) and stored; /imports tells how far it is


@dataclass(frozen=True)
class Endpoint:
    url: str
    token: str


def find_endpoint() -> Endpoint:
    for path in (LAB_FILE, Path(os.environ.get("REPAVE_SITE", ".")) / ADMIN_FILE):
        if "REPAVE_TOKEN" in os.environ:
            break
        if path.is_file() and os.access(path, os.R_OK):
            found = json.loads(path.read_text())
            return Endpoint(os.environ.get("REPAVE_ENDPOINT", found["endpoint"]), found["token"])
    return Endpoint(os.environ.get("REPAVE_ENDPOINT", DEFAULT_ENDPOINT), os.environ.get("REPAVE_TOKEN", ""))


class Client:
    """Asks; raises RepaveError as the service said it, or service-unreachable."""

    def __init__(self, project: str | None = None, endpoint: Endpoint | None = None) -> None:
        self.endpoint, self.project = endpoint or find_endpoint(), project
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy, no .netrc: the token goes to the endpoint only
        self.session.verify = os.environ.get("REPAVE_CA", True)
        if self.endpoint.token:
            self.session.headers["X-Auth-Token"] = self.endpoint.token

    def get(self, path: str, **params: Any) -> Json:
        return self._ask("GET", path, params)

    def items(self, path: str, **params: Any) -> list[Json]:
        found: list[Json] = self.get(path, **params)["items"]
        return found

    def post(self, path: str, body: Json) -> Json:
        return self._ask("POST", path, {}, json=body)

    def order(self, path: str, body: Json, params: Json) -> Json:
        """A post whose answer comes when all is done, which takes as long as an upload."""
        return self._ask("POST", path, params, json=body, timeout=(5, _UPLOAD_TIMEOUT_S))

    def patch(self, path: str, body: Json) -> Json:
        return self._ask("PATCH", path, {}, json=body)

    def delete(self, path: str) -> None:
        self._ask("DELETE", path, {})

    def upload(self, path: str, file: Any, params: Json, headers: dict[str, str]) -> Json:
        """`file` is open for reading."""
        headers = {"Content-Type": "application/octet-stream"} | headers
        return self._ask("POST", path, params, data=file, headers=headers, timeout=(5, _UPLOAD_TIMEOUT_S))

    def follow(self, after: int = 0, **params: Any) -> Iterator[Json]:
        """Events as they come (SSE), until the service ends the stream."""
        return self.follow_stream("/events", after, params)

    def follow_stream(self, path: str, after: int, params: Json) -> Iterator[Json]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._send("GET", path, params, headers=headers, stream=True, timeout=(5, 60)) as answer:
            try:
                for line in answer.iter_lines(chunk_size=1):
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
            except requests.RequestException:
                raise RepaveError("service-unreachable", f"The stream from {self.endpoint.url} broke off.") from None

    def fetch(self, path: str, **params: Any) -> bytes:
        """A body that is no JSON."""
        return self._send("GET", path, params).content

    def _ask(self, method: str, path: str, params: Json, **how: Any) -> Json:
        answer = self._send(method, path, params, **how)
        try:
            value = answer.json() if answer.content else {}
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RepaveError("service-unreachable", f"{self.endpoint.url} gave an answer that is not ours.")
        return value

    def _send(self, method: str, path: str, params: Json, **how: Any) -> requests.Response:
        if self.project:
            params = params | {"project": self.project}
        url = f"{self.endpoint.url.rstrip('/')}/repave/v1{path}"
        try:
            answer = self.session.request(method, url, params=params, allow_redirects=False, **({"timeout": _TIMEOUT_S} | how))
        except requests.RequestException as error:
            raise RepaveError("service-unreachable", f"No answer from {self.endpoint.url} ({type(error).__name__}).") from None
        if answer.ok:
            return answer
        raise _error_of(answer)


def _error_of(answer: requests.Response) -> RepaveError:
    try:
        value = answer.json()
    except ValueError:
        value = {}
    if isinstance(value, dict) and value.get("class") in CATALOGUE:
        return RepaveError.from_json(value)
    return RepaveError("internal" if answer.status_code >= 500 else "bad-request", f"The service answered {answer.status_code}.")
