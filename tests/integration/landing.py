"""Put a job into Postgres as the API does, without HTTP: for tests of what happens afterwards."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from uuid import UUID

from motet.errors import Problem
from motet.manifest import Manifest
from motet.tasks import Task
from scheduler.blocks import Part, blocks_of
from scheduler.plan import loaded_model, plan, task_digest
from scheduler.store import jobs, registry
from scheduler.store.database import Database


def register(database: Database, *models: Manifest) -> None:
    """Put these models into the registry; their files are never asked for here."""
    with database.transaction() as connection:
        for model in models:
            registry.add_model(connection, model)


def land(
    database: Database,
    rows: Sequence[str | Problem],
    tasks: Mapping[str, Task],
    *,
    block_rows: int = 1024,
    priority: int = 1,
    tenant: str = "default",
) -> UUID:
    """Open, fill and close a job of texts. A Problem in place of a text is a row that arrived broken."""
    with database.transaction() as connection:
        home = registry.tenant_named(connection, tenant)
        found = registry.find_models(connection, registry.model_refs(connection))
        by_name = {r.manifest.name: r for r in found.values()}
        models = {name: by_name[t.model].manifest for name, t in tasks.items()}
        trunks = {r.manifest.ref: r.manifest for r in found.values()}
        passes = plan(tasks, models, trunks)
        pass_of = {number: p.number for p in passes for number in p.tasks}
        job = jobs.NewJob(
            id=uuid.uuid4(),
            tenant=home,
            name="",
            priority=priority,
            reuse=True,
            bad_rows="error",
            fields=("text",),
            tasks=tuple(
                jobs.NewTask(
                    name=name,
                    pass_number=pass_of[number],
                    model_id=by_name[task.model].id,
                    kind=task.kind,
                    spec=task.to_json(),
                    labels=models[name].labels,
                    digest=task_digest(task, models[name], loaded_model(models[name], trunks)),
                )
                for number, (name, task) in enumerate(tasks.items())
            ),
            passes=tuple(
                jobs.NewPass(
                    kind=p.kind,
                    model_id=by_name[p.model.name].id,
                    numerics=p.numerics,
                    max_tokens=p.max_tokens,
                    input=p.input,
                )
                for p in passes
            ),
            request_digest=hashlib.sha256(uuid.uuid4().bytes).digest(),
        )
        jobs.open_job(connection, job, max_active_jobs=100)
        loading = jobs.loading(connection, home, job.id)
        part = Part(
            columns={"text": ["" if isinstance(r, Problem) else r for r in rows]},
            bad={i: ("bad_row", r.got) for i, r in enumerate(rows) if isinstance(r, Problem)},
        )
        blocks = blocks_of(part, loading.readers, block_rows=block_rows, block_bytes=1 << 20)
        jobs.land_part(connection, loading, 0, b"digest", blocks, first_row=0, max_rows=1_000_000)
        jobs.close_job(connection, home, job.id, parts=1, rows=len(rows))
    return job.id
