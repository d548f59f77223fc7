"""A person without a browser: pages, forms and cookies by hand, to look at what goes over the wire and to send what no page of ours would."""

from __future__ import annotations

import re
from typing import Any

import requests
from scene import PERSON_PASSWORD


class Person:
    def __init__(self, url: str) -> None:
        self.url, self.session = url, requests.Session()
        self.session.trust_env = False

    def get(self, path: str, **how: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=20, allow_redirects=False, **how)

    def post(self, path: str, fields: dict[str, Any], **how: Any) -> requests.Response:
        return self.session.post(self.url + path, data=fields, timeout=20, allow_redirects=False, **how)

    def form_token(self, path: str) -> str:
        found = re.search(r'name="form" value="([0-9a-f.-]+)"', self.get(path).text)
        assert found, path
        return found.group(1)

    def log_in(self, name: str = "ann", password: str = PERSON_PASSWORD, **fields: str) -> requests.Response:
        return self.post("/login", {"form": self.form_token("/login"), "name": name, "password": password} | fields)

    def send(self, path: str, fields: dict[str, Any], *, page: str = "/") -> requests.Response:
        """As a form of `page` would."""
        return self.post(path, {"form": self.form_token(page)} | fields)
