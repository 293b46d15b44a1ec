"""The manifest of a language model that another server runs: what that server tells of it. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from motet.errors import SetupError, Unreachable
from motet.http import is_address, look_at
from motet.protocol.manifest import KEY_ENV, Manifest
from workers.registrar.describe import Described

#: Seconds in which a server must tell its models: one that is loading answers late.
_MODELS_S = 20.0
#: As servers name the tokens of a model's context in GET /v1/models.
_CONTEXT = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx_train", "n_ctx")


def describe_served(
    url: str,
    *,
    model: str | None,
    name: str,
    version: str,
    licence: str,
    in_flight: int,
    key_env: str,
    context: int | None,
) -> Described:
    """Ask the server for its models, and describe this one. Raises SetupError, Unreachable."""
    url = url.rstrip("/")
    if not is_address(url):
        raise SetupError(
            "--openai: expected http(s)://host[:port]/v1 without a user or a query; a key belongs into a variable of "
            "the workers, see --key-env"
        )
    if key_env and not KEY_ENV.fullmatch(key_env):
        raise SetupError(
            f"--key-env: got {key_env!r}; expected a name such as MOTET_KEY_QWEN, set for the workers"
        )
    if key_env and not os.environ.get(key_env):
        raise SetupError(f"--key-env: {key_env} is not set here; set it, for the model is tried from here")
    known = _models(url, os.environ.get(key_env, "") if key_env else "")
    chosen = _chosen(known, model)
    limit = context or _context(known.get(chosen, {}))
    if not limit:
        raise SetupError(f"{url} does not tell the context of {chosen}; give its tokens: --context 8192")
    source = {"url": url, "model": chosen, "in_flight": str(in_flight)}
    return Described(
        manifest=Manifest(
            name=name,
            version=version,
            engine="openai",
            answers="text",
            max_tokens=limit,
            licence=licence,
            source={**source, "key_env": key_env} if key_env else source,
        ),
        files={},
    )


def _models(url: str, key: str) -> dict[str, Mapping[str, Any]]:
    """The server's models by their names."""
    try:
        answer = look_at(f"{url}/models", token=key, timeout_s=_MODELS_S)
        found = answer.json()["data"] if answer.is_success else None
    except Unreachable as error:
        raise Unreachable(f"{error}; start the server, or mend the address") from None
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list):
        raise SetupError(
            f"{url}/models: got {answer.status_code} and no list of models; expected an OpenAI-compatible server; "
            "mend the address, which mostly ends with /v1, or its key"
        )
    return {str(one["id"]): one for one in found if isinstance(one, dict) and "id" in one}


def _chosen(known: Mapping[str, object], asked: str | None) -> str:
    names = ", ".join(re.sub(r"[^\x20-\x7e]", "?", name)[:80] for name in list(known)[:10])
    if asked is None:
        if len(known) != 1:
            raise SetupError(f"--model is missing; the server knows {names or 'none'}")
        return next(iter(known))
    # Some servers list nothing, or other names than they answer to; only a list that is there can tell.
    if known and asked not in known:
        raise SetupError(f"--model: the server knows no {asked}; it knows {names}")
    return asked


def _context(told: Mapping[str, Any]) -> int:
    meta = told.get("meta")
    for place in (told, meta if isinstance(meta, dict) else {}):
        for key in _CONTEXT:
            if isinstance(found := place.get(key), int) and found > 0:
                return found
    return 0
