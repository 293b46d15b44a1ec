"""What happens in one job: its passes, devices, sub-tasks in time, throughput and errors, summed up in SQL.

All times are seconds since the job was created, by the database's clock alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import NotFound
from motet.states import ENDED, State
from scheduler.store import ask_spans
from scheduler.store.ask_spans import KEPT_S, AskSpan
from scheduler.store.database import one_moment
from scheduler.store.jobs import JobEntry, job_entry

#: The job's life is cut into so many equal buckets.
BUCKETS = 60
#: Answers end here, whatever a job does.
MAX_DEVICES, MAX_ERRORS, MESSAGE_CHARS = 1000, 50, 500
#: Blocks and sub-tasks of an open job that are looked at: it may have millions.
NEWEST = 10_000
#: Cells without an answer that are told by class; the others are counted under this name.
LOOKED_INTO, NOT_LOOKED_INTO = 100_000, "not_looked_into"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassActivity:
    """How far one pass is."""

    number: int
    kind: str
    tasks: tuple[str, ...]
    blocks: int
    blocks_sealed: int
    #: For cells of other tasks.
    blocks_waiting: int
    #: Rows to do here, answered by reuse included; what is neither open nor done waits.
    rows: int
    rows_open: int
    rows_done: int
    subtasks_open: int
    subtasks_done: int
    subtasks_lost: int
    subtasks_failed: int
    #: Tokens read, and what a pass per task would have read of the same rows.
    tokens: int
    unfused_tokens: int
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceActivity:
    """What one worker has done for the job, and does."""

    worker: str
    #: As its leases name it; "" where it holds none now.
    device_name: str
    #: Sub-tasks that it brought to an end, and leases that it holds now.
    subtasks: int
    open: int
    rows: int
    tokens: int
    busy_s: float
    #: From its first lease to its last outcome, or to now while it holds one.
    span_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtaskActivity:
    """One sub-task in time."""

    id: int
    #: Who did it, has it, or lost it; "" where no lease is known any more.
    worker: str
    pass_number: int
    state: Literal["open", "done", "lost", "failed"]
    exclusive: bool
    carved_s: float
    #: When its device began with it: its end less its busy seconds, where these are known.
    start_s: float
    end_s: float | None
    rows: int
    tokens: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens and rows per second of one bucket, which ends at ``at_s``."""

    at_s: float
    tokens_s: float
    rows_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorClass:
    """Cells of one task without an answer, for one reason; of sealed columns."""

    task: str
    error: str
    count: int
    first_row: int
    #: Of the first row.
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """A job as of one moment."""

    job: JobEntry
    #: That moment; of a job that has ended, its end.
    now_s: float
    passes: tuple[PassActivity, ...]
    devices: tuple[DeviceActivity, ...]
    timeline: tuple[SubtaskActivity, ...]
    throughput: tuple[Throughput, ...]
    errors: tuple[ErrorClass, ...]
    #: Of an open job: its asks of late; else none.
    asks: tuple[AskSpan, ...]
    #: How many there are beyond those told.
    subtasks_left_out: int
    devices_left_out: int
    errors_left_out: int


_NOW = text("""
    SELECT created, state, n_blocks, date_part('epoch', coalesce(finished, clock_timestamp()) - created) AS now_s
      FROM job WHERE id = :job AND tenant_id = :tenant""")


def activity(connection: Connection, tenant: UUID, job: UUID, *, timeline: int) -> Activity:
    """What happens in a job, with its newest ``timeline`` sub-tasks. Raises NotFound.

    The connection's transaction must be fresh: it becomes a read of one moment.
    """
    one_moment(connection)
    found = connection.execute(_NOW, {"job": job, "tenant": tenant}).first()
    if found is None:
        raise NotFound(f"no job {job}")
    is_open = found.state == State.OPEN
    life = {"job": job, "created": found.created, "now": found.now_s, "since": 0.0}
    life |= {"from_block": 0, "from_subtask": 0}
    if is_open:
        # Its rows are of days, and only the newest are looked at.
        life["from_block"] = max(0, found.n_blocks - NEWEST)
        life["from_subtask"] = connection.execute(_NEWEST, {"job": job, "newest": NEWEST}).scalar() or 0
        life["since"] = max(0.0, found.now_s - KEPT_S)
    passes = _passes(connection, life)
    newest = _told(connection.execute(_TIMELINE, {**life, "limit": timeline}), found.now_s)
    devices, n_devices = _devices(connection, life)
    errors, n_errors = _errors(connection, life)
    n_subtasks = sum(p.subtasks_open + p.subtasks_done + p.subtasks_lost + p.subtasks_failed for p in passes)
    return Activity(
        job=job_entry(connection, tenant, job),
        now_s=found.now_s,
        passes=tuple(passes),
        devices=tuple(devices),
        timeline=tuple(newest),
        throughput=tuple(_throughput(connection, life)),
        errors=tuple(errors),
        asks=tuple(ask_spans.look(connection, job)) if is_open else (),
        subtasks_left_out=n_subtasks - len(newest),
        devices_left_out=n_devices - len(devices),
        errors_left_out=n_errors - len(errors),
    )


