"""The agent's own HTTP: every answer is the body that was meant, or no answer. Against a socket that says what the test wants."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from repave.agent.http_client import Address, Closed, Connection, Unreachable, make_room, parse_address
from repave.agent.tls import trust_only
from repave.ca import make_ca, make_certificate

ROOM_BYTES = 1 << 20
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA and a certificate for 127.0.0.1, another.pem one for another name."""
    made = tmp_path_factory.mktemp("ca")
    make_ca(made)
    make_certificate(made, ["127.0.0.1"], made / "server.pem")
    make_certificate(made, ["192.0.2.1"], made / "another.pem")
    return made


@contextlib.contextmanager
def saying(
    *pieces: bytes, pause_s: float = 0.0, then_reset: bool = False, certificate: Path | None = None, stays: bool = False
) -> Iterator[tuple[Connection, list[bytes]]]:
    """A connection to one who reads a request, says the pieces, and ends (`stays`: when we do); and the list of what was asked."""
    asked: list[bytes] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with contextlib.suppress(OSError):
                if certificate is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(certificate)
                    peer = context.wrap_socket(peer, server_side=True)
                say(peer)
            peer.close()

        def say(peer: socket.socket) -> None:
            while (heard := peer.recv(65536)) and not over.is_set():
                asked.append(heard)
                for piece in pieces:
                    if over.wait(pause_s):
                        return
                    peer.sendall(piece)
                if stays:
                    continue
                if then_reset:
                    time.sleep(0.05)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return

        thread = threading.Thread(target=serve)
        thread.start()
        tls = trust_only((certificate.parent / "ca.pem").read_text()) if certificate else None
        try:
            connection = Connection(Address("127.0.0.1", listener.getsockname()[1], certificate is not None, ""), tls, connect_s=5, read_s=0.5)
            try:
                yield connection, asked
            finally:
                connection.close()
        finally:
            over.set()
            thread.join()


def read(*pieces: bytes, pause_s: float = 0.0, then_reset: bool = False) -> tuple[int, bytes, bool]:
    """The answer's status and body, and whether the connection is over."""
    with saying(*pieces, pause_s=pause_s, then_reset=then_reset) as (connection, _):
        connection.ask("/x")
        status, body = connection.read(make_room(ROOM_BYTES))
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
        ([b"HTTP/1.1 204 No Content\r\n\r\nmore"], b"", True),
        ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK, b"Content-Length: 5\r\n\r\nhello"], b"hello", False),
        ([OK + b"\r\nhel", b"lo"], b"hello", True),  # its end is the connection's
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;a=b\r\nlo\r\n0\r\n\r\n"], b"hello", False),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n", *(bytes([c]) for c in b"00a\r\n0123456789\r\n0\r\n\r\n")], b"0123456789", False),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n5  \r\nhello\r\n0\r\nX: y\r\n\r\n"], b"hello", False),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nmore"], b"hello", True),
        (
            [OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"10\r\n" + b"?" * 16 + b"\r\n" + (b"10\r\n" + b"!" * 16 + b"\r\n") * 60_000 + b"0\r\n\r\n"],
            b"?" * 16 + b"!" * 960_000,
            False,
        ),  # the coding around it does not count: all together would not fit
        ([OK + b"Content-Length: 1048000\r\n\r\n", b"?" * 1048000], b"?" * 1048000, False),
    ],
)
def test_an_answer_is_its_body(pieces: Sequence[bytes], body: bytes, is_last: bool) -> None:
    assert read(*pieces, pause_s=0.002)[1:] == (body, is_last)


@pytest.mark.parametrize("status", [101, 301, 404, 503])
def test_another_status_has_no_body_and_keeps_the_connection_where_it_is_all_there(status: int) -> None:
    assert read(b"HTTP/1.1 %d No\r\nContent-Length: 5\r\n\r\nhello" % status) == (status, b"", False)
    assert read(b"HTTP/1.1 %d No\r\nContent-Length: 6\r\n\r\nhello" % status) == (status, b"", True)
    assert read(b"HTTP/1.1 %d No\r\n\r\nhello" % status) == (status, b"", True)


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
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 2000,
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


