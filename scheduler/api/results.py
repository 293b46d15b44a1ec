"""Routes of results: merged rows as typed columns or as lines, block by block, while the job runs.

A stream holds no connection to Postgres between its blocks: a slow reader costs memory for one batch only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from motet.errors import NotFound
from motet.protocol.columns import Column, sized, values
from motet.protocol.envelope import pack
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.jobs import JobPath, WaitS, describe
from scheduler.api.refusals import CutOff, refusal
from scheduler.api.resources import Resources, Use, job_id
from scheduler.store.database import StoreUnavailable
from scheduler.store.jobs import job_entry
from scheduler.store.results import ReadyBlock, RowOrder, Shown, read_columns, ready_blocks, shown, unanswered

routes = APIRouter(tags=["results"])

#: Columns of one msgpack answer, about; a client asks again from where it stopped.
ANSWER_BYTES = 8 * 1024 * 1024
#: Columns read from Postgres at once, about.
_BATCH_BYTES = 1024 * 1024

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


@dataclass(frozen=True, slots=True)
class Look:
    """The job at one moment, and the blocks that were ready at or after it."""

    job: Shown
    blocks: Sequence[ReadyBlock]

    def complete(self, after: int) -> bool:
        """Whether every block before ``after`` was sent and none will follow."""
        if self.blocks or self.job.state == "loading":
            return False
        return self.job.ended or after >= self.job.n_blocks


@dataclass(frozen=True, slots=True)
class Merged:
    """One block with its columns, in the order of the job's tasks."""

    job: Shown
    block: ReadyBlock
    columns: Sequence[Column]


@dataclass(frozen=True, slots=True)
class End:
    """The last word of an answer: where to ask on, and whether there is any need to."""

    after: int
    state: str
    complete: bool
    #: The job as ``GET /v1/jobs/{id}`` tells it, behind the last block of all: that saves a question.
    job: Mapping[str, Any] | None = None


def look_for(asked: ResultsQuery, after: int) -> Look:
    """The job, then what is ready. In that order: an ended job gets no more blocks."""
    with asked.use.database.transaction() as connection:
        job = shown(connection, asked.tenant, asked.job, asked.tasks)
        return Look(job, ready_blocks(connection, job, asked.order, after))


def read_on(asked: ResultsQuery, look: Look, after: int, budget: float) -> Iterator[Merged | End]:
    """Blocks while any are ready and the budget lasts, then the end. About a megabyte is held at a time.

    Raises StoreUnavailable or NotFound where Postgres or the job goes away, also between two blocks.
    """
    while look.blocks and budget > 0:
        batch = _fitting(look.blocks, min(_BATCH_BYTES, budget))
        budget -= sum(b.bytes for b in batch)
        with asked.use.database.transaction() as connection:
            columns = read_columns(connection, sorted({c for b in batch for c in b.columns}))
        if any(c not in columns for b in batch for c in b.columns):
            raise NotFound("the job was removed meanwhile")
        for block in batch:
            tasks = zip(look.job.tasks, block.columns, strict=True)
            yield Merged(look.job, block, [sized(columns[c], t.dim, t.dtype) for t, c in tasks])
            after = block.cursor(asked.order)
        rest = look.blocks[len(batch) :]
        look = Look(look.job, rest) if rest else look_for(asked, after)
    complete = look.complete(after)
    yield End(after, look.job.state, complete, _as_it_ended(asked) if complete else None)


def frame_stream(pieces: Iterator[Merged | End], order: RowOrder) -> Iterator[bytes]:
    """Frames, with one that ends them. Where Postgres or the job goes away behind a block, it says where to go on.

    Raises StoreUnavailable or NotFound before the first block.
    """
    sent: Merged | None = None
    try:
        for piece in pieces:
            yield as_frame(piece)
            sent = piece if isinstance(piece, Merged) else None
    except (StoreUnavailable, NotFound):
        if sent is None:
            raise
        yield as_frame(End(sent.block.cursor(order), sent.job.state, complete=False))


def line_stream(pieces: Iterator[Merged | End], order: RowOrder) -> Iterator[bytes]:
    """JSON lines. Lines have no end of their own, so those that break off must not look like whole ones.

    Whatever goes wrong behind a block is told in a last line, for readers to whom a proxy shows the end of the
    connection as the end of the body; then CutOff is raised, or the error itself where it is a fault of ours.
    Raises StoreUnavailable or NotFound before the first block.
    """
    sent: Merged | None = None
    try:
        for piece in pieces:
            yield as_lines(piece)
            sent = piece if isinstance(piece, Merged) else None
    except Exception as error:
        if sent is None:
            raise
        yield _last_line(error, sent.block.cursor(order))
        if isinstance(error, StoreUnavailable | NotFound):
            raise CutOff(type(error).__name__) from None
        raise


def _last_line(error: Exception, after: int) -> bytes:
    """Why the lines end before the rows do, in the words of a refusal, and where to go on."""
    said = json.loads(bytes(refusal(error).body))["error"]
    if not isinstance(error, NotFound):
        said["message"] += f"; there are more rows: ask again with after={after}"
    return json.dumps({"error": said | {"next": after}}, ensure_ascii=False).encode() + b"\n"


