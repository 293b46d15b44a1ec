"""What a chat server's refusal means, in the words of many servers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workers.engines.served.refusals import ANSWER_LENGTH, CONTEXT_LENGTH, why

SENT = (
    "model",
    "messages",
    "max_tokens",
    "temperature",
    "seed",
    "stop",
    "logprobs",
    "top_logprobs",
    "response_format",
    "chat_template_kwargs",
)


def error(message: str, **told: Any) -> str:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", **told}})


@pytest.mark.parametrize(
    ("answer", "parameter"),
    [
        # OpenAI, Azure
        (
            error(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
                "instead.",
                param="max_tokens",
                code="unsupported_parameter",
            ),
            "max_tokens",
        ),
        (
            error(
                "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
                "supported.",
                param="temperature",
                code="unsupported_value",
            ),
            "temperature",
        ),
        (
            error("Unknown parameter: 'chat_template_kwargs'.", param=None, code="unknown_parameter"),
            "chat_template_kwargs",
        ),
        (
            error("Unrecognized request argument supplied: chat_template_kwargs", param=None, code=None),
            "chat_template_kwargs",
        ),
        (
            error(
                "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
                param="response_format",
                code=None,
            ),
            "response_format",
        ),
        (error("No.", param="response_format.type", code="unsupported_value"), "response_format"),
        # A proxy that keeps the words alone
        (
            error(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                code="invalid_request_body",
            ),
            "max_tokens",
        ),
        # Validators of bodies
        (
            json.dumps(
                {
                    "detail": [
                        {
                            "type": "extra_forbidden",
                            "loc": ["body", "seed"],
                            "msg": "Extra inputs are not permitted",
                        }
                    ]
                }
            ),
            "seed",
        ),
        (
            json.dumps(
                {
                    "object": "error",
                    "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "stop"]}]},
                }
            ),
            "stop",
        ),
        # Groq, xAI, Gemini, Bedrock
        (error("property 'logprobs' is unsupported"), "logprobs"),
        (json.dumps({"code": "x", "error": "Argument not supported on this model: stop"}), "stop"),
        (
            json.dumps(
                [
                    {
                        "error": {
                            "code": 400,
                            "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.',
                            "status": "INVALID_ARGUMENT",
                        }
                    }
                ]
            ),
            "seed",
        ),
        (error("`temperature` is deprecated for this model."), "temperature"),
        ("temperature is not supported", "temperature"),
    ],
)
def test_the_parameter_that_a_server_does_not_take_is_read_from_its_refusal(
    answer: str, parameter: str
) -> None:
    for status in (400, 422):
        cell, named = why(status, answer, SENT)
        assert (cell.error, named) == ("refused", parameter)


@pytest.mark.parametrize(
    "answer",
    [
        error("It is too much.", param="messages", code="context_length_exceeded"),
        error("This model's maximum context length is 512 tokens. However, you requested 700 tokens"),
        error(
            "'max_tokens' or 'max_completion_tokens' is too large: 10000. This model's maximum context length is 512 "
            "tokens and your request has 100 input tokens (10000 > 512 - 100)."
        ),
        error("The decoder prompt (length 3001) is longer than the maximum model length of 512."),
        error("The input (600 tokens) is longer than the model's context length (512 tokens)."),
        json.dumps(
            {"error": {"code": 400, "type": "exceed_context_size_error", "message": "the request exceeds it"}}
        ),
        json.dumps({"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048."}),
        json.dumps(
            {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 3000"}
        ),
        error("prompt is too long: 200251 tokens > 200000 maximum"),
        error("input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"),
        error("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."),
        error("max_tokens must be at least 1, got -2456."),
        error("Please reduce the length of the messages or completion."),
    ],
)
def test_a_prompt_that_is_too_long_is_told_from_all_else(answer: str) -> None:
    assert why(400, answer, SENT) == (CONTEXT_LENGTH, "")


@pytest.mark.parametrize(
    "answer",
    [
        error(
            "max_tokens is too large: 9999. This model supports at most 4096 completion tokens",
            param="max_tokens",
        ),
        error("max_tokens must be less than or equal to 8192"),
    ],
)
def test_too_long_an_answer_is_not_too_long_a_prompt(answer: str) -> None:
    assert why(400, answer, SENT) == (ANSWER_LENGTH, "")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[]",
        '{"error": null}',
        '{"error": {"code": 7, "type": [], "param": {}}}',
        "[" * 5000,
        error("bad prompt: stop the seed from growing"),
        error("max_tokens: bad credit"),
        error("unknown user", param="user"),
        error("The model 'x' does not support messages"),
        # A user's text that is repeated far behind the server's own words.
        error(
            "Your request was refused by our policy. " + "It says: " + "x" * 400 + " unsupported 'max_tokens'"
        ),
    ],
)
def test_a_refusal_that_names_nothing_is_no_more_than_that(answer: str) -> None:
    cell, named = why(400, answer, SENT)
    assert (cell.error, named) == ("refused", "")
    assert cell != ANSWER_LENGTH


def test_a_parameter_that_was_not_sent_is_not_at_fault() -> None:
    answer = error("Unsupported parameter: 'seed'", param="seed", code="unsupported_parameter")
    assert why(400, answer, ("model", "messages", "max_tokens"))[1] == ""


def test_no_word_of_a_refusal_is_passed_on() -> None:
    for status in (400, 401, 403, 404, 413, 422, 451):
        assert "secret" not in why(status, error("my secret text"), SENT)[0].message
