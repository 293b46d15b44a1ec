"""What a payload is made of: the texts of blocks, the answers that a pass reads, the pass and its tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, text

from motet.protocol.manifest import Manifest
from scheduler.readable import UpstreamAnswer
from scheduler.store.database import together
from scheduler.store.manifests import Manifests, ModelId
from scheduler.store.places import PLACES, at_places
from scheduler.store.results import read_columns

_TEXTS = text("""
    SELECT b.job_id, b.number, b.payload, b.row_order, b.first_row, b.bad_fields <> '{}' AS partly_bad, b.say
      FROM unnest(CAST(:jobs AS uuid[]), CAST(:blocks AS int[])) k (job, block)
      JOIN block b ON b.job_id = k.job AND b.number = k.block""")
_PASSES = text("""
    SELECT p.job_id, p.number, p.kind, p.numerics, p.max_tokens, p.input, p.needs, p.condition, j.tenant_id, j.priority,
           m.id AS model, m.created AS model_created, t.number AS task, t.name, t.spec, h.id AS head, h.created AS head_created
      FROM unnest(CAST(:jobs AS uuid[]), CAST(:passes AS smallint[])) k (job, pass)
      JOIN pass p ON p.job_id = k.job AND p.number = k.pass JOIN model m ON m.id = p.model_id JOIN job j ON j.id = p.job_id
      JOIN task t ON t.job_id = k.job AND t.pass_number = k.pass JOIN model h ON h.id = t.model_id
     ORDER BY p.job_id, p.number, t.number""")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """A block as it landed."""

    payload: bytes
    row_order: bytes
    first_row: int
    #: Some pass has an order of its own from the start.
    partly_bad: bool
    #: The API process that reads along; "": none.
    say: str


def passes_and_blocks(
    connection: Connection,
    passes: Collection[tuple[str, int]],
    blocks: Collection[tuple[str, int]],
    manifests: Manifests,
) -> tuple[dict[tuple[str, int], StoredPass], dict[tuple[str, int], StoredBlock]]:
    """These (job, pass) and (job, block), as far as they are still there."""
    found, texts = together(
        connection,
        (_PASSES, {"jobs": [UUID(job) for job, _ in passes], "passes": [n for _, n in passes]}),
        (_TEXTS, {"jobs": [UUID(job) for job, _ in blocks], "blocks": [n for _, n in blocks]}),
    )
    return _passes(connection, found, manifests), {
        (str(row.job_id), row.number): StoredBlock(
            payload=row.payload,
            row_order=row.row_order,
            first_row=row.first_row,
            partly_bad=row.partly_bad,
            say=row.say,
        )
        for row in texts
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTask:
    """A task of a pass."""

    number: int
    name: str
    spec: Mapping[str, Any]
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPass:
    """A pass as its sub-tasks are sent."""

    kind: str
    numerics: Literal["fast", "exact"]
    max_tokens: int
    input: str
    #: It reads other tasks' answers, or has a condition: some rows of a block may not be its own.
    own_order: bool
    tenant: str
    priority: int
    model: Manifest
    #: In order.
    tasks: tuple[StoredTask, ...]


def _passes(
    connection: Connection, found: Sequence[Any], manifests: Manifests
) -> dict[tuple[str, int], StoredPass]:
    rows: dict[tuple[str, int], list[Any]] = {}
    for row in found:
        rows.setdefault((str(row.job_id), row.number), []).append(row)
    models = {
        model for row in found for model in ((row.model, row.model_created), (row.head, row.head_created))
    }
    known = manifests.of(connection, models)
    return {where: _pass(of_pass, known) for where, of_pass in rows.items()}


def _pass(rows: Sequence[Any], known: Mapping[ModelId, Manifest]) -> StoredPass:
    first = rows[0]
    return StoredPass(
        kind=first.kind,
        numerics=first.numerics,
        max_tokens=first.max_tokens,
        input=first.input,
        own_order=bool(first.needs) or first.condition is not None,
        tenant=str(first.tenant_id),
        priority=first.priority,
        model=known[first.model, first.model_created],
        tasks=tuple(
            StoredTask(
                number=row.task, name=row.name, spec=row.spec, manifest=known[row.head, row.head_created]
            )
            for row in rows
        ),
    )
