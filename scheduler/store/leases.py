"""Demand, frontiers, leases and rescue: everything the dispatcher reads and writes.

Lock order everywhere: leader, jobs by id, sub-tasks by id, block_pass, pass. Each function that writes is one
transaction that begins with the fence.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.manifest import Manifest
from scheduler.blocks import read_in_order
from scheduler.carve import Carved, Frontier, OpenBlock, Piece, Range
from scheduler.cost import Rate, Rates
from scheduler.lifecycle import Refusal, Return
from scheduler.place import Demand
from scheduler.store.database import Database
from scheduler.store.leadership import fence, see_transport

Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A live lease, with what is needed to judge and to rescue it."""

    subtask: int
    attempt: int
    job: UUID
    worker: str
    boot: str
    predicted_s: float
    exclusive: bool
    #: The database's clock has passed its end.
    expired: bool
    #: Seconds until its end.
    left_s: float

    @property
    def key(self) -> Key:
        return (self.subtask, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A sub-task with its fresh lease: committed, not yet sent."""

    subtask: int
    attempt: int
    nonce: str
    worker: str
    job: str
    pass_number: int
    carved: Carved
    predicted_s: float


# -- what waits ------------------------------------------------------------------------------------

_DEMAND = text("""
    SELECT p.job_id, p.number, j.tenant_id, t.weight, j.priority, p.numerics, m.manifest,
           array_prepend(p.model_id, ARRAY(SELECT k.model_id FROM task k
                                            WHERE k.job_id = p.job_id AND k.pass_number = p.number)) AS model_ids,
           p.rows_waiting - coalesce(later.n_rows, 0) AS n_rows,
           p.bytes_waiting - coalesce(later.bytes, 0) AS bytes,
           row_number() OVER (ORDER BY j.created, j.id) AS age
      FROM pass p JOIN job j ON j.id = p.job_id JOIN tenant t ON t.id = j.tenant_id JOIN model m ON m.id = p.model_id
      LEFT JOIN LATERAL (SELECT sum(hi - lo) AS n_rows, CAST(sum(bytes) AS bigint) AS bytes FROM piece
                          WHERE piece.job_id = p.job_id AND piece.pass_number = p.number
                            AND not_before > clock_timestamp()) later ON true
     WHERE j.state = 'running' AND p.rows_waiting > 0
     ORDER BY j.priority, j.created, j.id, p.number LIMIT :limit""")
_UNDER_WAY = text("""
    SELECT s.job_id, j.tenant_id, count(*) AS n FROM lease l JOIN subtask s ON s.id = l.subtask_id
      JOIN job j ON j.id = s.job_id GROUP BY s.job_id, j.tenant_id""")


def demand(connection: Connection, limit: int = 500) -> list[Demand]:
    """Passes of running jobs with rows that may be carved now."""
    by_job: dict[UUID, int] = {}
    by_tenant: dict[UUID, int] = {}
    for row in connection.execute(_UNDER_WAY):
        by_job[row.job_id] = row.n
        by_tenant[row.tenant_id] = by_tenant.get(row.tenant_id, 0) + row.n
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
            model=Manifest.from_json(row.manifest),
            rows_waiting=row.n_rows,
            bytes_waiting=row.bytes,
            job_open=by_job.get(row.job_id, 0),
            tenant_open=by_tenant.get(row.tenant_id, 0),
        )
        for row in connection.execute(_DEMAND, {"limit": limit})
        if row.n_rows > 0
    ]


_PIECES = text("""
    SELECT p.id, p.block_number, p.lo, p.hi, p.bytes, p.tries, p.deaths, p.exclusive, bp.todo
      FROM piece p JOIN block_pass bp USING (job_id, pass_number, block_number)
     WHERE p.job_id = :job AND p.pass_number = :pass AND p.not_before <= clock_timestamp()
     ORDER BY p.block_number, p.lo LIMIT :limit""")
_OPEN_BLOCKS = text("""
    SELECT bp.block_number, bp.cursor, bp.n, bp.todo, b.row_order, b.lengths, b.n_rows, p.max_tokens
      FROM block_pass bp JOIN block b ON b.job_id = bp.job_id AND b.number = bp.block_number
      JOIN pass p ON p.job_id = bp.job_id AND p.number = bp.pass_number
     WHERE bp.job_id = :job AND bp.pass_number = :pass AND bp.state = 'ready' AND bp.cursor < bp.n
     ORDER BY bp.block_number LIMIT :limit""")


def frontier(connection: Connection, job: str, pass_number: int, limit: int = 16) -> Frontier:
    """The next pieces and open blocks of a pass, enough for one round of carving."""
    at = {"job": UUID(job), "pass": pass_number, "limit": limit}
    return Frontier(
        pieces=[
            Piece(
                row.id,
                Range(row.block_number, row.lo, row.hi, row.bytes),
                row.todo,
                tries=row.tries,
                deaths=row.deaths,
                exclusive=row.exclusive,
            )
            for row in connection.execute(_PIECES, at)
        ],
        blocks=[
            OpenBlock(
                row.block_number,
                row.cursor,
                row.n,
                row.todo,
                [0, *accumulate(read_in_order(row.row_order, row.lengths, row.n_rows, row.max_tokens))],
            )
            for row in connection.execute(_OPEN_BLOCKS, at)
        ],
    )


# -- leases ----------------------------------------------------------------------------------------

_HELD = text("""
    SELECT l.subtask_id, l.attempt, s.job_id, l.worker, l.boot, l.predicted_s, s.exclusive,
           l.until < clock_timestamp() AS expired, extract(epoch FROM l.until - clock_timestamp()) AS left_s
      FROM lease l JOIN subtask s ON s.id = l.subtask_id""")


def held(connection: Connection) -> list[Held]:
    """Every live lease."""
    return [
        Held(
            subtask=row.subtask_id,
            attempt=row.attempt,
            job=row.job_id,
            worker=row.worker,
            boot=row.boot,
            predicted_s=row.predicted_s,
            exclusive=row.exclusive,
            expired=row.expired,
            left_s=float(row.left_s),
        )
        for row in connection.execute(_HELD)
    ]


_RUNS = text("""
    SELECT l.worker, CASE WHEN j.tenant_id = :tenant THEN s.job_id END AS job,
           CASE WHEN j.tenant_id = :tenant THEN p.kind ELSE '' END AS pass_kind,
           count(*) AS subtasks, sum(s.n_rows) AS n_rows
      FROM lease l JOIN subtask s ON s.id = l.subtask_id JOIN job j ON j.id = s.job_id
      JOIN pass p ON p.job_id = s.job_id AND p.number = s.pass_number
     GROUP BY 1, 2, 3 ORDER BY 1, min(l.leased)""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Sub-tasks of one job and pass kind that a worker holds leases of."""

    #: None for jobs of other tenants, which are counted and not named.
    job: UUID | None
    pass_kind: str
    subtasks: int
    rows: int


def runs_by_worker(connection: Connection, tenant: UUID) -> dict[str, list[Run]]:
    """Who runs what now, by live leases: worker -> the tenant's jobs, oldest lease first, and all others."""
    found: dict[str, list[Run]] = {}
    for row in connection.execute(_RUNS, {"tenant": tenant}):
        run = Run(job=row.job, pass_kind=row.pass_kind, subtasks=row.subtasks, rows=int(row.n_rows))
        found.setdefault(row.worker, []).append(run)
    return found


_EXTEND = text("""
    UPDATE lease SET until = clock_timestamp() + make_interval(secs => :lease_s)
      FROM unnest(CAST(:subtasks AS bigint[]), CAST(:attempts AS smallint[])) k (subtask_id, attempt)
     WHERE lease.subtask_id = k.subtask_id AND lease.attempt = k.attempt""")
_EXTEND_ALL = text(
    "UPDATE lease SET until = greatest(until, clock_timestamp() + make_interval(secs => :lease_s))"
)


def extend(database: Database, epoch: int, keys: Sequence[Key], lease_s: float) -> None:
    """Keep these leases alive."""
    with database.transaction() as connection:
        fence(connection, epoch)
        connection.execute(
            _EXTEND, {"subtasks": [s for s, _ in keys], "attempts": [a for _, a in keys], "lease_s": lease_s}
        )


def extend_all(database: Database, epoch: int, lease_s: float) -> None:
    """A new leader has heard no beat yet: every live lease gets one more term."""
    with database.transaction() as connection:
        fence(connection, epoch)
        connection.execute(_EXTEND_ALL, {"lease_s": lease_s})


_RUNNING = text("SELECT id FROM job WHERE id = ANY(:jobs) AND state = 'running' ORDER BY id FOR SHARE")
_ADVANCE = text("""
    UPDATE block_pass SET cursor = k.hi
      FROM unnest(CAST(:blocks AS int[]), CAST(:los AS int[]), CAST(:his AS int[])) k (block, lo, hi)
     WHERE job_id = :job AND pass_number = :pass AND block_number = k.block AND cursor = k.lo AND state = 'ready'""")
_EAT = text("DELETE FROM piece WHERE id = ANY(:ids) AND job_id = :job AND pass_number = :pass")
_LESS_WAITS = text("""
    UPDATE pass SET rows_waiting = rows_waiting - :rows, bytes_waiting = bytes_waiting - :bytes
     WHERE job_id = :job AND number = :pass""")
_OPEN = text("""
    INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes, tries, deaths, exclusive,
                         attempts)
    VALUES (:job, :pass, :blocks, :los, :his, :sizes, :todo, :rows, :bytes, :tries, :deaths, :exclusive, 1)
    RETURNING id""")
_LEASE = text("""
    INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, device, predicted_s, until)
    VALUES (:subtask, 1, :worker, :boot, :nonce, :device, :predicted_s,
            clock_timestamp() + make_interval(secs => :lease_s))""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One carved sub-task on its way to a lease."""

    job: str
    pass_number: int
    worker: str
    boot: str
    device: str
    predicted_s: float
    carved: Carved


def lease(database: Database, epoch: int, cuts: Sequence[Cut], lease_s: float) -> list[Leased]:
    """Open these sub-tasks, each with a first lease, in one transaction.

    A cut whose job has ended, or whose rows were taken meanwhile, is left out: nothing of it is changed.
    """
    leased: list[Leased] = []
    with database.transaction() as connection:
        fence(connection, epoch)
        running = {
            str(row.id) for row in connection.execute(_RUNNING, {"jobs": sorted({UUID(c.job) for c in cuts})})
        }
        for cut in cuts:
            if cut.job not in running:
                continue
            with connection.begin_nested() as savepoint:
                if not _take_rows(connection, cut):
                    savepoint.rollback()
                    continue
                leased.append(_open(connection, cut, lease_s))
    return leased


def _take_rows(connection: Connection, cut: Cut) -> bool:
    """Move the rows out of the frontier; False where they are no longer there."""
    c = cut.carved
    at = {"job": UUID(cut.job), "pass": cut.pass_number}
    if c.pieces:
        moved = connection.execute(_EAT, {**at, "ids": list(c.pieces)}).rowcount
    else:
        moved = connection.execute(_ADVANCE, {**at, **_ranges(c.ranges)}).rowcount
    connection.execute(_LESS_WAITS, {**at, "rows": c.rows, "bytes": c.bytes})
    return bool(moved == (len(c.pieces) or len(c.ranges)))


def _open(connection: Connection, cut: Cut, lease_s: float) -> Leased:
    c = cut.carved
    subtask = connection.execute(
        _OPEN,
        {
            "job": UUID(cut.job),
            "pass": cut.pass_number,
            **_ranges(c.ranges),
            "sizes": [r.bytes for r in c.ranges],
            "todo": c.todo,
            "rows": c.rows,
            "bytes": c.bytes,
            "tries": c.tries,
            "deaths": c.deaths,
            "exclusive": c.exclusive,
        },
    ).scalar_one()
    nonce = secrets.token_hex(16)
    connection.execute(
        _LEASE,
        {
            "subtask": subtask,
            "worker": cut.worker,
            "boot": cut.boot,
            "nonce": nonce,
            "device": cut.device,
            "predicted_s": cut.predicted_s,
            "lease_s": lease_s,
        },
    )
    return Leased(
        subtask=subtask,
        attempt=1,
        nonce=nonce,
        worker=cut.worker,
        job=cut.job,
        pass_number=cut.pass_number,
        carved=c,
        predicted_s=cut.predicted_s,
    )


def _ranges(ranges: Sequence[Range]) -> dict[str, list[int]]:
    return {"blocks": [r.block for r in ranges], "los": [r.lo for r in ranges], "his": [r.hi for r in ranges]}


# -- rescue ----------------------------------------------------------------------------------------

LOCK_JOBS = text("SELECT id, state FROM job WHERE id = ANY(:jobs) ORDER BY id FOR NO KEY UPDATE")
_DROP_LEASES = text("""
    DELETE FROM lease USING unnest(CAST(:subtasks AS bigint[]), CAST(:attempts AS smallint[])) k (subtask_id, attempt)
     WHERE lease.subtask_id = k.subtask_id AND lease.attempt = k.attempt
 RETURNING lease.subtask_id, lease.worker""")
_LEFT_ALONE = text("""
    SELECT s.* FROM subtask s
     WHERE s.id = ANY(:ids) AND s.state = 'open' AND NOT EXISTS (SELECT 1 FROM lease l WHERE l.subtask_id = s.id)
     ORDER BY s.id FOR UPDATE""")
_CLOSE = text("""
    UPDATE subtask SET state = 'lost', closed = clock_timestamp(), worker = k.worker
      FROM unnest(CAST(:ids AS bigint[]), CAST(:workers AS text[])) k (id, worker) WHERE subtask.id = k.id""")
_COUNT_LOST = text("""
    UPDATE job SET attempts_lost = attempts_lost + k.n
      FROM (SELECT job_id, count(*) AS n FROM subtask WHERE id = ANY(:ids) GROUP BY job_id) k WHERE job.id = k.job_id""")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSubtask:
    """A sub-task that is about to close: what is needed to put its rows back, or to take its answers in."""

    id: int
    job: UUID
    pass_number: int
    ranges: tuple[Range, ...]
    todo: int
    tries: int
    deaths: int
    exclusive: bool


def close_lost(connection: Connection, lost: Sequence[Held]) -> list[OpenSubtask]:
    """Drop these leases and close the sub-tasks that have no other, each with the name of the worker that had it.

    The caller returns their rows, in the same transaction.
    """
    connection.execute(LOCK_JOBS, {"jobs": sorted({h.job for h in lost})})
    dropped = connection.execute(
        _DROP_LEASES, {"subtasks": [h.subtask for h in lost], "attempts": [h.attempt for h in lost]}
    )
    worker = {row.subtask_id: row.worker for row in dropped}
    closed = [open_subtask(row) for row in connection.execute(_LEFT_ALONE, {"ids": sorted(worker)})]
    ids = [s.id for s in closed]
    connection.execute(_CLOSE, {"ids": ids, "workers": [worker[i] for i in ids]})
    connection.execute(_COUNT_LOST, {"ids": ids})
    return closed


def open_subtask(row: Any) -> OpenSubtask:
    """A sub-task row as data."""
    return OpenSubtask(
        id=row.id,
        job=row.job_id,
        pass_number=row.pass_number,
        ranges=tuple(
            Range(b, lo, hi, size)
            for b, lo, hi, size in zip(row.blocks, row.los, row.his, row.sizes, strict=True)
        ),
        todo=row.todo,
        tries=row.tries,
        deaths=row.deaths,
        exclusive=row.exclusive,
    )


_PUT_BACK = text("""
    INSERT INTO piece (job_id, pass_number, block_number, lo, hi, bytes, tries, deaths, exclusive, not_before)
    SELECT :job, :pass, block, lo, hi, bytes, tries, deaths, exclusive,
           CASE WHEN after_s > 0 THEN clock_timestamp() + make_interval(secs => after_s) ELSE '-infinity' END
      FROM jsonb_to_recordset(CAST(:pieces AS jsonb)) AS k (block int, lo int, hi int, bytes bigint, tries smallint,
           deaths smallint, exclusive boolean, after_s float8)""")
_MORE_WAITS = text("""
    UPDATE pass SET rows_waiting = rows_waiting + :rows, bytes_waiting = bytes_waiting + :bytes
     WHERE job_id = :job AND number = :pass""")


def put_back(connection: Connection, job: UUID, pass_number: int, returns: Iterable[Return]) -> None:
    """Rows become pieces again, in the transaction that closed their sub-task."""
    pieces = [
        {
            "block": r.range.block,
            "lo": r.range.lo,
            "hi": r.range.hi,
            "bytes": r.range.bytes,
            "tries": r.tries,
            "deaths": r.deaths,
            "exclusive": r.exclusive,
            "after_s": r.after_s,
        }
        for r in returns
    ]
    if not pieces:
        return
    at = {"job": job, "pass": pass_number}
    connection.execute(_PUT_BACK, {**at, "pieces": json.dumps(pieces)})
    connection.execute(
        _MORE_WAITS,
        {**at, "rows": sum(p["hi"] - p["lo"] for p in pieces), "bytes": sum(p["bytes"] for p in pieces)},
    )


def record_transport(database: Database, epoch: int, identity: str) -> None:
    """Remember which Redis the leader has dealt with."""
    with database.transaction() as connection:
        fence(connection, epoch)
        see_transport(connection, epoch, identity)


# -- payloads --------------------------------------------------------------------------------------

_TEXTS = text("""
    SELECT b.number, b.payload, b.row_order FROM block b WHERE b.job_id = :job AND b.number = ANY(:blocks)""")
_PASS = text("""
    SELECT p.kind, p.numerics, p.max_tokens, p.input, m.manifest, j.tenant_id, j.priority
      FROM pass p JOIN model m ON m.id = p.model_id JOIN job j ON j.id = p.job_id
     WHERE p.job_id = :job AND p.number = :pass""")
_TASKS = text("""
    SELECT t.number, t.name, t.spec, m.manifest FROM task t JOIN model m ON m.id = t.model_id
     WHERE t.job_id = :job AND t.pass_number = :pass ORDER BY t.number""")


def block_texts(connection: Connection, job: str, blocks: Sequence[int]) -> dict[int, tuple[bytes, bytes]]:
    """Block number -> (payload, row order)."""
    rows = connection.execute(_TEXTS, {"job": UUID(job), "blocks": list(blocks)})
    return {row.number: (bytes(row.payload), bytes(row.row_order)) for row in rows}


def pass_of(connection: Connection, job: str, pass_number: int) -> tuple[Any, list[Any]] | None:
    """The pass and its tasks with their manifests; None where the job was removed."""
    at = {"job": UUID(job), "pass": pass_number}
    found = connection.execute(_PASS, at).first()
    return (found, list(connection.execute(_TASKS, at))) if found else None


# -- what was learned ------------------------------------------------------------------------------

_RATES = text("SELECT trunk, device, numerics, seconds_per_token, bytes_per_token FROM rate")
_REFUSALS = text("SELECT model_id, worker, boot, why FROM refusal")
_STALE = text("""
    SELECT id FROM job WHERE state = 'loading' AND touched < clock_timestamp() - make_interval(secs => :silent_s)""")
_OVERDUE = text("""
    SELECT id, to_char(deadline AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS at FROM job
     WHERE state IN ('loading', 'running') AND deadline < clock_timestamp()""")


def rates(connection: Connection) -> Rates:
    """All learned rates."""
    return Rates(
        {
            (row.trunk, row.device, row.numerics): Rate(row.seconds_per_token, row.bytes_per_token)
            for row in connection.execute(_RATES)
        }
    )


def refusals(connection: Connection) -> list[Refusal]:
    """Everything that could not be loaded where."""
    return [Refusal(row.model_id, row.worker, row.boot, row.why) for row in connection.execute(_REFUSALS)]


def overdue(connection: Connection, silent_s: float) -> dict[UUID, str]:
    """Jobs whose deadline passed, or whose upload fell silent, with the reason they fail for."""
    found: dict[UUID, str] = {}
    for row in connection.execute(_STALE, {"silent_s": silent_s}):
        found[row.id] = f"the upload was abandoned: no part for {silent_s:.0f} s"
    for row in connection.execute(_OVERDUE):
        found[row.id] = f"its deadline passed: {row.at}; what was done by then can be read"
    return found
