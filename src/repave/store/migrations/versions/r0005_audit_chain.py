"""Each event carries a MAC over itself and the one before it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("events", sa.Column("mac", sa.Text(), nullable=True))
