"""The command line as a process, against a real service; a pipe on each side, as in a script."""

import hashlib
import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from operator_site import BMC_PASSWORD, NEW_PASSWORD, Site, start_site

from repave.api import wire_errors
from repave.cli import docs
from repave.cli.client import Client, Endpoint
from repave.cli.output import Exit, exit_code
from repave.domain.model import Step
from repave.domain.states import Ending
from repave.errors import CATALOGUE, CLOUDDC, RepaveError
from repave.images.fetch import ImageSources
from repave.lab.fault_proxy import Rule, start_fault_proxy

REPAVE = [sys.executable, "-m", "repave.cli.main"]


@dataclass
class Cli:
    site: Site
    folder: Path

    def env(self, **more: str) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_")}
        return keep | {"REPAVE_ENDPOINT": self.site.url, "REPAVE_TOKEN": self.site.tokens["admin"]} | more

    def run(self, *argv: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*REPAVE, *argv], input=stdin, capture_output=True, text=True, timeout=60, env=self.env(**more), cwd=self.folder)

    def items(self, *argv: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run(*argv, "--json").stdout)["items"]
        return found

    def asked(self) -> int:
        """How many changes the service has seen."""
        return len(self.site.ask("GET", "/events").json()["items"])


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with start_site(tmp_path / "site") as site:
        yield Cli(site, tmp_path)


@pytest.fixture
def fleet(cli: Cli) -> Cli:
    """Four servers and an image."""
    for n in range(1, 5):
        cli.site.add_server(f"web{n:02}", root_disk=f"serial=S{n}")
    cli.site.add_image("tiny")
    return cli


def known_bmcs(cli: Cli, count: int) -> None:
    cli.site.bmcs.known |= {f"https://10.9.0.{10 + n}": f"SN{n}" for n in range(1, count + 1)}


# ---- servers ----


def test_a_nodeset_of_servers_is_paired_with_a_nodeset_of_bmcs_and_failures_are_named(cli: Cli) -> None:
    known_bmcs(cli, 2)
    argv = ("server", "add", "web[01-03]", "--bmc", "https://10.9.0.[11-13]", "--user", "root", "--password-stdin", "--yes")
    done = cli.run(*argv, stdin=BMC_PASSWORD + "\n")
    assert done.returncode == 10, done.stderr
    assert "✗ web03" in done.stderr and "Repave.2101" in done.stderr and "2 added" in done.stderr
    assert [(s["name"], s["serial"]) for s in cli.items("server", "ls")] == [("web01", "SN1"), ("web02", "SN2")]
    assert BMC_PASSWORD not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


CSV_HEAD = "name,bmc,user,secret_env,rack,unit,mac,address,prefix,gateway,dns,vlan,root_disk\n"
CSV_GOOD = "web01,https://10.9.0.11,root,BMC_PW,r1,7,aa:bb:cc:00:00:01,10.0.0.5,24,10.0.0.1,10.0.0.2 10.0.0.3,,serial=S1\n"


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ("web02,,root,BMC_PW,,,,,,,,,\n", "bmc"),
        ("web02,https://10.9.0.12,root,NO_SUCH,,,,,,,,,\n", "secret_env"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,,,x,,,,\n", "prefix"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,aa:bb:cc:00:00:02,10.0.0.999,24,,,,\n", "address"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,aa:bb:cc:00:00:02,10.0.0.6,33,,,,\n", "prefix"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,aa:bb:cc:00:00:02,10.0.0.6,24,10.1.0.1,,,\n", "gateway"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,aa:bb:cc:00:00:02,10.0.0.6,24,,,4095,\n", "vlan"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,,,,,,,colour=red\n", "root_disk"),
        ("web02,10.9.0.12,root,BMC_PW,,,,,,,,,\n", "bmc"),
        ("web 2,https://10.9.0.12,root,BMC_PW,,,,,,,,,\n", "name"),
        ("web01,https://10.9.0.12,root,BMC_PW,,,,,,,,,\n", "name"),
        ("web02,https://10.9.0.11,root,BMC_PW,,,,,,,,,\n", "bmc"),
        ("web02,https://10.9.0.12,root,BMC_PW,,,,,,,,,,more\n", "root_disk"),
    ],
)
def test_a_csv_file_with_a_mistake_is_refused_whole_naming_line_and_column(cli: Cli, line: str, column: str) -> None:
    file = cli.folder / "servers.csv"
    file.write_text(CSV_HEAD + CSV_GOOD + line)
    refused = cli.run("server", "add", "--csv", str(file), "--yes", BMC_PW=BMC_PASSWORD)
    assert (refused.returncode, cli.site.bmcs.asked, cli.items("server", "ls")) == (2, [], []), refused.stderr
    assert f"servers.csv:3: {column}: " in refused.stderr and "Traceback" not in refused.stderr
    assert BMC_PASSWORD not in refused.stderr


