"""Routes of tokens: an administrator makes, lists and revokes them. A secret is shown once."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from motet.errors import InvalidJob, NotFound, Problem
from motet.tasks import short
from scheduler.api import shapes
from scheduler.api.auth import SCOPES, Caller, new_token
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.jobs import moment
from scheduler.api.resources import Resources, Use
from scheduler.store.registry import TokenEntry, add_token, revoke_token, tenant_named, tokens

log = logging.getLogger(__name__)
routes = APIRouter(tags=["tokens"])

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DAY_S = 86400.0
_MAX_DAYS = 36500


@routes.get(
    "/v1/tokens",
    summary="Every token, without its secret",
    responses=shapes.answers(200, shapes.TokensShape, {"tokens": [shapes.TOKEN]}, "Revoked ones too.", 403),
)
def list_tokens(use: Use, caller: Caller) -> Response:
    with use.database.transaction() as connection:
        return JSONResponse({"tokens": [_described(t) for t in tokens(connection)]})


@routes.post(
    "/v1/tokens",
    summary="Make a token",
    status_code=201,
    responses=shapes.answers(
        201,
        shapes.NewTokenShape,
        {**shapes.TOKEN, "token": "5f0c1d2e3a4b.kq3…"},
        "Its secret is never shown again.",
        403,
        422,
    ),
    openapi_extra=shapes.takes(
        {"name": "nightly batch", "scope": "user", "tenant": "default", "expires_days": 90},
        "A tenant that does not exist is made.",
    ),
)
async def make_token(request: Request, use: Use, caller: Caller) -> Response:
    async with whole_body(request, use, SMALL_BYTES) as raw:
        return await run_in_threadpool(_make, use, raw)


def _make(use: Resources, raw: bytes) -> Response:
    body = clean_object(json_body(raw))
    problems = [
        Problem(short(key), "an unknown option", f"one of {', '.join(_CHECKS)}", "remove it")
        for key in body
        if key not in _CHECKS
    ]
    problems += [
        Problem(key, short(body.get(key, "nothing")), words, "mend it")
        for key, (fits, words) in _CHECKS.items()
        if not fits(body.get(key))
    ]
    if problems:
        raise InvalidJob(problems)
    made = new_token()
    days = body.get("expires_days")
    with use.database.transaction() as connection:
        add_token(
            connection,
            token_id=made.id,
            tenant=tenant_named(connection, body.get("tenant") or "default"),
            name=body["name"],
            scope=body["scope"],
            secret_sha256=made.digest,
            expires_s=None if days is None else days * _DAY_S,
        )
        entry = next(t for t in tokens(connection) if t.id == made.id)
    log.info("token made", extra={"token": made.id, "scope": entry.scope, "tenant": entry.tenant})
    return JSONResponse({**_described(entry), "token": made.shown}, 201, {"Cache-Control": "no-store"})


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


def _is_tenant(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _TENANT.fullmatch(value) is not None)


def _is_lifetime(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and 0 < value <= _MAX_DAYS)


_CHECKS = {
    "name": (_is_name, "text of 1 to 200 characters"),
    "scope": (lambda value: isinstance(value, str) and value in SCOPES, f"one of {', '.join(SCOPES)}"),
    "tenant": (_is_tenant, "letters, digits, _ . -, up to 64, or nothing"),
    "expires_days": (_is_lifetime, f"a number of days up to {_MAX_DAYS:,}, or nothing"),
}


@routes.delete(
    "/v1/tokens/{token}",
    summary="Revoke a token for good",
    status_code=204,
    responses=shapes.answers(204, None, None, "It lets nobody in any more.", 403, 404),
)
def remove_token(use: Use, caller: Caller, token: str) -> Response:
    with use.database.transaction() as connection:
        if not _ID.fullmatch(token) or not revoke_token(connection, token):
            raise NotFound("no token of this id")
    log.info("token revoked", extra={"token": token})
    return Response(status_code=204)


def _described(token: TokenEntry) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "scope": token.scope,
        "tenant": token.tenant,
        "created": moment(token.created),
        "expires": moment(token.expires),
        "revoked": moment(token.revoked),
    }
