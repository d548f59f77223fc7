"""The driver against what real BMCs say, one folder of recorded answers each."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from redfish_fake import CORPUS, MACHINES, FakeBmc, start_bmc

from repave.bmc import BmcAddress, Power
from repave.bmc.redfish import RedfishBmc
from repave.errors import BMC_CLASSES, BmcError

pytestmark = pytest.mark.skipif(not MACHINES, reason=f"no corpus of Redfish answers at {CORPUS} (REPAVE_REDFISH_CORPUS)")

URLS = ["http://10.9.8.7:8472/media/5f1c/boot.iso", "https://10.9.8.7:8473/media/5f1c/boot.iso"]

# manufacturer, model, system, first CD slot, arch
FACTS = {
    "dell-idrac9-6.00-r750": ("Dell Inc.", "PowerEdge R750", "System.Embedded.1", "/redfish/v1/Systems/System.Embedded.1/VirtualMedia/1", "amd64"),
    "hpe-ilo5-2.72-dl385g10p2": ("HPE", "ProLiant DL385 Gen10 Plus v2", "1", "/redfish/v1/Managers/1/VirtualMedia/2", "amd64"),
    "supermicro-x13-sys821ge": ("Supermicro", "SYS-821GE-TNHR", "1", "/redfish/v1/Managers/1/VirtualMedia/VirtualMedia1", "amd64"),
    "nvidia-gh200-openbmc": ("", "", "System_0", "/redfish/v1/Managers/BMC_0/VirtualMedia/USB2", "arm64"),
    "dmtf-rackmount1": ("Contoso", "3500", "437XR1138R2", "/redfish/v1/Systems/437XR1138R2/VirtualMedia/CD1", "amd64"),
    "huawei-ibmc-6.41-2288hv5": ("Huawei", "2288H V5", "1", "/redfish/v1/Managers/1/VirtualMedia/CD", ""),
    "xfusion-ibmc-2288hv6": ("xFusion", "2288H V6", "1", "/redfish/v1/Managers/1/VirtualMedia/CD", ""),
}
CD_TARGET = {"supermicro-x13-sys821ge": "UsbCd"}


def open_bmc(fake: FakeBmc, deadline_s: float = 20) -> RedfishBmc:
    return RedfishBmc(BmcAddress(fake.url, "admin", "secret"), deadline_s=deadline_s)


@pytest.mark.parametrize("machine", MACHINES)
def test_probe_tells_what_the_machine_is_and_writes_nothing(machine: str) -> None:
    with start_bmc(FakeBmc(machine)) as fake, open_bmc(fake) as bmc:
        facts = bmc.probe()
        assert {s.method for s in fake.seen} == {"GET"}
        assert facts.power is Power.ON
        assert facts.virtual_media and facts.boot_targets
        assert all(mac == mac.lower() for mac in facts.macs)
        if machine in FACTS:
            first = facts.virtual_media[0]
            system = facts.system_uri.rsplit("/", 1)[-1]
            assert (facts.manufacturer, facts.model, system, first, facts.arch) == FACTS[machine]
            assert bool(facts.serial) == (machine != "nvidia-gh200-openbmc")


@pytest.mark.parametrize("machine", MACHINES)
def test_the_whole_sequence_leaves_the_machine_as_asked(machine: str) -> None:
    with start_bmc(FakeBmc(machine)) as fake, open_bmc(fake) as bmc:
        facts = bmc.probe()
        assert bmc.power_off() is True
        assert fake.get(facts.system_uri)["PowerState"] == "Off"
        if fake.ibmc:  # only the vendor's own VmmControl: said before anything is touched, and when asked to insert
            for ask in (bmc.check_media, bmc.insert_media):
                with pytest.raises(BmcError) as e:
                    ask(URLS)
                assert e.value.slug == "no_virtual_media"
        else:
            bmc.check_media(URLS)
            taken = bmc.insert_media(URLS)
            assert taken == (URLS[1] if "nvidia" in machine else URLS[0])
            slot = fake.get(facts.virtual_media[0])
            assert (slot["Inserted"], slot["Image"]) == (True, taken)
            assert bmc.insert_media(URLS) == taken  # repeatable
        bmc.boot_from_media_once()
        boot_at = facts.system_uri + ("/Settings" if "nvidia" in machine else "")
        boot = fake.get(boot_at)["Boot"]
        assert (boot["BootSourceOverrideTarget"], boot["BootSourceOverrideEnabled"]) == (CD_TARGET.get(machine, "Cd"), "Once")
        bmc.power_on()
        assert fake.get(facts.system_uri)["PowerState"] == "On"
        bmc.eject_media()
        bmc.eject_media()
        assert not any(fake.get(uri).get("Inserted") for uri in facts.virtual_media)
        bmc.boot_from_disk()
        boot = fake.get(boot_at)["Boot"]
        assert boot["BootSourceOverrideEnabled"] == "Disabled" or boot["BootSourceOverrideTarget"] == "Hdd"
        assert not [s for s in fake.seen if s.path != "/redfish/v1/" and not s.login]


@pytest.mark.parametrize("machine", [m for m in MACHINES if "ibmc" not in m])
def test_media_that_were_left_are_withdrawn_with_their_override_and_the_power_stays(machine: str) -> None:
    with start_bmc(FakeBmc(machine)) as fake, open_bmc(fake) as bmc:
        facts = bmc.probe()
        bmc.insert_media(URLS)
        bmc.boot_from_media_once()
        assert bmc.withdraw_media(urlsplit(URLS[0]).path.rsplit("/", 1)[0] + "/") is True
        assert not any(fake.get(uri).get("Inserted") for uri in facts.virtual_media)
        boot = fake.get(facts.system_uri + ("/Settings" if "nvidia" in machine else ""))["Boot"]
        assert boot["BootSourceOverrideEnabled"] == "Disabled" or boot["BootSourceOverrideTarget"] == "Hdd"
        assert bmc.read_power() is facts.power and fake.sent("POST", "ComputerSystem.Reset") == []


@pytest.mark.parametrize("machine", MACHINES)
def test_a_bmc_that_takes_no_writes_is_never_called_a_success(machine: str) -> None:
    with start_bmc(FakeBmc(machine, writes=False)) as fake, open_bmc(fake, deadline_s=5) as bmc:
        for ask, slugs in (
            (bmc.power_off, {"power_failed"}),
            (lambda: bmc.power_off(graceful_s=0.1), {"power_failed"}),
            (lambda: bmc.insert_media(URLS), {"no_virtual_media", "media_rejected"}),
            (bmc.boot_from_media_once, {"boot_override_rejected"}),
        ):
            with pytest.raises(BmcError) as e:
                ask()
            assert e.value.slug in slugs


@pytest.mark.parametrize("machine", MACHINES)
def test_any_resource_missing_or_malformed_is_a_bmc_error_at_most(machine: str) -> None:
    """Support a shape, not a folder: each resource that probe reads is taken away, then replaced by nonsense."""
    with start_bmc(FakeBmc(machine)) as fake, open_bmc(fake) as bmc:
        bmc.probe()
        read = sorted({s.path.rstrip("/").lower() for s in fake.seen})
        whole = dict(fake.resources)
        for path in read:
            for instead in (None, {"Members": "x", "Boot": [], "Actions": 7, "Links": {"ManagedBy": [3]}, "MediaTypes": [None]}):
                fake.resources = {**whole, path: instead}
                try:
                    with open_bmc(fake, deadline_s=5) as other:
                        other.probe()
                except BmcError as e:
                    assert e.slug in BMC_CLASSES
