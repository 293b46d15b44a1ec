"""The schema of the database as SQLAlchemy tables: types, constraints, indexes, and what each of them means.

Migrations make it, and never import this file; tests/integration/test_tables.py holds a migrated database against it.
Views and functions for SQL users stand in migrations/ alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from inspect import cleandoc
from typing import Any, TypeVar, cast

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Constraint,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    TypedColumns,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from motet.states import ENDED, LIVE, State

T = TypeVar("T")
C = TypeVar("C", bound=TypedColumns)

metadata = MetaData()

_TIME = DateTime(timezone=True)
_NOW = "clock_timestamp()"
#: 32 bytes that nobody can guess.
_SECRET = (
    "decode(replace(CAST(gen_random_uuid() AS text) || CAST(gen_random_uuid() AS text), '-', ''), 'hex')"
)
_CELLS = "cells_ok + cells_error + cells_skipped"


def spelt(states: Collection[State]) -> str:
    """These states for IN; spelt out, since a parameter finds no partial index."""
    return "(" + ", ".join(f"'{state}'" for state in State if state in states) + ")"


def _table(name: str, columns: type[C], *more: Constraint | Index, **rest: Any) -> Table[C]:
    """A table; the docstring of its columns is its comment, and then those of columns, a line for each."""
    says, _, each = cleandoc(columns.__doc__ or "").partition("\n\n")
    table = Table(name, metadata, columns, *more, comment=_one_line(says), **rest)
    for line in re.split(r"\n(?! )", each) if each else ():
        column, _, meaning = line.partition(": ")
        table.c[column].comment = _one_line(meaning)
    return table


def _of(table: str, **columns: str) -> ForeignKeyConstraint:
    """Rows that go with a row of another table: column here -> column there."""
    return ForeignKeyConstraint([*columns], [f"{table}.{c}" for c in columns.values()], ondelete="CASCADE")


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _must(
    kind: type[TypeEngine[T]] | TypeEngine[T],
    *more: ForeignKey,
    default: str | None = None,
    check: str | None = None,
    external: bool = False,
    **rest: Any,
) -> Column[T]:
    """A column that is never NULL.

    ``default`` and ``check`` are SQL; ``external``: large values are stored as they are, since they are compressed already.
    """
    checks = () if check is None else (CheckConstraint(check),)
    server_default = None if default is None else text(default)
    rest.setdefault("nullable", False)
    return Column(kind, *more, *checks, server_default=server_default, info={"external": external}, **rest)


def _may(kind: type[TypeEngine[T]] | TypeEngine[T], *more: ForeignKey, **rest: Any) -> Column[T | None]:
    """A column that may be NULL."""
    return cast("Column[T | None]", _must(kind, *more, nullable=True, **rest))


def _key(kind: type[TypeEngine[T]] | TypeEngine[T], *more: ForeignKey, **rest: Any) -> Column[T]:
    """A column of the primary key."""
    return _must(kind, *more, primary_key=True, autoincrement=False, **rest)


def _identity() -> Column[int]:
    """The primary key, counted up by Postgres."""
    return Column(BigInteger, Identity(always=True), primary_key=True)


# -- the cluster ---------------------------------------------------------------------------------


class _LeaderColumns(TypedColumns):
    """The one dispatcher that leads. Every transaction of the scheduler checks its epoch first.

    transport: Identity of Redis as last seen: another one means that what it held is gone.
    """

    id = _key(Integer, check="id = 1")
    epoch = _must(BigInteger)
    holder = _must(Text)
    until = _must(_TIME)
    transport = _must(Text, default="''")


leader = _table("leader", _LeaderColumns)


class _TenantColumns(TypedColumns):
    """Whose jobs, tokens and columns these are; nothing is shared across tenants. The one without a
    name is nobody: it has jobs that are being removed.

    weight: Share of device-seconds relative to other tenants.
    row_quota: Rows in unfinished jobs at most; NULL: no limit.
    digest_key: Secret: keys every digest of what the tenant sent (parts, requests, reuse), so that a
      short text cannot be guessed from one.
    """

    id = _key(Uuid, default="gen_random_uuid()")
    name = _must(Text, unique=True)
    weight = _must(REAL, default="1", check="weight > 0")
    row_quota = _may(BigInteger)
    created = _must(_TIME, default=_NOW)
    digest_key = _must(LargeBinary, default=_SECRET, check="octet_length(digest_key) = 32")


tenant = _table("tenant", _TenantColumns)


class _TokenColumns(TypedColumns):
    """Who may ask: an id in clear, and the hash of its secret.

    secret_sha256: The secret has 256 random bits, so a plain hash is enough.
    """

    id = _key(Text)
    tenant_id = _must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    name = _must(Text)
    scope = _must(Text, check="scope IN ('user', 'read', 'admin', 'worker')")
    secret_sha256 = _must(LargeBinary)
    created = _must(_TIME, default=_NOW)
    expires = _may(_TIME)
    revoked = _may(_TIME)


token = _table("token", _TokenColumns)


class _DrainedColumns(TypedColumns):
    """Workers that get no more work until somebody resumes them; a restart changes nothing.

    by: Id of the token that drained it.
    seen: When it was last heard of, to the hour: one that is long gone is forgotten.
    """

    worker = _key(Text)
    host = _must(Text, default="''")
    since = _must(_TIME, default=_NOW)
    by = _must(Text, default="''")
    seen = _must(_TIME, default=_NOW)


drained = _table("drained", _DrainedColumns)


class _OutboxColumns(TypedColumns):
    """Events, written in the transaction of what they tell, and delivered at least once.

    job_id: The job, which may have been removed since.
    body: States, ids and counts; never a text of a user.
    attempts: Deliveries tried so far.
    next_at: When the next delivery is tried.
    delivered: When it was delivered; NULL: not yet.
    """

    id = _identity()
    tenant_id = _must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    kind = _must(Text, check="kind = 'job_ended'")
    job_id = _must(Uuid)
    body = _must(JSONB)
    created = _must(_TIME, default=_NOW)
    attempts = _must(SmallInteger, default="0")
    next_at = _must(_TIME, default=_NOW)
    delivered = _may(_TIME)


outbox = _table(
    "outbox",
    _OutboxColumns,
    Index("outbox_one_end", "job_id", unique=True, postgresql_where=text("kind = 'job_ended'")),
)

# -- models --------------------------------------------------------------------------------------


class _BlobColumns(TypedColumns):
    """Content-addressed files that lie in the blob folder behind the API."""

    sha256 = _key(Text, check="sha256 ~ '^[0-9a-f]{64}$'")
    bytes = _must(BigInteger)
    created = _must(_TIME, default=_NOW)


blob = _table("blob", _BlobColumns)


class _ModelColumns(TypedColumns):
    """The registry: what may be loaded. A version never changes its meaning.

    digest: Sha256 of all that decides its answers: part of every reuse key.
    trunk: Tasks whose models have one trunk fuse into one pass.
    """

    id = _identity()
    name = _must(Text)
    version = _must(Text)
    digest = _must(Text)
    trunk = _must(Text)
    manifest = _must(JSONB)
    created = _must(_TIME, default=_NOW)


model = _table("model", _ModelColumns, UniqueConstraint("name", "version"))


class _AliasStepColumns(TypedColumns):
    """Every step of every alias, for good: who let it mean which version, and when.

    name: Of the model.
    version: What the alias means from this step on; of one that was removed: what it meant.
    model_id: That version; NULL: it is deleted, and what bears its name now may be another model.
    before: The step that a rollback from here goes back to; NULL: nothing stood before.
    by: Id of the token that asked for it.
    """

    id = _identity()
    name = _must(Text)
    alias = _must(Text)
    what = _must(Text, check="what IN ('promoted', 'rolled back', 'removed')")
    version = _must(Text)
    model_id = _may(BigInteger, ForeignKey("model.id", ondelete="SET NULL"))
    before = _may(BigInteger, ForeignKey("alias_step.id"))
    by = _must(Text, default="''")
    at = _must(_TIME, default=_NOW)


alias_step = _table("alias_step", _AliasStepColumns, Index("alias_step_by_model", "model_id"))


class _AliasColumns(TypedColumns):
    """name@alias -> the version that it means now. No version of that model has such a name.

    step: The step that it stands at: who, when, and what stood before.
    """

    name = _key(Text)
    alias = _key(Text)
    model_id = _must(BigInteger, ForeignKey("model.id"))
    step = _must(BigInteger, ForeignKey("alias_step.id"))


alias = _table("alias", _AliasColumns, Index("alias_by_model", "model_id"))


class _RefusalColumns(TypedColumns):
    """Workers that cannot load a model, as of that boot: it is not placed there again."""

    model_id = _key(BigInteger, ForeignKey("model.id", ondelete="CASCADE"))
    worker = _key(Text)
    boot = _must(Text)
    why = _must(Text)
    at = _must(_TIME, default=_NOW)


refusal = _table("refusal", _RefusalColumns)

# -- jobs ----------------------------------------------------------------------------------------


class _JobColumns(TypedColumns):
    """N rows x K tasks, submitted together, or a training run.

    state: open: rows keep coming; loading: an upload; running; paused: its rows wait; and three that
      no job leaves.
    deadline: A job that has not ended by then fails; what is done stays.
    version: Grows with every change that a watcher should see.
    touched: Last part received: an upload that stays silent is abandoned.
    retention_days: Days after its end at which the job is deleted; NULL: as the cluster keeps all
      others. The sooner one counts.
    tokens_cached: Sum over its blocks and tasks, as in spent.
    tokens_out: Sum over its blocks and tasks, as in spent.
    """

    id = _key(Uuid)
    tenant_id = _must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    name = _must(Text, default="''")
    kind = _must(Text, default="'infer'", check="kind IN ('infer', 'train')")
    state = _must(Text, default="'loading'", check=f"state IN {spelt([*State])}")
    reason = _must(Text, default="''")
    priority = _must(SmallInteger, default="1", check="priority IN (0, 1, 2)")
    reuse = _must(Boolean, default="true")
    bad_rows = _must(Text, default="'refuse'", check="bad_rows IN ('refuse', 'error')")
    deadline = _may(_TIME)
    fields = _must(ARRAY(Text))
    n_tasks = _must(Integer, check="n_tasks > 0")
    n_rows = _must(BigInteger, default="0")
    n_blocks = _must(Integer, default="0")
    n_parts = _must(Integer, default="0")
    blocks_done = _must(Integer, default="0")
    cells_ok = _must(BigInteger, default="0")
    cells_error = _must(BigInteger, default="0")
    cells_skipped = _must(BigInteger, default="0")
    cells_reused = _must(BigInteger, default="0")
    tokens = _must(BigInteger, default="0")
    computed_tokens = _must(BigInteger, default="0")
    busy_s = _must(Double, default="0")
    subtasks = _must(BigInteger, default="0")
    attempts_lost = _must(BigInteger, default="0")
    version = _must(BigInteger, default="1")
    idempotency_key = _may(Text)
    request_digest = _must(LargeBinary)
    created = _must(_TIME, default=_NOW)
    touched = _must(_TIME, default=_NOW)
    started = _may(_TIME)
    finished = _may(_TIME)
    retention_days = _may(Double, check="retention_days > 0")
    tokens_cached = _must(BigInteger, default="0")
    tokens_out = _must(BigInteger, default="0")


job = _table(
    "job",
    _JobColumns,
    CheckConstraint(
        f"state NOT IN {spelt(ENDED)} OR {_CELLS} = n_rows * n_tasks", name="every_cell_accounted_for"
    ),
    CheckConstraint(f"{_CELLS} <= n_rows * n_tasks", name="every_cell_at_most_once"),
    UniqueConstraint("tenant_id", "idempotency_key"),
    Index("job_ended", "finished", postgresql_where=text("finished IS NOT NULL")),
    Index("job_newest", "tenant_id", text("created DESC"), text("id DESC")),
    Index("job_unfinished", "state", "id", postgresql_where=text(f"state IN {spelt(LIVE)}")),
)


class _PartColumns(TypedColumns):
    """Parts of the upload received so far: a part sent twice is answered, not stored twice."""

    job_id = _key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = _key(Integer)
    digest = _must(LargeBinary)
    n_rows = _must(Integer)
    n_bad = _must(Integer)


part = _table("part", _PartColumns)


class _PassColumns(TypedColumns):
    """One model pass that answers several tasks at once: what fusion makes of tasks.

    kind: The name that Flower shows; few in number, never an id.
    rows_waiting: Rows beyond the cursors of ready blocks, pieces included.
    needs: Numbers of the tasks whose cells it reads: a block of it waits until they are sealed there.
    rate_key: Name under which its speed is learned, where a row costs differently than in other
      passes of its model; else empty: the trunk's.
    reads: How often it reads each of the job's fields, in their order; empty: each once.
    bytes_beside: UTF-8 bytes that it reads of a row beside the fields: its templates' own, and other
      tasks' answers, about.
    bytes_done: Sum of the bytes of its sub-tasks that are done, by which they were priced.
    tokens: Sum of the tokens that these sub-tasks had.
    """

    job_id = _key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = _key(SmallInteger)
    kind = _must(Text)
    model_id = _must(BigInteger, ForeignKey("model.id"))
    numerics = _must(Text, check="numerics IN ('fast', 'exact')")
    max_tokens = _must(Integer)
    input = _must(Text)
    rows_waiting = _must(BigInteger, default="0")
    bytes_waiting = _must(BigInteger, default="0")
    needs = _must(ARRAY(SmallInteger), default="'{}'")
    rate_key = _must(Text, default="''")
    reads = _must(ARRAY(Integer), default="'{}'")
    bytes_beside = _must(Integer, default="0")
    bytes_done = _must(BigInteger, default="0")
    tokens = _must(BigInteger, default="0")


pass_ = _table("pass", _PassColumns, Index("pass_by_model", "model_id"))


class _TaskColumns(TypedColumns):
    """One named AI operation asked of every row of a job, and the model that answers it.

    digest: Of the spec and its model: with the digest of a block's fields, the reuse key.
    """

    job_id = _key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = _key(SmallInteger)
    name = _must(Text)
    pass_number = _must(SmallInteger)
    model_id = _must(BigInteger, ForeignKey("model.id"))
    kind = _must(Text)
    spec = _must(JSONB)
    labels = _must(ARRAY(Text), default="'{}'")
    digest = _must(LargeBinary)


task = _table("task", _TaskColumns, UniqueConstraint("job_id", "name"), Index("task_by_model", "model_id"))


class _BlockColumns(TypedColumns):
    """Contiguous rows, stored together: the unit of storage, sealing and reuse.

    n_work: Rows that some task can be asked.
    row_order: uint32 little-endian: offsets of the rows that some task can be asked, longest first.
    lengths: uint32 little-endian: UTF-8 bytes of each field, all rows of the first field, then the
      next.
    payload: Envelope (motet/protocol/envelope.py): field -> values in row order.
    bad: Offset -> [error, message] of rows that came in broken: error cells of every task.
    keys: Reuse key of each task number (element 1 is task 0); NULL: this column is not for reuse.
    done_number: The how-manieth block of its job to be finished, from 1.
    bad_fields: Field -> [[error, message, [offset, ...]], ...] of values that came in broken: error
      cells of the tasks that read it.
    """

    job_id = _key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = _key(Integer)
    first_row = _must(BigInteger)
    n_rows = _must(Integer, check="n_rows > 0")
    n_work = _must(Integer)
    bytes = _must(BigInteger)
    row_order = _must(LargeBinary, external=True)
    lengths = _must(LargeBinary, external=True)
    payload = _must(LargeBinary, external=True)
    bad = _must(JSONB, default="'{}'")
    keys = _must(ARRAY(LargeBinary), default="'{}'")  # type: ignore[assignment] # as a method of what has columns
    passes_open = _must(SmallInteger)
    done_number = _may(Integer)
    bad_fields = _must(JSONB, default="'{}'")


block = _table(
    "block",
    _BlockColumns,
    Index(
        "block_done", "job_id", "done_number", unique=True, postgresql_where=text("done_number IS NOT NULL")
    ),
)


class _BlockPassColumns(TypedColumns):
    """How far a pass has come in a block: carved up to the cursor, done rows, sealed.

    state: waiting: for cells that it reads; ready: it may be carved; sealed: its columns are merged.
    todo: Bit i: the job's task number i is to be computed here (the others were reused).
    n: Rows to do: those in row_order that a task of the pass can be asked and no failed upstream cell
      has taken out.
    row_order: As block.row_order, without the rows that no task of the pass can be asked, or a failed
      upstream cell has taken out; NULL: none was.
    bytes: UTF-8 bytes that the pass reads of the rows that work is done on.
    """

    job_id = _key(Uuid)
    pass_number = _key(SmallInteger)
    block_number = _key(Integer)
    state = _must(Text, check="state IN ('waiting', 'ready', 'sealed')")
    todo = _must(BigInteger)
    n = _must(Integer)
    cursor = _must(Integer, default="0", check="cursor BETWEEN 0 AND n")
    done = _must(Integer, default="0", check="done BETWEEN 0 AND n")
    row_order = _may(LargeBinary, external=True)
    bytes = _must(BigInteger, default="0")


block_pass = _table(
    "block_pass",
    _BlockPassColumns,
    _of("block", job_id="job_id", block_number="number"),
    _of("pass", job_id="job_id", pass_number="number"),
    Index(
        "block_pass_ready", "job_id", "pass_number", "block_number", postgresql_where=text("state = 'ready'")
    ),
    Index("block_pass_waiting", "job_id", "block_number", postgresql_where=text("state = 'waiting'")),
    postgresql_with={"fillfactor": 90},
)

# -- work under way ------------------------------------------------------------------------------


class _PieceColumns(TypedColumns):
    """Rows of a block, [lo, hi) in its order, that came back and wait to be carved again.

    tries: Times that these rows came back with a retriable error.
    deaths: Times that a worker died while these rows were in its running micro-batch.
    exclusive: Suspected of killing its worker: runs with nothing beside it.
    """

    id = _identity()
    job_id = _must(Uuid)
    pass_number = _must(SmallInteger)
    block_number = _must(Integer)
    lo = _must(Integer)
    hi = _must(Integer, check="hi > lo")
    bytes = _must(BigInteger)
    tries = _must(SmallInteger, default="0")
    deaths = _must(SmallInteger, default="0")
    exclusive = _must(Boolean, default="false")
    not_before = _must(_TIME, default="'-infinity'")


piece = _table(
    "piece",
    _PieceColumns,
    _of("block_pass", job_id="job_id", pass_number="pass_number", block_number="block_number"),
    Index("piece_by_pass", "job_id", "pass_number", "block_number"),
)


class _SubtaskColumns(TypedColumns):
    """A slice of rows x one pass: the unit of queueing, lease and retry. It closes once.

    blocks: With los and his: the ranges [lo, hi) of each block's order, in sub-task order.
    sizes: UTF-8 bytes of each range.
    """

    id = _identity()
    job_id = _must(Uuid)
    pass_number = _must(SmallInteger)
    state = _must(Text, default="'open'", check="state IN ('open', 'done', 'lost', 'failed')")
    blocks = _must(ARRAY(Integer))
    los = _must(ARRAY(Integer))
    his = _must(ARRAY(Integer))
    sizes = _must(ARRAY(BigInteger))
    todo = _must(BigInteger)
    n_rows = _must(Integer)
    bytes = _must(BigInteger)
    tries = _must(SmallInteger, default="0")
    deaths = _must(SmallInteger, default="0")
    exclusive = _must(Boolean, default="false")
    attempts = _must(SmallInteger, default="0")
    worker = _must(Text, default="''")
    busy_s = _must(REAL, default="0")
    tokens = _must(BigInteger, default="0")
    created = _must(_TIME, default=_NOW)
    closed = _may(_TIME)


subtask = _table(
    "subtask",
    _SubtaskColumns,
    _of("pass", job_id="job_id", pass_number="number"),
    Index("subtask_by_job", "job_id", "id"),
    Index("subtask_open", "job_id", "pass_number", postgresql_where=text("state = 'open'")),
)


class _LeaseColumns(TypedColumns):
    """Live leases only: the right of one attempt to run one open sub-task. A clone is a second one.

    clone: A second lease of an open sub-task, beside a straggler.
    device_kind: cuda or cpu, as the worker says: what is guessed of a device that nothing was learned
      of.
    """

    subtask_id = _key(BigInteger, ForeignKey("subtask.id", ondelete="CASCADE"))
    attempt = _key(SmallInteger)
    worker = _must(Text)
    boot = _must(Text)
    nonce = _must(Text)
    device = _must(Text, default="''")
    predicted_s = _must(REAL)
    leased = _must(_TIME, default=_NOW)
    until = _must(_TIME)
    clone = _must(Boolean, default="false")
    device_kind = _must(Text, default="''")


lease = _table("lease", _LeaseColumns)


class _CellsColumns(TypedColumns):
    """Answers of done sub-tasks for [lo, hi) of a block's order, until the (block, pass) is sealed."""

    job_id = _key(Uuid)
    pass_number = _key(SmallInteger)
    block_number = _key(Integer)
    subtask_id = _key(BigInteger)
    lo = _key(Integer)
    hi = _must(Integer, check="hi > lo")
    columns = _must(LargeBinary, external=True)


