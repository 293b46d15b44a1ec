"""Routes of blobs: files by content, for workers that fetch models and for whoever registers them."""

from __future__ import annotations

import logging
import re
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse

from motet.errors import InvalidJob, NotFound, Problem
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.blob_folder import SHA256
from scheduler.api.bodies import chunks
from scheduler.api.refusals import Forbidden
from scheduler.api.resources import Resources, Use
from scheduler.store.registry import add_blob, has_live_lease

log = logging.getLogger(__name__)
routes = APIRouter(tags=["blobs"])

BlobPath = Annotated[str, Path(description="Sha256 of the file, in lower-case hex.", examples=["9f86d081…"])]

#: ``<subtask>.<attempt>.<nonce>`` of a live lease: what lets a worker store a file.
LEASE_HEADER = "Motet-Lease"
_LEASE = re.compile(r"([0-9]{1,18})\.([0-9]{1,4})\.([A-Za-z0-9_-]{1,128})")
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@routes.api_route(
    "/v1/blobs/{sha256}",
    methods=["GET"],
    summary="A file by content; ranges are answered",
    responses={
        **shapes.answers(200, None, None, "The file.", 403, 404),
        200: {"description": "The file.", "content": _BINARY},
        206: {"description": "The part asked for by `Range`.", "content": _BINARY},
    },
    response_class=FileResponse,
)
def get_blob(use: Use, caller: Caller, sha256: BlobPath) -> Response:
    return _file(use, sha256)


@routes.head(
    "/v1/blobs/{sha256}",
    summary="Whether a file is stored",
    responses=shapes.answers(200, None, None, "It is; `Content-Length` is its size.", 403, 404),
)
def has_blob(use: Use, caller: Caller, sha256: BlobPath) -> Response:
    return _file(use, sha256)


def _file(use: Resources, sha256: str) -> Response:
    path = use.blobs.find(sha256)
    if path is None:
        raise NotFound("no blob of this digest")
    headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, max-age=31536000, immutable"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


@routes.put(
    "/v1/blobs/{sha256}",
    summary="Store a file",
    status_code=201,
    responses=shapes.answers(201, None, None, "It is stored, now or before.", 403, 413, 422),
    openapi_extra=shapes.takes(None, "The file as it is.", "application/octet-stream"),
)
async def put_blob(request: Request, use: Use, caller: Caller, sha256: BlobPath) -> Response:
    if not SHA256.fullmatch(sha256):
        raise InvalidJob(
            Problem("sha256", "another form", "64 lower-case hex digits", "send the file's sha256")
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidJob(Problem("Content-Encoding", "a coding", "none", "send the file as it is"))
    if caller.scope == "worker":
        await run_in_threadpool(_need_lease, use, request.headers.get(LEASE_HEADER, ""))
    size = await use.blobs.receive(sha256, chunks(request))
    await run_in_threadpool(_record, use, sha256, size)
    log.info("blob stored", extra={"blob": sha256, "bytes": size, "token": caller.token})
    return JSONResponse({"sha256": sha256, "bytes": size}, 201)


def _need_lease(use: Resources, shown: str) -> None:
    """Raise Forbidden unless the worker runs an attempt right now, and can prove it."""
    match = _LEASE.fullmatch(shown)
    if match:
        with use.database.transaction() as connection:
            if has_live_lease(connection, int(match[1]), int(match[2]), match[3]):
                return
    raise Forbidden(f"a worker stores files under a live lease only; name it in the header {LEASE_HEADER}")


def _record(use: Resources, sha256: str, size: int) -> None:
    with use.database.transaction() as connection:
        add_blob(connection, sha256, size)