def test_all_mistakes_of_a_csv_file_are_told_at_once(cli: Cli) -> None:
    file = cli.folder / "servers.csv"
    file.write_text(CSV_HEAD + "web01,,root,BMC_PW,,,,,,,,,\n" + CSV_GOOD.replace("web01", "web02").replace(",24,", ",x,"))
    said = cli.run("server", "add", "--csv", str(file), "--yes", BMC_PW=BMC_PASSWORD).stderr
    assert "servers.csv:2: bmc: is empty" in said and "servers.csv:3: prefix: " in said
    file.write_text(CSV_HEAD.replace("bmc,", "bcm,") + CSV_GOOD)
    assert "servers.csv:1: unknown column 'bcm'" in cli.run("server", "add", "--csv", str(file), "--yes", BMC_PW=BMC_PASSWORD).stderr


def test_a_server_may_be_added_with_the_image_its_os_was_made_from(cli: Cli) -> None:
    known_bmcs(cli, 2)
    cli.site.add_image("tiny")
    argv = ("--bmc", "https://10.9.0.11", "--user", "root", "--password-stdin", "--image", "tiny", "--json")
    refused = cli.run("server", "add", "web01", *argv, "--windows", stdin=BMC_PASSWORD)
    assert refused.returncode == 3 and "os_type" in refused.stderr + refused.stdout
    assert cli.run("server", "add", "web01", *argv, stdin=BMC_PASSWORD).returncode == 0
    assert cli.items("server", "ls")[0]["instance"]["image"] == "tiny"


def test_a_csv_file_whose_bmcs_do_not_all_answer_says_which_and_the_same_file_again_adds_the_rest(cli: Cli) -> None:
    known_bmcs(cli, 1)
    file = cli.folder / "servers.csv"
    file.write_text("\ufeff" + CSV_HEAD + CSV_GOOD + "web02,https://10.9.0.12,root,BMC_PW,r1,8,,,,,,,\n")
    half = cli.run("server", "add", "--csv", str(file), "--yes", BMC_PW=BMC_PASSWORD)
    assert half.returncode == 10 and "1 added, 1 not: web02." in half.stderr, half.stderr
    known_bmcs(cli, 2)
    rest = cli.run("server", "add", "--csv", str(file), "--yes", BMC_PW=BMC_PASSWORD)
    assert rest.returncode == 0 and "web01: there already" in rest.stderr and "1 added." in rest.stderr
    first, second = cli.items("server", "ls")
    assert first["network"]["dns"] == ["10.0.0.2", "10.0.0.3"] and first["root_disk"] == {"serial": "S1"}
    assert (second["rack"], second["unit"], second["network"]) == ("r1", "8", None)
    asked = len(cli.site.bmcs.asked)
    assert cli.run("server", "add", "--csv", str(file), "--yes", BMC_PW=BMC_PASSWORD).returncode == 0
    assert len(cli.site.bmcs.asked) == asked