cells = _table(
    "cells",
    _CellsColumns,
    _of("block_pass", job_id="job_id", pass_number="pass_number", block_number="block_number"),
)


class _SpentColumns(TypedColumns):
    """What a task of a language model consumed in a block, over all accepted outcomes, those of rows
    that came back included.

    tokens_in: Tokens of its prompts.
    tokens_cached: Of them those that were computed for another task or row already.
    tokens_out: Tokens written.
    device_s: Seconds of devices: its share of each step.
    """

    job_id = _key(Uuid)
    block_number = _key(Integer)
    task_number = _key(SmallInteger)
    tokens_in = _must(BigInteger, check="tokens_in >= 0")
    tokens_cached = _must(BigInteger, check="tokens_cached >= 0")
    tokens_out = _must(BigInteger, check="tokens_out >= 0")
    device_s = _must(Double, check="device_s >= 0")


spent = _table("spent", _SpentColumns, _of("block", job_id="job_id", block_number="number"))


class _FitColumns(TypedColumns):
    """One training run: a row of a training job, as the worker that runs it tells.

    reports: Key of an epoch -> loss and scores. An attempt that does it again replaces it.
    checkpoint: Sha256 of the blob with which another attempt goes on; NULL: there is none, or no
      need.
    files: Sha256 of the blobs that came out: kept as long as the job, named by a model or not.
    """

    job_id = _key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    row_index = _key(BigInteger, check="row_index >= 0")
    reports = _must(JSONB, default="'{}'")
    checkpoint = _may(Text)
    files = _must(ARRAY(Text), default="'{}'")
    told = _must(_TIME, default=_NOW)


