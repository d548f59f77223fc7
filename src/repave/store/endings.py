"""How runs begin and end: an ending moves run, instance and batch, and lets the batch stop or the next waiting runs begin, in one transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from repave.domain.model import Instance, InstanceState, Step
from repave.domain.states import GOOD_ENDINGS, Ending, next_situation
from repave.domain.timing import step_durations
from repave.domain.waves import Limits, Phase, Place, Standing, Waves, find_stop_reason, judge_waiting
from repave.errors import RequestError
from repave.store import rows
from repave.store.database import Database
from repave.store.tables import BATCHES, EVENTS, IMAGES, INSTANCES, RUNS, SERVERS

ASIDE = ("cancelled", "batch-stopped")
_GOOD = tuple(e.value for e in GOOD_ENDINGS)

# Made once: see database.py.
_RUN = sa.select(RUNS).where(RUNS.c.id == sa.bindparam("run_id"))
_CHANGE = sa.update(RUNS).where(RUNS.c.id == sa.bindparam("run_id"))
_INSTANCE = sa.select(INSTANCES).where(INSTANCES.c.id == sa.bindparam("instance_id"))
_MOVE = sa.update(INSTANCES).where(INSTANCES.c.id == sa.bindparam("instance_id"), INSTANCES.c.state == sa.bindparam("from_state"))
_OS_TYPE = sa.select(IMAGES.c.os_type).where(IMAGES.c.id == sa.bindparam("image"))
_END_BATCH = sa.update(BATCHES).where(BATCHES.c.id == sa.bindparam("batch"), BATCHES.c.ended_at.is_(None))
_LIVE = sa.select(RUNS.c.id).where(RUNS.c.batch_id == sa.bindparam("batch"), RUNS.c.ended_at.is_(None)).limit(1)
_STEPS = (
    sa.select(EVENTS)
    .where(EVENTS.c.batch_id == sa.bindparam("batch"), EVENTS.c.run_id == sa.bindparam("run"), EVENTS.c.type.in_(("run.step", "run.crossed")))
    .order_by(EVENTS.c.seq)
)
_WAITING = sa.select(RUNS.c.batch_id).where(RUNS.c.ended_at.is_(None), RUNS.c.released_at.is_(None)).distinct().order_by(RUNS.c.batch_id)
_STOPPABLE = sa.select(BATCHES.c.id).where(
    BATCHES.c.ended_at.is_(None), BATCHES.c.stop_reason.is_(None), sa.or_(BATCHES.c.canary.is_not(None), BATCHES.c.max_failed.is_not(None))
)
_BUSY_RACKS = sa.select(SERVERS.c.rack).join(RUNS, RUNS.c.server_id == SERVERS.c.id).where(RUNS.c.ended_at.is_(None), RUNS.c.released_at.is_not(None))
_PLACES = (
    sa.select(RUNS.c.id, RUNS.c.batch_id, RUNS.c.number, RUNS.c.released_at, RUNS.c.ended_at, RUNS.c.outcome, RUNS.c.error, SERVERS.c.rack)
    .join(SERVERS, SERVERS.c.id == RUNS.c.server_id)
    .where(RUNS.c.batch_id.in_(sa.bindparam("batches", expanding=True)))
)
_BATCHES = sa.select(BATCHES).where(BATCHES.c.id.in_(sa.bindparam("batches", expanding=True))).order_by(BATCHES.c.id)
_THESE: sa.BindParameter[Any] = sa.bindparam("run_ids", expanding=True)
_UNRELEASED = (
    sa.select(RUNS.c.id, RUNS.c.timeout_s)
    .where(RUNS.c.id.in_(_THESE), RUNS.c.released_at.is_(None), RUNS.c.ended_at.is_(None))
    .order_by(RUNS.c.batch_id, RUNS.c.number)
)
_RELEASE = sa.update(RUNS).where(RUNS.c.id.in_(_THESE))


def move_instance(db: Database, conn: sa.Connection, instance: Instance, ending: Ending, found: InstanceState | None, **also: Any) -> bool:
    """Compare-and-set of the instance's state by the table in domain/states.py."""
    after = next_situation(instance.state, ending, found)
    values = {"state": after.state.value, "operation_state": after.operation.value if after.operation else None, "updated_at": db.now()}
    return conn.execute(_MOVE, {"instance_id": instance.id, "from_state": instance.state.value} | values | also).rowcount == 1


