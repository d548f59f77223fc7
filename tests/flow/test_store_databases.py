"""The store on both databases: its tables and their history, facts that nobody overtakes, two requests for the same servers at once."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Barrier, Event, Thread, Timer

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations

from repave.domain.model import Credential, Image, Instance, Role, Server, Source, Step
from repave.domain.states import Ending
from repave.errors import RepaveError, RequestError
from repave.secrets import Sealer
from repave.store import Cancelled, Store, new_id
from repave.store.chain import Checked, check_chain
from repave.store.consoles import HEAD_CHARS, PART_CHARS, TAIL_CHARS
from repave.store.database import open_engine
from repave.store.migrations import bring_up_to_date, open_scripts
from repave.store.runs import RUN_STATES
from repave.store.tables import META
from repave.workflow.console_files import ConsoleFiles
from repave.workflow.fleet import Fleet


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def engine(database_url):
    made = open_engine(database_url)
    yield made
    made.dispose()


def revision(engine: sa.Engine) -> str:
    with engine.connect() as conn:
        return conn.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()


def test_the_revisions_make_the_tables_of_tables_py(engine):
    bring_up_to_date(engine)
    with engine.connect() as conn:
        context = MigrationContext.configure(conn, opts={"compare_type": True, "include_name": lambda name, kind, parent: name != "alembic_version"})
        assert compare_metadata(context, META) == []


def test_the_revisions_are_one_line_of_history():
    scripts = open_scripts()
    assert len(scripts.get_heads()) == 1
    assert [s.revision for s in scripts.walk_revisions()] == sorted((s.revision for s in scripts.walk_revisions()), reverse=True)


def test_a_database_from_before_there_were_revisions_is_upgraded_and_keeps_its_rows(engine):
    with engine.execution_options(repave_write=True).begin() as conn:
        first = next(s for s in open_scripts().walk_revisions() if s.down_revision is None)
        with Operations.context(MigrationContext.configure(conn)):
            first.module.upgrade()
        conn.execute(sa.text("INSERT INTO projects VALUES ('p', 'default', 'd')"))
    bring_up_to_date(engine)
    assert revision(engine) == open_scripts().get_current_head()
    with engine.connect() as conn:
        assert conn.execute(sa.text("SELECT name FROM projects")).scalar_one() == "default"


def test_a_newer_database_is_refused_and_left_as_it_was(engine):
    bring_up_to_date(engine)
    with engine.execution_options(repave_write=True).begin() as conn:
        conn.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RepaveError) as refused:
        bring_up_to_date(engine)
    assert refused.value.slug == "database-newer" and "9999" in str(refused.value)
    assert revision(engine) == "9999"


def test_ten_that_open_an_empty_database_at_once_find_it_made_once(database_url, tmp_path):
    def open_and_close(number: int) -> None:
        Store.open(database_url, sealer=Sealer.open(tmp_path / "key"), now=now).close()

    Sealer.open(tmp_path / "key")
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(open_and_close, range(10)))
    engine = open_engine(database_url)
    assert revision(engine) == open_scripts().get_current_head()
    engine.dispose()


def test_who_opens_a_new_file_while_another_writes_its_first_page_waits(tmp_path):
    path = tmp_path / "fleet.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        engine = open_engine(f"sqlite:///{path}")
        try:
            with engine.connect() as conn:
                assert conn.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        finally:
            timer.join()
            engine.dispose()


# ---- facts that nobody overtakes ----


@dataclass
class Fleetful:
    """A store with servers, each with an instance that runs, and who may reinstall them."""

    store: Store
    fleet: Fleet
    credential: Credential
    image: Image
    instances: list[Instance]

    def admit(self, *numbers: int) -> str:
        ids = [self.instances[n].id for n in numbers]
        return self.fleet.admit(credential=self.credential, instance_ids=ids, image_id=self.image.id, password="Canary-7!canary").batch_id


@pytest.fixture
def many(database_url, tmp_path):
    store = Store.open(database_url, sealer=Sealer.open(tmp_path / "secret/key"), now=now)
    project = store.access.add_project("default")
    credential, _, _ = store.access.add_credential(project.id, "op", Role.OPERATOR)
    image = Image(new_id(), project.id, "img", "Linux", "amd64", "uefi", "0" * 64, 1 << 20, 512, 100, 0, now())
    store.images.add_image(image)
    instances = []
    for number in range(12):
        name = f"s{number}"
        server = Server(
            new_id(), name, project.id, f"https://{name}.invalid", "admin", "true", None, None, "Lab", "M1", name, f"uuid-{name}", (),
            "amd64", "uefi", "r1", "1", {}, None, now(),
        )  # fmt: skip
        instances.append(store.servers.add_server(server, bmc_password="x", blank=False))
    yield Fleetful(store, Fleet(store, lambda conn, runs: None, run_timeout_s=3600), credential, image, instances)
    store.close()


def test_of_two_requests_that_overlap_at_once_one_wins_whole(many, tmp_path):
    """Five rounds: two servers in common, asked for in opposite order, as two clients do."""

    def ask(numbers: list[int]) -> list[int]:
        start.wait()
        try:
            many.admit(*numbers)
        except RequestError as refused:
            assert refused.slug == "in-progress"
            return []
        return numbers

    for base in range(0, 10, 2):
        start = Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(ask, [[base, base + 1], [base + 1, base]]))
        assert sorted(map(len, won)) == [0, 2]
    runs = many.store.runs.list_runs()
    assert len(runs) == len({r.instance_id for r in runs}) == 10
    states = [many.store.servers.find_instance(many.credential.project_id, i.id).state.value for i in many.instances]
    assert states == ["pending"] * 10 + ["running"] * 2
    assert len([p for p in (tmp_path / "secret/run-keys").iterdir() if p.is_file()]) == 10  # the losers' keys are gone


def test_of_one_key_used_at_once_on_two_workers_one_batch_comes_also_for_other_servers(many, database_url, tmp_path):
    """Also where the servers differ, and nothing but the key stands between them."""
    other = Store.open(database_url, sealer=many.store.sealer, now=now)
    workers = [many.fleet, Fleet(other, lambda conn, runs: None, run_timeout_s=3600)]
    for base in range(0, 8, 2):
        start, keys = Barrier(2), {f"key-{base}": "request"}

        def ask(number: int, base=base, start=start, keys=keys) -> str:
            ids = [many.instances[base + number].id]
            start.wait()
            try:
                workers[number].admit(credential=many.credential, instance_ids=ids, image_id=many.image.id, password="Canary-7!canary", answer_keys=keys)
            except RequestError as refused:
                return refused.slug
            return "accepted"

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(ask, range(2))) == ["accepted", "key-used"]
        answers = [store.access.find_answer(f"key-{base}", "request") for store in (many.store, other)]
        assert answers[0] == answers[1] and answers[0]["batch_id"] in {r.batch_id for r in many.store.runs.list_runs()}
    assert len(many.store.runs.list_runs()) == 4
    other.close()


def test_a_key_is_kept_with_its_batch_or_not_at_all_and_for_a_day(many):
    def crash(conn, runs):
        raise KeyboardInterrupt

    about = dict(credential=many.credential, image_id=many.image.id, password="Canary-7!canary", answer_keys={"key": "request"})
    many.store.enqueue = crash
    with pytest.raises(KeyboardInterrupt):
        many.fleet.admit(instance_ids=[many.instances[0].id], **about)
    assert many.store.access.find_answer("key", "request") is None and many.store.runs.list_runs() == []
    many.store.enqueue = lambda conn, runs: None
    first = many.fleet.admit(instance_ids=[many.instances[0].id], **about).batch_id
    assert many.store.access.find_answer("key", "request")["batch_id"] == first
    with pytest.raises(RequestError, match="another request"):
        many.store.access.find_answer("key", "other")
    many.store.now = lambda: now() + timedelta(hours=25)
    assert many.store.access.find_answer("key", "other") is None
    second = many.fleet.admit(instance_ids=[many.instances[1].id], **about).batch_id
    assert many.store.access.find_answer("key", "request")["batch_id"] == second != first


def test_of_two_workers_one_delivers_to_a_webhook_and_nobody_goes_back(many, database_url):
    project, other = many.credential.project_id, Store.open(database_url, sealer=many.store.sealer, now=now)
    about = dict(name="ops", url="https://x/?k", host="x", secret="whsec_", shape="standard", events=["run.ended"], actor="op")
    many.store.webhooks.add_webhook(project, **about)
    batch = many.admit(0, 1)
    for run in many.store.runs.list_runs(batch_id=batch):
        many.store.runs.record_ending(run.id, Ending.PROVED, None)
    hooks = [store.webhooks.list_due()[0] for store in (many.store, other)]
    start = Barrier(2)

    def claim(store: Store, hook: object) -> bool:
        start.wait()
        return store.webhooks.claim(hook, seconds=60)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(claim, (many.store, other), hooks)) == [False, True]
    first, second = (e.seq for e in many.store.events.list_events(project, batch_id=batch) if e.type == "run.ended")
    assert many.store.webhooks.find_next_event(hooks[0], 0).seq == first
    many.store.webhooks.record_delivered(hooks[0], first)
    many.store.webhooks.record_trouble(hooks[1], "late")  # of one that was thought dead
    now_it_is = other.webhooks.find_webhook(project, "ops")
    assert (now_it_is.after_seq, now_it_is.tries, other.webhooks.find_next_event(now_it_is, 0).seq) == (first, 0, second)
    other.close()


def test_what_is_counted_and_found_by_state_is_the_same_on_both_databases(many):
    batch = many.admit(0, 1, 2, 3)
    runs = many.store.runs.list_runs(batch_id=batch)
    many.store.runs.record_step(runs[0].id, Step.PREFLIGHT)
    for run, ending, error in ((runs[1], Ending.PROVED, None), (runs[2], Ending.RETURNED, "cancelled"), (runs[3], Ending.RETURNED, "unreachable")):
        many.store.runs.record_ending(run.id, ending, RepaveError(error).as_json() if error else None)
    found = {state: [r.id for r in many.store.runs.page_runs(many.credential.project_id, state=state)] for state in RUN_STATES}
    assert found == {
        "waiting": [], "working": [runs[0].id], "running": [runs[1].id], "rehearsed": [], "cancelled": [runs[2].id], "failed": [runs[3].id]
    }  # fmt: skip
    figures = many.store.figures
    assert [(r["step"], bool(r["begun"]), bool(r["late"]), r["n"]) for r in figures.count_live()] == [("preflight", True, False, 1)]
    assert figures.count_states()["pending"] == 1
    counted = figures.list_counted(0)
    assert [(e["type"], e["data"].get("outcome")) for e in counted] == [("image.added", None)] + [("run.ended", o) for o in ("proved", "returned", "returned")]
    assert figures.list_counted(counted[-1]["seq"]) == []


def test_of_a_crossing_and_a_rollback_at_once_one_wins(many):
    """Ten machines: for each, the agent asks to cross while the workflow closes the run."""
    batch = many.admit(*range(10))
    runs = many.store.runs.list_runs(batch_id=batch)
    for run in runs:
        many.store.runs.record_hello(run.id, f"boot-{run.id}", {"boot_id": f"boot-{run.id}"})
        many.store.runs.record_plan(run.id, {"plan_id": "p", "disk_path": "/dev/vda", "disk_serial": "D"})

    def race(run_id: str) -> tuple[bool, bool]:
        start = Barrier(2)

        def do(fact):
            start.wait()
            return fact()

        with ThreadPoolExecutor(2) as pool:
            crossed = pool.submit(do, lambda: many.store.runs.record_crossing(run_id, "p"))
            closed = pool.submit(do, lambda: many.store.runs.close_before_line(run_id))
            return crossed.result(), closed.result()

    outcomes = [race(run.id) for run in runs]
    assert all(crossed is not closed for crossed, closed in outcomes), outcomes


def test_a_batch_whose_last_runs_end_at_once_has_ended(many):
    """The bug: on PostgreSQL each of two endings saw the other's run still live, and the batch was never over."""
    for _ in range(3):
        batch = many.admit(0, 1, 2, 3)
        runs = many.store.runs.list_runs(batch_id=batch)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda run: many.store.runs.record_ending(run.id, Ending.RETURNED, RepaveError("unreachable").as_json()), runs))
        assert many.store.runs.find_batch(many.credential.project_id, batch).ended_at is not None