def _as_it_ended(asked: ResultsQuery) -> Mapping[str, Any] | None:
    """The job now; None where it cannot be told, and must be asked for."""
    try:
        with asked.use.database.transaction() as connection:
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
        **shapes.answers(200, None, None, "Frames of msgpack, or a JSON line per row.", 403, 404, 422),
        200: {
            "description": "Length-prefixed frames of zstd msgpack (docs/http.md), or with `Accept: "
            "application/x-ndjson` a JSON line per row.",
            "content": {
                _FRAMES: {"schema": {"type": "string", "format": "binary"}},
                _LINES: {
                    "schema": {"type": "string"},
                    "example": '{"row": 0, "topic": "business", "errors": {}}\n{"row": 1, "topic": "sports", "errors": {}}',
                },
            },
        },
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
    wait_s: WaitS = 0.0,
) -> Response:
    names = None if tasks is None else tuple(dict.fromkeys(tasks.split(",")))
    asked = ResultsQuery(use, caller.tenant, job_id(job), names, order)

    def news() -> Look | None:
        look = look_for(asked, after)
        return look if look.blocks or look.job.ended or look.complete(after) else None

    look = await use.bell.until(asked.job, wait_s, news, request.is_disconnected) if wait_s else None
    if look is None:
        look = await run_in_threadpool(look_for, asked, after)
    lines = _LINES in request.headers.get("accept", "")
    pieces = read_on(asked, look, after, math.inf if lines else ANSWER_BYTES)
    stream = line_stream(pieces, order) if lines else frame_stream(pieces, order)
    # The first piece before the status: a database that is away now is a 503, not a torn stream.
    first = await run_in_threadpool(next, stream)
    return StreamingResponse(chain((first,), stream), media_type=_LINES if lines else _FRAMES)


def as_frame(piece: Merged | End) -> bytes:
    """A block, or the end, as a frame of docs/http.md."""
    if isinstance(piece, End):
        end = {"end": True, "next": piece.after, "state": piece.state, "complete": piece.complete}
        body = pack(end | ({"job": piece.job} if piece.job else {}))
    else:
        tasks = zip(piece.job.tasks, piece.columns, strict=True)
        body = pack(
            {
                "block": piece.block.number,
                "first_row": piece.block.first_row,
                "rows": piece.block.n_rows,
                "done": piece.block.done,
                "columns": {t.name: c.to_wire() for t, c in tasks},
            }
        )
    return len(body).to_bytes(4, "big") + body


def as_lines(piece: Merged | End) -> bytes:
    """The rows of a block as JSON lines; a cell without an answer is null, and told under ``errors``."""
    if isinstance(piece, End):
        return b""
    tasks = piece.job.tasks
    cells = {
        t.name: [_plain(c, v) for v in values(c, t.labels)] for t, c in zip(tasks, piece.columns, strict=True)
    }
    lines = []
    for offset in range(piece.block.n_rows):
        row: dict[str, Any] = {"row": piece.block.first_row + offset}
        row.update((name, column[offset]) for name, column in cells.items())
        row["errors"] = {
            t.name: {"error": e.error, "message": e.message}
            for t, c in zip(tasks, piece.columns, strict=True)
            if (e := c.errors.get(offset)) is not None
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def _plain(column: Column, value: Any) -> Any:
    """A cell as people read it: the label; the labels given; a number; a vector; spans; any JSON.

    With every score asked for, a label comes with them.
    """
    if value is None:
        return None
    match column.kind:
        case "label":
            label, *rest = value
            return {"label": label, "score": _finite(rest[0]), "scores": rest[1]} if len(rest) > 1 else label
        case "labels":
            pairs, every = value if isinstance(value, tuple) else (value, None)
            names = [label for label, _ in pairs]
            return names if every is None else {"labels": names, "scores": every}
        case "spans":
            return [{"start": a, "end": b, "label": label, "score": _finite(s)} for a, b, label, s in value]
        case "number":
            return _finite(value)
        case "vector":
            return [_finite(x) for x in value]
        case _:
            return value


def _finite(x: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if math.isfinite(x) else None


@routes.get(
    "/v1/jobs/{job}/errors",
    summary="Cells without an answer, by row",
    responses=shapes.answers(200, shapes.ErrorsShape, shapes.CELL_ERRORS, "A page of cells.", 403, 404, 422),
)
def show_errors(
    use: Use,
    caller: Caller,
    job: JobPath,
    limit: Annotated[
        int, Query(ge=1, le=10_000, description="About so many; those of a row stay together.")
    ] = 1000,
    after: Annotated[int, Query(ge=-1, le=2**62, description="`next` of the page before.")] = -1,
) -> Response:
    with use.database.transaction() as connection:
        cells, following = unanswered(connection, caller.tenant, job_id(job), after=after, limit=limit)
    return JSONResponse(
        {
            "errors": [
                {"row": c.row, "task": c.task, "error": c.error.error, "message": c.error.message}
                for c in cells
            ],
            "next": following,
        }
    )
