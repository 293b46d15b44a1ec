"""Answers become cells, cells become sealed columns, and a job completes.

All functions work inside the caller's transaction, which holds the locks of the jobs concerned.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any
from uuid import UUID

import numpy as np
from cachetools import LRUCache, cached
from sqlalchemy import Connection, text

from motet.protocol import traces
from motet.protocol.columns import LAYOUT, CellError, Column, Kind
from motet.protocol.envelope import unwrap, wrap
from motet.protocol.manifest import Manifest, column_kind
from motet.states import Skip, State
from motet.tasks import deciding_fields, stored_task
from scheduler.blocks import askable, row_order
from scheduler.merge import AnswersPart, Positions, array_of, mark_returned, merge
from scheduler.store.arrays import Elements
from scheduler.store.database import Asked, together
from scheduler.store.dependence import absents, left_out, release, skips
from scheduler.store.endings import succeed, succeeded, succeeding
from scheduler.store.events import tell_matches
from scheduler.store.places import PLACES, Place, at_places


@dataclass(frozen=True, slots=True)
class TaskShape:
    """What an outcome's column must look like to be a task's answer."""

    number: int
    name: str
    #: The fields of a row that decide whether it can be asked.
    reads: tuple[str, ...]
    kind: Kind
    n_labels: int
    #: Of its vectors, where it has any.
    dim: int
    dtype: str
    deterministic: bool


_SHAPES = text("""
    SELECT t.number, t.name, t.kind, t.spec, cardinality(t.labels) AS n_labels, m.manifest,
           coalesce(CAST(l.manifest->>'deterministic' AS boolean), true) AS steady,
           ARRAY(SELECT o.name FROM task o WHERE o.job_id = t.job_id) AS names
      FROM task t JOIN model m ON m.id = t.model_id
      JOIN pass p ON p.job_id = t.job_id AND p.number = t.pass_number JOIN model l ON l.id = p.model_id
     WHERE t.job_id = :job AND t.pass_number = :pass ORDER BY t.number""")


@cached(LRUCache(1024), key=lambda _, job, pass_number: (job, pass_number), lock=Lock())
def task_shapes(connection: Connection, job: UUID, pass_number: int) -> list[TaskShape]:
    """The tasks of a pass, by number. They never change: those of passes that were asked for lately are not read again."""
    found = []
    for row in connection.execute(_SHAPES, {"job": job, "pass": pass_number}):
        manifest = Manifest.from_json(row.manifest)
        found.append(
            TaskShape(
                row.number,
                row.name,
                deciding_fields(row.name, stored_task(row.spec), row.names),
                column_kind(row.spec, manifest.answers),
                row.n_labels,
                manifest.vector_dim(row.spec),
                row.spec.get("dtype", "fp32"),
                manifest.deterministic and row.steady,
            )
        )
    return found


def asked_for(shapes: Sequence[TaskShape], todo: int) -> list[TaskShape]:
    """Those that are to be computed."""
    return [shape for shape in shapes if todo >> shape.number & 1]


@dataclass(frozen=True, slots=True)
class BlockAnswers:
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


_HERE = "p.job_id = k.job AND p.pass_number = k.pass AND p.block_number = k.block"
_DONE = text(f"""
    UPDATE block_pass p SET done = p.done + k.final
      FROM (SELECT * FROM ROWS FROM ({PLACES}, unnest(CAST(:finals AS int[])))) k (job, pass, block, final)
     WHERE {_HERE} RETURNING p.job_id, p.pass_number, p.block_number, p.done = p.n AS full, p.todo,
           EXISTS (SELECT FROM cells c WHERE c.job_id = p.job_id AND c.pass_number = p.pass_number
                      AND c.block_number = p.block_number) AS begun""")
_CELLS = text("""
    INSERT INTO cells (job_id, pass_number, block_number, subtask_id, lo, hi, columns)
    VALUES (:job, :pass, :block, :subtask, :lo, :hi, :columns)""")
_TAKE_CELLS = text(f"""
    DELETE FROM cells p USING {PLACES} k (job, pass, block) WHERE {_HERE}
    RETURNING p.job_id, p.pass_number, p.block_number, p.lo, p.hi, p.columns""")
# Of places that are full.
_BLOCKS = text(f"""
    SELECT b.job_id, b.number, b.n_rows, b.row_order, b.bad, b.bad_fields, b.keys, b.passes_open, j.tenant_id, j.state,
           j.notify_when IS NOT NULL AS notifies, j.notify_needs,
           EXISTS (SELECT FROM pass o
                    WHERE o.job_id = b.job_id AND (o.needs <> '{{}}' OR o.condition IS NOT NULL)) AS depends
      FROM {PLACES} k (job, pass, block) JOIN block_pass p ON {_HERE} AND p.done = p.n
      JOIN block b ON b.job_id = k.job AND b.number = k.block JOIN job j ON j.id = b.job_id""")
_PARTLY_BAD = text(f"""
    SELECT k.job, k.pass AS pass_, k.block, b.bad, b.bad_fields, coalesce(p.row_order, b.row_order) AS row_order
      FROM {PLACES} k (job, pass, block) JOIN block_pass p ON {_HERE}
      JOIN block b ON b.job_id = k.job AND b.number = k.block AND b.bad_fields <> '{{}}'""")
_SEALED = text(f"""
    WITH shown AS (
      INSERT INTO block_column (job_id, block_number, task_number, column_id)
      SELECT * FROM unnest(CAST(:shown_jobs AS uuid[]), CAST(:shown_blocks AS int[]), CAST(:shown_tasks AS smallint[]),
                           CAST(:shown_columns AS bigint[]))),
    sealed AS (UPDATE block_pass p SET state = 'sealed' FROM {PLACES} k (job, pass, block) WHERE {_HERE}),
    k AS MATERIALIZED (
      SELECT * FROM unnest(CAST(:of_jobs AS uuid[]), CAST(:numbers AS int[]), CAST(:opens AS smallint[]),
                           CAST(:nths AS int[])) k (job, number, passes_open, nth)),
    counted AS (
      UPDATE job SET blocks_done = job.blocks_done + f.n
        FROM (SELECT job, CAST(count(*) AS int) AS n FROM k WHERE nth IS NOT NULL GROUP BY job) f
       WHERE job.id = f.job RETURNING job.id, job.blocks_done - f.n AS before)
    UPDATE block SET passes_open = k.passes_open, done_number = counted.before + k.nth,
           done_at = CASE WHEN k.nth IS NOT NULL THEN clock_timestamp() END
      FROM k LEFT JOIN counted ON counted.id = k.job WHERE block.job_id = k.job AND block.number = k.number""")


@dataclass(frozen=True, slots=True)
class PartlyBad:
    """Of a (block, pass) whose tasks read different fields: the rows that only some of its tasks can be asked."""

    order: Sequence[int]
    #: Task number -> the rows of the block whose value it should have read is bad.
    rows: Mapping[int, Collection[int]]

    def positions(self, task: int, lo: int, hi: int) -> Positions:
        """Those rows of a task, counted from ``lo`` of the order."""
        return np.flatnonzero([row in self.rows[task] for row in self.order[lo:hi]])


def partly_bad(
    connection: Connection,
    places: Collection[Place],
    shapes: Mapping[tuple[UUID, int], Sequence[TaskShape]],
) -> dict[Place, PartlyBad]:
    """Those of these places in which a row can be bad for one task and good for another."""
    mixed = {at for at, tasks in shapes.items() if len({frozenset(task.reads) for task in tasks}) > 1}
    asked = sorted(place for place in set(places) if place[:2] in mixed)
    found = connection.execute(_PARTLY_BAD, at_places(asked)).all() if asked else ()
    return {
        (row.job, row.pass_, row.block): PartlyBad(
            row_order(bytes(row.row_order)),
            absents(row, {shape.number: shape.reads for shape in shapes[row.job, row.pass_]}),
        )
        for row in found
    }


def without_bad(answers: Sequence[BlockAnswers], bad: Mapping[Place, PartlyBad]) -> list[BlockAnswers]:
    """The answers, but for those of tasks to rows whose value they should have read is bad.

    Tasks of one pass may read different fields. Where only one of them is bad in a row, all are asked; the cells of
    those that read it were counted as errors when the row landed, and are sealed as such.
    """

    def kept(a: BlockAnswers) -> BlockAnswers:
        here = bad.get((a.job, a.pass_number, a.block))
        if here is None:
            return a
        columns = {n: mark_returned(c, here.positions(n, a.lo, a.hi)) for n, c in a.columns.items()}
        return replace(a, columns=columns)

    return [kept(a) for a in answers]


def append(
    connection: Connection,
    answers: Sequence[BlockAnswers],
    shapes: Mapping[tuple[UUID, int], Sequence[TaskShape]],
    *,
    first: Sequence[Asked] = (),
    last: Sequence[Asked] = (),
) -> int:
    """Store answers; seal every (block, pass) that is thereby full; complete jobs. The number of sealed columns.

    ``first``, ``last``: statements without an answer that share its round trips.
    """
    if not answers:
        together(connection, *first, *last)
        return 0
    by_place: dict[Place, list[BlockAnswers]] = defaultdict(list)
    for a in answers:
        by_place[a.job, a.pass_number, a.block].append(a)
    finals = [sum(a.final for a in here) for here in by_place.values()]
    at = at_places(list(by_place))
    most = sum(len(shapes[place[:2]]) for place in by_place)
    *_, counted, read, ids = together(
        connection, *first, (_DONE, {**at, "finals": finals}), (_BLOCKS, at), (_NEXT_IDS, {"n": most})
    )
    assert len(counted) == len(by_place), "answers for a block that is not there"
    full = sorted((p.job_id, p.pass_number, p.block_number, p.todo) for p in counted if p.full)
    asked = {(job, number, block): asked_for(shapes[job, number], todo) for job, number, block, todo in full}
    kept = [_cells(a) for place, here in by_place.items() if place not in asked for a in here]
    store: list[Asked] = [(_CELLS, cells) for cells in kept]
    if not asked:
        together(connection, *store, *last)
        return 0
    begun = [(p.job_id, p.pass_number, p.block_number) for p in counted if p.full and p.begun]
    blocks = _by_place(read)
    running = {job for job, _, number in asked if blocks[job, number].state == State.RUNNING}
    ids = [row.id for row in ids]
    return _seal(connection, asked, by_place, begun, blocks, ids, [*store, *last], may_succeed=running)


def settle(connection: Connection, blocks: Collection[tuple[UUID, int]]) -> int:
    """Release what waits in these blocks for what is sealed by now; seal what has no row left, and so on down.

    The number of columns that this sealed.
    """
    emptied = release(connection, blocks)
    if not emptied:
        return 0
    shapes = {at: task_shapes(connection, *at) for at in sorted({e.place[:2] for e in emptied})}
    asked = {e.place: asked_for(shapes[e.place[:2]], e.todo) for e in emptied}
    read, ids = together(
        connection, (_BLOCKS, at_places(list(asked))), (_NEXT_IDS, {"n": sum(map(len, asked.values()))})
    )
    return _seal(connection, asked, {}, (), _by_place(read), [row.id for row in ids])


def _cells(a: BlockAnswers) -> dict[str, Any]:
    at = {"job": a.job, "pass": a.pass_number, "block": a.block, "subtask": a.subtask}
    return {**at, "lo": a.lo, "hi": a.hi, "columns": _packed(a)}


def _seal(
    connection: Connection,
    asked: Mapping[Place, Sequence[TaskShape]],
    last: Mapping[Place, Sequence[BlockAnswers]],
    begun: Sequence[Place],
    blocks: Mapping[tuple[UUID, int], Any],
    ids: Sequence[int],
    beside: Sequence[Asked] = (),
    *,
    may_succeed: Collection[UUID] = (),
) -> int:
    """Merge all answers of these full places into one column per task; ``last`` were never stored on their own,
    others were in the places that are ``begun``.

    ``blocks``: those of these places; ``ids``: fresh ones, enough for all columns; ``beside``: statements that share the
    last round trip. Then whatever waited for these columns is released, and those jobs succeed that ``may_succeed`` and
    have every cell. The number of columns sealed.
    """
    places = list(asked)
    pieces: dict[Place, list[_Piece]] = {
        p: [(a.lo, a.hi, a.columns) for a in last.get(p, ())] for p in places
    }
    for row in connection.execute(_TAKE_CELLS, at_places(begun)) if begun else ():
        pieces[row.job_id, row.pass_number, row.block_number].append(
            (row.lo, row.hi, _unpacked(bytes(row.columns)))
        )
    depend = [place for place in places if blocks[place[0], place[2]].depends]
    failed = left_out(connection, depend) if depend else {}
    columns: list[Keyed] = []
    shown: list[tuple[UUID, int, int]] = []
    for place, shapes in asked.items():
        job, pass_number, number = place
        with traces.span(job, "seal", pass_number=pass_number, block=number, tasks=len(shapes)):
            columns += _merged(blocks[job, number], shapes, pieces.pop(place), failed.get(place, {}))
        shown += ((job, number, shape.number) for shape in shapes)
    ids = ids[: len(columns)]
    rows = _rows_of(connection, columns, ids)
    store: list[Asked] = [(_INSERT, row) for row in rows]
    if any(row["key"] is not None for row in rows):
        # Others may have stored one of these keys meanwhile.
        _insert(connection, rows)
        store = []
    jobs, numbers, tasks = zip(*shown, strict=True)
    sealed: Asked = (
        _SEALED,
        {
            "shown_jobs": list(jobs),
            "shown_blocks": list(numbers),
            "shown_tasks": list(tasks),
            "shown_columns": ids,
            **at_places(places),
            **_passes_left(blocks, Counter((job, block) for job, _, block in places)),
        },
    )
    notifying = {
        (job, number)
        for (job, _, number), shapes in asked.items()
        if (block := blocks[job, number]).notifies and {s.number for s in shapes} & set(block.notify_needs)
    }
    # The end of a job tells what was counted of it: after that.
    more = bool(depend or notifying)
    ends = [succeeding(may_succeed)] if may_succeed and not more else []
    done = together(connection, *store, sealed, *beside, *ends)
    if ends:
        succeeded(done[-1])
    tell_matches(connection, notifying)
    below = settle(connection, {(job, block) for job, _, block in depend})
    if may_succeed and more:
        succeed(connection, may_succeed)
    return len(columns) + below


def _merged(
    block: Any,
    shapes: Sequence[TaskShape],
    pieces: Sequence[_Piece],
    failed: Mapping[int, CellError],
) -> list[Keyed]:
    """The columns of a (block, pass), one per task, with the keys that they may be reused under.

    ``failed``: rows that lack what they need. Those of them that a task could have been asked are skipped.
    """
    bad = absents(block, {shape.number: shape.reads for shape in shapes})
    every = askable(row_order(bytes(block.row_order)), list(bad.values()))
    order = np.array([i for i in every if i not in failed], dtype=np.int64)
    found = []
    for shape in shapes:
        parts = [AnswersPart(order[lo:hi], columns[shape.number]) for lo, hi, columns in pieces]
        absent_here = {i: CellError(*why) for i, why in bad[shape.number].items()}
        skipped = skips(every, failed, absent_here)
        for i in [i for i, e in absent_here.items() if e.error == Skip.CONDITION]:
            skipped[i] = absent_here.pop(i)
        column = merge(shape.kind, block.n_rows, parts, absent=absent_here, skipped=skipped)
        key = block.keys[shape.number] if shape.deterministic and shape.number < len(block.keys) else None
        found.append(Keyed(block.tenant_id, column, None if key is None else bytes(key)))
    return found


def _passes_left(
    blocks: Mapping[tuple[UUID, int], Any], sealed: Mapping[tuple[UUID, int], int]
) -> dict[str, list[Any]]:
    """Blocks have so many passes less to do; those that have none left get the next numbers of their job, in order."""
    left = {place: blocks[place].passes_open - sealed[place] for place in sorted(sealed)}
    nth: Counter[UUID] = Counter()
    nths: list[int | None] = []
    for (job, _), opens in left.items():
        nth[job] += not opens
        nths.append(None if opens else nth[job])
    return {
        "of_jobs": [job for job, _ in left],
        "numbers": [number for _, number in left],
        "opens": list(left.values()),
        "nths": nths,
    }


def _by_place(read: Sequence[Any]) -> dict[tuple[UUID, int], Any]:
    """(job, block number) -> what was read of it."""
    return {(row.job_id, row.number): row for row in read}


# -- columns ---------------------------------------------------------------------------------------

#: Errors that the same input will always meet; a column with any other is not offered for reuse.
_LASTING = frozenset({"too_long", "context_length", "bad_row", Skip.CONDITION})
_NEXT_IDS = text("""
    SELECT nextval(pg_get_serial_sequence('sealed_column', 'id')) AS id FROM generate_series(1, :n)""")
# By tenant and key, in which order the index has them.
_TAKEN = text("""
    SELECT c.tenant_id, c.key FROM unnest(CAST(:tenants AS uuid[]), CAST(:keys AS bytea[])) k (tenant, key)
      JOIN sealed_column c ON c.tenant_id = k.tenant AND c.key = k.key""")
_INSERT = text("""
    INSERT INTO sealed_column (id, tenant_id, key, kind, n_rows, n_ok, n_error, n_skipped, status, errors, offsets,
                               codes, scores, all_scores, numbers, starts, ends, texts, vectors, dim, dtype)
    OVERRIDING SYSTEM VALUE
    VALUES (:id, :tenant, :key, :kind, :n_rows, :n_ok, :n_error, :n_skipped, :status, CAST(:errors AS jsonb),
            CAST(:offsets AS int4[]), CAST(:codes AS int2[]), CAST(:scores AS real[]), CAST(:all_scores AS real[]),
            CAST(:numbers AS double precision[]), CAST(:starts AS int4[]), CAST(:ends AS int4[]), :texts, :vectors,
            :dim, :dtype)
    ON CONFLICT (tenant_id, key) WHERE key IS NOT NULL DO NOTHING""")
_INSERTED = text("SELECT id FROM sealed_column WHERE id = ANY(:ids)")
_STORED_ARRAYS = {"all": "all_scores", "bytes": "texts"}


@dataclass(frozen=True, slots=True)
class Keyed:
    """A sealed column on its way into the store, with its reuse key, if it is for reuse."""

    tenant: UUID
    column: Column
    key: bytes | None


def store_column(connection: Connection, tenant: UUID, column: Column, key: bytes | None) -> int:
    """Store a sealed column, under its reuse key where it may be reused. Its id."""
    return store_columns(connection, [Keyed(tenant, column, key)])[0]


def store_columns(connection: Connection, columns: Sequence[Keyed]) -> list[int]:
    """Store sealed columns, each under its reuse key where it may be reused. Their ids, in order.

    A column with this key may be there already (the same work done twice at once): then ours is kept without one.
    """
    ids = list(connection.execute(_NEXT_IDS, {"n": len(columns)}).scalars())
    _insert(connection, _rows_of(connection, columns, ids))
    return ids


def _rows_of(connection: Connection, columns: Sequence[Keyed], ids: Sequence[int]) -> list[dict[str, Any]]:
    """The columns as rows to insert, under these ids, in the order in which they are inserted."""
    keys = [
        c.key if c.key is not None and all(map(_lasts, c.column.errors.values())) else None for c in columns
    ]
    wanted = {(c.tenant, key) for c, key in zip(columns, keys, strict=True) if key is not None}
    at = {"tenants": [tenant for tenant, _ in wanted], "keys": [key for _, key in wanted]}
    taken = {(row.tenant_id, bytes(row.key)) for row in connection.execute(_TAKEN, at)} if wanted else set()
    rows: list[dict[str, Any]] = []
    for id_, column, key in zip(ids, columns, keys, strict=True):
        named = None if key is None or (column.tenant, key) in taken else key
        if named is not None:
            taken.add((column.tenant, named))
        rows.append({**_values(column.column), "id": id_, "tenant": column.tenant, "key": named})
    # By key: two aggregators that seal the same work at once then wait for each other in one order.
    rows.sort(key=lambda row: (row["key"] or b"", row["id"]))
    return rows


def _insert(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    if connection.execute(_INSERT, rows).rowcount < len(rows):
        # Another transaction stored one of these keys between our look and our insert.
        there = set(connection.execute(_INSERTED, {"ids": [row["id"] for row in rows]}).scalars())
        connection.execute(_INSERT, [{**row, "key": None} for row in rows if row["id"] not in there])


def _lasts(e: CellError) -> bool:
    """The same input will always meet it; a skipped cell, whose reason is "task: class", will where its task's error does."""
    return (e.message.rpartition(": ")[2] if e.error == Skip.UPSTREAM else e.error) in _LASTING


def _values(column: Column) -> dict[str, Any]:
    """A column as values for the table sealed_column: typed arrays, sparse errors, no status where all is ok."""
    ok, error, skipped, _ = column.counts()
    values: dict[str, Any] = dict.fromkeys(
        ("offsets", "codes", "scores", "all_scores", "numbers", "starts", "ends", "texts", "vectors")
    )
    codes = dict(LAYOUT[column.kind])
    for name, raw in column.arrays.items():
        if name in ("bytes", "vectors"):
            values[_STORED_ARRAYS.get(name, name)] = raw
        elif raw or name == "offsets":
            values[_STORED_ARRAYS.get(name, name)] = Elements(codes[name], array_of(column, name))
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


#: Answers for [lo, hi) of a block's order: a column per task number.
_Piece = tuple[int, int, Mapping[int, Column]]


def _packed(answer: BlockAnswers) -> bytes:
    return wrap({number: c.to_wire() for number, c in answer.columns.items()})


def _unpacked(raw: bytes) -> dict[int, Column]:
    return {int(number): Column.from_wire(wire) for number, wire in unwrap(raw).items()}