fit = _table("fit", _FitColumns)

# -- answers -------------------------------------------------------------------------------------


class _SealedColumnColumns(TypedColumns):
    """All answers of one task in one block, in row order, as flat typed arrays.

    key: Reuse key: digest of fields, task and model. NULL: not to be reused.
    refs: Blocks of jobs that show this column; removed at 0.
    status: A byte per row: 0 ok, 1 error, 2 skipped, +16 truncated. NULL: all ok.
    texts: UTF-8 JSON values end to end, cut by offsets.
    """

    id = _identity()
    tenant_id = _must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    key = _may(LargeBinary)
    refs = _must(Integer, default="1")
    kind = _must(Text)
    n_rows = _must(Integer)
    n_ok = _must(Integer)
    n_error = _must(Integer)
    n_skipped = _must(Integer)
    status = _may(LargeBinary)
    errors = _may(JSONB)
    offsets = _may(ARRAY(Integer))
    codes = _may(ARRAY(SmallInteger))
    scores = _may(ARRAY(REAL))
    all_scores = _may(ARRAY(REAL))
    numbers = _may(ARRAY(Double))
    starts = _may(ARRAY(Integer))
    ends = _may(ARRAY(Integer))
    texts = _may(LargeBinary)
    vectors = _may(LargeBinary, external=True)
    dim = _must(Integer, default="0")
    dtype = _must(Text, default="''")