_NEWEST = text("SELECT id FROM subtask WHERE job_id = :job ORDER BY id DESC OFFSET :newest LIMIT 1")
_PASSES = text("""
    SELECT p.number, p.kind, b.*, s.*,
           (SELECT sum(u.tokens_in) FROM spent u JOIN task t ON t.job_id = u.job_id AND t.number = u.task_number
             WHERE u.job_id = p.job_id AND u.block_number >= :from_block AND t.pass_number = p.number) AS prompt_tokens,
           ARRAY(SELECT t.name FROM task t WHERE t.job_id = p.job_id AND t.pass_number = p.number ORDER BY t.number) AS tasks
      FROM pass p
      LEFT JOIN (SELECT pass_number, count(*) AS blocks, count(*) FILTER (WHERE state = 'sealed') AS blocks_sealed,
                        count(*) FILTER (WHERE state = 'waiting') AS blocks_waiting, sum(n) AS n_rows, sum(done) AS rows_done
                   FROM block_pass WHERE job_id = :job AND block_number >= :from_block GROUP BY pass_number) b ON b.pass_number = p.number
      LEFT JOIN (SELECT pass_number, count(*) FILTER (WHERE state = 'open') AS n_open,
                        count(*) FILTER (WHERE state = 'done') AS n_done,
                        count(*) FILTER (WHERE state = 'lost') AS n_lost,
                        count(*) FILTER (WHERE state = 'failed') AS n_failed,
                        sum(n_rows) FILTER (WHERE state = 'open') AS rows_open,
                        sum(tokens) AS tokens, sum(tokens * bit_count(CAST(todo AS bit(64)))) AS unfused_tokens,
                        CAST(sum(busy_s) AS double precision) AS busy_s
                   FROM subtask WHERE job_id = :job AND id > :from_subtask GROUP BY pass_number) s ON s.pass_number = p.number
     WHERE p.job_id = :job ORDER BY p.number""")


def _passes(connection: Connection, life: Mapping[str, Any]) -> list[PassActivity]:
    return [
        PassActivity(
            number=row.number,
            kind=row.kind,
            tasks=tuple(row.tasks),
            blocks=row.blocks or 0,
            blocks_sealed=row.blocks_sealed or 0,
            blocks_waiting=row.blocks_waiting or 0,
            rows=int(row.n_rows or 0),
            rows_open=int(row.rows_open or 0),
            rows_done=int(row.rows_done or 0),
            subtasks_open=row.n_open or 0,
            subtasks_done=row.n_done or 0,
            subtasks_lost=row.n_lost or 0,
            subtasks_failed=row.n_failed or 0,
            tokens=int(row.tokens or 0),
            # Prompts differ in length by task, and each says itself what it would have cost alone.
            unfused_tokens=int(row.prompt_tokens or row.unfused_tokens or 0),
            busy_s=row.busy_s or 0.0,
        )
        for row in connection.execute(_PASSES, life)
    ]


# A lease is dropped when its sub-task closes, so the two halves count nothing twice.
_DEVICES = text("""
    SELECT worker, max(device) AS device, sum(closed) AS subtasks, sum(open) AS n_open, sum(n_rows) AS n_rows,
           sum(tokens) AS tokens, CAST(sum(busy_s) AS double precision) AS busy_s,
           date_part('epoch', min(first) - :created) AS first_s, date_part('epoch', max(last) - :created) AS last_s,
           count(*) OVER () AS n
      FROM (SELECT worker, '' AS device, count(*) AS closed, 0 AS open,
                   coalesce(sum(n_rows) FILTER (WHERE state = 'done'), 0) AS n_rows, sum(tokens) AS tokens,
                   sum(busy_s) AS busy_s, min(created) AS first, max(closed) AS last
              FROM subtask WHERE job_id = :job AND id > :from_subtask AND worker <> '' AND state IN ('done', 'failed') GROUP BY worker
            UNION ALL
            SELECT l.worker, max(l.device), 0, count(*), 0, 0, 0, min(l.leased), NULL
              FROM subtask s JOIN lease l ON l.subtask_id = s.id
             WHERE s.job_id = :job AND s.state = 'open' GROUP BY l.worker) both_halves
     GROUP BY worker ORDER BY max(first) DESC LIMIT :limit""")


