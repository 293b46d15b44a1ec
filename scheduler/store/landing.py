"""Rows land part by part in a job that is loading, until it is closed. They may be carved from then on.

Landing, leasing and recording lock the job's row, so each sees the others whole. Lock order: the job's row first, then
shared columns by id, then blocks and passes. What may arrive twice (a part, a close) is answered as it was the first
time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb
from sqlalchemy import Connection, Row, text

from motet.errors import Conflict, InvalidJob, NotFound, Overloaded, Problem
from motet.folds import Fold, sent_fields, stored_folds
from motet.media.fields import media_fields
from motet.protocol import traces
from motet.protocol.columns import CellError, Kind
from motet.protocol.manifest import Manifest, column_kind
from motet.protocol.wire import by_reason
from motet.states import LIVE, Skip, State
from motet.tasks import condition_of, dialogues_of, fields_read, stored_task
from scheduler.blocks import (
    EncodedBlock,
    Reader,
    Reads,
    absent,
    askable,
    is_digest,
    keyed,
    read_in_order,
    row_order,
    task_bits,
    uint32_bytes,
    upload_digest,
)
from scheduler.merge import errors_column
from scheduler.policy.needs import needs_of
from scheduler.store.database import JOB, Asked, notify, together
from scheduler.store.endings import succeed
from scheduler.store.events import tell_matches
from scheduler.store.leases import MORE_WAITS, more_waits, waiting
from scheduler.store.media import refer_to_media
from scheduler.store.opening import PRIORITIES
from scheduler.store.registry import SECRET
from scheduler.store.schema import spelt
from scheduler.store.sealing import settle, store_column
from scheduler.store.words import land, telling

#: Rows of an interactive job at most: more would not be interactive for anyone. Of an open job no more than a few
#: groups wait for answers at a time (policy/gather.py), so it has no such limit, and none on all rows it ever had.
INTERACTIVE_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingJob:
    """What never changes of a job while it is being loaded: enough to check and encode its rows."""

    id: UUID
    tenant: UUID
    #: Of the tenant: the key of every digest of its rows.
    secret: bytes = field(repr=False)
    fields: tuple[str, ...]
    #: Fields that a caller sends; the others are folded.
    asked: tuple[str, ...]
    #: What is folded of the rows of an open job, by name.
    folds: Mapping[str, Fold]
    #: Fields among them that hold dialogues.
    dialogues: frozenset[str]
    #: Fields among them that hold media.
    media: frozenset[str]
    bad_rows: Literal["refuse", "error"]
    interactive: bool
    reuse: bool
    #: In order of task number.
    readers: tuple[Reader, ...]
    #: Kind of each task's column.
    kinds: tuple[Kind, ...]
    #: Task numbers of each pass, in order of pass number, and those of the tasks whose cells it reads.
    passes: tuple[tuple[int, ...], ...]
    needs: tuple[tuple[int, ...], ...]
    #: Numbers of the passes that run on some rows only.
    conditional: frozenset[int]
    #: What each pass reads of a row.
    reads: tuple[Reads, ...]
    #: Some of its rows are events.
    notifies: bool
    #: Keyed digest of its Idempotency-Key, under which its upload claims media; None: it has none.
    upload: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """The answer to a part, the first time and every other."""

    part: int
    rows: int
    #: Rows of the job up to and with this part.
    total_rows: int
    bad_rows: int
    #: Cells of the job that are final by now.
    cells_done: int


_LOADING = text(
    "SELECT id, tenant_id, fields, folds, bad_rows, priority, reuse, notify_when IS NOT NULL AS notifies,"
    " idempotency_key FROM job"
    " WHERE id = :job AND tenant_id = :tenant"
)
_READERS = text("""
    SELECT t.number, t.name, t.kind, t.pass_number, t.spec, t.digest, m.manifest, l.manifest AS loaded,
           p.max_tokens, p.reads, p.bytes_beside, p.condition
      FROM task t JOIN model m ON m.id = t.model_id
      JOIN pass p ON p.job_id = t.job_id AND p.number = t.pass_number JOIN model l ON l.id = p.model_id
     WHERE t.job_id = :job ORDER BY t.number""")


def loading(connection: Connection, tenant: UUID, job: UUID) -> LoadingJob:
    """The unchanging facts of a job. Raises NotFound."""
    jobs, rows, ((secret,),) = together(
        connection,
        (_LOADING, {"job": job, "tenant": tenant}),
        (_READERS, {"job": job}),
        (SECRET, {"tenant": tenant}),
    )
    if not jobs:
        raise NotFound(f"no job {job}")
    (found,) = jobs
    tasks = {row.name: stored_task(row.spec) for row in rows}
    names, needs, folds = list(tasks), needs_of(tasks), stored_folds(found.folds)
    secret, named = bytes(secret), found.idempotency_key
    readers: list[Reader] = []
    kinds: list[Kind] = []
    passes: dict[int, list[int]] = {}
    reads: dict[int, Reads] = {}
    conditional: set[int] = set()
    models: dict[str, Manifest] = {}
    for row in rows:
        model, loaded = Manifest.from_json(row.manifest), Manifest.from_json(row.loaded)
        models[row.name] = model
        # What is drawn is drawn anew for each job, and for each row of it.
        drawn = getattr(tasks[row.name], "temperature", 0.0) > 0
        readers.append(
            Reader(
                reads=fields_read(row.name, tasks),
                digest=bytes(row.digest),
                reusable=found.reuse and model.deterministic and loaded.deterministic and not drawn,
                needs=tuple((names[number], number) for number in needs[row.number]),
                condition=condition_of(row.name) if tasks[row.name].conditional else "",
            )
        )
        kinds.append(column_kind(row.spec, model.answers))
        passes.setdefault(row.pass_number, []).append(row.number)
        reads[row.pass_number] = Reads(tuple(row.reads), row.bytes_beside, row.max_tokens)
        if row.condition is not None:
            conditional.add(row.pass_number)
    return LoadingJob(
        id=found.id,
        tenant=found.tenant_id,
        secret=secret,
        fields=tuple(found.fields),
        asked=sent_fields(tasks, folds) if folds else tuple(found.fields),
        folds=folds,
        dialogues=dialogues_of(tasks),
        media=media_fields(tasks, models),
        bad_rows=found.bad_rows,
        interactive=found.priority == PRIORITIES["interactive"],
        reuse=found.reuse,
        readers=tuple(readers),
        kinds=tuple(kinds),
        passes=tuple(tuple(passes[number]) for number in sorted(passes)),
        needs=tuple(needs[passes[number][0]] for number in sorted(passes)),
        conditional=frozenset(conditional),
        reads=tuple(reads[number] for number in sorted(passes)),
        notifies=found.notifies,
        upload=None if named is None else upload_digest(secret, named),
    )


_LOCK = text("""
    SELECT j.state, j.reason, j.n_rows, j.n_blocks, j.n_parts, j.blocks_done, j.started, j.closed, t.row_quota,
           j.cells_ok + j.cells_error + j.cells_skipped AS cells_done
      FROM job j JOIN tenant t ON t.id = j.tenant_id
     WHERE j.id = :job AND j.tenant_id = :tenant FOR NO KEY UPDATE OF j""")
_PART = text("""
    SELECT digest, n_rows, n_bad,
           (SELECT sum(n_rows) FROM part WHERE job_id = :job AND number <= :number) AS total_rows
      FROM part WHERE job_id = :job AND number = :number""")
# An open job, which never had a part, keeps its answered rows for months: only those that wait are held against it.
_ROWS_HELD = text(f"""
    SELECT coalesce(sum(CASE WHEN n_parts > 0 THEN n_rows
                             ELSE n_rows - (cells_ok + cells_error + cells_skipped) / n_tasks END), 0)
      FROM job WHERE tenant_id = :tenant AND state IN {spelt(LIVE)}""")
_ADD_PART = text("""
    INSERT INTO part (job_id, number, digest, n_rows, n_bad) VALUES (:job, :number, :digest, :n_rows, :n_bad)""")
_FIND_COLUMNS = text("""
    SELECT id, key, n_rows, n_ok, n_error, n_skipped FROM sealed_column
     WHERE tenant_id = :tenant AND key = ANY(:keys) ORDER BY id FOR NO KEY UPDATE""")
_SHARE_COLUMNS = text("""
    UPDATE sealed_column c SET refs = c.refs + k.n
      FROM unnest(CAST(:ids AS bigint[]), CAST(:counts AS int[])) k (id, n) WHERE c.id = k.id""")
_GROW = text("""
    UPDATE job SET n_rows = n_rows + :rows, n_blocks = n_blocks + :blocks, n_parts = n_parts + 1,
           blocks_done = blocks_done + :done, cells_ok = cells_ok + :ok, cells_error = cells_error + :error,
           cells_skipped = cells_skipped + :skipped, cells_reused = cells_reused + :reused,
           version = version + 1, touched = clock_timestamp(), started = coalesce(started, clock_timestamp())
     WHERE id = :job
 RETURNING cells_ok + cells_error + cells_skipped AS cells_done""")

# One block, its passes, its columns that are shown already, and what waits of it.
STORE_BLOCK = f"""
    WITH stored AS (
        INSERT INTO block (job_id, number, first_row, n_rows, n_work, bytes, row_order, lengths, payload, bad,
                           bad_fields, keys, passes_open, done_number, media, groups, done_at, say, due)
        VALUES (:job, :number, :first_row, :n_rows, :n_work, :text_bytes, :row_order, :lengths, :payload,
                CAST(:bad AS jsonb), CAST(:bad_fields AS jsonb), :keys, :passes_open, :done_number, CAST(:media AS bigint[]),
                :groups, CASE WHEN :blocks_done > 0 THEN clock_timestamp() END, :say,
                clock_timestamp() + make_interval(secs => CAST(:due_s AS double precision)))),
    passes AS (
        INSERT INTO block_pass (job_id, pass_number, block_number, state, todo, n, cursor, done, bytes, row_order)
        SELECT :job, k.pass, :number, k.state, k.todo, k.n, k.cursor, k.done, k.bytes, k.row_order
          FROM unnest(CAST(:pass_numbers AS smallint[]), CAST(:states AS text[]), CAST(:todos AS bigint[]),
                      CAST(:ns AS int[]), CAST(:cursors AS int[]), CAST(:dones AS int[]), CAST(:sizes AS bigint[]),
                      CAST(:orders AS bytea[])) k (pass, state, todo, n, cursor, done, bytes, row_order)),
    columns AS (
        INSERT INTO block_column (job_id, block_number, task_number, column_id)
        SELECT :job, :number, k.task, k.column_id
          FROM unnest(CAST(:tasks AS smallint[]), CAST(:columns AS bigint[])) k (task, column_id)),
    waits AS ({MORE_WAITS})"""
_STORE_BLOCK = text(f"{STORE_BLOCK} SELECT")
_COPY_BLOCK = (
    "COPY block (job_id, number, first_row, n_rows, n_work, bytes, row_order, lengths, payload, bad, bad_fields,"
    " keys, passes_open, done_number, media, groups) FROM STDIN (FORMAT BINARY)",
    (
        "uuid",
        "int4",
        "int8",
        "int4",
        "int4",
        "int8",
        "bytea",
        "bytea",
        "bytea",
        "jsonb",
        "jsonb",
        "bytea[]",
        "int2",
        "int4",
        "int8[]",
        "bytea",
    ),
)
_COPY_BLOCK_PASS = (
    "COPY block_pass (job_id, pass_number, block_number, state, todo, n, cursor, done, bytes, row_order)"
    " FROM STDIN (FORMAT BINARY)",
    ("uuid", "int2", "int4", "text", "int8", "int4", "int4", "int4", "int8", "bytea"),
)
_COPY_BLOCK_COLUMN = (
    "COPY block_column (job_id, block_number, task_number, column_id) FROM STDIN (FORMAT BINARY)",
    ("uuid", "int4", "int2", "int8"),
)


def land_part(
    connection: Connection,
    job: LoadingJob,
    number: int,
    digest: bytes,
    blocks: Sequence[EncodedBlock],
    *,
    first_row: int | None,
    max_rows: int,
    closes: bool = False,
) -> Landed:
    """Store one part: its blocks, what waits of them, and what is answered already. One transaction, the caller's.
    ``closes``: no part follows, and the job is closed with it.

    A (block, task) whose reuse key names a stored column of the tenant shows that column and is not run again: also one
    that an earlier part of the same job has had sealed by now. A pass
    that reads other tasks' answers waits in a block, unless all of them are shown there already.
    Bad rows are counted as error cells here, once, but for reused columns, whose own counts hold them: a row that is
    none in every task, a bad value in the tasks that read it. A pass is not done on rows that none of its tasks can
    be asked; where only some of them can, it is, and ``sealing.without_bad`` drops the answers of the others.
    Raises Conflict for a part out of order (``next_part``), or sent before with other bytes, or sent to a job
    that takes no more; InvalidJob beyond ``max_rows``; Overloaded beyond the tenant's quota.
    """
    n_rows = sum(b.n_rows for b in blocks)
    n_bad = sum(b.n_bad for b in blocks)
    jobs, parts = together(
        connection,
        (_LOCK, {"job": job.id, "tenant": job.tenant}),
        (_PART, {"job": job.id, "number": number}),
    )
    if not jobs:
        raise NotFound(f"no job {job.id}")
    (held,) = jobs
    if parts:
        (before,) = parts
        if not is_digest(job.secret, digest, bytes(before.digest)):
            raise Conflict(f"part {number} is stored with other bytes; open a new job for other rows")
        return Landed(
            part=number,
            rows=before.n_rows,
            total_rows=int(before.total_rows),
            bad_rows=before.n_bad,
            cells_done=held.cells_done,
        )
    _check_order(job, held, number, first_row)
    if closes and not held.n_rows + n_rows:
        raise _no_rows()
    _check_limits(connection, job, held, n_rows, max_rows)
    landing = arrange(connection, job, held, blocks)
    part = {
        "job": job.id,
        "number": number,
        "digest": keyed(job.secret, digest),
        "n_rows": n_rows,
        "n_bad": n_bad,
    }
    if len(blocks) == 1:
        # An upload's blocks have no age of their own.
        at = {"say": "", "due_s": None, "blocks_done": 0}
        store: list[Asked] = [(_STORE_BLOCK, {**landing.of_one_block(), **at})]
    else:
        store = []
        _copy(connection, _COPY_BLOCK, [tuple(block.values()) for block in landing.blocks])
        _copy(connection, _COPY_BLOCK_PASS, landing.block_passes)
        _copy(connection, _COPY_BLOCK_COLUMN, landing.block_columns)
        more_waits(connection, landing.waits(job.id))
    cells = landing.cells
    grown = {
        "job": job.id,
        "rows": n_rows,
        "blocks": len(blocks),
        "done": landing.blocks_done,
        **{name: cells[name] for name in ("ok", "error", "skipped", "reused")},
    }
    # What is told is heard when all of it is committed.
    close: list[Asked] = [(_CLOSE, {"job": job.id})] if closes else []
    done = together(
        connection, *store, (_ADD_PART, part), (_GROW, grown), *close, telling([land(job.id)], [job.id])
    )
    ((cells_done,),) = done[len(store) + 1]
    if job.notifies:
        # Answers of earlier jobs may be all that its condition reads.
        tell_matches(connection, {(job.id, number) for _, number, *_ in landing.block_columns})
    if landing.depend:
        # Last, since it counts on with what is counted by now.
        settle(connection, {(job.id, number) for number in landing.depend})
    if closes:
        (closed,) = done[-2]
        _trace_submit(job.id, closed)
        if closed.answered or landing.depend:
            succeed(connection, [job.id])
    return Landed(
        part=number,
        rows=n_rows,
        total_rows=held.n_rows + n_rows,
        bad_rows=n_bad,
        cells_done=cells_done,
    )


def _check_order(job: LoadingJob, held: Row[Any], number: int, first_row: int | None) -> None:
    if held.state != State.LOADING:
        raise Conflict(f"job {job.id} is {_ended(held)} and takes no more parts; open a new one")
    if number != held.n_parts:
        conflict = Conflict(f"part {number} is out of order; part {held.n_parts} comes next")
        conflict.next_part = held.n_parts
        raise conflict
    if first_row is not None and first_row != held.n_rows:
        conflict = Conflict(
            f"part {number} begins at row {first_row}, but the job has {held.n_rows} rows so far"
        )
        conflict.next_part = held.n_parts
        raise conflict


def _ended(held: Row[Any]) -> str:
    """The state of a job that loads no more, with the reason of its end: rows that ran early may have been it."""
    return f"{held.state} ({held.reason})" if held.reason else str(held.state)


def _check_limits(
    connection: Connection, job: LoadingJob, held: Row[Any], n_rows: int, max_rows: int
) -> None:
    total = held.n_rows + n_rows
    most = min(max_rows, INTERACTIVE_ROWS) if job.interactive else max_rows
    if total > most:
        what, remedy = f"at most {most:,} rows in a job", "submit the rest as another job"
        if job.interactive:
            what, remedy = f"at most {most:,} rows in an interactive job", 'submit it with priority="normal"'
        raise InvalidJob(Problem("rows", f"{total:,} rows", what, remedy))
    check_quota(connection, job.tenant, held.row_quota, n_rows)


def check_quota(connection: Connection, tenant: UUID, quota: int | None, n_rows: int) -> None:
    """Raises Overloaded where so many more rows are beyond the tenant's quota."""
    if quota is None:
        return
    waiting = int(connection.execute(_ROWS_HELD, {"tenant": tenant}).scalar_one())
    if waiting + n_rows > quota:
        raise Overloaded(
            f"the tenant's quota is {quota:,} rows in unfinished jobs, and {waiting:,} are; wait until jobs have ended",
            30.0,
        )


