"""Answers told as they are written: each row of a request read along, in one stream of OpenAI's events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any
from uuid import UUID

from starlette.responses import Response

from scheduler.api.live import AskAnswered, AskEvent, LiveFeed
from scheduler.api.openai.answers import cells_of
from scheduler.api.openai.beside import ANSWER
from scheduler.api.openai.chunks import SentText, wire_of
from scheduler.api.openai.landing import WITHIN_S, beside, part_of, through_door
from scheduler.api.openai.refusals import DoorError, as_door_error
from scheduler.api.openai.requests import AskedRequest
from scheduler.api.refusals import EXPECTED
from scheduler.api.resources import Resources
from scheduler.api.streaming import AskDelta, AskReset, EventStream, SentEvent
from scheduler.blocks import keyed
from scheduler.store.registry import Registered

#: (which of the request's rows, what is told of it)
_RowEvent = tuple[int, AskEvent]


async def streamed(use: Resources, tenant: UUID, asked: AskedRequest, model: Registered) -> Response:
    """The answer as events. What goes wrong before a row is stored is refused as without them."""

    async def ask(feed: LiveFeed) -> Response:
        events = _metered(use, feed, asked)
        try:
            await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return EventStream(_told(feed, asked, events))

    return await through_door(use, tenant, asked, model, ask)


async def _metered(use: Resources, feed: LiveFeed, asked: AskedRequest) -> AsyncGenerator[_RowEvent, None]:
    rows = asked.rows()
    streams = []
    for row in rows:
        part, size = part_of([row])
        key = keyed(feed.job.secret, secrets.token_bytes(32))
        streams.append(feed.stream(part, size, key, key, within_s=WITHIN_S, drop_late=True))
    with use.feeds.meter.ask(feed.job.id, len(rows)):
        async with aclosing(_together(streams)) as events:
            async for event in events:
                yield event


async def _together(streams: Sequence[AsyncGenerator[AskEvent, None]]) -> AsyncGenerator[_RowEvent, None]:
    """What all of them tell, until each has told its answer. Closing it closes them. Raises the first error."""
    told: asyncio.Queue[tuple[int, AskEvent | Exception]] = asyncio.Queue()

    async def read(number: int, events: AsyncGenerator[AskEvent, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    told.put_nowait((number, event))
        except Exception as error:  # noqa: BLE001 - whoever reads them raises it
            told.put_nowait((number, error))

    readers = [asyncio.ensure_future(read(number, events)) for number, events in enumerate(streams)]
    left = len(readers)
    try:
        while left:
            number, event = await told.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, AskAnswered)
            yield number, event
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)


async def _told(
    feed: LiveFeed, asked: AskedRequest, events: AsyncGenerator[_RowEvent, None]
) -> AsyncGenerator[SentEvent, None]:
    wire = wire_of(asked, name=secrets.token_hex(12), created=int(time.time()))
    sent = [SentText() for _ in asked.rows()]
    cells: list[Any] = [None] * len(sent)
    answer: AskAnswered | None = None
    number_of_answer = next(task.number for task in feed.tasks if task.name == ANSWER)
    try:
        for one in wire.begin():
            yield one
        async for number, event in events:
            text = ""
            match event:
                case AskDelta(task=task, text=written) if task == ANSWER:
                    text = sent[number].write(written)
                case AskReset(task=task) if task == ANSWER:
                    sent[number].begin_again()
                case AskAnswered():
                    answer = event
                    [cell] = cells_of(event.columns[number_of_answer])
                    if isinstance(cell, DoorError):
                        raise cell
                    cells[number] = cell
                    text = sent[number].end(cell["text"])
            if text:
                for one in wire.write(number, text):
                    yield one
            if isinstance(event, AskAnswered):
                for one in wire.finish(number, cells[number]):
                    yield one
        assert answer is not None, "a stream ends with an answer, or raises"
        for one in wire.end(cells, beside(asked, feed, answer)):
            yield one
    except EXPECTED as error:
        for one in wire.fail(as_door_error(error)):
            yield one
    finally:
        await events.aclose()
