"""Routes of the registry: what may be loaded, by which aliases, and what an administrator adds to it or takes away."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from motet.errors import InvalidJob, NotFound, Problem
from motet.protocol.manifest import Manifest
from motet.tasks import short
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.jobs import moment
from scheduler.api.manifests import (
    MAX_JSON_BYTES,
    MAX_TEMPLATE_BYTES,
    NAME,
    VERSION,
    header_bytes,
    json_flaw,
    read_manifest,
    safetensors_flaw,
    template_flaw,
)
from scheduler.api.resources import Resources, Use
from scheduler.store.aliases import AliasRow, aliases, promote, remove_alias, roll_back
from scheduler.store.registry import add_model, blob_sizes, find_models, models, remove_model

log = logging.getLogger(__name__)
routes = APIRouter(tags=["models"])

RefPath = Annotated[
    str,
    Path(
        description="`name` (its newest version), `name@version` or `name@alias`.", examples=["news-topics@1"]
    ),
]
NamePath = Annotated[str, Path(description="The model's name.", examples=["news-topics"])]
AliasPath = Annotated[
    str, Path(description="A letter, then letters, digits, _ . -, up to 40.", examples=["prod"])
]
#: Begins with a letter, so that it is not taken for a version of the usual kind; never the name of a version.
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")
_SHOWN = {
    **shapes.MODEL,
    "ref": "news-topics@1",
    "digest": "3c9f…",
    "sizes": {"head.safetensors": 7880},
    "aliases": [shapes.ALIAS],
}


@routes.get(
    "/v1/models",
    summary="Every registered model",
    responses=shapes.answers(200, shapes.ModelsShape, {"models": [_SHOWN]}, "By name, oldest version first."),
)
def list_models(use: Use, caller: Caller) -> Response:
    with use.database.transaction() as connection:
        known = defaultdict[str, list[AliasRow]](list)
        for alias in aliases(connection):
            known[alias.ref].append(alias)
        shown = [described(m.manifest, known[m.manifest.ref]) for m in models(connection)]
    return JSONResponse({"models": shown})


@routes.get(
    "/v1/models/{ref}",
    summary="One model",
    responses=shapes.answers(200, shapes.ModelShape, _SHOWN, "Its manifest.", 404),
)
def show_model(use: Use, caller: Caller, ref: RefPath) -> Response:
    asked = _ref(ref)
    with use.database.transaction() as connection:
        found = find_models(connection, [asked])
        if asked not in found:
            raise NotFound(f"no model {asked}; GET /v1/models lists them")
        manifest = found[asked].manifest
        known = _meaning(manifest, aliases(connection, manifest.name))
    return JSONResponse(described(manifest, known))


@routes.post(
    "/v1/models",
    summary="Register a model",
    status_code=201,
    responses=shapes.answers(
        201, shapes.ModelShape, _SHOWN, "Registered, now or before.", 403, 409, 413, 422
    ),
    openapi_extra=shapes.takes(shapes.MODEL, "A manifest whose files are stored as blobs."),
)
async def register_model(request: Request, use: Use, caller: Caller) -> Response:
    async with whole_body(request, use, SMALL_BYTES) as raw:
        return await run_in_threadpool(_register, use, raw)


def _register(use: Resources, raw: bytes) -> Response:
    asked = read_manifest(clean_object(json_body(raw)))
    with use.database.transaction() as connection:
        stored = blob_sizes(connection, set(asked.files.values()))
        trunk = find_models(connection, [asked.trunk_model]).get(asked.trunk_model)
    problems = _trunk_problems(asked, trunk.manifest if trunk else None)
    for path, sha256 in asked.files.items():
        flaw = _file_flaw(use.blobs.find(sha256) if sha256 in stored else None, path)
        if flaw:
            problems.append(
                Problem(f"files.{path}", flaw, "a stored blob of safetensors, JSON or text", "upload it")
            )
        elif path in asked.sizes and asked.sizes[path] != stored[sha256]:
            got, has = f"{asked.sizes[path]:,} bytes", f"{stored[sha256]:,} bytes"
            problems.append(Problem(f"sizes.{path}", got, has, "leave it out, or mend it"))
    if problems:
        raise InvalidJob.first(problems)
    manifest = replace(asked, sizes={path: stored[sha256] for path, sha256 in asked.files.items()})
    with use.database.transaction() as connection:
        new = add_model(connection, manifest)
        known = _meaning(manifest, aliases(connection, manifest.name))
    log.info("model registered", extra={"model": manifest.ref, "digest": manifest.digest, "new": new})
    return JSONResponse(described(manifest, known), 201)


def _trunk_problems(asked: Manifest, trunk: Manifest | None) -> list[Problem]:
    if not asked.trunk_model:
        return []
    if trunk is None:
        return [Problem("trunk_model", asked.trunk_model, "a registered model", "register the trunk first")]
    if trunk.ref != asked.trunk_model:
        # An alias may mean another trunk tomorrow, and the head would not fit that.
        got = f"{asked.trunk_model}, an alias"
        return [Problem("trunk_model", got, "name@version", f"name the version that is meant: {trunk.ref}")]
    if trunk.trunk != asked.trunk or trunk.trunk_model:
        return [
            Problem(
                "trunk", "another digest than its trunk's", trunk.trunk or "a trunk", "train it on this trunk"
            )
        ]
    return []


def _file_flaw(path: FilePath | None, name: str) -> str | None:
    """Why a file may not be part of a model, or None. Weights are looked at by their header only."""
    if path is None:
        return "no such blob"
    size = path.stat().st_size
    if name.endswith(".safetensors"):
        with path.open("rb") as file:
            n = header_bytes(file.read(8), size)
            return "bytes that are not safetensors" if n is None else safetensors_flaw(file.read(n), size)
    if name.endswith(".json"):
        return f"{size:,} bytes of JSON" if size > MAX_JSON_BYTES else json_flaw(path.read_bytes())
    if name.endswith(".jinja"):
        with path.open("rb") as file:
            return template_flaw(file.read(MAX_TEMPLATE_BYTES + 1))
    return None


@routes.delete(
    "/v1/models/{ref}",
    summary="Take a version out of the registry",
    status_code=204,
    responses=shapes.answers(204, None, None, "It cannot be named by new jobs any more.", 403, 404, 409),
)
def unregister_model(use: Use, caller: Caller, ref: RefPath) -> Response:
    asked = _ref(ref)
    with use.database.transaction() as connection:
        if "@" not in asked or not remove_model(connection, asked):
            raise NotFound(
                f"no model {asked}; name it with its version, as GET /v1/models lists it, not by an alias"
            )
    log.info("model removed", extra={"model": asked})
    return Response(status_code=204)


# -- aliases


@routes.put(
    "/v1/models/{name}/aliases/{alias}",
    summary="Promote: let an alias mean a version from now on",
    responses=shapes.answers(
        200, shapes.AliasShape, shapes.ALIAS, "Jobs that come from now on use it.", 403, 404, 409, 413, 422
    ),
    openapi_extra=shapes.takes({"version": "1"}, "The version, as GET /v1/models lists it."),
)
async def promote_model(
    request: Request, use: Use, caller: Caller, name: NamePath, alias: AliasPath
) -> Response:
    async with whole_body(request, use, SMALL_BYTES) as raw:
        return await run_in_threadpool(_promote, use, name, alias, raw, caller.token)


def _promote(use: Resources, name: str, alias: str, raw: bytes, by: str) -> Response:
    body = clean_object(json_body(raw))
    version = body.get("version")
    problems = [
        Problem(short(k), "an unknown option", "version", "remove it") for k in body if k != "version"
    ]
    if not _ALIAS.fullmatch(alias):
        form = "a letter, then letters, digits, _ . -, up to 40"
        problems.append(Problem("alias", short(alias), form, "choose another alias"))
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        got = "nothing" if version is None else short(version)
        problems.append(Problem("version", got, 'a version, such as "2"', "choose one; see `motet models`"))
    if problems:
        raise InvalidJob.first(problems)
    if not NAME.fullmatch(name):
        raise NotFound("no model of this name")
    with use.database.transaction() as connection:
        made = promote(connection, name, alias, body["version"], by)
    log.info("alias promoted", extra={"alias": made.shown, "model": made.ref})
    return JSONResponse(_shown(made))


@routes.post(
    "/v1/models/{name}/aliases/{alias}/rollback",
    summary="Let an alias mean again what it meant before",
    responses=shapes.answers(
        200,
        shapes.AliasShape,
        {**shapes.ALIAS, "before": None},
        "Jobs that come from now on use that; again goes back further.",
        403,
        404,
        409,
    ),
)
def roll_back_alias(use: Use, caller: Caller, name: NamePath, alias: AliasPath) -> Response:
    _must_be_an_alias(name, alias)
    with use.database.transaction() as connection:
        made = roll_back(connection, name, alias, caller.token)
    log.info("alias rolled back", extra={"alias": made.shown, "model": made.ref})
    return JSONResponse(_shown(made))


@routes.delete(
    "/v1/models/{name}/aliases/{alias}",
    summary="Take an alias away",
    status_code=204,
    responses=shapes.answers(204, None, None, "It means nothing any more; its model stays.", 403, 404),
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
    if not NAME.fullmatch(name) or not _ALIAS.fullmatch(alias):
        raise NotFound("no alias of this name")


def _shown(alias: AliasRow) -> dict[str, Any]:
    return {
        "alias": alias.shown,
        "ref": alias.ref,
        "before": None if alias.before is None else f"{alias.name}@{alias.before}",
        "since": moment(alias.since),
        "by": alias.by,
    }


# -- both


def _ref(text: str) -> str:
    """A reference from a path. What has no such form names no model. Raises NotFound."""
    name, at, version = text.partition("@")
    if not NAME.fullmatch(name) or (at and not VERSION.fullmatch(version)):
        raise NotFound("no model of this name")
    return text


def _meaning(manifest: Manifest, known: Iterable[AliasRow]) -> list[AliasRow]:
    return [alias for alias in known if alias.ref == manifest.ref]


def described(manifest: Manifest, named: Iterable[AliasRow]) -> dict[str, Any]:
    """A manifest as it is shown: with its reference, its digest and the aliases that mean it."""
    return {
        **manifest.to_json(),
        "ref": manifest.ref,
        "digest": manifest.digest,
        "aliases": [_shown(alias) for alias in named],
    }
