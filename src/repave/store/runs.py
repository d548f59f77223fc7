"""Batches and runs: admission in one transaction, and the facts of a run, each compare-and-set where it must not be overtaken."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from repave.domain.model import Batch, Instance, InstanceState, RunRow, Server, Step
from repave.domain.states import Ending, next_situation
from repave.errors import RepaveError, RequestError
from repave.secrets import fingerprint
from repave.store import rows
from repave.store.database import Database
from repave.store.tables import ANSWERS, BATCHES, IMAGES, INSTANCES, RUNS, SERVERS

Enqueue = Callable[[sa.Connection, Sequence["NewRun"]], None]


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


class Runs:
    """What was asked and what happened so far."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def accept_batch(self, batch: Batch, runs: Sequence[NewRun], *, enqueue: Enqueue, answer_key: str | None, answer: dict[str, Any]) -> None:
        """Batch, runs, states, audit rows, the stored answer and the queued workflows: all or none.

        Raises RequestError in-progress, naming the ids, where an instance is no longer in the state it was found in.
        """
        now = self._db.now()
        with self._db.write() as conn:
            conn.execute(sa.insert(BATCHES).values(**asdict(batch)))
            self._occupy(conn, [run.instance for run in runs])
            bump = sa.update(SERVERS).where(SERVERS.c.id.in_([run.server.id for run in runs])).values(epoch=SERVERS.c.epoch + 1)
            epochs = {r.id: r.epoch for r in conn.execute(bump.returning(SERVERS.c.id, SERVERS.c.epoch))}
            conn.execute(sa.insert(RUNS), [_row(run, batch, epochs[run.server.id], now) for run in runs])
            about = {"batch_id": batch.id, "actor": batch.created_by}
            self._db.write_events(conn, "run.accepted", batch.project_id, [about | {"run_id": run.id, "server_id": run.server.id} for run in runs])
            if answer_key is not None:
                conn.execute(sa.insert(ANSWERS).values(key=answer_key, answer=answer, at=now))
            enqueue(conn, runs)

    def _occupy(self, conn: sa.Connection, instances: Sequence[Instance]) -> None:
        """All of them are `pending`, by compare-and-set of the state each was found in. Raises RequestError in-progress, naming the others."""
        wanted = sa.select(INSTANCES.c.id).where(INSTANCES.c.id.in_([i.id for i in instances]))
        conn.execute(wanted.order_by(INSTANCES.c.id).with_for_update())  # in one order, so that two overlapping requests never wait for each other
        taken: set[str] = set()
        for state in {i.state for i in instances}:
            after = next_situation(state, Ending.ACCEPTED)
            assert after.operation is not None
            values = {"state": after.state.value, "operation_state": after.operation.value, "updated_at": self._db.now(), "error": None}
            found = sa.and_(INSTANCES.c.id.in_([i.id for i in instances if i.state is state]), INSTANCES.c.state == state.value)
            taken |= set(conn.execute(sa.update(INSTANCES).where(found).values(**values).returning(INSTANCES.c.id)).scalars())
        if late := [i.id for i in instances if i.id not in taken]:
            raise RequestError("in-progress", "", kind="state", ids=late)

    def _move(self, conn: sa.Connection, instance: Instance, ending: Ending, found: InstanceState | None, **also: Any) -> bool:
        """Compare-and-set of the instance's state by the table in domain/states.py."""
        after = next_situation(instance.state, ending, found)
        values = {
            "state": after.state.value,
            "operation_state": after.operation.value if after.operation else None,
            "updated_at": self._db.now(),
        }
        where = sa.and_(INSTANCES.c.id == instance.id, INSTANCES.c.state == instance.state.value)
        return conn.execute(sa.update(INSTANCES).where(where).values(**values | also)).rowcount == 1

    def get_run(self, run_id: str) -> RunRow:
        run = self.find_run(run_id)
        if run is None:
            raise RequestError("not-found", "There is no such run.", kind="run")
        return run

    def find_run(self, run_id: str) -> RunRow | None:
        row = self._db.row(sa.select(RUNS).where(RUNS.c.id == run_id))
        return rows.run(row) if row else None

    def find_run_by_token(self, token: str) -> RunRow | None:
        row = self._db.row(sa.select(RUNS).where(RUNS.c.token_sha256 == fingerprint(token)))
        return rows.run(row) if row else None

    def find_run_by_session(self, token: str) -> RunRow | None:
        row = self._db.row(sa.select(RUNS).where(RUNS.c.session_sha256 == fingerprint(token)))
        return rows.run(row) if row else None

    def find_run_by_nonce(self, run_id: str, nonce: str) -> RunRow | None:
        row = self._db.row(sa.select(RUNS).where(RUNS.c.id == run_id, RUNS.c.nonce_sha256 == fingerprint(nonce)))
        return rows.run(row) if row else None

    def get_run_secret(self, run_id: str) -> dict[str, str]:
        """`password` (Linux: its hash) and `user_data`. Raises RunFailed password-gone once the run's key is destroyed."""
        row = self._db.row(sa.select(RUNS.c.secret_sealed).where(RUNS.c.id == run_id))
        secret: dict[str, str] = json.loads(self._db.sealer.unseal_for_run(run_id, row["secret_sealed"] if row else ""))
        return secret

    def find_inventory(self, server_id: str) -> dict[str, Any] | None:
        """What the ramdisk saw of this server when it last was there."""
        row = self._db.row(sa.select(RUNS.c.inventory).where(RUNS.c.server_id == server_id, RUNS.c.boot_id.is_not(None)).order_by(RUNS.c.id.desc()))
        return dict(row["inventory"]) if row and row["inventory"] else None

    def list_runs(self, *, batch_id: str | None = None, live: bool | None = None, project_id: str | None = None) -> list[RunRow]:
        query = sa.select(RUNS).order_by(RUNS.c.id)
        if batch_id is not None:
            query = query.where(RUNS.c.batch_id == batch_id)
        if project_id is not None:
            query = query.where(RUNS.c.project_id == project_id)
        if live is not None:
            query = query.where(RUNS.c.ended_at.is_(None) if live else RUNS.c.ended_at.is_not(None))
        return [rows.run(r) for r in self._db.rows(query)]

    def list_batches(self, project_id: str, *, limit: int = 100) -> list[Batch]:
        """Newest first."""
        query = sa.select(BATCHES).where(BATCHES.c.project_id == project_id).order_by(BATCHES.c.id.desc()).limit(limit)
        return [rows.batch(r) for r in self._db.rows(query)]

    def find_batch(self, project_id: str, batch_id: str) -> Batch | None:
        row = self._db.row(sa.select(BATCHES).where(BATCHES.c.project_id == project_id, BATCHES.c.id == batch_id))
        return rows.batch(row) if row else None

    def record_step(self, run_id: str, step: Step, **data: Any) -> None:
        """The run is in this step. Repeatable: a step already recorded is not recorded again."""
        with self._db.write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            if row.step == step.value and row.started_at is not None and not data:
                return
            values: dict[str, Any] = {"step": step.value} | ({} if row.started_at else {"started_at": self._db.now()})
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(**values))
            self._run_event(conn, "run.step", row, step=step.value, **data)

    def record_note(self, run_id: str, type_: str, **data: Any) -> None:
        """An event of this run that changes nothing."""
        with self._db.write() as conn:
            self._run_event(conn, type_, conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one(), **data)

    def _run_event(self, conn: sa.Connection, type_: str, row: Any, **data: Any) -> None:
        self._db.event(conn, type_, row.project_id, batch_id=row.batch_id, run_id=row.id, server_id=row.server_id, **data)

    def record_hello(self, run_id: str, boot_id: str, inventory: dict[str, Any]) -> bool:
        """The agent of this boot is known. False for any other boot (the token is spent), or once the run is closing."""
        open_ = sa.and_(RUNS.c.id == run_id, RUNS.c.closed_at.is_(None), RUNS.c.crossed_at.is_(None))
        with self._db.write() as conn:
            same_boot = sa.or_(RUNS.c.boot_id.is_(None), RUNS.c.boot_id == boot_id)
            values = {
                "boot_id": boot_id,
                "inventory": inventory,
                "seen_at": self._db.now(),
                "ready_at": sa.func.coalesce(RUNS.c.ready_at, sa.literal(self._db.now(), RUNS.c.ready_at.type)),
            }
            if conn.execute(sa.update(RUNS).where(open_, same_boot).values(**values)).rowcount == 0:
                return False
            self._db.tell(conn, run_id, "agent-ready", {})
            return True

    def record_seen(self, run: RunRow) -> None:
        """The agent asked again; written down every ten seconds, not at each of its polls."""
        if run.seen_at is None or (self._db.now() - run.seen_at).total_seconds() > 10:
            with self._db.write() as conn:
                conn.execute(sa.update(RUNS).where(RUNS.c.id == run.id).values(seen_at=self._db.now()))

    def record_plan(self, run_id: str, plan: dict[str, Any]) -> None:
        with self._db.write() as conn:
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
        with self._db.write() as conn:
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id, RUNS.c.closed_at.is_(None)).values(closed_at=self._db.now()))
            return conn.execute(sa.select(RUNS.c.crossed_at).where(RUNS.c.id == run_id)).scalar_one() is None

    def record_crossing(self, run_id: str, plan_id: str) -> bool:
        """THE LINE. True when this run may write, now or already before (an answer may have been lost)."""
        now = self._db.now()
        with self._db.write() as conn:
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
            RUNS.c.deadline_at > self._db.now(),
        )
        with self._db.write() as conn:
            values = {"progress": progress, "seen_at": self._db.now()}
            return conn.execute(sa.update(RUNS).where(live).values(**values)).rowcount == 1

    def record_report(self, run_id: str, report: dict[str, Any]) -> bool:
        """How the write ended; the first report stands."""
        with self._db.write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            if row.report is not None or row.ended_at is not None:
                return row.report is not None
            good = report.get("verified") and not report.get("error") and row.crossed_at and not row.closed_at
            verified = self._db.now() if good else None
            first = sa.and_(RUNS.c.id == run_id, RUNS.c.report.is_(None), RUNS.c.closed_at.is_(None) if good else sa.true())
            if conn.execute(sa.update(RUNS).where(first).values(report=report, verified_at=verified, seen_at=self._db.now())).rowcount == 0:
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
            self._db.tell(conn, run_id, "written", {} if verified else {"error": failure})
            return True

    def record_proof(self, run_id: str, proof: dict[str, Any]) -> None:
        with self._db.write() as conn:
            row = conn.execute(sa.select(RUNS).where(RUNS.c.id == run_id)).one()
            conn.execute(sa.update(RUNS).where(RUNS.c.id == run_id, RUNS.c.proof.is_(None)).values(proof=proof))
            self._run_event(conn, "run.proof", row, root_disk_serial=proof.get("root_disk_serial"), boot_id=proof.get("boot_id"))
            if row.ended_at is None:
                self._db.tell(conn, run_id, "proof", {})

    def tell_silence(self, run_id: str) -> None:
        """The agent's lease ran out long ago: the workflow is told once."""
        with self._db.write() as conn:
            self._db.tell(conn, run_id, "written", {"error": RepaveError("agent-silent").as_json()})

    def record_ending(self, run_id: str, ending: Ending, error: dict[str, Any] | None) -> bool:
        """The run and its instance are at their end; the batch too when it was the last. The first ending stands. Repeatable."""
        now = self._db.now()
        with self._db.write() as conn:
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
                    self._db.event(conn, "batch.ended", row.project_id, batch_id=row.batch_id)
            return True

    def is_closed(self, run_id: str) -> bool:
        """A rollback has begun, or the run ended: nobody crosses any more."""
        row = self._db.row(sa.select(RUNS.c.closed_at, RUNS.c.ended_at).where(RUNS.c.id == run_id))
        return row is None or row["closed_at"] is not None or row["ended_at"] is not None

    def is_latest_run(self, run: RunRow) -> bool:
        row = self._db.row(sa.select(SERVERS.c.epoch).where(SERVERS.c.id == run.server_id))
        return row is not None and row["epoch"] == run.epoch


def _row(run: NewRun, batch: Batch, epoch: int, now: datetime) -> dict[str, Any]:
    return {
        "id": run.id, "batch_id": batch.id, "project_id": batch.project_id, "instance_id": run.instance.id, "server_id": run.server.id,
        "image_id": run.image_id, "epoch": epoch, "found_state": run.instance.state.value, "found_image_id": run.instance.image_id,
        "step": Step.PREFLIGHT.value, "created_at": now, "deadline_at": run.deadline_at, "ssh_keys": list(run.ssh_keys),
        "secret_sealed": run.secret_sealed, "token_sha256": run.token_sha256, "session_sha256": run.session_sha256,
        "nonce_sha256": run.nonce_sha256,
    }  # fmt: skip


def _untouched(ending: Ending, *, crossed: bool) -> str:
    """What is true of the disks at this ending: the line decides, not the kind of error."""
    if not crossed:
        return "the root disk was not written"
    return "data disks; the image on the root disk is verified" if ending is Ending.UNPROVED else "data disks; the root disk is erased"
