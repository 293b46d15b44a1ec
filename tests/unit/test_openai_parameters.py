"""Every parameter of OpenAI's requests has a place in one table, which the page shows and the doors keep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from motet.protocol.manifest import Manifest
from scheduler.api.openai.likelihoods import told_logprobs
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
from scheduler.api.openai.ranking import pair_scores, ranking
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import ASKED, DOCUMENTS, OPTIONS, SERVED, asked_of, read_request

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
_SAMPLERS = {"top_k", "repetition_penalty"}
OWN = {
    CHAT: {"tasks", *_SAMPLERS},
    COMPLETIONS: _SAMPLERS,
    RERANK: set(PARAMETERS[RERANK]),
    CLASSIFY: set(PARAMETERS[CLASSIFY]),
}


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
    assert [row[OPTIONS] for row in asked.rows()] == [
        '{"draw":0,"max_tokens":5,"seed":3,"stop":["x"],"temperature":0.5}',
        '{"draw":1,"max_tokens":5,"seed":3,"stop":["x"],"temperature":0.5}',
    ]
    assert not asked.drawn
    assert read_request(CHAT, GOOD[CHAT], decoded).drawn, "their default is a temperature of 1"
    assert not read_request(CHAT, {**GOOD[CHAT], "temperature": 0}, decoded).drawn


def options_of(endpoint: str, **body: Any) -> dict[str, Any]:
    return dict(read_request(endpoint, {**GOOD[endpoint], "max_tokens": 1, **body}, decoded).options or {})


def test_samplers_are_options_and_those_that_change_nothing_are_none() -> None:
    plain = options_of(CHAT)
    neutral = {
        "top_p": 1,
        "top_k": -1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1,
    }
    assert options_of(CHAT, **neutral, logprobs=False, top_logprobs=0) == plain
    said = {
        "top_p": 0.5,
        "top_k": 5,
        "frequency_penalty": -1,
        "presence_penalty": 2,
        "repetition_penalty": 1.5,
    }
    assert options_of(COMPLETIONS, **said) == {**plain, **said}
    # The likeliest token is among the likeliest ones: only penalties change which one that is.
    assert options_of(CHAT, **said, temperature=0) == {
        "max_tokens": 1,
        "temperature": 0.0,
        "frequency_penalty": -1.0,
        "presence_penalty": 2.0,
        "repetition_penalty": 1.5,
    }
    assert options_of(CHAT, logprobs=True) == {**plain, "logprobs": 0}
    assert options_of(CHAT, logprobs=True, top_logprobs=3) == {**plain, "logprobs": 3}
    assert options_of(COMPLETIONS, logprobs=0) == {**plain, "logprobs": 0}


def test_likelihoods_are_told_in_the_form_of_each_door() -> None:
    told = [["Gr", -0.5, [["Gr", -0.5], ["Br", -1.5]]], ["\ufffd", -2.0, [["a", -1.0], ["a", -3.0]]]]
    chat = told_logprobs(CHAT, {"logprobs": told})
    assert chat == {
        "content": [
            {
                "token": "Gr",
                "logprob": -0.5,
                "bytes": [71, 114],
                "top_logprobs": [
                    {"token": "Gr", "logprob": -0.5, "bytes": [71, 114]},
                    {"token": "Br", "logprob": -1.5, "bytes": [66, 114]},
                ],
            },
            {
                "token": "\ufffd",
                "logprob": -2.0,
                "bytes": None,
                "top_logprobs": [
                    {"token": "a", "logprob": -1.0, "bytes": [97]},
                    {"token": "a", "logprob": -3.0, "bytes": [97]},
                ],
            },
        ],
        "refusal": None,
    }
    assert told_logprobs(COMPLETIONS, {"logprobs": told}) == {
        "tokens": ["Gr", "\ufffd"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"Br": -1.5, "Gr": -0.5}, {"a": -1.0}],
        "text_offset": [0, 2],
    }
    assert told_logprobs(CHAT, {"text": "x"}) is None


def test_a_part_that_is_no_text_is_refused_by_its_type() -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    with pytest.raises(DoorError, match=r"^messages\[0\]\.content\[1\]: image_url is not served") as refused:
        read_request(CHAT, {"model": "m", "messages": [{"role": "user", "content": parts}]}, decoded)
    assert refused.value.code == "unsupported_value"


def test_documents_for_a_cross_encoder_are_rows_of_some_each() -> None:
    documents = [f"document {n}" for n in range(130)] + ["x" * 100_000, "y" * 100_000]
    body = {"model": "m", "query": "hi", "documents": documents}
    by_vectors = read_request(RERANK, body, decoded)
    assert [row[ASKED] for row in by_vectors.rows()] == ["hi", *documents]
    ranker = Manifest(name="m", version="1", engine="classifier", answers="ranking")
    asked = asked_of(by_vectors, ranker)
    rows = asked.rows()
    assert [len(list(row[DOCUMENTS] or ())) for row in rows] == [64, 64, 3, 1]  # type: ignore[call-overload]
    assert {row[ASKED] for row in rows} == {"hi"}
    cells = [[{"index": n, "score": n / 200} for n in range(len(some))] for some in asked.slices()]
    scores = pair_scores(asked.slices(), cells)
    assert len(scores) == len(documents)
    assert [one["index"] for one in ranking(asked.texts, scores, {"top_n": 3, "told": False})] == [
        63,
        127,
        62,
    ]


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
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
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"top_p": 1.1}, "top_p"),
        (RESPONSES, {"top_p": 0}, "top_p"),
        (CHAT, {"top_k": 2.5}, "top_k"),
        (CHAT, {"top_k": -2}, "top_k"),
        (CHAT, {"frequency_penalty": 2.5}, "frequency_penalty"),
        (CHAT, {"presence_penalty": "much"}, "presence_penalty"),
        (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (CHAT, {"tasks": {"topic": {**TOPIC, "input": "{topic}"}}}, "tasks.topic"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (CHAT, {"stream": 1}, "stream"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (COMPLETIONS, {"stream": True, "prompt": ["a"] * 9, "n": 2}, "stream"),
        (CHAT, {"tasks": {"answer": TOPIC}}, "tasks"),
        (CHAT, {"tasks": {"topic": {**TOPIC, "input": "{other}"}}}, "tasks.topic"),
        (CHAT, {"tasks": {"topic": {"kind": "classify"}}}, "tasks.topic.model"),
        (CHAT, {"tasks": {"topic": TOPIC}, "n": 2}, "n"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
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
