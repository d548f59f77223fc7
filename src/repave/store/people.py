"""People with a login, and where each is logged in."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from repave.domain.model import Role, User
from repave.errors import RequestError
from repave.secrets import fingerprint
from repave.store import rows
from repave.store.database import Database, new_id
from repave.store.tables import LOGINS, USERS


class People:
    """Who may open the pages."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add_user(self, project_id: str, name: str, role: Role, password_hash: str, *, actor: str) -> User:
        """Raises RequestError conflict where the name is taken, in whichever project."""
        user = User(new_id(), project_id, name, role, self._db.now())
        with self._db.write() as conn:
            if conn.execute(sa.select(USERS.c.id).where(USERS.c.name == name)).first():
                raise RequestError("conflict", f"A user {name!r} exists already.", field="name")
            values = {"id": user.id, "project_id": project_id, "name": name, "role": role.value, "created_at": user.created_at}
            conn.execute(sa.insert(USERS).values(**values, password_hash=password_hash))
            self._db.event(conn, "user.added", project_id, actor=actor, name=name, role=role.value)
        return user

    def list_users(self, project_id: str) -> list[User]:
        return [rows.user(r) for r in self._db.rows(sa.select(USERS).where(USERS.c.project_id == project_id).order_by(USERS.c.name))]

    def remove_user(self, project_id: str, name: str, *, actor: str) -> None:
        """They are logged out everywhere, too."""
        with self._db.write() as conn:
            found = conn.execute(sa.select(USERS.c.id).where(USERS.c.project_id == project_id, USERS.c.name == name)).first()
            if found is None:
                raise RequestError("not-found", f"There is no user {name!r} in this project.", kind="user")
            conn.execute(sa.delete(LOGINS).where(LOGINS.c.user_id == found.id))
            conn.execute(sa.delete(USERS).where(USERS.c.id == found.id))
            self._db.event(conn, "user.removed", project_id, actor=actor, name=name)

    def find_user(self, name: str) -> tuple[User, str] | None:
        """With the hash of their password."""
        row = self._db.row(sa.select(USERS).where(USERS.c.name == name))
        return (rows.user(row), row["password_hash"]) if row else None

    def record_login(self, user: User, token: str, *, until: datetime) -> None:
        """The token is this user's. Logins that have expired are gone."""
        with self._db.write() as conn:
            conn.execute(sa.delete(LOGINS).where(LOGINS.c.expires_at <= self._db.now()))
            conn.execute(sa.insert(LOGINS).values(token_sha256=fingerprint(token), user_id=user.id, expires_at=until))
            self._db.event(conn, "user.logged-in", user.project_id, actor=user.name, name=user.name)

    def find_login(self, token: str) -> tuple[User, datetime] | None:
        """Whose token this is, and until when. None where nobody's, or no longer."""
        query = sa.select(USERS, LOGINS.c.expires_at).join(LOGINS, LOGINS.c.user_id == USERS.c.id)
        row = self._db.row(query.where(LOGINS.c.token_sha256 == fingerprint(token), LOGINS.c.expires_at > self._db.now()))
        return (rows.user(row), row["expires_at"]) if row else None

    def end_login(self, token: str) -> None:
        """The token is nobody's. Repeatable."""
        with self._db.write() as conn:
            conn.execute(sa.delete(LOGINS).where(LOGINS.c.token_sha256 == fingerprint(token)))
