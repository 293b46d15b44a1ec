"""Routes of the registry: what may be loaded, and what an administrator adds to it or takes away."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Annotated

from fastapi import Path, Request, Response
from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, NotFound, Problem
from motet.messages.registry import ModelList, ModelRecord
from motet.protocol.manifest import NAME, VERSION, Manifest
from scheduler.api.aliases import shown_alias
from scheduler.api.auth import Caller
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, whole_body
from scheduler.api.manifests import read_manifest
from scheduler.api.model_files import file_flaw
from scheduler.api.resources import Resources, Use
from scheduler.api.routing import Routes, takes
from scheduler.store.aliases import AliasRow, aliases
from scheduler.store.registry import add_model, blob_sizes, find_models, models, remove_model

log = logging.getLogger(__name__)
routes = Routes(tags=["models"])

RefPath = Annotated[
    str,
    Path(
        description="`name` (its newest version), `name@version` or `name@alias`.", examples=["news-topics@1"]
    ),
]
_MODEL = {
    "name": "news-topics",
    "version": "1",
    "engine": "encoder",
    "answers": "label",
    "files": {"head.safetensors": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
    "trunk": "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752",
    "trunk_model": "all-MiniLM-L6-v2@1",
    "max_tokens": 256,
    "pooling": "mean",
    "labels": ["business", "entertainment", "politics", "sports", "tech"],
    "licence": "Apache-2.0",
}


@routes.get(
    "/v1/models",
    summary="Every registered model",
)
def list_models(use: Use, caller: Caller) -> ModelList:
    with use.database.transaction() as connection:
        known = defaultdict[str, list[AliasRow]](list)
        for alias in aliases(connection):
            known[alias.ref].append(alias)
        shown = tuple(described(m.manifest, known[m.manifest.ref]) for m in models(connection))
    return ModelList(models=shown)


@routes.get(
    "/v1/models/{ref}",
    summary="One model",
)
def show_model(use: Use, caller: Caller, ref: RefPath) -> ModelRecord:
    asked = _ref(ref)
    with use.database.transaction() as connection:
        found = find_models(connection, [asked])
        if asked not in found:
            raise NotFound(f"no model {asked}; GET /v1/models lists them")
        manifest = found[asked].manifest
        known = _meaning(manifest, aliases(connection, manifest.name))
    return described(manifest, known)


@routes.post(
    "/v1/models",
    summary="Register a model",
    status_code=201,
    response_description="Registered, now or before.",
    openapi_extra=takes(Manifest, _MODEL),
)
async def register_model(request: Request, use: Use, caller: Caller) -> ModelRecord:
    async with whole_body(request, use, SMALL_BYTES) as raw:
        return await run_in_threadpool(_register, use, raw)


def _register(use: Resources, raw: bytes) -> ModelRecord:
    asked = read_manifest(clean_object(json_body(raw)))
    with use.database.transaction() as connection:
        stored = blob_sizes(connection, set(asked.files.values()))
        trunk = find_models(connection, [asked.trunk_model]).get(asked.trunk_model)
    problems = _trunk_problems(asked, trunk.manifest if trunk else None)
    for path, sha256 in asked.files.items():
        flaw = file_flaw(use.blobs.find(sha256) if sha256 in stored else None, path)
        if flaw:
            problems.append(
                Problem(
                    f"files.{path}", flaw, "a stored blob of safetensors, JSON, text or Parquet", "upload it"
                )
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
    return described(manifest, known)


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


@routes.delete(
    "/v1/models/{ref}",
    summary="Take a version out of the registry",
    status_code=204,
    response_description="It cannot be named by new jobs any more.",
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


def _ref(text: str) -> str:
    """A reference from a path. What has no such form names no model. Raises NotFound."""
    name, at, version = text.partition("@")
    if not re.fullmatch(NAME, name) or (at and not re.fullmatch(VERSION, version)):
        raise NotFound("no model of this name")
    return text


def _meaning(manifest: Manifest, known: Iterable[AliasRow]) -> list[AliasRow]:
    return [alias for alias in known if alias.ref == manifest.ref]


def described(manifest: Manifest, named: Iterable[AliasRow]) -> ModelRecord:
    """A manifest as it is shown: with its reference, its digest and the aliases that mean it."""
    return ModelRecord(
        **{f.name: getattr(manifest, f.name) for f in fields(manifest)},
        ref=manifest.ref,
        digest=manifest.digest,
        aliases=tuple(shown_alias(alias) for alias in named),
    )
