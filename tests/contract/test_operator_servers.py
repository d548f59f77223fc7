from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_site import BMC_PASSWORD, Site, start_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path) as site:
        yield site


def test_an_added_server_has_what_its_bmc_says_and_an_adopted_instance(site: Site) -> None:
    network = {"mac": "aa:bb:cc:00:00:01", "address": "10.0.0.5", "prefix": 24, "gateway": "10.0.0.1", "dns": ["10.0.0.2"]}
    site.add_server("web01", rack="r1", unit="7", root_disk="serial=S1,rotational=false", network=network)
    shown = site.ask("GET", "/servers/web01", as_="viewer").json()
    assert (shown["serial"], shown["model"], shown["rack"], shown["unit"]) == ("SN1", "R1", "r1", "7")
    assert shown["root_disk"] == {"serial": "S1", "rotational": False}
    assert shown["network"] == network
    assert shown["instance"]["state"] == "running" and shown["instance"]["image_id"] is None
    assert "bmc" not in shown
    assert site.ask("GET", f"/servers/{shown['id']}").json()["bmc"]["certificate_sha256"] == "ab" * 32
    assert site.ask("GET", "/servers").json()["items"][0]["name"] == "web01"


def test_a_blank_server_waits_in_error_for_its_first_os(site: Site) -> None:
    assert site.add_server("web01", blank=True)["instance"]["state"] == "error"


@pytest.mark.parametrize(
    ("change", "status", "slug"),
    [
        ({"bmc_url": "https://dead.invalid"}, 502, "unreachable"),
        ({"bmc_password": "wrong"}, 502, "auth"),
        ({"bmc_url": "ftp://x"}, 400, "bad-request"),
        ({"bmc_url": "https://web02.bmc.invalid:99999"}, 400, "bad-request"),
        ({"bmc_url": "https://[::1"}, 400, "bad-request"),
        ({"bmc_url": "https://"}, 400, "bad-request"),
        ({"root_disk": "colour=red"}, 400, "bad-request"),
        ({"network": {"mac": "aa:bb:cc:00:00:01", "address": "10.0.0.5", "prefix": 99}}, 400, "bad-request"),
        ({"blnak": True}, 400, "bad-request"),
        ({"image": "nothing"}, 404, "not-found"),
        ({"name": "web01"}, 409, "conflict"),
    ],
)
def test_a_refused_server_leaves_nothing_behind(site: Site, change: dict[str, object], status: int, slug: str) -> None:
    site.add_server("web01")
    site.bmcs.known["https://web02.bmc.invalid"] = "SN2"
    body = {"name": "web02", "bmc_url": "https://web02.bmc.invalid", "bmc_username": "root", "bmc_password": BMC_PASSWORD} | change
    answer = site.ask("POST", "/servers", json=body)
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["class"]) == (status, status, slug), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "detail", "code", "do", "untouched"} <= problem.keys()
    assert [s["name"] for s in site.ask("GET", "/servers").json()["items"]] == ["web01"]


