"""The right to fetch chunks: `EXPIRY.RUN.MAC`, made by the service and checked without its database by whoever has the site's chunk key.

EXPIRY is in seconds since 1970, MAC is HMAC-SHA256 over `EXPIRY.RUN` in hex. It is a right to all chunks, not to those of one image: they are named by
what is in them, and who knows a name has read a manifest.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime


def render_chunk_token(key: bytes, run_id: str, expires_at: datetime) -> str:
    said = f"{int(expires_at.timestamp())}.{run_id}"
    return f"{said}.{_mac(key, said)}"


def find_token_run(key: bytes, token: str, *, now_s: float) -> str | None:
    """The run that the token was made for; None where it was not made with this key, or has expired."""
    said, _, mac = token.rpartition(".")
    expiry, _, run_id = said.partition(".")
    if not hmac.compare_digest(mac.encode("latin-1", "replace"), _mac(key, said).encode()):
        return None
    return run_id if now_s < int(expiry) else None


def _mac(key: bytes, said: str) -> str:
    return hmac.new(key, said.encode("latin-1", "replace"), hashlib.sha256).hexdigest()
