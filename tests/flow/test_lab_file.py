"""lab.json is all that an outside client has: what it says of the service is true, asked with plain requests and the official SDK."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from repave.lab.rack import rack_down, rack_up


def ask(lab, method: str, path: str, token: str, **how) -> requests.Response:
    return requests.request(method, lab.values["endpoint"] + path, headers={"X-Auth-Token": token}, timeout=30, **how)


def instances(lab) -> str:
    return f"/v1/{lab.values['project_id']}/instances"


def sdk(lab, keys: dict[str, str]):
    from huaweicloudsdkclouddc.v1 import CloudDCClient
    from huaweicloudsdkcore.auth.credentials import BasicCredentials

    credentials = BasicCredentials(keys["ak"], keys["sk"], lab.values["project_id"])
    return CloudDCClient.new_builder().with_credentials(credentials).with_endpoint(lab.values["endpoint"]).build()


def sdk_reinstall(lab, keys: dict[str, str], instance_id: str):
    from huaweicloudsdkclouddc.v1 import ReinstallOSOptions, ReinstallOsRequest

    body = ReinstallOSOptions(image_id=lab.image("tiny-1")["id"], password="Good-Pass-42", instance_id_set=[instance_id])
    return sdk(lab, keys).reinstall_os(ReinstallOsRequest(body=body))


def body_for(lab, instance_id: str) -> dict[str, object]:
    return {"image_id": lab.image("tiny-1")["id"], "password": "Good-Pass-42", "instance_id_set": [instance_id]}


def test_its_servers_images_and_ids_are_the_services(lab):
    listed = ask(lab, "GET", instances(lab), lab.values["token"]).json()["instances"]
    mine = {i["id"] for i in lab.values["instances"]}
    assert mine == {i["id"] for i in listed}
    servers = ask(lab, "GET", f"/v1/{lab.values['project_id']}/physicalservers", lab.values["token"]).json()
    assert {i["server_id"] for i in lab.values["instances"]} == {s["id"] for s in servers["servers"]}
    assert {i["name"] for i in lab.values["images"]} <= {i["name"] for i in lab.client.items("/images")}
    assert lab.values["reinstall_timeout_s"] >= 60


def test_the_scripted_rack_has_a_windows_image_and_one_instance_of_it_beside_those_asked_for(lab):
    images = [i for i in lab.values["images"] if i["os_type"] == "Windows"]
    assert [i["name"] for i in images] == ["windows-2022"]
    assert [i["name"] for i in lab.values["instances"] if i["os_type"] == "Linux"] == lab.names
    windows = [i for i in ask(lab, "GET", instances(lab), lab.values["token"]).json()["instances"] if i["image"]["os_type"] == "Windows"]
    assert [(i["name"], i["image"]["id"]) for i in windows] == [(f"lab{len(lab.names) + 1:02}", images[0]["id"])]


def test_a_rack_counts_its_linux_machines_and_tells_the_limit_of_its_own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("REPAVE_RATE_BURST", "40")
    try:
        one = rack_up(1, scripted=True, folder=tmp_path)
        assert one["rate_limit"]["requests"] == 20  # a list's half
        assert rack_up(1, scripted=True, folder=tmp_path) == one
        two = rack_up(2, scripted=True, folder=tmp_path)
        assert [(i["name"], i["os_type"]) for i in two["instances"]] == [("lab01", "Linux"), ("lab02", "Linux"), ("lab03", "Windows")]
    finally:
        rack_down(tmp_path)


def test_an_expired_token_is_401(lab):
    answer = ask(lab, "GET", instances(lab), lab.values["expired_token"])
    assert (answer.status_code, answer.json()["error_code"]) == (401, "iMetal.0003")


def test_a_read_only_token_lists_and_may_not_reinstall(lab):
    token, batches = lab.values["readonly_token"], lab.batches()
    assert ask(lab, "GET", instances(lab), token).status_code == 200
    answer = ask(lab, "PUT", f"{instances(lab)}/reinstall", token, json=body_for(lab, lab.ids["lab01"]))
    assert (answer.status_code, answer.json()["error_code"]) == (403, "iMetal.0004")
    assert lab.batches() == batches


def test_a_read_only_key_of_the_sdk_lists_and_may_not_reinstall(lab):
    from huaweicloudsdkclouddc.v1 import ListInstancesRequest
    from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException

    keys, batches = lab.values["readonly_aksk"], lab.batches()
    assert {i.id for i in sdk(lab, keys).list_instances(ListInstancesRequest()).instances} == set(lab.ids.values())
    with pytest.raises(ClientRequestException) as refused:
        sdk_reinstall(lab, keys, lab.ids["lab01"])
    assert (refused.value.status_code, refused.value.error_code) == (403, "iMetal.0004")
    assert lab.batches() == batches


def test_another_projects_instance_looks_like_none_and_is_there_for_its_own(lab):
    from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException

    other = lab.values["other"]
    theirs = f"/v1/{other['project_id']}/instances"
    assert ask(lab, "GET", f"{theirs}/{other['instance_id']}/status", other["token"]).json()["state"] == "running"
    unknown = ask(lab, "GET", f"{instances(lab)}/{'0' * 32}/status", lab.values["token"])
    mine = ask(lab, "GET", f"{instances(lab)}/{other['instance_id']}/status", lab.values["token"])
    assert (mine.status_code, mine.json()["error_code"]) == (unknown.status_code, unknown.json()["error_code"]) == (404, "iMetal.0200")
    with pytest.raises(ClientRequestException) as refused:
        sdk_reinstall(lab, lab.values, other["instance_id"])
    assert (refused.value.status_code, refused.value.error_code) == (404, "iMetal.0200")
    assert ask(lab, "GET", theirs, lab.values["token"]).status_code == 403
    assert ask(lab, "GET", instances(lab), other["token"]).status_code == 403


def test_more_requests_than_the_rate_limit_says_are_429_with_a_time_after_which_it_works_again(lab):
    """By the read-only token: the limit is each key's own, so that the other tests' key is not slowed."""
    limit, token = lab.values["rate_limit"], lab.values["readonly_token"]
    deadline = time.monotonic() + 60

    def one(_: int) -> requests.Response:
        return ask(lab, limit["method"], limit["path"], token)

    refused: list[requests.Response] = []
    with ThreadPoolExecutor(16) as pool:
        while not refused and time.monotonic() < deadline:
            answers = list(pool.map(one, range(limit["requests"] + int(limit["per_s"]))))
            assert {a.status_code for a in answers} <= {200, 429}
            refused = [a for a in answers if a.status_code == 429]
    assert refused and isinstance(refused[0].json(), str)
    assert ask(lab, "GET", instances(lab), lab.values["token"]).status_code == 200
    time.sleep(int(refused[0].headers["Retry-After"]))
    assert one(0).status_code == 200
