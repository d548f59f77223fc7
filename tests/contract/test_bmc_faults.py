"""The driver against BMCs that lose answers, lie, send us elsewhere or never stop talking."""

from __future__ import annotations

import datetime
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redfish_fake import Answer, FakeBmc, Handler, refusal, small_bmc, start_bmc

from repave.bmc import BmcAddress, Power, quirks
from repave.bmc.connector import Connector
from repave.bmc.redfish import Paths, RedfishBmc
from repave.errors import BmcError, RunFailed

ISO = "http://10.9.8.7:8472/media/5f1c/boot.iso"
SYSTEM, CD = "/redfish/v1/Systems/1", "/redfish/v1/Systems/1/VirtualMedia/CD"
RESET, INSERT, EJECT = "ComputerSystem.Reset", "VirtualMedia.InsertMedia", "VirtualMedia.EjectMedia"


@pytest.fixture
def fake() -> Iterator[FakeBmc]:
    with start_bmc(FakeBmc("small", resources=small_bmc())) as bmc:
        yield bmc


def open_bmc(fake: FakeBmc, deadline_s: float = 8, **address: Any) -> RedfishBmc:
    return RedfishBmc(BmcAddress(fake.url, "admin", "secret", **address), deadline_s=deadline_s)


def slug_of(ask: Callable[[], object]) -> str:
    with pytest.raises(BmcError) as e:
        ask()
    assert "secret" not in str(e.value.as_json()) and "5f1c" not in str(e.value.as_json())
    return e.value.slug


def lose_answer(handler: Handler, apply: Callable[[], Answer]) -> None:
    apply()
    handler.hang_up()


def accept_only(handler: Handler, apply: Callable[[], Answer]) -> Answer:
    return 204, None


def test_withdrawn_media_are_those_under_the_prefix_alone_and_only_they_take_the_override_with_them(fake: FakeBmc) -> None:
    ours, other = urlsplit(ISO).path.rsplit("/", 1)[0] + "/", "http://files.example/rescue.iso"
    with open_bmc(fake) as bmc:
        bmc.insert_media([ISO])
        bmc.boot_from_media_once()
        assert bmc.withdraw_media(ours) is True
        assert (fake.get(CD)["Inserted"], fake.get(SYSTEM)["Boot"]["BootSourceOverrideEnabled"]) == (False, "Disabled")
        sent = len(fake.seen)
        assert bmc.withdraw_media(ours) is False
        assert {s.method for s in fake.seen[sent:]} == {"GET"}
        bmc.insert_media([other])
        bmc.boot_from_media_once()
        sent = len(fake.seen)
        assert bmc.withdraw_media(ours) is False
        assert {s.method for s in fake.seen[sent:]} == {"GET"}
        assert (fake.get(CD)["Image"], fake.get(SYSTEM)["Boot"]["BootSourceOverrideTarget"]) == (other, "Cd")


def test_without_media_of_ours_an_override_is_somebody_elses_and_where_nobody_can_tell_it_is_an_error(fake: FakeBmc) -> None:
    with open_bmc(fake) as bmc:
        bmc.boot_from_media_once()
        assert bmc.withdraw_media("/media/r/") is False
        assert fake.get(SYSTEM)["Boot"]["BootSourceOverrideTarget"] == "Cd"
        fake.get(CD).update({"Inserted": True, "ConnectedVia": "URI", "Image": "boot.iso"})
        with pytest.raises(BmcError) as untold:
            bmc.withdraw_media("/media/r/")
        assert untold.value.slug == "protocol" and fake.get(CD)["Inserted"]


@pytest.mark.parametrize(
    ("slot", "is_ours"),
    [
        ({"Inserted": True, "Image": "http://10.0.0.1:8472/media/r1/5f1c/boot.iso"}, True),
        ({"Inserted": True, "Image": "10.0.0.1:8472/media/r1/5f1c/boot.iso"}, True),
        ({"Inserted": True, "Image": "/media/R1/5f1c/boot.iso"}, True),
        ({"Inserted": True, "Image": "", "ImageName": "/media/r1/5f1c/boot.iso"}, True),
        ({"Inserted": False, "Image": "http://10.0.0.1:8472/media/r1/5f1c/boot.iso"}, False),
        ({"Inserted": True, "Image": "http://10.0.0.1:8472/media/r2/5f1c/boot.iso"}, False),
        ({"Inserted": True, "Image": "http://moved:8472/media/r1/5f1c/boot.iso"}, True),
        ({"Inserted": True, "Image": "http://files.example/rescue.iso"}, False),
        ({"Inserted": True, "ImageName": "boot.iso"}, None),
        ({"Inserted": True}, None),
    ],
)
def test_media_are_ours_only_where_the_bmc_shows_so(slot: dict[str, Any], is_ours: bool | None) -> None:
    assert quirks.shows_image_under(slot, "/media/r1/") is is_ours


