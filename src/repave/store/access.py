"""Projects, their credentials, and the stored answers to signed requests."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from repave.domain.model import Credential, Project, Role
from repave.errors import RequestError
from repave.secrets import fingerprint
from repave.store import rows
from repave.store.database import Database, new_id, page_of
from repave.store.tables import ANSWERS, CREDENTIALS, PROJECTS

ANSWER_KEPT = timedelta(hours=24)


def keep_answers(conn: sa.Connection, keys: Mapping[str, str], answer: dict[str, Any], now: datetime) -> None:
    """The answer is kept under each key, with what the request is known by; those of more than a day ago are gone. Raises RequestError key-used."""
    conn.execute(sa.delete(ANSWERS).where(ANSWERS.c.at <= now - ANSWER_KEPT))
    if keys and conn.execute(sa.select(ANSWERS.c.key).where(ANSWERS.c.key.in_(keys))).first():
        raise RequestError("key-used", "Its first request was just answered.", field="Idempotency-Key")
    for key, request in keys.items():
        conn.execute(sa.insert(ANSWERS).values(key=key, answer=answer | {"request": {key: request}}, at=now))


class Access:
    """Who may ask."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add_project(self, name: str) -> Project:
        project = Project(uuid.uuid4().hex, name, uuid.uuid4().hex)
        with self._db.write() as conn:
            if conn.execute(sa.select(PROJECTS.c.id).where(PROJECTS.c.name == name)).first():
                raise RequestError("conflict", f"A project {name!r} exists already.", field="name")
            conn.execute(sa.insert(PROJECTS).values(**asdict(project)))
            self._db.event(conn, "project.added", project.id, name=name)
        return project

    def list_projects(self) -> list[Project]:
        return [rows.project(r) for r in self._db.rows(sa.select(PROJECTS).order_by(PROJECTS.c.name))]

    def find_project(self, project_id: str) -> Project | None:
        row = self._db.row(sa.select(PROJECTS).where(sa.or_(PROJECTS.c.id == project_id, PROJECTS.c.name == project_id)))
        return rows.project(row) if row else None

    def add_credential(self, project_id: str, name: str, role: Role, *, expires_at: datetime | None = None) -> tuple[Credential, str, str]:
        """The credential, its SK and its token: shown once, kept sealed and hashed."""
        ak, sk, token = secrets.token_hex(10).upper(), secrets.token_urlsafe(30), secrets.token_urlsafe(32)
        made = Credential(new_id(), project_id, name, role, ak, expires_at, self._db.now())
        with self._db.write() as conn:
            conn.execute(sa.insert(CREDENTIALS).values(
                **asdict(made) | {"role": role.value}, sk_sealed=self._db.sealer.seal(sk, about=f"sk:{made.id}"), token_sha256=fingerprint(token),
            ))  # fmt: skip
            self._db.event(conn, "key.added", project_id, name=name, role=role.value)
        return made, sk, token

    def list_credentials(self, project_id: str, *, after: str | None = None, limit: int | None = None) -> list[Credential]:
        """Oldest first."""
        query = sa.select(CREDENTIALS).where(CREDENTIALS.c.project_id == project_id)
        return [rows.credential(r) for r in self._db.rows(page_of(query, CREDENTIALS.c.id, after, limit))]

    def remove_credential(self, project_id: str, credential_id: str) -> None:
        with self._db.write() as conn:
            where = sa.and_(CREDENTIALS.c.id == credential_id, CREDENTIALS.c.project_id == project_id)
            if conn.execute(sa.delete(CREDENTIALS).where(where)).rowcount == 0:
                raise RequestError("not-found", "There is no such key.", kind="key")
            self._db.event(conn, "key.removed", project_id, key=credential_id)

    def find_credential_by_token(self, token: str) -> Credential | None:
        row = self._db.row(sa.select(CREDENTIALS).where(CREDENTIALS.c.token_sha256 == fingerprint(token)))
        return rows.credential(row) if row else None

    def find_credential_by_ak(self, ak: str) -> tuple[Credential, str] | None:
        row = self._db.row(sa.select(CREDENTIALS).where(CREDENTIALS.c.ak == ak))
        return (rows.credential(row), self._db.sealer.unseal(row["sk_sealed"], about=f"sk:{row['id']}")) if row else None

    def keep_answer(self, key: str, answer: dict[str, Any]) -> None:
        """The answer stands under this key too. Repeatable."""
        with self._db.write() as conn:
            if not conn.execute(sa.select(ANSWERS.c.key).where(ANSWERS.c.key == key)).first():
                keep_answers(conn, {key: ""}, answer, self._db.now())

    def find_answer(self, key: str, request: str = "") -> dict[str, Any] | None:
        """The 202 kept under this key in the last day. `request`: what the request is known by; "" where the key is made of the request itself.

        Raises RequestError key-used where the key came with another request.
        """
        row = self._db.row(sa.select(ANSWERS).where(ANSWERS.c.key == key, ANSWERS.c.at > self._db.now() - ANSWER_KEPT))
        if row is None:
            return None
        answer: dict[str, Any] = row["answer"]
        if answer.get("request", {}).get(key, "") != request:
            raise RequestError("key-used", field="Idempotency-Key")
        return answer
