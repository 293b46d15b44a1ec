"""How likely tokens were, as OpenAI's clients read it: of chats, and in the older form of completions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.api.openai.parameters import CHAT

#: A token that is only a part of a character.
_NO_CHARACTER = "\ufffd"


def told_logprobs(endpoint: str, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """``logprobs`` of a choice, from its cell; None where they were not asked for."""
    told: Sequence[Any] | None = cell.get("logprobs")
    if told is None:
        return None
    if endpoint == CHAT:
        content = [
            {**_of_token(token, logp), "top_logprobs": [_of_token(*one) for one in likeliest]}
            for token, logp, likeliest in told
        ]
        return {"content": content, "refusal": None}
    offsets, at = [], 0
    for token, _, _ in told:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": [token for token, _, _ in told],
        "token_logprobs": [logp for _, logp, _ in told],
        # The same text by two tokens: the likelier one is told.
        "top_logprobs": [dict(reversed(likeliest)) for _, _, likeliest in told],
        "text_offset": offsets,
    }


def _of_token(token: str, logp: float) -> dict[str, Any]:
    whole = _NO_CHARACTER not in token
    return {"token": token, "logprob": logp, "bytes": list(token.encode()) if whole else None}