def test_a_batch_that_is_cancelled_while_its_runs_go_on_costs_nobody_an_error(many):
    """The bug: on PostgreSQL a step held its run's row and waited for the lock of events, a cancel the other way round; one of them was ended."""
    for _ in range(5):
        batch = many.admit(*range(12))
        runs = many.store.runs.list_runs(batch_id=batch)
        for run in runs:
            many.store.runs.record_hello(run.id, f"boot-{run.id}", {"boot_id": f"boot-{run.id}"})
            many.store.runs.record_plan(run.id, {"plan_id": "p", "disk_path": "/dev/vda", "disk_serial": "D"})
        with ThreadPoolExecutor(13) as pool:
            crossings = {run.id: pool.submit(many.store.runs.record_crossing, run.id, "p") for run in runs}
            cancelled = pool.submit(many.store.batches.cancel, batch, [run.id for run in runs], actor="op")
            crossed = {run_id: c.result() for run_id, c in crossings.items()}
        assert crossed == {run_id: what is Cancelled.PAST_THE_LINE for run_id, what in cancelled.result().items()}
        for run in runs:
            many.store.runs.record_ending(run.id, Ending.RETURN_FAILED, RepaveError("unreachable").as_json())


def test_who_follows_the_events_misses_none(many):
    """The bug: numbers are given before the commit, so on PostgreSQL a reader could see 8, go on from there, and never be shown 7."""
    run = many.store.runs.list_runs(batch_id=many.admit(0))[0]
    over, seen = Event(), []

    def follow() -> None:
        after = 0
        while True:
            last = over.is_set()
            for event in many.store.events.list_events(many.credential.project_id, after=after):
                seen.append(event.seq)
                after = event.seq
            if last:
                return

    follower = Thread(target=follow)
    follower.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: many.store.runs.record_note(run.id, "run.note", number=n), range(100)))
    over.set()
    follower.join()
    assert seen == [e.seq for e in many.store.events.list_events(many.credential.project_id)]


