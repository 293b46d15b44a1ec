"""Tables of jobs: their rows, passes and tasks, the work under way, and what was answered."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    TypedColumns,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

from motet.states import ENDED, LIVE, State
from scheduler.store.schema import NOW, TIME, identity, index, key, may, must, spelt, table, within

_CELLS = "cells_ok + cells_error + cells_skipped"

# -- jobs ----------------------------------------------------------------------------------------


class _JobColumns(TypedColumns):
    """N rows x K tasks, submitted together, or a training run.

    state: open: rows keep coming; loading: an upload; running; paused: its rows wait; and three that no job
      leaves.
    deadline: A job that has not ended by then fails; what is done stays.
    version: Grows with every change that a watcher should see.
    touched: Last part received: an upload that stays silent is abandoned.
    started: When its first rows landed, or an open job was opened: from then on they are carved.
    retention_days: Days after its end at which the job is deleted; NULL: as the cluster keeps all others. The
      sooner one counts.
    tokens_cached: Sum over its blocks and tasks, as in spent.
    tokens_out: Sum over its blocks and tasks, as in spent.
    closed: When no more rows could come; NULL: they can, or it ended before.
    keep_s: Seconds for which an open job keeps a row after it was answered; NULL: until it is removed.
    first_block: From this block on all are kept; before it only those that were answered late.
    first_row: Index of the first row of that block.
    past_done: Blocks whose done_number is no larger are deleted.
    past_ok: Cells of deleted blocks; they are in cells_ok as well.
    past_error: As past_ok.
    past_skipped: As past_ok.
    folds: Name -> spec of what is folded of its rows (motet/folds.py); NULL: nothing.
    notify_when: Each row for which this holds is an event; NULL: none is.
    notify_needs: Numbers of the tasks whose answers it reads.
    rows_matched: Rows for which it held so far.
    """

    id = key(Uuid)
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    name = must(Text, default="''")
    kind = must(Text, default="'infer'", check="kind IN ('infer', 'train')")
    state = must(Text, default="'loading'", check=f"state IN {spelt([*State])}")
    reason = must(Text, default="''")
    priority = must(SmallInteger, default="1", check="priority IN (0, 1, 2)")
    reuse = must(Boolean, default="true")
    bad_rows = must(Text, default="'refuse'", check="bad_rows IN ('refuse', 'error')")
    deadline = may(TIME)
    fields = must(ARRAY(Text))
    n_tasks = must(Integer, check="n_tasks > 0")
    n_rows = must(BigInteger, default="0")
    n_blocks = must(Integer, default="0")
    n_parts = must(Integer, default="0")
    blocks_done = must(Integer, default="0")
    cells_ok = must(BigInteger, default="0")
    cells_error = must(BigInteger, default="0")
    cells_skipped = must(BigInteger, default="0")
    cells_reused = must(BigInteger, default="0")
    tokens = must(BigInteger, default="0")
    computed_tokens = must(BigInteger, default="0")
    busy_s = must(Double, default="0")
    subtasks = must(BigInteger, default="0")
    attempts_lost = must(BigInteger, default="0")
    version = must(BigInteger, default="1")
    idempotency_key = may(Text)
    request_digest = must(LargeBinary)
    created = must(TIME, default=NOW)
    touched = must(TIME, default=NOW)
    started = may(TIME)
    finished = may(TIME)
    retention_days = may(Double, check="retention_days > 0")
    tokens_cached = must(BigInteger, default="0")
    tokens_out = must(BigInteger, default="0")
    closed = may(TIME)
    keep_s = may(Double, check="keep_s > 0")
    first_block = must(Integer, default="0")
    first_row = must(BigInteger, default="0")
    past_done = must(Integer, default="0")
    past_ok = must(BigInteger, default="0")
    past_error = must(BigInteger, default="0")
    past_skipped = must(BigInteger, default="0")
    folds = may(JSONB(none_as_null=True))
    notify_when = may(Text)
    notify_needs = must(ARRAY(SmallInteger), default="'{}'")
    rows_matched = must(BigInteger, default="0")


job = table(
    "job",
    _JobColumns,
    CheckConstraint(
        "past_ok <= cells_ok AND past_error <= cells_error AND past_skipped <= cells_skipped",
        name="past_cells_are_counted",
    ),
    CheckConstraint(
        f"state NOT IN {spelt(ENDED)} OR {_CELLS} = n_rows * n_tasks", name="every_cell_accounted_for"
    ),
    CheckConstraint(f"{_CELLS} <= n_rows * n_tasks", name="every_cell_at_most_once"),
    CheckConstraint(
        f"state NOT IN {spelt([State.RUNNING, State.SUCCEEDED])} OR closed IS NOT NULL",
        name="only_a_closed_job_runs_to_its_end",
    ),
    CheckConstraint(f"state <> '{State.OPEN}' OR kind = 'infer'", name="a_training_run_is_never_open"),
    UniqueConstraint("tenant_id", "idempotency_key"),
    index("job_ended", "finished", where="finished IS NOT NULL"),
    index("job_folding", "id", where="folds IS NOT NULL"),
    index("job_newest", "tenant_id", "created DESC", "id DESC"),
    index("job_unfinished", "state", "id", where=f"state IN {spelt(LIVE)}"),
)


class _PartColumns(TypedColumns):
    """Parts of the upload received so far: a part sent twice is answered, not stored twice."""

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = key(Integer)
    digest = must(LargeBinary)
    n_rows = must(Integer)
    n_bad = must(Integer)


part = table("part", _PartColumns)


class _PassColumns(TypedColumns):
    """One model pass that answers several tasks at once: what fusion makes of tasks.

    kind: The name that Flower shows; few in number, never an id.
    rows_waiting: Rows beyond the cursors of ready blocks, pieces included.
    needs: Numbers of the tasks whose cells it reads: a block of it waits until they are sealed there.
    rate_key: Name under which its speed is learned, where a row costs differently than in other passes of its
      model; else empty: the trunk's.
    reads: How often it reads each of the job's fields, in their order; empty: each once.
    bytes_beside: UTF-8 bytes that it reads of a row beside the fields: its templates' own, and other tasks'
      answers, about.
    bytes_done: Sum of the bytes of its sub-tasks that are done, by which they were priced.
    tokens: Sum of the tokens that these sub-tasks had.
    condition: It runs on the rows for which this holds; null: on all.
    """

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = key(SmallInteger)
    kind = must(Text)
    model_id = must(BigInteger, ForeignKey("model.id"))
    numerics = must(Text, check="numerics IN ('fast', 'exact')")
    max_tokens = must(Integer)
    input = must(Text)
    rows_waiting = must(BigInteger, default="0")
    bytes_waiting = must(BigInteger, default="0")
    needs = must(ARRAY(SmallInteger), default="'{}'")
    rate_key = must(Text, default="''")
    reads = must(ARRAY(Integer), default="'{}'")
    bytes_beside = must(Integer, default="0")
    bytes_done = must(BigInteger, default="0")
    tokens = must(BigInteger, default="0")
    condition = may(Text)


pass_ = table("pass", _PassColumns, index("pass_by_model", "model_id"))


class _TaskColumns(TypedColumns):
    """One named AI operation asked of every row of a job, and the model that answers it.

    digest: Of the spec and its model: with the digest of a block's fields, the reuse key.
    """

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = key(SmallInteger)
    name = must(Text)
    pass_number = must(SmallInteger)
    model_id = must(BigInteger, ForeignKey("model.id"))
    kind = must(Text)
    spec = must(JSONB)
    labels = must(ARRAY(Text), default="'{}'")
    digest = must(LargeBinary)


task = table("task", _TaskColumns, UniqueConstraint("job_id", "name"), index("task_by_model", "model_id"))


class _BlockColumns(TypedColumns):
    """Contiguous rows, stored together: the unit of storage, sealing and reuse.

    n_work: Rows that some task can be asked.
    row_order: uint32 little-endian: offsets of the rows that some task can be asked, longest first, those that
      begin alike side by side.
    groups: uint32 little-endian: offsets of the rows at which groups begin that no sub-task parts; NULL: there
      are none.
    lengths: uint32 little-endian: UTF-8 bytes of each field, all rows of the first field, then the next.
    payload: Envelope (motet/protocol/envelope.py): field -> values in row order.
    bad: Offset -> [error, message] of rows that came in broken: error cells of every task.
    keys: Reuse key of each task number (element 1 is task 0); NULL: this column is not for reuse.
    done_number: The how-manieth block of its job to be finished, from 1.
    bad_fields: Field -> [[error, message, [offset, ...]], ...] of values that came in broken: error cells of
      the tasks that read it.
    done_at: When all of it was answered by work, or landed answered in an open job: its age counts from there.
    due: What no worker has begun by then is skipped: its callers are gone. NULL: they wait for ever.
    say: The API process whose callers read along as text is written; empty: nobody does.
    media: Ids of the media that its rows refer to, each once.
    """

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    number = key(Integer)
    first_row = must(BigInteger)
    n_rows = must(Integer, check="n_rows > 0")
    n_work = must(Integer)
    bytes = must(BigInteger)
    row_order = must(LargeBinary, external=True)
    lengths = must(LargeBinary, external=True)
    payload = must(LargeBinary, external=True)
    bad = must(JSONB, default="'{}'")
    keys = must(ARRAY(LargeBinary), default="'{}'")  # type: ignore[assignment] # as a method of what has columns
    passes_open = must(SmallInteger)
    done_number = may(Integer)
    bad_fields = must(JSONB, default="'{}'")
    done_at = may(TIME)
    due = may(TIME)
    say = must(Text, default="''")
    media = must(ARRAY(BigInteger), default="'{}'")
    groups = may(LargeBinary)


block = table(
    "block",
    _BlockColumns,
    index("block_due", "due", where="due IS NOT NULL AND done_number IS NULL"),
    index("block_done", "job_id", "done_number", unique=True, where="done_number IS NOT NULL"),
)


class _MediumColumns(TypedColumns):
    """Pictures that rows of a tenant refer to, each stored once by content.

    key: Keyed digest of its bytes: nobody can try which picture it is.
    media_type: By its first bytes, such as image/jpeg.
    width: Pixels, as its head tells; NULL: not known.
    payload: Envelope (motet/protocol/envelope.py): its bytes as they came.
    refs: Blocks that refer to it; removed at 0, unless an upload counts on it.
    claimed: When an upload last sent it or asked for it whose rows may still come; NULL: no such upload is known.
    claimed_by: Keyed digest of the Idempotency-Key of that upload; NULL: several, or it told none.
    thumb: A JPEG of it in small, for pages, as its sender made it; NULL: nobody sent one.
    """

    id = identity()
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    key = must(LargeBinary)
    media_type = must(Text)
    bytes = must(Integer, check="bytes > 0")
    width = may(Integer)
    height = may(Integer)
    payload = must(LargeBinary, external=True)
    refs = must(Integer, default="0")
    claimed = may(TIME, default=NOW)
    claimed_by = may(LargeBinary)
    thumb = may(LargeBinary, external=True)


medium = table(
    "medium",
    _MediumColumns,
    UniqueConstraint("tenant_id", "key"),
    index("medium_unused", "claimed", where="refs <= 0"),
)


class _AskColumns(TypedColumns):
    """One caller's rows in an open job: [lo, lo + n_rows) of a block. A key names one run of rows.

    key: Keyed digest of the caller's key.
    digest: Keyed digest of its rows: the same key with other rows is a conflict.
    """

    job_id = key(Uuid)
    key = key(LargeBinary)
    digest = must(LargeBinary)
    block_number = must(Integer)
    lo = must(Integer, check="lo >= 0")
    n_rows = must(Integer, check="n_rows > 0")


ask = table(
    "ask",
    _AskColumns,
    within("block", job_id="job_id", block_number="number"),
    index("ask_by_block", "job_id", "block_number"),
)


class _AskSpanColumns(TypedColumns):
    """Asks of an open job that one API process ended in one span of seconds. Kept for minutes.

    at: Start of the span, on the clock of that process.
    process: Name of the API process: each gathers and counts by itself.
    n_rows: Rows of the asks that were answered.
    answered: Asks that were answered in time.
    late: Asks whose callers gave up.
    refused: Asks that were told to come back.
    failed: Asks that ended in another error.
    waiting: Rows that waited to land at the end of the span.
    times: Asks answered, by how long they took: scheduler/ask_times.py has the bounds.
    """

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    at = key(TIME)
    process = key(Text)
    n_rows = must(Integer)
    answered = must(Integer)
    late = must(Integer)
    refused = must(Integer)
    failed = must(Integer)
    waiting = must(Integer)
    times = must(ARRAY(Integer))


ask_span = table("ask_span", _AskSpanColumns)


class _FoldColumns(TypedColumns):
    """What an open job remembers of the rows of a key, as of the newest landing.

    key: Keyed digest of the template of the key and its typed value.
    state: Envelope: an entry for each fold of the template, in order of their names (scheduler/policy/folds.py).
    until: Nothing of it counts from then on; NULL: as long as its job is open.
    """

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    key = key(LargeBinary)
    state = must(LargeBinary)
    until = may(TIME)


fold = table(
    "fold",
    _FoldColumns,
    index("fold_until", "until", where="until IS NOT NULL"),
    postgresql_with={"fillfactor": 70},
)


class _BlockPassColumns(TypedColumns):
    """How far a pass has come in a block: carved up to the cursor, done rows, sealed.

    state: waiting: for cells that it reads; ready: it may be carved; sealed: its columns are merged.
    todo: Bit i: the job's task number i is to be computed here (the others were reused).
    n: Rows to do: those in row_order that a task of the pass can be asked and no failed upstream cell has
      taken out.
    row_order: As block.row_order, without the rows that no task of the pass can be asked, or a failed
      upstream cell has taken out; NULL: none was.
    bytes: UTF-8 bytes that the pass reads of the rows that work is done on.
    """

    job_id = key(Uuid)
    pass_number = key(SmallInteger)
    block_number = key(Integer)
    state = must(Text, check="state IN ('waiting', 'ready', 'sealed')")
    todo = must(BigInteger)
    n = must(Integer)
    cursor = must(Integer, default="0", check="cursor BETWEEN 0 AND n")
    done = must(Integer, default="0", check="done BETWEEN 0 AND n")
    row_order = may(LargeBinary, external=True)
    bytes = must(BigInteger, default="0")


block_pass = table(
    "block_pass",
    _BlockPassColumns,
    within("block", job_id="job_id", block_number="number"),
    within("pass", job_id="job_id", pass_number="number"),
    index("block_pass_ready", "job_id", "pass_number", "block_number", where="state = 'ready'"),
    index("block_pass_waiting", "job_id", "block_number", where="state = 'waiting'"),
    postgresql_with={"fillfactor": 90},
)

# -- work under way ------------------------------------------------------------------------------


class _PieceColumns(TypedColumns):
    """Rows of a block, [lo, hi) in its order, that came back and wait to be carved again.

    tries: Times that these rows came back with a retriable error.
    deaths: Times that a worker died while these rows were in its running micro-batch.
    exclusive: Suspected of killing its worker: runs with nothing beside it.
    """

    id = identity()
    job_id = must(Uuid)
    pass_number = must(SmallInteger)
    block_number = must(Integer)
    lo = must(Integer)
    hi = must(Integer, check="hi > lo")
    bytes = must(BigInteger)
    tries = must(SmallInteger, default="0")
    deaths = must(SmallInteger, default="0")
    exclusive = must(Boolean, default="false")
    not_before = must(TIME, default="'-infinity'")


piece = table(
    "piece",
    _PieceColumns,
    within("block_pass", job_id="job_id", pass_number="pass_number", block_number="block_number"),
    index("piece_by_pass", "job_id", "pass_number", "block_number"),
)


class _SubtaskColumns(TypedColumns):
    """A slice of rows x one pass: the unit of queueing, lease and retry. It closes once.

    blocks: With los and his: the ranges [lo, hi) of each block's order, in sub-task order.
    sizes: UTF-8 bytes of each range.
    """

    id = identity()
    job_id = must(Uuid)
    pass_number = must(SmallInteger)
    state = must(Text, default="'open'", check="state IN ('open', 'done', 'lost', 'failed')")
    blocks = must(ARRAY(Integer))
    los = must(ARRAY(Integer))
    his = must(ARRAY(Integer))
    sizes = must(ARRAY(BigInteger))
    todo = must(BigInteger)
    n_rows = must(Integer)
    bytes = must(BigInteger)
    tries = must(SmallInteger, default="0")
    deaths = must(SmallInteger, default="0")
    exclusive = must(Boolean, default="false")
    attempts = must(SmallInteger, default="0")
    worker = must(Text, default="''")
    busy_s = must(REAL, default="0")
    tokens = must(BigInteger, default="0")
    created = must(TIME, default=NOW)
    closed = may(TIME)


subtask = table(
    "subtask",
    _SubtaskColumns,
    within("pass", job_id="job_id", pass_number="number"),
    index("subtask_by_job", "job_id", "id"),
    index("subtask_open", "job_id", "pass_number", where="state = 'open'"),
)


class _LeaseColumns(TypedColumns):
    """Live leases only: the right of one attempt to run one open sub-task. A clone is a second one.

    clone: A second lease of an open sub-task, beside a straggler.
    device_kind: cuda or cpu, as the worker says: what is guessed of a device that nothing was learned of.
    """

    subtask_id = key(BigInteger, ForeignKey("subtask.id", ondelete="CASCADE"))
    attempt = key(SmallInteger)
    worker = must(Text)
    boot = must(Text)
    nonce = must(Text)
    device = must(Text, default="''")
    predicted_s = must(REAL)
    leased = must(TIME, default=NOW)
    until = must(TIME)
    clone = must(Boolean, default="false")
    device_kind = must(Text, default="''")


lease = table("lease", _LeaseColumns)


class _CellsColumns(TypedColumns):
    """Answers of done sub-tasks for [lo, hi) of a block's order, until the (block, pass) is sealed."""

    job_id = key(Uuid)
    pass_number = key(SmallInteger)
    block_number = key(Integer)
    subtask_id = key(BigInteger)
    lo = key(Integer)
    hi = must(Integer, check="hi > lo")
    columns = must(LargeBinary, external=True)


