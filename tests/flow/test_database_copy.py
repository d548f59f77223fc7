"""`repave db copy`: a site on SQLite goes on on PostgreSQL, with everything it knew; and what is refused."""

from __future__ import annotations

import fcntl
import uuid
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from test_store_databases import Fleetful, now

from repave.cli.main import run
from repave.config import SETTINGS_FILE
from repave.domain.model import Image, Role, Server
from repave.domain.states import Ending
from repave.errors import RepaveError
from repave.lab.postgres import make_database
from repave.secrets import Sealer
from repave.store import Store, new_id
from repave.store.tables import META, WORKERS
from repave.workflow.fleet import Fleet


@pytest.fixture
def site(tmp_path):
    """A folder with a site on SQLite that has lived: a project, a key, an image, servers, one batch that ended."""
    (tmp_path / SETTINGS_FILE).write_text("")
    data = tmp_path / "repave-data"
    data.mkdir()
    store = Store.open(f"sqlite:///{data / 'repave.db'}", sealer=Sealer.open(tmp_path / "secret/key"), now=now)
    project = store.access.add_project("default")
    credential, _, token = store.access.add_credential(project.id, "op", Role.OPERATOR)
    image = Image(new_id(), project.id, "Ünïcode 'img'", "Linux", "amd64", "uefi", "0" * 64, 5 << 40, 512, 100, 0, datetime.now(UTC))
    store.images.add_image(image)
    server = Server(
        new_id(), "s0", project.id, "https://s0.invalid", "admin", "true", None, None, "Lab", "M1", "s0", "uuid", ("52:54:00:00:00:01",),
        "amd64", "uefi", "r1", "1", {"serial": "D"}, None, now(),
    )  # fmt: skip
    instance = store.servers.add_server(server, bmc_password="Canary-bmc", blank=False)
    fleet = Fleet(store, lambda conn, runs: None, run_timeout_s=3600)
    batch = fleet.admit(credential=credential, instance_ids=[instance.id], image_id=image.id, password="Canary-7!canary").batch_id
    lived = Fleetful(store, fleet, credential, image, [instance])
    yield lived, batch, token
    store.close()


def end(lived: Fleetful, batch: str) -> None:
    for one in lived.store.runs.list_runs(batch_id=batch):
        lived.store.runs.record_ending(one.id, Ending.RETURNED, RepaveError("unreachable").as_json())


def rows(engine: sa.Engine) -> dict[str, list[str]]:
    with engine.connect() as conn:
        return {t.name: sorted(map(repr, conn.execute(sa.select(t)))) for t in META.sorted_tables if t is not WORKERS}


def test_a_site_goes_on_on_postgresql_with_everything_it_knew(site, postgres, tmp_path, capsys):
    lived, batch, token = site
    end(lived, batch)
    url = make_database(postgres, f"t{uuid.uuid4().hex}")
    before = rows(lived.store.engine)
    assert run(["db", "copy", str(tmp_path), "--to", url]) == 0, capsys.readouterr().err
    store = Store.open(url, sealer=Sealer.open(tmp_path / "secret/key"), now=now)
    try:
        assert rows(store.engine) == before and before["events"] and before["runs"]
        assert store.servers.list_bmc_passwords(lived.instances[0].server_id) == ["Canary-bmc"]
        assert store.access.find_credential_by_token(token).ak == lived.credential.ak
        last = store.events.list_events(lived.credential.project_id)[-1].seq
        fleet = Fleet(store, lambda conn, runs: None, run_timeout_s=3600)
        fleet.admit(credential=lived.credential, instance_ids=[lived.instances[0].id], image_id=lived.image.id, password="Canary-7!canary")
        assert store.events.list_events(lived.credential.project_id, after=last)[0].seq == last + 1
    finally:
        store.close()
    assert run(["db", "check", str(tmp_path)]) == 0
    assert f"{len(before['events'])} events of the audit" in capsys.readouterr().out
    with lived.store.engine.execution_options(repave_write=True).begin() as conn:
        conn.execute(sa.text("UPDATE events SET actor = 'nobody' WHERE seq = 2"))
    assert run(["db", "check", str(tmp_path)]) != 0
    assert "Event 2 " in capsys.readouterr().err
    assert run(["db", "copy", str(tmp_path), "--to", url]) != 0  # it holds a site now
    assert "holds a site already" in capsys.readouterr().err


def test_a_live_run_or_a_running_service_is_refused_and_the_target_stays_empty(site, postgres, tmp_path, capsys):
    lived, batch, _ = site
    url = make_database(postgres, f"t{uuid.uuid4().hex}")
    assert run(["db", "copy", str(tmp_path), "--to", url]) != 0
    assert "have not ended" in capsys.readouterr().err
    end(lived, batch)
    with (tmp_path / "repave-data/repave.db.worker").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(["db", "copy", str(tmp_path), "--to", url]) != 0
    assert "stop it first" in capsys.readouterr().err
    assert run(["db", "copy", str(tmp_path), "--to", url]) == 0
