"""The tables. SQLite and PostgreSQL alike; DBOS keeps its own beside them (never name a table like one of its).

A change here needs a revision in migrations/ in the same commit (its docstring says how).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer, Text

META = sa.MetaData()


class Utc(sa.TypeDecorator[datetime]):
    """Aware UTC in Python, fixed-width ISO text in the database: sorts and compares the same on both databases."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> str | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"

    def process_result_value(self, value: Any, dialect: Any) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


def _id() -> Column[str]:
    return Column("id", Text, primary_key=True)


def _text(name: str, *, null: bool = False) -> Column[str]:
    return Column(name, Text, nullable=null)


def _json(name: str) -> Column[Any]:
    return Column(name, sa.JSON(none_as_null=True), nullable=True)


def _at(name: str, *, null: bool = True) -> Column[datetime]:
    return Column(name, Utc, nullable=null)


def _ref(name: str, table: str) -> Column[str]:
    return Column(name, Text, ForeignKey(f"{table}.id"), nullable=False, index=True)


PROJECTS = sa.Table("projects", META, _id(), Column("name", Text, nullable=False, unique=True), _text("domain_id"))

CREDENTIALS = sa.Table(
    "credentials", META, _id(), _ref("project_id", "projects"), _text("name"), _text("role"),
    Column("ak", Text, nullable=False, unique=True), _text("sk_sealed"), Column("token_sha256", Text, nullable=False, unique=True),
    _at("expires_at"), _at("created_at", null=False),
)  # fmt: skip

# People, and where each is logged in: a random token's SHA-256, until it expires.
USERS = sa.Table(
    "users", META, _id(), Column("name", Text, nullable=False, unique=True), _ref("project_id", "projects"), _text("role"),
    _text("password_hash"), _at("created_at", null=False),
)  # fmt: skip

LOGINS = sa.Table(
    "logins", META, Column("token_sha256", Text, primary_key=True), _ref("user_id", "users"), _at("expires_at", null=False),
)  # fmt: skip

SERVERS = sa.Table(
    "servers", META, _id(), Column("name", Text, nullable=False, unique=True), _ref("project_id", "projects"),
    _text("bmc_url"), _text("bmc_username"), _text("bmc_password_sealed"), _text("bmc_tls_verify"),
    _text("bmc_certificate_sha256", null=True), _text("bmc_system_uri", null=True),
    _text("manufacturer"), _text("model"), _text("serial"), _text("uuid"), _json("macs"), _text("arch"), _text("boot"),
    _text("rack"), _text("unit"), _json("root_disk"), _json("network"), _text("power", null=True), _at("power_at"),
    Column("epoch", Integer, nullable=False, default=0), _at("created_at", null=False),
    _at("locked_at"), _text("locked_by", null=True), _text("lock_reason", null=True), _text("media_run_id", null=True), _json("keep_partitions"),
)  # fmt: skip

# The machines that Repave's own processes run on, by what their firmware and network cards say.
HOSTS = sa.Table(
    "hosts", META, _id(), _text("name"), _text("serial"), _text("uuid"), _json("macs"), _at("seen_at", null=False),
)  # fmt: skip

IMAGES = sa.Table(
    "images", META, _id(), _ref("project_id", "projects"), _text("name"), _text("os_type"), _text("arch"), _text("boot"),
    _text("manifest_sha256"), Column("size_bytes", sa.BigInteger, nullable=False), Column("sector_bytes", Integer, nullable=False),
    Column("stored_bytes", sa.BigInteger, nullable=False), Column("data_bytes", sa.BigInteger, nullable=False),
    _at("created_at", null=False), _at("doubted_at"), sa.UniqueConstraint("project_id", "name"),
)  # fmt: skip

INSTANCES = sa.Table(
    "instances", META, _id(), _text("name"), _ref("project_id", "projects"),
    Column("server_id", Text, ForeignKey("servers.id"), nullable=False, unique=True),
    _text("image_id", null=True), _text("state"), _text("operation_state", null=True), _json("error"), _json("ssh_host_keys"),
    _text("os_type"), _at("created_at", null=False), _at("updated_at", null=False), _at("launched_at"),
)  # fmt: skip

