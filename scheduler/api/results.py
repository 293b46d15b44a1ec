"""Routes of results: merged rows as typed columns or as lines, block by block, while the job runs.

A stream holds no connection to Postgres between its blocks: a slow reader costs memory for one batch only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from motet.errors import Gone, InvalidJob, NotFound
from motet.messages.jobs import FailedCell, FailedCells, JobRecord
from motet.protocol.columns import sized
from motet.states import State
from scheduler.api.auth import Caller
from scheduler.api.records import JobPath, WaitS, describe
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.result_streams import End, Merged, frame_stream, line_stream
from scheduler.api.routing import Routes, gives_bytes
from scheduler.store import folds
from scheduler.store.database import StoreUnavailable
from scheduler.store.jobs import job_entry
from scheduler.store.results import (
    BLOCKS,
    ReadyBlock,
    RowOrder,
    Shown,
    read_columns,
    shown,
    shown_and_ready,
    unanswered,
)

routes = Routes(tags=["results"])

#: Columns of one msgpack answer, about; a client asks again from where it stopped.
ANSWER_BYTES = 8 * 1024 * 1024
#: Columns read from Postgres at once, about.
_BATCH_BYTES = 1024 * 1024
#: The last columns of a job are sent as one piece, in one go of a thread, where they have so many bytes at most.
_SMALL_BYTES = 64 * 1024

_LINES = "application/x-ndjson"
_FRAMES = "application/msgpack"


@dataclass(frozen=True, slots=True)
class ResultsQuery:
    """What results are asked for."""

    use: Resources
    tenant: UUID
    job: UUID
    #: None: all of them.
    tasks: tuple[str, ...] | None
    order: RowOrder
    #: Rows that were asked for and are gone are passed over.
    skip_gone: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """The job at one moment, and the blocks that were ready at or after it."""

    job: Shown
    blocks: Sequence[ReadyBlock]
    #: No block follows these: an ended job gets no more.
    last: bool = False

    def complete(self, after: int) -> bool:
        """Whether every block before ``after`` was sent and none will follow."""
        if self.blocks or self.job.state in (State.OPEN, State.LOADING):
            return False
        return self.job.ended or after >= self.job.n_blocks


def look_for(asked: ResultsQuery, after: int) -> Look:
    """The job, then what is ready. In that order: an ended job gets no more blocks.

    ``after`` 0 is wherever the rows begin now. Raises Gone for another one, behind which rows are gone; InvalidJob for
    one that no answer of this job has told: it would pass over rows that are still to come.
    """
    with asked.use.database.reading() as connection:
        job, blocks = shown_and_ready(connection, asked.tenant, asked.job, asked.tasks, asked.order, after)
    if after > job.n_blocks:
        raise InvalidJob.of(
            "after",
            f"{after:,}",
            f"at most {job.n_blocks:,}, the blocks of job {job.id} so far",
            "go on with `next` of an answer of this job, or the cursor of one of its rows",
        )
    if 0 < after < job.front(asked.order) and not asked.skip_gone:
        raise _gone(job)
    return Look(job, blocks, last=job.ended and len(blocks) < BLOCKS)


def _gone(job: Shown) -> Gone:
    return Gone(
        f"rows that were asked for are gone: job {job.id} keeps answered rows for a time, and all of them from row"
        f" {job.first_row} on; ask with skip_gone=true to go on with those that are kept",
        job.first_row,
    )


def read_on(asked: ResultsQuery, look: Look, after: int, budget: float) -> Iterator[Merged | End]:
    """Blocks while any are ready and the budget lasts, then the end. About a megabyte is held at a time.

    Raises StoreUnavailable, NotFound or Gone where Postgres, the job or its next rows go away, also between two blocks.
    """
    while look.blocks and budget > 0:
        batch = _fitting(look.blocks, min(_BATCH_BYTES, budget))
        budget -= sum(b.bytes for b in batch)
        with asked.use.database.reading() as connection:
            columns = read_columns(connection, sorted({c for b in batch for c in b.columns}))
            given = folds.given(connection, asked.job, look.job.folds, [b.number for b in batch])
        if any(c not in columns for b in batch for c in b.columns):
            # The job was removed meanwhile, or its front has moved: the look says which, and where to go on.
            before, look = look.job.front(asked.order), look_for(asked, after)
            if look.job.front(asked.order) == before:
                raise NotFound("the job was removed meanwhile")
            continue
        for block in batch:
            tasks = zip(look.job.tasks, block.columns, strict=True)
            shown_columns = [sized(columns[c], t.dim, t.dtype) for t, c in tasks]
            yield Merged(look.job, block, shown_columns, given.get(block.number, {}))
            after = block.cursor(asked.order)
        rest = look.blocks[len(batch) :]
        look = replace(look, blocks=rest) if rest or look.last else look_for(asked, after)
    complete = look.complete(after)
    after = max(after, look.job.front(asked.order))
    yield End(after, look.job.state, complete, look.job.first_row, _as_it_ended(asked) if complete else None)


def _as_it_ended(asked: ResultsQuery) -> JobRecord | None:
    """The job now; None where it cannot be told, and must be asked for."""
    try:
        with asked.use.database.reading() as connection:
            return describe(job_entry(connection, asked.tenant, asked.job))
    except (StoreUnavailable, NotFound):
        return None


def _fitting(blocks: Sequence[ReadyBlock], budget: float) -> Sequence[ReadyBlock]:
    """The first blocks whose columns fit, at least one."""
    size = 0
    for i, block in enumerate(blocks):
        size += block.bytes
        if i and size > budget:
            return blocks[:i]
    return blocks


@routes.get(
    "/v1/jobs/{job}/results",
    summary="Merged rows, block by block, while the job runs",
    responses={
        200: gives_bytes(
            "Length-prefixed frames of zstd msgpack (docs/http.md), or with `Accept: application/x-ndjson` "
            'a JSON line per row: `{"row": 0, "topic": "business", "errors": {}}`.',
            _FRAMES,
            _LINES,
        ),
    },
)
async def show_results(
    request: Request,
    use: Use,
    caller: Caller,
    job: JobPath,
    order: Annotated[Literal["row", "done"], Query(description="By row, or as blocks are finished.")] = "row",
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="`next` of the answer before.")] = 0,
    tasks: Annotated[
        str | None,
        Query(description="Only these tasks, with commas between them.", examples=["topic,vector"]),
    ] = None,
    skip_gone: Annotated[
        bool, Query(description="Pass over rows behind `after` that an open job no longer keeps.")
    ] = False,
    wait_s: WaitS = 0.0,
) -> Response:
    names = None if tasks is None else tuple(dict.fromkeys(tasks.split(",")))
    asked = ResultsQuery(use, caller.tenant, job_id(job), names, order, skip_gone)

    def news() -> Look | None:
        look = look_for(asked, after)
        return look if look.blocks or look.job.ended or look.complete(after) else None

    look = await use.bell.until(asked.job, wait_s, news, request.is_disconnected) if wait_s else None
    if look is None:
        look = await run_in_threadpool(look_for, asked, after)
    lines = _LINES in request.headers.get("accept", "")
    pieces = read_on(asked, look, after, math.inf if lines else ANSWER_BYTES)
    stream = line_stream(pieces, order) if lines else frame_stream(pieces, order)
    # Lines have no place for it.
    begins = {"Motet-First-Row": str(look.job.first_row)} if look.job.first_row else None
    if not lines and look.last and sum(block.bytes for block in look.blocks) <= _SMALL_BYTES:
        return Response(await run_in_threadpool(b"".join, stream), media_type=_FRAMES, headers=begins)
    # The first piece before the status: a database that is away now is a 503, not a torn stream.
    first = await run_in_threadpool(next, stream)
    return StreamingResponse(chain((first,), stream), media_type=_LINES if lines else _FRAMES, headers=begins)


@routes.get(
    "/v1/jobs/{job}/errors",
    summary="Cells without an answer, by row",
)
def show_errors(
    use: Use,
    caller: Caller,
    job: JobPath,
    limit: Annotated[
        int, Query(ge=1, le=10_000, description="About so many; those of a row stay together.")
    ] = 1000,
    after: Annotated[int, Query(ge=-1, le=2**62, description="`next` of the page before.")] = -1,
) -> FailedCells:
    with use.database.transaction() as connection:
        of = shown(connection, caller.tenant, job_id(job))
        if 0 <= after < of.first_row - 1:
            raise _gone(of)
        cells, following = unanswered(connection, of.id, after=max(after, of.first_row - 1), limit=limit)
    failed = (FailedCell(row=c.row, task=c.task, error=c.error.error, message=c.error.message) for c in cells)
    return FailedCells(errors=tuple(failed), next=following, first_row=of.first_row)
