"""One request in OpenAI's form, checked: rows of a task, and what each of them says of the task's options. Pure.

The same for a request that waits for its answer and for a line of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from motet.protocol.manifest import Answer, Manifest
from motet.protocol.values import Value
from motet.tasks import Chat, Embed, Generate, Rank, Task, short
from scheduler.api.openai.beside import TEXT, asked_tasks
from scheduler.api.openai.checks import (
    Decoded,
    asked_schema,
    flag,
    number,
    one_of,
    texts,
    whole_number,
    wrong,
)
from scheduler.api.openai.parameters import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    RESPONSES,
    check_parameters,
)
from scheduler.api.openai.ranking import labelled, ranked
from scheduler.api.openai.refusals import DoorError

#: Fields of a row: what is asked (a dialogue as JSON, a prompt, a text, a query), its options as JSON, and the documents
#: that a query is held against.
ASKED, OPTIONS, DOCUMENTS = "asked", "options", "documents"
_OF_ROW, _OPTIONS_OF_ROW, _DOCUMENTS_OF_ROW = f"{{{ASKED}}}", f"{{{OPTIONS}}}", f"{{{DOCUMENTS}}}"
#: Documents of one row for a cross-encoder, and their UTF-8 bytes. More: a row holds a device for longer, and others wait;
#: fewer: more rows for one request.
_ROW_DOCUMENTS, _ROW_BYTES = 64, 128 * 1024
#: Tokens written where a request says nothing: as many as most answers need. More: each answer holds more memory while
#: it is written; fewer: more answers end with ``length``.
DEFAULT_TOKENS = 1024
_MOST_TOKENS = 1 << 20
_MOST_CHOICES = 16
#: Tokens told beside each: as many as OpenAI and vLLM tell.
_MOST_LIKELIEST = 20
_MOST_REPETITION = 10.0
#: What samples as if nothing were said.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_MOST_PROMPTS = 128
#: Answers that one stream tells: each is a row of its own.
MOST_STREAMED = 16
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")
#: What says how many tokens are written at most, the newest word first.
_LENGTHS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
#: What a response repeats of its request.
_REPEATED = ("instructions", "max_output_tokens", "temperature", "text", "top_p")
_MOST_INPUTS = 2048
_MOST_STOPS = 4
_STOP_CHARACTERS = 200
#: Whoever instructs is the system to a model; what a tool said is not served.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: Fields of a message that may stand there; of them what is not role and content changes no answer, or is refused.
_MESSAGE = frozenset({"role", "content", "name", "refusal", "annotations", "id", "status"})
#: Types of the parts of a message that are text.
_TEXTS = ("text", "input_text", "output_text")
#: Types of parts that other servers take.
_NO_TEXTS = ("image_url", "input_image", "input_audio", "file", "input_file", "refusal", "video_url")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRequest:
    """A checked request: its rows are ``texts`` x ``choices``, or slices of its documents."""

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
    #: A cross-encoder reads the first text, the query, with each of the others.
    pairs: bool = False
    #: Told as it is written; with what it consumed at the end.
    stream: bool = False
    usage_told: bool = False
    #: Tasks beside, about the text of the last message.
    tasks: Mapping[str, Task] = field(default_factory=dict)
    #: What the answer needs to know of the question.
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> bool:
        """Its answers are drawn, and others each time."""
        options = self.options or {}
        return options.get("temperature", 0) > 0 and "seed" not in options

    def rows(self) -> list[dict[str, Value]]:
        """What each row holds, by field; choices of a text side by side."""
        if self.pairs:
            query = self.texts[0]
            return [{ASKED: query, DOCUMENTS: list(some)} for some in self.slices()]
        if self.options is None:
            return [{ASKED: text} for text in self.texts]
        read = any(TEXT in task.reads(name, self.tasks) for name, task in self.tasks.items())
        beside: dict[str, Value] = {TEXT: text_of(self.texts[0])} if read else {}
        return [
            {ASKED: text, OPTIONS: self._options(number), **beside}
            for text in self.texts
            for number in range(self.choices)
        ]

    def slices(self) -> list[tuple[str, ...]]:
        """The documents of each row: what one device reads in a moment."""
        found: list[list[str]] = []
        size = 0
        for document in self.texts[1:]:
            size += len(document.encode())
            if not found or len(found[-1]) >= _ROW_DOCUMENTS or size > _ROW_BYTES:
                found.append([])
                size = len(document.encode())
            found[-1].append(document)
        return [tuple(one) for one in found]

    def _options(self, choice: int) -> str:
        assert self.options is not None
        # With a seed that and the number of the choice decide a draw; without, the row's place in its job does.
        own = {"draw": choice} if "seed" in self.options else {}
        return json.dumps({**self.options, **own}, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def task_of(endpoint: str, model: str, *, pairs: bool = False, conditional: bool = False) -> Task:
    """The task that answers requests to an endpoint. ``model``: ``name@version``. ``pairs``: it is a cross-encoder."""
    if pairs:
        return Rank(model=model, query=_OF_ROW, documents=_DOCUMENTS_OF_ROW, conditional=conditional)
    if endpoint in (CHAT, RESPONSES):
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


#: Endpoint -> what its models may answer.
SERVED: Mapping[str, frozenset[Answer]] = {
    CHAT: frozenset({"text"}),
    COMPLETIONS: frozenset({"text"}),
    RESPONSES: frozenset({"text"}),
    EMBEDDINGS: frozenset({"vector"}),
    RERANK: frozenset({"vector", "ranking"}),
    CLASSIFY: frozenset({"vector"}),
}


def asked_of(asked: AskedRequest, model: Manifest) -> AskedRequest:
    """The request as this model answers it."""
    return replace(asked, pairs=True) if model.answers == "ranking" else asked


def read_request(endpoint: str, body: Mapping[str, Any], decoded: Decoded) -> AskedRequest:
    """Check a body that is clean JSON. Raises DoorError that names the parameter."""
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 200:
        raise wrong("model", model, "the name of a registered model")
    check_parameters(endpoint, body)
    if endpoint == EMBEDDINGS:
        return AskedRequest(
            endpoint=endpoint,
            model=model,
            texts=texts("input", body.get("input"), decoded, _MOST_INPUTS),
            options=None,
            base64=one_of(body, "encoding_format", ("float", "base64")) == "base64",
            dimensions=whole_number(body, "dimensions", 1, 1 << 16),
        )
    if endpoint in (RERANK, CLASSIFY):
        asked, about = (ranked if endpoint == RERANK else labelled)(body, decoded)
        return AskedRequest(endpoint=endpoint, model=model, texts=asked, options=None, about=about)
    stream, usage_told = _streamed(endpoint, body)
    if endpoint == RESPONSES:
        asked = (_dialogue(_input(body), "input"),)
    elif endpoint == CHAT:
        asked = (_dialogue(body.get("messages"), "messages"),)
    else:
        asked = texts("prompt", body.get("prompt"), decoded, _MOST_PROMPTS)
    request = AskedRequest(
        endpoint=endpoint,
        model=model,
        texts=asked,
        options=_options(endpoint, body),
        choices=(endpoint != RESPONSES and whole_number(body, "n", 1, _MOST_CHOICES)) or 1,
        stream=stream,
        usage_told=usage_told,
        tasks=asked_tasks(body, {ASKED, OPTIONS}) if endpoint == CHAT else {},
        about={name: body.get(name) for name in _REPEATED} if endpoint == RESPONSES else {},
    )
    if request.tasks and request.choices > 1:
        raise DoorError("tasks are asked once a request: leave n out", param="n", code="unsupported_value")
    if stream and len(request.rows()) > MOST_STREAMED:
        raise DoorError(
            f"{len(request.rows())} answers in one stream; expected at most {MOST_STREAMED}",
            param="stream",
            code="unsupported_value",
        )
    return request


def _streamed(endpoint: str, body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is told as it is written, and whether its usage is told at the end."""
    stream = flag(body, "stream")
    told = body.get("stream_options")
    if endpoint == RESPONSES or told is None:
        return stream, False
    if not isinstance(told, Mapping) or not stream or told.keys() - _STREAM_OPTIONS:
        raise wrong("stream_options", told, f"an object of {', '.join(_STREAM_OPTIONS)}, with stream=true")
    usage_told, _ = (flag(told, name, "stream_options.") for name in _STREAM_OPTIONS)
    return stream, usage_told


