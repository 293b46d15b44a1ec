"""Routes of tokens: an administrator makes, lists and revokes them. A secret is shown once."""

from __future__ import annotations

import logging
import re
from typing import Annotated

from fastapi import Response

from motet.errors import NotFound
from motet.messages.tokens import Token, TokenList, TokenRecord, TokenRequest
from scheduler.api.auth import Caller, new_token
from scheduler.api.records import moment
from scheduler.api.resources import Use
from scheduler.api.routing import Routes, body, reply, takes
from scheduler.store.registry import TokenEntry, add_token, revoke_token, tenant_named, tokens

log = logging.getLogger(__name__)
routes = Routes(tags=["tokens"])

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DAY_S = 86400.0


@routes.get(
    "/v1/tokens",
    summary="Every token, without its secret",
)
def list_tokens(use: Use, caller: Caller) -> TokenList:
    with use.database.transaction() as connection:
        return TokenList(tokens=tuple(_described(t) for t in tokens(connection)))


@routes.post(
    "/v1/tokens",
    summary="Make a token",
    status_code=201,
    response_model=Token,
    response_description="Its secret is never shown again.",
    openapi_extra=takes(
        TokenRequest, {"name": "nightly batch", "scope": "user", "tenant": "default", "expires_days": 90}
    ),
)
def make_token(use: Use, caller: Caller, asked: Annotated[TokenRequest, body(TokenRequest)]) -> Response:
    made, days = new_token(), asked.expires_days
    with use.database.transaction() as connection:
        add_token(
            connection,
            token_id=made.id,
            tenant=tenant_named(connection, asked.tenant or "default"),
            name=asked.name,
            scope=asked.scope,
            secret_sha256=made.digest,
            expires_s=None if days is None else days * _DAY_S,
        )
        entry = next(t for t in tokens(connection) if t.id == made.id)
    log.info("token made", extra={"token": made.id, "scope": entry.scope, "tenant": entry.tenant})
    shown = Token(**_described(entry).to_json(), token=made.shown)
    return reply(shown, 201, {"Cache-Control": "no-store"})


@routes.delete(
    "/v1/tokens/{token}",
    summary="Revoke a token for good",
    status_code=204,
    response_description="It lets nobody in any more.",
)
def remove_token(use: Use, caller: Caller, token: str) -> Response:
    with use.database.transaction() as connection:
        if not _ID.fullmatch(token) or not revoke_token(connection, token):
            raise NotFound("no token of this id")
    use.known_tokens.drop(token)
    log.info("token revoked", extra={"token": token})
    return Response(status_code=204)


def _described(token: TokenEntry) -> TokenRecord:
    return TokenRecord(
        id=token.id,
        name=token.name,
        scope=token.scope,
        tenant=token.tenant,
        created=moment(token.created),
        expires=moment(token.expires),
        revoked=moment(token.revoked),
    )
