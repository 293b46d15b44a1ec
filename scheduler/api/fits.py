"""Routes of training runs: for the worker that runs one, under its lease; and for whoever watches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request, Response

from motet.errors import InvalidJob, NotFound, Problem
from motet.messages.training import Checkpoint, FitList, FitRecord, FitReport
from motet.protocol.envelope import pack
from motet.protocol.wire import LEASE_HEADER
from motet.templates import filled
from scheduler.api.auth import Caller
from scheduler.api.blobs import drop_blob, lease_of
from scheduler.api.records import JobPath
from scheduler.api.refusals import Forbidden
from scheduler.api.resources import Use, job_id
from scheduler.api.routing import Routes, body, gives_bytes, takes
from scheduler.blocks import decode_block
from scheduler.store import fits as store
from scheduler.store.jobs import job_entry
from scheduler.store.registry import blob_sizes

routes = Routes(tags=["training"])

RowPath = Annotated[int, Path(ge=0, le=2**31 - 1, description="Index of the recipe in its job.")]
NumberPath = Annotated[int, Path(ge=0, le=2**31 - 1, description="Number of the block, from 0.")]
_PACKED = "application/msgpack"


def _bearer(request: Request, use: Use) -> store.Bearer:
    """The training job whose live lease the caller proves. Raises Forbidden."""
    lease = lease_of(request.headers.get(LEASE_HEADER, ""))
    if lease is not None:
        with use.database.transaction() as connection:
            found = store.bearer(connection, *lease)
        if found is not None:
            return found
    raise Forbidden(f"only under the live lease of a training job; name it in the header {LEASE_HEADER}")


#: The training job of a worker's live lease, as an argument of a route.
UnderLease = Annotated[store.Bearer, Depends(_bearer)]


@routes.get(
    "/v1/jobs/{job}/fits",
    summary="How far the runs of a training job are: loss and scores of each epoch",
)
def show_fits(use: Use, caller: Caller, job: JobPath) -> FitList:
    asked = job_id(job)
    with use.database.transaction() as connection:
        job_entry(connection, caller.tenant, asked)  # raises NotFound
        found, left_out = store.fits(connection, caller.tenant, asked)
    told = tuple(FitRecord(row=row, epochs=_in_order(reports)) for row, reports in found)
    return FitList(fits=told, left_out=left_out)


def _in_order(reports: Mapping[str, Any]) -> tuple[Any, ...]:
    """Heads before what learns after them, each by epoch: a key is a stage and a number of four digits."""
    return tuple(reports[key] for key in sorted(reports, key=lambda key: (not key.startswith("heads"), key)))


@routes.get(
    "/v1/fits/{row}",
    summary="Where a run goes on (workers, under their lease)",
)
def show_checkpoint(use: Use, caller: Caller, row: RowPath, bearer: UnderLease) -> Checkpoint:
    with use.database.transaction() as connection:
        return Checkpoint(checkpoint=store.checkpoint(connection, bearer.job, row))


@routes.put(
    "/v1/fits/{row}",
    summary="Tell how far a run is, or what came out of it (workers, under their lease)",
    status_code=204,
    response_description="It is noted.",
    openapi_extra=takes(FitReport, {"key": "heads 0001", "report": {"loss": 0.7}, "checkpoint": None}),
)
def tell_fit(
    use: Use,
    caller: Caller,
    row: RowPath,
    # Before the body, which is read for a bearer only.
    bearer: UnderLease,
    told: Annotated[FitReport, body(FitReport, newer=True)],
) -> Response:
    with use.database.transaction() as connection:
        wanted = {*told.files, *([told.checkpoint] if told.checkpoint else [])}
        if absent := wanted - blob_sizes(connection, wanted).keys():
            raise InvalidJob(
                Problem("files", f"{len(absent)} that are not stored", "stored blobs", "store them first")
            )
        reports = {told.key: told.report} if told.report else {}
        old = store.tell(
            connection, bearer.job, row, reports=reports, checkpoint=told.checkpoint, files=list(told.files)
        )
    if old is not None:
        # Many times the size of a model, and one more every half minute: not left to the sweep of tomorrow.
        drop_blob(use, old)
    return Response(status_code=204)


@routes.get(
    "/v1/fits/{row}/data/{job}/{number}",
    summary="A block of the rows that a run learns from (workers, under their lease)",
    responses={
        200: gives_bytes(
            "zstd msgpack: `texts` and the column `vectors`, or `end` behind the last block.", _PACKED
        ),
    },
)
def show_lesson(
    use: Use,
    caller: Caller,
    row: RowPath,
    job: JobPath,
    number: NumberPath,
    bearer: UnderLease,
    texts: Annotated[int, Query(ge=0, le=1, description="1: the texts as well.")] = 1,
) -> Response:
    learned = job_id(job)
    with use.database.transaction() as connection:
        if _taught_by(store.recipe_block(connection, bearer.job, row)) != str(learned):
            raise NotFound(f"job {job} is not the one that the recipe in row {row} learns from")
        found = store.lesson(connection, bearer.tenant, learned, number)
    if found is None:
        return Response(pack({"end": True}), media_type=_PACKED)
    read: list[str] = []
    if texts:
        columns = decode_block(found.payload).values
        read = [
            filled(found.input, dict(zip(columns, row_, strict=True)))
            for row_ in zip(*columns.values(), strict=True)
        ]
    return Response(pack({"texts": read, "vectors": found.vectors.to_wire()}), media_type=_PACKED)


def _taught_by(recipe: tuple[bytes, int] | None) -> str | None:
    """The job whose rows a recipe learns from; None where there is no recipe."""
    if recipe is None:
        return None
    payload, at = recipe
    [texts] = decode_block(payload).texts().values()
    try:
        told = json.loads(texts[at])
    except ValueError:
        return None
    return str(told.get("job")) if isinstance(told, dict) else None
