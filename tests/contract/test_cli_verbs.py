"""Verbs over nodesets and lists, as a script uses them: one service, its BMCs and runs moved by hand."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_site import BMC_PASSWORD, NEW_PASSWORD, start_site
from test_cli_operator import Cli, known_bmcs

from repave.cli.main import run
from repave.domain.model import Step
from repave.domain.states import Ending
from repave.errors import RepaveError


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Six servers; of the batch of web[01-03], web01 runs, web02 has failed before the line and web03 has begun."""
    folder = tmp_path_factory.mktemp("verbs")
    with start_site(folder / "site") as site:
        cli = Cli(site, folder)
        for n in range(1, 7):
            site.add_server(f"web{n:02}", root_disk=f"serial=S{n}")
        site.add_image("tiny")
        body = {"servers": ["web01", "web02", "web03"], "image": "tiny", "password": NEW_PASSWORD}
        assert site.ask("POST", "/reinstall", json=body).status_code == 202
        names = {s.id: s.name for s in site.store.servers.list_servers(site.project.id)[0]}
        for run in site.store.runs.list_runs():
            site.store.runs.record_step(run.id, Step.BOOT_RAMDISK)
            if names[run.server_id] == "web01":
                site.store.runs.record_ending(run.id, Ending.PROVED, None)
            if names[run.server_id] == "web02":
                site.store.runs.record_ending(run.id, Ending.RETURNED, RepaveError("boot_override_ignored").as_json())
        yield cli