cells = table(
    "cells",
    _CellsColumns,
    within("block_pass", job_id="job_id", pass_number="pass_number", block_number="block_number"),
)


class _SpentColumns(TypedColumns):
    """What a task of a language model consumed in a block, over all accepted outcomes, those of rows that
    came back included.

    tokens_in: Tokens of its prompts.
    tokens_cached: Of them those that were computed for another task or row already.
    tokens_out: Tokens written.
    device_s: Seconds of devices: its share of each step.
    """

    job_id = key(Uuid)
    block_number = key(Integer)
    task_number = key(SmallInteger)
    tokens_in = must(BigInteger, check="tokens_in >= 0")
    tokens_cached = must(BigInteger, check="tokens_cached >= 0")
    tokens_out = must(BigInteger, check="tokens_out >= 0")
    device_s = must(Double, check="device_s >= 0")


spent = table("spent", _SpentColumns, within("block", job_id="job_id", block_number="number"))


class _FitColumns(TypedColumns):
    """One training run: a row of a training job, as the worker that runs it tells.

    reports: Key of an epoch -> loss and scores. An attempt that does it again replaces it.
    checkpoint: Sha256 of the blob with which another attempt goes on; NULL: there is none, or no need.
    files: Sha256 of the blobs that came out: kept as long as the job, named by a model or not.
    """

    job_id = key(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    row_index = key(BigInteger, check="row_index >= 0")
    reports = must(JSONB, default="'{}'")
    checkpoint = may(Text)
    files = must(ARRAY(Text), default="'{}'")
    told = must(TIME, default=NOW)


fit = table("fit", _FitColumns)


class _SealedColumnColumns(TypedColumns):
    """All answers of one task in one block, in row order, as flat typed arrays.

    key: Reuse key: digest of fields, task and model. NULL: not to be reused.
    refs: Blocks of jobs that show this column; removed at 0.
    status: A byte per row: 0 ok, 1 error, 2 skipped, +16 truncated. NULL: all ok.
    texts: UTF-8 JSON values end to end, cut by offsets.
    """

    id = identity()
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    key = may(LargeBinary)
    refs = must(Integer, default="1")
    kind = must(Text)
    n_rows = must(Integer)
    n_ok = must(Integer)
    n_error = must(Integer)
    n_skipped = must(Integer)
    status = may(LargeBinary)
    errors = may(JSONB)
    offsets = may(ARRAY(Integer))
    codes = may(ARRAY(SmallInteger))
    scores = may(ARRAY(REAL))
    all_scores = may(ARRAY(REAL))
    numbers = may(ARRAY(Double))
    starts = may(ARRAY(Integer))
    ends = may(ARRAY(Integer))
    texts = may(LargeBinary)
    vectors = may(LargeBinary, external=True)
    dim = must(Integer, default="0")
    dtype = must(Text, default="''")


sealed_column = table(
    "sealed_column",
    _SealedColumnColumns,
    index("sealed_column_by_key", "tenant_id", "key", unique=True, where="key IS NOT NULL"),
    index("sealed_column_unshown", "id", where="refs <= 0"),
)


class _BlockColumnColumns(TypedColumns):
    """Which sealed column a block of a job shows for a task."""

    job_id = key(Uuid)
    block_number = key(Integer)
    task_number = key(SmallInteger)
    column_id = must(BigInteger, ForeignKey("sealed_column.id"))


block_column = table(
    "block_column",
    _BlockColumnColumns,
    within("block", job_id="job_id", block_number="number"),
    index("block_column_by_column", "column_id"),
)
