"""Training runs: how far each is, its checkpoint, and the rows of the job that it learns from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import NotFound
from motet.protocol.columns import Column, sized
from motet.states import ENDED
from scheduler.store.results import VECTORS, read_columns


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whoever holds a live lease of a training job."""

    job: UUID
    tenant: UUID


_BEARER = text("""
    SELECT s.job_id, j.tenant_id FROM lease l JOIN subtask s ON s.id = l.subtask_id JOIN job j ON j.id = s.job_id
     WHERE l.subtask_id = :subtask AND l.attempt = :attempt AND l.nonce = :nonce AND l.until > clock_timestamp()
       AND j.kind = 'train'""")
_RECIPE = text("""
    SELECT b.payload, :row - b.first_row AS at FROM block b
     WHERE b.job_id = :job AND b.first_row <= :row AND b.first_row + b.n_rows > :row""")
_ROW = text("SELECT n_rows FROM job WHERE id = :job")
_FIT = text("SELECT checkpoint FROM fit WHERE job_id = :job AND row_index = :row")
_TELL = text("""
    INSERT INTO fit (job_id, row_index, reports, checkpoint, files)
    VALUES (:job, :row, CAST(:reports AS jsonb), :checkpoint, :files)
    ON CONFLICT (job_id, row_index) DO UPDATE
       SET reports = fit.reports || excluded.reports, told = clock_timestamp(),
           checkpoint = CASE WHEN excluded.files <> '{}' THEN NULL ELSE coalesce(excluded.checkpoint, fit.checkpoint) END,
           files = CASE WHEN excluded.files <> '{}' THEN excluded.files ELSE fit.files END""")
_FITS = text("""
    SELECT f.row_index, f.reports, count(*) OVER () AS n FROM fit f JOIN job j ON j.id = f.job_id
     WHERE f.job_id = :job AND j.tenant_id = :tenant ORDER BY f.row_index LIMIT :limit""")
#: Runs of a job that are told at most.
MAX_FITS = 1000
#: A block of a job with its vectors, and what keeps them from being learned from.
_DATA = text(f"""
    SELECT j.state, j.n_tasks, j.n_blocks, t.kind, p.input, b.payload, bc.column_id, {VECTORS}
      FROM job j LEFT JOIN task t ON t.job_id = j.id AND t.number = 0 LEFT JOIN model m ON m.id = t.model_id
      LEFT JOIN pass p ON p.job_id = j.id AND p.number = t.pass_number
      LEFT JOIN block b ON b.job_id = j.id AND b.number = :number
      LEFT JOIN block_column bc ON bc.job_id = b.job_id AND bc.block_number = b.number AND bc.task_number = t.number
     WHERE j.id = :job AND j.tenant_id = :tenant""")


def bearer(connection: Connection, subtask: int, attempt: int, nonce: str) -> Bearer | None:
    """The training job whose attempt this is; None where no such lease lives."""
    row = connection.execute(_BEARER, {"subtask": subtask, "attempt": attempt, "nonce": nonce}).first()
    return None if row is None else Bearer(row.job_id, row.tenant_id)


def recipe_block(connection: Connection, job: UUID, row: int) -> tuple[bytes, int] | None:
    """The block of a training job that holds this row, and where in it; None where the job has no such row."""
    found = connection.execute(_RECIPE, {"job": job, "row": row}).first()
    return None if found is None else (bytes(found.payload), int(found.at))


def checkpoint(connection: Connection, job: UUID, row: int) -> str | None:
    """Sha256 of where a run goes on; None where it begins at its beginning."""
    found = connection.execute(_FIT, {"job": job, "row": row}).first()
    return None if found is None else found.checkpoint


def tell(
    connection: Connection,
    job: UUID,
    row: int,
    *,
    reports: Mapping[str, Any],
    checkpoint: str | None = None,
    files: Sequence[str] = (),
) -> str | None:
    """Note how far a run is. With ``files`` it has ended: they are what came out, and no checkpoint is needed.

    Returns the checkpoint that is not needed any more, if there is one. Raises NotFound where the job has no such row.
    """
    rows = connection.execute(_ROW, {"job": job}).scalar()
    if rows is None or row >= rows:
        raise NotFound("the job has no such row")
    at = {
        "job": job,
        "row": row,
        "reports": json.dumps(reports),
        "checkpoint": checkpoint,
        "files": list(files),
    }
    before = connection.execute(_FIT, {"job": job, "row": row}).first()
    connection.execute(_TELL, at)
    old = None if before is None else before.checkpoint
    return old if old != checkpoint and (checkpoint or files) else None


def fits(connection: Connection, tenant: UUID, job: UUID) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """(row, reports) of the runs of a job that have said something, and how many there are beyond."""
    found = connection.execute(_FITS, {"job": job, "tenant": tenant, "limit": MAX_FITS}).all()
    told = [(row.row_index, row.reports) for row in found]
    return told, found[0].n - len(told) if found else 0


@dataclass(frozen=True, slots=True)
class LessonBlock:
    """A block of a job that is learned from."""

    payload: bytes
    #: The template of what was embedded.
    input: str
    vectors: Column


def lesson(connection: Connection, tenant: UUID, job: UUID, number: int) -> LessonBlock | None:
    """A block with its vectors; None behind the last one. Raises NotFound where that cannot be learned from."""
    row = connection.execute(_DATA, {"job": job, "tenant": tenant, "number": number}).first()
    if row is None:
        raise NotFound(f"job {job}, whose rows are learned from, is not there; embed them again")
    if row.n_tasks != 1 or row.kind != "embed":
        raise NotFound(f"job {job} does not only embed; learn from a job whose one task is Embed")
    if row.state not in ENDED:
        raise NotFound(f"job {job} has not ended; wait for it before you learn from it")
    if number >= row.n_blocks:
        return None
    column = read_columns(connection, [row.column_id]).get(row.column_id) if row.column_id else None
    if column is None:
        raise NotFound(f"job {job} ended without the vectors of block {number}; embed its rows again")
    return LessonBlock(bytes(row.payload), row.input, sized(column, row.dim, row.dtype))
