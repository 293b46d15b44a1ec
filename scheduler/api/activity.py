"""What happens in a job: for programs as JSON, and for people as pages that need no JavaScript."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query
from starlette.responses import HTMLResponse, Response

from motet.messages.activity import (
    AskCounts,
    AsksUnderWay,
    DeviceState,
    DeviceUnderWay,
    ErrorCount,
    JobActivity,
    LeftOut,
    PassBlocks,
    PassUnderWay,
    RowsUnderWay,
    SubtaskCounts,
    SubtaskPage,
    SubtaskUnderWay,
    ThroughputBucket,
)
from motet.protocol.transport import TransportLost
from motet.protocol.wire import Beat
from motet.states import State
from scheduler.api import page
from scheduler.api.auth import Caller
from scheduler.api.markup import POLICY
from scheduler.api.queue import queue_of
from scheduler.api.records import JobPath, describe
from scheduler.api.refusals import error_of, refusal
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.routing import Routes
from scheduler.ask_times import quantile_s
from scheduler.store import activity as store
from scheduler.store.activity import Activity, DeviceActivity, PassActivity, SubtaskActivity
from scheduler.store.ask_spans import MINUTE, SPAN_S, AskSpan, last_minute
from scheduler.store.jobs import job_entries

routes = Routes()

#: Sub-tasks of a timeline at most.
MAX_TIMELINE = 2000


@routes.get(
    "/v1/jobs/{job}/activity",
    summary="What happens in a job: passes, devices, sub-tasks in time, throughput, errors",
    tags=["jobs"],
)
def show_activity(
    use: Use,
    caller: Caller,
    job: JobPath,
    timeline: Annotated[
        int, Query(ge=0, le=MAX_TIMELINE, description="Newest sub-tasks to show; open ones come first.")
    ] = 500,
) -> JobActivity:
    return facts_of(use, caller.tenant, job_id(job), timeline=timeline)


@routes.get(
    "/v1/jobs/{job}/subtasks",
    summary="All sub-tasks of a job, page by page",
    tags=["jobs"],
)
def list_subtasks(
    use: Use,
    caller: Caller,
    job: JobPath,
    limit: Annotated[int, Query(ge=1, le=MAX_TIMELINE, description="Sub-tasks of a page.")] = 1000,
    after: Annotated[int, Query(ge=0, le=2**62, description="`next` of the page before.")] = 0,
) -> SubtaskPage:
    with use.database.transaction() as connection:
        found, following = store.subtasks(connection, caller.tenant, job_id(job), after=after, limit=limit)
    return SubtaskPage(subtasks=tuple(_subtask(s) for s in found), next=following)


# -- pages


def _html(says: str, *errors: int) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a page: it is HTML, and so are its refusals."""
    words = {
        200: says,
        401: "How to sign in.",
        **dict.fromkeys((403, 422, 503, *errors), "Why not, in words."),
    }
    return {
        code: {"description": said, "content": {"text/html": {"schema": {"type": "string"}}}}
        for code, said in words.items()
    }


_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
#: Sub-tasks that are drawn: more would be thinner than a pixel.
_DRAWN = 600


@routes.get(
    "/jobs",
    summary="The page of jobs, for people",
    tags=["pages"],
    response_class=HTMLResponse,
    responses=_html("Jobs, newest first. HTTP Basic does as well: the token's id and its secret."),
)
def jobs_page(
    use: Use,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=500, description="Jobs of a page.")] = 50,
    after: Annotated[UUID | None, Query(description="The last job of the page before.")] = None,
    state: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
) -> Response:
    with use.database.transaction() as connection:
        entries = job_entries(connection, caller.tenant, limit=limit + 1, after=after, state=state)
    following = str(entries[limit - 1].id) if len(entries) > limit else None
    shown = [describe(e).to_json() for e in entries[:limit]]
    return _page(page.jobs_page(shown, following=following, state=state, limit=limit, first=after is None))


@routes.get(
    "/jobs/{job}",
    summary="The page of a job, for people",
    tags=["pages"],
    response_class=HTMLResponse,
    responses=_html("What happens in it. HTTP Basic does as well: the token's id and its secret.", 404),
)
def job_page(use: Use, caller: Caller, job: JobPath) -> Response:
    return _page(page.job_page(facts_of(use, caller.tenant, job_id(job), timeline=_DRAWN).to_json()))


@routes.get(
    "/jobs/{job}/queue",
    summary="The page of a job's newest rows, sorted by an answer, for people",
    tags=["pages"],
    response_class=HTMLResponse,
    responses=_html("Its queue. HTTP Basic does as well: the token's id and its secret.", 404),
)
def queue_page(
    use: Use,
    caller: Caller,
    job: JobPath,
    by: Annotated[
        str,
        Query(
            max_length=200,
            description="The answer, or part of one, whose largest stands first; none: the newest first.",
            examples=["urgency.points"],
        ),
    ] = "",
) -> Response:
    found = queue_of(use, caller.tenant, job_id(job), by)
    facts = {f.name: getattr(found, f.name) for f in fields(found)}
    return _page(page.queue_page({**facts, "job": found.job.to_json()}))


