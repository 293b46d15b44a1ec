"""Results: sealed columns of blocks, in row order or as they were finished, and the cells without an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal
from uuid import UUID

from cachetools import LRUCache
from sqlalchemy import Connection, Row, TextClause, text

from motet.errors import NotFound
from motet.protocol.columns import LAYOUT, CellError, Column
from motet.states import ENDED, State
from scheduler.store.arrays import flat
from scheduler.store.database import Asked, together

RowOrder = Literal["row", "done"]
#: Blocks that are looked for at once at most.
BLOCKS = 64
#: Labels of tasks that are kept. More: memory; fewer: tasks of jobs that are read from time and again are read anew.
_LABELS_KEPT = 50_000


@dataclass(frozen=True, slots=True)
class ShownTask:
    """A task whose answers are asked for."""

    number: int
    name: str
    labels: tuple[str, ...]
    #: Of its vectors, where it has any.
    dim: int
    dtype: Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The job whose results are read, as of one moment: its state first, then what is ready."""

    id: UUID
    state: str
    n_blocks: int
    tasks: tuple[ShownTask, ...]
    #: What is gone of an open job's front: all blocks of done numbers up to this, and blocks before this one.
    past_done: int = 0
    first_block: int = 0
    #: Index of the first row of that block.
    first_row: int = 0
    #: What is folded of its rows, by name.
    folds: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def front(self, order: RowOrder) -> int:
        """The ``after`` behind which everything is kept."""
        return self.past_done if order == "done" else self.first_block


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyBlock:
    """A block in which every asked task is sealed."""

    number: int
    first_row: int
    n_rows: int
    #: The how-manieth block of its job to be finished; None while other tasks of it are under way.
    done: int | None
    #: Column id of each asked task, in their order.
    columns: tuple[int, ...]
    #: About how many bytes its columns take.
    bytes: int

    def cursor(self, order: RowOrder) -> int:
        """``after`` of the request that follows this block."""
        return self.number + 1 if order == "row" else self.done or 0


_JOB = text(
    "SELECT id, state, n_blocks, past_done, first_block, first_row, folds"
    " FROM job WHERE id = :job AND tenant_id = :tenant"
)
#: What the vectors of a task t of a model m are.
VECTORS = """
    coalesce(CAST(m.manifest->>CASE t.spec->>'features' WHEN 'stages' THEN 'stage_dim' ELSE 'dim' END AS int), 0) AS dim,
    coalesce(t.spec->>'dtype', 'fp32') AS dtype"""
_TASKS = text(f"""
    SELECT t.number, t.name, t.labels, {VECTORS}
      FROM task t JOIN model m ON m.id = t.model_id WHERE t.job_id = :job ORDER BY t.number""")
_READY = """
    SELECT b.number, b.first_row, b.n_rows, b.done_number, c.ids, c.bytes
      FROM block b CROSS JOIN LATERAL (
           SELECT array_agg(bc.column_id ORDER BY bc.task_number) AS ids, count(*) AS n,
                  sum(12 * s.n_rows + coalesce(octet_length(s.vectors), 0) + coalesce(octet_length(s.texts), 0)
                      + coalesce(pg_column_size(s.all_scores), 0) + coalesce(pg_column_size(s.codes), 0)) AS bytes
             FROM block_column bc JOIN sealed_column s ON s.id = bc.column_id
            WHERE bc.job_id = b.job_id AND bc.block_number = b.number AND bc.task_number = ANY(:tasks)) c
     WHERE b.job_id = :job AND c.n = :n AND """
#: A running job is read on without a gap, so only the next few blocks are looked at.
_NEXT_ROWS = text(
    f"{_READY} b.number >= CAST(:after AS bigint) AND b.number < CAST(:after AS bigint) + :limit ORDER BY b.number"
)
#: An ended job has gaps where blocks were never finished: these are passed over.
_ALL_ROWS = text(f"{_READY} b.number >= CAST(:after AS bigint) ORDER BY b.number LIMIT :limit")
#: Blocks that are looked through for the newest rows: more make the page of a job of millions of rows slow.
_NEWEST_OF = 2000
_NEWEST = text(f"{_READY} b.number >= CAST(:after AS bigint) ORDER BY b.number DESC LIMIT :limit")
_NEXT_DONE = text(f"{_READY} b.done_number > CAST(:after AS bigint) ORDER BY b.done_number LIMIT :limit")


#: Job -> its tasks by name, which never change.
_tasks: LRUCache[UUID, Mapping[str, ShownTask]] = LRUCache(
    _LABELS_KEPT, lambda tasks: sum(1 + len(task.labels) for task in tasks.values())
)
_lock = Lock()


def _tasks_known(job: UUID) -> Mapping[str, ShownTask] | None:
    with _lock:
        return _tasks.get(job)


