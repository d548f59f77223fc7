"""Who wants to be told is told: Standard Webhooks, signed (https://github.com/standard-webhooks/standard-webhooks, spec 1.0).

At least once, and in order for each hook: an event is sent again, after 5 seconds and later each time, until the receiver takes it, and none overtakes it.
What is still to be sent is what the audit has behind the hook's cursor (store/webhooks.py), so a crash loses nothing, and any worker goes on. Not as
workflows of DBOS: a run's version of code must not hold up an upgrade for the sake of a message, and a queue would be a second truth beside the audit.
`webhook-id` is the same each time an event is sent: by it a receiver knows what it has seen.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi.encoders import jsonable_encoder

from repave.api.batch_views import batch_json
from repave.api.operator.events import event_json
from repave.domain.model import Event, Webhook
from repave.errors import RepaveError
from repave.outbound import AddressRefused, OutboundConnection
from repave.store import Store

TIMEOUT_S = 10.0  # without a byte
DELIVERY_S = 25.0  # in all: its name and its connection take TIMEOUT_S each at most, and from there on it can be cut
CLAIM_S = 60.0  # above all that one delivery may take
LOOK_S = 1.0
TURN_S = 5.0  # then who has more to tell goes to the end of the line
AT_ONCE = 8  # hooks
AT_ONCE_OF_PROJECT = 2  # whose receivers are slow waits for their own
AT_ONCE_IN_TROUBLE = 4  # whose receiver did not answer the last time; the rest is for those that do

log = structlog.get_logger()


class WebhookSender:
    """Tells, for as long as `running` lasts."""

    def __init__(self, store: Store, *, local_addresses: bool) -> None:
        self._store, self._local_addresses = store, local_addresses
        self._stop = threading.Event()
        self._looked: dict[str, int] = {}  # by hook: there is nothing for it up to this seq
        self._busy: dict[str, Webhook] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look_forever, name="webhooks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(timeout=1)  # a delivery under way is not waited for: it is done again in the next life

    def look(self) -> None:
        """Each hook that is due and has something to be told is told it, in a thread of its own, as far as there is room. Who waits longest goes first."""
        last = self._store.webhooks.read_last_seq()  # before the look: what comes meanwhile is looked for again
        for hook in self._store.webhooks.list_due():
            if self._looked.get(hook.id, -1) < last and self._has_room_for(hook) and not self._stop.is_set() and self._find_next(hook, last):
                self._busy[hook.id] = hook
                threading.Thread(target=self._tell_all, args=(hook,), name="webhook", daemon=True).start()

    def _has_room_for(self, hook: Webhook) -> bool:
        busy = list(self._busy.values())
        return (
            hook.id not in self._busy
            and len(busy) < AT_ONCE
            and sum(other.project_id == hook.project_id for other in busy) < AT_ONCE_OF_PROJECT
            and (hook.tries == 0 or sum(other.tries > 0 for other in busy) < AT_ONCE_IN_TROUBLE)
        )

    def send_test(self, hook: Webhook) -> None:
        """A `webhook.test` was taken. Raises RepaveError webhook-failed."""
        now = self._store.now()
        if why := self._send(hook, f"msg_test_{secrets.token_hex(16)}", "webhook.test", now, {"webhook": hook.name}):
            raise RepaveError("webhook-failed", f"{hook.host}: {why}.")

    def _tell_all(self, hook: Webhook) -> None:
        turn_ends_at = time.monotonic() + TURN_S
        try:
            while not self._stop.is_set() and time.monotonic() < turn_ends_at:
                if (event := self._find_next(hook, self._store.webhooks.read_last_seq())) is None:
                    return
                if not self._store.webhooks.claim(hook, seconds=CLAIM_S):
                    return  # another worker does it
                message_id = f"msg_{hashlib.sha256(f'{hook.id}:{event.seq}:{event.at.isoformat()}'.encode()).hexdigest()[:32]}"
                why = self._send(hook, message_id, event.type, event.at, self._say(event))
                if why is not None:
                    if hook.tries == 0:  # later ones say nothing new
                        log.warning("webhook not taken; it is sent again", webhook=hook.name, seq=event.seq, why=why)
                    self._store.webhooks.record_trouble(hook, why)
                    return
                self._store.webhooks.record_delivered(hook, event.seq)
                again = self._store.webhooks.find_webhook(hook.project_id, hook.id)
                if again is None:
                    return
                hook = again
        except Exception as error:  # the next look may do better; a sender that died would be silence
            log.warning("webhook: no delivery", webhook=hook.name, error=type(error).__name__)
        finally:
            self._busy.pop(hook.id, None)

    def _find_next(self, hook: Webhook, last: int) -> Event | None:
        """The next event for it. `last`: the newest there was before."""
        event = self._store.webhooks.find_next_event(hook, self._looked.get(hook.id, 0))
        if event is None:
            self._looked[hook.id] = last
        return event

    def _say(self, event: Event) -> dict[str, Any]:
        """What /events shows of it; of a batch that ended what it came to."""
        server = self._store.servers.find_server(event.project_id, event.server_id) if event.server_id else None
        said = event_json(event, {server.id: server.name} if server else {})
        if event.type == "batch.ended" and event.batch_id and (batch := self._store.runs.find_batch(event.project_id, event.batch_id)):
            image = self._store.images.find_image(event.project_id, batch.image_id or "")
            shown = batch_json(batch, self._store.runs.list_runs(batch_id=batch.id), image.name if image else None)
            said |= {name: shown[name] for name in ("state", "counts", "image", "created_by", "rehearse", "stopped")}
        return said

    def _send(self, hook: Webhook, message_id: str, type_: str, at: datetime, data: dict[str, Any]) -> str | None:
        """None: taken (2xx). Else why not, without the URL."""
        url, secret = self._store.webhooks.get_target(hook)
        if hook.shape == "slack":
            body = json.dumps({"text": render_slack(type_, data)}).encode()
        else:
            body = json.dumps(jsonable_encoder({"type": type_, "timestamp": at, "data": data})).encode()
        sent_at = str(int(self._store.now().timestamp()))
        headers = {
            "Content-Type": "application/json", "User-Agent": "repave", "webhook-id": message_id, "webhook-timestamp": sent_at,
            "webhook-signature": sign(secret, message_id, sent_at, body),
        }  # fmt: skip
        return post(url, body, headers, local_addresses=self._local_addresses)

    def _look_forever(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:
                log.warning("webhooks: no look", error=type(error).__name__)


def sign(secret: str, message_id: str, sent_at: str, body: bytes) -> str:
    """The header `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return f"v1,{base64.b64encode(hmac.digest(key, f'{message_id}.{sent_at}.'.encode() + body, 'sha256')).decode()}"


def post(url: str, body: bytes, headers: dict[str, str], *, local_addresses: bool) -> str | None:
    """None where the receiver took it. Redirects are not followed, and nothing of the answer but its status is read."""
    parts = urlsplit(url)
    default = 443 if parts.scheme == "https" else 80
    connection = OutboundConnection(parts.hostname or "", parts.port or default, parts.scheme, local_addresses, timeout_s=TIMEOUT_S)
    timer = threading.Timer(DELIVERY_S, connection.cut)
    timer.daemon = True
    timer.start()  # it can be cut however slowly it drips
    try:
        connection.connect()
        connection.request("POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, {"Host": parts.netloc, **headers})
        status = connection.getresponse().status
    except AddressRefused as refused:
        return f"its address is {refused}, which the setting webhook_local_addresses does not allow"
    except TimeoutError:
        return f"no answer in {TIMEOUT_S:.0f} seconds"
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        return f"it can not be reached ({type(error).__name__})"
    finally:
        timer.cancel()
        connection.close()
    return None if 200 <= status < 300 else f"it answered {status}"


def render_slack(type_: str, data: dict[str, Any]) -> str:
    """One line, as Slack and its like want it (`&`, `<` and `>` are theirs)."""
    match type_:
        case "batch.ended":
            counts = ", ".join(f"{n} {name}" for name, n in data.get("counts", {}).items() if n)
            text = f"Batch {data['batch']} {data.get('state', 'ended')}: {counts} ({data.get('image') or 'current images'}, by {data.get('created_by')})"
        case "run.ended":
            error = data.get("error")
            text = f"{data.get('server', data.get('run'))}: {data.get('outcome')}" + (f". {error['title']} {error['cause']} {error['do']}" if error else "")
        case "run.late":
            usual = data.get("usual_s")
            text = f"{data.get('server', data.get('run'))} is late: {data.get('step')} takes {data.get('seconds')} s" + (
                f", usually {usual:.0f}" if usual else ""
            )
        case _:
            text = f"Repave: {type_} {data.get('webhook', '')}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
