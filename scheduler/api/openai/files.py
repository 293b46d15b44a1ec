"""Routes of files: uploaded in one stream of any size, kept as blobs, deleted when their time is over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from motet.errors import NotFound
from motet.tasks import short
from scheduler.api.auth import Identity
from scheduler.api.blobs import drop_blob
from scheduler.api.openai.batch_output import KEPT_S
from scheduler.api.openai.multipart import UploadForm
from scheduler.api.openai.refusals import DoorError
from scheduler.api.refusals import Unavailable
from scheduler.api.resources import Resources
from scheduler.store import files as store
from scheduler.store.blobs import record_blob
from scheduler.store.files import FileOrder, StoredFile

#: Bytes of a file at most.
MAX_FILE_BYTES = 512 * 1024 * 1024
_PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_MOST_LISTED = 10_000
_LEAST_S, _MOST_S = 3600, 2_592_000


async def upload_file(request: Request, use: Resources, caller: Identity) -> Response:
    form = UploadForm(request)
    sha256, size = await use.blobs.store(form.file(), MAX_FILE_BYTES)
    purpose = form.fields.get("purpose", "")
    if purpose not in _PURPOSES:
        raise DoorError(
            f"purpose: got {short(purpose) or 'nothing'}; expected one of {', '.join(_PURPOSES)}",
            param="purpose",
            code="invalid_value" if purpose else "missing_required_parameter",
        )
    expires_s = _expires_s(form.fields)
    if expires_s is None and purpose == "batch":
        expires_s = KEPT_S
    stored = await run_in_threadpool(_record, use, caller.tenant, form, purpose, sha256, size, expires_s)
    return JSONResponse(described_file(stored))


def _record(
    use: Resources,
    tenant: UUID,
    form: UploadForm,
    purpose: str,
    sha256: str,
    size: int,
    expires_s: float | None,
) -> StoredFile:
    with use.database.transaction() as connection:
        record_blob(connection, sha256, size)
        stored = store.add_file(
            connection,
            file=store.new_file_id(),
            tenant=tenant,
            purpose=purpose,
            filename=form.filename or "file",
            size=size,
            sha256=sha256,
            expires_s=expires_s,
        )
    if use.blobs.find(sha256) is None:
        # A sweep took the file of before in the moment between.
        raise Unavailable("the file was swept while it came in; send it again")
    return stored


def _expires_s(fields: Mapping[str, str]) -> float | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor not in (None, "created_at"):
        raise DoorError('expires_after.anchor: expected "created_at"', param="expires_after.anchor")
    return expiry(int(seconds) if seconds and re.fullmatch(r"[0-9]{1,9}", seconds) else None)


def expiry(seconds: object) -> float:
    """Seconds for which a file is kept. Raises DoorError."""
    if type(seconds) is not int or not _LEAST_S <= seconds <= _MOST_S:
        raise DoorError(
            f"expires_after.seconds: expected a whole number from {_LEAST_S:,} to {_MOST_S:,}",
            param="expires_after.seconds",
            code="invalid_value",
        )
    return float(seconds)


async def list_files(request: Request, use: Resources, caller: Identity) -> Response:
    query = request.query_params
    limit, after = listing(query, _MOST_LISTED, _MOST_LISTED)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise DoorError("order: expected asc or desc", param="order", code="invalid_value")
    purpose = query.get("purpose")
    if purpose is not None and not re.fullmatch(r"[a-z_-]{1,40}", purpose):
        raise DoorError("purpose: expected a word such as batch", param="purpose", code="invalid_value")
    return await run_in_threadpool(_listed, use, caller.tenant, purpose, after, limit, order)


def _listed(
    use: Resources, tenant: UUID, purpose: str | None, after: str | None, limit: int, order: str
) -> Response:
    with use.database.transaction() as connection:
        found = store.list_files(
            connection, tenant, purpose=purpose, after=after, limit=limit + 1, order=cast(FileOrder, order)
        )
        if after is not None and not found:
            # Whoever deletes what they list must see that the next page has no beginning, and not an end.
            store.find_file(connection, tenant, after)
    return JSONResponse(a_list([described_file(one) for one in found[:limit]], more=len(found) > limit))


def listing(query: Mapping[str, str], default: int, most: int) -> tuple[int, str | None]:
    """(limit, after) of a list. Raises DoorError."""
    limit, after = query.get("limit", str(default)), query.get("after")
    if not re.fullmatch(r"[0-9]{1,6}", limit) or not 1 <= int(limit) <= most:
        raise DoorError(f"limit: expected a number from 1 to {most:,}", param="limit", code="invalid_value")
    if after is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", after):
        raise DoorError("after: expected an id", param="after", code="invalid_value")
    return int(limit), after


def a_list(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """One page of a list, as their SDK turns pages."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


async def show_file(request: Request, use: Resources, caller: Identity, file: str) -> Response:
    return JSONResponse(described_file(await run_in_threadpool(found_file, use, caller.tenant, file)))


async def delete_file(request: Request, use: Resources, caller: Identity, file: str) -> Response:
    await run_in_threadpool(_delete, use, caller.tenant, file)
    return JSONResponse({"id": file, "object": "file", "deleted": True})


def _delete(use: Resources, tenant: UUID, file: str) -> None:
    with use.database.transaction() as connection:
        sha256 = store.delete_file(connection, tenant, file)
    drop_blob(use, sha256)


async def file_content(request: Request, use: Resources, caller: Identity, file: str) -> Response:
    stored = await run_in_threadpool(found_file, use, caller.tenant, file)
    path = use.blobs.find(stored.sha256)
    if path is None:
        raise NotFound("the bytes of this file are gone")
    return FileResponse(path, media_type="application/octet-stream")


def found_file(use: Resources, tenant: UUID, file: str) -> StoredFile:
    """Raises NotFound."""
    with use.database.transaction() as connection:
        return store.find_file(connection, tenant, file)


def described_file(stored: StoredFile) -> dict[str, Any]:
    """A file as their clients read it."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": int(stored.created.timestamp()),
        "expires_at": None if stored.expires is None else int(stored.expires.timestamp()),
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
        "status_details": None,
    }
