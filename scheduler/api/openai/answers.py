"""The cells of a request's rows as the body that OpenAI's clients read. Pure."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.protocol.columns import STATE_MASK, CellError, Column, values
from motet.states import Skip
from scheduler.api.openai import responses
from scheduler.api.openai.likelihoods import told_logprobs
from scheduler.api.openai.parameters import CHAT, CLASSIFY, EMBEDDINGS, RERANK, RESPONSES
from scheduler.api.openai.ranking import classification, cosines, pair_scores, ranking
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import AskedRequest
from scheduler.api.result_streams import plain_rows
from scheduler.store.results import ShownTask

#: Errors of cells that the request is to blame for, with OpenAI's word where they have one.
_TOO_MANY_TOKENS = "context_length_exceeded"
_ASKED_WRONG: Mapping[str, str] = {
    "context_length": _TOO_MANY_TOKENS,
    "too_long": _TOO_MANY_TOKENS,
    "bad_messages": "invalid_value",
    "schema": "invalid_schema",
    "bad_row": "invalid_value",
    "refused": "content_filter",
}


@dataclass(frozen=True, slots=True)
class UsedTokens:
    """What a request or a batch consumed."""

    prompt: int = 0
    cached: int = 0
    written: int = 0

    def __add__(self, other: UsedTokens) -> UsedTokens:
        return UsedTokens(
            self.prompt + other.prompt, self.cached + other.cached, self.written + other.written
        )


def cell_error(error: CellError) -> DoorError:
    """Why a cell has no answer, in their words."""
    if error.error in _ASKED_WRONG:
        return DoorError(error.message, code=_ASKED_WRONG[error.error])
    status = 503 if error.error in frozenset(Skip) else 500
    return DoorError(f"{error.error}: {error.message}", code=error.error, status=status)


def cells_of(column: Column) -> list[Any]:
    """The value of each row, or its DoorError."""
    return [
        cell_error(column.errors[row]) if status & STATE_MASK else value
        for row, (status, value) in enumerate(zip(column.status, values(column, ()), strict=True))
    ]


def body_of(
    asked: AskedRequest, cells: Sequence[Any], prompt_tokens: Sequence[int], *, name: str, created: int
) -> tuple[dict[str, Any], UsedTokens]:
    """The answer's body and what it consumed, from the value of each row of a request.

    ``prompt_tokens``: of each text of embeddings, which no cell counts. ``name``: what makes its id.
    Raises the DoorError of the first row that has one.
    """
    for cell in cells:
        if isinstance(cell, DoorError):
            raise cell
    if asked.options is None:
        # A cross-encoder reads the query with each document.
        again = prompt_tokens[0] * (len(prompt_tokens) - 2) if asked.pairs and prompt_tokens else 0
        used = UsedTokens(prompt=sum(prompt_tokens) + again)
        return _body_of_vectors(asked, cells, used, name), used
    used = used_by(asked, cells)
    if asked.endpoint == RESPONSES:
        told = responses.body_of(asked, cells[0], batch_usage(used), name=name, created=created)
        return told, used
    kind, prefix = ("chat.completion", "chatcmpl") if asked.endpoint == CHAT else ("text_completion", "cmpl")
    return {
        "id": f"{prefix}-{name}",
        "object": kind,
        "created": created,
        "model": asked.model,
        "choices": [_choice(asked.endpoint, number, cell) for number, cell in enumerate(cells)],
        "usage": chat_usage(used),
        "system_fingerprint": None,
    }, used


def told_beside(tasks: Sequence[ShownTask], columns: Sequence[Column]) -> dict[str, Any]:
    """What the tasks beside a chat answered, from the columns of its one row: beside the body of the chat."""
    if not tasks:
        return {}
    [row] = plain_rows(tasks, columns, 0, {})
    return {"x_motet": {"tasks": {task.name: row[task.name] for task in tasks}, "errors": row["errors"]}}


def used_by(asked: AskedRequest, cells: Sequence[Any]) -> UsedTokens:
    """What written answers consumed."""
    used = UsedTokens()
    for number, cell in enumerate(cells):
        read, cached, written = cell["usage"]
        # The choices of a text have its prompt in common, which is told once.
        first = number % asked.choices == 0
        used += UsedTokens(read if first else 0, cached if first else 0, written)
    return used


def chat_usage(used: UsedTokens) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.written,
        "total_tokens": used.prompt + used.written,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }


def _body_of_vectors(
    asked: AskedRequest, cells: Sequence[Any], used: UsedTokens, name: str
) -> dict[str, Any]:
    usage = {"prompt_tokens": used.prompt, "total_tokens": used.prompt}
    if asked.endpoint == RERANK:
        scores = pair_scores(asked.slices(), cells) if asked.pairs else cosines(cells)
        results = ranking(asked.texts, scores, asked.about)
        return {"id": f"rerank-{name}", "model": asked.model, "results": results, "usage": usage}
    if asked.endpoint == CLASSIFY:
        return {
            "id": f"classify-{name}",
            "object": "list",
            "model": asked.model,
            "data": classification(asked.texts, cells, asked.about),
            "usage": usage,
        }
    assert asked.endpoint == EMBEDDINGS
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _vector(cell, in_base64=asked.base64)}
            for i, cell in enumerate(cells)
        ],
        "model": asked.model,
        "usage": usage,
    }


def _choice(endpoint: str, number: int, cell: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": cell["text"], "refusal": None}}
        if endpoint == CHAT
        else {"text": cell["text"]}
    )
    logprobs = told_logprobs(endpoint, cell)
    return {"index": number, **said, "logprobs": logprobs, "finish_reason": cell["finish"]}


def _vector(cell: Any, *, in_base64: bool) -> Any:
    if not in_base64:
        return [float(x) for x in cell]
    floats = array("f", cell)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode()


def batch_usage(used: UsedTokens) -> dict[str, Any]:
    """Tokens as a batch tells them."""
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached},
        "output_tokens": used.written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt + used.written,
    }
