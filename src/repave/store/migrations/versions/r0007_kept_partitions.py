"""Partitions of the root disk that outlive a reinstall."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("servers", sa.Column("keep_partitions", sa.JSON(none_as_null=True), nullable=True))
