"""Open jobs: the asks of many callers land as one block, and the answers of blocks are read by number.

Lock order: the job's row first, as in landing.py. What may arrive twice (an ask under its key) is found, not stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import Conflict, NotFound
from motet.protocol.columns import Column
from motet.protocol.values import Value
from motet.states import State
from scheduler.blocks import EncodedBlock, IncomingPart, blocks_of
from scheduler.store import folds, words
from scheduler.store.database import JOB, WORK, together
from scheduler.store.landing import STORE_BLOCK, LoadingJob, arrange, check_quota
from scheduler.store.results import COLUMN_FIELDS, column_of
from scheduler.store.sealing import settle

#: A group is one block, whatever its size: its rows are answered together.
_WHOLE_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAsk:
    """One caller's rows, under its key; its rows follow those of the ask before it in the block."""

    #: Digest of the caller's key.
    key: bytes
    #: Digest of its rows.
    digest: bytes
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LandedAsk:
    """Where an ask's rows stand: [lo, lo + n_rows) of a block, which begins at row ``first_row`` of the job."""

    key: bytes
    digest: bytes
    block: int
    lo: int
    n_rows: int
    first_row: int


#: Nothing else of the job may change while its rows are numbered.
_LOCK = text("""
    SELECT j.state, j.n_rows, j.n_blocks, j.blocks_done, t.row_quota FROM job j JOIN tenant t ON t.id = j.tenant_id
     WHERE j.id = :job AND j.tenant_id = :tenant FOR NO KEY UPDATE OF j""")
# A statement of its own, behind the lock: under READ COMMITTED the statement that waits for the lock would not see
# an ask that was committed while it waited.
_KNOWN = text("""
    SELECT a.key, a.digest, a.block_number AS block, a.lo, a.n_rows, b.first_row
      FROM ask a JOIN block b ON b.job_id = a.job_id AND b.number = a.block_number
     WHERE a.job_id = :job AND a.key = ANY(:keys)""")
# The block, its passes, the asks, what waits, and the job's counts: one round trip.
_PARTS = f"""{STORE_BLOCK},
    asks AS (
        INSERT INTO ask (job_id, key, digest, block_number, lo, n_rows)
        SELECT :job, k.key, k.digest, :number, k.lo, k.n_rows
          FROM unnest(CAST(:ask_keys AS bytea[]), CAST(:digests AS bytea[]), CAST(:los AS int[]),
                      CAST(:ask_rows AS int[])) k (key, digest, lo, n_rows))"""
_GROW = f"""
    UPDATE job SET n_rows = n_rows + :n_rows, n_blocks = n_blocks + 1, blocks_done = blocks_done + :blocks_done,
           cells_error = cells_error + :errors, cells_skipped = cells_skipped + :skipped, version = version + 1, touched = clock_timestamp()
     WHERE id = :job
 RETURNING pg_notify('{WORK}', :word), CASE WHEN :blocks_done > 0 THEN pg_notify('{JOB}', CAST(:job AS text)) END"""
_STORE = text(_PARTS + _GROW)
#: The same with what was folded.
_STORE_FOLDED = text(f"{_PARTS}, folds AS ({folds.WRITE}) {_GROW}")


