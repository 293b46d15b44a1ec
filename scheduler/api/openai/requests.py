"""One request in OpenAI's form, checked: rows of a task, and what each of them says of the task's options. Pure.

The same for a request that waits for its answer and for a line of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.protocol.values import text_flaw
from motet.tasks import Chat, Embed, Generate, Task, short
from scheduler.api.openai.parameters import CHAT, COMPLETIONS, EMBEDDINGS, check_parameters
from scheduler.api.openai.refusals import DoorError

#: Field of a row that a task reads: a dialogue as JSON, a prompt or a text. The other: its options as JSON.
ASKED, OPTIONS = "asked", "options"
_OF_ROW, _OPTIONS_OF_ROW = f"{{{ASKED}}}", f"{{{OPTIONS}}}"
#: Tokens written where a request says nothing: as many as most answers need. More: each answer holds more memory while
#: it is written; fewer: more answers end with ``length``.
DEFAULT_TOKENS = 1024
_MOST_TOKENS = 1 << 20
_MOST_CHOICES = 16
_MOST_PROMPTS = 128
_MOST_INPUTS = 2048
_MOST_STOPS = 4
_STOP_CHARACTERS = 200
_SCHEMA_BYTES = 64 * 1024
#: Whoever instructs is the system to a model; what a tool said is not served.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: Fields of a message that may stand there; of them what is not role and content changes no answer, or is refused.
_MESSAGE = frozenset({"role", "content", "name", "refusal", "annotations"})

#: Token ids -> their text, by a model's own tokenizer. Raises DoorError.
Decoded = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRequest:
    """A checked request: its rows are ``texts`` x ``choices``."""

    endpoint: str
    model: str
    #: What each row reads: a dialogue, prompts, or inputs.
    texts: tuple[str, ...]
    #: What its rows say of the task's options; None where the task has none.
    options: Mapping[str, Any] | None
    #: Answers to each text.
    choices: int = 1
    base64: bool = False
    #: Length of vectors that is asked for; None: the model's.
    dimensions: int | None = None

    @property
    def drawn(self) -> bool:
        """Its answers are drawn, and others each time."""
        options = self.options or {}
        return options.get("temperature", 0) > 0 and "seed" not in options

    def rows(self) -> list[tuple[str, str]]:
        """(what is asked, its options as JSON) of each row, choices of a text side by side."""
        return [(text, self._options(number)) for text in self.texts for number in range(self.choices)]

    def _options(self, choice: int) -> str:
        if self.options is None:
            return "{}"
        # With a seed that and the number of the choice decide a draw; without, the row's place in its job does.
        own = {"draw": choice} if "seed" in self.options else {}
        return json.dumps({**self.options, **own}, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def task_of(endpoint: str, model: str, *, conditional: bool = False) -> Task:
    """The task that answers requests to an endpoint. ``model``: ``name@version``."""
    if endpoint == CHAT:
        return Chat(model=model, messages=_OF_ROW, options=_OPTIONS_OF_ROW, conditional=conditional)
    if endpoint == COMPLETIONS:
        return Generate(
            model=model,
            about=_OF_ROW,
            prompt="",
            options=_OPTIONS_OF_ROW,
            raw=True,
            first="text",
            conditional=conditional,
        )
    return Embed(model=model, input=_OF_ROW, too_long="error", conditional=conditional)


#: Endpoint -> what its models answer.
SERVED: Mapping[str, str] = {CHAT: "text", COMPLETIONS: "text", EMBEDDINGS: "vector"}


def read_request(endpoint: str, body: Mapping[str, Any], decoded: Decoded) -> AskedRequest:
    """Check a body that is clean JSON. Raises DoorError that names the parameter."""
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 200:
        raise _wrong("model", model, "the name of a registered model")
    check_parameters(endpoint, body)
    if endpoint == EMBEDDINGS:
        return AskedRequest(
            endpoint=endpoint,
            model=model,
            texts=_texts("input", body.get("input"), decoded, _MOST_INPUTS),
            options=None,
            base64=_one_of(body, "encoding_format", ("float", "base64")) == "base64",
            dimensions=_number(body, "dimensions", 1, 1 << 16),
        )
    said = endpoint == CHAT
    return AskedRequest(
        endpoint=endpoint,
        model=model,
        texts=(_dialogue(body.get("messages")),)
        if said
        else _texts("prompt", body.get("prompt"), decoded, _MOST_PROMPTS),
        options=_options(endpoint, body),
        choices=_number(body, "n", 1, _MOST_CHOICES) or 1,
    )


def _options(endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    temperature = body.get("temperature")
    if temperature is None:
        temperature = 1.0
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise _wrong("temperature", temperature, "a number from 0 to 2")
    most = _number(body, "max_completion_tokens", 1, _MOST_TOKENS) or _number(
        body, "max_tokens", 1, _MOST_TOKENS
    )
    options: dict[str, Any] = {"max_tokens": most or DEFAULT_TOKENS, "temperature": float(temperature)}
    seed = _number(body, "seed", -(1 << 63), (1 << 63) - 1)
    if seed is not None and temperature > 0:
        options["seed"] = seed
    if stops := _stops(body.get("stop")):
        options["stop"] = stops
    if endpoint == CHAT and (schema := _schema(body.get("response_format"))) is not None:
        options["schema"] = schema
    return options


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(stops, list)
        or len(stops) > _MOST_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= _STOP_CHARACTERS for one in stops)
    ):
        raise _wrong(
            "stop", stop, f"a text, or up to {_MOST_STOPS}, each of 1 to {_STOP_CHARACTERS} characters"
        )
    return stops


def _schema(form: Any) -> Mapping[str, Any] | None:
    """The JSON Schema that an answer shall keep; None where any text will do."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            named = form.get("json_schema")
            schema = named.get("schema") if isinstance(named, Mapping) else None
            if isinstance(schema, Mapping) and len(json.dumps(schema)) <= _SCHEMA_BYTES:
                return schema
            expected = f"a JSON Schema of up to {_SCHEMA_BYTES // 1024} KiB"
            raise _wrong("response_format.json_schema.schema", schema, expected)
    raise _wrong("response_format", kind, 'an object of type "text", "json_object" or "json_schema"')


