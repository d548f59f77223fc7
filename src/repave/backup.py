"""A site in one file, and back: database, key file, CA, settings, the first admin's key, and how new it is. `repave backup`, `repave restore`.

FILE is a tar, 0600: `backup.json` (what is in it, with digests; first), `backup.json.sha256`, then the members. Whoever has it has every BMC
password. Not in it: images (their manifests are listed, restore says which are missing), and the keys of live runs: no run survives a
restore, so a stolen backup holds no tenant's password.

A restore checks everything before it replaces anything. It ends the runs that live in the backup before the state is in place, keeps what
it replaces in a folder beside it, and leaves a mark until it is whole: the service does not start on half of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from repave import __version__
from repave.config import SETTINGS_FILE, Settings, load_settings
from repave.domain.generation import Stand
from repave.errors import RepaveError
from repave.generation import UNDER_WAY, read_stand_file, stand_path, write_stand_file
from repave.secrets import Sealer, write_private
from repave.store import Store
from repave.store.alone import alone, locked, refuse_workers
from repave.store.database import open_engine
from repave.store.stand import check_file, end_restored_runs, read_stand
from repave.store.tables import IMAGES

FORMAT = 1
_SECRETS = ("ca.pem", "ca.key")
_ADMIN = "admin.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a restore did."""

    made_at: str  # of the backup
    ended_runs: int
    missing_images: list[str]
    kept_in: Path | None  # what was there before
    generation: int


# ---- backup ----


def write_backup(folder: Path, file: Path) -> Json:
    """The site in `folder` is in `file`, whole or not at all. The service may run. Returns what `backup.json` says.

    Raises RepaveError conflict where the file is there already.
    """
    if file.exists():
        raise RepaveError("conflict", f"{file} is there already.", field="file")
    settings = load_settings(folder)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".backup-") as name:  # 0700
        staged = Path(name)
        members = _stage(settings, folder, staged)
        about = _describe(settings, members)
        raw = json.dumps(about, indent=2).encode()
        (staged / "backup.json").write_bytes(raw)
        (staged / "backup.json.sha256").write_text(hashlib.sha256(raw).hexdigest())
        whole = staged / "whole.tar"
        with open(whole, "wb", opener=_private) as out:
            with tarfile.open(fileobj=out, mode="w") as tar:
                for member, path in [(n, staged / n) for n in ("backup.json", "backup.json.sha256")] + list(members.items()):
                    tar.add(path, arcname=member, recursive=False, filter=_bare)
            out.flush()
            os.fsync(out.fileno())
        os.link(whole, file)  # never over another file
        _sync(file.parent)
    return about


def _stage(settings: Settings, folder: Path, staged: Path) -> dict[str, Path]:
    secret = settings.key_file.parent
    members = {SETTINGS_FILE: folder / SETTINGS_FILE, "key": settings.key_file} | {name: secret / name for name in _SECRETS}
    if (folder / _ADMIN).exists():
        members[_ADMIN] = folder / _ADMIN
    database = staged / "database"
    if _is_sqlite(settings):
        check_file(settings.database_url)
        _copy_sqlite(_database_path(settings), database)
    else:
        _run_pg(settings, "pg_dump", "--format=custom", f"--dbname={render_libpq_url(settings.database_url)}", f"--file={database}")
    return members | {"database": database}


