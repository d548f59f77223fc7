"""The alert rules and the dashboard that we ship, by Prometheus's own tool: each alert fires where it should, and all ask for what /metrics has."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from operator_site import Site, start_site

from repave.lab.os_images import default_cache
from repave.lab.os_packages import fetch_packages

FILES = Path(__file__).parents[2] / "integrations"
RULES = FILES / "prometheus/repave-alerts.yml"


@pytest.fixture(scope="session")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Out of Debian's package, which is unpacked and not installed: that would start a Prometheus here."""
    folder = tmp_path_factory.mktemp("prometheus")
    fetch_packages(["prometheus"], folder, default_cache())
    return str(folder / "usr/bin/promtool")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_site(tmp_path_factory.mktemp("site")) as site:
        yield _scrape(site)


def _scrape(site: Site) -> str:
    return requests.get(f"{site.url}/metrics", headers={"X-Auth-Token": site.tokens["viewer"]}, timeout=20).text


def run(*command: str | Path, stdin: str = "") -> None:
    said = subprocess.run([str(word) for word in command], input=stdin, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stdout + said.stderr


def test_each_alert_fires_where_it_should_and_is_quiet_where_all_is_well(promtool: str) -> None:
    alerts = re.findall(r"alert: (\w+)", RULES.read_text())
    tests = RULES.with_name("repave-alerts-test.yml")
    named = re.findall(r"- name: (\w+) (bad|well)", tests.read_text())
    assert sorted(named) == sorted((alert, kind) for alert in alerts for kind in ("bad", "well"))
    run(promtool, "check", "rules", RULES)
    run(promtool, "test", "rules", tests)


def test_what_metrics_says_is_as_prometheus_wants_it(promtool: str, metrics: str) -> None:
    run(promtool, "check", "metrics", stdin=metrics)


def test_alerts_and_dashboard_ask_for_what_metrics_has(promtool: str, metrics: str, tmp_path: Path) -> None:
    panels = json.loads((FILES / "grafana/repave.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(asked)]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    run(promtool, "check", "rules", tmp_path / "panels.yml")
    known = set(re.findall(r"^# TYPE (\w+)", metrics, re.MULTILINE))
    for name in re.findall(r"repave_\w+", RULES.read_text() + " ".join(asked)):
        assert name in known or re.sub(r"_(bucket|sum|count)$", "", name) in known, name
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
