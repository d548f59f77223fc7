"""`Idempotency-Key`: a client that had no answer sends its request again, and nothing is begun twice.

The key and what it stands for are kept with the answer, in the transaction of the admission: so they hold over a crash and for all workers, a day
long (store/access.py). Of the request only a MAC under the site's key is kept: a bare hash would let whoever reads the database guess passwords.

Source: draft-ietf-httpapi-idempotency-key-header-07; the header of an answer that is given again is Stripe's.
"""

from __future__ import annotations

import json
import re

from repave.api.asgi import Incoming
from repave.domain.model import Credential
from repave.errors import RequestError
from repave.secrets import Sealer

HEADER = "Idempotency-Key"
REPLAYED = {"Idempotent-Replayed": "true"}
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def name_request(sent: Incoming, credential: Credential, sealer: Sealer) -> dict[str, str]:
    """The name under which the answer is kept, and the MAC of the request; {} without the header. Raises RequestError bad-request."""
    keys = sent.presented.values(HEADER.lower())
    if not keys:
        return {}
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise RequestError("bad-request", f"{HEADER}: must be one, of 1 to 255 printable characters without blanks.", field=HEADER)
    whose = json.dumps([credential.id, credential.project_id, keys[0]])
    asked = sent.presented
    what = json.dumps([asked.method, asked.raw_path.decode("latin-1"), asked.raw_query.decode("latin-1"), asked.body_sha256])
    return {f"key:{sealer.authenticate(whose, about='idempotency-key')}": sealer.authenticate(what, about="idempotent-request")}
