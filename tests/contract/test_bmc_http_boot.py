"""UEFI HTTP boot: BMCs that have no way to put media into a CD slot, and a place for the URL that the firmware boots from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redfish_fake import CORPUS, MACHINES, FakeBmc, refusal, small_bmc, start_bmc

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.errors import BmcError

SYSTEM = "/redfish/v1/Systems/1"
FOLDER = "/media/r1/"
HTTP, HTTPS = "http://10.9.8.7:8472/media/r1/5f1c/boot.iso", "https://10.9.8.7:8473/media/r1/5f1c/boot.iso"


def with_http_boot(boot: dict[str, Any], targets: tuple[str, ...] = ("None", "Hdd", "Cd", "UefiHttp")) -> None:
    boot.setdefault("BootSourceOverrideTarget@Redfish.AllowableValues", list(targets))
    boot["HttpBootUri"] = None


@contextmanager
def bmc_with(fake: FakeBmc, **options: Any) -> Iterator[RedfishBmc]:
    options = {"http_boot": "where-needed"} | options
    with start_bmc(fake), RedfishBmc(BmcAddress(fake.url, "admin", "secret"), deadline_s=10, **options) as bmc:
        yield bmc


@pytest.fixture
def slotless() -> FakeBmc:
    resources = small_bmc()
    with_http_boot(resources["/redfish/v1/systems/1"]["Boot"])
    del resources["/redfish/v1/systems/1"]["VirtualMedia"]
    return FakeBmc("small", resources=resources)


@pytest.fixture
def both() -> FakeBmc:
    resources = small_bmc()
    with_http_boot(resources["/redfish/v1/systems/1"]["Boot"])
    return FakeBmc("small", resources=resources)


def slug_of(act: Any) -> str:
    with pytest.raises(BmcError) as caught:
        act()
    return caught.value.slug


def test_without_a_cd_slot_the_firmware_is_given_the_url_and_at_the_end_nothing_is_left_of_it(slotless: FakeBmc) -> None:
    with bmc_with(slotless) as bmc:
        bmc.check_media([HTTPS, HTTP])
        assert not slotless.sent("PATCH")
        assert bmc.insert_media([HTTPS, HTTP]) == HTTP  # for HTTPS the firmware would need our certificate
        bmc.boot_from_media_once()
        boot = slotless.get(SYSTEM)["Boot"]
        assert (boot["BootSourceOverrideTarget"], boot["BootSourceOverrideEnabled"], boot["HttpBootUri"]) == ("UefiHttp", "Once", HTTP)
        assert all({"BootSourceOverrideTarget", "HttpBootUri"} <= sent["Boot"].keys() for sent in slotless.sent("PATCH"))
        bmc.boot_from_disk()
        bmc.eject_media()
        boot = slotless.get(SYSTEM)["Boot"]
        assert (boot["BootSourceOverrideEnabled"], boot["HttpBootUri"]) == ("Disabled", None)


def test_it_is_not_done_where_the_site_does_not_say_so(slotless: FakeBmc) -> None:
    with bmc_with(slotless, http_boot="never") as bmc:
        assert slug_of(lambda: bmc.check_media([HTTP])) == slug_of(lambda: bmc.insert_media([HTTP])) == "no_virtual_media"
    assert not slotless.sent("PATCH")


def test_a_bmc_with_both_gets_virtual_media_unless_the_site_says_http(both: FakeBmc) -> None:
    with bmc_with(both) as bmc:
        bmc.insert_media([HTTP])
        bmc.boot_from_media_once()
        assert both.get(f"{SYSTEM}/VirtualMedia/CD")["Image"] == HTTP
        assert both.get(SYSTEM)["Boot"]["BootSourceOverrideTarget"] == "Cd" and both.get(SYSTEM)["Boot"]["HttpBootUri"] is None
        bmc.eject_media()
        bmc.boot_from_disk()
    with bmc_with(both, http_boot="always") as bmc:
        bmc.insert_media([HTTP])
        bmc.boot_from_media_once()
        assert both.get(f"{SYSTEM}/VirtualMedia/CD")["Image"] is None
        assert both.get(SYSTEM)["Boot"]["BootSourceOverrideTarget"] == "UefiHttp" and both.get(SYSTEM)["Boot"]["HttpBootUri"] == HTTP


@pytest.mark.parametrize("lacks", ["HttpBootUri", "UefiHttp"])
def test_the_target_without_a_place_for_the_url_is_not_http_boot_nor_the_place_without_the_target(slotless: FakeBmc, lacks: str) -> None:
    """With the target alone the firmware would ask DHCP for the URL, and boot whatever somebody there says."""
    boot = slotless.get(SYSTEM)["Boot"]
    if lacks == "HttpBootUri":
        del boot["HttpBootUri"]
    else:
        boot["BootSourceOverrideTarget@Redfish.AllowableValues"].remove("UefiHttp")
    with bmc_with(slotless, http_boot="always") as bmc:
        assert slug_of(lambda: bmc.check_media([HTTP])) == slug_of(lambda: bmc.insert_media([HTTP])) == "no_virtual_media"
    assert not slotless.sent("PATCH")


def test_a_place_for_the_url_that_refuses_to_be_written_is_a_refusal_of_the_media_and_hides_their_url(slotless: FakeBmc) -> None:
    """iLO 6 shows HttpBootUri and answers each PATCH of it so (libredfish pull request 76)."""
    slotless.rule("PATCH", "", lambda handler, apply: (400, refusal("Base.1.17.PropertyNotWritableOrUnknown", f"not {HTTP}")))
    with bmc_with(slotless) as bmc, pytest.raises(BmcError) as caught:
        bmc.insert_media([HTTP])
    assert caught.value.slug == "media_rejected" and "5f1c" not in str(caught.value) + caught.value.detail


def test_a_url_that_was_taken_and_is_not_shown_is_no_success(slotless: FakeBmc) -> None:
    slotless.rule("PATCH", "", lambda handler, apply: (204, None))
    with bmc_with(slotless) as bmc:
        assert slug_of(lambda: bmc.insert_media([HTTP])) == "boot_override_ignored"
        assert slug_of(bmc.boot_from_media_once) == "media_not_inserted"


def test_a_url_that_can_not_be_cleared_is_left_where_it_does_nothing(slotless: FakeBmc) -> None:
    def refuses_null(handler: Any, apply: Any) -> Any:
        return (
            (400, refusal("Base.1.0.PropertyValueTypeError"))
            if '"HttpBootUri": null' in str(slotless.seen[-1].body).replace("'", '"').replace("None", "null")
            else apply()
        )

    slotless.rule("PATCH", "", refuses_null)
    with bmc_with(slotless) as bmc:
        bmc.insert_media([HTTP])
        bmc.boot_from_disk()
        bmc.eject_media()
        assert slotless.get(SYSTEM)["Boot"]["BootSourceOverrideEnabled"] == "Disabled"


def test_a_url_that_was_left_is_withdrawn_with_its_override_and_another_one_stays(slotless: FakeBmc) -> None:
    with bmc_with(slotless) as bmc:
        bmc.insert_media([HTTP])
        assert bmc.withdraw_media("/media/r2/") is False
        assert slotless.get(SYSTEM)["Boot"]["HttpBootUri"] == HTTP
        assert bmc.withdraw_media(FOLDER) is True
        boot = slotless.get(SYSTEM)["Boot"]
        assert (boot["BootSourceOverrideEnabled"], boot["HttpBootUri"]) == ("Disabled", None)
        assert bmc.withdraw_media(FOLDER) is False


def offers_http(machine: str) -> bool:
    return any("UefiHttp" in str(resource) for resource in FakeBmc(machine).resources.values())


@pytest.mark.skipif(not MACHINES, reason=f"no corpus of Redfish answers at {CORPUS} (REPAVE_REDFISH_CORPUS)")
def test_machines_of_the_corpus_that_offer_the_target_boot_by_http_once_they_have_a_place_for_the_url() -> None:
    """None of them shows HttpBootUri as recorded; so none is ever told to boot by HTTP without it."""
    offering = [m for m in MACHINES if offers_http(m)]
    assert len(offering) >= 3
    for machine in offering:
        fake = FakeBmc(machine)
        with bmc_with(fake, http_boot="always") as bmc:
            facts = bmc.probe()
            assert "UefiHttp" in facts.boot_targets
            at = facts.system_uri + ("/Settings" if "nvidia" in machine else "")
            if "HttpBootUri" not in fake.get(at)["Boot"]:
                bmc.boot_from_media_once()
                assert fake.get(at)["Boot"]["BootSourceOverrideTarget"] != "UefiHttp"
                with_http_boot(fake.get(at)["Boot"])
            assert bmc.insert_media([HTTP]) == HTTP
            bmc.boot_from_media_once()
            boot = fake.get(at)["Boot"]
            assert (boot["BootSourceOverrideTarget"], boot["HttpBootUri"]) == ("UefiHttp", HTTP)
            bmc.boot_from_disk()
            bmc.eject_media()
            boot = fake.get(at)["Boot"]
            assert boot["HttpBootUri"] is None and (boot["BootSourceOverrideEnabled"] == "Disabled" or boot["BootSourceOverrideTarget"] == "Hdd")
