"""Answers become cells, cells become sealed columns, and a job completes.

All functions work inside the caller's transaction, which holds the locks of the jobs concerned.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, text

from motet.columns import CellError, Column, Kind
from motet.wire import pack, unpack
from scheduler.blocks import row_order
from scheduler.merge import Part, array_of, merge


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
        stored = store_column(connection, tenant, column, key)
        connection.execute(_SHOW, {**at, "task": shape.number, "column": stored})
    connection.execute(_SEAL, at)
    if connection.execute(_PASS_SEALED, at).scalar_one() == 0:
        connection.execute(_BLOCK_DONE, at)
    return len(asked)


#: Errors that the same input will always meet; a column with any other is not offered for reuse.
_LASTING = frozenset({"too_long", "bad_row"})


def store_column(connection: Connection, tenant: UUID, column: Column, key: bytes | None) -> int:
    """Store a sealed column, under its reuse key where it may be reused. Its id."""
    if any(e.error not in _LASTING for e in column.errors.values()):
        key = None
    values = _values(column)
    stored = connection.execute(_SEALED, {**values, "tenant": tenant, "key": key}).scalar()
    if stored is None:
        # Another transaction sealed the same key between our look and our insert.
        stored = connection.execute(_SEALED, {**values, "tenant": tenant, "key": None}).scalar_one()
    return int(stored)


def _values(column: Column) -> dict[str, Any]:
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