@pytest.mark.parametrize("certificate", [None, "server.pem"])
def test_one_who_says_nothing_is_not_waited_for(folder: Path, certificate: str | None) -> None:
    with saying(stays=True, certificate=certificate and folder / certificate) as (connection, _):
        connection.ask("/x")
        with pytest.raises(Unreachable, match="Timeout") as raised:
            connection.read(make_room(ROOM_BYTES))
        assert not isinstance(raised.value, Closed)


@pytest.mark.parametrize("certificate", [None, "server.pem"])
@pytest.mark.parametrize("slow", [[OK[at : at + 1] for at in range(len(OK))], [OK + b"Content-Length: 99\r\n\r\n", *[b"?"] * 99]], ids=["head", "body"])
def test_one_who_drips_is_given_up_at_the_time_that_was_said(folder: Path, slow: list[bytes], certificate: str | None) -> None:
    with saying(*slow, pause_s=0.2, certificate=certificate and folder / certificate) as (connection, _):
        connection.ask("/x")
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"slowly|Timeout"):
            connection.read(make_room(ROOM_BYTES), until=began + 0.7)
        assert time.monotonic() - began < 2  # all of it takes 4 s and more


@pytest.mark.parametrize("certificate", [None, "server.pem"])
def test_one_connection_has_one_answer_after_the_other(folder: Path, certificate: str | None) -> None:
    body = bytes(range(256)) * 3000
    with saying(OK + b"Content-Length: %d\r\n\r\n" % len(body), body, stays=True, certificate=certificate and folder / certificate) as (connection, asked):
        for number in range(3):
            connection.ask(f"/{number}")
            assert connection.read(make_room(ROOM_BYTES)).body == body
        assert [line.split()[1] for line in asked] == [b"/0", b"/1", b"/2"]


def test_a_certificate_for_another_name_is_none(folder: Path) -> None:
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"), saying(certificate=folder / "another.pem"):
        pass


def test_an_answer_without_what_it_must_have_is_to_another_request_however_long_it_is() -> None:
    with saying(OK + b"Ask: b\r\nContent-Length: 9999999\r\n\r\n") as (connection, _):
        connection.ask("/x")
        with pytest.raises(Unreachable, match="not to this request"):
            connection.read(make_room(ROOM_BYTES), must_have=("Ask", "a"))


def test_a_request_waits_for_nothing() -> None:
    with saying() as (connection, _):
        assert connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("wrong", [{"token": "a\r\nX: y"}, {"target": "/a\nb"}, {"fields": {"X": "\r"}}])
def test_no_line_of_a_request_becomes_two(wrong: dict[str, Any]) -> None:
    with saying() as (connection, asked), pytest.raises(ValueError):
        connection.ask(**{"target": "/", **wrong})
    assert not asked


def test_the_request() -> None:
    with saying(OK + b"Content-Length: 0\r\n\r\n") as (connection, asked):
        connection.ask("/a/b?c", token="t.o.ken", method="POST", fields={"X": "y"}, body=b"{}")
        connection.read(make_room(ROOM_BYTES))
    head, _, body = asked[0].decode().partition("\r\n\r\n")
    first, host, *lines = head.split("\r\n")
    assert first == "POST /a/b?c HTTP/1.1" and re.fullmatch(r"Host: 127\.0\.0\.1:[0-9]+", host) and body == "{}"
    assert {"Authorization: Bearer t.o.ken", "Content-Length: 2", "X: y"} < set(lines)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", Address("h", 80, False, "/")),
        ("http://h?x", Address("h", 80, False, "/?x")),
        ("https://h/a/?b=c", Address("h", 443, True, "/a/?b=c")),
        ("http://[fd00::1]:8080/x", Address("fd00::1", 8080, False, "/x")),
    ],
)
def test_an_address(url: str, address: Address) -> None:
    assert parse_address(url) == address


@pytest.mark.parametrize(
    "url", ["ftp://h/", "http:///x", "http://u@h/", "http://:p@h/", "http://h/#a", "http://h/a b", "http://h/\r\nX: y", "http://h:99999/", "http://h/ä"]
)
def test_no_address(url: str) -> None:
    with pytest.raises(ValueError):
        parse_address(url)


def test_a_password_in_an_address_is_not_said_again() -> None:
    with pytest.raises(ValueError) as raised:
        parse_address("http://user:canary@h/")
    assert "canary" not in str(raised.value)
