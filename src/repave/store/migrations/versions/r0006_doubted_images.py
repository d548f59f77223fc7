"""When a run said that an image is damaged."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("images", sa.Column("doubted_at", sa.Text(), nullable=True))