def test_show_is_for_people_and_whole_with_json(fleet: Cli) -> None:
    assert "root_disk.serial           S1\n" in fleet.run("server", "show", "web01").stdout
    assert json.loads(fleet.run("server", "show", "web01", "--json").stdout)["root_disk"] == {"serial": "S1"}
    assert "sector_bytes               512\n" in fleet.run("image", "show", "tiny").stdout
    assert json.loads(fleet.run("image", "show", "tiny", "--json").stdout)["sector_bytes"] == 512
    assert fleet.run("image", "ls").stdout.splitlines()[0].split()[:5] == ["NAME", "OS", "ARCH", "BOOT", "SECTOR"]


def test_servers_are_set_and_removed_by_nodeset(fleet: Cli) -> None:
    assert fleet.run("server", "set", "web[01-02]", "--rack", "r9", "--root-disk", "wwn=W1").returncode == 0
    assert [s["rack"] for s in fleet.items("server", "ls")] == ["r9", "r9", "", ""]
    assert fleet.run("server", "rm", "web[01-02]").returncode == 3
    assert len(fleet.items("server", "ls")) == 4
    assert fleet.run("server", "rm", "web[01-02]", "--yes").returncode == 0
    assert [s["name"] for s in fleet.items("server", "ls")] == ["web03", "web04"]
    missing = fleet.run("server", "rm", "web3", "--yes")
    assert missing.returncode == 3 and "Did you mean web03?" in missing.stderr


# ---- reinstall ----


@pytest.mark.parametrize("argv", [(), ("--yes",), ("--yes", "--expect", "3"), ("--expect", "4")])
def test_a_reinstall_that_nobody_confirmed_exits_3_and_sends_nothing(fleet: Cli, argv: tuple[str, ...]) -> None:
    before = fleet.asked()
    done = fleet.run("reinstall", "web[01-04]", "--image", "tiny", "--password-stdin", *argv, stdin=NEW_PASSWORD + "\n")
    assert done.returncode == 3, done.stderr
    assert (fleet.asked(), fleet.items("batch", "ls")) == (before, [])


def test_a_plan_is_shown_and_touches_nothing(fleet: Cli) -> None:
    before = fleet.asked()
    done = fleet.run("reinstall", "web[01-03]", "--image", "tiny", "--plan-only")
    assert done.returncode == 0
    assert (
        "web[01-03]  R1 · one root disk each, by its own serial" in done.stdout and "1 other server\n" in done.stdout and "nothing touched yet" in done.stdout
    )
    assert json.loads(fleet.run("reinstall", "web01", "--image", "tiny", "--plan-only", "--json").stdout)["erased"][0]["server"] == "web01"
    assert fleet.asked() == before


def end_runs(site: Site, *, fail: str = "") -> None:
    """What the workflow would do: the runs of the newest batch go through their steps and end."""
    while not (batches := site.store.runs.list_batches(site.project.id)):
        time.sleep(0.05)
    names = {s.id: s.name for s in site.store.servers.list_servers(site.project.id)[0]}
    for run in site.store.runs.list_runs(batch_id=batches[0].id):
        site.store.runs.record_step(run.id, Step.BOOT_RAMDISK)
        bad = names[run.server_id] in fail.split()
        site.store.runs.record_ending(run.id, Ending.RETURNED if bad else Ending.PROVED, RepaveError("boot_override_ignored").as_json() if bad else None)


@pytest.mark.parametrize(("fail", "code"), [("", 0), ("web02 web03", 10), ("web01 web02 web03", 11)])
def test_a_script_reinstalls_and_learns_from_lines_and_exit_code_how_it_ended(fleet: Cli, fail: str, code: int) -> None:
    worker = threading.Thread(target=end_runs, args=(fleet.site,), kwargs={"fail": fail})
    worker.start()
    argv = ("reinstall", "web[01-03]", "--image", "tiny", "--yes", "--expect", "3", "--password-stdin")
    done = fleet.run(*argv, stdin=NEW_PASSWORD + "\n")
    worker.join()
    assert done.returncode == code, done.stderr + done.stdout
    assert NEW_PASSWORD not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
    if code == 10:
        assert "✗ web[02-03]  4/8 boot-ramdisk · before the line · Repave.2110" in done.stdout
        assert done.stdout.index("✗ web[02-03]") < done.stdout.index("✓ web01")
    listed = fleet.run("batch", "ls").stdout.splitlines()
    assert listed[1].split()[3:7] == [str(3 - len(fail.split())), "0", "0", str(len(fail.split()))]  # RUNNING WORKING WAITING FAILED
    shown = json.loads(fleet.run("batch", "show", "--json").stdout)
    assert shown["counts"]["failed"] == len(fail.split())
    assert fleet.run("watch").returncode == code
    events = [json.loads(line) for line in fleet.run("watch", "--json").stdout.splitlines()]
    assert events[-1]["type"] == "batch.ended"


