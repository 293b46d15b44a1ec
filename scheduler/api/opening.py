"""The route that opens a job, with its rows or without.

Bodies are read on the event loop; all that computes or asks Postgres runs in the thread pool.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, MotetError, Problem
from motet.head_inputs import all_as_trained
from motet.media.fields import media_fields
from motet.messages.jobs import JobRecord, Submission
from motet.protocol import traces
from motet.tasks import short
from scheduler.api.auth import Caller
from scheduler.api.bodies import json_body, whole_body
from scheduler.api.media import with_media
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
from scheduler.store.opening import NewJob
from scheduler.store.registry import Registered, find_with_trunks, model_refs, secret_of

log = logging.getLogger(__name__)
routes = Routes(tags=["jobs"])
S = TypeVar("S", bound=Submission, covariant=True)

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
    began = time.time()
    try:
        job, incoming = _made(use, tenant, asked, key)
    except MotetError:
        # Whatever is wrong with it by now: what was answered before is answered in the same way.
        with use.database.reading() as connection:
            before = opening.opened_before(connection, tenant, key, asked.digest) if key else None
            if before is None:
                raise
            return reply(describe(store.job_entry(connection, tenant, before)), status)
    ready = time.time()
    with use.database.transaction() as connection:
        opened = opening.open_job(connection, job, max_active_jobs=use.settings.max_active_jobs)
        if opened == job.id and incoming is not None:
            facts = landing.loading(connection, tenant, opened)
            land(use, connection, facts, 0, asked.digest, incoming, closes=True)
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


def _made(
    use: Resources, tenant: UUID, asked: CheckedSubmission[Submission], key: str | None
) -> tuple[NewJob, Incoming | None]:
    """The job that a submission asks for, not opened yet, and the rows that came along."""
    use.door.admit(interactive=asked.said.priority == "interactive")
    asked, found = with_models(use, asked)
    incoming = inline_rows(use, asked, found)
    if incoming is not None and incoming.has_media:
        with use.database.reading() as connection:
            secret = secret_of(connection, tenant)
        incoming = with_media(use, tenant, secret, incoming, refuse=True)
        _refuse_bad(asked, incoming)
    planned = planned_with(asked, incoming, found)
    return new_job(uuid.uuid4(), tenant, asked, planned, key), incoming


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModels:
    """What the registry knows of the models that a submission names."""

    #: By the names that tasks give.
    models: Mapping[str, Registered]
    trunks: Mapping[str, Registered]
    #: All that is registered, where some name is not; else nothing.
    registered: Sequence[str]


def with_models(use: Resources, asked: CheckedSubmission[S]) -> tuple[CheckedSubmission[S], FoundModels]:
    """A submission with what its heads were trained to read, where tasks say nothing else; and its models."""
    with use.database.reading() as connection:
        wanted = {ref for task in asked.tasks.values() for ref in task.registered}
        found, trunks = find_with_trunks(connection, wanted)
        known = model_refs(connection) if len(found) < len(wanted) else []
    tasks = all_as_trained(asked.tasks, {ref: model.manifest for ref, model in found.items()})
    return replace(asked, tasks=tasks), FoundModels(models=found, trunks=trunks, registered=known)


def inline_rows(use: Resources, asked: CheckedSubmission[Submission], found: FoundModels) -> Incoming | None:
    """The rows that came along. Raises InvalidJob where they may not be bad, and are."""
    if asked.said.rows is None:
        return None
    by_task = {n: found.models[t.model].manifest for n, t in asked.tasks.items() if t.model in found.models}
    media = media_fields(asked.tasks, by_task)
    incoming = read_rows(asked.said.rows, asked.fields, use.settings.max_row_bytes, asked.dialogues, media)
    _refuse_bad(asked, incoming)
    return incoming


def _refuse_bad(asked: CheckedSubmission[Submission], incoming: Incoming) -> None:
    if asked.said.bad_rows == "refuse":
        incoming.refuse_bad_rows(0)


def planned_with(
    asked: CheckedSubmission[Submission], incoming: Incoming | None, found: FoundModels
) -> Planned:
    """A submission with its passes made. Raises InvalidJob.

    ``incoming``: rows that came along, which say how long texts are where the submission does not.
    """
    mean_bytes = {**(mean_bytes_of(incoming.part()) if incoming else {}), **(asked.said.mean_bytes or {})}
    return plan_submission(asked.tasks, found.models, found.trunks, found.registered, mean_bytes)
