"""Secrets: a type that never shows itself, and the sealer that keeps them out of the database in clear.

AES-256-GCM under the key file (outside the database, 0600). A run's secrets are sealed under the run's own key, which is derived
from a salt in a file of its own beside the key file: deleted rows stay in SQLite's file, so keys are what we erase (design.md 14).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import math
import os
import secrets as _secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from repave.errors import RunFailed


def new_token() -> str:
    """32 random bytes, URL-safe."""
    return _secrets.token_urlsafe(32)


def new_webhook_secret() -> str:
    """32 random bytes, written as Standard Webhooks writes them."""
    return f"whsec_{base64.b64encode(os.urandom(32)).decode()}"


def fingerprint(token: str) -> str:
    """What the database keeps of a token: its SHA-256 (tokens are random, so no slow hash is needed)."""
    return hashlib.sha256(token.encode()).hexdigest()


class Sealer:
    """Seals with the key file's key; `run_keys` is a folder with one 32-byte file a live run."""

    def __init__(self, key: bytes, run_keys: Path) -> None:
        self._key, self._run_keys = key, run_keys
        run_keys.mkdir(mode=0o700, parents=True, exist_ok=True)

    @classmethod
    def open(cls, key_path: Path) -> Sealer:
        """The sealer of this key file; made if missing (0600)."""
        if not key_path.exists():
            write_private(key_path, os.urandom(32))
        return cls(key_path.read_bytes(), key_path.parent / "run-keys")

    def seal(self, value: str, *, about: str) -> str:
        """Hex of nonce and ciphertext; `about` (table, row) is authenticated, so a value can not be moved to another row."""
        return _seal(self._key, value, about)

    def unseal(self, sealed: str, *, about: str) -> str:
        return _unseal(self._key, sealed, about)

    def authenticate(self, value: str, *, about: str) -> str:
        """Hex of a MAC that only this key makes; `about`: what it is for, so that none stands for another."""
        return hmac.new(self._key, f"{about}:{value}".encode(), hashlib.sha256).hexdigest()

    def make_run_keys(self, run_ids: Sequence[str]) -> None:
        """Each run has its key, durable. Written together: the first flush carries most of the others (50 alone cost 40 to 130 ms)."""
        write_private_files({self._run_keys / run_id: os.urandom(32) for run_id in run_ids})

    def seal_for_run(self, run_id: str, value: str) -> str:
        return _seal(self._run_key(run_id), value, f"run:{run_id}")

    def unseal_for_run(self, run_id: str, sealed: str) -> str:
        """Raises RunFailed password-gone when the run's key was destroyed."""
        return _unseal(self._run_key(run_id), sealed, f"run:{run_id}")

    def derive_for_run(self, run_id: str, purpose: str) -> str:
        """A token of this run for one purpose (media, session, nonce): the same each time it is asked for, gone with the key."""
        return hmac.new(self._run_key(run_id), purpose.encode(), hashlib.sha256).hexdigest()

    def keep_for_run(self, run_id: str, name: str, data: bytes) -> None:
        """`data` is kept sealed until the run's key is destroyed."""
        nonce = os.urandom(12)
        sealed = nonce + AESGCM(self._run_key(run_id)).encrypt(nonce, data, name.encode())
        write_private(self._run_keys / f"{run_id}.{name}", sealed)

    def read_for_run(self, run_id: str, name: str) -> bytes:
        """What `keep_for_run` kept. Raises RunFailed password-gone after the end."""
        key, path = self._run_key(run_id), self._run_keys / f"{run_id}.{name}"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise RunFailed("password-gone") from None
        return AESGCM(key).decrypt(raw[:12], raw[12:], name.encode())

    def list_keyed_runs(self, *, before: float = math.inf) -> set[str]:
        """The runs that have keys here, made before this moment (seconds since 1970)."""
        found = set()
        for path in self._run_keys.iterdir():
            with contextlib.suppress(FileNotFoundError):  # destroyed while we look
                if path.stat().st_mtime < before:
                    found.add(path.name.removeprefix(".").split(".")[0])  # a leading dot: half written by a process that died
        return found

    def destroy_run(self, run_id: str) -> None:
        """Nothing sealed or derived for this run can be had again. Repeatable."""
        for path in (self._run_keys / run_id, *self._run_keys.glob(f"{run_id}.*"), *self._run_keys.glob(f".{run_id}.*")):
            path.unlink(missing_ok=True)

    def _run_key(self, run_id: str) -> bytes:
        try:
            salt = (self._run_keys / run_id).read_bytes()
        except FileNotFoundError:
            raise RunFailed("password-gone") from None
        return hmac.new(self._key, salt + run_id.encode(), hashlib.sha256).digest()


def write_private(path: Path, data: bytes) -> None:
    """The file holds `data`, mode 0600, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private_files({path: data})


def write_private_files(files: Mapping[Path, bytes]) -> None:
    """Each of these files, in folders that are there, holds its data, mode 0600, whole or not at all; durable on return."""
    temporary = {path: path.with_name(f".{path.name}.new") for path in files}
    try:
        _write_all(temporary, files)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def _write_all(temporary: Mapping[Path, Path], files: Mapping[Path, bytes]) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(temporary[path], "wb", buffering=0, opener=_open_private)) for path in files]
        for f, data in zip(opened, files.values(), strict=True):
            f.write(data)
        for f in opened:
            os.fsync(f.fileno())
    for path in files:
        temporary[path].rename(path)
    for folder in {path.parent for path in files}:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _seal(key: bytes, value: str, about: str) -> str:
    nonce = os.urandom(12)
    return (nonce + AESGCM(key).encrypt(nonce, value.encode(), about.encode())).hex()


def _unseal(key: bytes, sealed: str, about: str) -> str:
    raw = bytes.fromhex(sealed)
    try:
        return AESGCM(key).decrypt(raw[:12], raw[12:], about.encode()).decode()
    except InvalidTag:
        raise RunFailed("internal", "A sealed value does not open: is this the right key file?") from None
