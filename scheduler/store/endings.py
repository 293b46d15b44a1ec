"""How a job ends: done, cancelled by a person, failed by the scheduler, removed for good.

And how storage is freed: by whoever removes a small job, by the sweeper of the leading dispatcher for all else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from motet.errors import NotFound
from motet.protocol import traces
from motet.states import LIVE, State
from scheduler.store.database import EVENTS, JOB, Asked, notify, together
from scheduler.store.media import release_media
from scheduler.store.schema import spelt
from scheduler.store.words import end, tell

#: Counts of a job that its trace and its event tell.
_COUNTS = ("n_rows", "n_tasks", "cells_ok", "cells_error", "cells_skipped")


def _ending(update: str) -> TextClause:
    """An UPDATE that ends jobs, which writes the event of each end as well: no job ends without it, or twice.

    Whoever delivers events is woken for a tenant that has webhooks: of others it finds them when it looks by itself.
    """
    told = ", ".join(f"'{name}', {name}" for name in _COUNTS)
    return text(f"""
    WITH ended AS ({update} RETURNING id, tenant_id, state, created, finished, notify_when, rows_matched, {", ".join(_COUNTS)}),
    told AS (INSERT INTO outbox (tenant_id, kind, job_id, body)
             SELECT tenant_id, 'job_ended', id, jsonb_build_object('state', state, {told}) ||
                    CASE WHEN notify_when IS NULL THEN '{{}}' ELSE jsonb_build_object('rows_matched', rows_matched) END
               FROM ended)
    SELECT id, state, created, finished, {", ".join(_COUNTS)},
           CASE WHEN EXISTS (SELECT FROM webhook w WHERE w.tenant_id = ended.tenant_id)
                THEN pg_notify('{EVENTS}', '') END
      FROM ended""")


_LOCK = text("SELECT id FROM job WHERE id = :job FOR UPDATE")
#: One UPDATE freezes the counts: what is in no sealed column by now is skipped, and never changes again.
_END = _ending(f"""
    UPDATE job SET state = :state, reason = :reason, finished = clock_timestamp(), version = version + 1,
           cells_ok = past_ok + k.ok, cells_error = past_error + k.error,
           cells_skipped = n_rows * n_tasks - past_ok - k.ok - past_error - k.error
      FROM (SELECT CAST(coalesce(sum(s.n_ok), 0) AS bigint) AS ok, CAST(coalesce(sum(s.n_error), 0) AS bigint) AS error
              FROM block_column b JOIN sealed_column s ON s.id = b.column_id WHERE b.job_id = :job) k
     WHERE id = :job AND state IN {spelt(LIVE)}""")
_DROP_CELLS = text("DELETE FROM cells WHERE job_id = :job")
_CLOSE_SUBTASKS = text("""
    UPDATE subtask SET state = 'lost', closed = clock_timestamp(),
           worker = coalesce((SELECT l.worker FROM lease l WHERE l.subtask_id = subtask.id
                             ORDER BY l.attempt LIMIT 1), worker)
     WHERE job_id = :job AND state = 'open'""")
_DROP_LEASES = text("""
    DELETE FROM lease USING subtask s WHERE lease.subtask_id = s.id AND s.job_id = :job""")
_DROP_PIECES = text("DELETE FROM piece WHERE job_id = :job")
_NOTHING_WAITS = text("UPDATE pass SET rows_waiting = 0, bytes_waiting = 0 WHERE job_id = :job")


def end_job(connection: Connection, job: UUID, state: State, reason: str) -> bool:
    """End an unfinished job; its open sub-tasks close and nothing of it is carved again.

    The row lock on the job serialises this with the aggregator: an outcome is counted before the end or not
    at all. Returns False, and changes nothing, where the job had ended already.
    """
    # First the lock, then a look at what is sealed: an outcome under way is in the counts or comes too late.
    connection.execute(_LOCK, {"job": job})
    ended = connection.execute(_END, {"job": job, "state": state, "reason": reason}).first()
    if ended is None:
        return False
    _trace(ended)
    # Sub-tasks before leases, which know their workers.
    for statement in (_CLOSE_SUBTASKS, _DROP_LEASES, _DROP_PIECES, _DROP_CELLS, _NOTHING_WAITS):
        connection.execute(statement, {"job": job})
    tell(connection, [end(job)])
    notify(connection, JOB, str(job))
    return True


_SUCCEED = _ending(f"""
    UPDATE job SET state = '{State.SUCCEEDED}', finished = clock_timestamp(), version = version + 1
     WHERE id = ANY(:jobs) AND state = '{State.RUNNING}' AND blocks_done = n_blocks
       AND cells_ok + cells_error + cells_skipped = n_rows * n_tasks""")


def succeed(connection: Connection, jobs: Collection[UUID]) -> None:
    """Let those of these jobs succeed, whose locks the caller holds, that run and have every cell."""
    succeeded(together(connection, succeeding(jobs))[0])


def succeeding(jobs: Collection[UUID]) -> Asked:
    """The statement of ``succeed``, for a transaction that has others to execute with it; ``succeeded`` with its rows."""
    return _SUCCEED, {"jobs": sorted(jobs)}


def succeeded(rows: Sequence[Any]) -> None:
    """What follows ``succeeding``."""
    for ended in rows:
        _trace(ended)


def _trace(ended: Any) -> None:
    """The span that all others of a job hang from, once its end is committed."""
    counts = {name: getattr(ended, name) for name in _COUNTS}
    traces.add(ended.id, traces.JOB, ended.created, ended.finished, state=ended.state, **counts)


# -- ending in time --------------------------------------------------------------------------------

_STALE = text(f"""
    SELECT id FROM job WHERE state = '{State.LOADING}' AND touched < clock_timestamp() - make_interval(secs => :silent_s)""")
_OVERDUE = text(f"""
    SELECT id, to_char(deadline AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS at FROM job
     WHERE state IN {spelt(LIVE)} AND deadline < clock_timestamp()""")


def overdue(connection: Connection, silent_s: float) -> dict[UUID, str]:
    """Jobs whose deadline passed, or whose upload fell silent, with the reason they fail for."""
    found: dict[UUID, str] = {}
    for row in connection.execute(_STALE, {"silent_s": silent_s}):
        found[row.id] = f"the upload was abandoned: no part for {silent_s:.0f} s"
    for row in connection.execute(_OVERDUE):
        found[row.id] = f"its deadline passed: {row.at}; what was done by then can be read"
    return found


_MINE = text("SELECT id FROM job WHERE id = :job AND tenant_id = :tenant")


def cancel_job(connection: Connection, tenant: UUID, job: UUID) -> None:
    """End a job; what is answered stays. Harmless where it has ended. Raises NotFound."""
    _must_be_mine(connection, tenant, job)
    end_job(connection, job, State.CANCELLED, "cancelled on request")


def remove_job(connection: Connection, tenant: UUID, job: UUID) -> None:
    """Remove a job and its results for good, ending it first. Raises NotFound."""
    _must_be_mine(connection, tenant, job)
    end_job(connection, job, State.CANCELLED, "deleted on request")
    _remove_from_sight(connection, job)


def _must_be_mine(connection: Connection, tenant: UUID, job: UUID) -> None:
    if connection.execute(_MINE, {"job": job, "tenant": tenant}).first() is None:
        raise NotFound(f"no job {job}")


# -- removing --------------------------------------------------------------------------------------

#: Blocks deleted in one transaction: some tens of milliseconds of work.
SLICE_BLOCKS = 128
#: Media whose references go in one transaction, or one block's: each is some 16 pages of storage. More: the leader, who
#: sweeps, does nothing else for seconds.
SLICE_MEDIA = 2_048
#: Closed sub-tasks deleted in one transaction.
SLICE_SUBTASKS = 5_000
_LAST_BLOCKS = text("""
    SELECT coalesce(array_agg(number) FILTER (WHERE before < :media), '{}') AS numbers, count(*) AS seen
      FROM (SELECT number, sum(cardinality(media)) OVER (ORDER BY number DESC) - cardinality(media) AS before
              FROM (SELECT number, media FROM block WHERE job_id = :job ORDER BY number DESC LIMIT :limit) b) k""")
# In one order, since two jobs may show the same columns.
_ITS_COLUMNS = text("""
    SELECT id FROM sealed_column
     WHERE id IN (SELECT column_id FROM block_column WHERE job_id = :job AND block_number >= :first)
     ORDER BY id FOR NO KEY UPDATE""")
_RELEASE = text("""
    UPDATE sealed_column c SET refs = c.refs - r.n
      FROM (SELECT column_id, count(*) AS n FROM block_column WHERE job_id = :job AND block_number >= :first
             GROUP BY column_id) r
     WHERE c.id = r.column_id""")
# Set by set and children first: a cascade would ask for each row by itself.
_DELETE_BLOCKS = tuple(
    text(f"DELETE FROM {table} WHERE job_id = :job AND {number} >= :first")
    for table, number in (
        ("cells", "block_number"),
        ("piece", "block_number"),
        ("spent", "block_number"),
        ("ask", "block_number"),
        ("block_column", "block_number"),
        ("block_pass", "block_number"),
        ("block", "number"),
    )
)
_DELETE_COLUMNS = text("DELETE FROM sealed_column WHERE id = ANY(:ids) AND refs <= 0")
_DELETE_SUBTASKS = text("""
    DELETE FROM subtask WHERE id IN (SELECT id FROM subtask WHERE job_id = :job ORDER BY id LIMIT :limit)""")
#: Keys of folded state deleted in one transaction.
SLICE_KEYS = 5_000
_DELETE_KEYS = text("""
    DELETE FROM fold WHERE job_id = :job AND key IN (SELECT key FROM fold WHERE job_id = :job LIMIT :limit)""")
_DELETE_JOB = text("DELETE FROM job WHERE id = :job")
_N_BLOCKS = text("SELECT n_blocks FROM job WHERE id = :job")
# Its tasks go at once, and with them all that the views of SQL users show of it.
_GIVE_AWAY = text("""
    UPDATE job SET tenant_id = (SELECT id FROM tenant WHERE name = ''), idempotency_key = NULL WHERE id = :job""")
_DROP_TASKS = text("DELETE FROM task WHERE job_id = :job")


def delete_job(connection: Connection, job: UUID) -> bool:
    """Remove a job, its texts and those of its columns that no other job shows. False where there is none.

    Late outcomes find no sub-task and are dropped; ids are never used again. A job of many blocks takes long:
    see ``remove_job`` and ``delete_slice``.
    """
    if connection.execute(_LOCK, {"job": job}).first() is None:
        return False
    while not _delete_slice(connection, job):
        pass
    return True


def _remove_from_sight(connection: Connection, job: UUID) -> None:
    """Remove an ended job from sight: a small one is deleted, a large one left to nobody and the sweeper.

    From here on neither its owner nor an administrator finds it, and its Idempotency-Key is free.
    """
    if connection.execute(_LOCK, {"job": job}).first() is None:
        return
    if connection.execute(_N_BLOCKS, {"job": job}).scalar_one() <= SLICE_BLOCKS:
        delete_job(connection, job)
        return
    connection.execute(_GIVE_AWAY, {"job": job})
    connection.execute(_DROP_TASKS, {"job": job})
    tell(connection, [end(job)])


def delete_slice(connection: Connection, job: UUID) -> bool:
    """Delete up to SLICE_BLOCKS blocks, and SLICE_MEDIA references to media, of an ended job, from its end.

    True when nothing of it is left. Each slice is whole: the columns of its blocks are released with them, so a crash
    between two slices leaves a smaller job and no column without an owner.
    """
    if connection.execute(_LOCK, {"job": job}).first() is None:
        return True
    return _delete_slice(connection, job)


def _delete_slice(connection: Connection, job: UUID) -> bool:
    limits = {"limit": SLICE_BLOCKS, "media": SLICE_MEDIA}
    last = connection.execute(_LAST_BLOCKS, {"job": job, **limits}).one()
    if last.numbers:
        at = {"job": job, "first": min(last.numbers)}
        ids: Sequence[int] = [row.id for row in connection.execute(_ITS_COLUMNS, at)]
        connection.execute(_RELEASE, at)
        release_media(connection, job, last.numbers)
        for statement in _DELETE_BLOCKS:
            connection.execute(statement, at)
        connection.execute(_DELETE_COLUMNS, {"ids": ids})
        n = len(last.numbers)
        if n == SLICE_BLOCKS or n < last.seen:
            return False
    if connection.execute(_DELETE_SUBTASKS, {"job": job, "limit": SLICE_SUBTASKS}).rowcount == SLICE_SUBTASKS:
        return False
    if connection.execute(_DELETE_KEYS, {"job": job, "limit": SLICE_KEYS}).rowcount == SLICE_KEYS:
        return False
    connection.execute(_DELETE_JOB, {"job": job})
    tell(connection, [end(job)])
    return True


# -- sweeping --------------------------------------------------------------------------------------

#: Jobs looked at in one round of the sweeper.
_ROUND = 16
# least() passes over NULL: the sooner of what the job and what the cluster says, or never where neither does.
_DUE = text("""
    SELECT j.id, j.n_blocks, CASE WHEN t.name = '' THEN 'removed' ELSE 'retention' END AS why FROM job j JOIN tenant t ON t.id = j.tenant_id
     WHERE j.finished IS NOT NULL
       AND (t.name = ''
            OR j.finished < clock_timestamp() - 86400 * make_interval(secs => least(j.retention_days, :days)))
     ORDER BY j.finished, j.id LIMIT :limit""")
#: Days for which events are kept. With fewer, a reader that was away for longer misses ends; with more, the table grows.
EVENTS_KEPT_DAYS = 7
_OLD_EVENTS = text("""
    DELETE FROM outbox WHERE id <= (
      SELECT max(id) FROM (SELECT id, created FROM outbox ORDER BY id LIMIT :limit) oldest
       WHERE created < clock_timestamp() - make_interval(days => :days))""")
_UNSHOWN = text("""
    DELETE FROM sealed_column WHERE id IN (
      SELECT c.id FROM sealed_column c
       WHERE c.refs <= 0 AND NOT EXISTS (SELECT 1 FROM block_column b WHERE b.column_id = c.id)
       ORDER BY c.id LIMIT :limit FOR UPDATE SKIP LOCKED)""")


@dataclass(frozen=True, slots=True, kw_only=True)
class DueDeletion:
    """An ended job that is to be deleted."""

    id: UUID
    n_blocks: int
    #: ``removed``: by its owner; ``retention``: it was kept long enough.
    why: str


def due_for_deletion(connection: Connection, retention_days: float) -> list[DueDeletion]:
    """The first few ended jobs that were removed by their owner, or that have been kept long enough.

    ``retention_days``: of the cluster; 0 keeps what does not say otherwise itself.
    """
    at = {"days": retention_days or None, "limit": _ROUND}
    return [DueDeletion(**row._mapping) for row in connection.execute(_DUE, at)]


def sweep_columns(connection: Connection, limit: int = 500) -> int:
    """Delete sealed columns that no block shows. Those go with their last block; this is for what slipped by."""
    return int(connection.execute(_UNSHOWN, {"limit": limit}).rowcount)


def sweep_events(connection: Connection, limit: int = 5_000) -> int:
    """Delete events that were kept for EVENTS_KEPT_DAYS, delivered or not. How many."""
    return int(connection.execute(_OLD_EVENTS, {"limit": limit, "days": EVENTS_KEPT_DAYS}).rowcount)