def test_a_lost_answer_is_judged_by_the_state_and_nothing_is_sent_twice(fake: FakeBmc) -> None:
    for method, end in (("POST", RESET), ("POST", INSERT), ("POST", EJECT), ("PATCH", "")):
        fake.rule(method, end, lose_answer)
    with open_bmc(fake) as bmc:
        bmc.power_off()
        bmc.insert_media([ISO])
        bmc.boot_from_media_once()
        bmc.power_on()
        assert [b["ResetType"] for b in fake.sent("POST", RESET)] == ["ForceOff", "On"]
        assert len(fake.sent("POST", INSERT)) == len(fake.sent("PATCH")) == 1
        assert fake.get(CD)["Image"] == ISO
        bmc.eject_media()
        assert len(fake.sent("POST", EJECT)) == 1


def test_a_lost_answer_without_effect_is_no_success(fake: FakeBmc) -> None:
    fake.rule("POST", RESET, lambda handler, apply: handler.hang_up())
    with open_bmc(fake, deadline_s=2.5) as bmc:
        assert slug_of(bmc.power_off) == "power_failed"
    assert len(fake.sent("POST", RESET)) == 1


def test_paths_that_are_kept_save_questions_and_are_found_anew_after_a_failure(fake: FakeBmc) -> None:
    paths, address = Paths(), BmcAddress(fake.url, "admin", "secret")
    with RedfishBmc(address, paths=paths) as bmc:
        bmc.insert_media([ISO])
    fake.seen.clear()
    with RedfishBmc(address, paths=paths) as bmc:
        bmc.eject_media()
    assert not fake.get(CD)["Inserted"]
    assert {s.path for s in fake.seen} == {SYSTEM, CD, f"{CD}/Actions/{EJECT}"}

    moved = f"{SYSTEM}/VirtualMedia/CD2"
    slot = fake.resources[moved.lower()] = fake.resources.pop(CD.lower())
    slot["Actions"] = {f"#{name}": {"target": f"{moved}/Actions/{name}"} for name in (INSERT, EJECT)}
    fake.get(f"{SYSTEM}/VirtualMedia")["Members"] = [{"@odata.id": moved}]
    with RedfishBmc(address, paths=paths) as bmc:
        assert slug_of(lambda: bmc.insert_media([ISO])) == "protocol"
        assert not fake.get(moved)["Inserted"]
        bmc.insert_media([ISO])
    assert fake.get(moved)["Inserted"]


def test_what_is_so_already_is_not_sent(fake: FakeBmc) -> None:
    with open_bmc(fake) as bmc:
        bmc.power_on()
        bmc.eject_media()
        bmc.boot_from_disk()
        fake.get(SYSTEM)["PowerState"] = "Off"
        assert bmc.power_off(graceful_s=1) is False
    assert not fake.sent("POST") and not fake.sent("PATCH")


def test_one_answer_out_of_a_cache_does_not_pass_for_a_server_that_is_off(fake: FakeBmc) -> None:
    answered: list[str] = []

    def stale_once(handler: Handler, apply: Callable[[], Answer]) -> Answer:
        status, body = apply()
        answered.append(body["PowerState"])
        return (status, body | {"PowerState": "Off"}) if len(answered) == 1 else (status, body)

    with open_bmc(fake) as bmc:
        bmc.probe()
        fake.rule("GET", SYSTEM, stale_once)
        bmc.power_off()
    assert answered[0] == "On"
    assert fake.get(SYSTEM)["PowerState"] == "Off"


def test_graceful_first_then_force(fake: FakeBmc) -> None:
    fake.rule("POST", RESET, lambda handler, apply: (204, None) if len(fake.sent("POST")) == 1 else apply())
    with open_bmc(fake) as bmc:
        assert bmc.power_off(graceful_s=0.5) is True
    assert [b["ResetType"] for b in fake.sent("POST", RESET)] == ["GracefulShutdown", "ForceOff"]