@dataclass
class Arranged:
    """Rows for every table that a part touches, and what they add up to."""

    #: By the names of their columns, in the order of ``_COPY_BLOCK``; but ``job`` and ``text_bytes``.
    blocks: list[dict[str, Any]]
    block_passes: list[tuple[Any, ...]]
    block_columns: list[tuple[Any, ...]]
    rows_waiting: Counter[int]
    bytes_waiting: Counter[int]
    cells: Counter[str]
    #: Blocks in which some pass waits, and may wait for nothing any more: for cells that are there, for its condition.
    depend: list[int]
    blocks_done: int = 0

    def waits(self, job: UUID) -> dict[tuple[UUID, int], tuple[int, int]]:
        """What has come to wait: (job, pass) -> rows, bytes."""
        return {(job, p): (n, self.bytes_waiting[p]) for p, n in self.rows_waiting.items()}

    def of_one_block(self) -> dict[str, Any]:
        """All of it as parameters by name, for a statement that stores one block."""
        (block,) = self.blocks
        passes = zip(*(row[1:2] + row[3:] for row in self.block_passes), strict=True)
        return {
            **block,
            **dict(
                zip(
                    ["pass_numbers", "states", "todos", "ns", "cursors", "dones", "sizes", "orders"],
                    map(list, passes),
                    strict=True,
                )
            ),
            "tasks": [row[2] for row in self.block_columns],
            "columns": [row[3] for row in self.block_columns],
            **waiting(self.waits(block["job"])),
            "blocks_done": self.blocks_done,
            "errors": self.cells["error"],
            "skipped": self.cells["skipped"],
        }