def refused(error: Exception) -> Response:
    """The refusal of a page: in words, and with a way to sign in."""
    told = refusal(error)
    headers = {k: v for k, v in told.headers.items() if k in ("retry-after",)}
    if told.status_code == 401:
        headers["WWW-Authenticate"] = 'Basic realm="motet", charset="UTF-8"'
    return _page(page.refused_page(told.status_code, error_of(error).message), told.status_code, headers)


def _page(content: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return HTMLResponse(content, status, {**_HEADERS, **(headers or {})})


# -- facts


def facts_of(use: Resources, tenant: UUID, job: UUID, *, timeline: int) -> JobActivity:
    """A job's activity. Raises NotFound."""
    with use.database.transaction() as connection:
        found = store.activity(connection, tenant, job, timeline=timeline)
    beats = _beats(use)
    silent = use.workers.silent(beats, time.monotonic()) if beats else set[str]()
    return JobActivity(
        job=describe(found.job),
        now_s=_s(found.now_s),
        passes=tuple(_pass(found, p) for p in found.passes),
        devices=tuple(_device(d, beats, silent) for d in found.devices),
        timeline=tuple(_subtask(s) for s in found.timeline),
        throughput=tuple(
            ThroughputBucket(at_s=_s(t.at_s), tokens_s=round(t.tokens_s, 1), rows_s=round(t.rows_s, 1))
            for t in found.throughput
        ),
        errors=tuple(
            ErrorCount(task=e.task, error=e.error, count=e.count, first_row=e.first_row, message=e.message)
            for e in found.errors
        ),
        asks=_asks(found) if found.asks else None,
        left_out=LeftOut(
            timeline=found.subtasks_left_out, devices=found.devices_left_out, errors=found.errors_left_out
        ),
    )


def _asks(found: Activity) -> AsksUnderWay:
    """The newest spans, which end about now; and the last minute of them as one."""
    spans = found.asks
    newest_s = found.now_s - (len(spans) - 1) * SPAN_S
    return AsksUnderWay(
        minute=_ask_counts(last_minute(spans), found.now_s, SPAN_S * MINUTE),
        spans=tuple(_ask_counts(s, newest_s + i * SPAN_S, SPAN_S) for i, s in enumerate(spans)),
    )


def _ask_counts(s: AskSpan, at_s: float, seconds: float) -> AskCounts:
    p50_s, p99_s = (quantile_s(s.times, share) for share in (0.5, 0.99))
    return AskCounts(
        at_s=_s(at_s),
        asks_s=round(s.answered / seconds, 2),
        rows_s=round(s.n_rows / seconds, 2),
        late=s.late,
        refused=s.refused,
        failed=s.failed,
        waiting=s.waiting,
        p50_s=None if p50_s is None else _s(p50_s),
        p99_s=None if p99_s is None else _s(p99_s),
    )


def _subtask(s: SubtaskActivity) -> SubtaskUnderWay:
    return SubtaskUnderWay(
        subtask=s.id,
        worker=s.worker,
        pass_=s.pass_number,
        state=s.state,
        exclusive=s.exclusive,
        carved_s=_s(s.carved_s),
        start_s=_s(s.start_s),
        end_s=None if s.end_s is None else _s(s.end_s),
        rows=s.rows,
        tokens=s.tokens,
        busy_s=_s(s.busy_s),
    )


def _pass(found: Activity, p: PassActivity) -> PassUnderWay:
    return PassUnderWay(
        number=p.number,
        kind=p.kind,
        tasks=p.tasks,
        blocks=PassBlocks(total=p.blocks, sealed=p.blocks_sealed, waiting=p.blocks_waiting),
        rows=RowsUnderWay(
            total=p.rows, waiting=store.waiting(found.job, p), open=p.rows_open, done=p.rows_done
        ),
        subtasks=SubtaskCounts(
            open=p.subtasks_open, done=p.subtasks_done, lost=p.subtasks_lost, failed=p.subtasks_failed
        ),
        tokens=p.tokens,
        unfused_tokens=p.unfused_tokens,
        busy_s=_s(p.busy_s),
    )


def _device(d: DeviceActivity, beats: Mapping[str, Beat] | None, silent: set[str]) -> DeviceUnderWay:
    beat = beats.get(d.worker) if beats else None
    if beats is None or d.worker in silent:
        state: DeviceState = "silent"
    else:
        state = beat.state if beat else "gone"
    return DeviceUnderWay(
        worker=d.worker,
        device_name=beat.device_name if beat else d.device_name,
        state=state,
        subtasks=d.subtasks,
        open=d.open,
        rows=d.rows,
        tokens=d.tokens,
        busy_s=_s(d.busy_s),
        tokens_s=round(d.tokens / d.busy_s, 1) if d.busy_s > 0 else 0.0,
        share=round(d.busy_s / d.span_s, 3) if d.span_s > 0 else 0.0,
        utilisation=beat.utilisation if beat else None,
        backlog_s=beat.backlog_s if beat else None,
    )


def _beats(use: Resources) -> dict[str, Beat] | None:
    """Newest beat of each worker; None where Redis is away, and nobody can be heard."""
    if use.transport is None:
        return None
    try:
        return use.transport.beats()
    except TransportLost:
        return None


def _s(seconds: float) -> float:
    return round(seconds, 3)
