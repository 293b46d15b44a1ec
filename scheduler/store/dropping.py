"""Rows of open jobs that nobody waits for any more: late where no worker had begun them, abandoned where callers are gone.

Their cells are written as ``skipped`` in the transaction that takes the rows away from wherever they are: beyond the
cursor, in a piece, or in an open sub-task, which closes. So an outcome that comes later is dropped like that of any closed
sub-task. The keys of the asks go with them: a key that is used again names a new row.

Lock order as everywhere: jobs by id, sub-tasks by id, block_pass, pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.protocol.columns import SKIPPED, CellError, Column, Kind
from motet.states import CARVED, ENDED, Skip, State
from scheduler.blocks import Reads, read_in_order
from scheduler.merge import errors_column
from scheduler.policy.carve import Range
from scheduler.store.database import Database
from scheduler.store.leadership import fence
from scheduler.store.leases import LOCK_JOBS, OpenSubtask, more_waits, open_subtask
from scheduler.store.places import PLACES, Place, at_places
from scheduler.store.schema import spelt
from scheduler.store.sealing import (
    BlockAnswers,
    TaskShape,
    append,
    asked_for,
    partly_bad,
    task_shapes,
    without_bad,
)
from scheduler.store.words import done, land, tell

#: A block of a job.
BlockKey = tuple[UUID, int]

#: Blocks that the leader expires in one beat step. More: the step is long. Fewer: what is late stays in the queue longer.
_MOST = 256
WHY: Mapping[Skip, str] = {
    Skip.LATE: "no worker had begun it when its caller's time was over",
    Skip.ABANDONED: "its caller gave it up",
}

# The clock in a query of its own, so that the index ends the search.
_LATE = text(f"""
    SELECT b.job_id, b.number FROM block b JOIN job j ON j.id = b.job_id AND j.state IN {spelt(CARVED)}
     WHERE b.due < (SELECT clock_timestamp()) AND b.done_number IS NULL
       AND EXISTS (SELECT FROM block_pass p WHERE p.job_id = b.job_id AND p.block_number = b.number
                      AND p.state = 'ready' AND p.cursor = 0)
     ORDER BY b.due LIMIT :limit""")


def late_blocks(connection: Connection) -> list[BlockKey]:
    """Blocks whose callers' time is over, with a pass that no worker has begun."""
    return [(job, number) for job, number in connection.execute(_LATE, {"limit": _MOST})]


def expire(database: Database, epoch: int, blocks: Collection[BlockKey]) -> int:
    """Let cells be late in the passes of these blocks that are due and of which nothing was ever leased. How many cells.

    Cells that wait for these are skipped with them, and not counted here.
    """
    by_job = _by_job(blocks)
    cells = 0
    with database.transaction() as connection:
        fence(connection, epoch)
        states = _locked(connection, by_job)
        for job in sorted(job for job, state in states.items() if state in CARVED):
            numbers = by_job[job]
            places = _places(connection, job, numbers, begun=False)
            cells += _skip(connection, places, (), Skip.LATE)
            connection.execute(_FORGET_ASKS, {"job": job, "blocks": sorted({p.at[2] for p in places})})
            tell(connection, [land(job)], [job])
    return cells


def abandon(connection: Connection, job: UUID, blocks: Collection[int]) -> int:
    """Give up all of these blocks that is not answered. How many cells; those that wait for them are skipped besides.

    Sub-tasks that are of these blocks alone are closed, and the leader tells their workers to stop. Rows that share one
    with rows of others go on. Of a job that has ended nothing is changed; twice is harmless.
    """
    if _locked(connection, [job]).get(job, State.CANCELLED) in ENDED:
        return 0
    at = {"job": job, "blocks": sorted(blocks)}
    connection.execute(_NO_LONGER, at)
    closed, shared = _close(connection, job, at)
    cells = _skip(
        connection, _places(connection, job, blocks, begun=True, but=shared), closed, Skip.ABANDONED
    )
    # What waited for these cells may have rows to do all the same: those whose cells were there.
    while more := _skip(
        connection, _places(connection, job, blocks, begun=True, but=shared), (), Skip.ABANDONED
    ):
        cells += more
    connection.execute(_FORGET_ASKS, at)
    tell(connection, [*([done(job, [s.id for s in closed])] if closed else []), land(job)], [job])
    return cells


