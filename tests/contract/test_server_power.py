"""Orders about a server's power: by whom, when they are refused, what is confirmed, what the audit says. The BMCs are fakes that keep their power."""

import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_site import NEW_PASSWORD, start_site
from test_cli_operator import REPAVE, Cli

from repave.domain.model import Host


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
    seen = b""
    try:
        while piece := os.read(terminal, 4096):
            seen += piece
            if b"to start:" in piece:
                os.write(terminal, words.encode() + b"\n")
    except OSError:  # EIO: the other end has ended
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode()


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