def arrange(
    connection: Connection, job: LoadingJob, held: Row[Any], blocks: Sequence[EncodedBlock]
) -> Arranged:
    """Where each block stands, what of it is answered, and what waits."""
    stored = _stored_columns(connection, job, blocks)
    landing = Arranged([], [], [], Counter(), Counter(), Counter(), [])
    shared: Counter[int] = Counter()
    first_row = held.n_rows
    media = refer_to_media(connection, job.tenant, [block.media for block in blocks], job.upload)
    for number, block in enumerate(blocks, held.n_blocks):
        todo: dict[int, dict[int, tuple[str, str]]] = {}
        shown = len(landing.block_columns)
        for task, key in enumerate(block.keys):
            column = stored.get(key) if key is not None else None
            if column is not None and column.n_rows == block.n_rows:
                shared[column.id] += 1
                landing.block_columns.append((job.id, number, task, column.id))
                landing.cells.update(
                    ok=column.n_ok, error=column.n_error, skipped=column.n_skipped, reused=block.n_rows
                )
            else:
                todo[task] = absent(block.bad, block.bad_fields, job.readers[task].asks)
                unasked = sum(error == Skip.CONDITION for error, _ in todo[task].values())
                landing.cells.update(error=len(todo[task]) - unasked, skipped=unasked)
        open_passes = _add_passes(connection, landing, job, number, block, todo)
        landing.blocks_done += not open_passes
        is_there = any(job.needs) and len(landing.block_columns) > shown
        if open_passes and (is_there or any(not job.needs[p] for p in job.conditional)):
            landing.depend.append(number)
        landing.blocks.append(
            {
                "job": job.id,
                "number": number,
                "first_row": first_row,
                "n_rows": block.n_rows,
                "n_work": block.n_work,
                "text_bytes": block.text_bytes,
                "row_order": block.row_order,
                "lengths": block.lengths,
                "payload": block.payload,
                "bad": Jsonb({str(offset): list(why) for offset, why in block.bad.items()}),
                "bad_fields": Jsonb({name: by_reason(bad) for name, bad in block.bad_fields.items()}),
                "keys": list(block.keys) if job.reuse else [],
                "passes_open": open_passes,
                "done_number": None if open_passes else held.blocks_done + landing.blocks_done,
                "media": media[number - held.n_blocks],
                "groups": block.groups,
            }
        )
        first_row += block.n_rows
    if shared:
        connection.execute(_SHARE_COLUMNS, {"ids": list(shared), "counts": list(shared.values())})
    return landing


