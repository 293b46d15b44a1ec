"""What a server's model writes: a text, or JSON that keeps a schema."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.protocol.columns import CellError
from workers.engines.prompts import counted
from workers.engines.schemas import violation
from workers.engines.served.chat_server import RequestRefused
from workers.engines.served.likelihoods import told_likelihoods
from workers.engines.served.question import ServedQuestion
from workers.engines.served.refusals import ANSWER_LENGTH, CONTEXT_LENGTH
from workers.engines.telling import Teller
from workers.engines.thoughts import without_thoughts

#: More tries where an answer breaks its schema: a server that constrains needs none.
MENDING = 2
#: A prompt without room for its whole answer is asked for these shares of one.
LESS = (1, 1 / 4, 1 / 16, 0)
#: The temperature of a server that is told none: a task that asks for it needs not say so.
SERVERS_TEMPERATURE = 1.0
#: What a row may say of how tokens are drawn; the last two are vLLM's own.
SAMPLING = ("top_p", "frequency_penalty", "presence_penalty", "top_k", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """What a server's model wrote."""

    text: str
    finish: str
    #: As ``counted`` takes them; None where they are not asked for.
    likelihoods: Sequence[Any] | None = None


async def written_value(q: ServedQuestion, share: float) -> Any:
    """The answer to a question that writes, about this share of the text: a JSON value, or why there is none."""
    if q.task.spec.get("options"):
        return await _counted(q, share)
    if q.task.spec.get("schema") is not None:
        return await _by_schema(q, share)
    said = await _told(q, share)
    return {"text": said.text.strip(), "finish": said.finish}


async def _counted(q: ServedQuestion, share: float) -> dict[str, Any]:
    """The answer of a row with options of its own."""
    schema = q.task.spec.get("schema")
    if q.task.spec.get("raw"):
        said = await _continued(q)
    elif schema is not None:
        said = await _constrained(q, q.messages(share), schema)
    else:
        said = await _told(q, share)
    spent = q.spending
    used = (spent.tokens_in, spent.cached, spent.tokens_out)
    return counted(said.text.strip(), said.finish, used, said.likelihoods)


async def _told(q: ServedQuestion, share: float) -> ServedAnswer:
    """A text, told while it is written where somebody listens."""
    teller = Teller(q.task.spec.get("stop") or ())
    said = await _written(q, q.messages(share), told=_told_by(q, teller))
    if q.tell is not None:
        q.tell(teller.rest(said.text.strip()))
    return said


async def _continued(q: ServedQuestion) -> ServedAnswer:
    """How the model goes on with the text as it stands."""
    spec = q.task.spec
    stops = list(spec.get("stop") or ())
    choice = await q.server.complete(
        q.asking.text,
        q.spending,
        urgent=q.urgent,
        max_tokens=int(spec["max_tokens"]),
        temperature=float(spec.get("temperature", 0.0)),
        **({"stop": stops} if stops else {}),
        **({"seed": int(spec["seed"])} if "draw" in spec else {}),
        **({} if (told := spec.get("logprobs")) is None else {"logprobs": int(told)}),
        **_sampling(spec),
        **q.own,
    )
    whole = str(choice.get("text") or "").replace("\0", "")
    return _answered(spec, choice, whole, stops)


def _told_by(q: ServedQuestion, teller: Teller) -> Callable[[str], None] | None:
    """What takes an answer's text while it is written; None where all of it may turn out to be a thought."""
    if (tell := q.tell) is None or q.task.spec.get("thinking") is not None:
        return None
    return lambda text: tell(teller.more(text))


