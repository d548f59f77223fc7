"""Orders about a server's power: by whom, when they are refused, what is confirmed, what the audit says. The BMCs are fakes that keep their power."""

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from operator_site import BMC_PASSWORD, NEW_PASSWORD, start_site
from redfish_fake import FakeBmc, small_bmc, start_bmc
from test_cli_operator import REPAVE, Cli

from repave.app import init_site, open_site
from repave.bmc import BmcAddress
from repave.bmc.redfish import RedfishBmc
from repave.config import load_settings
from repave.domain.model import Host, Server
from repave.errors import RepaveError
from repave.store import new_id
from repave.workflow.fleet import Fleet
from repave.workflow.lease import LeaseGiven, LeaseLapsed
from repave.workflow.power import PowerSwitch


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with start_site(tmp_path / "site") as site:
        for n in (1, 2, 3):
            site.add_server(f"web{n:02}", root_disk=f"serial=S{n}")
        site.add_image("tiny")
        yield Cli(site, tmp_path)


def type_at_terminal(cli: Cli, *argv: str, words: str) -> tuple[int, str]:
    """The exit code and all that was seen, where these words are the answer to what is asked."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cli.folder)
        os.execve(sys.executable, [*REPAVE, *argv], cli.env())
    seen, is_typed, status = b"", False, None
    try:
        while select.select([terminal], [], [], 30)[0] and (piece := os.read(terminal, 4096)):
            seen += piece
            if not is_typed and b"to start:" in seen:
                os.write(terminal, words.encode() + b"\n")
                is_typed = True
        raise AssertionError(f"It stands still after {seen!r}.")
    except OSError:  # EIO: the other end has ended
        status = os.waitpid(pid, 0)[1]
    finally:
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), seen.decode()


def power_of(cli: Cli, *names: str) -> list[str]:
    return [s["power"]["state"] for s in cli.items("server", "ls") if s["name"] in names]


def orders(cli: Cli) -> list[tuple[str, str]]:
    """Of the audit: whose order, and which."""
    return [(e["actor"], e["order"]) for e in cli.site.ask("GET", "/events").json()["items"] if e["type"] == "server.power-ordered"]


def test_servers_are_switched_off_on_and_restarted_as_read_back_and_each_order_is_in_the_audit(cli: Cli) -> None:
    off = cli.run("server", "power", "web[01-02]", "off", "--yes", "--expect", "2", REPAVE_TOKEN=cli.site.tokens["operator"])
    assert off.returncode == 0 and "web01   off" in off.stdout, off.stderr
    assert sorted(cli.site.bmcs.switched) == ["web01 shut down", "web02 shut down"]
    assert power_of(cli, "web01", "web02", "web03") == ["off", "off", "on"]
    shown = cli.run("server", "power", "web[01-03]", "show", "-o", "csv", REPAVE_TOKEN=cli.site.tokens["operator"])
    assert shown.stdout.splitlines() == ["server,power,error,cause", "web01,off,,", "web02,off,,", "web03,on,,"]
    cli.site.bmcs.switched.clear()
    assert cli.run("server", "power", "web01", "on").returncode == 0 and power_of(cli, "web01") == ["on"]
    again = cli.run("server", "power", "web01", "restart", "--force", "--yes", "--expect", "1", "--json")
    assert json.loads(again.stdout)["items"] == [{"server": "web01", "power": "on", "error": None}]
    assert cli.site.bmcs.switched == ["web01 on", "web01 cut", "web01 on"]
    assert orders(cli) == [("the operator", "off")] * 2 + [("the admin", "on"), ("the admin", "restart")]


def test_power_is_taken_from_a_running_os_by_typed_words_alone(cli: Cli) -> None:
    cli.site.bmcs.off.add("https://web03.bmc.invalid")
    assert type_at_terminal(cli, "server", "power", "web[01-03]", "off", words="y")[0] == 3
    assert cli.run("server", "power", "web[01-03]", "off").returncode == 3
    assert cli.run("server", "power", "web[01-03]", "off", "--yes", "--expect", "2").returncode == 3
    assert cli.site.bmcs.switched == [] and orders(cli) == []
    code, seen = type_at_terminal(cli, "server", "power", "web[01-03]", "restart", words="restart 2")
    assert code == 0 and "web[01-02]  shut down" in seen, "of the three two are on"
    assert power_of(cli, "web01", "web02", "web03") == ["on"] * 3
    cli.site.bmcs.off |= {f"https://web{n:02}.bmc.invalid" for n in (1, 2, 3)}
    code, seen = type_at_terminal(cli, "server", "power", "web[01-03]", "off", words="")
    assert code == 0 and "to start:" not in seen, "nothing runs that could lose its power"


def test_a_live_run_owns_its_servers_power_also_one_that_is_admitted_at_the_last_moment(cli: Cli) -> None:
    body = {"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD}
    cli.site.ask("POST", "/reinstall", json=body)
    for order in ("on", "off", "restart"):
        refused = cli.site.ask("POST", "/servers/web01/power", json={"order": order})
        assert (refused.status_code, refused.json()["class"]) == (409, "in-progress")
    cli.site.bmcs.before_switch = lambda: assert_accepted(cli.site.ask("POST", "/reinstall", json=body | {"servers": ["web02"]}).status_code)
    assert cli.site.ask("POST", "/servers/web02/power", json={"order": "off"}).json()["class"] == "in-progress"
    assert cli.site.bmcs.switched == [] and power_of(cli, "web01", "web02") == ["on", "on"]
    assert cli.run("server", "power", "web[01-02]", "on").returncode == 11


def assert_accepted(status: int) -> None:
    assert status == 202


def test_a_run_that_is_admitted_while_an_os_shuts_down_finds_the_bmc_free_and_the_order_ends(cli: Cli) -> None:
    """The driver is the real one; the OS behind the BMC does not follow, so the order would wait for all of its time."""
    with start_bmc(FakeBmc("small", resources=small_bmc())) as bmc:
        bmc.rule("POST", "ComputerSystem.Reset", lambda handler, apply: (204, None))
        cli.site.bmcs.known[bmc.url] = "SN4"
        made = cli.site.add_server("web04", bmc_url=bmc.url, root_disk="serial=S4")
        server = cli.site.store.servers.get_server(made["id"])

        @contextmanager
        def open_bmc(server: Server, before_write: Callable[[], None] = lambda: None, run_id: str = "") -> Iterator[RedfishBmc]:
            with RedfishBmc(BmcAddress.of(server, BMC_PASSWORD), before_write=before_write) as opened:
                yield opened

        fleet = Fleet(cli.site.store, lambda conn, runs: None, run_timeout_s=3600)
        power = PowerSwitch(cli.site.store, fleet, open_bmc, graceful_s=20)
        with ThreadPoolExecutor(1) as pool:
            order = pool.submit(power.carry_out, server, "restart", force=False, actor="the operator")
            wait_until(lambda: bmc.sent("POST") != [])
            admitted = cli.site.ask("POST", "/reinstall", json={"servers": ["web04"], "image": "tiny", "password": NEW_PASSWORD})
            with RedfishBmc(BmcAddress.of(server, BMC_PASSWORD), deadline_s=5) as bmc_of_the_run:
                bmc_of_the_run.probe()
            assert admitted.status_code == 202
            with pytest.raises(RepaveError) as refused:
                order.result(timeout=30)
        assert refused.value.slug == "in-progress"
        assert [body["ResetType"] for body in bmc.sent("POST")] == ["GracefulShutdown"]


def wait_until(reached: Callable[[], bool], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("end", [LeaseLapsed, LeaseGiven])
def test_an_order_is_cut_short_where_its_worker_may_send_nothing_any_more(cli: Cli, end: type[Exception]) -> None:
    def end_lease() -> None:
        if cli.site.bmcs.switched:
            raise end

    cli.site.bmcs.before_switch = end_lease
    cut = cli.site.ask("POST", "/servers/web01/power", json={"order": "restart"})
    assert (cut.status_code, cut.json()["class"], cut.json()["retryable"]) == (503, "order-cut-short", True)
    assert cli.site.bmcs.switched == ["web01 shut down"] and power_of(cli, "web01") == ["off"]
    assert orders(cli) == [("the admin", "restart")]


def test_a_service_that_stops_sends_no_order_to_a_bmc(tmp_path: Path) -> None:
    """As it is put together to serve: the lease is asked last, when the order is in the audit."""
    project_id = init_site(tmp_path).project.id
    with start_bmc(FakeBmc("small", resources=small_bmc())) as bmc, open_site(load_settings(tmp_path)) as site:
        server = Server(
            id=new_id(), name="web01", project_id=project_id, bmc_url=bmc.url, bmc_username="root", bmc_tls_verify="true", bmc_certificate_sha256=None,
            bmc_system_uri=None, manufacturer="", model="", serial="", uuid="", macs=(), arch="amd64", boot="uefi", rack="", unit="", root_disk={},
            network=None, created_at=site.store.now(),
        )  # fmt: skip
        site.store.servers.add_server(server, bmc_password=BMC_PASSWORD, blank=True)
        site.engine.lease.stop_effects()
        with pytest.raises(RepaveError) as cut:
            site.power.carry_out(server, "off", force=True, actor="the operator")
        assert cut.value.slug == "order-cut-short" and bmc.sent("POST") == []


def test_power_that_another_servers_bmc_shows_is_not_told_as_this_servers_and_never_taken(cli: Cli) -> None:
    cli.site.bmcs.known["https://web02.bmc.invalid"] = "SN99"
    shown = cli.run("server", "power", "web[01-02]", "show", "-o", "csv")
    assert shown.returncode == 10
    told = "The BMC shows another serial number or UUID than the one recorded."
    assert shown.stdout.splitlines() == ["server,power,error,cause", "web01,on,,", f"web02,,Repave.3103,{told}"]
    assert "✗ web02" in shown.stderr
    assert cli.run("server", "power", "web02", "show").returncode == 3
    for order in ("off", "restart"):
        code, seen = type_at_terminal(cli, "server", "power", "web[01-02]", order, words=f"{order} 2")
        assert code == 3 and "web02: the BMC is another server's" in seen and "to start:" not in seen
    assert cli.site.bmcs.switched == [] and orders(cli) == []


def test_a_locked_server_and_one_that_repave_runs_on_keep_their_power(cli: Cli) -> None:
    cli.run("server", "lock", "web01", "--reason", "database, ask first")
    web02 = cli.site.ask("GET", "/servers/web02").json()
    cli.site.store.servers.record_host(Host("h1", "head", web02["serial"], web02["uuid"], ()))
    for name, slug in (("web01", "locked"), ("web02", "own-host")):
        for order in ("off", "restart"):
            refused = cli.site.ask("POST", f"/servers/{name}/power", json={"order": order, "force": True})
            assert (refused.status_code, refused.json()["class"]) == (409, slug)
        assert cli.site.ask("POST", f"/servers/{name}/power", json={"order": "on"}).status_code == 200
    refused = cli.run("server", "power", "web01", "off", "--yes", "--expect", "1")
    assert refused.returncode == 3 and "database, ask first" in refused.stderr
    assert cli.site.bmcs.switched == ["web01 on", "web02 on"]


def test_a_viewer_may_not_and_a_bmc_that_does_not_answer_is_named(cli: Cli) -> None:
    assert cli.site.ask("POST", "/servers/web01/power", as_="viewer", json={"order": "on"}).status_code == 403
    cli.site.bmcs.known["https://web02.bmc.invalid"] = "unreachable"
    done = cli.run("server", "power", "web[01-02]", "on")
    assert done.returncode == 10 and "✗ web02" in done.stderr and "Repave.2101" in done.stderr


def test_the_console_of_a_server_is_found_beside_its_other_verbs(cli: Cli) -> None:
    assert cli.run("server", "console", "web01").stderr == cli.run("console", "web01").stderr != ""
