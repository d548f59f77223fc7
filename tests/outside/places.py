"""What `watch.Watch` watches, of a scripted rack with one service on SQLite, of one with workers on PostgreSQL, and of a QEMU rack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from watch import Place

from repave.cli.client import Client, Endpoint
from repave.lab.os_images import build_tiny, default_cache
from repave.lab.rack import find_service
from repave.lab.scripted import BMC_LOG
from repave.lab.state import find_state
from repave.lab.workers import Workers

REFUSED = "Refused-7!canary"
USER_DATA = "User-data-7!canary"  # in the user data that tests send


def place_of_rack(folder: Path, lab: dict[str, Any], passwords: Sequence[str], *, scripted: bool = True) -> Place:
    """A rack that `rack_up` made. `passwords`: all that are sent, or what they begin with."""
    state = find_state(folder / "rack")
    assert state is not None
    machines = {m.name: m for m in state.machines}
    raws = {} if scripted else {name: build_tiny(default_cache(), variant=name) for name in ("tiny-1", "tiny-2")}

    def services() -> list[int]:
        service = find_service(folder)
        return [service.pid] if service else []

    logs = {name: folder / "rack" / (BMC_LOG if scripted else f"{name}.bmc.log") for name in machines}
    return Place(
        machines, {i["name"]: i["id"] for i in lab["instances"]}, f"sqlite:///{folder / 'site/repave-data/repave.db'}", lambda: [lab["endpoint"]],
        lab["project_id"], lab["token"], _viewer(Client(None, Endpoint(lab["endpoint"], lab["token"]))), logs, folder / "site/secret/run-keys",
        _kept(folder, folder / "site"), _secrets(passwords, machines) | dict.fromkeys((lab["token"], lab["sk"]), ("admin.json",)),
        {"scripted.log", *(f"{name}.bmc.log" for name in machines)}, raws.get if not scripted else _find_raw(folder), services, scripted=scripted,
    )  # fmt: skip


def place_of_workers(site: Workers, passwords: Sequence[str]) -> Place:
    machines = {m.name: m for m in site.machines}

    def up() -> list[Any]:
        return [w for w in site.workers if w.process is not None and w.process.poll() is None]

    return Place(
        machines, site.ids, site.url, lambda: [f"http://127.0.0.1:{w.api}" for w in up()], site.project_id, site.token, _viewer(site.client()),
        dict.fromkeys(machines, site.folder / "rack" / BMC_LOG), site.folder / "secret/run-keys",
        _kept(site.folder, site.folder / "secret", *(w.folder for w in site.workers), postgres=site.folder / "pg"),
        _secrets(passwords, machines) | {site.token: ()}, {"scripted.log"}, _find_raw(site.folder), lambda: [w.process.pid for w in up()],
    )  # fmt: skip


def _viewer(client: Client) -> str:
    """A key of its own: it may not reinstall, and its polls use up nobody else's rate."""
    return str(client.post("/keys", {"name": "watch", "role": "viewer"})["token"])


def _kept(folder: Path, *sites: Path, postgres: Path | None = None) -> Callable[[], list[Path]]:
    return lambda: [
        *sites, *folder.glob("*.log"), *(folder / "rack").glob("*.log"), *(folder / "rack").glob("*.console"), *(_of_postgres(postgres) if postgres else ()),
    ]  # fmt: skip


def _of_postgres(folder: Path) -> Iterator[Path]:
    """Its log, its write-ahead log, and the tables that were written since it was made."""
    made_at = (folder / "data/PG_VERSION").stat().st_mtime + 1
    yield folder / "postgres.log"
    for path in (*(folder / "data/pg_wal").iterdir(), *(folder / "data/base").glob("*/*")):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime > made_at:
                yield path


def _find_raw(folder: Path) -> Callable[[str], Path | None]:
    def find(name: str) -> Path | None:
        raw = folder / f"{name}.raw"
        return raw if raw.exists() else None

    return find


def _secrets(passwords: Sequence[str], machines: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys((*passwords, REFUSED, USER_DATA, *(m.bmc_password for m in machines.values())), ())