def _add_passes(
    connection: Connection,
    landing: Arranged,
    job: LoadingJob,
    number: int,
    block: EncodedBlock,
    todo: Mapping[int, Mapping[int, tuple[str, str]]],
) -> int:
    """The block's passes; how many of them are open. One with nothing to do is sealed at once.

    ``todo``: number of a task that is to be computed -> the rows that it cannot be asked, and why.
    """
    open_passes = 0
    for pass_number, tasks in enumerate(job.passes):
        asked = [t for t in tasks if t in todo]
        n, order, own = block.n_work, block.row_order, None
        if asked and block.bad_fields:
            left = askable(row_order(order), [todo[t] for t in asked])
            if len(left) < n:
                n, order = len(left), uint32_bytes(left)
                own = order
        if asked and not n:
            landing.block_columns += (
                (job.id, number, t, _all_bad(connection, job, t, block, todo[t])) for t in asked
            )
        state, settled, size = "sealed", n, 0
        if asked and n:
            open_passes += 1
            waits = job.needs[pass_number] or pass_number in job.conditional
            state, settled = "waiting" if waits else "ready", 0
            reads = job.reads[pass_number]
            size = sum(read_in_order(order, block.lengths, block.n_rows, reads))
        if state == "ready":
            landing.rows_waiting[pass_number] += n
            landing.bytes_waiting[pass_number] += size
        landing.block_passes.append(
            (job.id, pass_number, number, state, task_bits(asked), n, settled, settled, size, own)
        )
    return open_passes