def _locked(connection: Connection, jobs: Collection[UUID]) -> dict[UUID, State]:
    """The states of these jobs, which nothing else changes from here on; without those that were removed."""
    found = connection.execute(LOCK_JOBS, {"jobs": sorted(jobs)})
    return {row.id: State(row.state) for row in found}


def _by_job(blocks: Collection[BlockKey]) -> dict[UUID, list[int]]:
    found: dict[UUID, list[int]] = defaultdict(list)
    for job, number in blocks:
        found[job].append(number)
    return found


_NO_LONGER = text("""
    UPDATE block SET due = clock_timestamp() WHERE job_id = :job AND number = ANY(:blocks) AND done_number IS NULL""")
_FORGET_ASKS = text("DELETE FROM ask WHERE job_id = :job AND block_number = ANY(:blocks)")
_OF_BLOCKS = text("""
    SELECT s.* FROM subtask s WHERE s.job_id = :job AND s.state = 'open' AND s.blocks && CAST(:blocks AS int[])
     ORDER BY s.id FOR UPDATE""")
_CLOSE = text("""
    UPDATE subtask SET state = 'lost', closed = clock_timestamp(),
           worker = coalesce((SELECT l.worker FROM lease l WHERE l.subtask_id = subtask.id ORDER BY l.attempt LIMIT 1),
                             worker)
     WHERE id = ANY(:ids)""")
_DROP_LEASES = text("DELETE FROM lease WHERE subtask_id = ANY(:ids)")


def _close(
    connection: Connection, job: UUID, at: Mapping[str, Any]
) -> tuple[list[OpenSubtask], frozenset[Place]]:
    """Close the open sub-tasks that are of these blocks alone. These, and the places of which others go on."""
    found = [open_subtask(row) for row in connection.execute(_OF_BLOCKS, at)]
    mine = set(at["blocks"])
    closed = [s for s in found if mine.issuperset(r.block for r in s.ranges)]
    ids = [s.id for s in closed]
    connection.execute(_CLOSE, {"ids": ids})
    connection.execute(_DROP_LEASES, {"ids": ids})
    shared = {(job, s.pass_number, r.block) for s in found if s.id not in ids for r in s.ranges}
    return closed, frozenset(shared)


# -- rows become skipped cells ---------------------------------------------------------------------

_PLACES = text("""
    SELECT p.job_id, p.pass_number, p.block_number, p.cursor, p.n, p.todo, b.lengths, b.n_rows,
           coalesce(p.row_order, b.row_order) AS row_order, q.reads, q.bytes_beside, q.max_tokens
      FROM block_pass p JOIN block b ON b.job_id = p.job_id AND b.number = p.block_number
      JOIN pass q ON q.job_id = p.job_id AND q.number = p.pass_number
     WHERE p.job_id = :job AND p.block_number = ANY(:blocks) AND p.state = 'ready'
       AND (:begun OR p.cursor = 0 AND b.due < clock_timestamp())
     ORDER BY p.pass_number, p.block_number FOR NO KEY UPDATE OF p""")
_HERE = f"FROM {PLACES} k (job, pass, block) WHERE p.job_id = k.job AND p.pass_number = k.pass AND p.block_number = k.block"
_TAKE_PIECES = text(f"""
    DELETE FROM piece p USING {PLACES} k (job, pass, block)
     WHERE p.job_id = k.job AND p.pass_number = k.pass AND p.block_number = k.block
 RETURNING p.job_id, p.pass_number, p.block_number, p.lo, p.hi, p.bytes""")
