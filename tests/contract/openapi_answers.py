"""Each answer of our own routes held against openapi.json: what the document does not have, the route may not say, and the other way round."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import requests

Json = dict[str, Any]


@dataclass
class Document:
    content: Json

    def check(self, method: str, path: str, answer: requests.Response) -> None:
        """The answer is one that the document has. A path that it does not have is not looked at; nor a stream."""
        operation = self.find(method, path)
        kind = answer.headers.get("content-type", "").partition(";")[0]
        if operation is None or kind == "text/event-stream":
            return
        said = operation["responses"].get(str(answer.status_code)) or operation["responses"].get("default")
        assert said is not None, f"{method} {path}: {answer.status_code} is not in the document"
        content = said.get("content", {})
        assert (kind in content) if answer.content else not content, f"{method} {path}: {answer.status_code} {kind!r}, not {sorted(content)}"
        if content and kind.endswith("json"):
            validator = jsonschema_rs.Draft202012Validator(content[kind]["schema"] | {"components": _closed(self.content["components"])})
            faults = [f"{'/'.join(map(str, fault.instance_path))}: {fault.message}" for fault in validator.iter_errors(answer.json())]
            assert not faults, f"{method} {path}: {faults[:3]}"

    def find(self, method: str, path: str) -> Json | None:
        paths = sorted(self.content["paths"].items(), key=lambda each: each[0].count("{"))  # /servers before /{reference}
        for template, operations in paths:
            if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), path) and method.lower() in operations:
                return operations[method.lower()]
        return None


def _closed(components: Json) -> Json:
    """The schemas with all that they do not name refused."""
    schemas = components["schemas"]
    return {"schemas": {name: {"additionalProperties": False} | schema if "properties" in schema else schema for name, schema in schemas.items()}}