async def _written(q: ServedQuestion, messages: Sequence[Mapping[str, str]], **options: Any) -> ServedAnswer:
    """What the model writes, and how it ended: with less room than asked for where server or context has no more."""
    spec = q.task.spec
    wanted = int(spec["max_tokens"])
    # The answer is cut before a stop text in any case.
    spare = {"stop"}
    if spec.get("stop"):
        options["stop"] = list(spec["stop"])
    options["temperature"] = temperature = float(spec.get("temperature", 0.0))
    if temperature == SERVERS_TEMPERATURE:
        spare.add("temperature")
    if temperature > 0:
        seed = int(spec.get("seed", 0))
        said = f"{seed}/{spec.get('draw', q.asking.index)}/{q.task.name}"
        options["seed"] = int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "big") >> 1
        if seed == 0:
            spare.add("seed")
    options |= _sampling(spec)
    if (likeliest := spec.get("logprobs")) is not None:
        options |= {"logprobs": True, "top_logprobs": int(likeliest)}
    for most in sorted({max(1, int(wanted * part)) for part in LESS}, reverse=True):
        try:
            choice = await q.chat(messages, max_tokens=most, spare=spare, **options)
        except RequestRefused as refused:
            if refused.cell not in (CONTEXT_LENGTH, ANSWER_LENGTH) or most == 1:
                raise
        else:
            whole = text_of(choice)
            if spec.get("thinking") is not None and spec.get("schema") is None:
                whole = without_thoughts(whole)
            return _answered(spec, choice, whole, spec.get("stop") or ())
    raise AssertionError("one token is the least")


def _sampling(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of how tokens are drawn, beside temperature and seed, by the names that vLLM gives it."""
    return {name: spec[name] for name in SAMPLING if name in spec}


def _answered(
    spec: Mapping[str, Any], choice: Mapping[str, Any], whole: str, stops: Sequence[str]
) -> ServedAnswer:
    """The answer up to the first stop text."""
    text = _until(whole, stops)
    cut_short = choice.get("finish_reason") == "length" and text == whole
    likelihoods = None if spec.get("logprobs") is None else told_likelihoods(choice, len(text))
    return ServedAnswer(text, "length" if cut_short else "stop", likelihoods)


def _until(text: str, stops: Sequence[str]) -> str:
    """Some servers leave the stop text in, and some take none."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


# -- schemas


async def _by_schema(q: ServedQuestion, share: float) -> Any:
    """A value that keeps the schema, or why there is none."""
    schema = q.task.spec["schema"]
    messages = q.messages(share)
    broken = ""
    for _ in range(1 + MENDING):
        said = await _constrained(q, messages, schema)
        if said.finish == "length":
            return CellError("schema", "max_tokens were written before the value was whole; allow more")
        value, broken = _checked(said.text, schema)
        if not broken:
            return value
        messages = [
            *messages,
            {"role": "assistant", "content": said.text},
            {"role": "user", "content": f"This is not right: {broken}. Answer again, with the JSON alone."},
        ]
    return CellError("schema", broken)


async def _constrained(
    q: ServedQuestion, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]
) -> ServedAnswer:
    """An answer that the server holds to the schema; where it cannot, the schema is part of what it is told."""
    if q.server.constrains:
        try:
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
            return await _written(q, messages, response_format=form)
        except RequestRefused as refused:
            if refused.status not in (400, 404, 415, 422) or refused.cell in (CONTEXT_LENGTH, ANSWER_LENGTH):
                raise
            if refused.parameter not in ("", "response_format"):
                raise
            # Whether it is the schema or the server that cannot, the next request tells.
            told = await _written(q, _with_schema(messages, schema))
            q.server.constrains = False
            return told
    return await _written(q, _with_schema(messages, schema))


def _with_schema(messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> list[Mapping[str, str]]:
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    words = f"\n\nAnswer with JSON alone, which keeps this JSON Schema: {json.dumps(schema, sort_keys=True)}"
    told = [dict(m) for m in messages]
    told[first]["content"] += words
    return [*told]


def _checked(text: str, schema: Mapping[str, Any]) -> tuple[Any, str]:
    """The value, and what is wrong with it, without a word of it."""
    for said in (text, without_thoughts(text)):
        fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", said, re.DOTALL)
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(fenced.group(1) if fenced else said)
            return value, violation(value, schema) or ""
    return None, "what was written is no JSON"


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a chat's choice. Raises RequestRefused where the server withholds it."""
    if choice.get("finish_reason") == "content_filter":
        raise RequestRefused(CellError("refused", "the model's server withholds the answer"))
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return (content or "").replace("\0", "") if isinstance(content, str | None) else ""