def test_the_bmc_password_never_comes_back(site: Site, tmp_path: Path) -> None:
    made = site.add_server("web01")
    said = [site.ask("GET", path).text for path in ("/servers", "/servers/web01", "/events")]
    said += [site.ask("PATCH", "/servers/web01", json={"bmc_password": BMC_PASSWORD, "rack": "r2"}).text]
    said += [site.ask("POST", "/servers", json={"name": "!", "bmc_password": BMC_PASSWORD}).text]
    assert not any(BMC_PASSWORD in text for text in (*said, str(made)))
    assert not any(BMC_PASSWORD.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_changed_bmc_must_be_the_same_server_and_the_stored_password_is_sent_nowhere_else(site: Site) -> None:
    site.add_server("web01")
    site.bmcs.known |= {"https://moved.invalid": "SN1", "https://another.invalid": "SN9"}
    count = len(site.bmcs.asked)
    assert site.ask("PATCH", "/servers/web01", json={"bmc_url": "https://moved.invalid"}).json()["class"] == "bad-request"
    assert site.ask("PATCH", "/servers/web01", json={"bmc_url": "https://moved.invalid", "bmc_password": ""}).json()["context"] == {"field": "bmc_password"}
    nowhere = site.ask("PATCH", "/servers/web01", json={"bmc_url": "https://moved.invalid:99999", "bmc_password": BMC_PASSWORD})
    assert (nowhere.status_code, nowhere.json()["context"]) == (400, {"field": "bmc_url"})
    assert len(site.bmcs.asked) == count
    another = {"bmc_url": "https://another.invalid", "bmc_password": BMC_PASSWORD}
    assert site.ask("PATCH", "/servers/web01", json=another).json()["class"] == "wrong-server"
    moved = {"bmc_url": "https://moved.invalid", "bmc_password": BMC_PASSWORD, "rack": "r3"}
    shown = site.ask("PATCH", "/servers/web01", json=moved).json()
    assert (shown["bmc"]["url"], shown["rack"]) == ("https://moved.invalid", "r3")


def test_a_removed_server_is_gone(site: Site) -> None:
    site.add_server("web01")
    assert site.ask("DELETE", "/servers/web01").status_code == 204
    assert site.ask("GET", "/servers").json() == {"items": [], "next": None}


# ---- who may ----


@pytest.mark.parametrize(
    ("role", "method", "path", "body"),
    [
        ("viewer", "POST", "/reinstall", {"servers": ["web01"], "password": "Fresh-Start-42"}),
        ("viewer", "DELETE", "/images/tiny", None),
        ("operator", "POST", "/servers", {"name": "x", "bmc_url": "https://x", "bmc_username": "u", "bmc_password": "p"}),
        ("operator", "DELETE", "/servers/web01", None),
        ("operator", "GET", "/keys", None),
        ("other", "POST", "/projects", {"name": "mine"}),
        ("other", "GET", "/servers?project=default", None),
    ],
)
def test_a_role_too_small_is_403_and_changes_nothing(site: Site, role: str, method: str, path: str, body: object) -> None:
    site.add_server("web01")
    site.add_image("tiny")
    before = len(site.ask("GET", "/events").json()["items"])
    answer = site.ask(method, path, as_=role, json=body)
    assert (answer.status_code, answer.json()["class"]) == (403, "not-allowed")
    assert len(site.ask("GET", "/events").json()["items"]) == before


def test_who_is_not_known_is_401(site: Site) -> None:
    answer = site.ask("GET", "/servers", headers={"X-Auth-Token": "nobody"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "SDK-HMAC-SHA256")  # Bearer is not taken


def test_another_projects_server_and_instance_look_like_none(site: Site) -> None:
    mine = site.add_server("web01")
    assert site.ask("GET", "/servers/web01", as_="other").status_code == 404
    assert site.ask("GET", f"/servers/{mine['id']}", as_="other").status_code == 404
    assert site.ask("DELETE", "/servers/web01", as_="other").status_code == 404
    plan = site.ask("POST", "/plans", as_="other", json={"instance_ids": [mine["instance"]["id"]]})
    assert plan.status_code == 404
    assert site.ask("GET", "/servers", as_="other").json()["items"] == []


def test_the_sites_admin_adds_projects_and_their_keys_and_a_key_may_expire(site: Site) -> None:
    assert site.ask("POST", "/projects", json={"name": "gpu"}).status_code == 201
    made = site.ask("POST", "/keys?project=gpu", json={"name": "ci", "role": "operator", "expires_at": "2001-01-01T00:00:00Z"}).json()
    assert site.ask("GET", "/whoami", headers={"X-Auth-Token": made["token"]}).status_code == 401
    made = site.ask("POST", "/keys?project=gpu", json={"name": "ci", "role": "operator"}).json()
    me = site.ask("GET", "/whoami", headers={"X-Auth-Token": made["token"]}).json()
    assert (me["project"], me["role"], me["site_admin"]) == ("gpu", "operator", False)
    listed = site.ask("GET", "/keys?project=gpu").text
    assert made["token"] not in listed and made["sk"] not in listed and made["ak"] in listed
    assert site.ask("DELETE", f"/keys/{made['id']}?project=gpu").status_code == 204
    assert site.ask("GET", "/whoami", headers={"X-Auth-Token": made["token"]}).status_code == 401


def test_a_board_swap_is_shown_first_confirmed_by_what_was_shown_and_audited(site: Site) -> None:
    before = site.add_server("web01")
    site.add_server("web02")
    url = "https://web01.bmc.invalid"
    site.bmcs.known[url] = "SN77"
    assert site.ask("POST", "/servers/web01/replace", json={}, as_="operator").status_code == 403
    shown = site.ask("POST", "/servers/web01/replace", json={}).json()
    assert (shown["replaced"], shown["before"]["serial"], shown["after"]["serial"]) == (False, before["serial"], "SN77")
    assert site.ask("GET", "/servers/web01").json()["serial"] == before["serial"]
    assert site.ask("POST", "/servers/web01/replace", json={"serial": "SN78", "uuid": shown["after"]["uuid"]}).status_code == 409
    done = site.ask("POST", "/servers/web01/replace", json={"serial": "SN77", "uuid": shown["after"]["uuid"]}).json()
    assert done["replaced"] and site.ask("GET", "/servers/web01").json()["serial"] == "SN77"
    event = site.ask("GET", "/events").json()["items"][-1]
    assert (event["type"], event["old_serial"], event["new_serial"]) == ("server.replaced", before["serial"], "SN77")
    site.bmcs.known[url] = "SN2"  # web02's
    taken = site.ask("POST", "/servers/web01/replace", json={"serial": "SN2", "uuid": "00000000-0000-0000-0000-000000000002"})
    assert taken.status_code == 409 and "web01 and web02" in taken.json()["cause"]


def test_two_servers_with_one_serial_number_are_refused_and_both_named(site: Site) -> None:
    site.add_server("web01")
    site.bmcs.known["https://web02.bmc.invalid"] = "SN1"
    body = {"name": "web02", "bmc_url": "https://web02.bmc.invalid", "bmc_username": "root", "bmc_password": BMC_PASSWORD}
    answer = site.ask("POST", "/servers", json=body)
    assert answer.status_code == 409 and "web02 and web01" in answer.json()["cause"]