@pytest.mark.parametrize(
    ("by", "broken"),
    [
        ("UPDATE events SET actor = 'somebody' WHERE seq = 3", 3),
        ("UPDATE events SET at = '2020-01-01T00:00:00.000000Z' WHERE seq = 3", 3),
        ("UPDATE events SET mac = NULL WHERE seq = 3", 3),
        ("DELETE FROM events WHERE seq = 3", 4),
        ("DELETE FROM events WHERE seq = 1", 2),
        ("INSERT INTO events (at, project_id, type, actor, data) SELECT at, project_id, type, actor, data FROM events WHERE seq = 1", 17),
    ],
    ids=["changed", "dated back", "taken out of the chain", "removed", "the first removed", "added"],
)
def test_an_event_that_was_changed_added_or_removed_in_the_database_is_found(many, by, broken):
    many.admit(0)
    with many.store.engine.connect() as conn:
        assert check_chain(conn, many.store.sealer) == Checked(16, 0)
    with many.store.engine.execution_options(repave_write=True).begin() as conn:
        conn.execute(sa.text(by))
    with many.store.engine.connect() as conn, pytest.raises(RepaveError, match=f"Event {broken} ") as found:
        check_chain(conn, many.store.sealer)
    assert found.value.slug == "audit-broken"


def test_another_key_file_is_refused(database_url, tmp_path):
    Store.open(database_url, sealer=Sealer.open(tmp_path / "a/key"), now=now).close()
    Store.open(database_url, sealer=Sealer.open(tmp_path / "a/key"), now=now).close()
    with pytest.raises(RepaveError) as refused:
        Store.open(database_url, sealer=Sealer.open(tmp_path / "b/key"), now=now)
    assert refused.value.slug == "not-this-site"