def shown(connection: Connection, tenant: UUID, job: UUID, tasks: Sequence[str] | None = None) -> Shown:
    """The job and the tasks asked for (None: all of them). Raises NotFound, for an unknown task too."""
    the_job: Asked = (_JOB, {"job": job, "tenant": tenant})
    if (every := _tasks_known(job)) is not None:
        (jobs,) = together(connection, the_job)
        return _shown(job, jobs, every, tasks)
    jobs, of_job = together(connection, the_job, (_TASKS, {"job": job}))
    every = {
        row.name: ShownTask(row.number, row.name, tuple(row.labels), row.dim, row.dtype) for row in of_job
    }
    if jobs:
        with _lock:
            if _tasks.getsizeof(every) <= _tasks.maxsize:
                _tasks[job] = every
    return _shown(job, jobs, every, tasks)


def _shown(
    job: UUID, jobs: Sequence[Any], every: Mapping[str, ShownTask], tasks: Sequence[str] | None
) -> Shown:
    if not jobs:
        raise NotFound(f"no job {job}")
    (found,) = jobs
    for name in tasks or ():
        if name not in every:
            raise NotFound(f"job {job} has no task of this name; it has {', '.join(every)}")
    asked = every.values() if tasks is None else {name: every[name] for name in tasks}.values()
    return Shown(
        id=found.id,
        state=found.state,
        n_blocks=found.n_blocks,
        past_done=found.past_done,
        first_block=found.first_block,
        first_row=found.first_row,
        tasks=tuple(sorted(asked, key=lambda t: t.number)),
        folds=tuple(sorted(found.folds or ())),
    )


def shown_and_ready(
    connection: Connection, tenant: UUID, job: UUID, tasks: Sequence[str] | None, order: RowOrder, after: int
) -> tuple[Shown, list[ReadyBlock]]:
    """``shown``, and then its ``ready_blocks``; mostly in one round trip. Raises NotFound."""
    if (every := _tasks_known(job)) is None:
        found = shown(connection, tenant, job, tasks)
        return found, ready_blocks(connection, found, order, after)
    numbers = sorted(task.number for task in every.values() if tasks is None or task.name in tasks)
    query = _NEXT_DONE if order == "done" else _NEXT_ROWS
    jobs, rows = together(
        connection, (_JOB, {"job": job, "tenant": tenant}), (query, _at(job, numbers, after, BLOCKS))
    )
    found = _shown(job, jobs, every, tasks)
    # Where its front has moved, or where blocks may be missing, other blocks are the next.
    if after < found.front(order) or (order == "row" and found.ended and found.state != State.SUCCEEDED):
        return found, ready_blocks(connection, found, order, after)
    blocks = _as_blocks(rows)
    return found, blocks if order == "done" else _without_gap(blocks, after)


def ready_blocks(
    connection: Connection, job: Shown, order: RowOrder, after: int, limit: int = BLOCKS
) -> list[ReadyBlock]:
    """The next blocks in which all asked tasks are sealed, in the order asked for; none that stand before its front.

    By row: from block ``after`` on, without a gap while the job runs. By done: those finished after ``after``.
    """
    after = max(after, job.front(order))
    query = _NEXT_DONE if order == "done" else _ALL_ROWS if job.ended else _NEXT_ROWS
    found = _ready(connection, query, job, after, limit)
    return found if order == "done" or job.ended else _without_gap(found, after)


def _without_gap(blocks: Sequence[ReadyBlock], after: int) -> list[ReadyBlock]:
    """The first of these, as long as each follows the one before."""
    return [block for i, block in enumerate(blocks) if block.number == after + i]


def newest_blocks(connection: Connection, job: Shown, rows: int) -> list[ReadyBlock]:
    """The newest blocks in which all asked tasks are sealed, as many as hold ``rows`` rows, the newest first."""
    found: list[ReadyBlock] = []
    after = max(job.front("row"), job.n_blocks - _NEWEST_OF)
    for block in _ready(connection, _NEWEST, job, after, rows) if job.tasks else ():
        if sum(one.n_rows for one in found) >= rows:
            break
        found.append(block)
    return found


def _ready(connection: Connection, query: TextClause, job: Shown, after: int, limit: int) -> list[ReadyBlock]:
    at = _at(job.id, [t.number for t in job.tasks], after, limit)
    return _as_blocks(together(connection, (query, at))[0])


def _at(job: UUID, tasks: Sequence[int], after: int, limit: int) -> dict[str, Any]:
    """The parameters of a statement that begins with ``_READY``."""
    return {"job": job, "tasks": tasks, "n": len(tasks), "after": after, "limit": limit}


