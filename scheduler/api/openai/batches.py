"""Routes of batches: a file of requests, run as one job."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from motet.errors import NotFound
from motet.tasks import short
from scheduler.api.auth import Identity
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.openai.batch_counts import counted
from scheduler.api.openai.files import a_list, expiry, found_file, listing
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import SERVED
from scheduler.api.resources import Resources
from scheduler.store import batches as store
from scheduler.store.batches import NewBatch, StoredBatch

_WINDOW = re.compile(r"([1-9][0-9]{0,4})([hm])")
#: A window is at most 30 days: as long as files are kept.
_MOST_WINDOW_S = 30 * 86_400
_MOST_PAIRS, _KEY_CHARACTERS, _VALUE_CHARACTERS = 16, 64, 512
#: The SDK says how often it sent a request before; an equal one of this last hour is then the same.
_SENT_AGAIN, _AGAIN_S = "x-stainless-retry-count", 3600.0
_KEY = re.compile(r"[\x20-\x7e]{1,200}")
_FIELDS = frozenset(
    {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after", "priority"}
)


async def create_batch(request: Request, use: Resources, caller: Identity) -> Response:
    async with whole_body(request, use, SMALL_BYTES) as raw:
        body = clean_object(json_body(raw))
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise DoorError("Idempotency-Key: expected 1 to 200 printable characters", code="invalid_value")
    sent_before = request.headers.get(_SENT_AGAIN, "0") != "0"
    made = await run_in_threadpool(_create, use, caller.tenant, body, key, sent_before)
    use.batch_waits.set()
    return JSONResponse(described_batch(made, (0, 0)))


def _create(
    use: Resources, tenant: UUID, body: Mapping[str, Any], key: str | None, sent_before: bool
) -> StoredBatch:
    asked = _asked(use, tenant, body)
    with use.database.transaction() as connection:
        return store.add_batch(connection, tenant, asked, key=key, again_s=_AGAIN_S if sent_before else 0.0)


def _asked(use: Resources, tenant: UUID, body: Mapping[str, Any]) -> NewBatch:
    """Raises DoorError."""
    for name, value in body.items():
        if name not in _FIELDS and value is not None:
            raise DoorError(f"unknown parameter {short(name)}", param=short(name), code="unknown_parameter")
    endpoint, file = body.get("endpoint"), body.get("input_file_id")
    if not isinstance(endpoint, str) or endpoint not in SERVED:
        raise DoorError(
            f"endpoint: expected one of {', '.join(SERVED)}", param="endpoint", code="invalid_value"
        )
    if not isinstance(file, str):
        raise DoorError("input_file_id: expected the id of a file", param="input_file_id")
    window, window_s = _window(body.get("completion_window"))
    priority = body.get("priority")
    if priority is None:
        priority = "normal"
    if priority not in ("normal", "bulk"):
        raise DoorError('priority: expected "normal" or "bulk"', param="priority", code="invalid_value")
    try:
        found = found_file(use, tenant, file)
    except NotFound:
        raise DoorError("input_file_id: no such file", param="input_file_id", code="file_not_found") from None
    if found.purpose != "batch":
        raise DoorError(
            "input_file_id: the file was not uploaded for a batch; set its purpose to batch",
            param="input_file_id",
            code="invalid_value",
        )
    return NewBatch(
        endpoint=endpoint,
        input_file=file,
        input_sha256=found.sha256,
        window=window,
        window_s=window_s,
        notes=_metadata(body.get("metadata")),
        priority=priority,
        output_expires_s=_output_expires_s(body.get("output_expires_after")),
        request_digest=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest(),
    )


def _window(window: Any) -> tuple[str, float]:
    found = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    seconds = int(found[1]) * (3600 if found[2] == "h" else 60) if found else 0
    if not found or seconds > _MOST_WINDOW_S:
        raise DoorError(
            "completion_window: expected hours or minutes such as 24h or 30m, up to 720h",
            param="completion_window",
            code="invalid_value",
        )
    return str(window), float(seconds)


def _metadata(metadata: Any) -> dict[str, str] | None:
    if metadata is None:
        return None
    if (
        not isinstance(metadata, dict)
        or len(metadata) > _MOST_PAIRS
        or not all(
            0 < len(name) <= _KEY_CHARACTERS and isinstance(value, str) and len(value) <= _VALUE_CHARACTERS
            for name, value in metadata.items()
        )
    ):
        raise DoorError(
            f"metadata: expected up to {_MOST_PAIRS} pairs of text, keys up to {_KEY_CHARACTERS} characters and"
            f" values up to {_VALUE_CHARACTERS}",
            param="metadata",
            code="invalid_value",
        )
    return dict(metadata)


def _output_expires_s(told: Any) -> float | None:
    if told is None:
        return None
    if not isinstance(told, dict) or told.get("anchor") != "created_at":
        raise DoorError(
            'output_expires_after: expected {"anchor": "created_at", "seconds": …}',
            param="output_expires_after",
            code="invalid_value",
        )
    return expiry(told.get("seconds"))


async def list_batches(request: Request, use: Resources, caller: Identity) -> Response:
    limit, after = listing(request.query_params, 20, 100)
    described, more = await run_in_threadpool(_listed, use, caller.tenant, after, limit)
    return JSONResponse(a_list(described, more=more))


def _listed(use: Resources, tenant: UUID, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
    with use.database.transaction() as connection:
        found = list(store.list_batches(connection, tenant, after=after, limit=limit + 1))
        if after is not None and not found:
            store.find_batch(connection, tenant, after)
    return [_described(use, batch) for batch in found[:limit]], len(found) > limit


async def show_batch(request: Request, use: Resources, caller: Identity, batch: str) -> Response:
    return JSONResponse(await run_in_threadpool(_found, use, caller.tenant, batch))


def _found(use: Resources, tenant: UUID, batch: str) -> dict[str, Any]:
    with use.database.transaction() as connection:
        found = store.find_batch(connection, tenant, batch)
    return _described(use, found)


async def cancel_batch(request: Request, use: Resources, caller: Identity, batch: str) -> Response:
    cancelled = await run_in_threadpool(_cancel, use, caller.tenant, batch)
    use.batch_waits.set()
    return JSONResponse(cancelled)


def _cancel(use: Resources, tenant: UUID, batch: str) -> dict[str, Any]:
    with use.database.transaction() as connection:
        cancelled = store.cancel_batch(connection, tenant, batch)
    return _described(use, cancelled)


def _described(use: Resources, batch: StoredBatch) -> dict[str, Any]:
    return described_batch(batch, counted(use, batch))


def described_batch(batch: StoredBatch, counts: tuple[int, int]) -> dict[str, Any]:
    """A batch as their clients read it. ``counts``: lines that are answered, and that failed."""
    completed, failed = counts
    models = sorted(batch.models or ())
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": models[0] if len(models) == 1 else None,
        "errors": None if batch.errors is None else {"object": "list", "data": list(batch.errors)},
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": _second(batch.created),
        "in_progress_at": _second(batch.in_progress),
        "expires_at": _second(batch.expires),
        "finalizing_at": _second(batch.finalizing),
        "completed_at": _ended(batch, "completed"),
        "failed_at": _ended(batch, "failed"),
        "expired_at": _ended(batch, "expired"),
        "cancelling_at": _second(batch.cancelling),
        "cancelled_at": _ended(batch, "cancelled"),
        "request_counts": {"total": batch.lines, "completed": completed, "failed": failed},
        "usage": batch.usage,
        "metadata": batch.notes,
        # Ours, beside theirs: where to look on.
        "x_motet": {"job": None if batch.job_id is None else str(batch.job_id), "models": batch.models},
    }


def _ended(batch: StoredBatch, state: str) -> int | None:
    return _second(batch.ended) if batch.state == state else None


def _second(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
