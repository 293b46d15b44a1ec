"""The route of parts: rows of a job that is loading, as columns or lines. They are run while others are sent."""

from __future__ import annotations

import hashlib
import logging
from typing import Annotated
from uuid import UUID

from fastapi import Path, Request
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, Problem
from motet.messages.jobs import PartLanded
from motet.protocol import traces
from motet.tasks import short
from scheduler.api.auth import Caller
from scheduler.api.bodies import whole_body
from scheduler.api.media import with_media
from scheduler.api.records import JobPath
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.routing import Routes, takes_bytes
from scheduler.api.rows import Incoming, read_columns, read_lines
from scheduler.blocks import blocks_of
from scheduler.store import jobs as store
from scheduler.store import landing
from scheduler.store.landing import LoadingJob

log = logging.getLogger(__name__)
routes = Routes(tags=["jobs"])


@routes.put(
    "/v1/jobs/{job}/parts/{number}",
    summary="Send a part of the rows",
    openapi_extra=takes_bytes(
        'Msgpack of `{"columns": {field: [value, …]}, "first_row": i}`, or a JSON object or a string a line.',
        msgpack="binary",
        x_ndjson="ndjson",
    ),
)
async def put_part(
    request: Request,
    use: Use,
    caller: Caller,
    job: JobPath,
    number: Annotated[int, Path(ge=0, le=2**31 - 1, description="From 0, in order.", examples=[0])],
) -> PartLanded:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Before its body is read: what is refused costs no memory.
    facts = await run_in_threadpool(_admitted, use, caller.tenant, job_id(job))
    async with whole_body(request, use, use.settings.max_part_bytes) as raw:
        return await run_in_threadpool(_put_part, use, facts, number, kind, raw)


def _admitted(use: Resources, tenant: UUID, job: UUID) -> LoadingJob:
    facts = _loading(use, tenant, job)
    use.door.admit(interactive=facts.interactive, uploading=True)
    return facts


def _put_part(use: Resources, facts: LoadingJob, number: int, kind: str, raw: bytes) -> PartLanded:
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
    incoming = read(raw, facts.fields, use.settings.max_row_bytes, facts.dialogues, facts.media)
    incoming = with_media(use, facts.tenant, facts.secret, incoming, refuse=True)
    if facts.bad_rows == "refuse" and (incoming.bad or incoming.bad_fields):
        incoming.refuse_bad_rows(_first_row(use, facts, incoming))
    with traces.span(facts.id, "land", part=number), use.database.transaction() as connection:
        landed = land(use, connection, facts, number, hashlib.sha256(raw).digest(), incoming)
    log.debug(
        "part landed",
        extra={"job": facts.id, "part": number, "rows": landed.rows, "bad_rows": landed.bad_rows},
    )
    return PartLanded(
        part=landed.part,
        rows=landed.rows,
        total_rows=landed.total_rows,
        bad_rows=landed.bad_rows,
        next_part=landed.part + 1,
        cells_done=landed.cells_done,
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


def land(
    use: Resources,
    connection: Connection,
    facts: LoadingJob,
    number: int,
    digest: bytes,
    incoming: Incoming,
    *,
    closes: bool = False,
) -> landing.Landed:
    """Store rows as a part of a job that is loading. ``closes``: no part follows."""
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
        closes=closes,
    )
