"""All SQL. Methods are named for questions (`find_x` may return None, `get_x` raises, `list_x`) and facts (`record_x`).

Sync, one transaction a method, on SQLite (WAL, synchronous=FULL) or PostgreSQL. Facts that must not be overtaken are
compare-and-set: they return False where another fact came first. Every change writes its audit row in the same transaction.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from repave.domain.model import (
    Batch,
    Credential,
    Event,
    Image,
    Instance,
    InstanceState,
    OperationState,
    Project,
    Role,
    RunRow,
    Server,
    Step,
)
from repave.domain.states import Ending, next_situation
from repave.errors import RepaveError, RequestError
from repave.secrets import Sealer, fingerprint
from repave.store import rows
from repave.store.tables import (
    ANSWERS,
    BATCHES,
    CREDENTIALS,
    EVENTS,
    IMAGES,
    INSTANCES,
    META,
    PROJECTS,
    RUNS,
    SERVERS,
)

Enqueue = Callable[[sa.Connection, Sequence["NewRun"]], None]
Tell = Callable[[sa.Connection, str, str, dict[str, Any]], None]  # (connection, run id, event, message): wakes the run's workflow


@dataclass(frozen=True)
class NewRun:
    """One run about to be stored. `secret_sealed` holds the password's hash (Windows: the password) and the user data."""

    id: str
    instance: Instance
    server: Server
    image_id: str
    deadline_at: datetime
    secret_sealed: str
    token_sha256: str
    session_sha256: str
    nonce_sha256: str
    ssh_keys: tuple[str, ...] = ()


def new_id() -> str:
    """A UUID of version 7: sorts by the time it was made (RFC 9562)."""
    raw = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return str(uuid.UUID(int=raw & ~(0xF << 76) & ~(0x3 << 62) | 7 << 76 | 2 << 62))


