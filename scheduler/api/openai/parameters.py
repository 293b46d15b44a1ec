"""Every parameter of OpenAI's requests: served, ignored since it changes no answer, or refused since it would. Pure.

One table; docs/openai.md shows it, and a test holds it against the types of the installed ``openai`` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from motet.tasks import short
from scheduler.api.openai.refusals import DoorError

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
#: In the form of Cohere and Jina.
RERANK, CLASSIFY = "/v1/rerank", "/v1/classify"


@dataclass(frozen=True, slots=True)
class Parameter:
    """What becomes of one parameter."""

    how: Literal["served", "ignored", "refused"]
    #: For people: how it is served, or why not.
    why: str = ""
    #: Of one that is refused the values, beside null, that change no answer.
    harmless: tuple[Any, ...] = ()


def _served(why: str = "") -> Parameter:
    return Parameter("served", why)


def _ignored(why: str = "changes no answer") -> Parameter:
    return Parameter("ignored", why)


def _refused(why: str, *harmless: Any) -> Parameter:
    return Parameter("refused", why, harmless)


_NO_TOOLS = "tools are not served: ask without them, or for JSON with response_format"
_NO_MEMORY = "send the whole dialogue each time"

_WRITING: Mapping[str, Parameter] = {
    "model": _served("the name of a registered model"),
    "max_tokens": _served("tokens written at most; 1,024 where nothing is said"),
    "temperature": _served("0 to 2; 1 where nothing is said"),
    "seed": _served("the same seed draws the same answer"),
    "stop": _served("a text or up to 4"),
    "n": _served("up to 16 choices, drawn apart; their prompt is counted once"),
    "stream": _served("up to 16 answers, as they are written"),
    "stream_options": _served("include_usage"),
    "top_p": _served("above 0, up to 1: tokens are drawn from the fewest that have this share"),
    "frequency_penalty": _served("-2 to 2, less likely for each time that a token was written"),
    "presence_penalty": _served("-2 to 2, less likely where a token was written at all"),
    "top_k": _served("vLLM's: tokens are drawn from so many of the likeliest; 0 or -1: from all"),
    "repetition_penalty": _served(
        "vLLM's: above 0, up to 10; above 1 what stands in prompt or answer is less likely"
    ),
    "logit_bias": _refused("token ids differ from model to model: ask in words", {}),
    "user": _ignored("the token says who asks"),
}

PARAMETERS: Mapping[str, Mapping[str, Parameter]] = {
    CHAT: {
        "messages": _served("texts of system, developer, user and assistant; the last one is the user's"),
        **_WRITING,
        "max_completion_tokens": _served("the same as max_tokens"),
        "response_format": _served("text, json_object, json_schema"),
        "tasks": _served("motet's own: up to 16 tasks about the last message"),
        "logprobs": _served(
            "true: of each token how likely it was to the model, before anything changed that"
        ),
        "top_logprobs": _served("0 to 20 likeliest tokens beside each, with logprobs"),
        "tools": _refused(_NO_TOOLS, []),
        "tool_choice": _refused(_NO_TOOLS, "none", "auto"),
        "parallel_tool_calls": _ignored("there are no tools"),
        "functions": _refused(_NO_TOOLS, []),
        "function_call": _refused(_NO_TOOLS, "none", "auto"),
        "modalities": _refused("answers are text", ["text"]),
        "audio": _refused("answers are text"),
        "web_search_options": _refused("nothing is searched for"),
        "reasoning_effort": _refused("how long a model thinks is its own affair"),
        "verbosity": _refused("ask for it in the prompt", "medium"),
        "moderation": _refused("nothing is moderated"),
        "prediction": _ignored("only makes answers sooner"),
        "metadata": _ignored(),
        "store": _ignored("every request is a row of a job"),
        "service_tier": _ignored(),
        "safety_identifier": _ignored(),
        "prompt_cache_key": _ignored("equal beginnings are shared anyway"),
        "prompt_cache_options": _ignored("equal beginnings are shared anyway"),
        "prompt_cache_retention": _ignored("equal beginnings are shared anyway"),
    },
    COMPLETIONS: {
        "prompt": _served("a text, token ids of the model, or a list of either"),
        **_WRITING,
        "best_of": _refused("ask for n choices and take one", 1),
        "echo": _refused("put the prompt in front yourself", False),
        "logprobs": _served("0 to 20: how likely each token was, and so many of the likeliest beside it"),
        "suffix": _refused("models here continue, they do not fill in", ""),
    },
    RESPONSES: {
        "input": _served("a text, or messages of text; the last one is the user's"),
        "instructions": _served("the first system message"),
        "model": _served("the name of a registered model"),
        "max_output_tokens": _served("tokens written at most; 1,024 where nothing is said"),
        "temperature": _served("0 to 2; 1 where nothing is said"),
        "text": _served("its format: text, json_object, json_schema"),
        "stream": _served("told as it is written"),
        "stream_options": _ignored(),
        "store": _ignored("answers are not kept here: send the whole dialogue each time"),
        "previous_response_id": _refused(_NO_MEMORY),
        "conversation": _refused(_NO_MEMORY),
        "context_management": _refused(_NO_MEMORY, []),
        "prompt": _refused("write the prompt out"),
        "background": _refused("send a batch", False),
        "background_options": _refused("send a batch"),
        "include": _refused("there is nothing more to tell", []),
        "tools": _refused(_NO_TOOLS, []),
        "tool_choice": _refused(_NO_TOOLS, "none", "auto"),
        "parallel_tool_calls": _ignored("there are no tools"),
        "max_tool_calls": _ignored("there are no tools"),
        "access_programs": _refused(_NO_TOOLS),
        "image": _refused("answers are text"),
        "reasoning": _refused("how long a model thinks is its own affair"),
        "moderation": _refused("nothing is moderated"),
        "top_logprobs": _refused("ask a chat for them", 0),
        "top_p": _served("as in chats"),
        "truncation": _refused("what does not fit is an error", "disabled"),
        "metadata": _ignored(),
        "service_tier": _ignored(),
        "user": _ignored("the token says who asks"),
        "safety_identifier": _ignored(),
        "prompt_cache_key": _ignored("equal beginnings are shared anyway"),
        "prompt_cache_options": _ignored("equal beginnings are shared anyway"),
        "prompt_cache_retention": _ignored("equal beginnings are shared anyway"),
    },
    EMBEDDINGS: {
        "input": _served("a text, token ids of the model, or a list of either, up to 2,048"),
        "model": _served("the name of a registered model"),
        "encoding_format": _served("float or base64"),
        "dimensions": _served("the model's own number; others are refused"),
        "user": _ignored("the token says who asks"),
    },
    RERANK: {
        "query": _served("a text"),
        "documents": _served("up to 1,000 texts, or objects with a text"),
        "model": _served("the name of a registered model that answers with vectors, or of a cross-encoder"),
        "top_n": _served("how many are told, the most alike first; all where nothing is said"),
        "return_documents": _served("each result repeats its document"),
        "user": _ignored("the token says who asks"),
    },
    CLASSIFY: {
        "input": _served("a text, or up to 1,000, or objects with a text"),
        "labels": _served("2 to 100 texts"),
        "model": _served("the name of a registered model that answers with vectors"),
        "user": _ignored("the token says who asks"),
    },
}


def check_parameters(endpoint: str, body: Mapping[str, Any]) -> None:
    """Raises DoorError for the first parameter that is unknown, or would change the answer and is not served.

    Null is as good as nothing: clients send it for whatever their caller left out.
    """
    known = PARAMETERS[endpoint]
    for name, value in body.items():
        if value is None:
            continue
        parameter = known.get(name)
        if parameter is None:
            raise DoorError(
                f"unknown parameter {short(name)}; docs/openai.md lists those that are known",
                param=short(name),
                code="unknown_parameter",
            )
        if parameter.how == "refused" and not _harmless(value, parameter.harmless):
            raise DoorError(
                f"{name} is not served: {parameter.why}", param=name, code="unsupported_parameter"
            )


def _harmless(value: Any, among: tuple[Any, ...]) -> bool:
    """Equal, and of a like type: 1 is no true."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in among)