def land_asks(
    connection: Connection,
    job: LoadingJob,
    part: IncomingPart,
    asks: Sequence[NewAsk],
    *,
    say: str = "",
    due_s: float | None = None,
) -> tuple[list[LandedAsk], bool]:
    """Store the asks' rows as the job's next block. Where they stand, and whether this call stored them.

    Of a job with state each row is given what was folded before it, and is folded: behind the lock, so in the order in
    which rows are numbered; and of a key that is there nothing is folded again.
    ``say``: this process of the API reads along as text is written. ``due_s``: what no worker has begun so many seconds
    from now is dropped (dropping.py); None: all of it is computed, whoever waits.
    Where some of the keys are there already nothing is stored, and only these asks are told: the caller takes them
    out and lands the rest again.
    Raises NotFound; Conflict where the job takes no rows; Overloaded beyond the tenant's quota.
    """
    # Before the lock where it can be, so that nobody waits for it.
    block = None if job.folds else _encoded(job, part)
    locked, known = together(
        connection,
        (_LOCK, {"job": job.id, "tenant": job.tenant}),
        (_KNOWN, {"job": job.id, "keys": [ask.key for ask in asks]}),
    )
    if not locked:
        raise NotFound(f"no job {job.id}")
    (held,) = locked
    if known:
        return [
            LandedAsk(
                key=bytes(row.key),
                digest=bytes(row.digest),
                block=row.block,
                lo=row.lo,
                n_rows=row.n_rows,
                first_row=row.first_row,
            )
            for row in known
        ], False
    if held.state != State.OPEN:
        raise Conflict(f"job {job.id} is {held.state} and takes no more rows")
    check_quota(connection, job.tenant, held.row_quota, len(part))
    store, written = _STORE, dict[str, Any]()
    if block is None:
        folding = folds.fold(connection, job, part)
        store, written = _STORE_FOLDED, folding.written
        block = _encoded(job, folding.part)
    arranged = arrange(connection, job, held, [block])
    landed, lo = [], 0
    for ask in asks:
        landed.append(
            LandedAsk(
                key=ask.key,
                digest=ask.digest,
                block=held.n_blocks,
                lo=lo,
                n_rows=ask.n_rows,
                first_row=held.n_rows,
            )
        )
        lo += ask.n_rows
    assert lo == block.n_rows, "the asks are not the rows of the block"
    # What callers bring at one moment is in no order: without its groups.
    of_block = arranged.of_one_block() | {"groups": None}
    told = {"say": say, "due_s": due_s, "word": words.land(job.id)}
    together(connection, (store, {**of_block, **_of_asks(landed), **written, **told}))
    if arranged.depend:
        # Last, since it counts on with what is counted by now.
        settle(connection, {(job.id, number) for number in arranged.depend})
    return landed, True


def _encoded(job: LoadingJob, part: IncomingPart) -> EncodedBlock:
    (block,) = blocks_of(part, job.readers, secret=job.secret, block_rows=len(part), block_bytes=_WHOLE_BYTES)
    return block


def _of_asks(asks: Sequence[LandedAsk]) -> dict[str, list[object]]:
    return {
        "ask_keys": [ask.key for ask in asks],
        "digests": [ask.digest for ask in asks],
        "los": [ask.lo for ask in asks],
        "ask_rows": [ask.n_rows for ask in asks],
    }


# One round trip for all who wait. The job's row comes along even where no block is answered.
_LOOK = f"""
    SELECT j.state, b.number, c.task_number, {COLUMN_FIELDS}
      FROM job j LEFT JOIN block b ON b.job_id = j.id AND b.number = ANY(%s) AND b.passes_open = 0
      LEFT JOIN block_column c ON c.job_id = b.job_id AND c.block_number = b.number
      LEFT JOIN sealed_column s ON s.id = c.column_id
     WHERE j.id = %s"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedLook:
    """An open job at one moment, as those see it who wait for some of its blocks."""

    #: None: it was removed.
    state: str | None
    #: Number of an answered block -> task number -> column. A block is whole or not there.
    answered: Mapping[int, Mapping[int, Column]]
    #: Number of an answered block -> fold -> what each of its rows was given.
    given: Mapping[int, Mapping[str, Sequence[Value]]] = field(default_factory=dict)


def look(connection: Connection, job: UUID, blocks: Sequence[int], names: Collection[str] = ()) -> FeedLook:
    """The job's state, and those of these blocks that are answered; with what these folds of it gave."""
    driver: Any = connection.connection.driver_connection
    with driver.cursor(binary=True) as cursor:
        rows = cursor.execute(_LOOK, (list(blocks), job)).fetchall()
    found: dict[int, dict[int, Column]] = {}
    for _, number, task, *fields in rows:
        if task is not None:
            found.setdefault(number, {})[task] = column_of(fields)
    given = folds.given(connection, job, names, list(found))
    return FeedLook(state=rows[0][0] if rows else None, answered=found, given=given)
