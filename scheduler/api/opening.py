"""The route that opens a job, with its rows or without.

Bodies are read on the event loop; all that computes or asks Postgres runs in the thread pool.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Annotated
from uuid import UUID

from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, Problem
from motet.messages.jobs import JobRecord, Submission
from motet.protocol import traces
from motet.tasks import short
from scheduler.api.auth import Caller
from scheduler.api.bodies import json_body, whole_body
from scheduler.api.parts import land
from scheduler.api.records import describe
from scheduler.api.resources import Resources, Use
from scheduler.api.routing import Routes, reply, takes
from scheduler.api.rows import Incoming, read_rows
from scheduler.api.submissions import (
    CheckedSubmission,
    Planned,
    mean_bytes_of,
    new_job,
    plan_submission,
    read_submission,
)
from scheduler.store import jobs as store
from scheduler.store import landing, opening
from scheduler.store.registry import find_models, model_refs

log = logging.getLogger(__name__)
routes = Routes(tags=["jobs"])

_KEY = re.compile(r"[\x20-\x7e\xa0-\xff]{1,200}")
#: A submission for the API's description.
SUBMISSION = {
    "name": "tickets",
    "tasks": {
        "topic": {"kind": "classify", "model": "news-topics"},
        "vector": {"kind": "embed", "model": "all-MiniLM-L6-v2", "dtype": "fp16"},
        "reply": {
            "kind": "generate",
            "model": "qwen3-0.6b",
            "about": "{text}",
            "prompt": "Write one sentence about {topic}.",
            "max_tokens": 64,
        },
    },
    "mean_bytes": {"text": 48.5},
    "rows": [
        {"text": "Shares rose after the central bank held its rate."},
        {"text": "The cup final went to extra time."},
    ],
}


@routes.post(
    "/v1/jobs",
    summary="Open a job, or submit a small one at once",
    status_code=201,
    response_model=JobRecord,
    response_description="Open: send parts.",
    responses={
        202: {"model": JobRecord, "description": "Submitted with its rows: it runs."},
    },
    openapi_extra=takes(Submission, SUBMISSION),
)
async def open_job(
    request: Request,
    use: Use,
    caller: Caller,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key and body give the same job again.", examples=["4f1c9a3e"]),
    ] = None,
) -> Response:
    async with whole_body(request, use, use.settings.max_part_bytes) as raw:
        return await run_in_threadpool(_open, use, caller.tenant, raw, idempotency_key)


def _open(use: Resources, tenant: UUID, raw: bytes, key: str | None) -> Response:
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidJob(
            Problem("Idempotency-Key", short(key), "1 to 200 printable characters", "use a random UUID")
        )
    asked = read_submission(Submission, json_body(raw), max_tasks=use.settings.max_tasks)
    status = 201 if asked.said.rows is None else 202
    with use.database.reading() as connection:
        before = opening.opened_before(connection, tenant, key, asked.digest) if key else None
        if before is not None:
            return reply(describe(store.job_entry(connection, tenant, before)), status)
    use.door.admit(interactive=asked.said.priority == "interactive")
    incoming = inline_rows(use, asked)
    began = time.time()
    planned = planned_with(use, asked, incoming)
    job = new_job(uuid.uuid4(), tenant, asked, planned, key)
    ready = time.time()
    with use.database.transaction() as connection:
        opened = opening.open_job(connection, job, max_active_jobs=use.settings.max_active_jobs)
        if opened == job.id and incoming is not None:
            facts = landing.loading(connection, tenant, opened)
            landed = land(use, connection, facts, 0, asked.digest, incoming)
            landing.close_job(connection, tenant, opened, parts=1, rows=landed.rows)
        entry = store.job_entry(connection, tenant, opened)
    if opened == job.id:
        traces.add(opened, "plan", began, ready, tasks=entry.n_tasks, passes=len(entry.passes))
    log.info(
        "job opened",
        extra={
            "job": entry.id,
            "tenant": tenant,
            "tasks": entry.n_tasks,
            "passes": len(entry.passes),
            "rows": entry.n_rows,
        },
    )
    return reply(describe(entry), status)


def inline_rows(use: Resources, asked: CheckedSubmission[Submission]) -> Incoming | None:
    """The rows that came along. Raises InvalidJob where they may not be bad, and are."""
    if asked.said.rows is None:
        return None
    incoming = read_rows(asked.said.rows, asked.fields, use.settings.max_row_bytes, asked.dialogues)
    if asked.said.bad_rows == "refuse":
        incoming.refuse_bad_rows(0)
    return incoming


def planned_with(use: Resources, asked: CheckedSubmission[Submission], incoming: Incoming | None) -> Planned:
    """A submission with its models found and its passes made. Raises InvalidJob.

    ``incoming``: rows that came along, which say how long texts are where the submission does not.
    """
    mean_bytes = mean_bytes_of(incoming.part()) if incoming else {}
    with use.database.reading() as connection:
        wanted = {ref for task in asked.tasks.values() for ref in task.registered}
        found = find_models(connection, wanted)
        trunks = find_models(connection, {m.manifest.trunk_model for m in found.values()} - {""})
        known = model_refs(connection) if len(found) < len(wanted) else []
    return plan_submission(asked.tasks, found, trunks, known, {**mean_bytes, **(asked.said.mean_bytes or {})})