def _devices(connection: Connection, life: Mapping[str, Any]) -> tuple[list[DeviceActivity], int]:
    """The devices that came last, and how many there are in all."""
    found = connection.execute(_DEVICES, {**life, "limit": MAX_DEVICES}).all()
    told = [
        DeviceActivity(
            worker=row.worker,
            device_name=row.device,
            subtasks=int(row.subtasks),
            open=int(row.n_open),
            rows=int(row.n_rows),
            tokens=int(row.tokens),
            busy_s=row.busy_s,
            span_s=max(0.0, (life["now"] if row.n_open else row.last_s) - row.first_s),
        )
        for row in sorted(found, key=lambda row: str(row.worker))
    ]
    return told, found[0].n if found else 0


_SUBTASK = """
    SELECT s.id, s.pass_number, s.state, s.exclusive, s.n_rows, s.tokens, s.busy_s,
           date_part('epoch', s.created - :created) AS carved_s, date_part('epoch', s.closed - :created) AS end_s,
           coalesce(nullif(s.worker, ''), (SELECT l.worker FROM lease l WHERE l.subtask_id = s.id
                                            ORDER BY l.attempt LIMIT 1), '') AS worker"""
# Open ones before all others: a straggler is what one looks for.
_TIMELINE = text(f"""{_SUBTASK}
      FROM (SELECT id, state <> 'open' AS closed FROM subtask WHERE job_id = :job AND state = 'open'
            UNION (SELECT id, state <> 'open' FROM subtask WHERE job_id = :job ORDER BY id DESC LIMIT :limit)
            ORDER BY closed, id DESC LIMIT :limit) newest
      JOIN subtask s ON s.id = newest.id ORDER BY s.id""")
_PAGE = text(f"""{_SUBTASK}
      FROM subtask s WHERE s.job_id = :job AND s.id > :after ORDER BY s.id LIMIT :limit""")


def subtasks(
    connection: Connection, tenant: UUID, job: UUID, *, after: int, limit: int
) -> tuple[list[SubtaskActivity], int | None]:
    """The job's sub-tasks of higher ids than ``after``, oldest first, and the ``after`` for those that follow, or None.

    Raises NotFound.
    """
    found = connection.execute(_NOW, {"job": job, "tenant": tenant}).first()
    if found is None:
        raise NotFound(f"no job {job}")
    at = {"job": job, "created": found.created, "after": after, "limit": limit + 1}
    told = _told(connection.execute(_PAGE, at), found.now_s)
    return told[:limit], told[limit - 1].id if len(told) > limit else None


def _told(rows: Iterable[Any], now_s: float) -> list[SubtaskActivity]:
    found = []
    for row in rows:
        end_s = None if row.end_s is None else min(row.end_s, now_s)
        began_s = row.carved_s if end_s is None or not row.busy_s else end_s - row.busy_s
        found.append(
            SubtaskActivity(
                id=row.id,
                worker=row.worker,
                pass_number=row.pass_number,
                state=row.state,
                exclusive=row.exclusive,
                carved_s=row.carved_s,
                start_s=max(row.carved_s, began_s),
                end_s=end_s,
                rows=row.n_rows,
                tokens=row.tokens,
                busy_s=row.busy_s,
            )
        )
    return found


