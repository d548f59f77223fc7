"""The agent's own HTTP: every answer is the body that was meant, or no answer. Against a socket that says what the test wants."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from repave.agent.http_client import Address, Closed, Connection, Unreachable, make_room, parse_address

ROOM_BYTES = 1 << 20
OK = b"HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def saying(*pieces: bytes, pause_s: float = 0.0, then_reset: bool = False) -> Iterator[tuple[Connection, list[bytes]]]:
    """A connection to one who reads a request, says the pieces, and ends; and the list of what was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                asked.append(peer.recv(65536))
                for piece in pieces:
                    peer.sendall(piece)
                    time.sleep(pause_s)
                if then_reset:
                    time.sleep(0.05)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        thread = threading.Thread(target=serve)
        thread.start()
        connection = Connection(Address("127.0.0.1", listener.getsockname()[1], is_tls=False, target=""), None, connect_s=5, read_s=0.5)
        try:
            yield connection, asked
        finally:
            connection.close()
            thread.join()


def read(*pieces: bytes, pause_s: float = 0.0, then_reset: bool = False, until_s: float | None = None) -> tuple[int, bytes, bool]:
    """The answer's status and body, and whether the connection is over."""
    with saying(*pieces, pause_s=pause_s, then_reset=then_reset) as (connection, _):
        connection.ask("/x")
        status, _, body = connection.read(make_room(ROOM_BYTES), until=None if until_s is None else time.monotonic() + until_s)
        return status, bytes(body), connection.will_close


@pytest.mark.parametrize(
    ("pieces", "body", "is_last"),
    [
        ([OK + b"Content-Length: 5\r\n\r\nhello"], b"hello", False),
        ([b"HTTP/1.1 200\r\n", b"content-length:5\r\n\r", b"\nhel", b"lo"], b"hello", False),
        ([OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"], b"hello", False),
        ([OK + b"Content-Length: 0\r\n\r\n"], b"", False),
        ([OK + b"Content-Length: 5\r\nConnection: Close\r\n\r\nhello"], b"hello", True),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"], b"hello", True),
        ([b"HTTP/1.1 206 Partial\r\nContent-Length: 5\r\n\r\nhello"], b"hello", False),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b"", False),
        ([OK + b"\r\nhel", b"lo"], b"hello", True),  # its end is the connection's
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;a=b\r\nlo\r\n0\r\n\r\n"], b"hello", False),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n", *(bytes([c]) for c in b"00a\r\n0123456789\r\n0\r\n\r\n")], b"0123456789", False),
        ([OK + b"Content-Length: 1048000\r\n\r\n", b"?" * 1048000], b"?" * 1048000, False),
    ],
)
def test_an_answer_is_its_body(pieces: Sequence[bytes], body: bytes, is_last: bool) -> None:
    assert read(*pieces, pause_s=0.002)[1:] == (body, is_last)


@pytest.mark.parametrize("status", [103, 301, 404, 503])
def test_another_status_has_no_body_and_ends_the_connection(status: int) -> None:
    assert read(b"HTTP/1.1 %d No\r\nContent-Length: 5\r\n\r\nhello" % status) == (status, b"", True)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK",
        OK + b"no colon\r\n\r\nhello",
        OK + b"Content-Length: 5\r\nContent-Length: 4\r\n\r\nhello",
        OK + b"Content-Length: -5\r\n\r\nhello",
        OK + b"Content-Length: 5, 5\r\n\r\nhello",
        OK + b"Content-Length: 6\r\n\r\nhello",
        OK + b"Content-Length: 4\r\n\r\nhello",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nhello\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 200,
        OK + b"X: " + b"?" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_whole_answer_is_none(answer: bytes) -> None:
    with pytest.raises(Unreachable) as raised:
        read(answer)
    assert not isinstance(raised.value, Closed)


@pytest.mark.parametrize("head", [b"\r\n", b"Content-Length: 2000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1e8480\r\n"])
def test_an_answer_that_does_not_fit_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        read(OK + head, b"?" * 2_000_000)


def test_a_connection_that_ends_before_its_answer_was_closed() -> None:
    with pytest.raises(Closed):
        read()


def test_a_reset_is_no_end_of_a_body() -> None:
    with pytest.raises(Unreachable):
        read(OK + b"\r\nhello", then_reset=True)


def test_one_who_says_nothing_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable):
        read(b"", pause_s=1.0)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("slow", [[OK[at : at + 1] for at in range(len(OK))], [OK + b"Content-Length: 99\r\n\r\n", *[b"?"] * 20]], ids=["head", "body"])
def test_one_who_drips_is_given_up_at_the_time_that_was_said(slow: list[bytes]) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"slowly|in time"):
        read(*slow, pause_s=0.2, until_s=0.5)
    assert time.monotonic() - began < 6  # what is left to say is said to nobody


def test_the_request() -> None:
    with saying(OK + b"Content-Length: 0\r\n\r\n") as (connection, asked):
        connection.ask("/a/b?c", token="t.o.ken", method="POST", fields={"X": "y"}, body=b"{}")
        connection.read(make_room(ROOM_BYTES))
    head, _, body = asked[0].decode().partition("\r\n\r\n")
    first, host, *lines = head.split("\r\n")
    assert first == "POST /a/b?c HTTP/1.1" and host.startswith("Host: 127.0.0.1:") and body == "{}"
    assert {"Authorization: Bearer t.o.ken", "Content-Length: 2", "X: y"} < set(lines)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", Address("h", 80, False, "")),
        ("https://h/a/?b=c", Address("h", 443, True, "/a/?b=c")),
        ("http://[fd00::1]:8080/x", Address("fd00::1", 8080, False, "/x")),
    ],
)
def test_an_address(url: str, address: Address) -> None:
    assert parse_address(url) == address


@pytest.mark.parametrize("url", ["ftp://h/", "http:///x", "http://u@h/", "http://h/#a", "http://h/a b", "http://h/\r\nX: y", "http://h:99999/", "http://h/ä"])
def test_no_address(url: str) -> None:
    with pytest.raises(ValueError):
        parse_address(url)