def said(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- runs and batches ----


def test_a_run_tells_its_steps_its_side_of_the_line_and_its_attempts(site: Cli) -> None:
    failed = said(site.run("run", "web02"))
    assert "✗ web02  failed · before the line: its root disk is untouched · attempt 1 of 1" in failed
    assert "✗ 4 boot-ramdisk" in failed and "the line, not crossed" in failed and "Repave.2110" in failed and "Next: repave batch retry" in failed
    whole = json.loads(site.run("run", "web02", "--json").stdout)
    assert whole["past_the_line"] is False and [a["attempt"] for a in whole["attempts"]] == [1]
    assert "never reinstalled" in said(site.run("run", "web06"), 3)


def test_a_report_is_a_row_a_server_for_people_sheets_and_programs(site: Cli) -> None:
    table = said(site.run("report"))
    assert "web02   failed" in table and "Repave.2110" in table
    rows = list(csv.DictReader(io.StringIO(site.run("batch", "report", "-o", "csv").stdout)))
    assert [(r["server"], r["state"], r["past_the_line"]) for r in rows] == [("web01", "running", "no"), ("web02", "failed", "no"), ("web03", "working", "no")]
    assert json.loads(site.run("report", "--json").stdout)["batch"]["counts"]["failed"] == 1


@pytest.mark.parametrize(("what", "code"), [(("web01",), 0), (("web02",), 11), (("web[01-02]",), 10), (("web[04-06]",), 0), (("web[01-03]",), 124), ((), 124)])
def test_wait_takes_nodesets_and_its_exit_code_says_how_they_ended(site: Cli, what: tuple[str, ...], code: int) -> None:
    text = said(site.run("wait", *what, "--timeout", "0.3"), code)
    assert "\x1b" not in text
    if code == 124:
        assert "web03 not ended" in text and "▶ web03  4/8 boot-ramdisk" in text and "before the line" in text


def test_wait_knows_batches_by_their_id_and_refuses_what_is_neither(site: Cli) -> None:
    batch = site.items("batch", "ls")[0]["id"]
    assert "web03 not ended" in said(site.run("wait", batch, "--timeout", "0.3"), 124)
    assert "Did you mean" in said(site.run("wait", "web1"), 3)


# ---- plans ----


def test_a_plan_that_was_looked_at_is_done_or_nothing_is(site: Cli) -> None:
    plan = json.loads(site.run("reinstall", "web[04-05]", "--image", "tiny", "--plan-only", "--json").stdout)["id"]
    argv = ("reinstall", "web[04-05]", "--image", "tiny", "--plan", plan, "--yes", "--expect", "2", "--rehearse", "--detach")
    assert said(site.run("server", "set", "web05", "--root-disk", "serial=OTHER")) == "web05 changed.\n"
    before = site.asked()
    assert "out of date" in said(site.run(*argv), 3) and site.asked() == before


def test_unready_servers_are_left_out_and_named_when_that_was_asked_for(site: Cli) -> None:
    said(site.run("server", "lock", "web05", "--reason", "database, ask first"))
    argv = ("reinstall", "web[04-05]", "--image", "tiny", "--plan-only")
    assert "PROBLEM" in said(site.run(*argv), 3)
    text = said(site.run(*argv, "--skip-unready"))
    assert "LEFT OUT web05  Repave.1007" in text and "· 1 server ·" in text and "web05 locked" in text
    refused = site.run("reinstall", "web[04-05]", "--image", "tiny", "--skip-unready", "--yes", "--expect", "2", "--rehearse")
    assert "1 server, not the 2 expected" in said(refused, 3)
    said(site.run("server", "unlock", "web05"))


def test_servers_that_are_being_reinstalled_name_their_batch(site: Cli) -> None:
    argv = ("reinstall", "web03", "--image", "tiny", "--yes", "--expect", "1", "--password-stdin")
    text = said(site.run(*argv, stdin=NEW_PASSWORD), 3)
    batch = site.items("batch", "ls")[0]["id"]
    assert f"Next: repave watch {batch}" in text and "the admin" in text and len(site.items("batch", "ls")) == 1


def test_a_plan_says_what_to_be_careful_about(site: Cli) -> None:
    site.site.add_server("new01")
    plan = said(site.run("reinstall", "new01", "--image", "tiny", "--plan-only"))
    assert "CAREFUL  new01: its disks were never seen" in plan and "TIME" in plan and "not known" in plan and "STOPS    never by itself" in plan
    said(site.run("server", "rm", "new01", "--yes"))


# ---- servers ----


def test_a_verb_over_a_nodeset_does_what_it_can_and_names_the_others(site: Cli) -> None:
    site.site.bmcs.known["https://web06.bmc.invalid"] = "unreachable"
    try:
        probed = site.run("server", "probe", "web[05-06]", "-o", "csv")
        rows = {r["server"]: r for r in csv.DictReader(io.StringIO(probed.stdout))}
        assert probed.returncode == 10 and "1 BMC as we know it, not: web06." in probed.stderr
        assert (rows["web05"]["same"], rows["web05"]["power"], rows["web06"]["error"]) == ("yes", "on", "Repave.2101")
        assert (rows["web05"]["carrier"], rows["web05"]["in_the_way"]) == ("media", "") and "does not answer" in rows["web06"]["in_the_way"]
        changed = said(site.run("server", "set", "web[05-06]", "--password-stdin", stdin=BMC_PASSWORD), 10)
        assert "✗ web06" in changed and "web05 changed." in changed
    finally:
        site.site.bmcs.known["https://web06.bmc.invalid"] = "SN6"
    assert "can not be said of 2" in said(site.run("server", "set", "web[05-06]", "--unit", "7"), 2)


def test_another_server_behind_a_bmc_is_told_by_a_probe_and_its_power_is_not_taken_for_ours(site: Cli) -> None:
    def power_seen() -> object:
        return next(s["power"] for s in site.items("server", "ls") if s["name"] == "web06")

    before = power_seen()
    site.site.bmcs.known["https://web06.bmc.invalid"] = "SN66"
    probed = said(site.run("server", "probe", "web06"), 10)
    assert "not: web06" in probed and "another server answers than the one we know" in probed
    assert power_seen() == before
    site.site.bmcs.known["https://web06.bmc.invalid"] = "SN6"
    assert said(site.run("server", "probe", "web06"), 0) and power_seen() != before


def test_the_pairs_are_shown_before_servers_are_added(site: Cli) -> None:
    known_bmcs(site, 12)
    argv = ("server", "add", "db[01-12]", "--bmc", "https://10.9.0.[11-22]", "--user", "root", "--password-stdin")
    asked = said(site.run(*argv, stdin=BMC_PASSWORD), 3)
    assert "db01 → https://10.9.0.11 … db12 → https://10.9.0.22, 12 paired in order" in asked
    whole = said(site.run(*argv, "--show-pairs", stdin=BMC_PASSWORD), 3)
    assert all(f"db{n:02} → https://10.9.0.{10 + n}" in whole for n in range(1, 13))
    assert not [s for s in site.items("server", "ls") if s["name"].startswith("db")]


# ---- lists, events, one request ----


def test_lists_are_tables_names_csv_or_json(site: Cli) -> None:
    names = site.run("server", "ls", "-o", "name").stdout.split()
    assert names == [f"web{n:02}" for n in range(1, 7)]
    assert site.run("server", "ls", "-o", "csv").stdout.splitlines()[0] == "name,state,image,model,serial,rack,unit,error,locked"
    assert site.run("server", "ls", "-o", "json").stdout == site.run("server", "ls", "--json").stdout
    assert site.run("server", "ls", "-o", "yaml").returncode == 2


def test_a_cell_that_a_sheet_would_take_for_a_formula_is_text(site: Cli) -> None:
    said(site.run("server", "set", "web06", "--rack", "=cmd()"))
    assert "'=cmd()" in site.run("server", "ls", "-o", "csv").stdout
    assert site.items("server", "ls")[5]["rack"] == "=cmd()"


def test_events_are_the_newest_and_those_after_a_seq(site: Cli) -> None:
    last = site.items("events", "--limit", "3")
    assert len(last) == 3 and last[0]["seq"] < last[2]["seq"] == site.site.ask("GET", "/events").json()["items"][-1]["seq"]
    assert [e["seq"] for e in site.items("events", "--after", str(last[0]["seq"]))] == [e["seq"] for e in last[1:]]
    batch = site.items("batch", "ls")[0]["id"]
    assert {e["batch"] for e in site.items("events", "--batch", batch)} == {batch}


def test_one_request_is_sent_by_hand(site: Cli) -> None:
    assert json.loads(site.run("api", "get", "servers/web01").stdout)["name"] == "web01"
    assert json.loads(site.run("api", "POST", "/repave/v1/plans", "--data", '{"servers": ["web04"], "image": "tiny"}').stdout)["id"].startswith("p-")
    body = json.dumps({"servers": ["web04"], "image": "tiny"})
    assert json.loads(site.run("api", "POST", "plans", "--data", "-", stdin=body).stdout)["erased"][0]["server"] == "web04"
    assert "Repave.1002" in said(site.run("api", "GET", "servers/nobody"), 3)
    assert site.run("api", "POST", "plans", "--data", "{").returncode == 2


def test_quiet_prints_data_and_errors_alone(site: Cli) -> None:
    quiet = site.run("server", "probe", "web01", "-q", "-o", "name")
    assert (quiet.stdout, quiet.stderr) == ("web01\n", "")
    assert "Repave.1002" in site.run("-q", "server", "show", "nobody").stderr


# ---- where, and how it begins ----


def test_a_context_is_a_site_by_name(site: Cli, tmp_path: Path) -> None:
    (tmp_path / "repave").mkdir()
    (tmp_path / "repave/prod.json").write_text(json.dumps({"endpoint": site.site.url, "token": site.site.tokens["viewer"]}))
    home: dict[str, Any] = {"REPAVE_ENDPOINT": "http://127.0.0.1:9", "XDG_CONFIG_HOME": str(tmp_path)}
    assert "viewer of project default" in site.run("whoami", "--context", "prod", **home).stdout
    assert "There is no" in said(site.run("whoami", "--context", "test", **home), 2)


def test_a_login_is_kept_where_its_owner_alone_can_read_it_and_a_token_that_is_none_is_not_kept(site: Cli, tmp_path: Path) -> None:
    home: dict[str, Any] = {"XDG_CONFIG_HOME": str(tmp_path)}
    kept = site.run("login", site.site.url + "/", "--name", "prod", "--token-stdin", stdin=site.site.tokens["viewer"] + "\n", **home)
    assert "viewer of project default" in said(kept) and site.site.tokens["viewer"] not in said(kept)
    assert (tmp_path / "repave/prod.json").stat().st_mode & 0o777 == 0o600 and [p.name for p in (tmp_path / "repave").iterdir()] == ["prod.json"]
    assert "viewer of project default" in site.run("whoami", "--context", "prod", REPAVE_ENDPOINT="http://127.0.0.1:9", **home).stdout
    said(site.run("login", site.site.url, "--name", "prod", "--token-stdin", stdin="wrong\n", **home), 4)
    assert "viewer of project default" in site.run("whoami", "--context", "prod", **home).stdout
    assert "--token-stdin" in said(site.run("login", site.site.url, **home), 2)
    assert "is no name of a context" in said(site.run("login", site.site.url, "--name", "../x", "--token-stdin", stdin=site.site.tokens["viewer"], **home), 2)


def test_a_key_goes_by_its_name(site: Cli) -> None:
    said(site.run("key", "add", "ci"))
    said(site.run("key", "rm", "ci"))
    assert "ci" not in site.run("key", "ls", "-o", "name").stdout.split()


def test_completion_and_manual_know_every_command(site: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(word in script for word in ("reinstall", "skip-unready", "doctor", "at-once")), shell
        assert shell != "bash" or subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    page = said(site.run("man"))
    assert page.startswith(".TH REPAVE 1") and "repave server probe" in page and "EXIT STATUS" in page
    assert not [line for line in page.splitlines() if line.startswith((". ", "'"))]


def test_help_names_the_commands_the_options_of_all_and_the_exit_codes(site: Cli) -> None:
    text = said(site.run("--help"))
    assert all(word in text for word in ("doctor", "--progress", "--context", "124 --timeout passed"))
    assert "--skip-unready" in said(site.run("reinstall", "--help"))
    assert "Help: repave server --help" in said(site.run("server", "lss"), 2)
