"""SDK-HMAC-SHA256: is this request signed by the owner of this key pair?

Pure: bytes and the time in, nothing or SignatureRefused out. Key lookup and roles are `auth/__init__.py`'s.
Source: clouddc-api.md 5.2 (Huawei signing guide; SDK core signer/signer.py) and section 10, "Authentication".
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, quote, unquote

ALGORITHM = "SDK-HMAC-SHA256"
MAX_SKEW = timedelta(minutes=15)  # Huawei signing guide, api-sign-provide01
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

# A space and no comma after the algorithm; comma and space between the three parts. Upper-case hex is refused (section 10).
_AUTHORIZATION = re.compile(r"SDK-HMAC-SHA256 Access=([!-+\--~]{1,128}), ?SignedHeaders=([!-+\--~]+), ?Signature=([0-9a-f]{64})")
_DATE = re.compile(r"[0-9]{8}T[0-9]{6}Z")


class SignatureRefused(Exception):
    """The reason, fit for the client: it never says whether the key exists."""


@dataclass(frozen=True)
class Presented:
    """A request as it came over the wire; nothing decoded, nothing normalised.

    Shapes: header names in lower case, in the order they came. `body_sha256` None = the body is a stream that nobody has read.
    """

    method: str
    raw_path: bytes
    raw_query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body_sha256: str | None = EMPTY_SHA256

    def values(self, name: str) -> list[str]:
        """All values of a header. The SDK signs UTF-8 and sends it as latin-1: those are the same bytes."""
        found = (value for header, value in self.headers if header == name.encode())
        return [_decoded(value).strip() for value in found]

    @property
    def sends_json(self) -> bool:
        """True also where no content type says otherwise (section 10, "Body"), as an empty one or mere parameters do not."""
        kinds = [value.partition(";")[0].strip().lower() for value in self.values("content-type")]
        return not any(kinds) or any(kind.startswith(("application/json", "application/bson")) for kind in kinds)


@dataclass(frozen=True)
class Authorization:
    """The three parts of the header, as sent."""

    ak: str
    signed_headers: tuple[str, ...]
    signature: str


def parse_authorization(value: str) -> Authorization:
    """Raises SignatureRefused for another scheme or shape."""
    match = _AUTHORIZATION.fullmatch(value)
    if match is None:
        raise SignatureRefused("the Authorization header is not of the form SDK-HMAC-SHA256 Access=..., SignedHeaders=..., Signature=...")
    ak, names, signature = match.groups()
    return Authorization(ak, tuple(names.split(";")), signature)


def verify_signature(request: Presented, authorization: Authorization, sk: str, *, now: datetime) -> None:
    """Returns when the signature is the owner's and fresh, over the raw path and the real body. Raises SignatureRefused."""
    date = _verify_date(request, now)
    if "x-sdk-date" not in authorization.signed_headers:
        raise SignatureRefused("X-Sdk-Date is not among the signed headers")
    to_sign = "\n".join((ALGORITHM, date, hashlib.sha256(canonical_request(request, authorization).encode()).hexdigest()))
    expected = hmac.new(sk.encode(), to_sign.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, authorization.signature):
        raise SignatureRefused("the signature does not match")


def canonical_request(request: Presented, authorization: Authorization) -> str:
    """The six lines that are signed (5.2, rules 1 to 6)."""
    names = authorization.signed_headers
    if list(names) != sorted(set(names)) or any(name != name.lower() for name in names):
        raise SignatureRefused("SignedHeaders must be lower-case, sorted and distinct")
    lines = []
    for name in names:
        values = request.values(name)
        if len(values) != 1:
            raise SignatureRefused("a signed header is missing or sent twice")
        lines.append(f"{name}:{values[0]}\n")
    return "\n".join((
        request.method, _canonical_path(request.raw_path), _canonical_query(request.raw_query),
        "".join(lines), ";".join(names), _payload_hash(request),
    ))  # fmt: skip


def replay_key(request: Presented, authorization: Authorization) -> str:
    """Names one signed request: the same for each copy of it, different for every other."""
    parts = (authorization.ak, authorization.signature, *request.values("x-sdk-date"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _verify_date(request: Presented, now: datetime) -> str:
    dates = request.values("x-sdk-date")
    if len(dates) != 1 or not _DATE.fullmatch(dates[0]):
        raise SignatureRefused("one X-Sdk-Date of the form 20260102T030405Z is needed")
    try:
        at = datetime.strptime(dates[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise SignatureRefused("X-Sdk-Date is not a date") from None
    if abs(now - at) > MAX_SKEW:
        raise SignatureRefused("X-Sdk-Date is more than 15 minutes from this server's clock")
    return dates[0]


def _canonical_path(raw_path: bytes) -> str:
    """Decoded, each part encoded again, ending in `/` whether or not the request does. Units: `%2F` becomes a separator (5.2 rule 2)."""
    parts = unquote(_decoded(raw_path)).split("/")
    path = "/".join(quote(part, safe="~") for part in parts)
    return path if path.endswith("/") else path + "/"


def _canonical_query(raw_query: bytes) -> str:
    """Decoded and encoded anew, so that an unusual spelling is accepted (section 10)."""
    pairs = sorted(parse_qsl(_decoded(raw_query), keep_blank_values=True))
    return "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in pairs)


def _payload_hash(request: Presented) -> str:
    """The hash of the real body, whatever the header claims; UNSIGNED-PAYLOAD only where the body is not JSON (5.2 rule 6)."""
    claimed = request.values("x-sdk-content-sha256")
    if len(claimed) > 1:
        raise SignatureRefused("X-Sdk-Content-Sha256 is sent twice")
    if claimed == [UNSIGNED_PAYLOAD]:
        if request.sends_json and request.body_sha256 != EMPTY_SHA256:
            raise SignatureRefused("a JSON body must be signed")
        return UNSIGNED_PAYLOAD
    if request.body_sha256 is None:
        raise SignatureRefused("a streamed body needs X-Sdk-Content-Sha256: UNSIGNED-PAYLOAD or a token")
    if claimed and claimed[0] != request.body_sha256:
        raise SignatureRefused("X-Sdk-Content-Sha256 is not the hash of the body")
    return request.body_sha256


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
