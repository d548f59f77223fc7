"""The store on both databases: its tables and their history, facts that nobody overtakes, two requests for the same servers at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from repave.errors import RepaveError
from repave.secrets import Sealer
from repave.store import Store
from repave.store.database import open_engine
from repave.store.migrations import bring_up_to_date, open_scripts
from repave.store.tables import META


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
        from alembic.operations import Operations

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
