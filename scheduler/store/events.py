"""Events: what is told to the outside when it is committed, such as rows for which a job's ``notify_when`` holds.

The end of a job is written where it ends (``endings``). All functions work inside the caller's transaction.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, text

from motet.conditions import condition
from motet.protocol.columns import Column
from motet.states import Skip
from scheduler.readable import Readable, UpstreamAnswer
from scheduler.store.database import EVENTS, Asked, together
from scheduler.store.results import COLUMN_FIELDS, column_of

#: Rows of one job that are events; those beyond are counted alone. More: a condition that holds for most rows fills the
#: outbox with what nobody can read. Fewer: alerts of long-lived open jobs fall silent sooner.
MOST_ROWS = 100_000
#: Answers that an event may tell: a label, labels, a number. All others hold texts.
_TOLD = frozenset({"label", "labels", "number"})

# Of blocks that have every answer that their job's condition reads: each of them once for each such task, with its column.
# One round trip: whoever waits for these rows waits for it too.
_ANSWERED = f"""
    SELECT b.job_id, b.number, b.first_row, j.tenant_id, j.notify_when, j.rows_matched, t.name, t.spec, t.labels,
           {COLUMN_FIELDS}
      FROM unnest(CAST(%s AS uuid[]), CAST(%s AS int[])) k (job, block)
      JOIN job j ON j.id = k.job JOIN block b ON b.job_id = k.job AND b.number = k.block
     CROSS JOIN LATERAL unnest(j.notify_needs) n (task) JOIN task t ON t.job_id = k.job AND t.number = n.task
      JOIN block_column c ON c.job_id = k.job AND c.block_number = k.block AND c.task_number = n.task
      JOIN sealed_column s ON s.id = c.column_id
     WHERE (SELECT count(*) FROM block_column a WHERE a.job_id = k.job AND a.block_number = k.block
               AND a.task_number = ANY(j.notify_needs)) = cardinality(j.notify_needs)
     ORDER BY b.job_id, b.number, n.task"""
_MATCHED = text("UPDATE job SET rows_matched = rows_matched + :n WHERE id = :job")
_TELL = text(f"""
    WITH told AS (
      INSERT INTO outbox (tenant_id, kind, job_id, body)
      SELECT :tenant, :kind, CAST(:job AS uuid), CAST(b AS jsonb) FROM unnest(CAST(:bodies AS text[])) b)
    SELECT pg_notify('{EVENTS}', '')""")


def tell_event(
    connection: Connection, tenant: UUID, kind: str, job: UUID | None, *bodies: Mapping[str, Any]
) -> None:
    """Write events of one kind about a job: with this transaction they are told, or never were."""
    connection.execute(*_telling(tenant, kind, job, bodies))


def _telling(tenant: UUID, kind: str, job: UUID | None, bodies: Sequence[Mapping[str, Any]]) -> Asked:
    """The statement of ``tell_event``."""
    written = [json.dumps(body, allow_nan=False) for body in bodies]
    return _TELL, {"tenant": tenant, "kind": kind, "job": job, "bodies": written}


def tell_matches(connection: Connection, blocks: Collection[tuple[UUID, int]]) -> None:
    """Write an event for each row of these blocks for which its job's condition holds, and count them.

    Blocks of jobs that have a condition, of which an answer that it reads has just come to be shown: of those that have
    all of them by now each is looked at once, since the caller holds the job's lock.
    """
    if not blocks:
        return
    jobs, numbers = zip(*sorted(blocks), strict=True)
    whole: dict[tuple[UUID, int], list[_Answered]] = defaultdict(list)
    driver: Any = connection.connection.driver_connection
    with driver.cursor(binary=True) as cursor:
        for job, number, *fields in cursor.execute(_ANSWERED, (list(jobs), list(numbers))):
            whole[job, number].append(_Answered(*(*fields[:7], column_of(fields[7:]))))
    found: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    first: dict[UUID, _Answered] = {}
    for (job, _), of_block in whole.items():
        first.setdefault(job, of_block[0])
        answers = [UpstreamAnswer(one.task, one.spec, tuple(one.labels), one.column) for one in of_block]
        found[job] += _matches(of_block[0].notify_when, of_block[0].first_row, answers)
    for job, bodies in sorted(found.items()):
        if bodies:
            asked: list[Asked] = [(_MATCHED, {"job": job, "n": len(bodies)})]
            if told := bodies[: max(0, MOST_ROWS - first[job].rows_matched)]:
                asked.append(_telling(first[job].tenant, "row_matched", job, told))
            together(connection, *asked)


class _Answered(NamedTuple):
    """What a task that a condition reads answered in a block."""

    first_row: int
    tenant: UUID
    notify_when: str
    #: Of the job, so far.
    rows_matched: int
    task: str
    spec: Mapping[str, Any]
    labels: Sequence[str]
    column: Column


def _matches(written: str, first_row: int, answers: Sequence[UpstreamAnswer]) -> list[dict[str, Any]]:
    """The events of a block: index of each row for which a condition holds, with the answers that may be told.

    A row of which an answer failed is none: it is not known. An answer that a condition of its own left out is null.
    """
    held = condition(written)
    readable = Readable({}, {}, {a.name: a for a in answers})
    failed = {i for a in answers for i, error in a.column.errors.items() if error.error != Skip.CONDITION}
    rows = [i for i in range(len(answers[0].column)) if i not in failed]
    columns = [readable.compared(one, rows) for one in held.placeholders]
    told = {a.name: readable.compared(a.name, rows) for a in answers if a.column.kind in _TOLD}
    return [
        {"row": first_row + i, "answers": {name: _finite(values[n]) for name, values in told.items()}}
        for n, (i, *values) in enumerate(zip(rows, *columns, strict=True))
        if held.holds(dict(zip(held.placeholders, values, strict=True)))
    ]


def _finite(value: Any) -> Any:
    """What JSON can hold of an answer."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
