# Apache-2.0 (see the LICENSE of Repave)
"""A Repave service, asked through its API /repave/v1."""

from __future__ import annotations

import json
import os
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode

from ansible.module_utils.urls import open_url

ARGUMENTS = {
    "endpoint": {"type": "str"},
    "token": {"type": "str", "no_log": True},
    "ca_path": {"type": "path"},
    "project": {"type": "str"},
}


class Refused(Exception):
    """What the service said. `problem` is its problem+json."""

    def __init__(self, status, problem):
        self.status, self.problem = status, problem
        super().__init__(" ".join(str(problem[name]) for name in ("title", "cause", "do") if problem.get(name)) or f"the service answered {status}")

    @property
    def kind(self):
        return self.problem.get("class", "")


class Service:
    """Raises Refused, or with status 0 where there is no answer."""

    def __init__(self, endpoint=None, token=None, ca_path=None, project=None, **_others):
        self.endpoint = (endpoint or os.environ.get("REPAVE_ENDPOINT") or "http://127.0.0.1:8470").rstrip("/")
        self.token, self.project = token or os.environ.get("REPAVE_TOKEN", ""), project
        self.ca_path = ca_path or os.environ.get("REPAVE_CA")

    def ask(self, method, path, body=None, headers=None, timeout=130, **params):
        """The answer's JSON; None where it has none. `body` is JSON, or an open file."""
        params = {name: value for name, value in {**params, "project": self.project}.items() if value is not None}
        url = f"{self.endpoint}/repave/v1{path}" + (f"?{urlencode(params)}" if params else "")
        sent = {"X-Auth-Token": self.token, **(headers or {})}
        if isinstance(body, dict):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            with open_url(
                url, data=body, headers=sent, method=method, timeout=timeout, ca_path=self.ca_path, use_proxy=False, follow_redirects="none"
            ) as answer:
                raw = answer.read()
        except HTTPError as error:
            raise Refused(error.code, _problem(error.read())) from None
        except (URLError, OSError) as error:
            raise Refused(0, {"title": f"No answer from {self.endpoint}.", "cause": str(getattr(error, "reason", error))}) from None
        return json.loads(raw) if raw else None

    def find(self, noun, name):
        """One server, image, batch; None where there is none."""
        try:
            return self.ask("GET", f"/{noun}/{quote(name, safe='')}")
        except Refused as refused:
            if refused.kind == "not-found":
                return None
            raise

    def list(self, noun):
        """All, page by page."""
        items, after = [], None
        while True:
            page = self.ask("GET", f"/{noun}", limit=500, after=after)
            items += page["items"]
            after = page["next"]
            if after is None:
                return items


def _problem(raw):
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
