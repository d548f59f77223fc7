"""A BMC's password is changed: on the BMC, in the store, and in no order of failure is what opens the BMC lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_site import BMC_PASSWORD, Site, start_site
from redfish_fake import FakeBmc, refusal, small_bmc, start_bmc
from test_cli_operator import Cli

from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.errors import BmcError

NEW = "Rotated-and-Fresh-8"


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with start_site(tmp_path / "site") as site:
        for n in (1, 2, 3):
            site.add_server(f"web0{n}")
        yield Cli(site, tmp_path)


def rotate(cli: Cli, nodeset: str = "web[01-03]") -> subprocess.CompletedProcess[str]:
    return cli.run("server", "rotate", nodeset, "--yes", "--password-stdin", stdin=f"{NEW}\n")


def stored(site: Site, name: str) -> list[str]:
    server = site.store.servers.find_server(site.project.id, name)
    assert server is not None
    return site.store.servers.list_bmc_passwords(server.id)


def opens(site: Site, name: str) -> bool:
    """Whether what is stored opens the BMC, as a probe uses it."""
    return site.ask("POST", f"/servers/{name}/probe").status_code == 200


def test_a_rotation_changes_bmc_and_store_of_each_server_and_repeats_no_password(cli: Cli) -> None:
    done = rotate(cli)
    assert done.returncode == 0, done.stderr
    assert [stored(cli.site, f"web0{n}") for n in (1, 2, 3)] == [[NEW]] * 3
    assert set(cli.site.bmcs.passwords.values()) == {NEW} and len(cli.site.bmcs.passwords) == 3
    assert all(opens(cli.site, f"web0{n}") for n in (1, 2, 3))
    events = cli.site.ask("GET", "/events").text
    assert "server.password-rotated" in events and NEW not in events + done.stdout + done.stderr
    assert rotate(cli).returncode == 0, "the same again is no error"


def test_a_password_that_the_first_bmc_refuses_is_shown_to_no_other_and_the_old_one_stays(cli: Cli) -> None:
    cli.site.bmcs.rotate = "password_refused"
    done = rotate(cli)
    assert done.returncode == 3 and "Repave.2118" in done.stderr and "web[02-03] not asked" in done.stderr
    assert [stored(cli.site, f"web0{n}") for n in (1, 2, 3)] == [[BMC_PASSWORD]] * 3
    assert cli.site.bmcs.passwords == {} and opens(cli.site, "web01")


def test_a_bmc_that_says_yes_and_keeps_the_old_password_is_found_out(cli: Cli) -> None:
    cli.site.bmcs.rotate = "lies"
    assert "still in force" in rotate(cli, "web01").stderr
    assert opens(cli.site, "web01")
    cli.site.bmcs.rotate = "well"
    assert rotate(cli, "web01").returncode == 0 and stored(cli.site, "web01") == [NEW]


def test_a_bmc_that_took_it_and_then_went_silent_is_opened_by_the_next_login(cli: Cli) -> None:
    url, cli.site.bmcs.rotate = "https://web01.bmc.invalid", "dies"
    done = rotate(cli, "web01")
    assert done.returncode != 0 and "not known" in done.stderr and stored(cli.site, "web01") == [BMC_PASSWORD, NEW]
    cli.site.bmcs.known[url] = "SN1"
    assert opens(cli.site, "web01") and stored(cli.site, "web01") == [NEW]


def test_a_service_that_dies_on_either_side_of_the_change_still_opens_the_bmc(cli: Cli) -> None:
    """What is stored at the moment before the BMC is told, and nothing of ours comes after."""
    server = cli.site.store.servers.find_server(cli.site.project.id, "web02")
    assert server is not None
    cli.site.store.servers.begin_rotation(server.id, NEW)
    asked = len(cli.site.bmcs.asked)
    assert opens(cli.site, "web02")
    assert {a.password for a in cli.site.bmcs.asked[asked:]} == {BMC_PASSWORD}, "no refused login for a change that never came"
    cli.site.bmcs.passwords["https://web02.bmc.invalid"] = NEW
    assert opens(cli.site, "web02") and stored(cli.site, "web02") == [NEW]


def test_a_server_with_a_live_run_keeps_its_password(cli: Cli) -> None:
    cli.site.add_image("tiny")
    body = {"servers": ["web01"], "image": "tiny", "password": "Fresh-Start-42"}
    assert cli.site.ask("POST", "/reinstall", json=body).status_code == 202
    assert "Repave.1006" in rotate(cli, "web01").stderr and stored(cli.site, "web01") == [BMC_PASSWORD]


# ---- the driver ----


def with_accounts(*names: str) -> FakeBmc:
    resources = small_bmc()
    resources["/redfish/v1"]["AccountService"] = {"@odata.id": "/redfish/v1/AccountService"}
    resources["/redfish/v1/accountservice"] = {"Accounts": {"@odata.id": "/redfish/v1/AccountService/Accounts"}}
    members = [f"/redfish/v1/AccountService/Accounts/{n}" for n in range(len(names))]
    resources["/redfish/v1/accountservice/accounts"] = {"Members": [{"@odata.id": uri} for uri in members]}
    resources |= {uri.lower(): {"UserName": name} for uri, name in zip(members, names, strict=True)}
    return FakeBmc("small", resources=resources)


def test_the_driver_changes_the_account_that_it_logs_in_with_and_no_other() -> None:
    bmc = with_accounts("root", "repave", "")
    bmc.rule("PATCH", "Accounts/1", lambda handler, apply: (204, None))
    with start_bmc(bmc), RedfishBmc(BmcAddress(bmc.url, "repave", BMC_PASSWORD, tls_verify=False)) as driver:
        driver.set_password(NEW)
    assert bmc.sent("PATCH", "Accounts/1") == bmc.sent("PATCH") == [{"Password": NEW}]


@pytest.mark.parametrize(("names", "status", "slug"), [(("repave",), 400, "password_refused"), (("root",), 204, "forbidden"), ((), 204, "forbidden")])
def test_the_driver_says_why_a_password_was_not_taken(names: tuple[str, ...], status: int, slug: str) -> None:
    bmc = with_accounts(*names)
    bmc.rule("PATCH", "Accounts/0", lambda handler, apply: (status, refusal("Base.1.8.PropertyValueFormatError")))
    with start_bmc(bmc), RedfishBmc(BmcAddress(bmc.url, "repave", BMC_PASSWORD, tls_verify=False)) as driver, pytest.raises(BmcError) as raised:
        driver.set_password(NEW)
    assert raised.value.slug == slug and NEW not in str(raised.value)
