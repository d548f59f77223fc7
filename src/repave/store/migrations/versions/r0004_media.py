"""Which run's media may still be in a server's drive."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("servers", sa.Column("media_run_id", sa.Text(), nullable=True))
    op.execute(  # the newest run of a server, unless its media were surely taken out before it ended
        "UPDATE servers SET media_run_id = (SELECT runs.id FROM runs WHERE runs.server_id = servers.id AND runs.epoch = servers.epoch"
        " AND (runs.outcome IS NULL OR runs.outcome IN ('return-failed', 'write-failed', 'unproved')))"
    )
