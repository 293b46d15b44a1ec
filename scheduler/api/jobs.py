"""Routes of jobs that are there: list, watch, close, cancel, remove."""

from __future__ import annotations

import logging
from typing import Annotated
from uuid import UUID

from fastapi import Query, Request, Response
from starlette.concurrency import run_in_threadpool

from motet.messages.jobs import Closing, JobList, JobRecord
from motet.states import ENDED, State
from scheduler.api.auth import Caller
from scheduler.api.records import JobPath, WaitS, describe
from scheduler.api.resources import Use, job_id
from scheduler.api.routing import Routes, body, takes
from scheduler.store import endings, landing
from scheduler.store import jobs as store
from scheduler.store.jobs import JobEntry

log = logging.getLogger(__name__)
routes = Routes(tags=["jobs"])


@routes.post(
    "/v1/jobs/{job}/close",
    summary="All parts are sent: let it run",
    status_code=202,
    openapi_extra=takes(Closing, {"parts": 3, "rows": 3000}),
)
def close_job(
    use: Use, caller: Caller, job: JobPath, sent: Annotated[Closing, body(Closing, newer=True)]
) -> JobRecord:
    at = job_id(job)
    with use.database.transaction() as connection:
        landing.close_job(connection, caller.tenant, at, parts=sent.parts, rows=sent.rows)
        entry = store.job_entry(connection, caller.tenant, at)
    log.info("job closed", extra={"job": at, "rows": entry.n_rows, "parts": sent.parts, "state": entry.state})
    return describe(entry)


@routes.get(
    "/v1/jobs",
    summary="Jobs, newest first",
)
def list_jobs(
    use: Use,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=1000, description="Jobs of a page.")] = 50,
    after: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
    state: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
) -> JobList:
    with use.database.transaction() as connection:
        entries = store.job_entries(connection, caller.tenant, limit=limit + 1, after=after, state=state)
    more = len(entries) > limit
    page = entries[:limit]
    return JobList(jobs=tuple(describe(e) for e in page), next=str(page[-1].id) if more else None)


@routes.get(
    "/v1/jobs/{job}",
    summary="A job, now or when it changes",
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
) -> JobRecord:
    at = job_id(job)

    def look() -> JobEntry | None:
        with use.database.transaction() as connection:
            now, state = store.job_version(connection, caller.tenant, at)
            if now == version and state not in ENDED:
                return None
            return store.job_entry(connection, caller.tenant, at)

    def settle() -> JobEntry:
        with use.database.transaction() as connection:
            return store.job_entry(connection, caller.tenant, at)

    found = await use.bell.until(at, wait_s, look, request.is_disconnected) if wait_s else None
    if found is None:
        found = await run_in_threadpool(settle)
    return describe(found)


@routes.post(
    "/v1/jobs/{job}/cancel",
    summary="End a job; what is answered stays",
)
def cancel_job(use: Use, caller: Caller, job: JobPath) -> JobRecord:
    at = job_id(job)
    with use.database.transaction() as connection:
        endings.cancel_job(connection, caller.tenant, at)
        entry = store.job_entry(connection, caller.tenant, at)
    log.info("job cancelled", extra={"job": at, "state": entry.state})
    return describe(entry)


@routes.delete(
    "/v1/jobs/{job}",
    summary="Remove a job and its results for good",
    status_code=204,
    response_description="It is gone.",
)
def remove_job(use: Use, caller: Caller, job: JobPath) -> Response:
    at = job_id(job)
    with use.database.transaction() as connection:
        endings.remove_job(connection, caller.tenant, at)
    log.info("job removed", extra={"job": at})
    return Response(status_code=204)
