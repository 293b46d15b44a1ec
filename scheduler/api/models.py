"""Routes of the registry: what may be loaded, and what an administrator adds to it or takes away."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from motet.errors import InvalidJob, NotFound, Problem
from motet.manifest import Manifest
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.manifests import (
    MAX_JSON_BYTES,
    NAME,
    VERSION,
    header_bytes,
    json_flaw,
    read_manifest,
    safetensors_flaw,
)
from scheduler.api.resources import Resources, Use
from scheduler.store.registry import add_model, blob_sizes, find_models, models, remove_model

log = logging.getLogger(__name__)
routes = APIRouter(tags=["models"])

RefPath = Annotated[
    str, Path(description="`name` (its newest version) or `name@version`.", examples=["news-topics@1"])
]
_SHOWN = {**shapes.MODEL, "ref": "news-topics@1", "digest": "3c9f…", "sizes": {"head.safetensors": 7880}}


@routes.get(
    "/v1/models",
    summary="Every registered model",
    responses=shapes.answers(200, shapes.ModelsShape, {"models": [_SHOWN]}, "By name, oldest version first."),
)
def list_models(use: Use, caller: Caller) -> Response:
    with use.database.transaction() as connection:
        return JSONResponse({"models": [described(m.manifest) for m in models(connection)]})


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
    return JSONResponse(described(found[asked].manifest))


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
        raise InvalidJob(problems[:20])
    manifest = replace(asked, sizes={path: stored[sha256] for path, sha256 in asked.files.items()})
    with use.database.transaction() as connection:
        new = add_model(connection, manifest)
    log.info("model registered", extra={"model": manifest.ref, "digest": manifest.digest, "new": new})
    return JSONResponse(described(manifest), 201)


def _trunk_problems(asked: Manifest, trunk: Manifest | None) -> list[Problem]:
    if not asked.trunk_model:
        return []
    if trunk is None:
        return [Problem("trunk_model", asked.trunk_model, "a registered model", "register the trunk first")]
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
            raise NotFound(f"no model {asked}; name it with its version, as GET /v1/models lists it")
    log.info("model removed", extra={"model": asked})
    return Response(status_code=204)


def _ref(text: str) -> str:
    """A reference from a path. What has no such form names no model. Raises NotFound."""
    name, at, version = text.partition("@")
    if not NAME.fullmatch(name) or (at and not VERSION.fullmatch(version)):
        raise NotFound("no model of this name")
    return text


def described(manifest: Manifest) -> dict[str, Any]:
    """A manifest as it is shown: with its reference and digest beside it."""
    return {**manifest.to_json(), "ref": manifest.ref, "digest": manifest.digest}
