"""Batches and runs: admission in one transaction, and the facts of a run, each compare-and-set where it must not be overtaken."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from repave.domain.model import Batch, Instance, RunRow, Server, Step
from repave.domain.states import GOOD_ENDINGS, Ending, next_situation
from repave.domain.timing import ALIKE_NEWEST, MOVED_S, REAP_GRACE_S, is_late, usual_durations
from repave.errors import RepaveError, RequestError, RunFailed
from repave.secrets import fingerprint
from repave.store import rows
from repave.store.access import keep_answers
from repave.store.database import Database, page_of
from repave.store.endings import ASIDE, close_for, end_run, go_on
from repave.store.images import doubt_image
from repave.store.tables import BATCHES, EVENTS, INSTANCES, RUNS, SERVERS

# Made once: see database.py.
_BY_ID = sa.select(RUNS).where(RUNS.c.id == sa.bindparam("run_id"))
_BY_TOKEN = sa.select(RUNS).where(RUNS.c.token_sha256 == sa.bindparam("sha256"))
_BY_SESSION = sa.select(RUNS).where(RUNS.c.session_sha256 == sa.bindparam("sha256"))
_BY_NONCE = _BY_ID.where(RUNS.c.nonce_sha256 == sa.bindparam("sha256"))
_SECRET = sa.select(RUNS.c.secret_sealed).where(RUNS.c.id == sa.bindparam("run_id"))
_CLOSING = sa.select(RUNS.c.closed_at, RUNS.c.ended_at).where(RUNS.c.id == sa.bindparam("run_id"))
_INVENTORY = sa.select(RUNS.c.inventory).where(RUNS.c.server_id == sa.bindparam("server_id"), RUNS.c.boot_id.is_not(None)).order_by(RUNS.c.id.desc()).limit(1)
_LAST_WRITE = (
    sa.select(RUNS.c.plan, RUNS.c.verified_at)
    .where(RUNS.c.server_id == sa.bindparam("server_id"), RUNS.c.crossed_at.is_not(None))
    .order_by(RUNS.c.id.desc())
    .limit(1)
)
_EPOCH = sa.select(SERVERS.c.epoch).where(SERVERS.c.id == sa.bindparam("server_id"))
_CHANGE = sa.update(RUNS).where(RUNS.c.id == sa.bindparam("run_id"))
_CHANGE_WRITING = _CHANGE.where(RUNS.c.crossed_at.is_not(None), RUNS.c.closed_at.is_(None), RUNS.c.ended_at.is_(None), RUNS.c.deadline_at > sa.bindparam("now"))
_HELLO = _CHANGE.where(RUNS.c.closed_at.is_(None), sa.or_(RUNS.c.boot_id.is_(None), RUNS.c.boot_id == sa.bindparam("boot"))).values(
    ready_at=sa.func.coalesce(RUNS.c.ready_at, sa.bindparam("now", type_=RUNS.c.ready_at.type))
)
_PLAN = _CHANGE.where(RUNS.c.crossed_at.is_(None))
_CLOSE = _CHANGE.where(RUNS.c.closed_at.is_(None))
_CROSSED_AT = sa.select(RUNS.c.crossed_at).where(RUNS.c.id == sa.bindparam("run_id"))
_CROSS = _CHANGE.where(RUNS.c.closed_at.is_(None), RUNS.c.ended_at.is_(None), RUNS.c.report.is_(None), RUNS.c.rehearse.is_(False))
_REPORT = _CHANGE.where(RUNS.c.report.is_(None))
_REPORT_GOOD = _REPORT.where(RUNS.c.closed_at.is_(None))
_PROOF = _CHANGE.where(RUNS.c.proof.is_(None))
_MODELS = sa.select(SERVERS.c.id, SERVERS.c.model)
_STEPS = (
    sa.select(EVENTS.c.at, EVENTS.c.data)
    .where(EVENTS.c.batch_id == sa.bindparam("batch"), EVENTS.c.run_id == sa.bindparam("run"), EVENTS.c.type == "run.step")
    .order_by(EVENTS.c.seq)
)
_OCCUPY = (
    sa.update(INSTANCES)
    .where(INSTANCES.c.id.in_(sa.bindparam("instance_ids", expanding=True)), INSTANCES.c.state == sa.bindparam("from_state"))
    .returning(INSTANCES.c.id)
)
_NEXT_EPOCH = (
    sa.update(SERVERS)
    .where(SERVERS.c.id.in_(sa.bindparam("server_ids", expanding=True)), SERVERS.c.locked_at.is_(None))
    .values(epoch=SERVERS.c.epoch + 1)
    .returning(SERVERS.c.id, SERVERS.c.epoch)
)
_NEW_BATCH, _NEW_RUN = sa.insert(BATCHES), sa.insert(RUNS)
_PROGRESS = sa.select(RUNS.c.progress, RUNS.c.deadline_at).where(RUNS.c.id == sa.bindparam("run_id"))
_OVERDUE = sa.select(RUNS).where(
    RUNS.c.ended_at.is_(None),
    sa.or_(
        sa.and_(RUNS.c.released_at.is_not(None), RUNS.c.deadline_at < sa.bindparam("lost")),
        sa.and_(RUNS.c.released_at.is_(None), RUNS.c.deadline_at < sa.bindparam("now")),
    ),
)
_OVERDUE_ONE = _OVERDUE.where(RUNS.c.id == sa.bindparam("run_id"))
_DURATIONS = (
    sa.select(RUNS.c.durations_s)
    .join(SERVERS, SERVERS.c.id == RUNS.c.server_id)
    .where(RUNS.c.outcome == Ending.PROVED.value, RUNS.c.durations_s.is_not(None), SERVERS.c.model == sa.bindparam("model"))
    .order_by(RUNS.c.id.desc())
    .limit(sa.bindparam("count"))
)
_ALIKE = (
    sa.select(RUNS.c.durations_s)
    .join(SERVERS, SERVERS.c.id == RUNS.c.server_id)
    .where(
        RUNS.c.outcome.in_((Ending.PROVED.value, Ending.LATE_PROOF.value)), RUNS.c.durations_s.is_not(None),
        SERVERS.c.model == sa.bindparam("model"), SERVERS.c.boot == sa.bindparam("boot"),
    )
    .order_by(RUNS.c.id.desc())
    .limit(ALIKE_NEWEST)
)  # fmt: skip
_ALIKE_IN_IMAGE = _ALIKE.where(RUNS.c.image_id == sa.bindparam("image"))
_LAST_OUTCOME = sa.select(RUNS.c.outcome).where(RUNS.c.server_id == sa.bindparam("server_id"), RUNS.c.ended_at.is_not(None)).order_by(RUNS.c.id.desc()).limit(1)

# What api/batch_views.py calls them.
_ENDED, _SET_ASIDE = RUNS.c.ended_at.is_not(None), RUNS.c.error["class"].as_string().in_(ASIDE)
_CANCELLED = sa.and_(_ENDED, RUNS.c.outcome == Ending.RETURNED.value, RUNS.c.error.is_not(None), _SET_ASIDE)
RUN_STATES: dict[str, sa.ColumnElement[bool]] = {
    "waiting": sa.and_(RUNS.c.ended_at.is_(None), RUNS.c.started_at.is_(None)),
    "working": sa.and_(RUNS.c.ended_at.is_(None), RUNS.c.started_at.is_not(None)),
    "running": sa.and_(_ENDED, RUNS.c.outcome.in_((Ending.PROVED.value, Ending.LATE_PROOF.value))),
    "rehearsed": sa.and_(_ENDED, RUNS.c.outcome == Ending.REHEARSED.value),
    "cancelled": _CANCELLED,
    "failed": sa.and_(_ENDED, RUNS.c.outcome.not_in([e.value for e in GOOD_ENDINGS]), sa.not_(sa.func.coalesce(_CANCELLED, sa.false()))),
}


@dataclass(frozen=True)
class NewRun:
    """One run about to be stored. `secret_sealed` holds the password's hash (Windows: the password) and the user data."""

    id: str
    instance: Instance
    server: Server
    image_id: str
    deadline_at: datetime  # it must have begun by then; from its begin on it has `timeout_s`
    timeout_s: float
    secret_sealed: str
    token_sha256: str
    session_sha256: str
    nonce_sha256: str
    ssh_keys: tuple[str, ...] = ()
    hostname: str | None = None  # None = the instance's name


