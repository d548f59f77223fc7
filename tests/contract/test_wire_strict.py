"""What the wire refuses and what it lets through: one row, one fact. Section numbers are clouddc-api.md's."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from wire_site import PASSWORD, Site, open_site

NOBODY = "7b6f2a3e-0d5c-4f6e-9a41-c0ffee000001"  # fixed: tests of several processes have the same names


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def target(site):
    """One instance that every refused request names; at the end it was never touched."""
    instance_id = site.add_instance()
    yield instance_id
    assert site.store.servers.find_instance(site.project.id, instance_id).state.value == "running"


def body(target: str, **changes: Any) -> dict[str, Any]:
    return {"password": PASSWORD, "instance_id_set": [target]} | changes


def without(name: str) -> Callable[[str], dict[str, Any]]:
    return lambda t: {k: v for k, v in body(t).items() if k != name}


def raw(text: str) -> Callable[[str], bytes]:
    """A body as bytes; @ stands for the good fields."""
    return lambda t: text.replace("@", json.dumps(body(t))[1:-1]).encode()


# name: (body for a target, error code, what the message names)
REFUSED_BODIES = {
    "no password": (without("password"), "iMetal.0002", "password"),
    "password null": (lambda t: body(t, password=None), "iMetal.0002", "password"),
    "no ids": (without("instance_id_set"), "iMetal.0002", "instance_id_set"),
    "ids null": (lambda t: body(t, instance_id_set=None), "iMetal.0002", "instance_id_set"),
    "ids empty": (lambda t: body(t, instance_id_set=[]), "iMetal.0002", "instance_id_set"),
    "nothing": (lambda t: {}, "iMetal.0002", "password, instance_id_set"),
    "no body": (lambda t: b"", "iMetal.0002", "body"),
    "blank body": (lambda t: b" \n", "iMetal.0002", "body"),
    "51 unknown ids": (lambda t: body(t, instance_id_set=[str(uuid.uuid4()) for _ in range(51)]), "iMetal.0001", "instance_id_set"),
    "51 entries, 50 distinct": (
        lambda t: body(t, instance_id_set=(ids := [str(uuid.uuid4()) for _ in range(50)]) + ids[:1]),
        "iMetal.0001",
        "instance_id_set",
    ),
    "an id twice": (lambda t: body(t, instance_id_set=[t, t]), "iMetal.0001", "instance_id_set"),
    "an id in upper case": (lambda t: body(t, instance_id_set=[t.upper()]), "iMetal.0001", "instance_id_set"),
    "an id with a blank": (lambda t: body(t, instance_id_set=[t + " "]), "iMetal.0001", "instance_id_set"),
    "an id with a newline": (lambda t: body(t, instance_id_set=[t + "\n"]), "iMetal.0001", "instance_id_set"),
    "an id that is a number": (lambda t: body(t, instance_id_set=[1]), "iMetal.0001", "instance_id_set"),
    "ids a string": (lambda t: body(t, instance_id_set=t), "iMetal.0001", "instance_id_set"),
    "ids an object": (lambda t: body(t, instance_id_set={"0": t}), "iMetal.0001", "instance_id_set"),
    "password a number": (lambda t: body(t, password=12345678), "iMetal.0001", "password"),
    "password a list": (lambda t: body(t, password=[PASSWORD]), "iMetal.0001", "password"),
    "image unknown": (lambda t: body(t, image_id=NOBODY), "iMetal.0001", "image_id"),
    "image a name": (lambda t: body(t, image_id="Linux"), "iMetal.0001", "image_id"),
    "image a number": (lambda t: body(t, image_id=7), "iMetal.0001", "image_id"),
    "image false": (lambda t: body(t, image_id=False), "iMetal.0001", "image_id"),
    "image unknown beside an unknown id": (lambda t: body(NOBODY, image_id=NOBODY), "iMetal.0001", "image_id"),
    "a duplicate key": (raw('{@, "password": "Other-Pass-1"}'), "iMetal.0001", "body"),
    "a duplicate key deep inside": (raw('{@, "x": [{"a": 1, "a": 1}]}'), "iMetal.0001", "body"),
    "NaN": (raw('{@, "x": NaN}'), "iMetal.0001", "body"),
    "Infinity": (raw('{@, "x": -Infinity}'), "iMetal.0001", "body"),
    "a comment": (raw("{@ /* x */}"), "iMetal.0001", "body"),
    "a comma too many": (raw("{@,}"), "iMetal.0001", "body"),
    "two values": (raw("{@}{}"), "iMetal.0001", "body"),
    "single quotes": (raw("{'password': 'x'}"), "iMetal.0001", "body"),
    "a list": (lambda t: [body(t)], "iMetal.0001", "body"),
    "a string": (lambda t: b'"x"', "iMetal.0001", "body"),
    "null": (lambda t: b"null", "iMetal.0001", "body"),
    "a form": (lambda t: b"password=x", "iMetal.0001", "body"),
    "a byte order mark": (lambda t: b"\xef\xbb\xbf" + json.dumps(body(t)).encode(), "iMetal.0001", "body"),
    "UTF-16": (lambda t: json.dumps(body(t)).encode("utf-16"), "iMetal.0001", "body"),
    "UTF-16 without a mark": (lambda t: json.dumps(body(t)).encode("utf-16-le"), "iMetal.0001", "body"),
    "latin-1": (lambda t: '{"x":"ü"}'.encode("latin-1"), "iMetal.0001", "body"),
    "a raw control character": (raw('{@, "x": "\x01"}'), "iMetal.0001", "body"),
    "33 levels": (raw("{@, " + '"x": ' + "[" * 33 + "]" * 33 + "}"), "iMetal.0001", "body"),
    "20,000 levels": (lambda t: b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "iMetal.0001", "body"),
    "a number of 20,000 digits": (lambda t: b'{"x":' + b"9" * 20_000 + b"}", "iMetal.0001", "body"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BODIES)
def test_body_refused(site: Site, target, name):
    make, code, named = REFUSED_BODIES[name]
    answer = site.reinstall(make(target))
    assert (answer.status, answer.json["error_code"]) == (400, code)
    assert named in answer.json["error_msg"] and PASSWORD not in answer.text


REFUSED_PASSWORDS = [
    "Ab1!xyz", "Abcdefgh1!" * 2 + "Abcdef7", "abcdefgh1", "ABCDEFGH", "12345678!", "", "Fresh Start-42", " Fresh-Start-42", "Fresh-Start-42 ",
    "Fresh-Start-42\n", "Fresh-Start-42\u200b", "Fresh-Start\u0000-42", "Frësh-Start-42", "Fresh-Start-42#", "Fresh-Start-42~", "Fresh-Start-4²",
    "frësh-start", "My-rOOt-4242", "My-tooR-4242", "\ud800Fresh-Start-42",
]  # fmt: skip


@pytest.mark.parametrize("password", REFUSED_PASSWORDS, ids=ascii)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown id"])
def test_password_refused_also_beside_an_unknown_instance(site: Site, target, password, known):
    answer = site.reinstall(body(target if known else NOBODY, password=password))
    assert (answer.status, answer.json["error_code"]) == (400, "iMetal.0001")
    assert "password" in answer.json["error_msg"] and (not password or password not in answer.text)


@pytest.mark.parametrize("password", ["My-Administrator-4", "rotartsinimdA-4242"])
def test_each_system_refuses_its_own_user_name_only(site: Site, password):
    assert site.reinstall(body(site.add_instance(), password=password)).status == 202
    windows = site.add_instance(image=site.windows_image, os_type="Windows")
    assert site.reinstall(body(windows, password=password)).status == 400
    assert site.reinstall(body(windows, password="My-root-4242")).status == 202


ACCEPTED = {
    "image null": lambda t, s: body(t, image_id=None),
    "image empty": lambda t, s: body(t, image_id=""),
    "image named": lambda t, s: body(t, image_id=s.image),
    "unknown fields": lambda t, s: body(t, force=True, all=True, x=[{"y": 1.5e300}]),
    "8 characters": lambda t, s: body(t, password="Abcdef-1"),
    "26 characters": lambda t, s: body(t, password="Ab1" + "x" * 23),
    "every special": lambda t, s: body(t, password="aB!@$%^-_=+[{}]:,./?"),
    "escapes": lambda t, s: json.dumps(body(t)).replace("F", "\\u0046").encode(),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_body_accepted(site: Site, name):
    instance_id = site.add_instance()
    answer = site.reinstall(ACCEPTED[name](instance_id, site))
    assert (answer.status, answer.json) == (202, {"instances": [{"id": instance_id}]})


# name: (headers beside the token, status)
CONTENT = {
    "json": ([("Content-Type", "application/json")], 202),
    "none": ([], 202),
    "json in utf-8": ([("Content-Type", 'Application/JSON; charset="UTF-8"')], 202),
    "identity": ([("Content-Encoding", "identity")], 202),
    "text": ([("Content-Type", "text/plain")], 415),
    "form": ([("Content-Type", "application/x-www-form-urlencoded")], 415),
    "another json": ([("Content-Type", "application/merge-patch+json")], 415),
    "latin-1": ([("Content-Type", "application/json;charset=iso-8859-1")], 415),
    "two": ([("Content-Type", "application/json"), ("Content-Type", "text/plain")], 415),
    "gzip": ([("Content-Encoding", "gzip")], 415),
}


@pytest.mark.parametrize("name", CONTENT)
def test_content_type_and_encoding(site: Site, name):
    headers, status = CONTENT[name]
    raw_body = json.dumps(body(site.add_instance())).encode()
    raw_body = gzip.compress(raw_body) if name == "gzip" else raw_body
    answer = site.reinstall(raw_body, [("X-Auth-Token", site.operator.token), *headers])
    assert answer.status == status and (status == 202 or answer.json["error_code"] == "iMetal.0001")


@pytest.mark.parametrize(("size", "status"), [(64 * 1024, 202), (64 * 1024 + 1, 413), (3_000_000, 413)])
def test_a_body_has_64_kib_at_most(site: Site, size, status):
    start = json.dumps(body(site.add_instance())).encode()
    answer = site.reinstall(start + b" " * (size - len(start)))
    assert answer.status == status and (status == 202 or set(answer.json) == {"error_code", "error_msg"})


def test_a_stranger_with_a_large_body_is_told_nothing_about_bodies(site: Site):
    assert site.reinstall(b" " * 100_000, []).status == 401


# (method, path below /v1/{project_id}, status, code, Allow)
ROUTES = [
    ("GET", "/instances/reinstall", 405, "APIGW.0101", "PUT"),
    ("POST", "/instances/reinstall", 405, "APIGW.0101", "PUT"),
    ("PUT", "/instances", 405, "APIGW.0101", "GET"),
    ("DELETE", "/physicalservers", 405, "APIGW.0101", "GET"),
    ("PUT", "/instances/reinstall/", 404, "APIGW.0101", None),
    ("PUT", "/instances/Reinstall", 404, "APIGW.0101", None),
    ("GET", "/instances/", 404, "APIGW.0101", None),
    ("GET", "/Instances", 404, "APIGW.0101", None),
    ("GET", "//instances", 404, "APIGW.0101", None),
    ("GET", "/nothing", 404, "APIGW.0101", None),
    ("GET", f"/instances/{NOBODY}/status", 404, "iMetal.0200", None),
    ("GET", "/instances/not-an-id/status", 404, "iMetal.0200", None),
    ("GET", f"/physicalservers/{NOBODY}", 404, "iMetal.0100", None),
    ("GET", "/physicalservers/not-an-id", 404, "iMetal.0100", None),
    ("GET", "/instances?limit=ten", 400, "iMetal.0001", None),
    ("GET", "/instances?limit=10.0", 400, "iMetal.0001", None),
    ("GET", "/instances?limit=-", 400, "iMetal.0001", None),
    ("GET", "/instances?limit=10&limit=20", 400, "iMetal.0001", None),
    ("GET", "/instances?marker=not-an-id", 400, "iMetal.0001", None),
    ("GET", "/instances?instance_state=Running", 400, "iMetal.0001", None),
    ("GET", f"/instances?instance_id={NOBODY}&server_id={NOBODY}", 400, "iMetal.0001", None),
    ("GET", "/instances?instance_id=" + ",".join([NOBODY] * 101), 400, "iMetal.0001", None),
    ("GET", "/physicalservers?limit=ten", 400, "iMetal.0001", None),
    ("GET", "/physicalservers?manage_state=idle", 400, "iMetal.0001", None),
]


@pytest.mark.parametrize("row", ROUTES, ids=lambda row: f"{row[0]} {row[1][:40]}")
def test_route_refused(site: Site, row):
    method, path, status, code, allow = row
    answer = site.ask(method, site.path + path, b"{}" if method == "PUT" else None)
    assert (answer.status, answer.json["error_code"], answer.headers.get("allow")) == (status, code, allow)
    assert set(answer.json) == {"error_code", "error_msg"} and len(answer.headers["x-request-id"]) == 32


def test_an_unknown_instance_is_404_and_nothing_happens_to_the_known_one(site: Site, target):
    answer = site.reinstall(body(target, instance_id_set=[target, NOBODY]))
    assert (answer.status, answer.json["error_code"]) == (404, "iMetal.0200")
    assert NOBODY in answer.json["error_msg"] and target not in answer.json["error_msg"]


def test_a_reinstall_under_way_is_400_and_names_the_ids(site: Site, target):
    busy = site.add_instance()
    assert site.reinstall(body(busy)).status == 202
    answer = site.reinstall(body(busy, instance_id_set=[target, busy]))
    assert (answer.status, answer.json["error_code"]) == (400, "iMetal.0201")
    assert busy in answer.json["error_msg"] and target not in answer.json["error_msg"]


def test_an_unknown_current_image_needs_an_image(site: Site):
    adopted = site.add_instance(image=None)
    answer = site.reinstall(body(adopted))
    assert answer.status == 400 and "image_id" in answer.json["error_msg"]
    assert site.reinstall(body(adopted, image_id=site.image)).status == 202


def test_fifty_are_accepted_in_the_order_given_and_pending_on_the_first_read(site: Site):
    ids = sorted((site.add_instance() for _ in range(50)), key=lambda i: i[::-1])
    answer = site.reinstall(body("", instance_id_set=ids))
    assert answer.status == 202 and [i["id"] for i in answer.json["instances"]] == ids
    for instance_id in (ids[0], ids[49]):
        state = site.ask("GET", f"{site.path}/instances/{instance_id}/status").json
        assert state == {"state": "pending", "operation_state": "reinstall-processing"}


def test_the_202_says_where_to_look_and_when(site: Site):
    answer = site.reinstall(body(site.add_instance()))
    assert answer.headers["link"].startswith("</repave/v1/batches/") and int(answer.headers["retry-after"]) >= 1
