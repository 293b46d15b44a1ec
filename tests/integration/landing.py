"""Put a job into Postgres as the API does, without HTTP: for tests of what happens afterwards."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from motet.errors import Problem
from motet.folds import Fold
from motet.messages.jobs import Submission
from motet.protocol.manifest import Manifest
from motet.states import Skip
from motet.tasks import Task, condition_of
from scheduler.api.records import PRIORITY_NAMES
from scheduler.api.submissions import CheckedSubmission, new_job, plan_submission
from scheduler.blocks import IncomingPart, blocks_of
from scheduler.store import landing, opening, registry
from scheduler.store.database import Database
from scheduler.store.landing import LoadingJob

#: A trunk, and a head on it that says how long a text is: see ``label_of`` of who uses them.
TRUNK = Manifest(
    name="trunk",
    version="1",
    engine="encoder",
    answers="vector",
    trunk="t",
    max_tokens=256,
    dim=4,
    # So large that it is believed slow: small jobs make several sub-tasks.
    parameters=125_000_000,
)
HEAD = Manifest(
    name="length",
    version="1",
    engine="encoder",
    answers="label",
    trunk="t",
    trunk_model="trunk@1",
    max_tokens=256,
    # Of its trunk, as every registered head has it.
    dim=4,
    labels=("short", "middle", "long"),
)


def register(database: Database, *models: Manifest) -> None:
    """Put these models into the registry; their files are never asked for here."""
    with database.transaction() as connection:
        for model in models:
            registry.add_model(connection, model)


def land(
    database: Database,
    rows: Sequence[str | Mapping[str, Any] | Problem],
    tasks: Mapping[str, Task],
    *,
    block_rows: int = 1024,
    priority: int = 1,
    tenant: str = "default",
    job_id: UUID | None = None,
    close: bool = True,
    gaps: Mapping[str, Collection[int]] | None = None,
    folds: Mapping[str, Fold] | None = None,
    unasked: Mapping[str, Collection[int]] | None = None,
    notify_when: str | None = None,
) -> UUID:
    """Open a job, land its rows as one part, and close it; without rows, an open one. A row that is a text is that of every field; a Problem is one that arrived broken.

    ``folds``: of an open one. ``gaps``: field -> rows that have no text there. ``unasked``: a conditional task -> rows
    that are none of its own.
    """
    with database.transaction() as connection:
        home = registry.tenant_named(connection, tenant)
        found = registry.find_models(connection, {t.model for t in tasks.values()})
        trunks = registry.find_models(connection, {m.manifest.trunk_model for m in found.values()} - {""})
        asked = CheckedSubmission(
            said=Submission(
                tasks={},
                priority=PRIORITY_NAMES[priority],
                bad_rows="error",
                open=not rows,
                notify_when=notify_when,
            ),
            tasks=tasks,
            digest=hashlib.sha256(uuid.uuid4().bytes).digest(),
            folds=folds or {},
        )
        planned = plan_submission(tasks, found, trunks, ())
        job = new_job(job_id or uuid.uuid4(), home, asked, planned, None)
        opening.open_job(connection, job, max_active_jobs=100)
        if not rows:
            return job.id
        loading = landing.loading(connection, home, job.id)
        _land(connection, loading, rows, 0, 0, block_rows, gaps or {}, unasked)
        if close:
            landing.close_job(connection, home, job.id, parts=1, rows=len(rows))
    return job.id


def land_more(
    database: Database,
    job: UUID,
    rows: Sequence[str | Mapping[str, str] | Problem],
    *,
    number: int,
    first_row: int,
    block_rows: int = 1024,
    tenant: str = "default",
) -> landing.Landed:
    """Land a further part of a job that is loading."""
    with database.transaction() as connection:
        loading = landing.loading(connection, registry.tenant_named(connection, tenant), job)
        return _land(connection, loading, rows, number, first_row, block_rows, {})


def close(database: Database, job: UUID, *, parts: int, rows: int, tenant: str = "default") -> None:
    """Close a job that is loading."""
    with database.transaction() as connection:
        landing.close_job(connection, registry.tenant_named(connection, tenant), job, parts=parts, rows=rows)


def _land(
    connection: Connection,
    loading: LoadingJob,
    rows: Sequence[str | Mapping[str, str] | Problem],
    number: int,
    first_row: int,
    block_rows: int,
    gaps: Mapping[str, Collection[int]],
    unasked: Mapping[str, Collection[int]] | None = None,
) -> landing.Landed:
    missing = {name: set(gaps.get(name, ())) for name in loading.fields}
    part = IncomingPart(
        columns={
            name: [
                ""
                if isinstance(r, Problem) or i in missing[name]
                else r[name]
                if isinstance(r, Mapping)
                else r
                for i, r in enumerate(rows)
            ]
            for name in loading.fields
        },
        bad={i: ("bad_row", r.got) for i, r in enumerate(rows) if isinstance(r, Problem)},
        bad_fields={
            name: dict.fromkeys(gone, ("bad_row", f"{name}: got null"))
            for name, gone in missing.items()
            if gone
        }
        | {
            condition_of(name): dict.fromkeys(others, (str(Skip.CONDITION), "another's row"))
            for name, others in (unasked or {}).items()
            if others
        },
    )
    blocks = blocks_of(
        part, loading.readers, secret=loading.secret, block_rows=block_rows, block_bytes=1 << 20
    )
    digest = f"part {number}".encode()
    return landing.land_part(
        connection, loading, number, digest, blocks, first_row=first_row, max_rows=1_000_000
    )
