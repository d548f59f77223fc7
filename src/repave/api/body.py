"""Strict JSON bodies: what `PUT .../reinstall` may carry, and nothing read into it that is not there.

Pure. Faults name the field and the rule, never the value: one of the values is a password.
Source: clouddc-api.md 2.1 (ReinstallOS, 2025-07-25) and section 10, "Passwords", "Ids and images", "Body".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from repave.api.wire_errors import WireError, bad_value, missing
from repave.workflow.fleet import MAX_BATCH

MAX_BODY_BYTES = 64 * 1024  # fifty ids and a password are 2 KiB
MAX_DEPTH = 32  # our shapes have two levels; unknown fields may have some more
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True)
class ReinstallOptions:
    """A valid request, apart from what only the store knows. `image_id` None = the current image of each instance."""

    instance_ids: tuple[str, ...]
    image_id: str | None
    password: str = field(repr=False)


def check_content_type(content_types: Sequence[str], content_encodings: Sequence[str]) -> None:
    """Returns for JSON in UTF-8, or where nothing is said. Raises WireError 415."""
    if any(encoding.lower() not in ("", "identity") for encoding in content_encodings):
        raise WireError(415, "iMetal.0001", "A request parameter contains invalid or unsupported value: Content-Encoding (send the body as it is)")
    for content_type in content_types:
        kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
        charsets = [p.partition("=")[2].strip('"') for p in parameters if p.startswith("charset=")]
        if kind not in ("application/json", "") or any(charset not in ("utf-8", "utf8") for charset in charsets):
            raise WireError(415, "iMetal.0001", "A request parameter contains invalid or unsupported value: Content-Type (application/json in UTF-8)")


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8 (RFC 8259), without what parsers disagree on. Raises WireError 400."""
    if not raw.strip():
        raise missing("body")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise bad_value("body", f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # not UTF-8, a byte order mark, not JSON, an endless number
        raise bad_value("body", "not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise bad_value("body", "not a JSON object")
    _check_depth(value)
    return value


def parse_reinstall(raw: bytes) -> ReinstallOptions:
    """The options of a reinstall; unknown fields are ignored. Raises WireError 400, missing fields first."""
    body = parse_json_object(raw)
    absent = [name for name in ("password", "instance_id_set") if body.get(name) is None]
    if body.get("instance_id_set") == []:
        absent.append("instance_id_set")  # a destructive call never defaults to "all" (design.md 15)
    if absent:
        raise missing(*absent)
    if not isinstance(body["password"], str):
        raise bad_value("password", "not a string")
    return ReinstallOptions(_ids(body["instance_id_set"]), _image_id(body.get("image_id")), body["password"])


def _ids(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise bad_value("instance_id_set", "not a list")
    if len(value) > MAX_BATCH:
        raise bad_value("instance_id_set", f"more than {MAX_BATCH} ids")
    if not all(isinstance(item, str) and UUID.fullmatch(item) for item in value):
        raise bad_value("instance_id_set", "an id is not a lower-case UUID")
    if len(set(value)) != len(value):
        raise bad_value("instance_id_set", "an id is there twice")
    return tuple(value)


def _image_id(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise bad_value("image_id", "not a string")
    if not UUID.fullmatch(value):
        raise bad_value("image_id", "there is no such image")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise bad_value("body", "a key is there twice")
    return dict(pairs)


def _refuse_constant(_: str) -> NoReturn:
    raise bad_value("body", "NaN and Infinity are not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise bad_value("body", f"nested deeper than {MAX_DEPTH} levels")