_CARVED = text(f"UPDATE block_pass p SET cursor = p.n {_HERE}")
_COUNT = text("UPDATE job SET cells_skipped = cells_skipped + :n, version = version + 1 WHERE id = :job")


@dataclass(frozen=True, slots=True)
class _Unsealed:
    """A pass in a block that is not sealed."""

    at: Place
    todo: int
    #: Rows that no sub-task ever had.
    uncarved: Range


def _places(
    connection: Connection,
    job: UUID,
    blocks: Collection[int],
    *,
    begun: bool,
    but: Collection[Place] = (),
) -> list[_Unsealed]:
    """Places in these blocks that may be carved, locked; not begun: of them those that are due and untouched."""
    found = []
    for row in connection.execute(_PLACES, {"job": job, "blocks": sorted(blocks), "begun": begun}):
        at = (row.job_id, row.pass_number, row.block_number)
        if at in but:
            continue
        reads = Reads(tuple(row.reads), row.bytes_beside, row.max_tokens)
        sizes = read_in_order(bytes(row.row_order), row.lengths, row.n_rows, reads)
        found.append(
            _Unsealed(at, row.todo, Range(row.block_number, row.cursor, row.n, sum(sizes[row.cursor :])))
        )
    return found


def _skip(
    connection: Connection, places: Sequence[_Unsealed], closed: Sequence[OpenSubtask], why: Skip
) -> int:
    """Write all rows of these places that are not answered as skipped cells. How many cells."""
    if not places:
        return 0
    here = at_places([p.at for p in places])
    #: Place -> rows that wait there; and those of the sub-tasks that were closed.
    waits: dict[Place, list[Range]] = {p.at: [p.uncarved] if len(p.uncarved) else [] for p in places}
    for job, number, block, lo, hi, size in connection.execute(_TAKE_PIECES, here):
        waits[job, number, block].append(Range(block, lo, hi, size))
    rows: Counter[tuple[UUID, int]] = Counter()
    size_of: Counter[tuple[UUID, int]] = Counter()
    for (job, number, _), ranges in waits.items():
        rows[job, number] += sum(map(len, ranges))
        size_of[job, number] += sum(r.bytes for r in ranges)
    connection.execute(_CARVED, here)
    more_waits(connection, {at: (-n, -size_of[at]) for at, n in sorted(rows.items()) if n})
    shapes = {at[:2]: task_shapes(connection, *at[:2]) for at in waits}
    todo = {p.at: p.todo for p in places}
    given_up = [
        (at, subtask, r)
        for at in waits
        for subtask, r in (
            *((0, r) for r in waits[at]),
            *((s.id, r) for s in closed if (s.job, s.pass_number) == at[:2] for r in s.ranges if r.block == at[2]),
        )
    ]  # fmt: skip
    answers = [
        _skipped(at, subtask, r, asked_for(shapes[at[:2]], todo[at]), why) for at, subtask, r in given_up
    ]
    answers = without_bad(answers, partly_bad(connection, list(waits), shapes))
    cells: Counter[UUID] = Counter()
    for a in answers:
        cells[a.job] += sum(column.counts()[2] for column in a.columns.values())
    for job, n in sorted(cells.items()):
        connection.execute(_COUNT, {"job": job, "n": n})
    append(connection, answers, shapes)
    return cells.total()


def _skipped(at: Place, subtask: int, r: Range, asked: Sequence[TaskShape], why: Skip) -> BlockAnswers:
    job, number, block = at
    columns = {shape.number: _skipped_column(shape.kind, len(r), why) for shape in asked}
    return BlockAnswers(job, number, block, subtask, r.lo, r.hi, columns, len(r))


def _skipped_column(kind: Kind, rows: int, why: Skip) -> Column:
    column = errors_column(kind, [CellError(why, WHY[why])] * rows)
    return replace(column, status=bytes([SKIPPED]) * rows)


def is_dropped(columns: Collection[Column]) -> bool:
    """Whether some cell of these columns was late or abandoned: its row was given up, and its key is free."""
    return any(e.error in WHY for column in columns for e in column.errors.values())