@pytest.mark.parametrize(("image", "bad", "good"), [("tiny", "Groot-Flora-7", "Administrator-7"), ("win", "Administrator-7", "Groot-Flora-7")])
def test_a_password_is_judged_by_the_user_of_the_image_before_anything_is_sent(fleet: Cli, image: str, bad: str, good: str) -> None:
    fleet.site.add_image("win", os_type="Windows")
    argv = ("reinstall", "web01", "--image", image, "--yes", "--expect", "1", "--password-stdin", "--detach")
    before = fleet.asked()
    refused = fleet.run(*argv, stdin=bad + "\n")
    assert (refused.returncode, fleet.asked()) == (3, before)
    assert "user name reversed; nothing was sent" in refused.stderr
    assert fleet.run(*argv, stdin=good + "\n").returncode == 0


# How the first answer is lost: what the client sees of it.
LOST = {
    "lost-answer": Rule("lost-answer", "POST", "/reinstall$"),
    "truncated": Rule("truncated", "POST", "/reinstall$"),
    "reset before it arrived": Rule("reset", "POST", "/reinstall$"),
    "a gateway that gave up": Rule("status", "POST", "/reinstall$", status=504),
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_answer_neither_fails_a_reinstall_or_a_retry_nor_begins_it_twice(fleet: Cli, how: str) -> None:
    with start_fault_proxy(fleet.site.url) as proxy:
        begins = (("reinstall", "web[01-02]", "--image", "tiny"), ("batch", "retry"))
        for number, argv in enumerate(begins, 1):
            proxy.set_rules([LOST[how]])
            asked = (*argv, "--yes", "--expect", "2", "--password-stdin", "--detach")
            done = fleet.run(*asked, stdin=NEW_PASSWORD + "\n", REPAVE_ENDPOINT=proxy.url)
            assert done.returncode == 0, done.stderr
            assert "Asking again; what has begun does not begin twice." in done.stderr
            listed = fleet.items("batch", "ls")
            assert (len(listed), done.stdout) == (number, listed[0]["id"] + "\n")
            end_runs(fleet.site, fail="web01 web02")
        assert [seen.fault for seen in proxy.read_log() if seen.path.endswith("/reinstall")] == [LOST[how].fault, ""] * 2


def test_an_answer_that_stays_lost_says_that_it_is_not_known_whether_it_has_begun(fleet: Cli) -> None:
    with start_fault_proxy(fleet.site.url) as proxy:
        proxy.set_rules([Rule("lost-answer", "POST", "/reinstall$", times=None)])
        client = Client(None, Endpoint(proxy.url, fleet.site.tokens["admin"]))
        with pytest.raises(RepaveError) as lost:
            client.begin("/reinstall", {"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD}, again_after_s=(0.05, 0.05))
    assert (lost.value.slug, exit_code(lost.value), len(fleet.items("batch", "ls"))) == ("answer-lost", Exit.UNREACHABLE, 1)
    assert "not known" in lost.value.problem.untouched


def test_a_service_that_was_never_reached_or_says_that_it_began_nothing_is_told_as_such(fleet: Cli) -> None:
    asked = {"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD}
    with start_fault_proxy(fleet.site.url) as proxy:
        client = Client(None, Endpoint(proxy.url, fleet.site.tokens["admin"]))
    with pytest.raises(RepaveError) as unreached:  # nobody listens there any more
        client.begin("/reinstall", asked, again_after_s=(0.05,))
    assert (unreached.value.slug, unreached.value.problem.untouched) == ("service-unreachable", "everything")


def test_only_the_typed_words_start_it(fleet: Cli) -> None:
    """On a terminal: 'y' does not, 'erase 2' does."""
    for words, begun in (("y", 0), ("erase 2", 1)):
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(fleet.folder)
            os.execve(sys.executable, [*REPAVE, "reinstall", "web[01-02]", "--image", "tiny", "--detach"], fleet.env(REPAVE_NEW_PASSWORD=NEW_PASSWORD))
        seen = b""
        while b"to start:" not in seen:
            seen += os.read(terminal, 4096)
        os.write(terminal, words.encode() + b"\n")
        with pytest.raises(OSError):  # EIO: the other end has ended
            while os.read(terminal, 4096):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if begun else 3)
        os.close(terminal)
        assert len(fleet.items("batch", "ls")) == begun


def test_a_watcher_that_stops_leaves_the_batch_alone(fleet: Cli) -> None:
    body = {"servers": ["web01"], "image": "tiny", "password": NEW_PASSWORD}
    batch = fleet.site.ask("POST", "/reinstall", json=body).json()
    assert fleet.run("watch", "--timeout", "0.5").returncode == 124
    watcher = subprocess.Popen(
        [*REPAVE, "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=fleet.env(), cwd=fleet.folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in a shell's background inherit that it is ignored
    )  # fmt: skip
    try:
        assert watcher.stdout is not None and "waiting" in watcher.stdout.readline()
        watcher.send_signal(signal.SIGINT)
        _, said = watcher.communicate(timeout=20)
    finally:
        watcher.kill()
    assert watcher.returncode == 130 and f"repave watch {batch['id']}" in said
    assert json.loads(fleet.run("batch", "show", "--json").stdout)["state"] == "working"


# ---- the rest ----


def test_an_image_is_sent_and_checked_against_the_sums_file(cli: Cli) -> None:
    disk = cli.folder / "deb.raw"
    disk.write_bytes(bytes(8 << 20))
    subprocess.run(["sfdisk", "-q", disk], input=b"label: gpt\nstart=1MiB, size=4MiB, type=uefi\n", check=True)
    (cli.folder / "SUMS").write_text(f"{'0' * 64}  deb.raw\n")
    refused = cli.run("image", "import", "deb.raw", "--sha256", "SUMS")
    assert refused.returncode == 3 and "Repave.4101" in refused.stderr
    assert cli.run("image", "import", "deb.raw").returncode == 0
    assert [i["name"] for i in cli.items("image", "ls")] == ["deb"]
    again = cli.run("image", "import", "deb.raw")
    assert again.returncode == 3 and "Repave.1003" in again.stderr
    assert cli.run("image", "rm", "deb", "--yes").returncode == 0
    assert cli.items("image", "ls") == []


def test_an_image_is_imported_from_the_services_machine_and_a_url_needs_its_digest(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "deb.raw").write_bytes(bytes(8 << 20))
    subprocess.run(["sfdisk", "-q", shelf / "deb.raw"], input=b"label: gpt\nstart=1MiB, size=4MiB, type=uefi\n", check=True)
    with start_site(tmp_path / "site", sources=ImageSources(shelf)) as site:
        cli = Cli(site, tmp_path)
        assert cli.run("image", "import", "deb.raw", "--on-service").returncode == 0
        assert [i["name"] for i in cli.items("image", "ls")] == ["deb"]
        elsewhere = cli.run("image", "verify", "deb", "--boot")
        assert elsewhere.returncode == 2 and "on the service's machine" in elsewhere.stderr
        assert cli.run("image", "import", "http://127.0.0.1/x.raw").returncode == 2
        refused = cli.run("image", "import", "http://127.0.0.1/x.raw", "--sha256", "0" * 64)
        assert refused.returncode == 3 and "import_local_addresses" in refused.stderr


def test_an_image_is_packed_into_a_folder_for_any_web_server_and_nothing_else_there_is_touched(tmp_path: Path) -> None:
    disk, folder = tmp_path / "deb.raw", tmp_path / "web"
    disk.write_bytes(bytes(8 << 20))
    subprocess.run(["sfdisk", "-q", disk], input=b"label: gpt\nstart=1MiB, size=4MiB, type=uefi\n", check=True)

    def pack(into: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*REPAVE, "image", "pack", disk, into, "--json"], capture_output=True, text=True, timeout=60)

    made = json.loads(pack(folder).stdout)
    manifest = Path(made["manifest"])
    assert manifest == folder / "manifests" / f"{made['manifest_sha256']}.json"
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == made["manifest_sha256"]
    chunks = [folder / "chunks" / chunk[0][:2] / chunk[0] for chunk in json.loads(manifest.read_bytes())["chunks"]]
    stream = b"".join(chunk.read_bytes() for chunk in chunks)
    assert subprocess.run(["zstd", "-dcq"], input=stream, capture_output=True, check=True).stdout == disk.read_bytes()
    assert all(path.stat().st_mode & 0o004 for path in [manifest, *chunks])
    assert json.loads(pack(folder).stdout)["added_bytes"] == 0
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "mine").touch()
    assert pack(tmp_path).returncode == 2 and (tmp_path / "tmp" / "mine").exists()


def test_exit_codes_tell_what_kind_of_failure_it_was(cli: Cli) -> None:
    for code in ("0 all went as asked", "3 refused", "10 ended", "124 --timeout passed", "130 Ctrl-C"):
        assert code in " ".join(cli.run("--help").stdout.split())
    assert cli.run("server", "ls", "--colour").returncode == 2
    for count in ("0", "-1", "1000000"):
        refused = cli.run("rack", "up", count)
        assert refused.returncode == 2 and "COUNT" in refused.stderr
    assert cli.run("server", "show", "nobody").returncode == 3
    assert cli.run("server", "ls", REPAVE_TOKEN="wrong").returncode == 4
    assert cli.run("key", "ls", REPAVE_TOKEN=cli.site.tokens["viewer"]).returncode == 4
    assert cli.run("server", "ls", REPAVE_ENDPOINT="http://127.0.0.1:9").returncode == 5


def test_an_init_with_a_mistake_leaves_nothing_in_the_way_of_the_next(cli: Cli) -> None:
    refused = cli.run("init", "new", "--media-url", "10.9.0.5:8472")
    assert refused.returncode == 3 and "media_url" in refused.stderr
    assert cli.run("init", "new", "--media-url", "http://10.9.0.5:8472").returncode == 0


def test_bare_repave_prints_state_and_a_next_command_that_exists(fleet: Cli) -> None:
    said = fleet.run().stdout.splitlines()
    assert len(said) <= 6 and "4 servers: 4 running · 1 image" in said[0]
    assert said[-1] == "Next:  repave reinstall 'web[01-04]' --image tiny --plan-only"
    alone = fleet.run(REPAVE_ENDPOINT="http://127.0.0.1:9")
    assert alone.returncode == 0 and "repave init && repave serve" in alone.stdout


def test_a_key_of_the_command_line_works_and_is_listed_without_its_secrets(cli: Cli) -> None:
    assert cli.run("project", "add", "gpu").returncode == 0
    made = json.loads(cli.run("key", "add", "ci", "--role", "operator", "--expires", "30d", "--project", "gpu", "--json").stdout)
    assert "operator of project gpu" in cli.run("whoami", REPAVE_TOKEN=made["token"]).stdout
    listed = cli.run("key", "ls", "--project", "gpu", "--json").stdout
    assert made["ak"] in listed and made["sk"] not in listed
    assert cli.run("key", "rm", made["id"], "--project", "gpu").returncode == 0
    assert cli.run("whoami", REPAVE_TOKEN=made["token"]).returncode == 4


def test_explain_knows_every_code(tmp_path: Path) -> None:
    from repave.cli.main import run

    for problem in CATALOGUE.values():
        assert run(["explain", problem.code]) == run(["explain", problem.slug]) == 0
    wire = set(re.findall(r'"((?:iMetal|APIGW)\.\d{4})"', inspect.getsource(wire_errors)))
    assert wire == set(CLOUDDC)
    for code in wire:
        assert run(["explain", code]) == run(["explain", code, "--json"]) == 0
    assert run(["explain", "0000"]) == 2


def test_the_generated_docs_are_up_to_date() -> None:
    assert docs.main(["--check"]) == 0


# ---- what may still be done to a batch; protection ----


def test_a_batch_is_cancelled_after_it_said_what_will_happen_and_retried_by_one_command(fleet: Cli) -> None:
    argv = ("--image", "tiny", "--yes", "--expect", "3", "--password-stdin", "--detach")
    assert fleet.run("reinstall", "web[01-03]", "--at-once", "1", *argv, stdin=NEW_PASSWORD + "\n").returncode == 0
    assert "1 of this batch at once" in fleet.run("batch", "show").stdout
    refused = fleet.run("cancel")
    assert refused.returncode == 3 and "web[01-03]" in refused.stderr and "its server is not touched" in refused.stderr
    paused = fleet.run("batch", "pause")
    assert paused.returncode == 0 and "3 wait" in paused.stderr
    assert "paused" in fleet.run("batch", "show").stdout
    assert fleet.run("batch", "resume").returncode == 0
    done = fleet.run("cancel", "--yes")
    assert done.returncode == 0 and "web[02-03]  not started" in done.stdout
    first = next(r for r in fleet.site.store.runs.list_runs(live=True))
    fleet.site.store.runs.record_ending(first.id, Ending.RETURNED, first.cancel)
    shown = fleet.run("batch", "show").stdout
    assert "web[02-03]  not started · Repave.1010" in shown and "repave batch retry" in shown
    again = fleet.run("batch", "retry", "--yes", "--expect", "3", "--password-stdin", "--detach", stdin=NEW_PASSWORD + "\n")
    assert again.returncode == 0, again.stderr
    assert len(fleet.items("batch", "ls")) == 2


def test_a_rehearsal_asks_no_password_and_its_plan_says_nothing_is_written(fleet: Cli) -> None:
    done = fleet.run("reinstall", "web[01-02]", "--image", "tiny", "--rehearse", "--yes", "--expect", "2", "--detach")
    assert done.returncode == 0, done.stderr
    assert "WRITTEN  nothing" in done.stderr and "ERASED" not in done.stderr
    assert fleet.items("batch", "ls")[0]["rehearse"]


def test_a_locked_server_stops_the_plan_with_its_reason(fleet: Cli) -> None:
    assert fleet.run("server", "lock", "web[01-02]", "--reason", "database, ask first").returncode == 0
    refused = fleet.run("reinstall", "web[01-03]", "--image", "tiny", "--yes", "--expect", "3", "--password-stdin", stdin=NEW_PASSWORD + "\n")
    assert refused.returncode == 3 and "database, ask first" in refused.stderr and "Repave.1007" in refused.stderr
    assert fleet.run("server", "unlock", "web[01-02]").returncode == 0
    assert [s["lock"] for s in fleet.items("server", "ls")] == [None] * 4


def test_a_board_swap_wants_the_new_serial_number(fleet: Cli) -> None:
    fleet.site.bmcs.known["https://web01.bmc.invalid"] = "SN99"
    assert fleet.run("server", "replace", "web01", "--yes").returncode == 2
    assert fleet.run("server", "replace", "web01", "--yes", "--expect-serial", "SN98").returncode == 3
    done = fleet.run("server", "replace", "web01", "--yes", "--expect-serial", "SN99")
    assert done.returncode == 0 and "SN1 → SN99" in done.stderr, done.stderr