@pytest.mark.parametrize(
    ("method", "end", "ask", "slug"),
    [
        ("POST", RESET, lambda bmc: bmc.power_off(), "power_failed"),
        ("POST", INSERT, lambda bmc: bmc.insert_media([ISO]), "media_not_inserted"),
        ("PATCH", "", lambda bmc: bmc.boot_from_media_once(), "boot_override_ignored"),
    ],
)
def test_a_bmc_that_says_yes_and_does_nothing_is_found_out(fake: FakeBmc, method: str, end: str, ask: Callable[[RedfishBmc], object], slug: str) -> None:
    fake.rule(method, end, accept_only)
    with open_bmc(fake, deadline_s=2.5) as bmc:
        assert slug_of(lambda: ask(bmc)) == slug


def test_another_image_in_the_drive_is_not_ours(fake: FakeBmc) -> None:
    def other(handler: Handler, apply: Callable[[], Answer]) -> Answer:
        answer = apply()
        fake.get(CD).update(Image="http://10.9.8.7/other.iso", ImageName="other.iso")
        return answer

    fake.rule("POST", INSERT, other)
    with open_bmc(fake, deadline_s=2.5) as bmc:
        assert slug_of(lambda: bmc.insert_media([ISO])) == "media_not_inserted"


def test_an_occupied_drive_is_emptied_first_and_the_next_url_is_tried_on_a_wrong_protocol(fake: FakeBmc) -> None:
    def no_http(handler: Handler, apply: Callable[[], Answer]) -> Answer:
        wrong = fake.sent("POST", INSERT)[-1]["Image"].startswith("http:")
        return (400, refusal("iBMC.1.0.FileTransferProtocolMismatch")) if wrong else apply()

    fake.rule("POST", INSERT, no_http)
    fake.get(CD).update(Inserted=True, Image="http://old.iso", ConnectedVia="URI")
    https = ISO.replace("http:", "https:")
    with open_bmc(fake) as bmc:
        assert bmc.insert_media([ISO, https]) == https
        assert len(fake.sent("POST", EJECT)) == 1
        assert slug_of(lambda: bmc.insert_media([ISO])) == "media_protocol"


def test_a_protocol_that_is_not_on_offer_is_refused_before_anything_is_touched(fake: FakeBmc) -> None:
    fake.get(CD)["Actions"]["#VirtualMedia.InsertMedia"]["TransferProtocolType@Redfish.AllowableValues"] = ["NFS", "CIFS"]
    with open_bmc(fake) as bmc:
        assert slug_of(lambda: bmc.check_media([ISO])) == slug_of(lambda: bmc.insert_media([ISO])) == "media_protocol"
    assert not fake.sent("POST")


@pytest.mark.parametrize("state", ["Exception", "Failed"])
def test_a_task_that_fails_is_a_rejection_and_unknown_states_go_on(fake: FakeBmc, state: str) -> None:
    fake.resources["/redfish/v1/taskservice/tasks/1"] = {"@odata.id": "/redfish/v1/TaskService/Tasks/1", "TaskState": "Mounting", "Messages": []}

    def start_task(handler: Handler, apply: Callable[[], Answer]) -> None:
        threading.Timer(0.5, lambda: fake.get("/redfish/v1/TaskService/Tasks/1").update(TaskState=state)).start()
        handler.answer(202, None, {"Location": "/redfish/v1/TaskService/Tasks/1"})

    fake.rule("POST", INSERT, start_task)
    with open_bmc(fake) as bmc:
        assert slug_of(lambda: bmc.insert_media([ISO])) == "media_rejected"


def test_a_busy_bmc_is_asked_again_only_after_it_said_so(fake: FakeBmc) -> None:
    fake.rule("POST", RESET, lambda h, apply: (409, refusal("Base.1.18.ActionParameterValueConflict")) if len(fake.sent("POST")) < 2 else apply())
    with open_bmc(fake, deadline_s=15) as bmc:
        bmc.power_off()
    assert len(fake.sent("POST", RESET)) == 2


def test_a_bad_login_is_sent_once_and_three_times_at_most(fake: FakeBmc) -> None:
    fake.rule("GET", "/Systems", lambda handler, apply: (401, None))
    with open_bmc(fake) as bmc:
        for _ in range(5):
            assert slug_of(bmc.read_power) == "auth"
    assert len(fake.sent("GET", "/Systems")) == 3