def _stored_columns(
    connection: Connection, job: LoadingJob, blocks: Sequence[EncodedBlock]
) -> dict[bytes, Row[Any]]:
    """Reuse key -> stored column, for those of these blocks that the tenant has.

    The rows stay locked: a deletion at the same moment either is over, and they are not found, or waits.
    """
    keys = {key for block in blocks for key in block.keys if key is not None}
    if not keys:
        return {}
    found = connection.execute(_FIND_COLUMNS, {"tenant": job.tenant, "keys": sorted(keys)})
    return {bytes(row.key): row for row in found}


def _all_bad(
    connection: Connection,
    job: LoadingJob,
    task: int,
    block: EncodedBlock,
    bad: Mapping[int, tuple[str, str]],
) -> int:
    """The column of a task that can be asked no row of a block: nobody will ever run it, so it is sealed here."""
    errors = [CellError(*bad[i]) for i in range(block.n_rows)]
    return store_column(connection, job.tenant, errors_column(job.kinds[task], errors), block.keys[task])


def _copy(connection: Connection, table: tuple[str, Sequence[str]], rows: Sequence[Sequence[Any]]) -> None:
    """COPY in the binary format, over the same connection and so in the same transaction."""
    if not rows:
        return
    statement, types = table
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


# -- closing -------------------------------------------------------------------------------------

