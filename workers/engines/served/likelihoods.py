"""How likely a server says that the tokens of an answer were: of chats, and of completions. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from motet.protocol.columns import CellError
from workers.engines.prompts import told_logp
from workers.engines.served.chat_server import RequestRefused

_NOT_TOLD = CellError("refused", "the model's server does not tell likelihoods of tokens; leave logprobs out")


def told_likelihoods(choice: Mapping[str, Any], end: int) -> list[list[Any]]:
    """Of each token of the first ``end`` characters of an answer, as ``counted`` takes them.

    Raises RequestRefused where the server has told none.
    """
    told = choice.get("logprobs")
    if not isinstance(told, Mapping):
        if end == 0:
            return []
        raise RequestRefused(_NOT_TOLD)
    found, at = [], 0
    for token, logp, likeliest in _of_chat(told) if "content" in told else _of_completion(told):
        # Some servers tell those of the stop text, and of the token that ends an answer.
        if at >= end:
            break
        at += len(token)
        found.append([_clean(token), _number(logp), [[_clean(one), _number(p)] for one, p in likeliest]])
    return found


_Token = tuple[str, Any, list[tuple[str, Any]]]


def _of_chat(told: Mapping[str, Any]) -> Iterator[_Token]:
    for one in told["content"] or ():
        likeliest = [(str(top["token"]), top["logprob"]) for top in one.get("top_logprobs") or ()]
        yield str(one["token"]), one["logprob"], likeliest


def _of_completion(told: Mapping[str, Any]) -> Iterator[_Token]:
    tokens, logps = told.get("tokens") or (), told.get("token_logprobs") or ()
    tops = told.get("top_logprobs") or [None] * len(tokens)
    for token, logp, top in zip(tokens, logps, tops, strict=True):
        likeliest = sorted((top or {}).items(), key=lambda pair: -float(pair[1] or 0))
        yield str(token), logp, [(str(one), p) for one, p in likeliest]


def _clean(token: str) -> str:
    return token.replace("\0", "")


def _number(logp: Any) -> float:
    return told_logp(-math.inf if logp is None else float(logp))
