"""What is shown of machines' talk: readable text without a run's secrets. Pure.

Two nets. What the run knows as secret is masked however it is written down; and what looks like a secret by its shape is masked whoever's it is.
"""

from __future__ import annotations

import base64
import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

MASK = "***"
_SHORTEST = 6  # a shorter secret would mask ordinary words
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")  # ECMA-35 and 48: CSI, OSC, all others
_UNPRINTABLE = re.compile(r"[^\n\t -~\xa0-\ud7ff\ue000-\U0010ffff]")
_SHAPES = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
    # A line of a PEM body, where its beginning came in an earlier piece; a digest in hex is none.
    re.compile(r"^[ \t]*(?!(?:[0-9a-f]{64}|[0-9a-f]{128})[ \t]*$)[A-Za-z0-9+/]{60,}={0,2}[ \t]*$", re.M),
    re.compile(r"\$(?:1|2[aby]|5|6|y|gy|7)\$[./0-9A-Za-z$=,]{20,}"),  # crypt(5)
    re.compile(r"\b\d{10}\.[0-9a-f-]{36}\.[0-9a-f]{64}\b"),  # the right to fetch chunks (images/chunk_token.py)
    re.compile(r"(?i)(?<=authorization: )[^\r\n]+"),
    re.compile(r"\bBearer\s+[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)(?<=password=)[^\s&\"']+"),
    re.compile(r"(?<=://)[^/\s:@\"]*:[^\s@\"]+(?=@)"),  # a login in a URL
)
_MEDIA = re.compile(r"(/media/[^/\s\"]+/)[^/\s\"]+")  # boot media's path: whoever knows it may fetch them
_SECRET_NAMES = ("password", "passwd", "token", "secret", "nonce", "authorization", "privatekey", "credential")


class Redactor:
    """Masks what one run must not show."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = {needle for secret in secrets if len(secret) >= _SHORTEST for needle in _writings(secret)}
        self._needles = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None

    def clean(self, text: str) -> str:
        """Lines of printable text, no secret in them."""
        text = _UNPRINTABLE.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")).replace("\r", "\n"))
        if self._needles is not None:
            text = self._needles.sub(MASK, text)
        for shape in _SHAPES:
            text = shape.sub(MASK, text)
        return _MEDIA.sub(rf"\1{MASK}", text)

    def clean_json(self, value: Any) -> Any:
        """The same for a JSON value; a field whose name says secret is masked whatever it holds."""
        if isinstance(value, dict):
            return {self.clean(str(k)): MASK if v and is_secret_name(str(k)) else self.clean_json(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.clean_json(v) for v in value]
        return self.clean(value) if isinstance(value, str) else value


def is_secret_name(name: str) -> bool:
    return any(word in name.lower().replace("_", "").replace("-", "") for word in _SECRET_NAMES)


def _writings(secret: str) -> set[str]:
    """The secret as it may stand in a text: as it is, in hex, in a URL, in JSON, in base64 wherever it begins in what was encoded."""
    raw = secret.encode()
    found = {secret, raw.hex(), raw.hex().upper(), urllib.parse.quote(secret, safe=""), secret.replace("\\", "\\\\").replace('"', '\\"')}
    for shift in range(3):
        inner = base64.b64encode(b"\0" * shift + raw)[(0, 2, 3)[shift] :]
        inner = inner[: len(inner) - (0, 3, 2)[(len(raw) + shift) % 3]]
        found |= {inner.decode(), inner.translate(bytes.maketrans(b"+/", b"-_")).decode()}
    return {needle for needle in found if len(needle) >= _SHORTEST}
