"""Waves, rehearsals, cancelling, locks, lateness, and the machines that Repave itself runs on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("serial", sa.Text(), nullable=False),
        sa.Column("uuid", sa.Text(), nullable=False),
        sa.Column("macs", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("seen_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    for name in ("locked_at", "locked_by", "lock_reason"):
        op.add_column("servers", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("batches", sa.Column("rehearse", sa.Boolean(), nullable=False, server_default=sa.false()))
    for name in ("canary", "at_once", "max_failed"):
        op.add_column("batches", sa.Column(name, sa.Integer(), nullable=True))
    for name in ("paused_at", "stop_reason"):
        op.add_column("batches", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("number", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("runs", sa.Column("rehearse", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("released_at", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("timeout_s", sa.Float(), nullable=False, server_default="0"))
    for name in ("cancel", "found_error", "durations_s"):
        op.add_column("runs", sa.Column(name, sa.JSON(none_as_null=True), nullable=True))
    op.add_column("runs", sa.Column("late_step", sa.Text(), nullable=True))
    op.execute("UPDATE runs SET released_at = created_at")  # before, every accepted run was queued at once
