"""A response as OpenAI's clients read it: the body of the whole, and its parts while it is written. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scheduler.api.openai.requests import AskedRequest


def body_of(
    asked: AskedRequest, cell: Mapping[str, Any], usage: Mapping[str, Any], *, name: str, created: int
) -> dict[str, Any]:
    """The whole response. ``usage``: tokens, as responses tell them."""
    whole = cell["finish"] != "length"
    return {
        **_head(asked, name, created),
        "status": "completed" if whole else "incomplete",
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "output": [_message(name, cell["text"], "completed" if whole else "incomplete")],
        "usage": dict(usage),
    }


class ResponseEvents:
    """A response's events, each (its type, its data)."""

    def __init__(self, asked: AskedRequest, *, name: str, created: int) -> None:
        self._asked, self._name, self._created = asked, name, created
        self._number = 0
        self._at = {"item_id": f"msg_{name}", "output_index": 0, "content_index": 0}

    def begin(self) -> Iterator[tuple[str, dict[str, Any]]]:
        empty = {**_head(self._asked, self._name, self._created), "status": "in_progress"}
        empty |= {"incomplete_details": None, "output": [], "usage": None}
        yield self._event("response.created", response=empty)
        yield self._event("response.in_progress", response=empty)
        item = {**_message(self._name, "", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._at, part=_text(""))

    def write(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        yield self._event("response.output_text.delta", **self._at, delta=text, logprobs=[])

    def end(self, cell: Mapping[str, Any], usage: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        text = cell["text"]
        told = body_of(self._asked, cell, usage, name=self._name, created=self._created)
        yield self._event("response.output_text.done", **self._at, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._at, part=_text(text))
        yield self._event("response.output_item.done", output_index=0, item=told["output"][0])
        yield self._event(f"response.{told['status']}", response=told)

    def fail(self, error: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        told = {name: error.get(name) for name in ("message", "param", "code")}
        yield self._event("error", **told)

    def _event(self, kind: str, **data: Any) -> tuple[str, dict[str, Any]]:
        number, self._number = self._number, self._number + 1
        return kind, {"type": kind, "sequence_number": number, **data}


def _head(asked: AskedRequest, name: str, created: int) -> dict[str, Any]:
    """What is known before anything is written."""
    about = asked.about
    temperature, top_p = about.get("temperature"), about.get("top_p")
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "model": asked.model,
        "error": None,
        "instructions": about.get("instructions"),
        "max_output_tokens": about.get("max_output_tokens"),
        "metadata": {},
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if temperature is None else temperature,
        "text": about.get("text") or {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0 if top_p is None else top_p,
        "truncation": "disabled",
    }


def _message(name: str, text: str, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{name}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text(text)],
    }


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
