"""Outcomes become cells, cells become sealed columns, and a job completes: all in one transaction.

Fence first (an outcome counts only under a live lease of an open sub-task of a running job), then append,
count and seal. Reading an entry twice, or two aggregators at once, is harmless: the sub-task is closed by then.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, text

from motet.columns import CellError, Column, Kind
from motet.manifest import Manifest
from motet.wire import Outcome, Usage, pack, unpack
from scheduler.blocks import row_order
from scheduler.cost import LEARNING_RATE
from scheduler.lifecycle import MAX_TRIES, GivenUp, Return, backoff_s, failed, part, runs
from scheduler.merge import (
    BadColumn,
    Part,
    array_of,
    check,
    cut,
    errors_column,
    mark_returned,
    merge,
    returned_rows,
)
from scheduler.store.database import JOB, WORK, Database, notify
from scheduler.store.leases import LOCK_JOBS, Orphan, orphan_of, put_back


@dataclass(frozen=True, slots=True)
class TaskShape:
    """What an outcome's column must look like to be a task's answer."""

    number: int
    name: str
    kind: Kind
    n_labels: int
    #: Of its vectors, where it has any.
    dim: int
    dtype: str
    deterministic: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Final or returned answers for [lo, hi) of one block's order: one column per task number."""

    job: UUID
    pass_number: int
    block: int
    subtask: int
    lo: int
    hi: int
    columns: Mapping[int, Column]
    #: Rows of it that are answered for good.
    final: int