def end_run(db: Database, conn: sa.Connection, run_id: str, ending: Ending, error: dict[str, Any] | None) -> bool:
    """The run and its instance are at their end; the batch too when it was the last. The first ending stands."""
    now = db.now()
    row = conn.execute(_RUN, {"run_id": run_id}).one()
    if row.ended_at is not None and not (ending is Ending.LATE_PROOF and row.outcome == Ending.UNPROVED.value):
        return False  # also where the same late proof came twice at once
    instance = rows.instance(conn.execute(_INSTANCE, {"instance_id": row.instance_id}).one()._mapping)
    good = ending in (Ending.PROVED, Ending.LATE_PROOF)
    if ending in GOOD_ENDINGS:
        error = None
    elif error is not None:
        error = error | {"untouched": _untouched(ending, crossed=row.crossed_at is not None)}
    also: dict[str, Any] = {"error": row.found_error if ending is Ending.REHEARSED else error}
    if good:
        also["os_type"] = conn.execute(_OS_TYPE, {"image": row.image_id}).scalar_one()
        also |= {"image_id": row.image_id, "launched_at": now, "ssh_host_keys": (row.proof or {}).get("ssh_host_keys", [])}
    elif row.crossed_at is not None:
        also |= {"image_id": row.image_id if ending is Ending.UNPROVED else None}
    if not move_instance(db, conn, instance, ending, InstanceState(row.found_state), **also):
        return False
    ended_at = row.ended_at or now
    values = {
        "ended_at": ended_at, "closed_at": row.closed_at or now, "outcome": ending.value, "error": error,
        "durations_s": _durations(conn, row, now),  # a late proof's: how long it really took
    }  # fmt: skip
    if good:
        values["step"] = Step.PROOF.value
    conn.execute(_CHANGE, {"run_id": run_id, **values})
    about = {"batch_id": row.batch_id, "run_id": row.id, "server_id": row.server_id}
    db.event(conn, "run.ended", row.project_id, **about, outcome=ending.value, error=error)
    if error is not None and error["class"] == "wrong-server":
        _lock_server(db, conn, row.server_id, f"{error['cause']} Batch {row.batch_id}.")
    if conn.execute(_LIVE, {"batch": row.batch_id}).first() is None and conn.execute(_END_BATCH, {"batch": row.batch_id, "ended_at": now}).rowcount:
        db.event(conn, "batch.ended", row.project_id, batch_id=row.batch_id)
    return True


def _lock_server(db: Database, conn: sa.Connection, server_id: str, reason: str) -> None:
    """What answers there is not the server that we know: nothing is sent to it until an operator has looked. An operator's own lock stays."""
    free = sa.and_(SERVERS.c.id == server_id, SERVERS.c.locked_at.is_(None))
    locked = sa.update(SERVERS).where(free).values(locked_at=db.now(), locked_by="repave", lock_reason=reason).returning(SERVERS.c.project_id)
    if (row := conn.execute(locked).first()) is not None:
        db.event(conn, "server.locked", row.project_id, server_id=server_id, reason=reason)


def _durations(conn: sa.Connection, row: Any, ended_at: Any) -> dict[str, float]:
    begun = [(e.data.get("step", Step.WRITE_IMAGE.value), e.at) for e in conn.execute(_STEPS, {"batch": row.batch_id, "run": row.id})]
    return step_durations(begun, ended_at)


def _untouched(ending: Ending, *, crossed: bool) -> str:
    """What is true of the disks at this ending: the line decides, not the kind of error."""
    if ending is Ending.RESTORED:
        return "not known: the run may have gone on after the backup was made"
    if not crossed:
        return "the root disk was not written"
    return "data disks; the image on the root disk is verified" if ending is Ending.UNPROVED else "data disks; the root disk is erased"


# ---- before the line, from outside ----


