"""The signature check against the official SDK's own signer, and against what section 5.2 and 10 refuse."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from huaweicloudsdkcore.sdk_request import SdkRequest
from huaweicloudsdkcore.signer.signer import Signer

from repave.auth.aksk import Presented, SignatureRefused, parse_authorization, replay_key, verify_signature

AK, SK = "AK0123456789", "sk/with+odd=characters"
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def signed(method="GET", path="/v1/p/instances", query=(), headers=(), body=b"", at=NOW, sk=SK) -> Presented:
    """What a server sees of a request that the SDK signed: `requests` sends the path percent-encoded, header values as latin-1."""
    sent = {"Content-Type": "application/json", "X-Sdk-Date": at.strftime("%Y%m%dT%H%M%SZ"), **dict(headers)}
    request = SdkRequest(method=method, schema="http", host="127.0.0.1:1", resource_path=path, query_params=list(query), header_params=sent, body=body)
    Signer(SimpleNamespace(ak=AK, sk=sk)).sign(request)
    raw_path, _, raw_query = request.uri.partition("?")
    wire = [(name.lower().encode(), value.encode("latin-1")) for name, value in request.header_params.items()]
    return Presented(method, raw_path.encode(), raw_query.encode(), wire, hashlib.sha256(body).hexdigest())


def verify(request: Presented, now=NOW) -> None:
    verify_signature(request, parse_authorization(request.values("authorization")[0]), SK, now=now)


def changed(request: Presented, **headers: str) -> Presented:
    """The request with some headers replaced or added, or removed where the value is None."""
    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    kept = [(n, v) for n, v in request.headers if n not in named]
    return Presented(
        request.method, request.raw_path, request.raw_query, kept + [(n, v.encode()) for n, v in named.items() if v is not None], request.body_sha256
    )


@pytest.mark.parametrize(
    "request_",
    [
        signed(),
        signed("PUT", "/v1/p/instances/reinstall", body='{"password":"ünïcödé"}'.encode()),
        signed(query=[("marker", "a b+c/ü&=~*"), ("limit", 10), ("empty", ""), ("flag", True)]),
        signed(query=[("a", "2"), ("a", "1"), ("B", "x")]),
        signed(path="/v1/p/instances/a%20b%2Fc%25~%C3%BC/status"),
        signed(path="/v1/%7Bproject_id%7D/instances"),
        signed(headers=[("X-Note", "grüße "), ("X-Project-Id", "another")]),
    ],
    ids=["plain", "utf-8 body", "odd query", "repeated query", "odd path", "no project id", "odd headers"],
)
def test_what_the_sdk_signs_is_accepted(request_):
    verify(request_)


@pytest.mark.parametrize("raw_query", [b"limit=10&marker=a%20b", b"marker=a+b&limit=%31%30"])
def test_an_unusual_spelling_of_the_query_is_the_same_query(raw_query):
    request = signed(query=[("limit", 10), ("marker", "a b")])
    verify(Presented(request.method, request.raw_path, raw_query, request.headers, request.body_sha256))


@pytest.mark.parametrize("minutes", [-15, 15])
def test_a_clock_may_be_15_minutes_off(minutes):
    verify(signed(), NOW + timedelta(minutes=minutes))


REQUEST = signed("PUT", "/v1/p/instances/reinstall", body=b"{}")
REFUSED = {
    "another path": Presented("PUT", b"/v1/q/instances/reinstall", b"", REQUEST.headers, REQUEST.body_sha256),
    "another method": Presented("POST", REQUEST.raw_path, b"", REQUEST.headers, REQUEST.body_sha256),
    "another query": Presented("PUT", REQUEST.raw_path, b"a=1", REQUEST.headers, REQUEST.body_sha256),
    "another body": Presented("PUT", REQUEST.raw_path, b"", REQUEST.headers, hashlib.sha256(b"{ }").hexdigest()),
    "a body nobody read": Presented("PUT", REQUEST.raw_path, b"", REQUEST.headers, None),
    "another host": changed(REQUEST, host="example.net"),
    "a signed header missing": changed(REQUEST, user_agent=None, content_type=None),
    "a signed header twice": Presented("PUT", REQUEST.raw_path, b"", [*REQUEST.headers, (b"host", b"127.0.0.1:1")], REQUEST.body_sha256),
    "a hash header of other bytes": changed(REQUEST, x_sdk_content_sha256="0" * 64),
    "an unsigned JSON body": signed("PUT", headers=[("X-Sdk-Content-Sha256", "UNSIGNED-PAYLOAD")], body=b"{}"),
    "another secret": signed(sk="other"),
    "too old": signed(at=NOW - timedelta(minutes=15, seconds=1)),
    "too new": signed(at=NOW + timedelta(minutes=15, seconds=1)),
    "no date": changed(REQUEST, x_sdk_date=None),
    "a date that is none": changed(REQUEST, x_sdk_date="20261399T000000Z"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(SignatureRefused):
        verify(REFUSED[name])


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: a.replace("SDK-HMAC-SHA256", "V11-HMAC-SHA256"),
        lambda a: a.replace("SDK-HMAC-SHA256 ", "SDK-HMAC-SHA256, "),
        lambda a: a[:-64] + a[-64:].upper() + ("" if a[-64:] != a[-64:].upper() else "A"),
        lambda a: a[:-1],
        lambda a: a + "0",
        lambda a: a.replace("x-sdk-date", "x-other-date"),
        lambda a: a.replace("content-type;host", "host;content-type"),
        lambda a: a.replace("host;", "host;host;"),
        lambda a: a.replace("host;", "Host;"),
    ],
    ids=["other algorithm", "comma", "upper-case hex", "short", "long", "date unsigned", "unsorted", "twice", "upper-case name"],
)
def test_an_authorization_header_of_another_shape_is_refused(edit):
    with pytest.raises(SignatureRefused):
        verify(changed(REQUEST, authorization=edit(REQUEST.values("authorization")[0])))


def test_a_body_that_is_not_json_may_stay_unsigned():
    request = signed("POST", headers=[("Content-Type", "application/octet-stream")], body=b"\x00")
    assert request.values("x-sdk-content-sha256") == ["UNSIGNED-PAYLOAD"]
    verify(Presented("POST", request.raw_path, b"", request.headers, None))


@pytest.mark.parametrize("kind", ["", ";charset=utf-8"])
def test_a_content_type_that_names_no_kind_leaves_no_body_unsigned(kind):
    """The bug: JSON was read there under a signature that need not cover it."""
    assert changed(REQUEST, content_type=kind).sends_json
    assert not changed(REQUEST, content_type="application/octet-stream").sends_json


def test_a_replay_has_the_same_key_and_a_second_request_another():
    again, later = signed("PUT", body=b"{}"), signed("PUT", body=b"{}", at=NOW + timedelta(seconds=1))
    keys = [replay_key(r, parse_authorization(r.values("authorization")[0])) for r in (again, again, later)]
    assert keys[0] == keys[1] != keys[2]
