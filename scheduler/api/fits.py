"""Routes of training runs: for the worker that runs one, under its lease; and for whoever watches."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from motet.errors import InvalidJob, NotFound, Problem
from motet.protocol.envelope import pack
from motet.protocol.wire import LEASE_HEADER
from motet.tasks import render, short
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.blob_folder import SHA256
from scheduler.api.blobs import drop_blob, lease_of
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.jobs import JobPath
from scheduler.api.refusals import Forbidden
from scheduler.api.resources import Resources, Use, job_id
from scheduler.blocks import decode_block
from scheduler.store import fits as store
from scheduler.store.jobs import job_entry
from scheduler.store.registry import blob_sizes

routes = APIRouter(tags=["training"])

RowPath = Annotated[int, Path(ge=0, le=2**31 - 1, description="Index of the recipe in its job.")]
NumberPath = Annotated[int, Path(ge=0, le=2**31 - 1, description="Number of the block, from 0.")]
_PACKED = "application/msgpack"
_KEY = re.compile(r"[a-z0-9 ]{1,40}")
_MOST_FILES = 1000


@routes.get(
    "/v1/jobs/{job}/fits",
    summary="How far the runs of a training job are: loss and scores of each epoch",
    responses=shapes.answers(200, shapes.FitsShape, shapes.FITS, "As the workers told last.", 403, 404, 422),
)
def show_fits(use: Use, caller: Caller, job: JobPath) -> Response:
    asked = job_id(job)
    with use.database.transaction() as connection:
        job_entry(connection, caller.tenant, asked)  # raises NotFound
        found, left_out = store.fits(connection, caller.tenant, asked)
    told = [{"row": row, "epochs": _in_order(reports)} for row, reports in found]
    return JSONResponse({"fits": told, "left_out": left_out})


def _in_order(reports: Mapping[str, Any]) -> list[Any]:
    """Heads before what learns after them, each by epoch: a key is a stage and a number of four digits."""
    return [reports[key] for key in sorted(reports, key=lambda key: (not key.startswith("heads"), key))]


@routes.get(
    "/v1/fits/{row}",
    summary="Where a run goes on (workers, under their lease)",
    responses=shapes.answers(
        200, shapes.CheckpointShape, {"checkpoint": None}, "Its checkpoint.", 403, 404, 422
    ),
)
def show_checkpoint(request: Request, use: Use, caller: Caller, row: RowPath) -> Response:
    job = _bearer(request, use).job
    with use.database.transaction() as connection:
        return JSONResponse({"checkpoint": store.checkpoint(connection, job, row)})


@routes.put(
    "/v1/fits/{row}",
    summary="Tell how far a run is, or what came out of it (workers, under their lease)",
    status_code=204,
    responses=shapes.answers(204, None, None, "It is noted.", 403, 404, 413, 422),
    openapi_extra=shapes.takes(
        {"key": "heads 0001", "report": {"loss": 0.7}, "checkpoint": None}, "How far it is."
    ),
)
async def tell_fit(request: Request, use: Use, caller: Caller, row: RowPath) -> Response:
    bearer = await run_in_threadpool(_bearer, request, use)
    async with whole_body(request, use, SMALL_BYTES) as raw:
        await run_in_threadpool(_tell, use, bearer, row, clean_object(json_body(raw)))
    return Response(status_code=204)


def _tell(use: Resources, bearer: store.Bearer, row: int, body: Mapping[str, Any]) -> None:
    key, report = body.get("key", "files"), body.get("report", {})
    named, files = body.get("checkpoint"), body.get("files", [])
    problems = [
        Problem(field, short(body.get(field)), expected, "see docs/http.md")
        for field, fits, expected in (
            ("key", isinstance(key, str) and _KEY.fullmatch(key), "up to 40 lower-case letters, digits and blanks"),
            ("report", isinstance(report, dict), "an object"),
            ("checkpoint", named is None or _is_digest(named), "the sha256 of a stored blob, or null"),
            ("files", isinstance(files, list) and len(files) <= _MOST_FILES and all(map(_is_digest, files)),
             f"up to {_MOST_FILES} digests of stored blobs"),
        )
        if not fits
    ]  # fmt: skip
    if problems:
        raise InvalidJob(problems)
    with use.database.transaction() as connection:
        wanted = {*files, *([named] if named else [])}
        if absent := wanted - blob_sizes(connection, wanted).keys():
            raise InvalidJob(
                Problem("files", f"{len(absent)} that are not stored", "stored blobs", "store them first")
            )
        reports = {key: report} if report else {}
        old = store.tell(connection, bearer.job, row, reports=reports, checkpoint=named, files=files)
    if old is not None:
        # Many times the size of a model, and one more every half minute: not left to the sweep of tomorrow.
        drop_blob(use, old)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


@routes.get(
    "/v1/fits/{row}/data/{job}/{number}",
    summary="A block of the rows that a run learns from (workers, under their lease)",
    responses={
        **shapes.answers(200, None, None, "Texts and vectors.", 403, 404, 422),
        200: {
            "description": "zstd msgpack: `texts` and the column `vectors`, or `end` behind the last block.",
            "content": {_PACKED: {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
def show_lesson(
    request: Request,
    use: Use,
    caller: Caller,
    row: RowPath,
    job: JobPath,
    number: NumberPath,
    texts: Annotated[int, Query(ge=0, le=1, description="1: the texts as well.")] = 1,
) -> Response:
    bearer = _bearer(request, use)
    learned = job_id(job)
    with use.database.transaction() as connection:
        if _taught_by(store.recipe_block(connection, bearer.job, row)) != str(learned):
            raise NotFound(f"job {job} is not the one that the recipe in row {row} learns from")
        found = store.lesson(connection, bearer.tenant, learned, number)
    if found is None:
        return Response(pack({"end": True}), media_type=_PACKED)
    read: list[str] = []
    if texts:
        columns = decode_block(found.payload).texts()
        read = [
            render(found.input, dict(zip(columns, row_, strict=True)))
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


def _bearer(request: Request, use: Resources) -> store.Bearer:
    """The training job whose live lease the caller proves. Raises Forbidden."""
    lease = lease_of(request.headers.get(LEASE_HEADER, ""))
    if lease is not None:
        with use.database.transaction() as connection:
            found = store.bearer(connection, *lease)
        if found is not None:
            return found
    raise Forbidden(f"only under the live lease of a training job; name it in the header {LEASE_HEADER}")
