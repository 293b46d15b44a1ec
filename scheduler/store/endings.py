"""How a job ends before its time: cancelled by a person, failed by the scheduler, removed for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, text

from scheduler.store.database import JOB, WORK, notify

_LOCK = text("SELECT id FROM job WHERE id = :job FOR UPDATE")
#: One UPDATE freezes the counts: what is in no sealed column by now is skipped, and never changes again.
_END = text("""
    UPDATE job SET state = :state, reason = :reason, finished = clock_timestamp(), version = version + 1,
           cells_ok = k.ok, cells_error = k.error, cells_skipped = n_rows * n_tasks - k.ok - k.error
      FROM (SELECT CAST(coalesce(sum(s.n_ok), 0) AS bigint) AS ok, CAST(coalesce(sum(s.n_error), 0) AS bigint) AS error
              FROM block_column b JOIN sealed_column s ON s.id = b.column_id WHERE b.job_id = :job) k
     WHERE id = :job AND state IN ('loading', 'running')
 RETURNING id""")
_DROP_CELLS = text("DELETE FROM cells WHERE job_id = :job")
_CLOSE_SUBTASKS = text("""
    UPDATE subtask SET state = 'lost', closed = clock_timestamp() WHERE job_id = :job AND state = 'open'""")
_DROP_LEASES = text("""
    DELETE FROM lease USING subtask s WHERE lease.subtask_id = s.id AND s.job_id = :job""")
_DROP_PIECES = text("DELETE FROM piece WHERE job_id = :job")
_NOTHING_WAITS = text("UPDATE pass SET rows_waiting = 0, bytes_waiting = 0 WHERE job_id = :job")


def end_job(connection: Connection, job: UUID, state: Literal["cancelled", "failed"], reason: str) -> bool:
    """End an unfinished job; its open sub-tasks close and nothing of it is carved again.

    The row lock on the job serialises this with the aggregator: an outcome is counted before the end or not
    at all. Returns False, and changes nothing, where the job had ended already.
    """
    # First the lock, then a look at what is sealed: an outcome under way is in the counts or comes too late.
    connection.execute(_LOCK, {"job": job})
    if connection.execute(_END, {"job": job, "state": state, "reason": reason}).first() is None:
        return False
    for statement in (_DROP_LEASES, _CLOSE_SUBTASKS, _DROP_PIECES, _DROP_CELLS, _NOTHING_WAITS):
        connection.execute(statement, {"job": job})
    notify(connection, WORK)
    notify(connection, JOB, str(job))
    return True


# In one order, since two jobs may show the same columns.
_ITS_COLUMNS = text("""
    SELECT id FROM sealed_column
     WHERE id IN (SELECT column_id FROM block_column WHERE job_id = :job) ORDER BY id FOR NO KEY UPDATE""")
_RELEASE = text("""
    UPDATE sealed_column c SET refs = c.refs - r.n
      FROM (SELECT column_id, count(*) AS n FROM block_column WHERE job_id = :job GROUP BY column_id) r
     WHERE c.id = r.column_id""")
_DELETE_JOB = text("DELETE FROM job WHERE id = :job")
_DELETE_COLUMNS = text("DELETE FROM sealed_column WHERE id = ANY(:ids) AND refs <= 0")


def delete_job(connection: Connection, job: UUID) -> bool:
    """Remove a job, its texts and those of its columns that no other job shows. False where there is none.

    Late outcomes find no sub-task and are dropped; ids are never used again.
    """
    if connection.execute(_LOCK, {"job": job}).first() is None:
        return False
    ids: Sequence[int] = [row.id for row in connection.execute(_ITS_COLUMNS, {"job": job})]
    connection.execute(_RELEASE, {"job": job})
    connection.execute(_DELETE_JOB, {"job": job})
    connection.execute(_DELETE_COLUMNS, {"ids": ids})
    notify(connection, WORK)
    return True
