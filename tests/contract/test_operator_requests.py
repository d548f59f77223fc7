"""What a careful client does with our own routes: asks first, asks again, asks for each server something else, reads lists page by page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from operator_site import NEW_PASSWORD, Site, start_site

from repave.domain.model import Role, Step
from repave.domain.states import Ending
from repave.errors import RepaveError, RequestError

NAMES = ["web01", "web02", "web03"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path) as site:
        for name in NAMES:
            site.add_server(name)
        site.add_image("tiny")
        yield site


def asked(**more: Any) -> dict[str, Any]:
    return {"servers": NAMES, "image": "tiny", "password": NEW_PASSWORD} | more


def count_batches(site: Site) -> int:
    return len(site.ask("GET", "/batches").json()["items"])


def end_all(site: Site, batch: str) -> None:
    for run in site.store.runs.list_runs(batch_id=batch):
        site.store.runs.record_ending(run.id, Ending.PROVED, None)


# ---- dry run ----


def test_a_dry_run_answers_the_plan_and_begins_nothing(site: Site) -> None:
    before = site.ask("GET", "/events").text
    answer = site.ask("POST", "/reinstall?dry_run=1", json=asked(), headers={"Idempotency-Key": "k"})
    assert answer.status_code == 200 and "location" not in answer.headers
    plan = answer.json()
    assert plan == site.ask("POST", "/plans", json={"servers": NAMES, "image": "tiny"}).json()
    assert (count_batches(site), site.ask("GET", "/events").text) == (0, before)
    assert site.ask("POST", "/reinstall", json=asked(plan=plan["id"]), headers={"Idempotency-Key": "k"}).status_code == 202


def test_a_dry_run_refuses_what_the_real_one_would(site: Site) -> None:
    for bad in ({"password": "weak"}, {"ssh_keys": ["x"]}, {"servers": []}, {"plan": "p-00000000"}, {"each": {"web01": {"password": "weak"}}}):
        answers = [site.ask("POST", f"/reinstall{query}", json=asked(**bad)) for query in ("?dry_run=true", "")]
        assert answers[0].status_code == answers[1].status_code >= 400
        assert answers[0].json() == answers[1].json() and "weak" not in answers[0].text


# ---- Idempotency-Key ----


def test_the_same_request_with_its_key_is_answered_with_the_batch_it_began(site: Site) -> None:
    key = {"Idempotency-Key": "deploy-42"}
    first = site.ask("POST", "/reinstall", json=asked(), headers=key)
    again = site.ask("POST", "/reinstall", json=asked(), headers=key)
    assert (first.status_code, again.status_code, count_batches(site)) == (202, 202, 1)
    assert again.json() == first.json() and again.headers["location"] == first.headers["location"]
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"], again.headers["retry-after"]) == (None, "true", "5")
    end_all(site, first.json()["id"])
    late = site.ask("POST", "/reinstall", json=asked(), headers=key).json()
    assert (late["id"], late["state"], count_batches(site)) == (first.json()["id"], "succeeded", 1)  # that batch as it now stands


def test_a_key_with_another_body_is_refused_and_the_first_batch_goes_on(site: Site) -> None:
    key = {"Idempotency-Key": "deploy-42"}
    first = site.ask("POST", "/reinstall", json=asked(servers=["web01"]), headers=key).json()
    for other in (asked(servers=["web02"]), asked(servers=["web01"], password="Other-Start-43")):
        refused = site.ask("POST", "/reinstall", json=other, headers=key)
        assert (refused.status_code, refused.json()["class"], refused.json()["code"]) == (422, "key-used", "Repave.1030")
    assert [b["id"] for b in site.ask("GET", "/batches").json()["items"]] == [first["id"]]
    assert site.ask("GET", f"/batches/{first['id']}").json()["state"] == "working"


def test_a_key_is_its_owners_alone_and_a_refused_request_uses_none_up(site: Site) -> None:
    key = {"Idempotency-Key": "k"}
    assert site.ask("POST", "/reinstall", json=asked(password="weak"), headers=key).status_code == 400
    assert site.ask("POST", "/reinstall", json=asked(servers=["web01"]), headers=key, as_="operator").status_code == 202
    assert site.ask("POST", "/reinstall", json=asked(servers=["web02"]), headers=key, as_="admin").status_code == 202
    for bad in ("", "a b", "é".encode(), "x" * 256):
        assert site.ask("POST", "/reinstall", json=asked(servers=["web03"]), headers={"Idempotency-Key": bad}).status_code == 400
    assert count_batches(site) == 2


def test_the_database_keeps_nothing_that_a_password_could_be_guessed_by(site: Site) -> None:
    """Not the body, nor a hash of it that needs no key."""
    import hashlib

    site.ask("POST", "/reinstall", json=asked(), headers={"Idempotency-Key": "deploy-42"})
    body = json.dumps(asked()).encode()
    with site.store.engine.connect() as conn:
        kept = str(conn.exec_driver_sql("SELECT * FROM answers").all())
    assert kept != "[]" and not any(text in kept for text in (NEW_PASSWORD, "deploy-42", hashlib.sha256(body).hexdigest()))


# ---- each server its own ----


def test_each_server_may_have_its_own_image_password_keys_user_data_and_name(site: Site) -> None:
    site.add_image("other")
    own = {"image": "other", "password": "Own-Start-43", "ssh_keys": ["ssh-ed25519 AAAA own@desk"], "user_data": "#!own", "hostname": "db-7"}
    body = asked(ssh_keys=["ssh-ed25519 BBBB all@desk"], user_data="#!all", each={"web02": own, "web03": {"ssh_keys": [], "user_data": ""}})
    plan = site.ask("POST", "/plans", json={"servers": NAMES, "image": "tiny", "each": {"web02": {"image": "other", "hostname": "db-7"}}}).json()
    assert [(e["server"], e["image"], e["hostname"]) for e in plan["erased"]] == [
        ("web01", "tiny", "web01"), ("web02", "other", "db-7"), ("web03", "tiny", "web03")
    ]  # fmt: skip
    batch = site.ask("POST", "/reinstall", json=body | {"plan": plan["id"]}).json()
    runs = {r["server"]: site.store.runs.get_run(r["id"]) for r in batch["runs"]}
    secrets = {name: site.store.runs.get_run_secret(run.id) for name, run in runs.items()}
    assert {name: s["user_data"] for name, s in secrets.items()} == {"web01": "#!all", "web02": "#!own", "web03": ""}
    assert secrets["web01"]["password"] == secrets["web03"]["password"] != secrets["web02"]["password"]
    assert [runs[n].ssh_keys for n in NAMES] == [("ssh-ed25519 BBBB all@desk",), ("ssh-ed25519 AAAA own@desk",), ()]
    assert [runs[n].hostname for n in NAMES] == [None, "db-7", None] and runs["web02"].image_id != runs["web01"].image_id
    assert "Own-Start-43" not in json.dumps([batch, site.ask("GET", "/events").json()])
    for run in runs.values():
        site.store.runs.record_ending(run.id, Ending.RETURNED, RepaveError("unreachable").as_json())
    again = site.ask("POST", "/reinstall", json={"retry": batch["id"], "password": NEW_PASSWORD}).json()
    assert [site.store.runs.get_run(r["id"]).hostname for r in again["runs"]] == [None, "db-7", None]
    assert {r["server"]: site.store.runs.get_run(r["id"]).image_id for r in again["runs"]} == {n: r.image_id for n, r in runs.items()}


def test_what_is_wrong_for_one_server_is_refused_for_all_by_its_name(site: Site) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"web09": {"image": "tiny"}}, "each"), ({"web01": {"hostname": "no_name"}}, "hostname"), ({"web01": {"colour": "red"}}, "colour"),
        ({"web01": {"ssh_keys": ["x"]}}, "each.web01.ssh_keys"), ({"web01": {"password": "weak-canary"}}, "password"),
    ]  # fmt: skip
    for each, field in wrong:
        answer = site.ask("POST", "/reinstall", json=asked(each=each))
        assert answer.status_code == 400 and field in answer.text and "weak-canary" not in answer.text
    assert count_batches(site) == 0


def test_a_server_named_twice_in_each_is_refused(site: Site) -> None:
    instance = site.ask("GET", "/servers/web01").json()["instance"]["id"]
    answer = site.ask("POST", "/reinstall", json=asked(each={"web01": {"hostname": "a"}, instance: {"hostname": "b"}}))
    assert (answer.status_code, answer.json()["class"]) == (400, "bad-request")


# ---- pages ----


def read_pages(site: Site, path: str, meanwhile: Any = lambda: None, **params: Any) -> list[dict[str, Any]]:
    items, after = [], None
    while True:
        page = site.ask("GET", path, params={"limit": 2, **({"after": after} if after else {}), **params}).json()
        items += page["items"]
        after = page["next"]
        assert len(page["items"]) == 2 if after else len(page["items"]) <= 2
        if after is None:
            return items
        meanwhile()
        meanwhile = lambda: None  # noqa: E731


def test_pages_of_a_list_have_each_item_once_also_where_some_are_added_meanwhile(site: Site) -> None:
    for name in ("web04", "web05"):
        site.add_server(name)
    for name in ("a", "b", "c", "d"):
        site.add_image(name)
    batches = []
    for _ in range(5):
        batches.append(site.ask("POST", "/reinstall", json=asked(servers=["web01"])).json()["id"])
        end_all(site, batches[-1])
    shown = {
        "/servers": read_pages(site, "/servers", lambda: site.add_server("aaa01")),
        "/images": read_pages(site, "/images", lambda: site.add_image("0")),
        "/batches": read_pages(site, "/batches", lambda: site.ask("POST", "/reinstall", json=asked(servers=["web02"]))),
        "/runs": read_pages(site, "/runs", lambda: site.ask("POST", "/reinstall", json=asked(servers=["web03"])), server="web01"),
        "/keys": read_pages(site, "/keys", lambda: site.store.access.add_credential(site.project.id, "new", Role.VIEWER)),
    }
    assert [s["name"] for s in shown["/servers"]] == [*NAMES, "web04", "web05"]
    assert [i["name"] for i in shown["/images"]] == ["a", "b", "c", "d", "tiny"]
    assert [b["id"] for b in shown["/batches"]] == batches[::-1]
    assert [r["batch"] for r in shown["/runs"]] == batches[::-1]
    assert [k["name"] for k in shown["/keys"]] == ["the viewer", "the operator", "the admin", "new"]
    assert [s["name"] for s in site.ask("GET", "/servers").json()["items"]] == ["aaa01", *NAMES, "web04", "web05"]
    assert site.ask("GET", "/batches?limit=0").status_code == site.ask("GET", "/runs?limit=1001").status_code == 400


def test_runs_are_found_by_state_server_and_batch(site: Site) -> None:
    first = site.ask("POST", "/reinstall", json=asked(servers=["web01"])).json()["id"]
    end_all(site, first)
    batch = site.ask("POST", "/reinstall", json=asked(at_once=1)).json()["id"]
    runs = {r["server"]: r["id"] for r in site.ask("GET", f"/batches/{batch}").json()["runs"]}

    def states(**params: str) -> dict[str, list[str]]:
        found = {state: site.ask("GET", "/runs", params={"state": state, **params}).json()["items"] for state in STATES}
        assert all(run["state"] == state for state, items in found.items() for run in items)
        return {state: sorted(run["server"] for run in items) for state, items in found.items() if items}

    from repave.api.batch_views import STATES

    assert states(batch=batch) == {"waiting": NAMES}
    site.store.runs.record_step(runs["web01"], Step.PREFLIGHT)
    assert states() == {"running": ["web01"], "working": ["web01"], "waiting": ["web02", "web03"]}
    site.store.runs.record_ending(runs["web01"], Ending.RETURNED, RepaveError("unreachable").as_json())
    site.store.runs.record_ending(runs["web02"], Ending.RETURNED, RequestError("cancelled").as_json())
    site.store.runs.record_ending(runs["web03"], Ending.RETURNED, None)
    assert states(batch=batch) == {"failed": ["web01", "web03"], "cancelled": ["web02"]}
    shown = site.ask("GET", f"/runs?server=web02&batch={batch}").json()["items"]
    assert shown == [site.ask("GET", f"/runs/{runs['web02']}").json()]
    assert site.ask("GET", "/runs", as_="other").json()["items"] == []
    assert {site.ask("GET", f"/runs?{q}").status_code for q in ("server=web09", "batch=none")} == {404}
    assert site.ask("GET", "/runs?state=odd").status_code == 400


def test_a_signed_request_that_somebody_sends_again_begins_nothing(site: Site) -> None:
    """Signed by the official SDK; whoever has recorded it can not erase the servers a second time."""
    from huaweicloudsdkcore.auth.credentials import BasicCredentials
    from huaweicloudsdkcore.sdk_request import SdkRequest
    from huaweicloudsdkcore.signer.signer import Signer

    key = site.ask("POST", "/keys", json={"name": "signs", "role": "operator"}).json()
    body, path = json.dumps(asked()), "/repave/v1/reinstall"
    scheme, _, host = site.url.partition("://")
    unsigned = SdkRequest(
        method="POST", schema=scheme, host=host, resource_path=path, uri=path, query_params=[], header_params={"Content-Type": "application/json"}, body=body,
    )  # fmt: skip
    headers = Signer(BasicCredentials(key["ak"], key["sk"], site.project.id)).sign(unsigned).header_params
    answers = []
    for _ in range(2):
        answers.append(requests.post(site.url + path, data=body, headers=headers, timeout=20))
        end_all(site, answers[-1].json()["id"])
    assert [a.status_code for a in answers] == [202, 202] and answers[0].json()["id"] == answers[1].json()["id"]
    assert "Idempotent-Replayed" not in answers[0].headers and answers[1].headers["Idempotent-Replayed"] == "true"
    assert count_batches(site) == 1
