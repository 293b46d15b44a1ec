"""Retention from the front: an open job runs for months, and answered rows go when they have been kept long enough.

Blocks go in the order in which they were done, so that nothing undone can go and a reader of that order knows by its
cursor alone whether it missed any. Their cells stay counted (``past_*``), and their keys go with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.states import State
from scheduler.store.media import release_media

#: Blocks deleted in one transaction. More: the leader does nothing else for longer; fewer: more transactions.
FRONT_BLOCKS = 32
#: Closed sub-tasks looked at in one transaction, the oldest first.
_FRONT_SUBTASKS = 512
#: Open jobs looked at in one round of the sweeper: those that are behind the most.
ROUND = 2

# The oldest block that is left is the one behind those that are gone: one look by an index for each open job.
_DUE = text(f"""
    SELECT j.id FROM job j JOIN block b ON b.job_id = j.id AND b.done_number = j.past_done + 1
     WHERE j.state = '{State.OPEN}' AND b.done_at < clock_timestamp() - make_interval(secs => j.keep_s)
     ORDER BY b.done_at LIMIT :limit""")
# Whoever ends or removes the job waits for us, or is not waited for; whoever lands or records goes on meanwhile.
_HOLD = text(f"""
    SELECT past_done, clock_timestamp() - make_interval(secs => keep_s) AS until FROM job
     WHERE id = :job AND state = '{State.OPEN}' AND keep_s IS NOT NULL FOR KEY SHARE SKIP LOCKED""")
# Of a block that is done no sub-task is open. Should one be, the front ends there.
_FRONT = text("""
    SELECT b.number, b.first_row + b.n_rows AS next_row, b.done_number, b.done_at < :until AS due,
           EXISTS (SELECT FROM subtask s
                    WHERE s.job_id = b.job_id AND s.state = 'open' AND b.number = ANY(s.blocks)) AS leased
      FROM block b WHERE b.job_id = :job AND b.done_number > :past_done AND b.done_number <= :past_done + :limit
     ORDER BY b.done_number""")
_COUNT = text("""
    SELECT CAST(coalesce(sum(s.n_ok), 0) AS bigint) AS ok, CAST(coalesce(sum(s.n_error), 0) AS bigint) AS error,
           CAST(coalesce(sum(s.n_skipped), 0) AS bigint) AS skipped, array_agg(s.id ORDER BY s.id) AS columns
      FROM block_column b JOIN sealed_column s ON s.id = b.column_id
     WHERE b.job_id = :job AND b.block_number = ANY(:numbers)""")
# In one order, as everywhere: but an open job's columns have no reuse key, and no other job shows them.
_LOCK_COLUMNS = text("SELECT id FROM sealed_column WHERE id = ANY(:columns) ORDER BY id FOR NO KEY UPDATE")
_RELEASE = text("""
    UPDATE sealed_column SET refs = refs - cardinality(array_positions(CAST(:columns AS bigint[]), id))
     WHERE id = ANY(CAST(:columns AS bigint[]))""")
_DELETE_COLUMNS = text("DELETE FROM sealed_column WHERE id = ANY(:columns) AND refs <= 0")
# Set by set and children first: a cascade would ask for each row by itself. Of a done block nothing else is left.
_DELETE = tuple(
    text(f"DELETE FROM {table} WHERE job_id = :job AND {number} = ANY(:numbers)")
    for table, number in (
        ("ask", "block_number"),
        ("spent", "block_number"),
        ("block_column", "block_number"),
        ("block_pass", "block_number"),
        ("block", "number"),
    )
)
_DELETE_SUBTASKS = text("""
    DELETE FROM subtask WHERE id IN (
      SELECT s.id FROM (SELECT id, job_id, state, blocks FROM subtask WHERE job_id = :job ORDER BY id LIMIT :limit) s
       WHERE s.state <> 'open'
         AND NOT EXISTS (SELECT FROM block b WHERE b.job_id = s.job_id AND b.number = ANY(s.blocks)))""")
# The job's row last: from here to the end of the transaction nobody else lands or records.
_MOVE = text("""
    UPDATE job SET past_done = :past_done, past_ok = past_ok + :ok, past_error = past_error + :error,
           past_skipped = past_skipped + :skipped, version = version + 1,
           first_row = CASE WHEN :next_block > first_block THEN :next_row ELSE first_row END,
           first_block = greatest(first_block, :next_block)
     WHERE id = :job AND past_done = :before""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What one transaction deleted of a job's front."""

    blocks: int
    #: There may be more that is due.
    more: bool


def due_fronts(connection: Connection) -> list[UUID]:
    """The open jobs whose oldest answered rows have been kept long enough: the first few."""
    return list(connection.execute(_DUE, {"limit": ROUND}).scalars())


def forget_front(connection: Connection, job: UUID) -> Forgotten:
    """Delete up to FRONT_BLOCKS of an open job's oldest done blocks, with their keys, columns and closed sub-tasks.

    Nothing happens to a job that was closed, or that somebody is ending at this moment.
    """
    held = connection.execute(_HOLD, {"job": job}).first()
    if held is None:
        return Forgotten(blocks=0, more=False)
    at: dict[str, Any] = {"job": job, "past_done": held.past_done, "until": held.until, "limit": FRONT_BLOCKS}
    front = []
    for block in connection.execute(_FRONT, at).all():
        if not block.due or block.leased:
            break
        front.append(block)
    if not front:
        return Forgotten(blocks=0, more=False)
    numbers = [int(block.number) for block in front]
    gone = {"job": job, "numbers": numbers}
    counted = connection.execute(_COUNT, gone).one()
    columns = {"columns": counted.columns or []}
    connection.execute(_LOCK_COLUMNS, columns)
    connection.execute(_RELEASE, columns)
    release_media(connection, job, numbers)
    for statement in _DELETE:
        connection.execute(statement, gone)
    connection.execute(_DELETE_COLUMNS, columns)
    connection.execute(_DELETE_SUBTASKS, {"job": job, "limit": _FRONT_SUBTASKS})
    newest = max(front, key=lambda block: int(block.number))
    moved = connection.execute(
        _MOVE,
        {
            "job": job,
            "before": held.past_done,
            "past_done": front[-1].done_number,
            "next_block": newest.number + 1,
            "next_row": newest.next_row,
            "ok": counted.ok,
            "error": counted.error,
            "skipped": counted.skipped,
        },
    )
    assert moved.rowcount == 1, "two sweepers at once, of one leader"
    return Forgotten(blocks=len(front), more=len(front) == FRONT_BLOCKS)