def text_of(dialogue: str) -> str:
    """The text that tasks beside a chat are about: its last message."""
    return str(json.loads(dialogue)[-1]["content"])


def _input(body: Mapping[str, Any]) -> Any:
    """What a response answers, as messages of a chat."""
    said, instructions = body.get("input"), body.get("instructions")
    if not isinstance(said, str) and not isinstance(said, list):
        raise wrong("input", said, "a text, or a list of messages")
    messages: list[Any] = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
    if instructions is None:
        return messages
    if not isinstance(instructions, str):
        raise wrong("instructions", instructions, "a text")
    return [{"role": "system", "content": instructions}, *messages]


def _format(body: Mapping[str, Any]) -> Any:
    """How the text of a response shall be formed."""
    told = body.get("text")
    if told is None:
        return None
    if not isinstance(told, Mapping) or told.keys() - {"format", "verbosity"}:
        raise wrong("text", told, "an object with a format")
    if told.get("verbosity") not in (None, "medium"):
        raise DoorError(
            "text.verbosity is not served: ask for it in the prompt",
            param="text.verbosity",
            code="unsupported_parameter",
        )
    return told.get("format")


def _options(endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    temperature = number(body, "temperature", 0, 2)
    if temperature is None:
        temperature = 1.0
    said = (whole_number(body, name, 1, _MOST_TOKENS) for name in _LENGTHS)
    most = next((one for one in list(said) if one is not None), None)
    options: dict[str, Any] = {"max_tokens": most or DEFAULT_TOKENS, "temperature": temperature}
    options |= _sampling(body, drawn=temperature > 0)
    seed = whole_number(body, "seed", -(1 << 63), (1 << 63) - 1)
    if seed is not None and temperature > 0:
        options["seed"] = seed
    if stops := _stops(body.get("stop")):
        options["stop"] = stops
    form = _format(body) if endpoint == RESPONSES else body.get("response_format")
    where = "text.format" if endpoint == RESPONSES else "response_format"
    if (schema := asked_schema(form, where)) is not None:
        options["schema"] = schema
    if endpoint != RESPONSES and (likeliest := _likeliest(endpoint, body)) is not None:
        options["logprobs"] = likeliest
    return options


def _sampling(body: Mapping[str, Any], *, drawn: bool) -> dict[str, Any]:
    """How tokens are weighed and drawn, where that is said. What changes nothing is left out: so equal requests are equal."""
    top_k = whole_number(body, "top_k", -1, _MOST_TOKENS)
    narrowed = {"top_p": number(body, "top_p", 0, 1, above=True), "top_k": None if top_k == -1 else top_k}
    weighed = {
        "frequency_penalty": number(body, "frequency_penalty", -2, 2),
        "presence_penalty": number(body, "presence_penalty", -2, 2),
        "repetition_penalty": number(body, "repetition_penalty", 0, _MOST_REPETITION, above=True),
    }
    said = {**(narrowed if drawn else {}), **weighed}
    return {name: value for name, value in said.items() if value not in (None, _NEUTRAL[name])}


def _likeliest(endpoint: str, body: Mapping[str, Any]) -> int | None:
    """Of how many tokens likelihoods are told beside each that is written; None: of none at all."""
    if endpoint == COMPLETIONS:
        return whole_number(body, "logprobs", 0, _MOST_LIKELIEST)
    told, likeliest = flag(body, "logprobs"), whole_number(body, "top_logprobs", 0, _MOST_LIKELIEST)
    if likeliest and not told:
        raise DoorError(
            "top_logprobs: expected logprobs=true beside it", param="top_logprobs", code="invalid_value"
        )
    return likeliest or 0 if told else None


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(stops, list)
        or len(stops) > _MOST_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= _STOP_CHARACTERS for one in stops)
    ):
        raise wrong(
            "stop", stop, f"a text, or up to {_MOST_STOPS}, each of 1 to {_STOP_CHARACTERS} characters"
        )
    return stops


