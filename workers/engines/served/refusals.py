"""Why a chat server refuses a request: too long a prompt, or a parameter that it does not take. Pure.

OpenAI says so in fields (``error.code``, ``error.param``), validators of bodies in others (``type``, ``loc``), and some
servers in words alone. No word of an answer is passed on: it may repeat a user's text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from motet.protocol.columns import CellError

CONTEXT_LENGTH = CellError(
    "context_length", "the server says that the prompt does not fit the model's context"
)
ANSWER_LENGTH = CellError(
    "refused", "the model's server writes fewer tokens than max_tokens asks for; set a smaller max_tokens"
)

#: Codes and types by which a server names a parameter, or a value of one, that it does not take.
_NOT_TAKEN = {"unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden"}
_TOO_LONG = {"context_length_exceeded", "exceed_context_size_error"}
#: As OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic and Gemini say it.
_CONTEXT = re.compile(
    r"context[ _-]?(length|window|size|limit)|max_model_len|maximum (sequence|input|prompt|model) length"
    r"|(prompt|input|request|messages?) (is|are) too (long|large)|too many (input |prompt )?tokens"
    r"|longer than the (model|maximum)|token count .{0,30}exceeds|reduce the length of"
    r"|max_new_tokens\W{1,3}must be|must have less than \d+ tokens|max_tokens must be at least 1, got -",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"max_(completion_|output_|new_)?tokens\b.{0,80}(too large|at most|less than or equal|<=|exceed|maximum)"
    r"|(at most|maximum of) \d+ (completion|output) tokens",
    re.IGNORECASE | re.DOTALL,
)
_NOT_TAKEN_WORDS = re.compile(
    r"unsupported|not (be )?supported|(does|do) ?n[o']t support|unknown|unrecogni[sz]ed|unexpected|not permitted"
    r"|not allowed|deprecated|extraneous|cannot find field",
    re.IGNORECASE,
)
#: Behind so many characters of a message comes the request itself, if it is repeated: a user's text.
_OWN_WORDS = 400
#: Parameters of a request that no server can do without.
_NEEDED = {"model", "messages", "prompt"}
#: In words, a parameter stands at the beginning, in quotes, behind a colon, or behind what it is. Some are words of
#: ordinary English.
_NAMED = r"(^|['\"`:\[]\s*|\b(parameter|argument|field|property|option|key|name)s?\s+){}(?!\w)"


def why(status: int, answer: str, sent: Collection[str]) -> tuple[CellError, str]:
    """The row's error for a 4xx in our own words, and the parameter of those ``sent`` that the server does not take.

    "" where it names none.
    """
    if status in (401, 403):
        return CellError("refused", f"the model's server refuses the worker's key ({status})"), ""
    if status == 404:
        return CellError("refused", "the model's server knows no such model or route (404)"), ""
    if status == 413:
        return CONTEXT_LENGTH, ""
    error = CellError("refused", f"the model's server refuses this request ({status})")
    if status not in (400, 422):
        return error, ""
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        told = {"message": answer}
    parameters = [name for name in sent if name not in _NEEDED]
    objects = list(_objects(told))
    for one in objects:
        codes = {code for key in ("code", "type") if isinstance(code := one.get(key), str)}
        if codes & _TOO_LONG:
            return CONTEXT_LENGTH, ""
        if codes & _NOT_TAKEN and (named := _named_in_fields(one, parameters)):
            return error, named
    words = " ".join(text for one in objects for text in _texts(one))[:_OWN_WORDS]
    if _CONTEXT.search(words):
        return CONTEXT_LENGTH, ""
    if _NOT_TAKEN_WORDS.search(words) and (named := _named_in_words(words, parameters)):
        return error, named
    return (ANSWER_LENGTH if _ANSWER.search(words) else error), ""


def _objects(told: Any, depth: int = 5) -> Iterator[dict[str, Any]]:
    """The objects of an answer, outer ones first: the error may stand in a list, or inside ``error`` or ``detail``."""
    inner = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    if isinstance(told, dict):
        yield told
    for one in inner if depth else ():
        yield from _objects(one, depth - 1)


def _texts(one: dict[str, Any]) -> Iterator[str]:
    """What an object of an answer says to people."""
    yield from (
        text for key in ("message", "msg", "detail", "error") if isinstance(text := one.get(key), str)
    )


def _named_in_fields(one: dict[str, Any], parameters: Collection[str]) -> str:
    """``param`` may go on with what stands inside the parameter; ``loc`` begins with the body."""
    steps = [str(one["param"]).partition(".")[0]] if one.get("param") else []
    steps += map(str, one["loc"]) if isinstance(one.get("loc"), list) else []
    if named := next((step for step in steps if step in parameters), ""):
        return named
    return _named_in_words(" ".join(_texts(one))[:_OWN_WORDS], parameters)


def _named_in_words(words: str, parameters: Collection[str]) -> str:
    """The parameter that is named first; "" where none is."""
    found = {
        name: at.start()
        for name in parameters
        if (at := re.search(_NAMED.format(re.escape(name)), words, re.IGNORECASE))
    }
    return min(found, key=lambda name: found[name], default="")