def close_for(db: Database, conn: sa.Connection, run_id: str, error: dict[str, Any]) -> bool:
    """Nobody crosses any more, and the run's workflow learns why: at its next step, or at once where it waits. False: crossed, closed or ended.

    It is the same compare-and-set as the return's own (`close_before_line`): against a crossing, whoever commits first wins.
    """
    open_ = sa.and_(RUNS.c.id == run_id, RUNS.c.crossed_at.is_(None), RUNS.c.closed_at.is_(None), RUNS.c.ended_at.is_(None))
    if conn.execute(sa.update(RUNS).where(open_).values(cancel=error, closed_at=db.now())).rowcount == 0:
        return False
    for event in ("agent-ready", "written"):
        db.tell(conn, run_id, event, {"error": error})
    return True


def stop_batch(db: Database, conn: sa.Connection, batch_id: str, reason: str) -> list[str]:
    """Waiting runs of the batch end, those before the line return what they found, those past it go on. Returns the ids of the ended."""
    conn.execute(sa.update(BATCHES).where(BATCHES.c.id == batch_id).values(stop_reason=reason))
    live = conn.execute(sa.select(RUNS).where(RUNS.c.batch_id == batch_id, RUNS.c.ended_at.is_(None)).order_by(RUNS.c.number)).all()
    db.event(conn, "batch.stopped", live[0].project_id if live else "", batch_id=batch_id, reason=reason)
    ended = []
    for row in live:
        if row.released_at is None:
            if end_run(db, conn, row.id, Ending.RETURNED, RequestError("batch-stopped", f"not started: {reason}").as_json()):
                ended.append(row.id)
        else:
            close_for(db, conn, row.id, RequestError("batch-stopped", f"stopped before the line: {reason}").as_json())
    return ended


# ---- waiting ----


def go_on(db: Database, conn: sa.Connection) -> list[str]:
    """Batches past their limit are stopped, and what may begin now is queued. Returns the ids of the runs that ended with a stopped batch."""
    wanted = list(conn.execute(_WAITING).scalars())
    stoppable_ids = list(conn.execute(_STOPPABLE).scalars())
    ended: list[str] = []
    for batch_id, batch in _standings(conn, stoppable_ids).items():
        if reason := find_stop_reason(batch):
            ended += stop_batch(db, conn, batch_id, reason)
    verdicts = why_waiting(conn, wanted, db.limits)
    _release(db, conn, [run_id for run_id, why in verdicts.items() if not why])
    return ended


def why_waiting(conn: sa.Connection, batch_ids: Sequence[str], limits: Limits) -> dict[str, str]:
    """Why each waiting run of these batches waits; "" = it may begin."""
    if not batch_ids:
        return {}
    return judge_waiting(_standings(conn, batch_ids), Counter(conn.execute(_BUSY_RACKS).scalars()), limits)


def _release(db: Database, conn: sa.Connection, run_ids: Sequence[str]) -> None:
    """These runs may begin, each once: their time counts from here, and their workflows are queued with the caller's transaction."""
    now = db.now()
    by_timeout: dict[float, list[Any]] = {}
    for row in conn.execute(_UNRELEASED, {"run_ids": run_ids}) if run_ids else ():
        by_timeout.setdefault(row.timeout_s, []).append(row)
    for timeout_s, found in by_timeout.items():
        values = {"released_at": now, "deadline_at": now + timedelta(seconds=timeout_s)}
        conn.execute(_RELEASE, {"run_ids": [r.id for r in found]} | values)
        db.enqueue(conn, found)


def _standings(conn: sa.Connection, batch_ids: Sequence[str]) -> dict[str, Standing]:
    """By batch, the oldest first."""
    if not batch_ids:
        return {}
    places: dict[str, list[Place]] = {}
    for row in conn.execute(_PLACES, {"batches": batch_ids}):
        places.setdefault(row.batch_id, []).append(Place(row.id, row.batch_id, row.number, row.rack, _phase(row)))
    batches = conn.execute(_BATCHES, {"batches": batch_ids})
    return {b.id: Standing(Waves(b.canary, b.at_once, b.max_failed), b.paused_at is not None, places.get(b.id, [])) for b in batches}


def _phase(row: Any) -> Phase:
    if row.ended_at is None:
        return Phase.WAITING if row.released_at is None else Phase.UNDER_WAY
    if row.outcome in _GOOD:
        return Phase.GOOD
    return Phase.ASIDE if (row.error or {}).get("class") in ASIDE else Phase.BAD
