"""Servers, each with its one instance, and the power last seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from repave.domain.model import Host, Instance, InstanceState, Server
from repave.domain.own_host import says_something
from repave.errors import RepaveError, RequestError
from repave.store import rows
from repave.store.database import Database, new_id, page_of
from repave.store.tables import CONSOLES, HOSTS, INSTANCES, RUNS, SERVERS

# Made once: see database.py.
_BY_ID = sa.select(SERVERS).where(SERVERS.c.id == sa.bindparam("server_id"))
_BY_IDS = sa.select(SERVERS).where(SERVERS.c.id.in_(sa.bindparam("server_ids", expanding=True)))
_ALIKE = sa.select(SERVERS).where(
    SERVERS.c.id != sa.bindparam("server_id"),
    sa.or_(
        SERVERS.c.name == sa.bindparam("its_name"), SERVERS.c.serial == sa.bindparam("its_serial"), sa.func.lower(SERVERS.c.uuid) == sa.bindparam("its_uuid")
    ),
)
_SEALED = sa.select(SERVERS.c.bmc_password_sealed).where(SERVERS.c.id == sa.bindparam("server_id"))
_ROTATING = "\0rotating\0"  # before a list of passwords, where one by itself would be: no login has a NUL
_CHANGE = sa.update(SERVERS).where(SERVERS.c.id == sa.bindparam("server_id"))
_MEDIA_OUT = _CHANGE.where(SERVERS.c.media_run_id == sa.bindparam("run_id"))
_NEW_SERVER, _NEW_INSTANCE = sa.insert(SERVERS), sa.insert(INSTANCES)
# Whose drive may hold the media of a run that is over; not those that are locked or that a run owns.
_LEFT_MEDIA = sa.select(SERVERS.c.id, SERVERS.c.media_run_id).where(
    SERVERS.c.media_run_id.is_not(None),
    SERVERS.c.locked_at.is_(None),
    ~sa.exists().where(RUNS.c.server_id == SERVERS.c.id, RUNS.c.ended_at.is_(None)),
)
_IS_LEFT = _LEFT_MEDIA.where(SERVERS.c.id == sa.bindparam("server_id"), SERVERS.c.media_run_id == sa.bindparam("run_id"))
_LIVE_RUN = sa.select(RUNS.c.id).where(RUNS.c.server_id == sa.bindparam("server_id"), RUNS.c.ended_at.is_(None))
_HOSTS = sa.select(HOSTS).order_by(HOSTS.c.id)
_INSTANCE = sa.select(INSTANCES).where(INSTANCES.c.project_id == sa.bindparam("project"), INSTANCES.c.id == sa.bindparam("instance"))


class Servers:
    """What stands in the racks."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add_server(
        self, server: Server, *, bmc_password: str, blank: bool, os_type: str = "Linux", image_id: str | None = None, actor: str = "repave"
    ) -> Instance:
        """The server and its one instance: adopted = running, with an unknown image unless one is named; blank = error, no OS yet."""
        now = self._db.now()
        error = RepaveError("blank").as_json() if blank else None
        state = InstanceState.ERROR if blank else InstanceState.RUNNING
        made = Instance(
            new_id(),
            server.name,
            server.project_id,
            server.id,
            image_id,
            state,
            None,
            error,
            now,
            now,
            None if blank else now,
            (),
            os_type,
        )
        with self._db.write() as conn:
            self._refuse_known_server(conn, server)
            values = asdict(server) | {"macs": list(server.macs), "keep_partitions": list(server.keep_partitions)}
            sealed = self._db.sealer.seal(bmc_password, about=f"bmc:{server.id}")
            conn.execute(_NEW_SERVER, {**values, "bmc_password_sealed": sealed, "epoch": 0})
            conn.execute(_NEW_INSTANCE, asdict(made) | {"state": state.value, "ssh_host_keys": []})
            self._db.event(conn, "server.added", server.project_id, server_id=server.id, actor=actor, name=server.name, blank=blank)
        return made

    def _refuse_known_server(self, conn: sa.Connection, server: Server) -> None:
        """Raises RequestError conflict, naming both, where another server has this one's name, serial number or UUID: nothing could tell them apart."""
        about = {"server_id": server.id, "its_name": server.name, "its_serial": server.serial, "its_uuid": server.uuid.lower()}
        others = [rows.server(r._mapping) for r in conn.execute(_ALIKE, about)]
        for other in others:
            if other.name == server.name:
                raise RequestError("conflict", f"A server {server.name!r} exists already.", field="name")
        for name, field in (("serial number", "serial"), ("UUID", "uuid")):
            mine = getattr(server, field)
            same = [o for o in others if says_something(mine) and getattr(o, field).lower() == mine.lower()]
            if same:
                raise RequestError("conflict", f"{server.name} and {same[0].name} have the same {name} {mine}; nothing could tell them apart.", field="bmc_url")

    def set_server(self, server_id: str, *, bmc_password: str | None = None, actor: str = "repave", **changes: Any) -> None:
        with self._db.write() as conn:
            if bmc_password is not None:
                changes["bmc_password_sealed"] = self._db.sealer.seal(bmc_password, about=f"bmc:{server_id}")
            conn.execute(sa.update(SERVERS).where(SERVERS.c.id == server_id).values(**changes))
            project_id = conn.execute(sa.select(SERVERS.c.project_id).where(SERVERS.c.id == server_id)).scalar_one()
            named = sorted(c for c in changes if "password" not in c)
            self._db.event(conn, "server.changed", project_id, server_id=server_id, actor=actor, fields=named)

    def lock(self, server_id: str, *, reason: str, actor: str) -> None:
        """No reinstall of this server is admitted until it is unlocked; one that was admitted already goes on. Repeatable: the newest reason stands."""
        with self._db.write() as conn:
            values = {"locked_at": self._db.now(), "locked_by": actor, "lock_reason": reason}
            self._change(conn, server_id, "server.locked", values, actor=actor, reason=reason)

    def unlock(self, server_id: str, *, actor: str) -> None:
        with self._db.write() as conn:
            self._change(conn, server_id, "server.unlocked", {"locked_at": None, "locked_by": None, "lock_reason": None}, actor=actor)

    def replace_server(self, old: Server, seen: dict[str, Any], *, bmc_password: str | None, actor: str) -> None:
        """After a board swap the server is known by its new serial number, UUID and MACs. By compare-and-set of the old ones.

        Raises RequestError in-progress while a run is live, conflict where another server has the new identity or someone was faster.
        """
        with self._db.write() as conn:
            self._refuse_live(conn, old.id)
            self._refuse_known_server(conn, replace(old, serial=seen["serial"], uuid=seen["uuid"]))
            now = conn.execute(sa.select(SERVERS.c.serial, SERVERS.c.uuid).where(SERVERS.c.id == old.id)).one()
            if (now.serial, now.uuid) != (old.serial, old.uuid):
                raise RequestError("conflict", f"{old.name} was changed in the meantime.", field="serial")
            values = seen | {"macs": list(seen["macs"])}
            if bmc_password is not None:
                values["bmc_password_sealed"] = self._db.sealer.seal(bmc_password, about=f"bmc:{old.id}")
            if old.locked_by == "repave":  # because it was another server than the one known
                values |= {"locked_at": None, "locked_by": None, "lock_reason": None}
            about = {f"old_{n}": getattr(old, n) for n in ("serial", "uuid")} | {f"new_{n}": seen[n] for n in ("serial", "uuid")}
            self._change(conn, old.id, "server.replaced", values, actor=actor, **about, old_macs=list(old.macs), new_macs=list(seen["macs"]))

    def refuse_live(self, server_id: str) -> None:
        """Raises RequestError in-progress while a run of it is live."""
        if self._db.row(_LIVE_RUN, server_id=server_id):
            raise _in_progress()

    def record_power_order(self, server_id: str, order: str, *, force: bool, actor: str) -> None:
        """An operator's order is in the audit. Raises RequestError in-progress while a run is live."""
        with self._db.write() as conn:
            self._refuse_live(conn, server_id)
            project_id = conn.execute(sa.select(SERVERS.c.project_id).where(SERVERS.c.id == server_id)).scalar_one()
            self._db.event(conn, "server.power-ordered", project_id, server_id=server_id, actor=actor, order=order, force=force)

    @staticmethod
    def _refuse_live(conn: sa.Connection, server_id: str) -> None:
        if conn.execute(_LIVE_RUN, {"server_id": server_id}).first():
            raise _in_progress()

    def _change(self, conn: sa.Connection, server_id: str, type_: str, values: dict[str, Any], *, actor: str, **about: Any) -> None:
        changed = sa.update(SERVERS).where(SERVERS.c.id == server_id).values(**values).returning(SERVERS.c.project_id)
        self._db.event(conn, type_, conn.execute(changed).scalar_one(), server_id=server_id, actor=actor, **about)

    def record_host(self, host: Host) -> None:
        """A machine that Repave runs on is known; it is never reinstalled by Repave. Repeatable."""
        values = {**asdict(host), "macs": list(host.macs), "seen_at": self._db.now()}
        with self._db.write() as conn:
            if conn.execute(sa.update(HOSTS).where(HOSTS.c.id == host.id).values(**values)).rowcount == 0:
                conn.execute(sa.insert(HOSTS).values(**values))

    def list_hosts(self) -> list[Host]:
        return [rows.host(r) for r in self._db.rows(_HOSTS)]

    def remove_server(self, server_id: str, *, actor: str = "repave") -> None:
        """The server, its instance and its runs are forgotten. Refused while a run is live."""
        with self._db.write() as conn:
            self._refuse_live(conn, server_id)
            project_id = conn.execute(sa.select(SERVERS.c.project_id).where(SERVERS.c.id == server_id)).scalar_one()
            conn.execute(sa.delete(CONSOLES).where(CONSOLES.c.run_id.in_(sa.select(RUNS.c.id).where(RUNS.c.server_id == server_id))))
            conn.execute(sa.delete(RUNS).where(RUNS.c.server_id == server_id))
            conn.execute(sa.delete(INSTANCES).where(INSTANCES.c.server_id == server_id))
            conn.execute(sa.delete(SERVERS).where(SERVERS.c.id == server_id))
            self._db.event(conn, "server.removed", project_id, server_id=server_id, actor=actor)

    def list_servers(self, project_id: str, *, after: str | None = None, limit: int = 100_000) -> tuple[list[Server], int]:
        found, total = self._db.page(SERVERS, [SERVERS.c.project_id == project_id], after, limit)
        return [rows.server(r) for r in found], total

    def list_named(self, project_id: str, *, after: str | None = None, limit: int | None = None) -> list[Server]:
        """In the order of their names; `after` is one."""
        query = sa.select(SERVERS).where(SERVERS.c.project_id == project_id)
        return [rows.server(r) for r in self._db.rows(page_of(query, SERVERS.c.name, after, limit))]

    def find_server(self, project_id: str, server_id: str) -> Server | None:
        row = self._db.row(sa.select(SERVERS).where(SERVERS.c.project_id == project_id, sa.or_(SERVERS.c.id == server_id, SERVERS.c.name == server_id)))
        return rows.server(row) if row else None

    def get_server(self, server_id: str) -> Server:
        row = self._db.row(_BY_ID, server_id=server_id)
        if row is None:
            raise RequestError("not-found", "There is no such server.", kind="server")
        return rows.server(row)

    def get_servers(self, server_ids: Sequence[str]) -> dict[str, Server]:
        """By id; all of them are there."""
        found = {r["id"]: rows.server(r) for r in self._db.rows(_BY_IDS, server_ids=server_ids)}
        assert found.keys() == set(server_ids)
        return found

    def list_bmc_passwords(self, server_id: str) -> list[str]:
        """The one to use first; behind it those that a rotation may have set, newest first."""
        row = self._db.row(_SEALED, server_id=server_id)
        assert row is not None
        return self._open(server_id, row["bmc_password_sealed"])

    def _open(self, server_id: str, sealed: str) -> list[str]:
        opened = self._db.sealer.unseal(sealed, about=f"bmc:{server_id}")
        return list(json.loads(opened.removeprefix(_ROTATING))) if opened.startswith(_ROTATING) else [opened]

    def _seal(self, server_id: str, passwords: Sequence[str]) -> str:
        opened = passwords[0] if len(passwords) == 1 else _ROTATING + json.dumps(list(passwords))
        return self._db.sealer.seal(opened, about=f"bmc:{server_id}")

    def begin_rotation(self, server_id: str, password: str) -> None:
        """Before a BMC is told: whatever becomes of that, what opens it is stored. Repeatable. Raises RequestError in-progress while a run is live."""
        with self._db.write() as conn:
            self._refuse_live(conn, server_id)
            now, *others = self._open(server_id, conn.execute(_SEALED, {"server_id": server_id}).scalar_one())
            known = list(dict.fromkeys([now, password, *others]))
            conn.execute(sa.update(SERVERS).where(SERVERS.c.id == server_id).values(bmc_password_sealed=self._seal(server_id, known)))

    def end_rotation(self, server_id: str, password: str, *, forget: Sequence[str], actor: str, rotated: bool = True) -> None:
        """This password opened the BMC: it is used first, and those to `forget` are gone. What another rotation has added meanwhile stays.

        `rotated`: it is the new one.
        """
        with self._db.write() as conn:
            known = self._open(server_id, conn.execute(_SEALED, {"server_id": server_id}).scalar_one())
            left = [p for p in known if p != password and p not in forget]
            said = "server.password-rotated" if rotated else "server.password-refused"
            self._change(conn, server_id, said, {"bmc_password_sealed": self._seal(server_id, [password, *left])}, actor=actor)

    def record_power(self, server_id: str, power: str) -> None:
        with self._db.write() as conn:
            conn.execute(_CHANGE, {"server_id": server_id, "power": power, "power_at": self._db.now()})

    def record_media(self, server_id: str, run_id: str) -> None:
        """From now on this run's media may be in the server's drive."""
        with self._db.write() as conn:
            conn.execute(_CHANGE, {"server_id": server_id, "media_run_id": run_id})

    def record_media_out(self, server_id: str, run_id: str) -> bool:
        """This run's media are out; those of another stay recorded, as a later run has its own. Returns whether they were recorded."""
        with self._db.write() as conn:
            return _media_are_out(conn, server_id, run_id)

    def list_left_media(self) -> dict[str, str]:
        """By server, the run that is over and whose media may still be in the drive; only servers that nobody works on or has locked."""
        return {r["id"]: r["media_run_id"] for r in self._db.rows(_LEFT_MEDIA)}

    def is_left_media(self, server_id: str, run_id: str) -> bool:
        """`list_left_media` has them now."""
        return self._db.row(_IS_LEFT, server_id=server_id, run_id=run_id) is not None

    def record_left_media_out(self, server_id: str, run_id: str, *, found: bool) -> None:
        """As `record_media_out`, after the run's end. `found`: they had to be taken out."""
        with self._db.write() as conn:
            if _media_are_out(conn, server_id, run_id) and found:
                run = conn.execute(sa.select(RUNS.c.project_id, RUNS.c.batch_id).where(RUNS.c.id == run_id)).one()
                self._db.event(conn, "run.media-out", run.project_id, batch_id=run.batch_id, run_id=run_id, server_id=server_id)

    def read_power_seen(self, server_id: str) -> tuple[str, datetime] | None:
        row = self._db.row(sa.select(SERVERS.c.power, SERVERS.c.power_at).where(SERVERS.c.id == server_id))
        return (row["power"], row["power_at"]) if row and row["power"] else None

    def list_instances(
        self, project_id: str, *, state: str | None = None, ids: Sequence[str] | None = None, server_ids: Sequence[str] | None = None,
        after: str | None = None, limit: int = 100_000,
    ) -> tuple[list[Instance], int]:  # fmt: skip
        """One page in the order of ids, and how many there are in all."""
        where: list[sa.ColumnElement[bool]] = [INSTANCES.c.project_id == project_id]
        if state is not None:
            where.append(INSTANCES.c.state == state)
        if ids is not None:
            where.append(INSTANCES.c.id.in_(ids))
        if server_ids is not None:
            where.append(INSTANCES.c.server_id.in_(server_ids))
        found, total = self._db.page(INSTANCES, where, after, limit)
        return [rows.instance(r) for r in found], total

    def find_instance(self, project_id: str, instance_id: str) -> Instance | None:
        row = self._db.row(_INSTANCE, project=project_id, instance=instance_id)
        return rows.instance(row) if row else None


def _in_progress() -> RequestError:
    return RequestError("in-progress", "A run of this server has not ended.", kind="server")


def _media_are_out(conn: sa.Connection, server_id: str, run_id: str) -> bool:
    return conn.execute(_MEDIA_OUT, {"server_id": server_id, "run_id": run_id, "media_run_id": None}).rowcount == 1
