"""What every answer carries, what HTTP itself must refuse, and how often one may ask."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import socket
import time

import pytest
from fastapi import FastAPI
from wire_site import PASSWORD, Site, open_site, serving

from repave.api.asgi import BodyLimit, WireProtocol
from repave.api.limits import Limiter


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


def talk(site: Site, data: bytes) -> str:
    """The whole answer to these bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as s:
        s.sendall(data)
        answer = b""
        while piece := s.recv(65536):
            answer += piece
            if b"connection: close" not in answer.lower():
                break
        return answer.decode()


MALFORMED = {
    "length beside chunked": b"PUT /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"PUT /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length that is none": b"PUT /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: two\r\n\r\n",
    "no host": b"GET /v1/x HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a blank before the colon": b"GET /v1/x HTTP/1.1\r\nHost : a\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
    "100 KiB of headers": b"GET /v1/x HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_is_a_400_with_a_request_id_and_the_connection_closes(site: Site, name):
    answer = talk(site, MALFORMED[name])
    assert answer.startswith("HTTP/1.1 400 ") and answer.count("HTTP/1.1") == 1
    assert re.search(r"x-request-id: [0-9a-f]{32}\r\n", answer, re.I) and '"error_code"' in answer


def test_a_header_that_never_ends_is_cut_off(tmp_path):
    class Hasty(WireProtocol):
        header_timeout_s = 0.3

    with open_site(tmp_path, http=Hasty) as site, socket.create_connection(("127.0.0.1", site.port), timeout=5) as s:
        s.sendall(b"GET /v1/x HTTP/1.1\r\nHost: a\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert s.recv(1) == b""
        assert time.monotonic() - began < 3


def test_a_kept_connection_serves_many_requests(site: Site):
    one = f"GET {site.path}/instances HTTP/1.1\r\nHost: a\r\nX-Auth-Token: {site.viewer.token}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as s:
        for _ in range(3):
            s.sendall(one)
            assert s.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_request_id_of_the_client_is_never_repeated(site: Site):
    theirs = "<script>alert(1)</script>"
    answers = [site.ask("GET", p, headers=[("X-Request-Id", theirs)]) for p in ("/nowhere", f"{site.path}/instances")]
    assert len({a.headers["x-request-id"] for a in answers}) == 2
    assert not any(theirs in a.headers["x-request-id"] + a.text for a in answers)


def test_our_own_routes_answer_with_problems_that_repeat_no_input(site: Site):
    headers = [("X-Auth-Token", site.operator.token), ("Content-Type", "application/json")]
    answers = [
        site.ask("POST", "/repave/v1/things", b'{"password": "hunter2"}', headers),
        site.ask("POST", "/repave/v1/things", b"{", headers),
        site.ask("POST", "/repave/v1/things", b" " * 70_000 + b"{}", headers),
        site.ask("GET", "/repave/v1/nothing", headers=headers),
        site.ask("DELETE", "/repave/v1/things", headers=headers),
    ]
    assert [a.status for a in answers] == [400, 400, 413, 404, 405]
    assert all(a.headers["content-type"] == "application/problem+json" and a.json["status"] == a.status for a in answers)
    assert answers[0].json["context"]["field"] == "password" and "hunter2" not in answers[0].text


def test_an_image_is_streamed_past_the_cap_for_who_may_send_it(site: Site):
    octets = ("Content-Type", "application/octet-stream")
    signed = site.sign("POST", "/repave/v1/images", headers=[("X-Sdk-Content-Sha256", "UNSIGNED-PAYLOAD"), octets])
    for headers in ([("X-Auth-Token", site.operator.token), octets], signed):
        assert site.ask("POST", "/repave/v1/images", b"x" * 300_000, headers).json == 300_000
    start = b"POST /repave/v1/images HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as s:
        s.sendall(start)
        assert s.recv(65536).startswith(b"HTTP/1.1 401")  # before the body is there
        s.sendall(b"x" * 300_000 + f"GET {site.path}/instances HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert s.recv(65536).startswith(b"HTTP/1.1 401")  # and the connection is still in step


def test_a_body_limit_alone_is_a_413(site: Site):
    app = FastAPI()

    @app.post("/hello")
    def hello(body: dict[str, str]) -> str:
        return "hello"

    app.add_middleware(BodyLimit, limit_bytes=100)
    with serving(app) as port:
        other = dataclasses.replace(site, port=port)
        kind = [("Content-Type", "application/json")]
        assert other.ask("POST", "/hello", b'{"a": "b"}', kind).status == 200
        assert other.ask("POST", "/hello", b'{"a": "' + b"b" * 200 + b'"}', kind).status == 413
        chunked = (
            b"POST /hello HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"65\r\n"
            + b"x" * 0x65
            + b"\r\n0\r\n\r\n"
        )
        assert talk(other, chunked).startswith("HTTP/1.1 413")


def test_a_mistake_of_ours_is_a_500_that_says_nothing(site: Site, caplog, capsys):
    with caplog.at_level(logging.DEBUG):
        answer = site.ask("GET", "/v1/broken")
    assert (answer.status, answer.json["error_code"]) == (500, "iMetal.0099")
    said = answer.text + caplog.text + "".join(capsys.readouterr())
    assert "secret detail" not in said and answer.headers["x-request-id"] in said


def test_the_password_is_in_no_log(site: Site, caplog, capsys):
    with caplog.at_level(logging.DEBUG):
        site.reinstall({"password": PASSWORD, "instance_id_set": [site.add_instance()]})
        site.reinstall({"password": PASSWORD + "#", "instance_id_set": ["x"]})
    assert PASSWORD not in caplog.text + "".join(capsys.readouterr())


def test_too_many_is_429_with_a_bare_string_and_a_time_for_each_key_alone(tmp_path):
    with open_site(tmp_path, per_s=0.5, burst=3) as site:
        status = f"{site.path}/instances/{site.add_instance()}/status"
        mine = [site.ask("GET", status) for _ in range(5)]
        assert [a.status for a in mine] == [200, 200, 200, 429, 429]
        assert mine[3].json == "Too many requests" and 1 <= int(mine[3].headers["retry-after"]) <= 2 and mine[3].headers["x-request-id"]
        lists = [site.ask("GET", f"{site.path}/instances") for _ in range(2)]  # a bucket of their own, smaller
        assert [a.status for a in lists] == [200, 429] and 5 <= int(lists[1].headers["retry-after"]) <= 10
        assert site.reinstall({}).status == 400  # changes have a bucket of their own
        assert site.ask("GET", f"{site.path}/instances", headers=[("X-Auth-Token", site.viewer.token)]).status == 200
        assert site.ask("GET", f"{site.path}/instances", headers=[]).status == 401


def test_a_bucket_refills_and_a_refused_request_costs_nothing():
    now = [0.0]
    limiter = Limiter(2, 2, clock=lambda: now[0])
    assert [limiter.take("a", "read") for _ in range(4)] == [None, None, 1, 1]
    now[0] = 0.5
    assert [limiter.take("a", "read") for _ in range(2)] == [None, 1]