_CLOSE = text(f"""
    UPDATE job SET state = '{State.RUNNING}', closed = clock_timestamp(), touched = clock_timestamp(),
           version = version + 1
     WHERE id = :job RETURNING created, closed, n_rows, n_parts, blocks_done = n_blocks AS answered""")


def close_job(
    connection: Connection, tenant: UUID, job: UUID, *, parts: int | None = None, rows: int | None = None
) -> None:
    """All rows are here: let the job run, or end it at once where every block is answered. Twice is harmless.

    ``parts``, ``rows``: what was sent to a job that is loading; an open one has no parts.

    Raises NotFound; Conflict where parts or rows differ from what is stored, or the job ended before;
    InvalidJob for a job without rows, which goes on loading, and where it is not said how much was sent.
    """
    (jobs,) = together(connection, (_LOCK, {"job": job, "tenant": tenant}))
    if not jobs:
        raise NotFound(f"no job {job}")
    (held,) = jobs
    if held.state == State.OPEN:
        connection.execute(_CLOSE, {"job": job})
        if held.blocks_done == held.n_blocks:
            succeed(connection, [job])
        notify(connection, JOB, str(job))
        return
    if held.started is not None and not held.n_parts:
        return  # it was open, and is closed
    problems = [
        Problem(name, "nothing", "a whole number", "say how much was sent")
        for name, sent in (("parts", parts), ("rows", rows))
        if sent is None
    ]
    if problems:
        raise InvalidJob(problems)
    if held.closed is None and held.state != State.LOADING:
        raise Conflict(f"job {job} is {_ended(held)}; it cannot be closed any more")
    if (parts, rows) != (held.n_parts, held.n_rows):
        conflict = Conflict(
            f"job {job} has {held.n_rows} rows in {held.n_parts} parts, not {rows} rows in {parts} parts"
        )
        conflict.next_part = held.n_parts
        raise conflict
    if held.state != State.LOADING:
        return
    if not held.n_rows:
        raise _no_rows()
    (closed,), _ = together(connection, (_CLOSE, {"job": job}), telling([land(job)], [job]))
    _trace_submit(job, closed)
    if closed.answered:
        succeed(connection, [job])


def _no_rows() -> InvalidJob:
    return InvalidJob(Problem("rows", "no row", "at least one row", "send a part, or cancel the job"))


def _trace_submit(job: UUID, closed: Any) -> None:
    """``closed``: what `_CLOSE` returned."""
    traces.add(job, traces.SUBMIT, closed.created, closed.closed, rows=closed.n_rows, parts=closed.n_parts)