def _dialogue(messages: Any) -> str:
    """The dialogue as JSON, as chat tasks read it."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list of messages")
    said = [_message(number, message) for number, message in enumerate(messages)]
    if said[-1]["role"] != "user":
        raise DoorError("the last message must be the user's", param="messages", code="invalid_value")
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"))


def _message(number: int, message: Any) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise _wrong(where, message, "a message")
    for name, value in message.items():
        if name not in _MESSAGE and value not in (None, []):
            raise DoorError(
                f"{where}.{short(name)} is not served: a message has a role and a text",
                param=f"{where}.{short(name)}",
                code="unsupported_parameter",
            )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    """The text of a message: a string, or parts of type text, one behind the other."""
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
        raise DoorError(f"{where} holds a part that is no text", param=where, code="unsupported_value")
    if not isinstance(content, str):
        raise _wrong(where, content, "a text, or a list of parts of type text")
    return content


def _texts(name: str, value: Any, decoded: Decoded, most: int) -> tuple[str, ...]:
    """A text or a list of token ids, or a list of either."""
    many = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not many or len(many) > most:
        raise _wrong(name, value, f"a text, token ids, or a list of up to {most:,} of either")
    texts = [decoded(one) if _is_ids(one) else one for one in many]
    if not all(isinstance(one, str) and one for one in texts):
        raise _wrong(
            name, value, f"a text that is not empty, token ids, or a list of up to {most:,} of either"
        )
    return tuple(texts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _number(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least:,} to {most:,}")
    return value


def _one_of(body: Mapping[str, Any], name: str, words: Sequence[str]) -> str:
    """The word that is said; the first one where none is."""
    value = body.get(name)
    if value is None:
        return words[0]
    if not isinstance(value, str) or value not in words:
        raise _wrong(name, value, f"one of {', '.join(words)}")
    return value


def _wrong(where: str, got: Any, expected: str) -> DoorError:
    """What stands there is told by its type, never by its words: they may be as private as a text."""
    if got is None:
        code, told = "missing_required_parameter", "nothing"
    else:
        code, told = "invalid_value", short(got) if isinstance(got, bool | int | float) else _kind(got)
    return DoorError(f"{where}: got {told}; expected {expected}", param=where, code=code)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"a text of {len(value):,} characters" + (
            f" with {flaw}" if (flaw := text_flaw(value)) else ""
        )
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"a value of type {type(value).__name__}"
