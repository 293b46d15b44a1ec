"""Routes of jobs: open, fill, close, watch, cancel, remove; and the dry run.

Bodies are read on the event loop; all that computes or asks Postgres runs in the thread pool.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from motet.errors import InvalidJob, Problem
from motet.protocol import traces
from motet.protocol.transport import TransportLost
from motet.protocol.values import plain_text
from motet.tasks import Prompted, Task, placeholders, render, short
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.bell import MAX_WAIT_S
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.cluster import live_workers
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.rows import Incoming, read_columns, read_lines, read_rows
from scheduler.api.submissions import (
    Planned,
    Submission,
    mean_bytes_of,
    new_job,
    plan_submission,
    read_submission,
)
from scheduler.blocks import IncomingPart, absent, askable, blocks_of
from scheduler.policy.capability import why_not, workers
from scheduler.policy.cost import Rates
from scheduler.policy.needs import fields_read
from scheduler.policy.placing.records import WorkerState
from scheduler.policy.plan import PassPlan, Sample, estimate, reads_of
from scheduler.policy.prompt_cost import TaskTokens, estimate_prompts
from scheduler.policy.prompt_order import instruction
from scheduler.store import drains, endings, landing, opening
from scheduler.store import jobs as store
from scheduler.store.jobs import JobEntry, TaskEntry
from scheduler.store.landing import LoadingJob
from scheduler.store.opening import PRIORITIES
from scheduler.store.rates import rates as learned_rates
from scheduler.store.rates import refusals
from scheduler.store.registry import find_models, model_refs

log = logging.getLogger(__name__)
routes = APIRouter(tags=["jobs"])

JobPath = Annotated[str, Path(description="The job's id.", examples=["0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11"])]
WaitS = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for something new.")]

_KEY = re.compile(r"[\x20-\x7e\xa0-\xff]{1,200}")
#: Share of the cells from which on their pace says how long the others will take.
_PACE_SHARE = 0.03
_PRIORITY_NAMES = {number: name for name, number in PRIORITIES.items()}
_MAX_COUNT = 2**31 - 1


# -- opening


@routes.post(
    "/v1/jobs",
    summary="Open a job, or submit a small one at once",
    status_code=201,
    responses={
        **shapes.answers(
            201,
            shapes.JobShape,
            {**shapes.JOB, "state": "loading"},
            "Open: send parts.",
            403,
            409,
            413,
            422,
            429,
        ),
        202: {
            "model": shapes.JobShape,
            "description": "Submitted with its rows: it runs.",
            "content": {"application/json": {"example": shapes.JOB}},
        },
    },
    openapi_extra=shapes.takes(shapes.SUBMISSION, "Tasks, options, and up to 1,024 rows."),
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
    asked = read_submission(json_body(raw), max_tasks=use.settings.max_tasks)
    status = 201 if asked.rows is None else 202
    with use.database.transaction() as connection:
        before = opening.opened_before(connection, tenant, key, asked.digest) if key else None
        if before is not None:
            return JSONResponse(describe(store.job_entry(connection, tenant, before)), status)
    use.door.admit(interactive=asked.priority == PRIORITIES["interactive"])
    incoming = _inline_rows(use, asked)
    began = time.time()
    planned = _plan(use, asked, incoming)
    job = new_job(uuid.uuid4(), tenant, asked, planned, key)
    ready = time.time()
    with use.database.transaction() as connection:
        opened = opening.open_job(connection, job, max_active_jobs=use.settings.max_active_jobs)
        if opened == job.id and incoming is not None:
            facts = landing.loading(connection, tenant, opened)
            landed = _land(use, connection, facts, 0, asked.digest, incoming)
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
    return JSONResponse(describe(entry), status)


def _inline_rows(use: Resources, asked: Submission) -> Incoming | None:
    if asked.rows is None:
        return None
    incoming = read_rows(asked.rows, asked.fields, use.settings.max_row_bytes, asked.dialogues)
    if asked.bad_rows == "refuse":
        incoming.refuse_bad_rows(0)
    return incoming


def _plan(use: Resources, asked: Submission, incoming: Incoming | None) -> Planned:
    """``incoming``: rows that came along, which say how long texts are where the submission does not."""
    mean_bytes = mean_bytes_of(incoming.part()) if incoming else {}
    with use.database.transaction() as connection:
        wanted = {task.model for task in asked.tasks.values()}
        found = find_models(connection, wanted)
        trunks = find_models(connection, {m.manifest.trunk_model for m in found.values()} - {""})
        known = model_refs(connection) if len(found) < len(wanted) else []
    return plan_submission(asked.tasks, found, trunks, known, {**mean_bytes, **asked.mean_bytes})


# -- parts


@routes.put(
    "/v1/jobs/{job}/parts/{number}",
    summary="Send a part of the rows",
    responses=shapes.answers(
        200, shapes.PartShape, shapes.PART, "Stored, now or before.", 403, 404, 409, 413, 422, 429
    ),
    openapi_extra=shapes.takes(
        None,
        'Msgpack of `{"columns": {field: [value, …]}, "first_row": i}`, or a row a line.',
        "application/msgpack",
        {"application/x-ndjson": "A JSON object, or a string, per line."},
    ),
)
async def put_part(
    request: Request,
    use: Use,
    caller: Caller,
    job: JobPath,
    number: Annotated[int, Path(ge=0, le=_MAX_COUNT, description="From 0, in order.", examples=[0])],
) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Before its body is read: what is refused costs no memory.
    facts = await run_in_threadpool(_admitted, use, caller.tenant, job_id(job))
    async with whole_body(request, use, use.settings.max_part_bytes) as raw:
        return await run_in_threadpool(_put_part, use, facts, number, kind, raw)


def _admitted(use: Resources, tenant: UUID, job: UUID) -> LoadingJob:
    facts = _loading(use, tenant, job)
    use.door.admit(interactive=facts.interactive, uploading=True)
    return facts


def _put_part(use: Resources, facts: LoadingJob, number: int, kind: str, raw: bytes) -> Response:
    read = {"application/msgpack": read_columns, "application/x-ndjson": read_lines}.get(kind)
    if read is None:
        raise InvalidJob(
            Problem(
                "Content-Type",
                short(kind) or "nothing",
                "application/msgpack or application/x-ndjson",
                "name it",
            )
        )
    incoming = read(raw, facts.fields, use.settings.max_row_bytes, facts.dialogues)
    if facts.bad_rows == "refuse" and (incoming.bad or incoming.bad_fields):
        incoming.refuse_bad_rows(_first_row(use, facts, incoming))
    with traces.span(facts.id, "land", part=number), use.database.transaction() as connection:
        landed = _land(use, connection, facts, number, hashlib.sha256(raw).digest(), incoming)
    log.debug(
        "part landed",
        extra={"job": facts.id, "part": number, "rows": landed.rows, "bad_rows": landed.bad_rows},
    )
    return JSONResponse(
        {
            "part": landed.part,
            "rows": landed.rows,
            "total_rows": landed.total_rows,
            "bad_rows": landed.bad_rows,
            "next_part": landed.part + 1,
        }
    )


def _loading(use: Resources, tenant: UUID, job: UUID) -> LoadingJob:
    known = use.loading.get((tenant, job))
    if known is None:
        with use.database.transaction() as connection:
            known = landing.loading(connection, tenant, job)
        use.loading.put((tenant, job), known)
    return known


def _first_row(use: Resources, facts: LoadingJob, incoming: Incoming) -> int:
    if incoming.first_row is not None:
        return incoming.first_row
    with use.database.transaction() as connection:
        return store.job_entry(connection, facts.tenant, facts.id).n_rows


def _land(
    use: Resources, connection: Connection, facts: LoadingJob, number: int, digest: bytes, incoming: Incoming
) -> landing.Landed:
    blocks = blocks_of(
        incoming.part(),
        facts.readers,
        secret=facts.secret,
        block_rows=use.settings.block_rows,
        block_bytes=use.settings.block_bytes,
    )
    return landing.land_part(
        connection,
        facts,
        number,
        digest,
        blocks,
        first_row=incoming.first_row,
        max_rows=use.settings.max_rows,
    )


@routes.post(
    "/v1/jobs/{job}/close",
    summary="All parts are sent: let it run",
    status_code=202,
    responses=shapes.answers(202, shapes.JobShape, shapes.JOB, "It runs.", 403, 404, 409, 422),
    openapi_extra=shapes.takes({"parts": 3, "rows": 3000}, "What was sent: both are checked."),
)
async def close_job(request: Request, use: Use, caller: Caller, job: JobPath) -> Response:
    async with whole_body(request, use, SMALL_BYTES) as raw:
        return await run_in_threadpool(_close, use, caller.tenant, job_id(job), raw)


def _close(use: Resources, tenant: UUID, job: UUID, raw: bytes) -> Response:
    body = clean_object(json_body(raw))
    problems = [
        Problem(name, short(body.get(name, "nothing")), "a whole number", "say how much was sent")
        for name in ("parts", "rows")
        if not _is_count(body.get(name))
    ]
    if problems:
        raise InvalidJob(problems)
    with use.database.transaction() as connection:
        landing.close_job(connection, tenant, job, parts=body["parts"], rows=body["rows"])
        entry = store.job_entry(connection, tenant, job)
    log.info(
        "job closed", extra={"job": job, "rows": entry.n_rows, "parts": body["parts"], "state": entry.state}
    )
    return JSONResponse(describe(entry), 202)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


# -- the dry run


@routes.post(
    "/v1/plan",
    summary="What a submission would run",
    responses=shapes.answers(
        200, shapes.PlanShape, shapes.PLAN, "The passes, and an estimate.", 403, 413, 422
    ),
    openapi_extra=shapes.takes(
        shapes.PLAN_REQUEST, "As a job, with a sample of rows and the size of the whole."
    ),
)
async def plan_job(request: Request, use: Use, caller: Caller) -> Response:
    async with whole_body(request, use, use.settings.max_part_bytes) as raw:
        return await run_in_threadpool(_dry_run, use, raw)


def _dry_run(use: Resources, raw: bytes) -> Response:
    asked = read_submission(json_body(raw), max_tasks=use.settings.max_tasks, dry_run=True)
    incoming = _inline_rows(use, asked) if asked.rows else None
    planned = _plan(use, asked, incoming)
    part = incoming.part() if incoming else IncomingPart(columns={name: [] for name in asked.fields})
    unread = {name: absent(part.bad, part.bad_fields, fields_read(name, asked.tasks)) for name in asked.tasks}
    rows = {
        i: {name: plain_text(values[i]) for name, values in part.columns.items()}
        for i in askable(range(len(part)), list(unread.values()))
    }
    sample = Sample(
        rows=len(rows),
        total_rows=len(rows) if asked.total_rows is None else asked.total_rows,
        # Of a pass that reads some of the fields the others' bytes tell nothing: then rows count.
        text_bytes=sum(len(text.encode()) for row in rows.values() for text in row.values()),
        total_bytes=asked.total_bytes,
    )
    by_rows = replace(sample, total_bytes=None)
    rates, devices = _devices(use)
    too_long: set[int] = set()
    passes, estimates = [], []
    names = list(asked.tasks)
    for p in planned.passes:
        # Of answers that are not there yet nothing is counted.
        unknown = {names[number]: "" for number in p.needs}
        here = askable(list(rows), [unread[names[number]] for number in p.tasks])
        seen = [{**rows[i], **unknown} for i in here]
        lengths = use.counter.lengths(p.model, [render(p.input, row) for row in seen])
        demand = planned.demand(p)
        timing: dict[str, Any] = {
            "seconds_per_token": [
                demand.rate(rates, device.kind).seconds_per_token
                for device in devices
                if why_not(device, demand) is None
            ],
            "prior_s": demand.rate(rates, ("cpu", "")).seconds_per_token,
            "subtask_s": use.settings.subtask_s,
        }
        of_it = sample if all(reads_of(p, asked.tasks).times) else by_rows
        if p.prompts:
            prompts = [_asked(use, p, asked.tasks[names[number]], seen) for number in p.tasks]
            guess = estimate_prompts(p, lengths, prompts, of_it, **timing)
        else:
            too_long.update(
                i for i, n in zip(here, lengths, strict=True) if p.max_tokens and n > p.max_tokens
            )
            guess = estimate(p, lengths, of_it, **timing)
        estimates.append(guess)
        passes.append(
            {
                "kind": p.kind,
                "tasks": [names[number] for number in p.tasks],
                "model": p.model.ref,
                "numerics": p.numerics,
                "max_tokens": p.max_tokens,
                "needs": [names[number] for number in p.needs],
                "first": p.first,
                "tokens": guess.tokens,
                "computed_tokens": guess.computed_tokens,
                "unfused_tokens": guess.unfused_tokens,
                "tokens_out": guess.tokens_out,
                "seconds": guess.seconds,
                "subtasks": guess.subtasks,
            }
        )
    return JSONResponse(
        {
            "rows": sample.total_rows,
            "estimate": True,
            "models": {name: model.manifest.ref for name, model in planned.models.items()},
            "passes": passes,
            "tokens": sum(e.tokens for e in estimates),
            "computed_tokens": sum(e.computed_tokens for e in estimates),
            "unfused_tokens": sum(e.unfused_tokens for e in estimates),
            "tokens_out": sum(e.tokens_out for e in estimates),
            # The passes share the devices, one after the other.
            "seconds": sum(seconds) if None not in (seconds := [e.seconds for e in estimates]) else None,
            "truncated_rows": round(len(too_long) * sample.rows_factor),
            "devices": len(devices),
        }
    )


def _asked(use: Resources, p: PassPlan, task: Task, rows: list[dict[str, str]]) -> TaskTokens:
    """A task of a language model in tokens, by the tokenizer that will read it."""
    system = str(getattr(task, "system", ""))
    asked = instruction(task) if isinstance(task, Prompted) else ""

    def tokens(template: str) -> list[int]:
        if not placeholders(template):
            return use.counter.lengths(p.model, [render(template, {})] if template else []) * len(rows) or [
                0
            ] * len(rows)
        return use.counter.lengths(p.model, [render(template, row) for row in rows])

    return TaskTokens(
        system=system,
        system_tokens=tokens(system),
        instruction_tokens=tokens(asked),
        system_fixed=not placeholders(system),
        instruction_fixed=not placeholders(asked),
        written=int(getattr(task, "max_tokens", 0)),
    )


def _devices(use: Resources) -> tuple[Rates, list[WorkerState]]:
    """What was learned, and workers that may be given work. None where Redis is away: a plan needs none."""
    with use.database.transaction() as connection:
        rates, known = learned_rates(connection), refusals(connection)
        drained = drains.drained(connection)
    try:
        beats = live_workers(use)
    except TransportLost:
        beats = {}
    found = workers(beats, known, use.settings.memory_share, drained=drained)
    return rates, [worker for worker in found if worker.barred is None]


# -- looking


@routes.get(
    "/v1/jobs",
    summary="Jobs, newest first",
    responses=shapes.answers(
        200, shapes.JobsShape, {"jobs": [shapes.JOB], "next": None}, "A page of jobs.", 403, 422
    ),
)
def list_jobs(
    use: Use,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=1000, description="Jobs of a page.")] = 50,
    after: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
    state: Annotated[
        Literal["loading", "running", "succeeded", "failed", "cancelled"] | None,
        Query(description="Only jobs in this state."),
    ] = None,
) -> Response:
    with use.database.transaction() as connection:
        entries = store.job_entries(connection, caller.tenant, limit=limit + 1, after=after, state=state)
    more = len(entries) > limit
    page = entries[:limit]
    return JSONResponse({"jobs": [describe(e) for e in page], "next": str(page[-1].id) if more else None})


@routes.get(
    "/v1/jobs/{job}",
    summary="A job, now or when it changes",
    responses=shapes.answers(200, shapes.JobShape, shapes.JOB, "The job.", 403, 404, 422),
)
async def show_job(
    request: Request,
    use: Use,
    caller: Caller,
    job: JobPath,
    wait_s: WaitS = 0.0,
    version: Annotated[
        int | None,
        Query(ge=-(2**62), le=2**62, description="Wait until the job's version differs from this."),
    ] = None,
) -> Response:
    at = job_id(job)

    def look() -> JobEntry | None:
        with use.database.transaction() as connection:
            now, state = store.job_version(connection, caller.tenant, at)
            if now == version and state in store.UNFINISHED:
                return None
            return store.job_entry(connection, caller.tenant, at)

    def settle() -> JobEntry:
        with use.database.transaction() as connection:
            return store.job_entry(connection, caller.tenant, at)

    found = await use.bell.until(at, wait_s, look, request.is_disconnected) if wait_s else None
    if found is None:
        found = await run_in_threadpool(settle)
    return JSONResponse(describe(found))


@routes.post(
    "/v1/jobs/{job}/cancel",
    summary="End a job; what is answered stays",
    responses=shapes.answers(
        200, shapes.JobShape, {**shapes.JOB, "state": "cancelled"}, "As it ended.", 403, 404
    ),
)
def cancel_job(use: Use, caller: Caller, job: JobPath) -> Response:
    at = job_id(job)
    with use.database.transaction() as connection:
        endings.cancel_job(connection, caller.tenant, at)
        entry = store.job_entry(connection, caller.tenant, at)
    log.info("job cancelled", extra={"job": at, "state": entry.state})
    return JSONResponse(describe(entry))


@routes.delete(
    "/v1/jobs/{job}",
    summary="Remove a job and its results for good",
    status_code=204,
    responses=shapes.answers(204, None, None, "It is gone.", 403, 404),
)
def remove_job(use: Use, caller: Caller, job: JobPath) -> Response:
    at = job_id(job)
    with use.database.transaction() as connection:
        endings.remove_job(connection, caller.tenant, at)
    log.info("job removed", extra={"job": at})
    return Response(status_code=204)


def describe(job: JobEntry) -> dict[str, Any]:
    """A job as docs/http.md shows it."""
    total = job.n_rows * job.n_tasks
    return {
        "id": str(job.id),
        "name": job.name,
        "state": job.state,
        "kind": job.kind,
        "reason": job.reason,
        "priority": _PRIORITY_NAMES[job.priority],
        "rows": job.n_rows,
        "parts": job.n_parts,
        "tasks": {t.name: _described(t) for t in job.tasks},
        "cells": {
            "total": total,
            "ok": job.cells_ok,
            "error": job.cells_error,
            "skipped": job.cells_skipped,
            "reused": job.cells_reused,
        },
        "passes": [
            {
                "kind": p.kind,
                "tasks": list(p.tasks),
                "model": p.model_ref,
                "numerics": p.numerics,
                "max_tokens": p.max_tokens,
                "needs": list(p.needs),
            }
            for p in job.passes
        ],
        "blocks": {"total": job.n_blocks, "done": job.blocks_done},
        "version": job.version,
        "partial": job.state == "succeeded" and job.cells_ok < total,
        "usage": {
            "tokens": job.tokens,
            "computed_tokens": job.computed_tokens,
            "tokens_cached": job.tokens_cached,
            "tokens_out": job.tokens_out,
            "busy_s": job.busy_s,
            "subtasks": job.subtasks,
            "attempts_lost": job.attempts_lost,
        },
        "created": moment(job.created),
        "started": moment(job.started),
        "finished": moment(job.finished),
        "deadline": moment(job.deadline),
        "retention_days": job.retention_days,
        "eta_s": eta_s(job),
    }


def _described(task: TaskEntry) -> dict[str, Any]:
    """A task's spec with what it uses, and the type of its answers: known before the first of them."""
    column = {"kind": task.kind} | ({"dim": task.dim, "dtype": task.dtype} if task.kind == "vector" else {})
    return {**task.spec, "model_ref": task.model_ref, "labels": list(task.labels), "column": column}


def eta_s(job: JobEntry) -> float | None:
    """Seconds left at the pace so far, reused cells apart; None where there is no pace yet.

    The first few cells have waited for their model to load: they are no pace.
    """
    done = job.cells_ok + job.cells_error + job.cells_skipped - job.cells_reused
    left = job.n_rows * job.n_tasks - job.cells_reused - done
    if job.state != "running" or not job.running_s or done < _PACE_SHARE * (done + left) or done <= 0:
        return None
    return round(job.running_s * left / done, 1)


def moment(at: datetime | None) -> str | None:
    """A time of the database as RFC 3339 in UTC."""
    return None if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
