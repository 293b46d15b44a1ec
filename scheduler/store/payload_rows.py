"""What a payload is made of: the texts of blocks, the answers that a pass reads, the pass and its tasks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from scheduler.readable import UpstreamAnswer
from scheduler.store.places import PLACES, at_places
from scheduler.store.results import read_columns

_TEXTS = text("""
    SELECT b.job_id, b.number, b.payload, b.row_order, b.first_row, b.bad_fields <> '{}'
      FROM unnest(CAST(:jobs AS uuid[]), CAST(:blocks AS int[])) k (job, block)
      JOIN block b ON b.job_id = k.job AND b.number = k.block""")
_PASS = text("""
    SELECT p.kind, p.numerics, p.max_tokens, p.input, p.needs, p.condition, m.manifest, j.tenant_id, j.priority
      FROM pass p JOIN model m ON m.id = p.model_id JOIN job j ON j.id = p.job_id
     WHERE p.job_id = :job AND p.number = :pass""")
_TASKS = text("""
    SELECT t.number, t.name, t.spec, m.manifest FROM task t JOIN model m ON m.id = t.model_id
     WHERE t.job_id = :job AND t.pass_number = :pass ORDER BY t.number""")


def block_texts(
    connection: Connection, blocks: Collection[tuple[str, int]]
) -> dict[tuple[str, int], tuple[bytes, bytes, int, bool]]:
    """(job, block) -> payload, row order, first row, and whether some pass has an order of its own from the start.

    Of those that are still there.
    """
    jobs, numbers = zip(*blocks, strict=True)
    at = {"jobs": [UUID(job) for job in jobs], "blocks": list(numbers)}
    return {
        (str(job), number): (bytes(payload), bytes(order), first_row, partly_bad)
        for job, number, payload, order, first_row, partly_bad in connection.execute(_TEXTS, at)
    }


_UPSTREAM = text(f"""
    SELECT w.job_id, w.pass_number, w.block_number, w.row_order, n.task, t.name, t.spec, t.labels, c.column_id
      FROM {PLACES} k (job, pass, block)
      JOIN block_pass w ON w.job_id = k.job AND w.pass_number = k.pass AND w.block_number = k.block
      JOIN pass p ON p.job_id = k.job AND p.number = k.pass LEFT JOIN LATERAL unnest(p.needs) n (task) ON true
      LEFT JOIN task t ON t.job_id = k.job AND t.number = n.task
      LEFT JOIN block_column c ON c.job_id = k.job AND c.block_number = k.block AND c.task_number = n.task""")


def upstream_answers(
    connection: Connection, places: Collection[tuple[str, int, int]]
) -> dict[tuple[str, int, int], tuple[bytes | None, list[UpstreamAnswer]]]:
    """Of these released places that are still there: their own row order, if any, and the answers that they read."""
    rows = connection.execute(_UPSTREAM, at_places(places)).all()
    columns = read_columns(connection, sorted({row.column_id for row in rows} - {None}))
    found: dict[tuple[str, int, int], tuple[bytes | None, list[UpstreamAnswer]]] = {}
    # A job may be removed while we read.
    gone = {row.job_id for row in rows if row.task is not None and row.column_id not in columns}
    for row in rows:
        if row.job_id in gone:
            continue
        where = (str(row.job_id), row.pass_number, row.block_number)
        order = None if row.row_order is None else bytes(row.row_order)
        _, answers = found.setdefault(where, (order, []))
        if row.task is not None:
            answers.append(UpstreamAnswer(row.name, row.spec, tuple(row.labels), columns[row.column_id]))
    return found


def pass_of(connection: Connection, job: str, pass_number: int) -> tuple[Any, list[Any]] | None:
    """The pass and its tasks with their manifests; None where the job was removed."""
    at = {"job": UUID(job), "pass": pass_number}
    found = connection.execute(_PASS, at).first()
    return (found, list(connection.execute(_TASKS, at))) if found else None
