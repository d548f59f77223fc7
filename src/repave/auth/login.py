"""People: a password once, then a random token in a cookie until it expires or they log out. argon2id with its library's own cost (RFC 9106)."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Protocol

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from repave.domain.model import Credential, User
from repave.errors import RequestError
from repave.secrets import new_token

LASTS = timedelta(hours=12)  # a working day: nobody is asked twice in it, and a forgotten browser is out the next morning
MIN_PASSWORD, MAX_PASSWORD = 12, 128
_TURN_S = 2.0
_AT_ONCE = threading.BoundedSemaphore(2)  # each hash takes 64 MiB and a good part of a second of one core
_HASHER = PasswordHasher()


class PeopleBook(Protocol):
    """What we ask of the store."""

    def find_user(self, name: str) -> tuple[User, str] | None: ...

    def record_login(self, user: User, token: str, *, until: datetime) -> None: ...

    def find_login(self, token: str) -> tuple[User, datetime] | None: ...

    def end_login(self, token: str) -> None: ...


def hash_password(password: str) -> str:
    """What is stored. Raises RequestError bad-request, which does not repeat it, where it is too short or too long."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise RequestError("bad-request", f"password: {MIN_PASSWORD} to {MAX_PASSWORD} characters are needed.", field="password")
    with _AT_ONCE:
        return _HASHER.hash(password)


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """Raises too-many: who waits holds a thread that agents need as well."""
    if not _AT_ONCE.acquire(timeout=_TURN_S):
        raise RequestError("too-many", "Others are logging in. Try again in a moment.")
    try:
        yield
    finally:
        _AT_ONCE.release()


@functools.cache
def _nobodys_hash() -> str:
    return _HASHER.hash(new_token())


class Logins:
    """Who is logged in."""

    def __init__(self, book: PeopleBook, *, now: Callable[[], datetime]) -> None:
        self._book, self._now = book, now

    def log_in(self, name: str, password: str) -> str:
        """A new token, valid for LASTS. Raises not-logged-in, in the same words and after the same time whether the name exists or not."""
        found = self._book.find_user(name)
        try:
            with _in_turn():
                _HASHER.verify(found[1] if found else _nobodys_hash(), password[: MAX_PASSWORD + 1])
        except (VerificationError, InvalidHashError):
            found = None
        if found is None:
            raise RequestError("not-logged-in", "Name or password is wrong.")
        token = new_token()
        self._book.record_login(found[0], token, until=self._now() + LASTS)
        return token

    def find(self, token: str) -> Credential | None:
        """What the person with this token may do, in the shape of a key."""
        found = self._book.find_login(token) if token else None
        if found is None:
            return None
        user, until = found
        return Credential(user.id, user.project_id, user.name, user.role, "", until, user.created_at)

    def log_out(self, token: str) -> None:
        self._book.end_login(token)
