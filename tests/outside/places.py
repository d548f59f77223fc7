"""What `watch.Watch` watches, of a scripted rack with one service on SQLite, of one with workers on PostgreSQL, and of a QEMU rack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from watch import Place

from repave.cli.client import Client, Endpoint
from repave.lab.rack import find_service
from repave.lab.scripted import BMC_LOG
from repave.lab.state import find_state
from repave.lab.workers import Workers

REFUSED = "Refused-7!canary"


def place_of_rack(folder: Path, lab: dict[str, Any], passwords: Sequence[str], *, scripted: bool = True) -> Place:
    """A rack that `rack_up` made. `passwords`: all that are sent, or what they begin with."""
    state = find_state(folder / "rack")
    assert state is not None
    machines = {m.name: m for m in state.machines}

    def services() -> list[int]:
        service = find_service(folder)
        return [service.pid] if service else []

    return Place(
        machines, {i["name"]: i["id"] for i in lab["instances"]}, f"sqlite:///{folder / 'site/repave-data/repave.db'}", lambda: [lab["endpoint"]],
        lab["project_id"], lab["token"], _viewer(Client(None, Endpoint(lab["endpoint"], lab["token"]))), folder / "rack" / BMC_LOG,
        folder / "site/secret/run-keys", _kept(folder, folder / "site"), _all(passwords, machines), folder, services, scripted=scripted,
    )  # fmt: skip


def place_of_workers(site: Workers, passwords: Sequence[str]) -> Place:
    machines = {m.name: m for m in site.machines}

    def up() -> list[Any]:
        return [w for w in site.workers if w.process is not None and w.process.poll() is None]

    return Place(
        machines, site.ids, site.url, lambda: [f"http://127.0.0.1:{w.api}" for w in up()], site.project_id, site.token, _viewer(site.client()),
        site.folder / "rack" / BMC_LOG, site.folder / "secret/run-keys", _kept(site.folder, site.folder / "secret", *(w.folder for w in site.workers)),
        _all(passwords, machines), site.folder, lambda: [w.process.pid for w in up()],
    )  # fmt: skip


def _viewer(client: Client) -> str:
    """A key of its own: it may not reinstall, and its polls use up nobody else's rate."""
    return str(client.post("/keys", {"name": "watch", "role": "viewer"})["token"])


def _kept(folder: Path, *sites: Path) -> Callable[[], list[Path]]:
    return lambda: [*sites, *folder.glob("*.log"), *(folder / "rack").glob("*.log"), *(folder / "rack").glob("*.console")]


def _all(passwords: Sequence[str], machines: dict[str, Any]) -> list[str]:
    return [*passwords, REFUSED, *(m.bmc_password for m in machines.values())]
