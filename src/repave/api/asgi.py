"""Around every route: the request id, the body and its cap, the last word on errors, and what HTTP itself must refuse.

`install_wire` puts it around an app; `WireProtocol` goes under it, into uvicorn (`http=WireProtocol`). Order of a request:
WireProtocol (malformed HTTP, endless headers) -> WireMiddleware (id, body) -> router -> route -> error map.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import traceback
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from repave.agent.protocol import ASK_HEADER
from repave.api.body import MAX_BODY_BYTES
from repave.api.wire_errors import WireError, answer_for, from_status
from repave.auth import Presented
from repave.errors import RepaveError, RequestError
from repave.store.database import OF_THE_STORE, is_damage, is_unavailable

BODY_TIMEOUT_S = 60.0  # 64 KiB in a minute: slower than any link that works
MAX_HEADER_BYTES = 64 * 1024
MAX_DRAIN_BYTES = 16 * 1024 * 1024  # a too large body is read to its end up to here, so that the client can read its 413
_log = structlog.get_logger("repave.wire")

STREAMED = frozenset({("POST", "/repave/v1/images")})  # these routes read the body themselves, without our cap


@dataclass(frozen=True)
class Incoming:
    """What the middleware knows of a request; `incoming(request)` gives it to a route."""

    request_id: str
    presented: Presented
    body: bytes  # empty where streamed or too large
    too_large: bool = False


def incoming(request: Request) -> Incoming:
    found: Incoming = request.state.incoming
    return found


def install_wire(app: FastAPI) -> None:
    """The app answers every request as the wire wants it. Call once, before the app starts."""
    app.router.redirect_slashes = False  # a trailing slash is another path: 404
    app.add_middleware(WireMiddleware)

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RepaveError | WireError)
        return answer_for(request.url.path, error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return answer_for(request.url.path, from_status(error.status_code, error.headers))

    async def on_invalid(request: Request, error: Exception) -> Response:
        # Names of fields and rules only: FastAPI's own answer repeats the input, passwords included.
        assert isinstance(error, RequestValidationError)
        faults = [f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'body'}: {fault['type']}" for fault in error.errors()]
        return answer_for(request.url.path, RequestError("bad-request", "; ".join(faults), field=faults[0].partition(":")[0]))

    async def on_store(request: Request, error: Exception) -> Response:
        if not is_unavailable(error):
            raise error
        return answer_for(request.url.path, fault_of(error, incoming(request).request_id))

    for of_the_store in OF_THE_STORE:
        app.add_exception_handler(of_the_store, on_store)
    for kind in (RepaveError, WireError):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)


def fault_of(error: Exception, request_id: str) -> RepaveError:
    """What is said of an error that no route foresaw. The log has it, under the request's id."""
    if is_unavailable(error):
        _log.error("database not available", request_id=request_id, error=type(error).__name__)
        return RepaveError("database-corrupt" if is_damage(error) else "database-unavailable")
    # Where, not what: an exception's text may hold a value of the request.
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]
    _log.error("request failed", request_id=request_id, error=type(error).__name__, where=where)
    return RepaveError("internal")


class WireMiddleware:
    """Gives each request an id of ours and its whole body (or the reason why not); turns a bug into a 500 that says nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started = secrets.token_hex(16), False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id  # a client's own is never repeated
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            what, receive = await self._read(scope, receive, request_id)
            scope.setdefault("state", {}).update(incoming=what, presented=what.presented)
            await self.app(scope, receive, send_marked)
        except WireError as refused:
            await answer_for(scope["path"], refused)(scope, receive, send_marked)
        except Exception as error:
            fault = fault_of(error, request_id)
            if started:
                raise ConnectionAbortedError(f"request {request_id} failed while answering") from None
            await answer_for(scope["path"], fault)(scope, receive, send_marked)

    async def _read(self, scope: Scope, receive: Receive, request_id: str) -> tuple[Incoming, Receive]:
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        names = [name for name, _ in headers]
        if scope["http_version"] == "1.1" and names.count(b"host") != 1:
            raise from_status(400, {"Connection": "close"})
        request = (scope["method"], scope["raw_path"], scope["query_string"], headers)
        if (scope["method"], scope["path"]) in STREAMED:
            return Incoming(request_id, Presented(*request, body_sha256=None), b""), receive
        body, sha256 = await _read_body(receive)
        too_large = body is None
        what = Incoming(request_id, Presented(*request, body_sha256=sha256), body or b"", too_large)
        return what, _replay(body, receive)


async def _read_body(receive: Receive) -> tuple[bytes | None, str]:
    """The body, None where it is too large, and the hash of all of it: who sent it is known even then."""
    digest, kept, size, more = hashlib.sha256(), bytearray(), 0, True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise from_status(400, {"Connection": "close"})
                chunk, more = message.get("body", b""), message.get("more_body", False)
                digest.update(chunk)
                size += len(chunk)
                if size > MAX_DRAIN_BYTES:
                    raise from_status(413, {"Connection": "close"})
                if size <= MAX_BODY_BYTES:
                    kept += chunk
    except TimeoutError:
        raise from_status(408, {"Connection": "close"}) from None
    return (bytes(kept) if size <= MAX_BODY_BYTES else None), digest.hexdigest()


def _replay(body: bytes | None, receive: Receive) -> Receive:
    """A `receive` that gives the body once more; asking for one that was too large is a 413."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        if body is None:
            raise HTTPException(413)
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class BodyLimit:
    """A cap and nothing else, for listeners that speak other shapes: 413 as soon as one byte too many is announced or there."""

    def __init__(self, app: ASGIApp, *, limit_bytes: int) -> None:
        self.app, self.limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit_bytes:
                raise HTTPException(413, headers={"Connection": "close"})
            return message

        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(announced) > self.limit_bytes:  # the parser let digits through only
            await from_status(413, {"Connection": "close"}).answer()(scope, receive, send)
        else:
            await self.app(scope, counted, send)


class EchoAsk:
    """Each answer has what its request had in ASK_HEADER: an agent takes no other run's "you may write" for its own (agent/protocol.py).

    But for the 500 of a bug, which is none to the agent anyway.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._name = app, ASK_HEADER.lower().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = [(name, value) for name, value in scope.get("headers", ()) if name == self._name]

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *asked]
            await send(message)

        await self.app(scope, receive, send_marked)


class WireProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol, which has neither a limit nor a deadline for headers, with both (uvicorn 0.54)."""

    header_timeout_s = 30.0  # section 10, "HTTP": cut off within 60 s
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_message = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and not self._in_message:
            self._await_headers()  # the next request of a kept connection
        if self._deadline is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._deadline is not None and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("Headers too large")

    def on_message_begin(self) -> None:
        self._in_message = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        self._headers_are_there()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Like every error: JSON, a code and a request id. Malformed HTTP has no route, hence no other words."""
        body = from_status(400).answer().body
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {secrets.token_hex(16)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + bytes(body))
        self.transport.close()

    def _await_headers(self) -> None:
        self._header_bytes = 0
        self._deadline = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _headers_are_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