class Runs:
    """What was asked and what happened so far."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def accept_batch(self, batch: Batch, runs: Sequence[NewRun], *, answer_keys: Mapping[str, str], answer: dict[str, Any]) -> None:
        """Batch, runs, states, audit rows, the stored answers and the queued workflows of those that may begin now: all or none.

        Raises RequestError key-used where one of the keys has an answer already.
        Raises RequestError in-progress, naming the ids, where an instance is no longer in the state it was found in; locked, where a server is.
        """
        now = self._db.now()
        with self._db.write() as conn:
            keep_answers(conn, answer_keys, answer, now)
            conn.execute(_NEW_BATCH, asdict(batch))
            self._occupy(conn, [run.instance for run in runs])
            epochs = {r.id: r.epoch for r in conn.execute(_NEXT_EPOCH, {"server_ids": [run.server.id for run in runs]})}
            if locked := [run.server.id for run in runs if run.server.id not in epochs]:
                raise RequestError("locked", "", kind="server", ids=locked)
            conn.execute(_NEW_RUN, [_row(run, batch, epochs[run.server.id], now) | {"number": n} for n, run in enumerate(runs, 1)])
            about = {"batch_id": batch.id, "actor": batch.created_by}
            self._db.write_events(conn, "run.accepted", batch.project_id, [about | {"run_id": run.id, "server_id": run.server.id} for run in runs])
            go_on(self._db, conn)

    def _occupy(self, conn: sa.Connection, instances: Sequence[Instance]) -> None:
        """All of them are `pending`, by compare-and-set of the state each was found in. Raises RequestError in-progress, naming the others."""
        taken: set[str] = set()
        for state in {i.state for i in instances}:
            after = next_situation(state, Ending.ACCEPTED)
            assert after.operation is not None
            values = {"state": after.state.value, "operation_state": after.operation.value, "updated_at": self._db.now(), "error": None}
            found = {"instance_ids": [i.id for i in instances if i.state is state], "from_state": state.value}
            taken |= set(conn.execute(_OCCUPY, found | values).scalars())
        if late := [i.id for i in instances if i.id not in taken]:
            raise RequestError("in-progress", "", kind="state", ids=late)

    def get_run(self, run_id: str) -> RunRow:
        run = self.find_run(run_id)
        if run is None:
            raise RequestError("not-found", "There is no such run.", kind="run")
        return run

    def find_run(self, run_id: str) -> RunRow | None:
        row = self._db.row(_BY_ID, run_id=run_id)
        return rows.run(row) if row else None

    def find_run_by_token(self, token: str) -> RunRow | None:
        row = self._db.row(_BY_TOKEN, sha256=fingerprint(token))
        return rows.run(row) if row else None

    def find_run_by_session(self, token: str) -> RunRow | None:
        row = self._db.row(_BY_SESSION, sha256=fingerprint(token))
        return rows.run(row) if row else None

    def find_run_by_nonce(self, run_id: str, nonce: str) -> RunRow | None:
        row = self._db.row(_BY_NONCE, run_id=run_id, sha256=fingerprint(nonce))
        return rows.run(row) if row else None

    def get_run_secret(self, run_id: str) -> dict[str, str]:
        """`password` (Linux: its hash) and `user_data`. Raises RunFailed password-gone once the run's key is destroyed."""
        row = self._db.row(_SECRET, run_id=run_id)
        secret: dict[str, str] = json.loads(self._db.sealer.unseal_for_run(run_id, row["secret_sealed"] if row else ""))
        return secret

    def list_run_secrets(self, run_id: str) -> list[str]:
        """What must not be shown of this run anywhere. Empty once its key is destroyed: none of it opens anything then."""
        try:
            secret = self.get_run_secret(run_id)
            tokens = [self._db.sealer.derive_for_run(run_id, purpose) for purpose in ("agent", "session", "media", "nonce")]
        except RunFailed:
            return []
        return [*tokens, secret["password"], *(line.strip() for line in secret["user_data"].splitlines() if len(line.strip()) >= 12)]

    def find_inventory(self, server_id: str) -> dict[str, Any] | None:
        """What the ramdisk saw of this server when it last was there."""
        row = self._db.row(_INVENTORY, server_id=server_id)
        return dict(row["inventory"]) if row and row["inventory"] else None

    def find_unfinished_write(self, server_id: str) -> dict[str, Any] | None:
        """The plan of this server's last write where that did not end well: a disk that was verified has a table of its own, and may have had others since."""
        row = self._db.row(_LAST_WRITE, server_id=server_id)
        return dict(row["plan"]) if row and row["verified_at"] is None else None

    def list_runs(self, *, batch_id: str | None = None, live: bool | None = None, project_id: str | None = None) -> list[RunRow]:
        given = {name: value for name, value in (("batch", batch_id), ("project", project_id)) if value is not None}
        return [rows.run(r) for r in self._db.rows(_select_runs("batch" in given, "project" in given, live), **given)]

    def list_newest_of(self, server_id: str, *, limit: int) -> list[RunRow]:
        """The runs of this server, newest first."""
        query = sa.select(RUNS).where(RUNS.c.server_id == server_id).order_by(RUNS.c.id.desc()).limit(limit)
        return [rows.run(r) for r in self._db.rows(query)]

    def find_last_word(self, project_id: str) -> datetime | None:
        """When the agent of a live run of this project was last heard."""
        row = self._db.row(
            sa.select(sa.func.max(RUNS.c.seen_at, type_=RUNS.c.seen_at.type).label("at")).where(RUNS.c.project_id == project_id, RUNS.c.ended_at.is_(None))
        )
        return row["at"] if row else None

    def page_runs(
        self, project_id: str, *, state: str | None = None, server_id: str | None = None, batch_id: str | None = None, after: str | None = None,
        limit: int | None = None,
    ) -> list[RunRow]:  # fmt: skip
        """Newest first; `state`: one of RUN_STATES."""
        query = sa.select(RUNS).where(RUNS.c.project_id == project_id)
        for column, value in ((RUNS.c.server_id, server_id), (RUNS.c.batch_id, batch_id)):
            query = query if value is None else query.where(column == value)
        if state is not None:
            query = query.where(RUN_STATES[state])
        return [rows.run(r) for r in self._db.rows(page_of(query, RUNS.c.id, after, limit, newest_first=True))]

    def list_batches(self, project_id: str, *, after: str | None = None, limit: int | None = 100) -> list[Batch]:
        """Newest first."""
        query = sa.select(BATCHES).where(BATCHES.c.project_id == project_id)
        return [rows.batch(r) for r in self._db.rows(page_of(query, BATCHES.c.id, after, limit, newest_first=True))]

    def find_batch(self, project_id: str, batch_id: str) -> Batch | None:
        row = self._db.row(sa.select(BATCHES).where(BATCHES.c.project_id == project_id, BATCHES.c.id == batch_id))
        return rows.batch(row) if row else None

    def record_step(self, run_id: str, step: Step, **data: Any) -> None:
        """The run is in this step. Repeatable: a step already recorded is not recorded again."""
        with self._db.write() as conn:
            row = conn.execute(_BY_ID, {"run_id": run_id}).one()
            if row.step == step.value and row.started_at is not None and not data:
                return
            values: dict[str, Any] = {"step": step.value} | ({} if row.started_at else {"started_at": self._db.now()})
            conn.execute(_CHANGE, {"run_id": run_id, **values})
            self._run_event(conn, "run.step", row, step=step.value, **data)

    def record_note(self, run_id: str, type_: str, **data: Any) -> None:
        """An event of this run that changes nothing."""
        with self._db.write() as conn:
            self._run_event(conn, type_, conn.execute(_BY_ID, {"run_id": run_id}).one(), **data)

    def _run_event(self, conn: sa.Connection, type_: str, row: Any, **data: Any) -> None:
        self._db.event(conn, type_, row.project_id, batch_id=row.batch_id, run_id=row.id, server_id=row.server_id, **data)

    def record_hello(self, run_id: str, boot_id: str, inventory: dict[str, Any]) -> bool:
        """The agent of this boot is known, also started again. False for any other boot (the token is spent), or once the run is closing."""
        with self._db.write() as conn:
            now = self._db.now()
            values = {"boot_id": boot_id, "inventory": inventory, "seen_at": now}
            if conn.execute(_HELLO, {"run_id": run_id, "boot": boot_id, "now": now} | values).rowcount == 0:
                return False
            self._db.tell(conn, run_id, "agent-ready", {})
            return True

    def record_second_boot(self, run_id: str, inventory: dict[str, Any]) -> None:
        """Another boot than the one we know showed the run's token: an event says which, and before the line the run goes back."""
        with self._db.write() as conn:
            row = conn.execute(_BY_ID, {"run_id": run_id}).one()
            if row.closed_at is None and row.boot_id not in (None, inventory["boot_id"]):
                self._run_event(conn, "run.second-agent", row, serial=inventory["serial"], uuid=inventory["uuid"], macs=inventory["macs"])
                close_for(self._db, conn, run_id, RepaveError("second-agent").as_json())

    def record_seen(self, run: RunRow) -> None:
        """The agent asked again; written down every ten seconds, not at each of its polls."""
        if run.seen_at is None or (self._db.now() - run.seen_at).total_seconds() > 10:
            with self._db.write() as conn:
                conn.execute(_CHANGE, {"run_id": run.id, "seen_at": self._db.now()})

    def record_plan(self, run_id: str, plan: dict[str, Any]) -> None:
        with self._db.write() as conn:
            conn.execute(_PLAN, {"run_id": run_id, "plan": plan})
            row = conn.execute(_BY_ID, {"run_id": run_id}).one()
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
            conn.execute(_CLOSE, {"run_id": run_id, "closed_at": self._db.now()})
            return conn.execute(_CROSSED_AT, {"run_id": run_id}).scalar_one() is None

    def record_crossing(self, run_id: str, plan_id: str) -> bool:
        """THE LINE. True when this run may write, now or already before (an answer may have been lost)."""
        now = self._db.now()
        with self._db.write() as conn:
            row = conn.execute(_BY_ID, {"run_id": run_id}).one()
            if not row.plan or row.plan["plan_id"] != plan_id or now > row.deadline_at:
                return False
            # Decided by the update itself, so that it holds on every database: a return or a cancel that committed first wins; a rehearsal never crosses.
            values = {"crossed_at": row.crossed_at or now, "seen_at": now, "step": Step.WRITE_IMAGE.value}
            if conn.execute(_CROSS, {"run_id": run_id} | values).rowcount == 0:
                return False
            if row.crossed_at is None:
                self._run_event(conn, "run.crossed", row, plan_id=plan_id, **_kept(row.plan))
            return True

    def record_progress(self, run_id: str, progress: dict[str, Any]) -> bool:
        """The lease is renewed. False: stop writing. A write that has moved since the last word has its deadline put off; one that stands still has not."""
        with self._db.write() as conn:
            now, row = self._db.now(), conn.execute(_PROGRESS, {"run_id": run_id}).one()
            deadline_at = max(row.deadline_at, now + timedelta(seconds=MOVED_S)) if progress != row.progress else row.deadline_at
            values = {"progress": progress, "seen_at": now, "deadline_at": deadline_at}
            return conn.execute(_CHANGE_WRITING, {"run_id": run_id, "now": now} | values).rowcount == 1

    def record_report(self, run_id: str, report: dict[str, Any]) -> bool:
        """How the write ended; the first report stands."""
        with self._db.write() as conn:
            row = conn.execute(_BY_ID, {"run_id": run_id}).one()
            if row.report is not None or row.ended_at is not None:
                return row.report is not None
            good = report.get("verified") and not report.get("error") and row.crossed_at and not row.closed_at
            rehearsed = row.rehearse and bool(report.get("rehearsal")) and not report.get("error")
            verified = self._db.now() if good else None
            values = {"report": report, "verified_at": verified, "seen_at": self._db.now()}
            if conn.execute(_REPORT_GOOD if good else _REPORT, {"run_id": run_id} | values).rowcount == 0:
                return False
            self._run_event(
                conn,
                "run.report",
                row,
                verified=bool(verified),
                stages_s=report.get("stages_s") or {},
                error=report.get("error"),
            )
            failure = report.get("error") or RepaveError("agent-failed").as_json()
            if failure["class"] == "image-damaged":
                doubt_image(self._db, conn, row.image_id, failure["cause"])
            self._db.tell(conn, run_id, "written", {"rehearsed": True} if rehearsed else {} if verified else {"error": failure})
            return True

    def record_proof(self, run_id: str, proof: dict[str, Any]) -> None:
        with self._db.write() as conn:
            row = conn.execute(_BY_ID, {"run_id": run_id}).one()
            conn.execute(_PROOF, {"run_id": run_id, "proof": proof})
            self._run_event(conn, "run.proof", row, root_disk_serial=proof.get("root_disk_serial"), boot_id=proof.get("boot_id"))
            if row.ended_at is None:
                self._db.tell(conn, run_id, "proof", {})

    def tell_silence(self, run: RunRow) -> None:
        """The agent's lease ran out long ago: the workflow is told once, and stops or returns the server."""
        self._stop(run, RepaveError("agent-silent"))

    def tell_overdue(self, run: RunRow) -> None:
        """Its time is over, whatever it does, or before the line that for going on: the workflow is told once, and stops or returns the server."""
        missed = "The image was not written by the run's deadline." if run.past_the_line else "The line was not reached while there was time for the way back."
        self._stop(run, RepaveError("deadline", missed))

    def _stop(self, run: RunRow, error: RepaveError) -> None:
        """Against a crossing whoever commits first wins: one that came after we looked goes on."""
        with self._db.write() as conn:
            if run.past_the_line:
                self._db.tell(conn, run.id, "written", {"error": error.as_json()})
            else:
                close_for(self._db, conn, run.id, error.as_json())

    def record_ending(self, run_id: str, ending: Ending, error: dict[str, Any] | None) -> bool:
        """The run and its instance are at their end, the batch too when it was the last; what waited for it begins. The first ending stands. Repeatable."""
        with self._db.write() as conn:
            if not end_run(self._db, conn, run_id, ending, error):
                return False
            also_ended = go_on(self._db, conn)
        for other in also_ended:
            self._db.sealer.destroy_run(other)
        return True

    def list_overdue(self) -> list[str]:
        """Runs whose deadline passed and whose workflow did not end them, and waiting runs that did not begin in time."""
        return [r["id"] for r in self._db.rows(_OVERDUE, **self._overdue_now())]

    def reap(self, run_id: str) -> bool:
        """An overdue run is at its end, in a transaction of its own: `let_begin` when all are. False where it is not overdue any more.

        It asks nobody: a workflow that hangs, or none at all, makes no difference. What it left is told by the ending; its later steps are refused.
        """
        with self._db.write() as conn:
            row = conn.execute(_OVERDUE_ONE, {"run_id": run_id} | self._overdue_now()).first()
            if row is None:
                return False
            ending, cause = _overdue(row)
            if not end_run(self._db, conn, run_id, ending, RepaveError("deadline", cause).as_json()):
                return False
        self._db.sealer.destroy_run(run_id)
        return True

    def let_begin(self) -> None:
        """Batches past their limit are stopped, and what waits begins as its rules allow. Repeatable."""
        with self._db.write() as conn:
            ended = go_on(self._db, conn)
        for run_id in ended:
            self._db.sealer.destroy_run(run_id)

    def _overdue_now(self) -> dict[str, datetime]:
        now = self._db.now()
        return {"lost": now - timedelta(seconds=REAP_GRACE_S), "now": now}

    def list_durations(self, model: str, *, limit: int = 50) -> list[dict[str, float]]:
        """Seconds by step of the newest proved runs on servers of this model."""
        return [dict(r["durations_s"]) for r in self._db.rows(_DURATIONS, model=model, count=limit)]

    def list_seconds_alike(self, server: Server, step: Step, *, image_id: str | None = None) -> list[float]:
        """Seconds in this step of the newest runs with a proved end on servers of this model and firmware, and of this image where one is given.

        Empty for a model that is not known, and for a server whose last run did not end well: its next one waits as long as the setting allows, so
        that a model which has become slower for good teaches us that.
        """
        last = self._db.row(_LAST_OUTCOME, server_id=server.id)
        if not server.model or (last is not None and last["outcome"] not in GOOD_ENDINGS):
            return []
        given = {"model": server.model, "boot": server.boot}
        found = self._db.rows(_ALIKE, **given) if image_id is None else self._db.rows(_ALIKE_IN_IMAGE, **given, image=image_id)
        return [row["durations_s"][step.value] for row in found if step.value in row["durations_s"]]

    def tell_late(self, waits_s: Mapping[Step, float]) -> None:
        """An event `run.late`, once a step, for each run whose step takes much longer than its model's usual. It changes nothing else.

        Where nothing is usual yet, half of what a step may take is late: of its wait in `waits_s`, else of the run's time. Not of a write, which has its pace.
        """
        now = self._db.now()
        models = {r["id"]: r["model"] for r in self._db.rows(_MODELS)}
        usual: dict[str, dict[str, float]] = {}
        for run in self.list_runs(live=True):
            if run.started_at is None or run.late_step == run.step.value:
                continue
            model = models.get(run.server_id, "")
            if model not in usual:
                usual[model] = usual_durations(self.list_durations(model))
            usual_s = usual[model].get(run.step.value)
            late_s = waits_s.get(run.step, (run.deadline_at - run.started_at).total_seconds()) / 2
            if usual_s is None and (run.step is Step.WRITE_IMAGE or (now - run.started_at).total_seconds() < late_s):
                continue
            seconds = (now - self._step_began(run)).total_seconds()
            if is_late(seconds, usual_s) if usual_s is not None else seconds > late_s:
                self._record_late(run, seconds, usual_s)

    def _step_began(self, run: RunRow) -> datetime:
        if run.step is Step.WRITE_IMAGE and run.crossed_at:
            return run.crossed_at
        at = [r["at"] for r in self._db.rows(_STEPS, batch=run.batch_id, run=run.id) if r["data"]["step"] == run.step.value]
        return at[0] if at else run.created_at

    def _record_late(self, run: RunRow, seconds: float, usual_s: float | None) -> None:
        still = sa.and_(RUNS.c.id == run.id, RUNS.c.step == run.step.value, RUNS.c.ended_at.is_(None), RUNS.c.late_step.is_distinct_from(run.step.value))
        with self._db.write() as conn:
            row = conn.execute(sa.update(RUNS).where(still).values(late_step=run.step.value).returning(*RUNS.c)).first()
            if row is not None:
                self._run_event(conn, "run.late", row, step=run.step.value, seconds=round(seconds, 1), usual_s=usual_s)

    def is_closed(self, run_id: str) -> bool:
        """A rollback has begun, or the run ended: nobody crosses any more."""
        row = self._db.row(_CLOSING, run_id=run_id)
        return row is None or row["closed_at"] is not None or row["ended_at"] is not None

    def is_latest_run(self, run: RunRow) -> bool:
        row = self._db.row(_EPOCH, server_id=run.server_id)
        return row is not None and row["epoch"] == run.epoch