class Store:
    """Everything Repave knows."""

    def __init__(self, engine: sa.Engine, sealer: Sealer, now: Callable[[], datetime]) -> None:
        self.engine, self.sealer, self.now = engine, sealer, now
        self.tell: Tell = lambda conn, run_id, event, message: None  # the engine's; set by app.py

    @classmethod
    def open(cls, url: str, *, sealer: Sealer, now: Callable[[], datetime]) -> Store:
        """The store at a SQLAlchemy URL, its tables made or brought up to date."""
        engine = sa.create_engine(url, pool_size=32, max_overflow=32, hide_parameters=True)
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine)
        META.create_all(engine)
        return cls(engine, sealer, now)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self.engine.connect().execution_options(repave_write=True) as conn, conn.begin():
            yield conn

    def _rows(self, statement: sa.Select[Any]) -> list[sa.RowMapping]:
        with self.engine.connect() as conn:
            return [r._mapping for r in conn.execute(statement)]

    def _row(self, statement: sa.Select[Any]) -> sa.RowMapping | None:
        found = self._rows(statement.limit(1))
        return found[0] if found else None

    def _event(self, conn: sa.Connection, type_: str, project_id: str, *, actor: str = "repave", **about: Any) -> None:
        ids = {name: about.pop(name, None) for name in ("batch_id", "run_id", "server_id")}
        conn.execute(sa.insert(EVENTS).values(at=self.now(), project_id=project_id, type=type_, actor=actor, data=about, **ids))

    # ---- projects and credentials ----

    def add_project(self, name: str) -> Project:
        project = Project(uuid.uuid4().hex, name, uuid.uuid4().hex)
        with self._write() as conn:
            if conn.execute(sa.select(PROJECTS.c.id).where(PROJECTS.c.name == name)).first():
                raise RequestError("conflict", f"A project {name!r} exists already.", field="name")
            conn.execute(sa.insert(PROJECTS).values(**asdict(project)))
            self._event(conn, "project.added", project.id, name=name)
        return project

    def list_projects(self) -> list[Project]:
        return [rows.project(r) for r in self._rows(sa.select(PROJECTS).order_by(PROJECTS.c.name))]

    def find_project(self, project_id: str) -> Project | None:
        row = self._row(sa.select(PROJECTS).where(sa.or_(PROJECTS.c.id == project_id, PROJECTS.c.name == project_id)))
        return rows.project(row) if row else None

    def add_credential(self, project_id: str, name: str, role: Role, *, expires_at: datetime | None = None) -> tuple[Credential, str, str]:
        """The credential, its SK and its token: shown once, kept sealed and hashed."""
        ak, sk, token = secrets.token_hex(10).upper(), secrets.token_urlsafe(30), secrets.token_urlsafe(32)
        made = Credential(new_id(), project_id, name, role, ak, expires_at, self.now())
        with self._write() as conn:
            conn.execute(sa.insert(CREDENTIALS).values(
                **asdict(made) | {"role": role.value}, sk_sealed=self.sealer.seal(sk, about=f"sk:{made.id}"), token_sha256=fingerprint(token),
            ))  # fmt: skip
            self._event(conn, "key.added", project_id, name=name, role=role.value)
        return made, sk, token

    def list_credentials(self, project_id: str) -> list[Credential]:
        return [rows.credential(r) for r in self._rows(sa.select(CREDENTIALS).where(CREDENTIALS.c.project_id == project_id))]

    def remove_credential(self, project_id: str, credential_id: str) -> None:
        with self._write() as conn:
            where = sa.and_(CREDENTIALS.c.id == credential_id, CREDENTIALS.c.project_id == project_id)
            if conn.execute(sa.delete(CREDENTIALS).where(where)).rowcount == 0:
                raise RequestError("not-found", "There is no such key.", kind="key")
            self._event(conn, "key.removed", project_id, key=credential_id)

    def find_credential_by_token(self, token: str) -> Credential | None:
        row = self._row(sa.select(CREDENTIALS).where(CREDENTIALS.c.token_sha256 == fingerprint(token)))
        return rows.credential(row) if row else None

    def find_credential_by_ak(self, ak: str) -> tuple[Credential, str] | None:
        row = self._row(sa.select(CREDENTIALS).where(CREDENTIALS.c.ak == ak))
        return (rows.credential(row), self.sealer.unseal(row["sk_sealed"], about=f"sk:{row['id']}")) if row else None

    def find_answer(self, key: str) -> dict[str, Any] | None:
        """The stored 202 of an identical signed request."""
        row = self._row(sa.select(ANSWERS).where(ANSWERS.c.key == key))
        return row["answer"] if row else None

    # ---- servers and their instances ----

    def add_server(self, server: Server, *, bmc_password: str, blank: bool, os_type: str = "Linux", actor: str = "repave") -> Instance:
        """The server and its one instance: adopted = running with an unknown image, blank = error, no OS yet."""
        now = self.now()
        error = RepaveError("blank").as_json() if blank else None
        state = InstanceState.ERROR if blank else InstanceState.RUNNING
        made = Instance(
            new_id(),
            server.name,
            server.project_id,
            server.id,
            None,
            state,
            None,
            error,
            now,
            now,
            None if blank else now,
            (),
            os_type,
        )
        with self._write() as conn:
            self._refuse_known_server(conn, server)
            values = asdict(server) | {"macs": list(server.macs)}
            sealed = self.sealer.seal(bmc_password, about=f"bmc:{server.id}")
            conn.execute(sa.insert(SERVERS).values(**values, bmc_password_sealed=sealed, epoch=0))
            conn.execute(sa.insert(INSTANCES).values(**asdict(made) | {"state": state.value, "ssh_host_keys": []}))
            self._event(conn, "server.added", server.project_id, server_id=server.id, actor=actor, name=server.name, blank=blank)
        return made

    def _refuse_known_server(self, conn: sa.Connection, server: Server) -> None:
        same_board = sa.and_(SERVERS.c.uuid == server.uuid, SERVERS.c.serial == server.serial, SERVERS.c.uuid != "")
        if conn.execute(sa.select(SERVERS.c.id).where(SERVERS.c.name == server.name)).first():
            raise RequestError("conflict", f"A server {server.name!r} exists already.", field="name")
        if conn.execute(sa.select(SERVERS.c.id).where(same_board)).first():
            raise RequestError("conflict", f"{server.name}: a server with this serial and UUID exists already.", field="bmc_url")

    def set_server(self, server_id: str, *, bmc_password: str | None = None, actor: str = "repave", **changes: Any) -> None:
        with self._write() as conn:
            if bmc_password is not None:
                changes["bmc_password_sealed"] = self.sealer.seal(bmc_password, about=f"bmc:{server_id}")
            conn.execute(sa.update(SERVERS).where(SERVERS.c.id == server_id).values(**changes))
            project_id = conn.execute(sa.select(SERVERS.c.project_id).where(SERVERS.c.id == server_id)).scalar_one()
            named = sorted(c for c in changes if "password" not in c)
            self._event(conn, "server.changed", project_id, server_id=server_id, actor=actor, fields=named)

    def remove_server(self, server_id: str, *, actor: str = "repave") -> None:
        """The server, its instance and its runs are forgotten. Refused while a run is live."""
        with self._write() as conn:
            live = sa.and_(RUNS.c.server_id == server_id, RUNS.c.ended_at.is_(None))
            if conn.execute(sa.select(RUNS.c.id).where(live)).first():
                raise RequestError("in-progress", "A run of this server has not ended.", kind="server")
            project_id = conn.execute(sa.select(SERVERS.c.project_id).where(SERVERS.c.id == server_id)).scalar_one()
            conn.execute(sa.delete(RUNS).where(RUNS.c.server_id == server_id))
            conn.execute(sa.delete(INSTANCES).where(INSTANCES.c.server_id == server_id))
            conn.execute(sa.delete(SERVERS).where(SERVERS.c.id == server_id))
            self._event(conn, "server.removed", project_id, server_id=server_id, actor=actor)

    def list_servers(self, project_id: str, *, after: str | None = None, limit: int = 100_000) -> tuple[list[Server], int]:
        found, total = self._page(SERVERS, [SERVERS.c.project_id == project_id], after, limit)
        return [rows.server(r) for r in found], total

    def find_server(self, project_id: str, server_id: str) -> Server | None:
        row = self._row(sa.select(SERVERS).where(SERVERS.c.project_id == project_id, sa.or_(SERVERS.c.id == server_id, SERVERS.c.name == server_id)))
        return rows.server(row) if row else None

    def get_server(self, server_id: str) -> Server:
        row = self._row(sa.select(SERVERS).where(SERVERS.c.id == server_id))
        if row is None:
            raise RequestError("not-found", "There is no such server.", kind="server")
        return rows.server(row)

    def get_servers(self, server_ids: Sequence[str]) -> dict[str, Server]:
        """By id; all of them are there."""
        found = {r["id"]: rows.server(r) for r in self._rows(sa.select(SERVERS).where(SERVERS.c.id.in_(server_ids)))}
        assert found.keys() == set(server_ids)
        return found

    def get_bmc_password(self, server_id: str) -> str:
        row = self._row(sa.select(SERVERS.c.bmc_password_sealed).where(SERVERS.c.id == server_id))
        assert row is not None
        return self.sealer.unseal(row["bmc_password_sealed"], about=f"bmc:{server_id}")

    def record_power(self, server_id: str, power: str) -> None:
        with self._write() as conn:
            conn.execute(sa.update(SERVERS).where(SERVERS.c.id == server_id).values(power=power, power_at=self.now()))

    def read_power_seen(self, server_id: str) -> tuple[str, datetime] | None:
        row = self._row(sa.select(SERVERS.c.power, SERVERS.c.power_at).where(SERVERS.c.id == server_id))
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
        found, total = self._page(INSTANCES, where, after, limit)
        return [rows.instance(r) for r in found], total

    def find_instance(self, project_id: str, instance_id: str) -> Instance | None:
        row = self._row(sa.select(INSTANCES).where(INSTANCES.c.project_id == project_id, INSTANCES.c.id == instance_id))
        return rows.instance(row) if row else None

    def _page(self, table: sa.Table, where: list[sa.ColumnElement[bool]], after: str | None, limit: int) -> tuple[list[sa.RowMapping], int]:
        counted = self._row(sa.select(sa.func.count().label("n")).select_from(table).where(*where))
        assert counted is not None
        page = sa.select(table).where(*where).order_by(table.c.id).limit(limit)
        return self._rows(page.where(table.c.id > after) if after else page), counted["n"]

    # ---- images ----

    def add_image(self, image: Image, *, actor: str = "repave") -> None:
        with self._write() as conn:
            same = sa.and_(IMAGES.c.project_id == image.project_id, IMAGES.c.name == image.name)
            if conn.execute(sa.select(IMAGES.c.id).where(same)).first():
                raise RequestError("conflict", f"An image {image.name!r} exists already.", field="name")
            conn.execute(sa.insert(IMAGES).values(**asdict(image)))
            self._event(conn, "image.added", image.project_id, actor=actor, image=image.id, name=image.name)

    def list_images(self, project_id: str) -> list[Image]:
        return [rows.image(r) for r in self._rows(sa.select(IMAGES).where(IMAGES.c.project_id == project_id).order_by(IMAGES.c.name))]

    def find_image(self, project_id: str, image_id: str) -> Image | None:
        row = self._row(sa.select(IMAGES).where(IMAGES.c.project_id == project_id, IMAGES.c.id == image_id))
        return rows.image(row) if row else None

    def remove_image(self, image: Image, *, actor: str = "repave") -> list[str]:
        """The image is forgotten; returns the manifests still in use. Refused while a live run needs it."""
        with self._write() as conn:
            live = sa.and_(RUNS.c.image_id == image.id, RUNS.c.ended_at.is_(None))
            if conn.execute(sa.select(RUNS.c.id).where(live)).first():
                raise RequestError("in-progress", "A run that has not ended needs this image.", kind="image")
            conn.execute(sa.delete(IMAGES).where(IMAGES.c.id == image.id))
            self._event(conn, "image.removed", image.project_id, actor=actor, image=image.id, name=image.name)
            return list(conn.execute(sa.select(IMAGES.c.manifest_sha256)).scalars())

    # ---- batches and runs ----

    def accept_batch(self, batch: Batch, runs: Sequence[NewRun], *, enqueue: Enqueue, answer_key: str | None, answer: dict[str, Any]) -> None:
        """Batch, runs, states, audit rows, the stored answer and the queued workflows: all or none.

        Raises RequestError in-progress, naming the ids, where an instance is no longer in the state it was found in.
        """
        now = self.now()
        with self._write() as conn:
            conn.execute(sa.insert(BATCHES).values(**asdict(batch)))
            late = [run.instance.id for run in runs if not self._move(conn, run.instance, Ending.ACCEPTED, None)]
            if late:
                raise RequestError("in-progress", "", kind="state", ids=late)
            for run in runs:
                bump = sa.update(SERVERS).where(SERVERS.c.id == run.server.id).values(epoch=SERVERS.c.epoch + 1).returning(SERVERS.c.epoch)
                epoch = conn.execute(bump).scalar_one()
                conn.execute(sa.insert(RUNS).values(
                    id=run.id, batch_id=batch.id, project_id=batch.project_id, instance_id=run.instance.id, server_id=run.server.id,
                    image_id=run.image_id, epoch=epoch, found_state=run.instance.state.value, found_image_id=run.instance.image_id,
                    step=Step.PREFLIGHT.value, created_at=now, deadline_at=run.deadline_at, ssh_keys=list(run.ssh_keys),
                    secret_sealed=run.secret_sealed, token_sha256=run.token_sha256, session_sha256=run.session_sha256,
                    nonce_sha256=run.nonce_sha256,
                ))  # fmt: skip
                self._event(
                    conn,
                    "run.accepted",
                    batch.project_id,
                    batch_id=batch.id,
                    run_id=run.id,
                    server_id=run.server.id,
                    actor=batch.created_by,
                )
            if answer_key is not None:
                conn.execute(sa.insert(ANSWERS).values(key=answer_key, answer=answer, at=now))
            enqueue(conn, runs)

    def _move(self, conn: sa.Connection, instance: Instance, ending: Ending, found: InstanceState | None, **also: Any) -> bool:
        """Compare-and-set of the instance's state by the table in domain/states.py."""
        after = next_situation(instance.state, ending, found)
        values = {
            "state": after.state.value,
            "operation_state": after.operation.value if after.operation else None,
            "updated_at": self.now(),
        }
        if ending is Ending.ACCEPTED:
            values["error"] = None
        where = sa.and_(INSTANCES.c.id == instance.id, INSTANCES.c.state == instance.state.value)
        return conn.execute(sa.update(INSTANCES).where(where).values(**values | also)).rowcount == 1

    def get_run(self, run_id: str) -> RunRow:
        run = self.find_run(run_id)
        if run is None:
            raise RequestError("not-found", "There is no such run.", kind="run")
        return run

    def find_run(self, run_id: str) -> RunRow | None:
        row = self._row(sa.select(RUNS).where(RUNS.c.id == run_id))
        return rows.run(row) if row else None

    def find_run_by_token(self, token: str) -> RunRow | None:
        row = self._row(sa.select(RUNS).where(RUNS.c.token_sha256 == fingerprint(token)))
        return rows.run(row) if row else None

    def find_run_by_session(self, token: str) -> RunRow | None:
        row = self._row(sa.select(RUNS).where(RUNS.c.session_sha256 == fingerprint(token)))
        return rows.run(row) if row else None

    def find_run_by_nonce(self, run_id: str, nonce: str) -> RunRow | None:
        row = self._row(sa.select(RUNS).where(RUNS.c.id == run_id, RUNS.c.nonce_sha256 == fingerprint(nonce)))
        return rows.run(row) if row else None

    def get_run_secret(self, run_id: str) -> dict[str, str]:
        """`password` (Linux: its hash) and `user_data`. Raises RunFailed password-gone once the run's key is destroyed."""
        row = self._row(sa.select(RUNS.c.secret_sealed).where(RUNS.c.id == run_id))
        secret: dict[str, str] = json.loads(self.sealer.unseal_for_run(run_id, row["secret_sealed"] if row else ""))
        return secret

    def list_runs(self, *, batch_id: str | None = None, live: bool | None = None, project_id: str | None = None) -> list[RunRow]:
        query = sa.select(RUNS).order_by(RUNS.c.id)
        if batch_id is not None:
            query = query.where(RUNS.c.batch_id == batch_id)
        if project_id is not None:
            query = query.where(RUNS.c.project_id == project_id)
        if live is not None:
            query = query.where(RUNS.c.ended_at.is_(None) if live else RUNS.c.ended_at.is_not(None))
        return [rows.run(r) for r in self._rows(query)]

    def list_batches(self, project_id: str, *, limit: int = 100) -> list[Batch]:
        """Newest first."""
        query = sa.select(BATCHES).where(BATCHES.c.project_id == project_id).order_by(BATCHES.c.id.desc()).limit(limit)
        return [rows.batch(r) for r in self._rows(query)]

    def find_batch(self, project_id: str, batch_id: str) -> Batch | None:
        row = self._row(sa.select(BATCHES).where(BATCHES.c.project_id == project_id, BATCHES.c.id == batch_id))
        return rows.batch(row) if row else None

    def record_step(self, run_id: str, step: Step, **data: Any) -> None:
        """The run is in this step. Repeatable: a step already recorded is not recorded again."""
        with self._write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            if row.step == step.value and row.started_at is not None and not data:
                return
            values: dict[str, Any] = {"step": step.value} | ({} if row.started_at else {"started_at": self.now()})
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(**values))
            self._run_event(conn, "run.step", row, step=step.value, **data)

    def record_note(self, run_id: str, type_: str, **data: Any) -> None:
        """An event of this run that changes nothing."""
        with self._write() as conn:
            self._run_event(conn, type_, conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one(), **data)

    def _run_event(self, conn: sa.Connection, type_: str, row: Any, **data: Any) -> None:
        self._event(conn, type_, row.project_id, batch_id=row.batch_id, run_id=row.id, server_id=row.server_id, **data)

    def record_hello(self, run_id: str, boot_id: str, inventory: dict[str, Any]) -> bool:
        """The agent of this boot is known. False for any other boot (the token is spent), or once the run is closing."""
        open_ = sa.and_(RUNS.c.id == run_id, RUNS.c.closed_at.is_(None), RUNS.c.crossed_at.is_(None))
        with self._write() as conn:
            same_boot = sa.or_(RUNS.c.boot_id.is_(None), RUNS.c.boot_id == boot_id)
            values = {
                "boot_id": boot_id,
                "inventory": inventory,
                "seen_at": self.now(),
                "ready_at": sa.func.coalesce(RUNS.c.ready_at, sa.literal(self.now(), RUNS.c.ready_at.type)),
            }
            if conn.execute(sa.update(RUNS).where(open_, same_boot).values(**values)).rowcount == 0:
                return False
            self.tell(conn, run_id, "agent-ready", {})
            return True

    def record_seen(self, run: RunRow) -> None:
        """The agent asked again; written down every ten seconds, not at each of its polls."""
        if run.seen_at is None or (self.now() - run.seen_at).total_seconds() > 10:
            with self._write() as conn:
                conn.execute(sa.update(RUNS).where(RUNS.c.id == run.id).values(seen_at=self.now()))

    def record_plan(self, run_id: str, plan: dict[str, Any]) -> None:
        with self._write() as conn:
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id, RUNS.c.crossed_at.is_(None)).values(plan=plan))
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            self._run_event(
                conn,
                "run.plan",
                row,
                disk_path=plan["disk_path"],
                disk_serial=plan["disk_serial"],
                plan_id=plan["plan_id"],
            )

    def close_before_line(self, run_id: str) -> bool:
        """The run is closed: nobody crosses, writes or reports success any more. False where the line was crossed first. Repeatable."""
        with self._write() as conn:
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id, RUNS.c.closed_at.is_(None)).values(closed_at=self.now()))
            return conn.execute(sa.select(RUNS.c.crossed_at).where(RUNS.c.id == run_id)).scalar_one() is None

    def record_crossing(self, run_id: str, plan_id: str) -> bool:
        """THE LINE. True when this run may write, now or already before (an answer may have been lost)."""
        now = self.now()
        with self._write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            if not row.plan or row.plan["plan_id"] != plan_id or now > row.deadline_at:
                return False
            # Decided by the update itself, so that it holds on every database: a rollback that committed first wins.
            may = sa.and_(RUNS.c.id == run_id, RUNS.c.closed_at.is_(None), RUNS.c.ended_at.is_(None), RUNS.c.report.is_(None))
            values = {"crossed_at": row.crossed_at or now, "seen_at": now, "step": Step.WRITE_IMAGE.value}
            if conn.execute(sa.update(RUNS).where(may).values(**values)).rowcount == 0:
                return False
            if row.crossed_at is None:
                self._run_event(conn, "run.crossed", row, plan_id=plan_id)
            return True

    def record_progress(self, run_id: str, progress: dict[str, Any]) -> bool:
        """The lease is renewed. False: stop writing."""
        live = sa.and_(
            RUNS.c.id == run_id,
            RUNS.c.crossed_at.is_not(None),
            RUNS.c.closed_at.is_(None),
            RUNS.c.ended_at.is_(None),
            RUNS.c.deadline_at > self.now(),
        )
        with self._write() as conn:
            values = {"progress": progress, "seen_at": self.now()}
            return conn.execute(sa.update(RUNS).where(live).values(**values)).rowcount == 1

    def record_report(self, run_id: str, report: dict[str, Any]) -> bool:
        """How the write ended; the first report stands."""
        with self._write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            if row.report is not None or row.ended_at is not None:
                return row.report is not None
            good = report.get("verified") and not report.get("error") and row.crossed_at and not row.closed_at
            verified = self.now() if good else None
            first = sa.and_(RUNS.c.id == run_id, RUNS.c.report.is_(None), RUNS.c.closed_at.is_(None) if good else sa.true())
            if conn.execute(sa.update(RUNS).where(first).values(report=report, verified_at=verified, seen_at=self.now())).rowcount == 0:
                return False
            self._run_event(
                conn,
                "run.report",
                row,
                verified=bool(verified),
                stages_s=report.get("stages_s", {}),
                error=report.get("error"),
            )
            failure = report.get("error") or RepaveError("agent-failed").as_json()
            self.tell(conn, run_id, "written", {} if verified else {"error": failure})
            return True

    def record_proof(self, run_id: str, proof: dict[str, Any]) -> None:
        with self._write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id, RUNS.c.proof.is_(None)).values(proof=proof))
            self._run_event(conn, "run.proof", row, root_disk_serial=proof.get("root_disk_serial"), boot_id=proof.get("boot_id"))
            if row.ended_at is None:
                self.tell(conn, run_id, "proof", {})

    def tell_silence(self, run_id: str) -> None:
        """The agent's lease ran out long ago: the workflow is told once."""
        with self._write() as conn:
            self.tell(conn, run_id, "written", {"error": RepaveError("agent-silent").as_json()})

    def record_ending(self, run_id: str, ending: Ending, error: dict[str, Any] | None) -> bool:
        """The run and its instance are at their end; the batch too when it was the last. The first ending stands. Repeatable."""
        now = self.now()
        with self._write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            if row.ended_at is not None and ending is not Ending.LATE_PROOF:
                return False
            instance = rows.instance(conn.execute(sa.select(INSTANCES).where(INSTANCES.c.id == row.instance_id)).one()._mapping)
            good = ending in (Ending.PROVED, Ending.LATE_PROOF)
            also: dict[str, Any] = {"error": None if good else error}
            if error is not None and not good:
                error = error | {"untouched": _untouched(ending, crossed=row.crossed_at is not None)}
                also["error"] = error
            if good:
                proof = row.proof or {}
                also["os_type"] = conn.execute(sa.select(IMAGES.c.os_type).where(IMAGES.c.id == row.image_id)).scalar_one()
                also |= {"image_id": row.image_id, "launched_at": now, "ssh_host_keys": proof.get("ssh_host_keys", [])}
            elif row.crossed_at is not None:
                also |= {"image_id": row.image_id if ending is Ending.UNPROVED else None}
            if not self._move(conn, instance, ending, InstanceState(row.found_state), **also):
                return False
            values = {
                "ended_at": row.ended_at or now,
                "closed_at": row.closed_at or now,
                "outcome": ending.value,
                "error": None if good else error,
            }
            if good:
                values["step"] = Step.PROOF.value
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(**values))
            self._run_event(conn, "run.ended", row, outcome=ending.value, error=error)
            live = sa.and_(RUNS.c.batch_id == row.batch_id, RUNS.c.ended_at.is_(None))
            if not conn.execute(sa.select(RUNS.c.id).where(live).limit(1)).first():
                done = sa.update(BATCHES).where(BATCHES.c.id == row.batch_id, BATCHES.c.ended_at.is_(None)).values(ended_at=now)
                if conn.execute(done).rowcount:
                    self._event(conn, "batch.ended", row.project_id, batch_id=row.batch_id)
            return True

    def is_closed(self, run_id: str) -> bool:
        """A rollback has begun, or the run ended: nobody crosses any more."""
        row = self._row(sa.select(RUNS.c.closed_at, RUNS.c.ended_at).where(RUNS.c.id == run_id))
        return row is None or row["closed_at"] is not None or row["ended_at"] is not None

    def is_latest_run(self, run: RunRow) -> bool:
        row = self._row(sa.select(SERVERS.c.epoch).where(SERVERS.c.id == run.server_id))
        return row is not None and row["epoch"] == run.epoch

    # ---- events ----

    def list_events(self, project_id: str, *, after: int = 0, batch_id: str | None = None, limit: int = 1000) -> list[Event]:
        query = sa.select(EVENTS).where(EVENTS.c.project_id == project_id, EVENTS.c.seq > after).order_by(EVENTS.c.seq).limit(limit)
        return [rows.event(r) for r in self._rows(query.where(EVENTS.c.batch_id == batch_id) if batch_id else query)]


def _untouched(ending: Ending, *, crossed: bool) -> str:
    """What is true of the disks at this ending: the line decides, not the kind of error."""
    if not crossed:
        return "the root disk was not written"
    return "data disks; the image on the root disk is verified" if ending is Ending.UNPROVED else "data disks; the root disk is erased"


def _prepare_sqlite(engine: sa.Engine) -> None:
    """WAL and synchronous=FULL, foreign keys, BEGIN IMMEDIATE for writers (a read that turns into a write can not wait for its lock)."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(conn: sa.Connection) -> None:
        conn.exec_driver_sql("BEGIN IMMEDIATE" if conn.get_execution_options().get("repave_write") else "BEGIN")


__all__ = ["NewRun", "OperationState", "Store", "new_id"]
