"""Who is let in: tokens, signatures, both, neither (clouddc-api.md 5 and 10)."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from wire_site import PASSWORD, Headers, Site, open_site

from repave.domain.states import Ending


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("site")) as site:
        site.add_instance()
        yield site


def token(value: str) -> tuple[str, str]:
    return ("X-Auth-Token", value)


def listing(site: Site, **how) -> Headers:
    return site.sign("GET", f"{site.path}/instances", **how)


def spoiled(headers: Headers) -> Headers:
    """The same, with another signature."""
    return [(n, v[:-4] + ("0000" if v[-4:] != "0000" else "1111")) if n == "Authorization" else (n, v) for n, v in headers]


MINUTES = timedelta(minutes=1)
# name: (headers of GET /instances, status)
WHO: dict[str, tuple[Callable[[Site], Headers], int]] = {
    "a token": (lambda s: [token(s.operator.token)], 200),
    "a viewer's token": (lambda s: [token(s.viewer.token)], 200),
    "blanks around the token": (lambda s: [token(f"  {s.operator.token} ")], 200),
    "a signature": (lambda s: listing(s), 200),
    "only the date signed": (lambda s: listing(s, signed=["x-sdk-date"]), 200),
    "14 minutes old": (lambda s: listing(s, at=datetime.now(UTC) - 14 * MINUTES), 200),
    "another X-Project-Id": (lambda s: listing(s, headers=[("X-Project-Id", s.other.id)]), 200),
    "both": (lambda s: [*listing(s), token(s.operator.token)], 200),
    "nothing": (lambda s: [], 401),
    "an empty token": (lambda s: [token("")], 401),
    "an unknown token": (lambda s: [token("x" * 43)], 401),
    "an expired token": (lambda s: [token(s.expired.token)], 401),
    "an expired key": (lambda s: listing(s, key=s.expired), 401),
    "an unknown key": (lambda s: listing(s, key=type(s.operator)("AKNOBODY", "x", "")), 401),
    "a bad signature": (lambda s: spoiled(listing(s)), 401),
    "16 minutes old": (lambda s: listing(s, at=datetime.now(UTC) - 16 * MINUTES), 401),
    "16 minutes ahead": (lambda s: listing(s, at=datetime.now(UTC) + 16 * MINUTES), 401),
    "a bad signature beside a token": (lambda s: [*spoiled(listing(s)), token(s.operator.token)], 401),
    "a wrong token beside a signature": (lambda s: [*listing(s), token("x" * 43)], 401),
    "another project's token beside a signature": (lambda s: [*listing(s), token(s.other_key.token)], 401),
    "a foreign scheme beside a token": (lambda s: [("Authorization", "Basic eDp5"), token(s.operator.token)], 401),
    "two tokens": (lambda s: [token(s.operator.token), token(s.operator.token)], 400),
    "another project's token": (lambda s: [token(s.other_key.token)], 403),
    "another project's signature": (lambda s: listing(s, key=s.other_key), 403),
}
CODES = {400: "iMetal.0001", 401: "iMetal.0003", 403: "iMetal.0004"}


@pytest.mark.parametrize("name", WHO)
def test_who_may_list(site: Site, name):
    make, status = WHO[name]
    answer = site.ask("GET", f"{site.path}/instances", headers=make(site))
    assert answer.status == status
    if status != 200:
        assert answer.json["error_code"] == CODES[status] and "instances" not in answer.json
        assert site.operator.token not in answer.text and site.operator.ak not in answer.text


def test_authentication_comes_before_validation(site: Site):
    assert site.reinstall(b"not json", []).status == 401


def test_another_projects_id_is_403_and_its_instance_looks_unknown(site: Site):
    theirs = f"/v1/{site.other.id}/instances/{site.other_instance}/status"
    assert site.ask("GET", theirs).status == 403
    assert site.ask("GET", theirs, headers=[token(site.other_key.token)]).status == 200
    assert site.ask("GET", f"{site.path}/instances/{site.other_instance}/status").status == 404
    nobodys = site.ask("GET", "/v1/%7Bproject_id%7D/instances")
    assert (nobodys.status, nobodys.json) == (403, site.ask("GET", theirs).json)  # so that no key learns which projects there are
    assert "another project" in nobodys.json["error_msg"]
    answer = site.reinstall({"password": PASSWORD, "instance_id_set": [site.other_instance]})
    assert (answer.status, answer.json["error_code"]) == (404, "iMetal.0200")


@pytest.mark.parametrize("how", ["token", "signature", "an operator's signature beside the viewer's token"])
def test_a_viewer_may_not_reinstall(site: Site, how):
    instance_id = site.add_instance()
    body = json.dumps({"password": PASSWORD, "instance_id_set": [instance_id]}).encode()
    path = f"{site.path}/instances/reinstall"
    key = site.viewer if how == "signature" else site.operator
    headers = [] if how == "token" else site.sign("PUT", path, body, key=key)
    answer = site.reinstall(body, [*headers, *([] if how == "signature" else [token(site.viewer.token)])])
    assert (answer.status, answer.json["error_code"]) == (403, "iMetal.0004")
    assert answer.json["error_msg"] == "Insufficient permissions: this needs the role operator, and this key is viewer"
    assert site.store.servers.find_instance(site.project.id, instance_id).state.value == "running"


def test_a_signed_reinstall_sent_again_gets_its_stored_202_and_never_a_second_run(site: Site):
    first = site.add_instance()
    body = json.dumps({"password": PASSWORD, "instance_id_set": [first]}).encode()
    headers = site.sign("PUT", f"{site.path}/instances/reinstall", body)
    before = site.count_batches()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: site.reinstall(body, headers), range(8)))
    assert {(a.status, a.text, a.headers["link"]) for a in answers} == {(202, answers[0].text, answers[0].headers["link"])}
    assert len({a.headers["x-request-id"] for a in answers}) == 8
    assert site.count_batches() == before + 1


def test_a_refusal_sent_again_is_evaluated_anew(site: Site):
    busy = site.add_instance()
    body = json.dumps({"password": PASSWORD, "instance_id_set": [busy], "image_id": site.other_instance}).encode()
    headers = site.sign("PUT", f"{site.path}/instances/reinstall", body)
    assert [site.reinstall(body, headers).status for _ in range(2)] == [400, 400]


def test_a_changed_body_is_refused(site: Site):
    body = json.dumps({"password": PASSWORD, "instance_id_set": [site.add_instance()]}).encode()
    headers = site.sign("PUT", f"{site.path}/instances/reinstall", body)
    assert site.reinstall(body + b" ", headers).status == 401


def test_an_unsigned_payload_is_refused_for_json_and_not_json_elsewhere(site: Site):
    path = f"{site.path}/instances/reinstall"
    unsigned = ("X-Sdk-Content-Sha256", "UNSIGNED-PAYLOAD")
    for kind, status in (("application/json", 401), ("text/plain", 415)):
        headers = site.sign("PUT", path, b"{}", headers=[unsigned, ("Content-Type", kind)])
        assert site.reinstall(b"{}", headers).status == status
    assert site.reinstall(b"{}", site.sign("PUT", path, b"{}", headers=[unsigned])).status == 401


# ---- Idempotency-Key ----


def test_a_put_with_its_key_again_gets_the_first_202_and_another_body_is_refused(site: Site):
    instance, other, before = site.add_instance(), site.add_instance(), site.count_batches()
    headers = [("X-Auth-Token", site.operator.token), ("Idempotency-Key", "deploy-42")]
    body = {"password": PASSWORD, "instance_id_set": [instance]}
    first, again = site.reinstall(body, headers), site.reinstall(body, headers)
    assert (first.status, again.status, again.text, again.headers["link"]) == (202, 202, first.text, first.headers["link"])
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    refused = site.reinstall(body | {"instance_id_set": [other]}, headers)
    assert (refused.status, refused.json["error_code"]) == (400, "iMetal.0001") and "Idempotency-Key" in refused.json["error_msg"]
    assert site.count_batches() == before + 1
    twice = site.reinstall(body, [*headers, ("Idempotency-Key", "other")])
    assert (twice.status, twice.json["error_code"]) == (400, "iMetal.0001")
    assert site.reinstall(body, [("Idempotency-Key", "deploy-42")]).status == 401


def test_a_signature_that_came_second_under_a_key_opens_nothing_when_sent_again_without_it(site: Site):
    """Whoever copies a request can leave out a header that is not signed."""
    instance, before = site.add_instance(), site.count_batches()
    body = json.dumps({"password": PASSWORD, "instance_id_set": [instance]}).encode()
    path, key = f"{site.path}/instances/reinstall", ("Idempotency-Key", "k")
    first = site.reinstall(body, [*site.sign("PUT", path, body, at=datetime.now(UTC) - timedelta(seconds=5)), key])
    second = site.sign("PUT", path, body)
    assert (first.status, site.reinstall(body, [*second, key]).status) == (202, 202)
    for run in site.store.runs.list_runs(live=True):
        site.store.runs.record_ending(run.id, Ending.RETURNED, None)
    copied = site.reinstall(body, second)
    assert (copied.status, copied.headers["link"], site.count_batches()) == (202, first.headers["link"], before + 1)