@functools.cache
def _select_runs(by_batch: bool, by_project: bool, live: bool | None) -> sa.Select[Any]:
    query = sa.select(RUNS).order_by(RUNS.c.id)
    if by_batch:
        query = query.where(RUNS.c.batch_id == sa.bindparam("batch"))
    if by_project:
        query = query.where(RUNS.c.project_id == sa.bindparam("project"))
    return query if live is None else query.where(RUNS.c.ended_at.is_(None) if live else RUNS.c.ended_at.is_not(None))


def _row(run: NewRun, batch: Batch, epoch: int, now: datetime) -> dict[str, Any]:
    return {
        "id": run.id, "batch_id": batch.id, "project_id": batch.project_id, "instance_id": run.instance.id, "server_id": run.server.id,
        "image_id": run.image_id, "epoch": epoch, "found_state": run.instance.state.value, "found_image_id": run.instance.image_id,
        "step": Step.PREFLIGHT.value, "created_at": now, "deadline_at": run.deadline_at, "ssh_keys": list(run.ssh_keys),
        "secret_sealed": run.secret_sealed, "token_sha256": run.token_sha256, "session_sha256": run.session_sha256,
        "nonce_sha256": run.nonce_sha256, "rehearse": batch.rehearse, "timeout_s": run.timeout_s, "found_error": run.instance.error,
        "hostname": run.hostname,
    }  # fmt: skip


def _overdue(row: Any) -> tuple[Ending, str]:
    """How a run ends whose time is over: by the side of the line it is on. What its server does now nobody knows."""
    if row.released_at is None:
        return Ending.RETURNED, "not started: it waited too long."
    late = "The run's deadline passed and its workflow did not end it."
    if row.crossed_at is None:
        return Ending.RETURN_FAILED, f"{late} Its disk was not written; look at its power."
    return (Ending.UNPROVED if row.verified_at else Ending.WRITE_FAILED), late


def _kept(plan: dict[str, Any]) -> dict[str, Any]:
    """The partitions that a write is to keep: from now on the disk's own table does not tell of them."""
    return {"keep": plan["keep"]} if "keep" in plan else {}
