"""What PostgreSQL's programs are told of the database."""

from __future__ import annotations

import pytest

from repave.backup import render_libpq_url


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "postgresql+psycopg://rep:canary@db:5433/site?sslmode=verify-full&sslrootcert=/ca.pem",
            "postgresql://rep@db:5433/site?sslmode=verify-full&sslrootcert=%2Fca.pem",
        ),
        ("postgresql+psycopg://rep@/site?host=/run/postgresql", "postgresql://rep@/site?host=%2Frun%2Fpostgresql"),
    ],
)
def test_the_programs_of_postgresql_get_the_whole_url_but_the_password(ours, theirs):
    """The bug: the password became `***`, which libpq takes before PGPASSWORD; and what the URL says of TLS was lost."""
    assert render_libpq_url(ours) == theirs