def _dialogue(messages: Any, where: str) -> str:
    """The dialogue as JSON, as chat tasks read it. ``where``: the parameter that says it."""
    if not isinstance(messages, list) or not messages:
        raise wrong(where, messages, "a list of messages")
    said = [_message(f"{where}[{number}]", message) for number, message in enumerate(messages)]
    if said[-1]["role"] != "user":
        raise DoorError("the last message must be the user's", param=where, code="invalid_value")
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"))


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise wrong(where, message, "a message")
    for name, value in message.items():
        if name not in _MESSAGE and value not in (None, []) and (name, value) != ("type", "message"):
            raise DoorError(
                f"{where}.{short(name)} is not served: a message has a role and a text",
                param=f"{where}.{short(name)}",
                code="unsupported_parameter",
            )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    """The text of a message: a string, or parts of type text, one behind the other."""
    if isinstance(content, list) and content:
        return "".join(_part(f"{where}[{number}]", part) for number, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(where, content, "a text, or a list of parts of type text")
    return content


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _NO_TEXTS:
        raise DoorError(
            f"{where}: {kind} is not served: parts of a message are of type text",
            param=where,
            code="unsupported_value",
        )
    text = part["text"] if kind in _TEXTS and "text" in part else None
    if not isinstance(text, str):
        raise wrong(where, part, "a part of type text, with its text")
    return text
