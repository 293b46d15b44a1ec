"""A chat or a completion in chunks as OpenAI's clients read them, and what of an answer was sent. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from scheduler.api.openai.answers import batch_usage, chat_usage, used_by
from scheduler.api.openai.likelihoods import told_logprobs
from scheduler.api.openai.parameters import CHAT, RESPONSES
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import AskedRequest
from scheduler.api.openai.responses import ResponseEvents
from scheduler.api.streaming import SentEvent


class SentText:
    """What of one answer was sent. It cannot be taken back: another attempt must write the same, or the stream ends."""

    def __init__(self) -> None:
        self._sent = ""
        #: Characters of this attempt that were heard.
        self._heard = 0

    def begin_again(self) -> None:
        """Another attempt writes the answer from its beginning."""
        self._heard = 0

    def write(self, text: str) -> str:
        """What is to be sent of the text that this attempt wrote next. Raises DoorError where it differs."""
        known = self._sent[self._heard : self._heard + len(text)]
        if not text.startswith(known):
            raise _changed()
        self._heard += len(text)
        fresh = text[len(known) :]
        self._sent += fresh
        return fresh

    def end(self, whole: str) -> str:
        """What is to be sent of the whole answer. Raises DoorError where it differs."""
        if not whole.startswith(self._sent):
            raise _changed()
        return whole[len(self._sent) :]


def _changed() -> DoorError:
    return DoorError(
        "a worker was lost and another one answers otherwise; send the request again",
        code="answer_changed",
        status=503,
    )


class EventWire(Protocol):
    """The events of one wire."""

    def begin(self) -> Iterator[SentEvent]: ...

    def write(self, choice: int, text: str) -> Iterator[SentEvent]: ...

    def finish(self, choice: int, cell: Mapping[str, Any]) -> Iterator[SentEvent]: ...

    def end(self, cells: Sequence[Mapping[str, Any]], beside: Mapping[str, Any]) -> Iterator[SentEvent]: ...

    def fail(self, error: DoorError) -> Iterator[SentEvent]: ...


def wire_of(asked: AskedRequest, *, name: str, created: int) -> EventWire:
    if asked.endpoint == RESPONSES:
        return _Responding(asked, name, created)
    return _Chunks(asked, name, created)


class _Chunks:
    def __init__(self, asked: AskedRequest, name: str, created: int) -> None:
        self._asked = asked
        self._chat = asked.endpoint == CHAT
        kind, prefix = ("chat.completion.chunk", "chatcmpl") if self._chat else ("text_completion", "cmpl")
        self._head = {
            "id": f"{prefix}-{name}",
            "object": kind,
            "created": created,
            "model": asked.model,
            "system_fingerprint": None,
        }
        # Said in every chunk where it is asked for at all.
        self._usage = {"usage": None} if asked.usage_told else {}

    def begin(self) -> Iterator[SentEvent]:
        if self._chat:
            for choice in range(len(self._asked.rows())):
                yield self._chunk(choice, {"role": "assistant", "content": ""}, None)

    def write(self, choice: int, text: str) -> Iterator[SentEvent]:
        yield self._chunk(choice, {"content": text}, None)

    def finish(self, choice: int, cell: Mapping[str, Any]) -> Iterator[SentEvent]:
        # All of them at the end: what a worker says while it writes is text alone.
        yield self._chunk(choice, {}, cell["finish"], told_logprobs(self._asked.endpoint, cell))

    def end(self, cells: Sequence[Mapping[str, Any]], beside: Mapping[str, Any]) -> Iterator[SentEvent]:
        if self._asked.usage_told or beside:
            usage = {"usage": chat_usage(used_by(self._asked, cells))} if self._asked.usage_told else {}
            yield "", {**self._head, "choices": [], **usage, **beside}
        yield "", "[DONE]"

    def fail(self, error: DoorError) -> Iterator[SentEvent]:
        yield "", {"error": error.body()}

    def _chunk(
        self,
        choice: int,
        delta: Mapping[str, Any],
        finish: str | None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> SentEvent:
        said = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        one = {"index": choice, **said, "logprobs": logprobs, "finish_reason": finish}
        return "", {**self._head, "choices": [one], **self._usage}


class _Responding:
    def __init__(self, asked: AskedRequest, name: str, created: int) -> None:
        self._asked, self._events = asked, ResponseEvents(asked, name=name, created=created)

    def begin(self) -> Iterator[SentEvent]:
        return self._events.begin()

    def write(self, choice: int, text: str) -> Iterator[SentEvent]:
        return self._events.write(text)

    def finish(self, choice: int, cell: Mapping[str, Any]) -> Iterator[SentEvent]:
        return iter(())

    def end(self, cells: Sequence[Mapping[str, Any]], beside: Mapping[str, Any]) -> Iterator[SentEvent]:
        return self._events.end(cells[0], batch_usage(used_by(self._asked, cells)))

    def fail(self, error: DoorError) -> Iterator[SentEvent]:
        return self._events.fail(error.body())