def test_a_redirect_is_refused_and_gets_no_login(fake: FakeBmc) -> None:
    with start_bmc(FakeBmc("thief", resources={})) as thief:
        fake.rule("GET", "/Systems", lambda handler, apply: handler.answer(307, None, {"Location": f"{thief.url}/redfish/v1/Systems"}))
        with open_bmc(fake) as bmc:
            assert slug_of(bmc.probe) == "protocol"
        assert not thief.seen


@pytest.mark.parametrize("link", ["{thief}/redfish/v1/Systems/1", "//{host}/redfish/v1/Systems/1", "http://127.0.0.1@{host}/x"])
def test_a_link_to_another_host_is_refused_and_gets_no_login(fake: FakeBmc, link: str) -> None:
    with start_bmc(FakeBmc("thief", resources=small_bmc())) as thief:
        fake.get("/redfish/v1/Systems")["Members"] = [{"@odata.id": link.format(thief=thief.url, host=thief.url.removeprefix("http://"))}]
        with open_bmc(fake) as bmc:
            assert slug_of(bmc.probe) == "protocol"
        fake.resources = small_bmc()
        target = f"{thief.url}{SYSTEM}/Actions/ComputerSystem.Reset"
        fake.get(SYSTEM)["Actions"]["#ComputerSystem.Reset"]["target"] = target
        with open_bmc(fake) as bmc:
            assert slug_of(bmc.power_off) == "protocol"
        assert not thief.seen


