"""Routes of blobs: files by content, for workers that fetch models and for whoever registers them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import suppress
from typing import Annotated

from fastapi import Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

from motet.errors import InvalidJob, NotFound, Problem
from motet.messages.registry import BlobRecord
from motet.protocol.wire import LEASE_HEADER
from scheduler.api.auth import Caller
from scheduler.api.blob_folder import SHA256
from scheduler.api.bodies import chunks
from scheduler.api.refusals import Forbidden, Unavailable
from scheduler.api.resources import Resources, Use
from scheduler.api.routing import Routes, gives_bytes, takes_bytes
from scheduler.store import blobs as store
from scheduler.store.database import StoreUnavailable
from scheduler.store.registry import has_live_lease

log = logging.getLogger(__name__)
routes = Routes(tags=["blobs"])

BlobPath = Annotated[str, Path(description="Sha256 of the file, in lower-case hex.", examples=["9f86d081…"])]

#: What lets a worker store a file.
_LEASE = re.compile(r"([0-9]{1,18})\.([0-9]{1,4})\.([A-Za-z0-9_-]{1,128})")
_BINARY = "application/octet-stream"


@routes.api_route(
    "/v1/blobs/{sha256}",
    methods=["GET"],
    summary="A file by content; ranges are answered",
    responses={
        200: gives_bytes("The file.", _BINARY),
        206: gives_bytes("The part asked for by `Range`.", _BINARY),
    },
    response_class=FileResponse,
)
def get_blob(use: Use, caller: Caller, sha256: BlobPath) -> Response:
    return _file(use, sha256)


@routes.head(
    "/v1/blobs/{sha256}",
    summary="Whether a file is stored",
    response_description="It is; `Content-Length` is its size.",
)
def has_blob(use: Use, caller: Caller, sha256: BlobPath) -> Response:
    found = _file(use, sha256)
    # Whoever asks is about to name it in a manifest, and will not send it again.
    with use.database.transaction() as connection:
        store.touch_blob(connection, sha256)
    return found


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
    openapi_extra=takes_bytes("The file as it is.", octet_stream="binary"),
)
async def put_blob(request: Request, use: Use, caller: Caller, sha256: BlobPath) -> BlobRecord:
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
    if use.blobs.find(sha256) is None:
        # A sweep took the file of before in the moment between; from here on none takes it.
        raise Unavailable("the file was swept while it came in; send it again")
    log.info("blob stored", extra={"blob": sha256, "bytes": size, "token": caller.token})
    return BlobRecord(sha256=sha256, bytes=size)


def lease_of(shown: str) -> tuple[int, int, str] | None:
    """Sub-task, attempt and nonce that the header names; None where it names none."""
    match = _LEASE.fullmatch(shown)
    return None if match is None else (int(match[1]), int(match[2]), match[3])


def _need_lease(use: Resources, shown: str) -> None:
    """Raise Forbidden unless the worker runs an attempt right now, and can prove it."""
    lease = lease_of(shown)
    if lease is not None:
        with use.database.transaction() as connection:
            if has_live_lease(connection, *lease):
                return
    raise Forbidden(f"a worker stores files under a live lease only; name it in the header {LEASE_HEADER}")


def _record(use: Resources, sha256: str, size: int) -> None:
    with use.database.transaction() as connection:
        store.record_blob(connection, sha256, size)


#: How often each API process looks for files that nothing needs.
SWEEP_S = 3600.0
#: A file that nothing names is kept for so long: its manifest may be on its way.
KEPT_S = 24 * 3600.0
#: Files of one transaction.
_AT_ONCE = 100


def sweep(use: Resources, *, kept_s: float = KEPT_S) -> int:
    """Delete the blobs that no model names and nobody asked for lately; and abandoned uploads. How many blobs.

    The file goes while its row is locked: a PUT of the same content at that moment waits for the row, and then
    looks whether its file is there. Several processes may sweep one folder.
    """
    use.blobs.sweep()
    _adopt(use)
    swept = 0
    while True:
        with use.database.transaction() as connection:
            found = store.take_unnamed_blobs(connection, kept_s, _AT_ONCE)
            for sha256 in found:
                path = use.blobs.find(sha256)
                if path is not None:
                    path.unlink(missing_ok=True)
        swept += len(found)
        if len(found) < _AT_ONCE:
            break
    if swept:
        log.info("blobs swept", extra={"blobs": swept})
    return swept


def drop_blob(use: Resources, sha256: str) -> None:
    """Delete a blob that is not needed any more, unless something else names it."""
    with use.database.transaction() as connection:
        if store.take_unnamed_blob(connection, sha256):
            path = use.blobs.find(sha256)
            if path is not None:
                path.unlink(missing_ok=True)


def _adopt(use: Resources) -> None:
    """Record files that have no row: their PUT ended in between, or another sweep did. They age like all others."""
    files = [path for path in use.blobs.root.glob("??/??/*") if SHA256.fullmatch(path.name)]
    for start in range(0, len(files), _AT_ONCE):
        known = []
        for path in files[start : start + _AT_ONCE]:
            with suppress(FileNotFoundError):
                stat = path.stat()
                known.append((path.name, stat.st_size, max(0.0, time.time() - stat.st_mtime)))
        with use.database.transaction() as connection:
            store.adopt_blobs(connection, known)


async def keep_swept(use: Resources) -> None:
    """Sweep at once, and then every hour, for ever. What cannot be done now is done in an hour."""
    while True:
        try:
            await run_in_threadpool(sweep, use)
        except (StoreUnavailable, OSError) as trouble:
            log.warning("blobs not swept", extra={"trouble": type(trouble).__name__})
        await asyncio.sleep(SWEEP_S)
