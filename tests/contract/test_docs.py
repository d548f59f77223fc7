"""The documentation is true: its commands are run, its links lead somewhere, and every page has its place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"])


def commands(page: Path) -> list[tuple[str, int]]:
    """What stands behind "$ " in its console blocks, and the exit code that a comment announces."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [(line, int(found[1]) if (found := re.search(r"# exit (\d+)$", line)) else 0) for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run([BIN / "repave", "rack", "down"], cwd=tmp_path, capture_output=True, check=False)


def shell(text: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{folder / 'bin'}:{BIN}:{os.environ['PATH']}"} | more
    return subprocess.run(["bash", "-c", text], cwd=folder, env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)


def test_the_tutorials_commands_do_what_it_says(folder: Path) -> None:
    """The machines are scripted here: the firmware of real ones takes minutes."""
    steps = commands(DOCS / "tutorial.md")
    assert len(steps) > 12
    for command, code in steps:
        if command.startswith("repave rack up"):
            command += " --scripted"
        done = shell(command, folder, REPAVE_AGENT_READY_S="8")
        assert done.returncode == code, (command, done.stdout, done.stderr)
    assert not (folder / ".repave/lab.json").exists(), "the rack is down"


# What stands in for a cluster: it writes down what it was asked, and says what the next line of the how-to waits for.
SAYS = """#!/bin/sh
printf '%s' "$(basename "$0")" >>asked
for word; do printf ' %s' "$word" >>asked; done; echo >>asked
case "$(basename "$0") $1 $2" in
  "kubeadm token create") echo "kubeadm join 10.0.0.1:6443 --token abcdef.0123456789abcdef";;
  "repave batch show") echo '{"runs": [{"server": "web01", "state": "running"}, {"server": "web02", "state": "failed"}]}';;
  "repave reinstall"*) test ! -e join.sh || cp join.sh joined;;
esac
"""


def how_to(name: str, folder: Path, programs: str) -> list[str]:
    """What was asked of the programs, a line each."""
    (folder / "bin").mkdir()
    for program in programs.split():
        (folder / "bin" / program).write_text(SAYS)
        (folder / "bin" / program).chmod(0o755)
    [script] = re.findall(r"^```bash\n(.*?)^```", (DOCS / f"how-to/{name}.md").read_text(), re.M | re.S)
    (folder / "password").write_text("Docs-7!canary\n")
    done = shell("set -euo pipefail\n" + script, folder)
    assert done.returncode == 0, done.stderr
    return (folder / "asked").read_text().splitlines()


def test_of_slurm_nodes_only_those_that_run_are_resumed(folder: Path) -> None:
    asked = how_to("slurm", folder, "scontrol squeue repave")
    assert [line.split()[0] for line in asked] == ["scontrol", "squeue", "repave", "repave", "scontrol"]
    assert "state=drain" in asked[0] and "--expect 12" in asked[2]
    assert asked[-1] == "scontrol update nodename=web01 state=resume"


def test_a_kubernetes_node_is_drained_before_and_waited_for_after_and_its_join_command_does_not_stay(folder: Path) -> None:
    asked = how_to("kubernetes", folder, "kubectl kubeadm repave")
    assert [" ".join(line.split()[:2]) for line in asked] == ["kubectl drain", "kubectl delete", "kubeadm token", "repave reinstall", "kubectl wait"]
    assert "kubeadm join 10.0.0.1:6443" in (folder / "joined").read_text() and not (folder / "join.sh").exists()


def test_what_the_how_tos_ask_of_repave_exists() -> None:
    """The programs above take anything; here the command line itself reads what they were given."""
    for page, wanted in (("slurm", "--image --yes --expect --password-stdin"), ("kubernetes", "--image --user-data --yes --expect --password-stdin")):
        offered = subprocess.run([BIN / "repave", "reinstall", "--help"], capture_output=True, text=True, check=True).stdout
        assert [option for option in wanted.split() if option not in offered] == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_page_has_its_place_in_the_site_and_the_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text())

    def leaves(entries: list[dict[str, object]]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                yield from leaves(target) if isinstance(target, list) else [str(target)]

    assert set(leaves(config["project"]["nav"])) == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    done = subprocess.run([BIN / "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / ".repave/docs").rglob("*.html"):
        loads = re.findall(
            r"<(?:script|img|iframe|source)[^>]+src=\"([^\"]+)|<link[^>]+rel=\"(?:stylesheet|preload|icon|preconnect)\"[^>]*href=\"([^\"]+)", page.read_text()
        )
        assert [a or b for a, b in loads if "://" in (a or b) or (a or b).startswith("//")] == [], page