def make_certificate(folder: Path) -> tuple[Path, str]:
    """A self-signed certificate with its key in one PEM file, and its SHA-256 fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bmc")])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    signed = built.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    pem = signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "bmc.pem").write_bytes(pem)
    return folder / "bmc.pem", hashlib.sha256(signed.public_bytes(serialization.Encoding.DER)).hexdigest()


def test_only_the_pinned_certificate_gets_a_request(tmp_path: Path) -> None:
    pem, fingerprint = make_certificate(tmp_path)
    with start_bmc(FakeBmc("small", resources=small_bmc()), certificate=pem) as fake:
        for address in ({"certificate_sha256": "00" * 32}, {}):  # a wrong pin; no pin and a CA nobody knows
            with open_bmc(fake, **address) as bmc:
                assert slug_of(bmc.probe) == "tls"
        assert not fake.seen
        with open_bmc(fake, certificate_sha256=fingerprint) as bmc:
            assert bmc.probe().certificate_sha256 == fingerprint
        with open_bmc(fake, tls_verify=False) as bmc:
            assert bmc.probe().certificate_sha256 == fingerprint


def test_a_service_that_is_not_redfish_gets_no_login(fake: FakeBmc) -> None:
    for root in ((200, b"<html>router</html>"), (404, None), (200, {"hello": "world"})):
        fake.rules = [("GET", "/redfish/v1", lambda handler, apply, root=root: root)]  # type: ignore[misc]
        with open_bmc(fake) as bmc:
            assert slug_of(bmc.probe) == "not_redfish"
    assert not any(s.login for s in fake.seen)


def test_several_hosts_are_ambiguous_until_one_is_named(fake: FakeBmc) -> None:
    fake.get("/redfish/v1/Systems")["Members"] = [{"@odata.id": SYSTEM}, {"@odata.id": "/redfish/v1/Systems/2"}]
    fake.resources["/redfish/v1/systems/2"] = {**small_bmc()["/redfish/v1/systems/1"], "PowerState": "Off"}
    with open_bmc(fake) as bmc:
        assert slug_of(bmc.probe) == "ambiguous_system"
    with open_bmc(fake, system_uri="/redfish/v1/Systems/2") as bmc:
        assert bmc.read_power() is Power.OFF
    with open_bmc(fake, system_uri="/redfish/v1/Systems/3") as bmc:
        assert slug_of(bmc.probe) == "no_system"


@pytest.mark.parametrize(("uuid", "slug"), [("uuid-of-another", "wrong-server"), ("uuid-1", "no_system")])
def test_a_bmc_without_the_system_named_is_another_servers_only_where_what_it_has_says_so(fake: FakeBmc, uuid: str, slug: str) -> None:
    """The bug: where the path of a system has its UUID in it, another machine was taken for a BMC that names none, and the server was not locked."""
    fake.get(SYSTEM)["UUID"] = uuid
    known, paths = Paths(), Paths("/redfish/v1/Systems/uuid-1", [CD])
    for address, remembered in (({"system_uri": "/redfish/v1/Systems/uuid-1"}, known), ({}, paths)):
        bmc = RedfishBmc(BmcAddress(fake.url, "admin", "secret", **address), recognize=only_uuid_1, paths=remembered)
        with bmc, pytest.raises(RunFailed) as refused:
            bmc.power_off()
        assert refused.value.slug == slug
        assert remembered.system is None
    assert {s.method for s in fake.seen} == {"GET"}


def only_uuid_1(serial: str, uuid: str) -> None:
    if uuid != "uuid-1":
        raise RunFailed("wrong-server")


@pytest.mark.parametrize("drive", [{"Inserted": True, "Image": ISO, "ConnectedVia": "URI"}, {}], ids=["media-in", "empty"])
@pytest.mark.parametrize("ask", [
    RedfishBmc.probe, RedfishBmc.power_off, RedfishBmc.power_on, lambda bmc: bmc.insert_media([ISO]), RedfishBmc.eject_media, RedfishBmc.boot_from_media_once,
    RedfishBmc.boot_from_disk, lambda bmc: bmc.withdraw_media("/media/5f1c/"),
])  # fmt: skip
def test_each_call_looks_who_answers_before_it_changes_anything(fake: FakeBmc, ask: Callable[[RedfishBmc], object], drive: dict[str, Any]) -> None:
    """The paths are remembered from before the address changed hands: nothing else is read of the system."""
    fake.get(CD).update(drive)
    with RedfishBmc(BmcAddress(fake.url, "admin", "secret"), recognize=only_uuid_1, paths=Paths(SYSTEM, [CD])) as bmc, pytest.raises(RunFailed) as refused:
        ask(bmc)
    assert refused.value.slug == "wrong-server"
    assert {s.method for s in fake.seen} == {"GET"}


def endless(handler: Handler, apply: Callable[[], Answer]) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b'{"a": "' + b"x" * 65536)


def dripping(handler: Handler, apply: Callable[[], Answer]) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.1)


def deep(handler: Handler, apply: Callable[[], Answer]) -> Answer:
    return 200, b'{"a":' * 20_000 + b"1" + b"}" * 20_000


@pytest.mark.parametrize(("fault", "slug"), [(endless, "protocol"), (deep, "protocol"), (dripping, "timeout")])
def test_an_answer_without_end_or_bottom_ends_in_time(fake: FakeBmc, fault: Any, slug: str) -> None:
    fake.rule("GET", "/Systems/1", fault)
    began = time.monotonic()
    with open_bmc(fake, deadline_s=2) as bmc:
        assert slug_of(bmc.probe) == slug
    assert time.monotonic() - began < 5


def test_a_bmc_that_does_not_answer_is_told_in_time() -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        hole.listen()
        began = time.monotonic()
        with RedfishBmc(BmcAddress(url, "admin", "secret"), deadline_s=2.5) as bmc:
            assert slug_of(bmc.probe) == "timeout"  # it listens and never answers
        assert time.monotonic() - began < 5


def test_a_worker_that_may_no_longer_write_sends_no_byte_of_the_request_it_had_connected_for() -> None:
    class NoLonger(Exception): ...

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        heard: list[bytes] = []

        def refuse() -> None:
            connection, _ = listener.accept()  # in time only when the client has connected already: the latest moment to ask
            threading.Thread(target=lambda: heard.append(connection.recv(65536))).start()
            raise NoLonger

        connector = Connector(BmcAddress(f"http://127.0.0.1:{listener.getsockname()[1]}", "a", "b"), observe=lambda line: None, before_write=refuse)
        connector.deadline = time.monotonic() + 8
        with pytest.raises(NoLonger):
            connector.post("/redfish/v1/Systems/1/Actions/ComputerSystem.Reset", data={"ResetType": "ForceOff"})
        deadline = time.monotonic() + 5
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [b""]


def test_one_call_at_a_time_reaches_a_bmc(fake: FakeBmc) -> None:
    running, most = 0, 0

    def count(handler: Handler, apply: Callable[[], Answer]) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return apply()

    fake.rule("GET", "", count)
    bmcs = [open_bmc(fake) for _ in range(4)]
    threads = [threading.Thread(target=bmc.read_power) for bmc in bmcs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