# Tokens of a sub-task are spread evenly over the time that it took, so that long ones make no spikes.
_THROUGHPUT = text("""
    WITH done AS MATERIALIZED (
      SELECT tokens, n_rows, date_part('epoch', created - :created) AS carved_s, CAST(busy_s AS double precision) AS busy_s,
             least(date_part('epoch', closed - :created), :now) AS end_s
        FROM subtask WHERE job_id = :job AND id > :from_subtask AND state = 'done'),
    timed AS MATERIALIZED (
      SELECT tokens, n_rows, least(greatest(carved_s, end_s - busy_s), end_s - CAST(1e-6 AS double precision)) - :since AS start_s,
             end_s - :since AS end_s
        FROM done WHERE end_s >= :since),
    spread AS MATERIALIZED (
      SELECT tokens, n_rows, bucket,
             (least(end_s, (bucket + 1) * :width) - greatest(start_s, bucket * :width)) / (end_s - start_s) AS share
        FROM timed, generate_series(CAST(greatest(0, floor(start_s / :width)) AS int),
                                    CAST(least(:buckets - 1, floor(end_s / :width)) AS int)) bucket)
    SELECT bucket, sum(tokens * share) AS tokens, sum(n_rows * share) AS n_rows FROM spread GROUP BY bucket""")


def _throughput(connection: Connection, life: Mapping[str, Any]) -> list[Throughput]:
    width = (life["now"] - life["since"]) / BUCKETS
    if width <= 0:
        return []
    at = {**life, "width": width, "buckets": BUCKETS}
    found = {row.bucket: row for row in connection.execute(_THROUGHPUT, at)}
    if not found:
        return []
    return [
        Throughput(
            life["since"] + (b + 1) * width,
            found[b].tokens / width if b in found else 0.0,
            found[b].n_rows / width if b in found else 0.0,
        )
        for b in range(BUCKETS)
    ]


# Cells are looked into up to a bound, from the first block on; those beyond it are counted without their class.
_ERRORS = text("""
    WITH bad AS MATERIALIZED (
      SELECT bc.task_number, bc.block_number, bc.column_id, s.n_error + s.n_skipped AS n,
             sum(s.n_error + s.n_skipped) OVER (ORDER BY bc.block_number, bc.task_number) AS upto
        FROM block_column bc JOIN sealed_column s ON s.id = bc.column_id
       WHERE bc.job_id = :job AND bc.block_number >= :from_block AND s.n_error + s.n_skipped > 0),
    counted AS (
      SELECT bad.task_number, e.value ->> 'error' AS error, count(*) AS n,
             min(ARRAY[bad.block_number, CAST(e.key AS int)]) AS first
        FROM bad JOIN sealed_column s ON s.id = bad.column_id CROSS JOIN LATERAL jsonb_each(s.errors) e
       WHERE bad.upto - bad.n < :looked GROUP BY 1, 2
      UNION ALL
      SELECT task_number, NULL, sum(n), min(ARRAY[block_number, 0]) FROM bad WHERE upto - n >= :looked GROUP BY 1),
    most AS (SELECT *, count(*) OVER () AS n_classes FROM counted
             ORDER BY n DESC, first, task_number LIMIT :limit)
    SELECT t.name, c.error, c.n, c.n_classes, b.first_row + c.first[2] AS first_row,
           left(s.errors -> CAST(c.first[2] AS text) ->> 'message', :chars) AS message
      FROM most c JOIN task t ON t.job_id = :job AND t.number = c.task_number
      JOIN block b ON b.job_id = :job AND b.number = c.first[1]
      JOIN block_column bc ON bc.job_id = :job AND bc.block_number = b.number AND bc.task_number = c.task_number
      JOIN sealed_column s ON s.id = bc.column_id
     ORDER BY c.n DESC, c.first, t.number""")


def _errors(connection: Connection, life: Mapping[str, Any]) -> tuple[list[ErrorClass], int]:
    """The classes of most cells, and how many classes there are in all."""
    at = {
        "job": life["job"],
        "from_block": life["from_block"],
        "looked": LOOKED_INTO,
        "limit": MAX_ERRORS,
        "chars": MESSAGE_CHARS,
    }
    found = connection.execute(_ERRORS, at).all()
    told = [
        ErrorClass(
            task=row.name,
            error=NOT_LOOKED_INTO if row.error is None else row.error,
            count=int(row.n),
            first_row=row.first_row,
            message=f"only the first {LOOKED_INTO:,} cells are told by class"
            if row.error is None
            else row.message or "",
        )
        for row in found
    ]
    return told, found[0].n_classes if found else 0


def ended(job: JobEntry) -> bool:
    """Nothing of it will change."""
    return job.state in ENDED


def waiting(job: JobEntry, p: PassActivity) -> int:
    """Rows of a pass that are still to be carved; none once the job has ended."""
    return 0 if ended(job) else max(0, p.rows - p.rows_open - p.rows_done)
