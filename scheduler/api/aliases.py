"""Routes of aliases: what a name means now, and what an administrator lets it mean from now on."""

from __future__ import annotations

import logging
import re
from typing import Annotated

from fastapi import Path, Response

from motet.errors import InvalidJob, NotFound, Problem
from motet.messages.registry import Alias, Promotion
from motet.protocol.manifest import NAME
from motet.tasks import short
from scheduler.api.auth import Caller
from scheduler.api.records import moment
from scheduler.api.resources import Use
from scheduler.api.routing import Routes, body, takes
from scheduler.store.aliases import AliasRow, promote, remove_alias, roll_back

log = logging.getLogger(__name__)
routes = Routes(tags=["models"])

NamePath = Annotated[str, Path(description="The model's name.", examples=["news-topics"])]
AliasPath = Annotated[
    str, Path(description="A letter, then letters, digits, _ . -, up to 40.", examples=["prod"])
]
#: Begins with a letter, so that it is not taken for a version of the usual kind; never the name of a version.
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")


@routes.put(
    "/v1/models/{name}/aliases/{alias}",
    summary="Promote: let an alias mean a version from now on",
    response_description="Jobs that come from now on use it.",
    openapi_extra=takes(Promotion, {"version": "1"}),
)
def promote_model(
    use: Use, caller: Caller, name: NamePath, alias: AliasPath, asked: Annotated[Promotion, body(Promotion)]
) -> Alias:
    if not _ALIAS.fullmatch(alias):
        form = "a letter, then letters, digits, _ . -, up to 40"
        raise InvalidJob(Problem("alias", short(alias), form, "choose another alias"))
    if not re.fullmatch(NAME, name):
        raise NotFound("no model of this name")
    with use.database.transaction() as connection:
        made = promote(connection, name, alias, asked.version, caller.token)
    log.info("alias promoted", extra={"alias": made.shown, "model": made.ref})
    return shown_alias(made)


@routes.post(
    "/v1/models/{name}/aliases/{alias}/rollback",
    summary="Let an alias mean again what it meant before",
    response_description="Jobs that come from now on use that; again goes back further.",
)
def roll_back_alias(use: Use, caller: Caller, name: NamePath, alias: AliasPath) -> Alias:
    _must_be_an_alias(name, alias)
    with use.database.transaction() as connection:
        made = roll_back(connection, name, alias, caller.token)
    log.info("alias rolled back", extra={"alias": made.shown, "model": made.ref})
    return shown_alias(made)


@routes.delete(
    "/v1/models/{name}/aliases/{alias}",
    summary="Take an alias away",
    status_code=204,
    response_description="It means nothing any more; its model stays.",
)
def unname_model(use: Use, caller: Caller, name: NamePath, alias: AliasPath) -> Response:
    _must_be_an_alias(name, alias)
    with use.database.transaction() as connection:
        if not remove_alias(connection, name, alias, caller.token):
            raise NotFound(f"no alias {name}@{alias}; GET /v1/models lists them")
    log.info("alias removed", extra={"alias": f"{name}@{alias}"})
    return Response(status_code=204)


def _must_be_an_alias(name: str, alias: str) -> None:
    """What has no such form is none. Raises NotFound."""
    if not re.fullmatch(NAME, name) or not _ALIAS.fullmatch(alias):
        raise NotFound("no alias of this name")


def shown_alias(alias: AliasRow) -> Alias:
    """An alias as it is shown."""
    return Alias(
        alias=alias.shown,
        ref=alias.ref,
        before=None if alias.before is None else f"{alias.name}@{alias.before}",
        since=moment(alias.since) or "",
        by=alias.by,
    )