# ---- what was said around a run ----


def live_run(many: Fleetful) -> tuple[Store, str]:
    """The store, and a run of server s0."""
    many.admit(0)
    return many.store, many.store.runs.list_runs(live=True)[0].id


def test_a_stream_that_is_too_long_keeps_its_beginning_and_its_end_and_shows_a_mark(many):
    store, run_id = live_run(many)
    lines = [f"{number:08}\n" for number in range(2 * (HEAD_CHARS + TAIL_CHARS) // 9)]
    for at in range(0, len(lines), 400):
        store.consoles.append(run_id, Source.AGENT, "".join(lines[at : at + 400]))
    kept, at = "", 0
    while (found := store.consoles.read(run_id, Source.AGENT, after=at)).next_at > at:
        kept, at = kept + found.text, found.next_at
    assert at == 9 * len(lines) and kept.startswith("00000000\n") and kept.endswith(lines[-1]) and kept.count("of the middle were left out") == 1
    assert HEAD_CHARS + TAIL_CHARS - 3600 <= len(kept) <= HEAD_CHARS + TAIL_CHARS + 2 * 3600 + 100
    assert store.consoles.read(run_id, Source.AGENT, after=at - 9).text == lines[-1]


def test_a_batch_that_comes_twice_is_kept_once_and_one_of_two_readers_of_a_file_wins(many):
    store, run_id = live_run(many)
    for _ in range(2):
        store.consoles.append(run_id, Source.AGENT, "once\n")
    assert store.consoles.read(run_id, Source.AGENT).text == "once\n"
    store.consoles.begin(run_id, Source.SERIAL, read_to=7)
    store.consoles.begin(run_id, Source.SERIAL, read_to=99)
    assert store.consoles.append(run_id, Source.SERIAL, "a", read_from=7, read_to=8)
    assert not store.consoles.append(run_id, Source.SERIAL, "a", read_from=7, read_to=8)
    assert store.consoles.read(run_id, Source.SERIAL).text == "a"


def test_a_file_that_is_rotated_is_read_from_its_new_beginning_and_a_line_is_kept_when_it_is_whole(many, tmp_path):
    store, run_id = live_run(many)
    file = tmp_path / "s0.log"
    file.write_text("of an earlier run\n")
    store.consoles.begin(run_id, Source.SERIAL, read_to=file.stat().st_size)
    files = ConsoleFiles(store, str(tmp_path / "{server}.log"))
    with file.open("a") as out:
        out.write("first\nhalf a li")
    files.look()
    assert store.consoles.read(run_id, Source.SERIAL).text == "first\n"
    file.write_text("new\n")
    files.look()
    assert store.consoles.read(run_id, Source.SERIAL).text == "first\nnew\n"
    file.rename(tmp_path / "away")
    files.look()
    (tmp_path / "away").rename(file)
    with file.open("a") as out:
        out.write("a word " * (3 * PART_CHARS // 7))
    for _ in range(4):
        files.look()
    assert len(store.consoles.read(run_id, Source.SERIAL, most=1 << 20).text) == len("first\nnew\n") + 7 * (3 * PART_CHARS // 7)