@dataclass
class Recorded:
    """What one transaction of the aggregator did, for its log and its metrics."""

    accepted: int = 0
    #: Outcomes without a live lease: stale, doubled, forged, or of an ended job.
    dropped: int = 0
    failed: int = 0
    rows: int = 0
    sealed: int = 0

    def add(self, other: Recorded) -> None:
        """Count another transaction with this one."""
        for name in ("accepted", "dropped", "failed", "rows", "sealed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


_JOBS_OF = text("SELECT DISTINCT job_id FROM subtask WHERE id = ANY(:ids)")
_LIVE = text("""
    SELECT s.*, l.attempt, l.nonce, l.worker AS holder, l.boot, l.device, p.numerics,
           CASE WHEN m.trunk = '' THEN m.digest ELSE m.trunk END AS trunk
      FROM subtask s JOIN lease l ON l.subtask_id = s.id JOIN job j ON j.id = s.job_id
      JOIN pass p ON p.job_id = s.job_id AND p.number = s.pass_number JOIN model m ON m.id = p.model_id
     WHERE s.id = ANY(:ids) AND s.state = 'open' AND j.state = 'running'
     ORDER BY s.id FOR UPDATE OF s""")
_SHAPES = text("""
    SELECT t.number, t.name, t.spec, cardinality(t.labels) AS n_labels, m.manifest FROM task t JOIN model m ON m.id = t.model_id
     WHERE t.job_id = :job AND t.pass_number = :pass ORDER BY t.number""")
_CLOSE = text("""
    UPDATE subtask SET state = :state, closed = clock_timestamp(), worker = :worker, busy_s = :busy_s, tokens = :tokens
     WHERE id = :id""")
_DROP = text("DELETE FROM lease WHERE subtask_id = :id")
_REFUSE = text("""
    INSERT INTO refusal (model_id, worker, boot, why)
    SELECT id, :worker, :boot, :why FROM model WHERE digest = :digest ORDER BY id
    ON CONFLICT (model_id, worker) DO UPDATE SET boot = excluded.boot, why = excluded.why, at = clock_timestamp()""")
_LEARN = text(f"""
    INSERT INTO rate AS r (trunk, device, numerics, seconds_per_token, bytes_per_token, observations)
    VALUES (:trunk, :device, :numerics, :seconds, :ratio, :n)
    ON CONFLICT (trunk, device, numerics) DO UPDATE SET
      seconds_per_token = r.seconds_per_token + {LEARNING_RATE} * (excluded.seconds_per_token - r.seconds_per_token),
      bytes_per_token = r.bytes_per_token + {LEARNING_RATE} * (excluded.bytes_per_token - r.bytes_per_token),
      observations = r.observations + excluded.observations, updated = clock_timestamp()""")
_COUNT = text("""
    UPDATE job SET cells_ok = cells_ok + :ok, cells_error = cells_error + :error, version = version + 1,
           tokens = tokens + :tokens, computed_tokens = computed_tokens + :computed, text_bytes = text_bytes + :bytes,
           busy_s = busy_s + :busy_s, subtasks = subtasks + :subtasks,
           started = coalesce(started, clock_timestamp())
     WHERE id = :job""")

#: Outcomes shorter than this teach nothing about speed.
_LEARN_FROM_TOKENS = 128
#: Failures that say nothing about the rows: what was asked never reached the engine.
_BLAMELESS = frozenset({"cannot_fetch"})


def record(database: Database, outcomes: Sequence[Outcome]) -> Recorded:
    """Take in these outcomes, in one transaction. Acknowledge their entries only when this has returned."""
    done = Recorded()
    with database.transaction() as connection:
        ids = sorted({o.subtask for o in outcomes})
        jobs = [row.job_id for row in connection.execute(_JOBS_OF, {"ids": ids})]
        connection.execute(LOCK_JOBS, {"jobs": sorted(jobs)})
        live = {(row.id, row.attempt): row for row in connection.execute(_LIVE, {"ids": ids})}
        answers: list[Answer] = []
        closed: set[int] = set()
        shapes: dict[tuple[UUID, int], list[TaskShape]] = {}
        totals: dict[UUID, Counter[str]] = defaultdict(Counter)
        learned = _Learned()
        for outcome in outcomes:
            row = live.get((outcome.subtask, outcome.attempt))
            if row is None or outcome.subtask in closed or row.nonce != outcome.nonce:
                done.dropped += 1
                continue
            closed.add(outcome.subtask)
            subtask = orphan_of(row)
            where = (subtask.job, subtask.pass_number)
            if where not in shapes:
                shapes[where] = _shapes(connection, *where)
            answers += _take_in(
                connection, outcome, subtask, row, shapes[where], totals[subtask.job], learned, done
            )
        done.rows += sum(a.final for a in answers)
        for job, total in totals.items():
            _count(connection, job, total, [a for a in answers if a.job == job])
        done.sealed += append(connection, answers, shapes)
        # Last, and in one order: these few rows are shared by all aggregators.
        learned.store(connection)
        for job in totals:
            notify(connection, JOB, str(job))
        if totals:
            notify(connection, WORK)
    return done


def _shapes(connection: Connection, job: UUID, pass_number: int) -> list[TaskShape]:
    found = []
    for row in connection.execute(_SHAPES, {"job": job, "pass": pass_number}):
        manifest = Manifest.from_json(row.manifest)
        found.append(
            TaskShape(
                row.number,
                row.name,
                manifest.answers,
                row.n_labels,
                manifest.dim,
                row.spec.get("dtype", "fp32"),
                manifest.deterministic,
            )
        )
    return found


def _take_in(
    connection: Connection,
    outcome: Outcome,
    subtask: Orphan,
    row: Any,
    shapes: Sequence[TaskShape],
    total: Counter[str],
    learned: _Learned,
    done: Recorded,
) -> list[Answer]:
    """Close the sub-task by what its outcome says; its rows become answers or pieces."""
    asked = [s for s in shapes if subtask.todo >> s.number & 1]
    answers: list[Answer] = []
    returns: list[Return] = []
    error = outcome.error or ("failed", "the attempt failed")
    verdict = outcome.verdict
    if verdict == "done":
        try:
            answers, returns = _answered(outcome, subtask, asked)
        except BadColumn as bad:
            verdict, error = "failed", ("bad_outcome", str(bad))
    if verdict == "failed":
        done.failed += 1
        if outcome.refused:
            learned.refusals[outcome.refused, row.holder] = (row.boot, error[1])
        returns, given_up = failed(
            subtask.ranges,
            tries=subtask.tries,
            deaths=subtask.deaths,
            exclusive=subtask.exclusive,
            error=error[0],
            blameless=error[0] in _BLAMELESS or bool(outcome.refused),
        )
        answers = give_up(subtask.job, subtask.pass_number, subtask.id, given_up, asked)
    else:
        done.accepted += 1
        learned.see(row, outcome.usage)
    u = outcome.usage
    connection.execute(
        _CLOSE,
        {"id": subtask.id, "state": verdict, "worker": row.holder, "busy_s": u.busy_s, "tokens": u.tokens},
    )
    connection.execute(_DROP, {"id": subtask.id})
    put_back(connection, subtask.job, subtask.pass_number, returns)
    total.update(tokens=u.tokens, computed=u.computed_tokens, bytes=u.text_bytes, subtasks=1)
    total["busy_us"] += int(u.busy_s * 1e6)
    return answers


def _answered(
    outcome: Outcome, subtask: Orphan, asked: Sequence[TaskShape]
) -> tuple[list[Answer], list[Return]]:
    """A done outcome, cut by block. Raises BadColumn. Rows with a retriable error return, until their tries are spent."""
    n_rows = sum(map(len, subtask.ranges))
    columns: dict[int, Column] = {}
    for shape in asked:
        column = outcome.columns.get(shape.name)
        if column is None:
            raise BadColumn(f"no column for task {shape.name}")
        check(
            column, kind=shape.kind, n_rows=n_rows, n_labels=shape.n_labels, dim=shape.dim, dtype=shape.dtype
        )
        columns[shape.number] = column
    again = returned_rows(list(columns.values()))
    if subtask.tries + 1 >= MAX_TRIES:
        again = again[:0]
    columns = {number: mark_returned(c, again) for number, c in columns.items()}
    answers: list[Answer] = []
    returns: list[Return] = []
    start = 0
    for r in subtask.ranges:
        end = start + len(r)
        mine = [int(i) - start for i in again if start <= i < end]
        cells = {number: cut(c, start, end) for number, c in columns.items()}
        answers.append(
            Answer(
                subtask.job, subtask.pass_number, r.block, subtask.id, r.lo, r.hi, cells, len(r) - len(mine)
            )
        )
        returns.extend(
            Return(
                part(r, r.lo + lo, r.lo + hi),
                tries=subtask.tries + 1,
                deaths=subtask.deaths,
                exclusive=subtask.exclusive,
                after_s=backoff_s(subtask.tries + 1),
            )
            for lo, hi in runs(mine)
        )
        start = end
    return answers, returns


def give_up(
    job: UUID, pass_number: int, subtask: int, rows: Iterable[GivenUp], asked: Sequence[TaskShape]
) -> list[Answer]:
    """Rows whose cells become errors, as answers."""
    return [
        Answer(
            job,
            pass_number,
            r.block,
            subtask,
            r.position,
            r.position + 1,
            {s.number: errors_column(s.kind, [CellError(r.error, r.message)]) for s in asked},
            1,
        )
        for r in rows
    ]


def record_given_up(connection: Connection, orphan: Orphan, rows: Sequence[GivenUp]) -> None:
    """Write error cells for rows that the dispatcher gives up, in the transaction that closed their sub-task."""
    shapes = _shapes(connection, orphan.job, orphan.pass_number)
    asked = [s for s in shapes if orphan.todo >> s.number & 1]
    answers = give_up(orphan.job, orphan.pass_number, orphan.id, rows, asked)
    _count(connection, orphan.job, Counter(), answers)
    append(connection, answers, {(orphan.job, orphan.pass_number): shapes})
    notify(connection, JOB, str(orphan.job))


@dataclass
class _Learned:
    """What the outcomes of one transaction say about devices, folded."""

    #: (trunk, device, numeric class) -> seconds, tokens, bytes, outcomes.
    rates: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    #: (digest of a model, worker) -> boot, why.
    refusals: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def see(self, row: Any, u: Usage) -> None:
        if u.tokens < _LEARN_FROM_TOKENS or u.busy_s <= 0:
            return
        sums = self.rates.setdefault((row.trunk, row.device, row.numerics), [0.0, 0.0, 0.0, 0.0])
        for i, amount in enumerate((u.busy_s, u.tokens, u.text_bytes, 1)):
            sums[i] += amount

    def store(self, connection: Connection) -> None:
        for (trunk, device, numerics), (seconds, tokens, size, n) in sorted(self.rates.items()):
            connection.execute(
                _LEARN,
                {
                    "trunk": trunk,
                    "device": device,
                    "numerics": numerics,
                    "seconds": seconds / tokens,
                    "ratio": max(0.1, size / tokens),
                    "n": int(n),
                },
            )
        for (digest, worker), (boot, why) in sorted(self.refusals.items()):
            connection.execute(_REFUSE, {"digest": digest, "worker": worker, "boot": boot, "why": why})


def _count(connection: Connection, job: UUID, total: Counter[str], answers: Sequence[Answer]) -> None:
    """Count what is inserted, never what was sent."""
    ok = error = 0
    for a in answers:
        for column in a.columns.values():
            n_ok, n_error, _, _ = column.counts()
            ok, error = ok + n_ok, error + n_error
    connection.execute(
        _COUNT,
        {
            "job": job,
            "ok": ok,
            "error": error,
            "tokens": total["tokens"],
            "computed": total["computed"],
            "bytes": total["bytes"],
            "busy_s": total["busy_us"] / 1e6,
            "subtasks": total["subtasks"],
        },
    )


# -- cells, sealing, completion --------------------------------------------------------------------

_DONE = text("""
    UPDATE block_pass SET done = done + :final
     WHERE job_id = :job AND pass_number = :pass AND block_number = :block RETURNING done = n AS full, todo""")
_CELLS = text("""
    INSERT INTO cells (job_id, pass_number, block_number, subtask_id, lo, hi, columns)
    VALUES (:job, :pass, :block, :subtask, :lo, :hi, :columns)""")
_TAKE_CELLS = text("""
    DELETE FROM cells WHERE job_id = :job AND pass_number = :pass AND block_number = :block
    RETURNING lo, hi, columns""")
_BLOCK = text("SELECT n_rows, row_order, bad, keys FROM block WHERE job_id = :job AND number = :block")
_TENANT = text("SELECT tenant_id FROM job WHERE id = :job")
# A column with this key may be there already (the same work done twice at once): then ours is kept without one.
_SEALED = text("""
    INSERT INTO sealed_column (tenant_id, key, kind, n_rows, n_ok, n_error, n_skipped, status, errors, offsets, codes,
                               scores, all_scores, numbers, starts, ends, texts, vectors, dim, dtype)
    SELECT :tenant, CASE WHEN EXISTS (SELECT 1 FROM sealed_column WHERE tenant_id = :tenant AND key = :key)
                         THEN NULL ELSE CAST(:key AS bytea) END,
           :kind, :n_rows, :n_ok, :n_error, :n_skipped, :status, CAST(:errors AS jsonb), CAST(:offsets AS int4[]),
           CAST(:codes AS int2[]), CAST(:scores AS real[]), CAST(:all_scores AS real[]),
           CAST(:numbers AS double precision[]), CAST(:starts AS int4[]), CAST(:ends AS int4[]), :texts, :vectors,
           :dim, :dtype
    ON CONFLICT (tenant_id, key) WHERE key IS NOT NULL DO NOTHING
    RETURNING id""")
_SHOW = text("""
    INSERT INTO block_column (job_id, block_number, task_number, column_id) VALUES (:job, :block, :task, :column)""")
_SEAL = text("""
    UPDATE block_pass SET state = 'sealed' WHERE job_id = :job AND pass_number = :pass AND block_number = :block""")
_PASS_SEALED = text("""
    UPDATE block SET passes_open = passes_open - 1 WHERE job_id = :job AND number = :block RETURNING passes_open""")
_BLOCK_DONE = text("""
    WITH j AS (UPDATE job SET blocks_done = blocks_done + 1 WHERE id = :job RETURNING blocks_done)
    UPDATE block SET done_number = j.blocks_done FROM j WHERE job_id = :job AND number = :block""")
_SUCCEED = text("""
    UPDATE job SET state = 'succeeded', finished = clock_timestamp(), version = version + 1
     WHERE id = ANY(:jobs) AND state = 'running' AND blocks_done = n_blocks
       AND cells_ok + cells_error + cells_skipped = n_rows * n_tasks""")
_STORED_ARRAYS = {"all": "all_scores", "bytes": "texts"}


def append(
    connection: Connection, answers: Sequence[Answer], shapes: Mapping[tuple[UUID, int], Sequence[TaskShape]]
) -> int:
    """Store answers; seal every (block, pass) that is thereby full; complete jobs. The number of sealed columns."""
    by_place: dict[tuple[UUID, int, int], list[Answer]] = defaultdict(list)
    for a in answers:
        by_place[a.job, a.pass_number, a.block].append(a)
    kept: list[dict[str, Any]] = []
    sealed = 0
    finished: set[UUID] = set()
    for (job, pass_number, block), here in sorted(by_place.items()):
        at = {"job": job, "pass": pass_number, "block": block}
        state = connection.execute(_DONE, {**at, "final": sum(a.final for a in here)}).one()
        if not state.full:
            kept.extend(
                {**at, "subtask": a.subtask, "lo": a.lo, "hi": a.hi, "columns": _packed(a)} for a in here
            )
            continue
        asked = [s for s in shapes[job, pass_number] if state.todo >> s.number & 1]
        sealed += _seal(connection, at, asked, here)
        finished.add(job)
    if kept:
        connection.execute(_CELLS, kept)
    if finished:
        connection.execute(_SUCCEED, {"jobs": sorted(finished)})
    return sealed


def _seal(
    connection: Connection, at: Mapping[str, Any], asked: Sequence[TaskShape], last: Sequence[Answer]
) -> int:
    """Merge all answers of a (block, pass) into one column per task; ``last`` was never stored on its own."""
    block = connection.execute(_BLOCK, at).one()
    tenant = connection.execute(_TENANT, at).scalar_one()
    order = np.array(row_order(bytes(block.row_order)), dtype=np.int64)
    pieces = [(a.lo, a.hi, a.columns) for a in last]
    pieces += [(row.lo, row.hi, _unpacked(bytes(row.columns))) for row in connection.execute(_TAKE_CELLS, at)]
    absent = {int(i): CellError(str(e[0]), str(e[1])) for i, e in block.bad.items()}
    for shape in asked:
        parts = [Part(order[lo:hi], columns[shape.number]) for lo, hi, columns in pieces]
        column = merge(shape.kind, block.n_rows, parts, absent=absent)
        key = block.keys[shape.number] if shape.deterministic and shape.number < len(block.keys) else None
        stored = _store(connection, tenant, column, key)
        connection.execute(_SHOW, {**at, "task": shape.number, "column": stored})
    connection.execute(_SEAL, at)
    if connection.execute(_PASS_SEALED, at).scalar_one() == 0:
        connection.execute(_BLOCK_DONE, at)
    return len(asked)


#: Errors that the same input will always meet; a column with any other is not offered for reuse.
_LASTING = frozenset({"too_long", "bad_row"})


def _store(connection: Connection, tenant: UUID, column: Column, key: bytes | None) -> int:
    if any(e.error not in _LASTING for e in column.errors.values()):
        key = None
    values = sealed_values(column)
    stored = connection.execute(_SEALED, {**values, "tenant": tenant, "key": key}).scalar()
    if stored is None:
        # Another transaction sealed the same key between our look and our insert.
        stored = connection.execute(_SEALED, {**values, "tenant": tenant, "key": None}).scalar_one()
    return int(stored)


def sealed_values(column: Column) -> dict[str, Any]:
    """A column as values for the table sealed_column: typed arrays, sparse errors, no status where all is ok."""
    ok, error, skipped, _ = column.counts()
    values: dict[str, Any] = dict.fromkeys(
        ("offsets", "codes", "scores", "all_scores", "numbers", "starts", "ends", "texts", "vectors")
    )
    for name, raw in column.arrays.items():
        if name in ("bytes", "vectors"):
            values[_STORED_ARRAYS.get(name, name)] = raw
        elif raw or name == "offsets":
            values[_STORED_ARRAYS.get(name, name)] = array_of(column, name).tolist()
    return {
        **values,
        "kind": column.kind,
        "n_rows": len(column),
        "n_ok": ok,
        "n_error": error,
        "n_skipped": skipped,
        "status": column.status if any(column.status) else None,
        "errors": json.dumps(
            {str(i): {"error": e.error, "message": e.message} for i, e in column.errors.items()}
        )
        if column.errors
        else None,
        "dim": column.dim,
        "dtype": column.dtype,
    }


def _packed(answer: Answer) -> bytes:
    return pack({number: c.to_wire() for number, c in answer.columns.items()})


def _unpacked(raw: bytes) -> dict[int, Column]:
    return {int(number): Column.from_wire(wire) for number, wire in unpack(raw).items()}