BATCHES = sa.Table(
    "batches", META, _id(), _ref("project_id", "projects"), _text("image_id", null=True), _text("created_by"),
    _at("created_at", null=False), _at("ended_at"), Column("rehearse", sa.Boolean, nullable=False, default=False),
    Column("canary", Integer), Column("at_once", Integer), Column("max_failed", Integer), _at("paused_at"), _text("stop_reason", null=True),
)  # fmt: skip

RUNS = sa.Table(
    "runs", META, _id(), _ref("batch_id", "batches"), _ref("project_id", "projects"), _ref("instance_id", "instances"),
    _ref("server_id", "servers"), _text("image_id"), Column("epoch", Integer, nullable=False),
    _text("found_state"), _text("found_image_id", null=True), _text("step"),
    _at("created_at", null=False), _at("started_at"), _at("deadline_at", null=False), _at("ready_at"), _at("crossed_at"),
    _at("verified_at"), _at("closed_at"), _at("ended_at"), _text("outcome", null=True), _json("error"), _json("ssh_keys"),
    _text("secret_sealed", null=True), _text("token_sha256", null=True), _text("session_sha256", null=True),
    _text("boot_id", null=True), _text("nonce_sha256", null=True), _json("inventory"), _json("plan"), _json("progress"), _json("report"),
    _json("proof"), _at("seen_at"),
    Column("number", Integer, nullable=False, default=1), Column("rehearse", sa.Boolean, nullable=False, default=False), _at("released_at"),
    Column("timeout_s", sa.Float, nullable=False, default=0), _json("cancel"), _json("found_error"), _json("durations_s"), _text("late_step", null=True),
    _text("hostname", null=True),
)  # fmt: skip
sa.Index("runs_token", RUNS.c.token_sha256)
sa.Index("runs_session", RUNS.c.session_sha256)
sa.Index("runs_live", RUNS.c.ended_at)

EVENTS = sa.Table(
    "events", META, Column("seq", Integer, primary_key=True, autoincrement=True), _at("at", null=False), _text("project_id"), _text("type"),
    _text("batch_id", null=True), _text("run_id", null=True), _text("server_id", null=True), _text("actor"), _json("data"),
    _text("mac", null=True),
)  # fmt: skip
sa.Index("events_batch", EVENTS.c.batch_id, EVENTS.c.seq)

# What was said around a run: `source` is agent, serial or bmc; `at` is where the stretch begins in its stream, in characters.
CONSOLES = sa.Table(
    "consoles", META, Column("run_id", Text, ForeignKey("runs.id"), primary_key=True), Column("source", Text, primary_key=True),
    Column("part", Integer, primary_key=True), Column("at", sa.BigInteger, nullable=False), Column("chars", Integer, nullable=False), _text("text"),
    Column("read_to", sa.BigInteger),
)  # fmt: skip

ANSWERS = sa.Table("answers", META, Column("key", Text, primary_key=True), _json("answer"), _at("at", null=False))
sa.Index("answers_at", ANSWERS.c.at)

# Where each hook is in the events, and when it is asked next. URL and secret are sealed: a chat's URL is all that one needs to write there.
WEBHOOKS = sa.Table(
    "webhooks", META, _id(), _ref("project_id", "projects"), _text("name"), _text("host"), _text("url_sealed"), _text("secret_sealed"), _text("shape"),
    _json("events"), _text("created_by"), _at("created_at", null=False), Column("after_seq", Integer, nullable=False), Column("tries", Integer, nullable=False),
    _at("next_at", null=False), _text("trouble", null=True), _at("delivered_at"), sa.UniqueConstraint("project_id", "name"),
)  # fmt: skip

WORKERS = sa.Table(
    "workers", META, Column("executor_id", Text, primary_key=True), _text("slot"), _text("host"), _text("application_version"),
    Column("beat_at_ms", sa.BigInteger, nullable=False), Column("reaped", sa.Boolean, nullable=False),
)  # fmt: skip

MARKS = sa.Table("marks", META, Column("name", Text, primary_key=True), _text("value"))
