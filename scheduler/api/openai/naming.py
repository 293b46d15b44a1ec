"""Models as OpenAI's clients name them, and what a request must know of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from motet.protocol.manifest import Answer, Manifest
from motet.tasks import short
from scheduler.api.auth import Identity
from scheduler.api.openai.checks import Decoded
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import SERVED
from scheduler.api.resources import Resources
from scheduler.store.aliases import aliases
from scheduler.store.registry import Registered, find_models, models

_WANTED: Mapping[Answer, str] = {
    "text": "language model",
    "vector": "model that answers with vectors",
    "ranking": "cross-encoder",
}


def find_model(use: Resources, endpoint: str, name: str) -> Registered:
    """The model of this name. Raises DoorError where there is none, or it cannot answer at this endpoint."""
    with use.database.transaction() as connection:
        found = find_models(connection, [name]).get(name)
    if found is None:
        raise unknown_model(name)
    check_model(endpoint, name, found.manifest)
    return found


def unknown_model(name: str, param: str = "model") -> DoorError:
    return DoorError(
        f"there is no model {short(name)}; GET /models lists those that are registered",
        param=param,
        code="model_not_found",
        status=404,
    )


def check_model(endpoint: str, name: str, model: Manifest) -> None:
    """Raises DoorError where a model cannot answer at an endpoint."""
    if model.answers not in SERVED[endpoint]:
        wanted = " or a ".join(_WANTED[one] for one in sorted(SERVED[endpoint], reverse=True))
        raise DoorError(
            f"{short(name)} answers {model.answers}; {endpoint} needs a {wanted}",
            param="model",
            code="model_mismatch",
        )
    if model.reads != "text":
        raise DoorError(
            f"{short(name)} reads pictures; {endpoint} needs a model that reads text",
            param="model",
            code="model_mismatch",
        )


def check_dimensions(asked: int | None, model: Manifest) -> None:
    """Raises DoorError where vectors of another length are asked for than the model has."""
    if asked is not None and asked != model.dim:
        raise DoorError(
            f"{model.name} answers with vectors of {model.dim}; leave dimensions out",
            param="dimensions",
            code="unsupported_value",
        )


def decoder(use: Resources, model: Manifest | None) -> Decoded:
    """Token ids as their text, by the model's own tokenizer."""

    def decoded(ids: Sequence[int]) -> str:
        text = None if model is None else use.counter.text(model, ids)
        if text is None:
            raise DoorError(
                "these are no token ids of this model; send the text instead",
                param="input",
                code="invalid_value",
            )
        return text

    return decoded


# -- routes


async def list_models(request: Request, use: Resources, caller: Identity) -> Response:
    return JSONResponse({"object": "list", "data": await run_in_threadpool(_models, use)})


async def show_model(request: Request, use: Resources, caller: Identity, model: str) -> Response:
    for one in await run_in_threadpool(_models, use):
        if one["id"] == model:
            return JSONResponse(one)
    raise unknown_model(model)


def _models(use: Resources) -> list[dict[str, Any]]:
    """What may be named in a request: each model by its name, by its versions and by its aliases."""
    with use.database.transaction() as connection:
        known = [r.manifest for r in models(connection) if r.manifest.answers in _WANTED]
        named = aliases(connection)
    names = dict.fromkeys(m.name for m in known)
    names |= dict.fromkeys(m.ref for m in known)
    bases = {m.name for m in known}
    names |= dict.fromkeys(f"{a.name}@{a.alias}" for a in named if a.name in bases)
    return [{"id": name, "object": "model", "created": 0, "owned_by": "motet"} for name in names]
