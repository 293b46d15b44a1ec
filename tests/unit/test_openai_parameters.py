"""Every parameter of OpenAI's requests has a place in one table, which the page shows and the doors keep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from scheduler.api.openai.parameters import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    PARAMETERS,
    RERANK,
    RESPONSES,
    check_parameters,
)
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import SERVED, read_request

PAGE = Path(__file__).parents[2] / "docs" / "openai.md"


def declared() -> dict[str, set[str]]:
    """Endpoint -> the parameters that the installed SDK knows."""
    from openai.types import completion_create_params as completion
    from openai.types import embedding_create_params as embedding
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as response

    return {
        CHAT: set(get_type_hints(chat.CompletionCreateParamsStreaming)),
        COMPLETIONS: set(get_type_hints(completion.CompletionCreateParamsStreaming)),
        EMBEDDINGS: set(get_type_hints(embedding.EmbeddingCreateParams)),
        RESPONSES: set(get_type_hints(response.ResponseCreateParamsStreaming)),
    }


#: What is not OpenAI's, but motet's own or others'.
OWN = {CHAT: {"tasks"}, RERANK: set(PARAMETERS[RERANK]), CLASSIFY: set(PARAMETERS[CLASSIFY])}


def test_the_table_holds_every_parameter_of_the_sdk_and_no_other() -> None:
    theirs = {endpoint: set(known) - OWN.get(endpoint, set()) for endpoint, known in PARAMETERS.items()}
    assert {endpoint: known for endpoint, known in theirs.items() if known} == declared()
    assert set(PARAMETERS) == set(SERVED)


def test_the_page_shows_the_table() -> None:
    shown = set(re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|$", PAGE.read_text("utf-8"), re.MULTILINE))
    table = {
        (name, parameter.how, parameter.why)
        for known in PARAMETERS.values()
        for name, parameter in known.items()
    }
    assert shown == table


def decoded(ids: object) -> str:
    return "text of ids"


TOPIC = {"kind": "classify", "model": "topics"}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "m", "prompt": "hi"},
    EMBEDDINGS: {"model": "m", "input": "hi"},
    RESPONSES: {"model": "m", "input": "hi"},
    RERANK: {"model": "m", "query": "hi", "documents": ["a"]},
    CLASSIFY: {"model": "m", "input": "hi", "labels": ["a", "b"]},
}


def test_each_parameter_does_what_the_table_says() -> None:
    odd = object()
    for endpoint, known in PARAMETERS.items():
        plain = read_request(endpoint, GOOD[endpoint], decoded)
        for name, parameter in known.items():
            if parameter.how == "ignored":
                assert read_request(endpoint, {**GOOD[endpoint], name: odd}, decoded) == plain
            if parameter.how == "refused":
                for harmless in (None, *parameter.harmless):
                    assert read_request(endpoint, {**GOOD[endpoint], name: harmless}, decoded) == plain
                with pytest.raises(DoorError) as refused:
                    check_parameters(endpoint, {**GOOD[endpoint], name: odd})
                assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
            if parameter.how == "served":
                with pytest.raises(DoorError) as refused:
                    read_request(endpoint, {**GOOD[endpoint], name: odd}, decoded)
                assert (refused.value.param or "").startswith(name)


def test_a_parameter_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(DoorError, match="wings"):
        read_request(CHAT, {**GOOD[CHAT], "wings": 2}, decoded)


def test_what_a_request_says_becomes_options_of_its_rows() -> None:
    asked = read_request(
        CHAT,
        {
            **GOOD[CHAT],
            "n": 2,
            "seed": 3,
            "temperature": 0.5,
            "stop": "x",
            "max_tokens": 9,
            "max_completion_tokens": 5,
        },
        decoded,
    )
    assert [options for _, options in asked.rows()] == [
        '{"draw":0,"max_tokens":5,"seed":3,"stop":["x"],"temperature":0.5}',
        '{"draw":1,"max_tokens":5,"seed":3,"stop":["x"],"temperature":0.5}',
    ]
    assert not asked.drawn
    assert read_request(CHAT, GOOD[CHAT], decoded).drawn, "their default is a temperature of 1"
    assert not read_request(CHAT, {**GOOD[CHAT], "temperature": 0}, decoded).drawn


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        (CHAT, {"response_format": {"type": "grammar"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (CHAT, {"n": 17}, "n"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"stop": [""]}, "stop"),
        (CHAT, {"temperature": 3}, "temperature"),
        (CHAT, {"top_p": True}, "top_p"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (CHAT, {"stream": 1}, "stream"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (COMPLETIONS, {"stream": True, "prompt": ["a"] * 9, "n": 2}, "stream"),
        (CHAT, {"tasks": {"answer": TOPIC}}, "tasks"),
        (CHAT, {"tasks": {"topic": {**TOPIC, "input": "{other}"}}}, "tasks.topic"),
        (CHAT, {"tasks": {"topic": {"kind": "classify"}}}, "tasks.topic.model"),
        (CHAT, {"tasks": {"topic": TOPIC}, "n": 2}, "n"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        (RESPONSES, {"instructions": 3}, "instructions"),
        (RESPONSES, {"text": {"format": {"type": "grammar"}}}, "text.format"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": 3}}}, "text.format.schema"),
        (RERANK, {"documents": [{"title": "a"}]}, "documents"),
        (RERANK, {"top_n": 0}, "top_n"),
        (CLASSIFY, {"labels": ["a", "a"]}, "labels"),
        (EMBEDDINGS, {"input": ["a", ""]}, "input"),
        (EMBEDDINGS, {"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(endpoint: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(DoorError) as refused:
        read_request(endpoint, {**GOOD[endpoint], **body}, decoded)
    assert refused.value.param == param


def test_token_ids_are_read_by_the_model_s_own_tokenizer() -> None:
    assert read_request(EMBEDDINGS, {"model": "m", "input": [1, 2]}, decoded).texts == ("text of ids",)
    assert (
        read_request(EMBEDDINGS, {"model": "m", "input": [[1], [2]]}, decoded).texts == ("text of ids",) * 2
    )
