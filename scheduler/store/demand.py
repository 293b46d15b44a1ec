"""What waits: the passes that may be carved now, and the frontier of each of them."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple
from uuid import UUID

from cachetools import LRUCache
from sqlalchemy import Connection, text

from motet.states import CARVED, State
from scheduler.blocks import Reads, read_in_order, row_order, uint32s
from scheduler.policy.beginnings import bounds
from scheduler.policy.carve import Frontier, OpenBlock, Piece, Range
from scheduler.policy.functions import KEYWORD, artefacts_mb
from scheduler.policy.placing.records import Demand
from scheduler.store.database import together
from scheduler.store.leases import Fate, LeaseKey, asked_fates, fates_in
from scheduler.store.manifests import Manifests
from scheduler.store.schema import spelt

#: Jobs whose demand is read at once where everything is read.
_JOBS_AT_ONCE = 1_000
#: Lengths of rows kept between steps, eight bytes each: those of the blocks that are carved on.
_LENGTHS_KEPT = 2_000_000
#: Rows of a block whose lengths are read with its place: a few hundred bytes, which are mostly known where it is larger.
_SMALL_ROWS = 64

_DEMAND = f"""
    WITH waiting AS ({{}})
    SELECT p.job_id, p.number, j.tenant_id, t.weight, j.priority, p.numerics, p.rate_key,
           cardinality(p.needs) > 0 AS dependent, j.state = '{State.LOADING}' AS loading, m.id AS model, m.created AS model_created,
           array_prepend(p.model_id, ARRAY(SELECT k.model_id FROM task k
                                            WHERE k.job_id = p.job_id AND k.pass_number = p.number)) AS model_ids,
           p.rows_waiting - coalesce(later.n_rows, 0) AS n_rows,
           p.bytes_waiting - coalesce(later.bytes, 0) AS bytes,
           CAST(date_part('epoch', j.created) * 1000000 AS bigint) AS age,
           CASE WHEN p.tokens > 0 THEN CAST(p.bytes_done AS double precision) / p.tokens ELSE 0 END AS bytes_per_token,
           date_part('epoch', j.deadline - clock_timestamp()) AS left_s, later.more_in_s
      FROM waiting w JOIN pass p ON p.job_id = w.job_id AND p.number = w.number
      JOIN job j ON j.id = p.job_id JOIN tenant t ON t.id = j.tenant_id JOIN model m ON m.id = p.model_id
      LEFT JOIN LATERAL (SELECT sum(hi - lo) AS n_rows, CAST(sum(bytes) AS bigint) AS bytes,
                                date_part('epoch', min(not_before) - clock_timestamp()) AS more_in_s FROM piece
                          WHERE piece.job_id = p.job_id AND piece.pass_number = p.number
                            AND not_before > clock_timestamp()) later ON true
     ORDER BY j.priority, j.created, j.id, p.number"""
# The first passes of each tenant in each class, then the second ones: whoever has many hides nobody.
_OLDEST = text(
    _DEMAND.format(f"""
    SELECT p.job_id, p.number,
           row_number() OVER (PARTITION BY j.priority, j.tenant_id ORDER BY j.created, j.id, p.number) AS turn
      FROM pass p JOIN job j ON j.id = p.job_id WHERE j.state IN {spelt(CARVED)} AND p.rows_waiting > 0
     ORDER BY turn, j.priority, j.created, j.id, p.number LIMIT :limit""")
)
_OF_JOBS = text(
    _DEMAND.format(f"""
    SELECT p.job_id, p.number FROM pass p JOIN job j ON j.id = p.job_id
     WHERE j.id = ANY(:jobs) AND j.state IN {spelt(CARVED)} AND p.rows_waiting > 0""")
)
_WAITING = text(f"""
    SELECT DISTINCT p.job_id FROM pass p JOIN job j ON j.id = p.job_id
     WHERE j.state IN {spelt(CARVED)} AND p.rows_waiting > 0 AND p.job_id > :after ORDER BY 1 LIMIT :limit""")


def demand(connection: Connection, now: float, manifests: Manifests, limit: int = 500) -> list[Demand]:
    """Passes of jobs with rows that may be carved now; deadlines are told on the clock of ``now``.

    Where more than ``limit`` wait each tenant has as many of them in each class, its oldest.
    """
    return _demands(connection, connection.execute(_OLDEST, {"limit": limit}).all(), now, manifests)


def demand_of(
    connection: Connection, now: float, jobs: Collection[UUID], manifests: Manifests
) -> tuple[list[Demand], dict[UUID, float]]:
    """``demand`` of these jobs, of all their passes; and, for jobs with rows that are put off, when more of them may be carved."""
    (rows,) = together(connection, (_OF_JOBS, {"jobs": list(jobs)}))
    return _with_later(connection, rows, now, manifests)


def ends_and_demand(
    connection: Connection,
    keys: Collection[LeaseKey],
    now: float,
    jobs: Collection[UUID],
    manifests: Manifests,
) -> tuple[dict[LeaseKey, Fate], list[Demand], dict[UUID, float]]:
    """What became of these leases, and ``demand_of`` these jobs, in one round trip."""
    ended, rows = together(connection, asked_fates(keys), (_OF_JOBS, {"jobs": list(jobs)}))
    return fates_in(ended), *_with_later(connection, rows, now, manifests)


def _with_later(
    connection: Connection, rows: Sequence[Any], now: float, manifests: Manifests
) -> tuple[list[Demand], dict[UUID, float]]:
    more_at: dict[UUID, float] = {}
    for row in rows:
        if row.more_in_s is not None:
            more_at[row.job_id] = min(now + row.more_in_s, more_at.get(row.job_id, inf))
    return _demands(connection, rows, now, manifests), more_at


def jobs_waiting(connection: Connection, after: UUID, limit: int) -> list[UUID]:
    """Jobs with waiting rows that may be carved, also with such that are put off: so many, by id, beyond ``after``."""
    return list(connection.execute(_WAITING, {"after": after, "limit": limit}).scalars())


def all_jobs_waiting(connection: Connection) -> Iterator[list[UUID]]:
    """The same, all of them in pages."""
    page = jobs_waiting(connection, UUID(int=0), _JOBS_AT_ONCE)
    while page:
        yield page
        page = jobs_waiting(connection, page[-1], _JOBS_AT_ONCE) if len(page) == _JOBS_AT_ONCE else []


def _demands(connection: Connection, found: Sequence[Any], now: float, manifests: Manifests) -> list[Demand]:
    rows = [row for row in found if row.n_rows > 0]
    models = manifests.of(connection, {(row.model, row.model_created) for row in rows})

    def beside_mb(row: Any) -> int:
        if KEYWORD not in models[row.model, row.model_created].keywords:
            return 0
        return artefacts_mb(manifests.of_pass(connection, row.job_id, row.number, row.model_ids))

    return [
        Demand(
            job=str(row.job_id),
            pass_number=row.number,
            tenant=str(row.tenant_id),
            weight=row.weight,
            priority=row.priority,
            age=row.age,
            model_ids=frozenset(row.model_ids),
            numerics=row.numerics,
            model=models[row.model, row.model_created],
            beside_mb=beside_mb(row),
            rate_key=row.rate_key,
            dependent=row.dependent,
            loading=row.loading,
            rows_waiting=row.n_rows,
            bytes_waiting=row.bytes,
            bytes_per_token=row.bytes_per_token,
            deadline=None if row.left_s is None else now + row.left_s,
        )
        for row in rows
    ]


_PIECES = text("""
    SELECT p.id, p.block_number, p.lo, p.hi, p.bytes, p.tries, p.deaths, p.exclusive, bp.todo,
           b.due IS NOT NULL OR b.say <> '' AS alone
      FROM piece p JOIN block_pass bp USING (job_id, pass_number, block_number)
      JOIN block b ON b.job_id = p.job_id AND b.number = p.block_number
     WHERE p.job_id = :job AND p.pass_number = :pass AND p.not_before <= clock_timestamp()
     ORDER BY p.block_number, p.lo LIMIT :limit""")
# What is late is not begun: the leader drops it in its next beat step (dropping.py). Small blocks bring along what
# `_LENGTHS` tells of others, which is another round trip.
_OPEN_BLOCKS = text(f"""
    SELECT p.block_number AS number, p.cursor, p.n, p.todo, b.due IS NOT NULL OR b.say <> '' AS alone,
           b.n_rows, b.groups, s.reads, s.bytes_beside, s.max_tokens,
           CASE WHEN b.n_rows <= {_SMALL_ROWS} THEN coalesce(p.row_order, b.row_order) END AS row_order,
           CASE WHEN b.n_rows <= {_SMALL_ROWS} THEN b.lengths END AS lengths
      FROM block_pass p JOIN block b ON b.job_id = p.job_id AND b.number = p.block_number
      JOIN pass s ON s.job_id = p.job_id AND s.number = p.pass_number
     WHERE p.job_id = :job AND p.pass_number = :pass AND p.state = 'ready' AND p.cursor < p.n
       AND (p.cursor > 0 OR b.due IS NULL OR b.due > (SELECT clock_timestamp()))
     ORDER BY p.block_number LIMIT :limit""")
_LENGTHS = text("""
    SELECT b.number, coalesce(w.row_order, b.row_order) AS row_order, b.lengths, b.n_rows, b.groups,
           p.reads, p.bytes_beside, p.max_tokens
      FROM block b JOIN pass p ON p.job_id = b.job_id AND p.number = :pass
      JOIN block_pass w ON w.job_id = b.job_id AND w.pass_number = p.number AND w.block_number = b.number
     WHERE b.job_id = :job AND b.number = ANY(:blocks)""")


class RowsInOrder(NamedTuple):
    """Of the rows of a block in the order in which a pass carves them: as ``OpenBlock`` has both."""

    cumulative: array[int]
    bounds: Sequence[int]


class Lengths:
    """Of blocks that are carved on: what is known of their rows in order. Of what may be carved it never changes."""

    def __init__(self) -> None:
        self._known: LRUCache[tuple[UUID, int, int], RowsInOrder] = LRUCache(
            _LENGTHS_KEPT, lambda known: len(known.cumulative) + len(known.bounds)
        )

    def of(
        self, connection: Connection, job: UUID, pass_number: int, blocks: Sequence[Any]
    ) -> dict[int, RowsInOrder]:
        """Of these blocks, as `_OPEN_BLOCKS` tells them, decoded once; without those of a job that is removed while we read."""
        found: dict[int, RowsInOrder] = {}
        missing: list[int] = []
        for block in blocks:
            known = self._known.get((job, pass_number, block.number))
            if known is None and block.lengths is not None:
                known = self._decoded(job, pass_number, block)
            if known is None:
                missing.append(block.number)
            else:
                found[block.number] = known
        if missing:
            for row in connection.execute(_LENGTHS, {"job": job, "pass": pass_number, "blocks": missing}):
                found[row.number] = self._decoded(job, pass_number, row)
        return found

    def _decoded(self, job: UUID, pass_number: int, block: Any) -> RowsInOrder:
        reads = Reads(tuple(block.reads), block.bytes_beside, block.max_tokens)
        sizes = read_in_order(block.row_order, block.lengths, block.n_rows, reads)
        groups = () if block.groups is None else uint32s(block.groups)
        known = self._known[job, pass_number, block.number] = RowsInOrder(
            array("Q", accumulate(sizes, initial=0)), bounds(row_order(block.row_order), groups)
        )
        return known


def frontier(
    connection: Connection, job: str, pass_number: int, lengths: Lengths, *, rows: int, limit: int = 16
) -> Frontier:
    """The next pieces and open blocks of a pass: enough for so many rows, at most ``limit`` of each."""
    job_id = UUID(job)
    at = {"job": job_id, "pass": pass_number, "limit": limit}
    returned, uncarved = together(connection, (_PIECES, at), (_OPEN_BLOCKS, at))
    pieces = [
        Piece(
            row.id,
            Range(row.block_number, row.lo, row.hi, row.bytes),
            row.todo,
            tries=row.tries,
            deaths=row.deaths,
            exclusive=row.exclusive,
            alone=row.alone,
        )
        for row in returned
    ]
    wanted = rows - sum(len(p.range) for p in pieces)
    opened = []
    for row in uncarved if wanted > 0 else ():
        opened.append(row)
        wanted -= row.n - row.cursor
        if wanted <= 0:
            break
    known = lengths.of(connection, job_id, pass_number, opened)
    return Frontier(
        pieces=pieces,
        blocks=[
            OpenBlock(row.number, row.cursor, row.n, row.todo, *known[row.number], alone=row.alone)
            for row in opened
            if row.number in known
        ],
    )