def _as_blocks(rows: Sequence[Any]) -> list[ReadyBlock]:
    return [
        ReadyBlock(
            number=row.number,
            first_row=row.first_row,
            n_rows=row.n_rows,
            done=row.done_number,
            columns=tuple(row.ids),
            bytes=int(row.bytes),
        )
        for row in rows
    ]


#: What `column_of` reads of a row ``s`` of sealed_column. array_send gives a typed array's bytes, so that no cell becomes
#: a Python object on its way.
COLUMN_FIELDS = """s.kind, s.n_rows, s.status, CAST(s.errors AS text), array_send(s.offsets), array_send(s.codes),
           array_send(s.scores), array_send(s.all_scores), array_send(s.numbers), array_send(s.starts),
           array_send(s.ends), s.texts, s.vectors, s.dim, s.dtype"""
_COLUMNS = f"SELECT s.id, {COLUMN_FIELDS} FROM sealed_column s WHERE s.id = ANY(%s)"
_STORED = ("offsets", "codes", "scores", "all", "numbers", "starts", "ends", "bytes", "vectors")


def read_columns(connection: Connection, ids: Sequence[int]) -> dict[int, Column]:
    """Column id -> column, for those that are there."""
    driver: Any = connection.connection.driver_connection
    with driver.cursor(binary=True) as cursor:
        cursor.execute(_COLUMNS, (list(ids),))
        return {row[0]: column_of(row[1:]) for row in cursor}


def column_of(fields: Sequence[Any]) -> Column:
    """A column from its COLUMN_FIELDS, read in binary."""
    kind, n_rows, status, errors, *stored, dim, dtype = fields
    found = dict(zip(_STORED, stored, strict=True))
    arrays: dict[str, bytes] = {}
    for name, code in LAYOUT[kind]:
        raw = found[name]
        if raw is not None:
            arrays[name] = bytes(raw) if code == "B" else flat(raw, code)
        elif name != "all":
            arrays[name] = b""
    return Column(
        kind=kind,
        status=bytes(n_rows) if status is None else bytes(status),
        arrays=arrays,
        errors={int(i): CellError(e["error"], e["message"]) for i, e in json.loads(errors or "{}").items()},
        dim=dim,
        dtype=dtype,
    )


# -- cells without an answer -----------------------------------------------------------------------

_ERRORS = text("""
    SELECT b.first_row, t.name, s.errors FROM block b
      JOIN block_column bc ON bc.job_id = b.job_id AND bc.block_number = b.number
      JOIN sealed_column s ON s.id = bc.column_id AND s.n_error + s.n_skipped > 0
      JOIN task t ON t.job_id = bc.job_id AND t.number = bc.task_number
     WHERE b.job_id = :job AND b.number = :block ORDER BY t.number""")
_BLOCKS_WITH_ERRORS = text("""
    SELECT DISTINCT b.number FROM block b
      JOIN block_column bc ON bc.job_id = b.job_id AND bc.block_number = b.number
      JOIN sealed_column s ON s.id = bc.column_id AND s.n_error + s.n_skipped > 0
     WHERE b.job_id = :job AND b.first_row + b.n_rows > CAST(:after AS bigint) + 1 ORDER BY b.number LIMIT :limit""")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnansweredCell:
    """A cell of a sealed column that is an error or was skipped."""

    row: int
    task: str
    error: CellError


def unanswered(
    connection: Connection, job: UUID, *, after: int, limit: int
) -> tuple[list[UnansweredCell], int | None]:
    """Cells without an answer of rows beyond ``after``, by row, and the ``after`` for those that follow, or None.

    About ``limit`` of them: those of one row stay together.
    """
    cells: list[UnansweredCell] = []
    for cell in _unanswered(connection, job, after, limit):
        if len(cells) >= limit and cell.row != cells[-1].row:
            return cells, cells[-1].row
        cells.append(cell)
    return cells, None


def _unanswered(connection: Connection, job: UUID, after: int, limit: int) -> Iterator[UnansweredCell]:
    # Every such block gives a cell at least, so one more block than cells is always enough.
    blocks = connection.execute(
        _BLOCKS_WITH_ERRORS, {"job": job, "after": after, "limit": limit + 2}
    ).scalars()
    for block in blocks.all():
        rows = connection.execute(_ERRORS, {"job": job, "block": block}).all()
        yield from sorted(
            (cell for row in rows for cell in _cells(row) if cell.row > after),
            key=lambda cell: cell.row,
        )


def _cells(row: Row[Any]) -> Iterator[UnansweredCell]:
    errors: Mapping[str, Any] = row.errors or {}
    for offset, e in errors.items():
        yield UnansweredCell(
            row=row.first_row + int(offset), task=row.name, error=CellError(e["error"], e["message"])
        )
