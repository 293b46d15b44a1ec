"""How a job ends before its time: cancelled by a person, failed by the scheduler, removed for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, text

from scheduler.store.database import JOB, WORK, notify

#: One UPDATE freezes the counts: what is not answered by now is skipped, and never changes again.
_END = text("""
    UPDATE job SET state = :state, reason = :reason, finished = clock_timestamp(), version = version + 1,
           cells_skipped = n_rows * n_tasks - cells_ok - cells_error
     WHERE id = :job AND state IN ('loading', 'running')
 RETURNING id""")
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
    if connection.execute(_END, {"job": job, "state": state, "reason": reason}).first() is None:
        return False
    for statement in (_DROP_LEASES, _CLOSE_SUBTASKS, _DROP_PIECES, _NOTHING_WAITS):
        connection.execute(statement, {"job": job})
    notify(connection, WORK)
    notify(connection, JOB, str(job))
    return True


_LOCK = text("SELECT id FROM job WHERE id = :job FOR UPDATE")
_ITS_COLUMNS = text(
    "SELECT column_id, count(*) AS n FROM block_column WHERE job_id = :job GROUP BY column_id"
)
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
    ids: Sequence[int] = [row.column_id for row in connection.execute(_ITS_COLUMNS, {"job": job})]
    connection.execute(_RELEASE, {"job": job})
    connection.execute(_DELETE_JOB, {"job": job})
    connection.execute(_DELETE_COLUMNS, {"ids": ids})
    notify(connection, WORK)
    return True
