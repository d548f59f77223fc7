"""openapi.json is what a generated client needs, says what the routes do, and leaves none of ours out."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
from operator_site import NEW_PASSWORD, Site, start_site

from repave.api.shapes import ANSWERS
from repave.domain.states import Ending

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with start_site(tmp_path_factory.mktemp("site")) as site:
        for name in ("web01", "web02"):
            site.add_server(name)
        site.add_image("tiny")
        yield site


@pytest.fixture(scope="module")
def served(site: Site) -> dict[str, Any]:
    answer = requests.get(f"{site.url}/repave/v1/openapi.json", timeout=20)  # without a key
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document


def test_every_route_of_ours_says_what_it_answers_and_how_it_fails(served: dict[str, Any]) -> None:
    operations = {o["operationId"]: o for path, of in served["paths"].items() for o in of.values() if path.startswith("/repave/")}
    assert set(operations) - {"show_openapi"} <= set(ANSWERS), "a new route needs its line in api/shapes.py"
    for name, operation in operations.items():
        good = [code for code in operation["responses"] if code.startswith("2")]
        assert good and (ANSWERS.get(name, ...) is None) == ("content" not in operation["responses"][good[0]]), name
        assert name in ("show_openapi", "health") or "application/problem+json" in operation["responses"]["default"]["content"], name
    links = [part.split('"')[0] for part in json.dumps(served).split('"$ref": "#/components/schemas/')[1:]]
    assert set(links) == set(served["components"]["schemas"])  # none leads nowhere, none is left over


def test_its_schemas_are_json_schema_and_both_ways_to_log_in_are_there(served: dict[str, Any]) -> None:
    assert served["openapi"] == "3.1.0" and served["security"] == [{"token": []}, {"signature": []}]
    assert set(served["components"]["securitySchemes"]) == {"token", "signature"}
    for schema in served["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})


def test_the_check_of_answers_sees_what_is_missing_or_too_much(site: Site) -> None:
    answer = site.ask("GET", "/whoami")
    for body in (answer.json() | {"colour": "red"}, {k: v for k, v in answer.json().items() if k != "role"}, answer.json() | {"role": "king"}):
        answer._content = json.dumps(body).encode()
        with pytest.raises(AssertionError, match="whoami"):
            site.document.check("GET", "/repave/v1/whoami", answer)


def test_a_client_generated_from_it_plans_reinstalls_and_follows_the_batch(
    site: Site, served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(served))
    (tmp_path / "config.yml").write_text("post_hooks: []\ncontent_type_overrides: {application/gzip: application/octet-stream}\n")
    made = tmp_path / "repave_client"
    command = [BIN / "openapi-python-client", "generate", "--path", tmp_path / "openapi.json", "--output-path", made, "--meta", "none"]
    said = subprocess.run([*command, "--config", tmp_path / "config.yml", "--fail-on-warning"], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr
    monkeypatch.syspath_prepend(tmp_path)

    def route(name: str) -> Any:
        return importlib.import_module(f"repave_client.api.operator.{name}").sync

    models = importlib.import_module("repave_client.models")
    client = importlib.import_module("repave_client").AuthenticatedClient(site.url, site.tokens["operator"], prefix="", auth_header_name="X-Auth-Token")
    plan = route("plan")(client=client, body=models.Target(servers=["web01", "web02"], image="tiny"))
    assert [(e.server, e.image, e.state) for e in plan.erased] == [("web01", "tiny", "running"), ("web02", "tiny", "running")] and plan.problems == []
    each = models.ReinstallEach.from_dict({"web02": {"hostname": "db-7"}})
    body = models.Reinstall(servers=["web01", "web02"], image="tiny", password=NEW_PASSWORD, plan=plan.id, each=each)
    assert [e.hostname for e in route("reinstall")(client=client, body=body, dry_run=True).erased] == ["web01", "db-7"]
    batch = route("reinstall")(client=client, body=body, idempotency_key="from-the-client")
    assert route("reinstall")(client=client, body=body, idempotency_key="from-the-client").id == batch.id
    refused = route("reinstall")(client=client, body=body)
    assert isinstance(refused, models.Problem) and (refused.status, refused.class_) == (409, "conflict")  # its plan is out of date
    for run in batch.runs:
        site.store.runs.record_ending(run.id, Ending.PROVED, None)
    ended = route("show_batch")(batch.id, client=client)
    assert (ended.state, ended.counts.running, [r.state for r in ended.runs]) == ("succeeded", 2, ["running", "running"])
    assert {r.server for r in route("list_runs")(client=client, state="running", server="web01").items} == {"web01"}


def test_no_request_that_the_document_allows_makes_the_service_fail_or_answer_otherwise_than_it_says(site: Site) -> None:
    """Some seconds of schemathesis; more of it by hand finds more: raise --max-examples."""
    found = subprocess.run(
        [
            BIN / "schemathesis", "run", f"{site.url}/repave/v1/openapi.json", "-H", f"X-Auth-Token: {site.tokens['admin']}", "--max-examples", "5",
            "--phases", "fuzzing", "--mode", "all", "--exclude-operation-id", "add_image", "--exclude-path-regex", "^/v1/", "--no-color", "--seed", "7",
            "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ],
        capture_output=True, text=True, timeout=120, cwd=site.images.folder,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-5000:]