def _copy_sqlite(source: Path, target: Path) -> None:
    """One consistent moment of the database, while others write; without the pages of rows that are deleted."""
    if not source.exists():
        raise RepaveError("not-found", f"There is no database {source}.")
    with contextlib.closing(sqlite3.connect(source, timeout=30)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        target.chmod(0o600)
        old.backup(new)
        new.execute("PRAGMA journal_mode=DELETE")
        new.execute("VACUUM")


def _describe(settings: Settings, members: dict[str, Path]) -> Json:
    staged_url = f"sqlite:///{members['database']}" if _is_sqlite(settings) else settings.database_url
    engine = sa.create_engine(staged_url)
    try:
        with engine.connect() as conn:
            images = [dict(r._mapping) for r in conn.execute(sa.select(IMAGES.c.name, IMAGES.c.manifest_sha256))]
    finally:
        engine.dispose()
    stand = read_stand_file(stand_path(settings.key_file))
    return {
        "format": FORMAT, "repave": __version__, "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "database": "sqlite" if _is_sqlite(settings) else "postgresql", "generation": stand.generation if stand else 0, "images": images,
        "members": {name: {"sha256": _sha256(path), "size_bytes": path.stat().st_size} for name, path in members.items()},
    }  # fmt: skip


# ---- restore ----


def restore_backup(folder: Path, file: Path) -> Restored:
    """The site in `folder` is the one of the backup: its live runs ended as `restored`, no BMC was asked, the generation is above all before.

    Repeatable: interrupted, the service refuses to start and the same command does it all again. Raises RepaveError backup-refused with nothing
    changed, conflict while a service works on the site.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".restore-") as name:
        staged = Path(name)
        about = _unpack(file, staged)
        settings = load_settings(folder, staged / SETTINGS_FILE)
        if about["database"] != ("sqlite" if _is_sqlite(settings) else "postgresql"):
            raise RepaveError("backup-refused", f"Its database is {about['database']}, the settings name another kind.")
        secret = settings.key_file.parent
        for place in (secret, settings.data_dir):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_sqlite(settings):
            _run_pg(settings, "pg_restore", "--file=/dev/null", staged / "database")  # it can be read to its end
        with _alone(settings) as engine:
            try:
                known = read_stand_file(stand_path(settings.key_file))
            except RepaveError:  # damaged; it is written anew
                known = None
                stand_path(settings.key_file).unlink()
            above = max(known.generation if known else 0, int(about["generation"]))
            why = f"Restored from the backup of {about['made_at']}."
            if _is_sqlite(settings):
                stand, ended = _end_runs(f"sqlite:///{staged / 'database'}", staged / "key", above=above, why=why)
                _settle(staged / "database")
            write_private(secret / UNDER_WAY, about["made_at"].encode())
            if not _is_sqlite(settings):
                _refuse_late_workers(engine, secret / UNDER_WAY)
            kept = _swap(settings, folder, staged)
            if not _is_sqlite(settings):
                how = ("--clean", "--if-exists", "--no-owner", "--single-transaction")
                _run_pg(settings, "pg_restore", *how, f"--dbname={render_libpq_url(settings.database_url)}", staged / "database")
                stand, ended = _end_runs(settings.database_url, settings.key_file, above=above, why=why)
            write_stand_file(stand_path(settings.key_file), stand)
            (secret / UNDER_WAY).unlink()
            _sync(secret)
    return Restored(about["made_at"], len(ended), _missing_images(settings, about), kept, stand.generation)


def accept_database(folder: Path) -> Restored:
    """The database that is here is taken as restored, wherever it came from: its live runs end, no BMC is asked, the generation is above all before."""
    settings = load_settings(folder)
    check_file(settings.database_url)
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = stand_path(settings.key_file)
    if (path.parent / UNDER_WAY).exists():
        raise RepaveError("restore-unfinished")
    with _alone(settings):
        try:
            known = read_stand_file(path)
        except RepaveError:
            known = None
            path.unlink()
        stand, ended = _end_runs(
            settings.database_url, settings.key_file, above=known.generation if known else 0, why="An older copy of the database was put back and accepted."
        )
        write_stand_file(path, stand)
    return Restored("", len(ended), [], None, stand.generation)


def _unpack(file: Path, staged: Path) -> Json:
    """Every member in `staged`, each with its digest. Raises RepaveError backup-refused."""
    try:
        with tarfile.open(file, mode="r:") as tar:
            raw = _member(tar, "backup.json")
            if hashlib.sha256(raw).hexdigest() != _member(tar, "backup.json.sha256").decode():
                raise RepaveError("backup-refused", "Its list of contents is damaged.")
            about: Json = json.loads(raw)
            if about["format"] != FORMAT:
                raise RepaveError("backup-refused", f"It has format {about['format']}; this version reads {FORMAT}.")
            needed = {SETTINGS_FILE, "key", "database", *_SECRETS}
            if not needed <= about["members"].keys() <= needed | {_ADMIN}:
                raise RepaveError("backup-refused", "It holds other files than a backup does.")
            for name, said in about["members"].items():
                part = tar.extractfile(name)
                assert part is not None
                with open(staged / name, "wb", opener=_private) as out:
                    shutil.copyfileobj(part, out, 1 << 20)
                    out.flush()
                    os.fsync(out.fileno())
                if _sha256(staged / name) != said["sha256"]:
                    raise RepaveError("backup-refused", f"{name} in it is damaged.")
    except FileNotFoundError:
        raise RepaveError("not-found", f"There is no file {file}.") from None
    except (tarfile.TarError, OSError, KeyError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise RepaveError("backup-refused", f"It can not be read: {type(error).__name__}.") from None
    if about["database"] == "sqlite":
        try:
            check_file(f"sqlite:///{staged / 'database'}")
        except RepaveError as error:
            raise RepaveError("backup-refused", error.detail) from None
    return about


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    part = tar.extractfile(name)
    assert part is not None
    return part.read(1 << 24)


def _end_runs(url: str, key_file: Path, *, above: int, why: str) -> tuple[Stand, list[str]]:
    store = Store.open(url, sealer=Sealer.open(key_file), now=lambda: datetime.now(UTC))
    try:
        return end_restored_runs(store, above=max(above, (read_stand(store) or Stand(0, 0)).generation), why=why)
    finally:
        store.close()


def _settle(database: Path) -> None:
    """Everything is in the one file, durable."""
    with contextlib.closing(sqlite3.connect(database)) as conn:
        conn.execute("PRAGMA journal_mode=DELETE")
    _sync(database)


def _swap(settings: Settings, folder: Path, staged: Path) -> Path | None:
    """What is staged is in place; what was there is in a folder of its own, but for the keys of its live runs, which are gone."""
    secret = settings.key_file.parent
    places = {SETTINGS_FILE: folder / SETTINGS_FILE, "key": settings.key_file} | {name: secret / name for name in _SECRETS}
    if (staged / _ADMIN).exists():
        places[_ADMIN] = folder / _ADMIN
    old = dict(places)
    if _is_sqlite(settings):
        places["database"] = _database_path(settings)
        old |= {f"database{end}": Path(f"{places['database']}{end}") for end in ("", "-wal", "-shm")}
    kept = None
    if any(path.exists() for path in old.values()):
        kept = Path(tempfile.mkdtemp(dir=folder, prefix=f"before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-"))
    for name, path in old.items():
        if kept is not None and path.exists():
            shutil.move(path, kept / name)
    shutil.rmtree(secret / "run-keys", ignore_errors=True)
    for name, path in places.items():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.move(staged / name, path)  # to another file system it is a copy: mode and durability are not told by that
        path.chmod(0o600)
        for part in (path, path.parent):
            _sync(part)
    return kept


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[sa.Engine]:
    """No service works on this site, and on this machine none can begin meanwhile. Raises RepaveError conflict."""
    engine = open_engine(settings.database_url)
    try:
        with alone(engine), locked(settings.data_dir / "worker.lock"):
            yield engine
    finally:
        engine.dispose()


def _refuse_late_workers(engine: sa.Engine, mark: Path) -> None:
    """A worker elsewhere writes its row and then looks for the mark; we do it the other way round, so one of both sees the other."""
    try:
        refuse_workers(engine)
    except RepaveError:
        mark.unlink()
        raise


def _missing_images(settings: Settings, about: Json) -> list[str]:
    folder = (settings.images_dir or settings.data_dir / "images") / "manifests"
    return [i["name"] for i in about["images"] if not (folder / f"{i['manifest_sha256']}.json").exists()]


# ---- PostgreSQL ----


def _run_pg(settings: Settings, program: str, *arguments: str | Path) -> None:
    """Blocks: until it is done. Raises RepaveError internal with the program's own last line."""
    password = sa.make_url(settings.database_url).password
    environment = os.environ | ({"PGPASSWORD": password} if password else {})  # no argument: those any user can read
    try:
        done = subprocess.run([program, *map(str, arguments)], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RepaveError("not-found", f"{program} is not installed (package postgresql-client).") from None
    if done.returncode:
        raise RepaveError("internal", f"{program}: {(done.stderr.strip().splitlines() or ['no word'])[-1][:300]}")


def render_libpq_url(database_url: str) -> str:
    """SQLAlchemy's URL as libpq takes it, with what it says of TLS and sockets, without the password: arguments any user can read."""
    url = sa.make_url(database_url)
    without = sa.URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
    return without.render_as_string(hide_password=False)  # hidden, it would be the password `***`


# ---- files ----


def _is_sqlite(settings: Settings) -> bool:
    return sa.make_url(settings.database_url).get_backend_name() == "sqlite"


def _database_path(settings: Settings) -> Path:
    return Path(str(sa.make_url(settings.database_url).database))


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _bare(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
