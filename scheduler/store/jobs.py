"""Jobs as they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import NotFound
from motet.protocol.columns import Kind
from motet.protocol.manifest import column_kind
from motet.states import State
from scheduler.store.database import Asked, together
from scheduler.store.results import VECTORS


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """A task as its job shows it."""

    name: str
    spec: Mapping[str, Any]
    model_ref: str
    #: Of the artefact that its function reads; "" where it reads none.
    artefact_ref: str
    labels: tuple[str, ...]
    #: Kind of its columns.
    kind: Kind
    #: Of its vectors, where it has any.
    dim: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEntry:
    """A pass as its job shows it."""

    kind: str
    tasks: tuple[str, ...]
    model_ref: str
    numerics: str
    max_tokens: int
    #: Tasks whose answers it reads.
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEntry:
    """A job as it is shown."""

    id: UUID
    name: str
    kind: str
    state: State
    reason: str
    priority: int
    n_rows: int
    n_tasks: int
    n_parts: int
    n_blocks: int
    blocks_done: int
    cells_ok: int
    cells_error: int
    cells_skipped: int
    cells_reused: int
    tokens: int
    computed_tokens: int
    #: Of language models: tokens that were computed already, and tokens written.
    tokens_cached: int
    tokens_out: int
    busy_s: float
    subtasks: int
    attempts_lost: int
    version: int
    created: datetime
    started: datetime | None
    closed: datetime | None
    finished: datetime | None
    #: It fails where it has not ended by then; None: no hurry.
    deadline: datetime | None
    #: Days after its end at which it is deleted; None: when the cluster deletes all others, if ever.
    retention_days: float | None
    #: Of an open job: seconds for which it keeps a row after it was answered; None: until it is removed.
    keep_s: float | None
    #: From this row on all are kept.
    first_row: int
    #: Name -> spec of what is folded of its rows; None: nothing.
    folds: Mapping[str, Mapping[str, Any]] | None
    #: Seconds since it started, by the database's clock; None before.
    running_s: float | None
    #: Each row for which this holds is an event; None: no row is.
    notify_when: str | None = None
    #: Rows for which it held so far.
    rows_matched: int = 0
    tasks: tuple[TaskEntry, ...] = ()
    passes: tuple[PassEntry, ...] = ()


_ENTRY = """
    SELECT id, name, kind, state, reason, priority, n_rows, n_tasks, n_parts, n_blocks, blocks_done, cells_ok,
           cells_error, cells_skipped, cells_reused, tokens, computed_tokens, tokens_cached, tokens_out, busy_s, subtasks, attempts_lost, version,
           created, started, closed, finished, deadline, retention_days, keep_s, first_row, folds, notify_when, rows_matched,
           CAST(extract(epoch FROM clock_timestamp() - started) AS double precision) AS running_s
      FROM job WHERE tenant_id = :tenant"""
_ONE = text(f"{_ENTRY} AND id = :job")
_NEWEST = " ORDER BY created DESC, id DESC LIMIT :limit"
_AFTER = " AND (created, id) < (SELECT created, id FROM job WHERE id = :after AND tenant_id = :tenant)"
_STATE = " AND state = :state"
_LISTS = {
    (after, state): text(_ENTRY + (_AFTER if after else "") + (_STATE if state else "") + _NEWEST)
    for after in (False, True)
    for state in (False, True)
}
_TASKS_OF = text(f"""
    SELECT t.job_id, t.name, t.pass_number, t.spec, t.labels, m.name || '@' || m.version AS ref, t.kind,
           l.name || '@' || l.version AS loaded_ref, m.manifest->>'answers' AS answers, {VECTORS}
      FROM task t JOIN model m ON m.id = t.model_id
      JOIN pass p ON p.job_id = t.job_id AND p.number = t.pass_number JOIN model l ON l.id = p.model_id WHERE t.job_id = ANY(:jobs) ORDER BY t.job_id, t.number""")
_PASSES_OF = text("""
    SELECT p.job_id, p.number, p.kind, p.numerics, p.max_tokens, m.name || '@' || m.version AS ref,
           ARRAY(SELECT t.name FROM task t WHERE t.job_id = p.job_id AND t.number = ANY(p.needs) ORDER BY t.number) AS needs
      FROM pass p JOIN model m ON m.id = p.model_id WHERE p.job_id = ANY(:jobs) ORDER BY p.job_id, p.number""")
_VERSION = text("SELECT version, state FROM job WHERE id = :job AND tenant_id = :tenant")


def job_entry(connection: Connection, tenant: UUID, job: UUID) -> JobEntry:
    """One job. Raises NotFound."""
    found, tasks, passes = together(connection, (_ONE, {"tenant": tenant, "job": job}), *_parts_of([job]))
    if not found:
        raise NotFound(f"no job {job}")
    return _entries(found, tasks, passes)[0]


def job_entries(
    connection: Connection, tenant: UUID, *, limit: int, after: UUID | None = None, state: str | None = None
) -> list[JobEntry]:
    """Jobs, newest first; those before ``after``, those in ``state``."""
    at = {"tenant": tenant, "limit": limit, "after": after, "state": state}
    query = _LISTS[after is not None, state is not None]
    (found,) = together(connection, (query, {k: v for k, v in at.items() if v is not None}))
    return _entries(found, *together(connection, *_parts_of([row.id for row in found]))) if found else []


def job_version(connection: Connection, tenant: UUID, job: UUID) -> tuple[int, str]:
    """(version, state) of a job: all that a watcher needs to see that nothing has changed. Raises NotFound."""
    row = connection.execute(_VERSION, {"tenant": tenant, "job": job}).first()
    if row is None:
        raise NotFound(f"no job {job}")
    return row.version, row.state


def _parts_of(jobs: Sequence[UUID]) -> tuple[Asked, Asked]:
    """The statements that find the tasks and the passes of these jobs."""
    return (_TASKS_OF, {"jobs": jobs}), (_PASSES_OF, {"jobs": jobs})


def _entries(rows: Sequence[Any], found_tasks: Sequence[Any], found_passes: Sequence[Any]) -> list[JobEntry]:
    tasks: dict[UUID, list[TaskEntry]] = {row.id: [] for row in rows}
    names: dict[tuple[UUID, int], list[str]] = {}
    for t in found_tasks:
        tasks[t.job_id].append(
            TaskEntry(
                name=t.name,
                spec=t.spec,
                model_ref=t.loaded_ref if t.answers == "artefact" else t.ref,
                artefact_ref=t.ref if t.answers == "artefact" else "",
                labels=tuple(t.labels),
                kind=column_kind(t.spec, t.answers),
                dim=t.dim,
                dtype=t.dtype,
            )
        )
        names.setdefault((t.job_id, t.pass_number), []).append(t.name)
    passes: dict[UUID, list[PassEntry]] = {row.id: [] for row in rows}
    for p in found_passes:
        passes[p.job_id].append(
            PassEntry(
                kind=p.kind,
                tasks=tuple(names.get((p.job_id, p.number), ())),
                model_ref=p.ref,
                numerics=p.numerics,
                max_tokens=p.max_tokens,
                needs=tuple(p.needs),
            )
        )
    return [
        JobEntry(
            **{**row._asdict(), "state": State(row.state)},
            tasks=tuple(tasks[row.id]),
            passes=tuple(passes[row.id]),
        )
        for row in rows
    ]
