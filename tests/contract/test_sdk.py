"""The official SDK, unmodified, at its newest version in this process and at 3.1.158 in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from wire_site import PASSWORD, Site, open_site

REPO = Path(__file__).parents[2]
OLD_SDK = REPO / ".repave/cache/sdk-3.1.158"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("site")) as site:
        for _ in range(25):
            site.add_instance()
        yield site


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Importing the SDK's core writes ~/.huaweicloud/application_id: into a home of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def old_sdk() -> Path:
    """The folder with 3.1.158, installed with its hash checked where it is missing."""
    if not (OLD_SDK / "huaweicloudsdkclouddc").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "--target", str(OLD_SDK)]
        subprocess.run([*pip, "-r", str(Path(__file__).with_name("sdk-3.1.158.txt"))], check=True, timeout=120)
    return OLD_SDK


def client(site: Site, key=None, **config):
    from huaweicloudsdkclouddc.v1 import CloudDCClient
    from huaweicloudsdkcore.auth.credentials import BasicCredentials
    from huaweicloudsdkcore.http.http_config import HttpConfig

    key = key or site.operator
    credentials = BasicCredentials(key.ak, key.sk, site.project.id)
    settings = HttpConfig(retry_times=config.pop("retry_times", 0))
    return CloudDCClient.new_builder().with_credentials(credentials).with_http_config(settings).with_endpoint(site.endpoint).build()


def reinstall_request(ids, password=PASSWORD, image_id=None):
    from huaweicloudsdkclouddc.v1 import ReinstallOSOptions, ReinstallOsRequest

    return ReinstallOsRequest(body=ReinstallOSOptions(image_id=image_id, password=password, instance_id_set=ids))


def test_a_client_with_a_region_and_no_project_id_finds_its_own(site: Site, monkeypatch):
    from huaweicloudsdkclouddc.v1 import CloudDCClient, ListInstancesRequest
    from huaweicloudsdkclouddc.v1.region.clouddc_region import CloudDCRegion
    from huaweicloudsdkcore.auth.credentials import BasicCredentials

    for name in ("HUAWEICLOUD_SDK_REGION_CLOUDDC_CN_EAST_3", "HUAWEICLOUD_SDK_IAM_ENDPOINT"):
        monkeypatch.setenv(name, site.endpoint)
    for key, instance in ((site.viewer, site.add_instance()), (site.other_key, site.other_instance)):
        build = CloudDCClient.new_builder().with_credentials(BasicCredentials(key.ak, key.sk)).with_region(CloudDCRegion.value_of("cn-east-3"))
        assert [i.id for i in build.build().list_instances(ListInstancesRequest(instance_id=instance)).instances] == [instance]
    assert site.ask("GET", "/v3/projects?name=cn-east-3", headers=[]).status == 401


def test_a_batch_is_accepted_and_its_instances_are_pending(site: Site):
    from huaweicloudsdkclouddc.v1 import ShowInstanceStatusRequest

    sdk, ids = client(site), [site.add_instance() for _ in range(2)][::-1]
    answer = sdk.reinstall_os(reinstall_request(ids, image_id=site.image))
    assert answer.status_code == 202 and [i.id for i in answer.instances] == ids
    status = sdk.show_instance_status(ShowInstanceStatusRequest(id=ids[0]))
    assert (status.state, status.operation_state, status.error) == ("pending", "reinstall-processing", None)


def test_every_page_follows_the_one_before_and_none_is_missing(site: Site):
    from huaweicloudsdkclouddc.v1 import ListInstancesRequest, ListServersRequest

    sdk = client(site, site.viewer)
    for call, request, field in (
        (sdk.list_instances, ListInstancesRequest, "instances"),
        (sdk.list_servers, ListServersRequest, "servers"),
    ):
        seen, marker, sizes, page = [], None, [], None
        while page is None or marker:
            page = call(request(marker=marker))
            rows = getattr(page, field)
            assert page.page_info.current_count == len(rows) and page.count >= 25
            seen, marker = seen + [row.id for row in rows], page.page_info.next_marker
            sizes.append(len(rows))
        assert len(set(seen)) == len(seen) == page.count and set(sizes[:-1]) == {10}
        for too_large in (5000, 10**18, 10**40):
            assert len(getattr(call(request(limit=too_large)), field)) == page.count
        for too_small in (1, 0, -(10**40)):
            assert len(getattr(call(request(limit=too_small)), field)) == 10


def test_filters(site: Site):
    from huaweicloudsdkclouddc.v1 import ListInstancesRequest, ListServersRequest

    def ids(**filters):
        return [i.id for i in sdk.list_instances(ListInstancesRequest(**filters)).instances]

    sdk, a, b, busy = client(site), site.add_instance(), site.add_instance(), site.add_instance()
    sdk.reinstall_os(reinstall_request([busy]))
    server = site.store.servers.find_instance(site.project.id, b).server_id
    nobody = str(uuid.uuid4())
    assert ids(instance_id=f"{a},{b}") == sorted([a, b])
    assert ids(server_id=server) == [b]
    assert ids(instance_id=f"{a},{busy}", instance_state="pending") == [busy]
    assert ids(instance_id=nobody) == ids(instance_id=site.other_instance) == ids(instance_state="stopped") == ids(instance_id="x y,ü") == []
    assert sdk.list_instances(ListInstancesRequest(instance_id=nobody)).count == 0
    assert len(sdk.list_servers(ListServersRequest(manage_state="in-use")).servers) == 10
    assert sdk.list_servers(ListServersRequest(manage_state="ready")).servers == []


def test_every_field_that_the_sdk_calls_mandatory_is_there(site: Site):
    from huaweicloudsdkclouddc.v1 import ListInstancesRequest, ShowServerRequest

    instance_id = site.add_instance()
    [instance] = client(site).list_instances(ListInstancesRequest(instance_id=instance_id)).instances
    assert (instance.id, instance.vpc_id, instance.tags, instance.state) == (instance_id, "", [], "running")
    assert (instance.image.id, instance.image.name, instance.image.os_type) == (site.image, "Linux", "Linux")
    assert all(len(t) == 20 and t.endswith("Z") for t in (instance.created_at, instance.updated_at, instance.launched_at))
    adopted = site.add_instance(image=None)
    [instance] = client(site).list_instances(ListInstancesRequest(instance_id=adopted)).instances
    assert (instance.image.id, instance.image.name, instance.image.os_type) == ("", "", "Linux")

    site.store.servers.record_power(instance.server_id, "On")
    server = client(site).show_server(ShowServerRequest(id=instance.server_id))
    assert (server.project_id, server.domain_id) == (site.project.id, site.project.domain_id)
    assert (server.manage_state, server.power_state, server.tags) == ("in-use", "on", [])
    assert (server.location.rack, server.location.unit) == ("R07", "12") and server.onboard_time.endswith("Z")
    assert (server.hardware_attributes.sn, server.hardware_attributes.manufacturer) == (server.name, "ACME")


def test_a_failure_has_a_code_a_message_and_a_type(site: Site):
    from huaweicloudsdkclouddc.v1 import ShowInstanceStatusRequest
    from sqlalchemy import update

    from repave.errors import RunFailed
    from repave.store.tables import INSTANCES

    failed = site.add_instance()
    values = {"state": "error", "operation_state": "reinstall-failed", "error": RunFailed("disk-write", "sda: I/O error.").as_json()}
    with site.store.engine.begin() as conn:
        conn.execute(update(INSTANCES).where(INSTANCES.c.id == failed).values(**values))
    status = client(site).show_instance_status(ShowInstanceStatusRequest(id=failed))
    assert (status.state, status.operation_state) == ("error", "reinstall-failed")
    assert (status.error.error_code, status.error.error_type) == ("Repave.3107", "reinstall_error")
    assert "I/O error" in status.error.error_msg
    assert client(site).reinstall_os(reinstall_request([failed])).status_code == 202


REFUSALS = {
    "a weak password": (lambda s: (reinstall_request([s.add_instance()], "password"), None), 400, "iMetal.0001"),
    "no ids": (lambda s: (reinstall_request(None), None), 400, "iMetal.0002"),
    "an unknown id": (lambda s: (reinstall_request([str(uuid.uuid4())]), None), 404, "iMetal.0200"),
    "a viewer": (lambda s: (reinstall_request([s.add_instance()]), s.viewer), 403, "iMetal.0004"),
    "an expired key": (lambda s: (reinstall_request([s.add_instance()]), s.expired), 401, "iMetal.0003"),
    "another project": (lambda s: (reinstall_request([s.other_instance]), s.other_key), 403, "iMetal.0004"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_reaches_the_sdk_with_code_and_request_id(site: Site, name):
    from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException

    make, status, code = REFUSALS[name]
    request, key = make(site)
    with pytest.raises(ClientRequestException) as caught:
        client(site, key).reinstall_os(request)
    assert (caught.value.status_code, caught.value.error_code, len(caught.value.request_id)) == (status, code, 32)


def test_a_retry_after_429_is_sent_with_the_same_signature_and_served(tmp_path):
    from huaweicloudsdkclouddc.v1 import ListInstancesRequest

    with open_site(tmp_path, per_s=2, burst=1) as site:
        sdk = client(site, retry_times=3)
        assert [sdk.list_instances(ListInstancesRequest()).status_code for _ in range(3)] == [200, 200, 200]


OLD_CLIENT = """
import json, os, sys
from huaweicloudsdkclouddc.v1 import *
from huaweicloudsdkcore.auth.credentials import BasicCredentials
given = json.load(sys.stdin)
credentials = BasicCredentials(given["ak"], given["sk"], given["project_id"])
client = CloudDCClient.new_builder().with_credentials(credentials).with_endpoint(given["endpoint"]).build()
accepted = client.reinstall_os(ReinstallOsRequest(body=ReinstallOSOptions(password=given["password"], instance_id_set=given["ids"])))
status = client.show_instance_status(ShowInstanceStatusRequest(id=given["ids"][0]))
listed = client.list_instances(ListInstancesRequest(instance_id=given["ids"][0]))
servers = client.list_servers(ListServersRequest())
print(json.dumps({"code": accepted.status_code, "ids": [i.id for i in accepted.instances], "state": status.state,
                  "listed": [i.id for i in listed.instances], "servers": len(servers.servers), "from": sys.modules[CloudDCClient.__module__].__file__}))
"""


def test_the_sdk_of_july_2025_reinstalls_too(site: Site, old_sdk: Path):
    ids = [site.add_instance() for _ in range(2)]
    given = {
        "ak": site.operator.ak, "sk": site.operator.sk, "project_id": site.project.id, "endpoint": site.endpoint, "password": PASSWORD, "ids": ids,
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(old_sdk)}
    done = subprocess.run([sys.executable, "-c", OLD_CLIENT], input=json.dumps(given), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["code"], said["ids"], said["state"], said["listed"]) == (202, ids, "pending", ids[:1])
    assert said["from"].startswith(str(old_sdk)) and said["servers"] >= 1