sealed_column = _table(
    "sealed_column",
    _SealedColumnColumns,
    Index("sealed_column_by_key", "tenant_id", "key", unique=True, postgresql_where=text("key IS NOT NULL")),
    Index("sealed_column_unshown", "id", postgresql_where=text("refs <= 0")),
)


class _BlockColumnColumns(TypedColumns):
    """Which sealed column a block of a job shows for a task."""

    job_id = _key(Uuid)
    block_number = _key(Integer)
    task_number = _key(SmallInteger)
    column_id = _must(BigInteger, ForeignKey("sealed_column.id"))


block_column = _table(
    "block_column",
    _BlockColumnColumns,
    _of("block", job_id="job_id", block_number="number"),
    Index("block_column_by_column", "column_id"),
)

# -- what was learned of speed -------------------------------------------------------------------


class _RateColumns(TypedColumns):
    """What was learned of a trunk's speed on a kind of device, so that a restart forgets nothing.

    trunk: Digest of the trunk, or of a model that shares none.
    device: Name of the kind of device, such as NVIDIA H200.
    numerics: Numeric class: fast or exact.
    coefficients: Seconds of a sub-task, a row, a token, a squared length in tokens.
    covariance: Of the coefficients, row by row: how much each may still change.
    bytes_per_token: UTF-8 bytes that a token stands for in texts seen lately.
    tokens_per_row: Length of the rows seen lately.
    observations: Outcomes that it was learned from; 0: a guess.
    updated: When the last of them came.
    """

    trunk = _key(Text)
    device = _key(Text)
    numerics = _key(Text)
    coefficients = _must(ARRAY(Double), check="cardinality(coefficients) = 4")
    covariance = _must(ARRAY(Double), check="cardinality(covariance) = 16")
    bytes_per_token = _must(Double)
    tokens_per_row = _must(Double)
    observations = _must(BigInteger)
    updated = _must(_TIME, default=_NOW)


rate = _table("rate", _RateColumns)


class _PaceColumns(TypedColumns):
    """Workers beside their kind: finds the device that is silently slow.

    worker: Its name, which outlives its restarts.
    pace: Its seconds for what takes its kind one second.
    observations: Outcomes that it was learned from.
    updated: When the last outcome of this worker came.
    """

    worker = _key(Text)
    pace = _must(Double)
    observations = _must(BigInteger)
    updated = _must(_TIME, default=_NOW)


pace = _table("pace", _PaceColumns)


class _LoadTimeColumns(TypedColumns):
    """How long loading takes: what a placement pays where the model is not resident.

    model: Digest of the model that is loaded.
    device: Name of the kind of device.
    seconds: A mean in which late loads weigh most; heads that were loaded with it included.
    updated: When it was loaded last.
    """

    model = _key(Text)
    device = _key(Text)
    seconds = _must(Double)
    updated = _must(_TIME, default=_NOW)


load_time = _table("load_time", _LoadTimeColumns)
