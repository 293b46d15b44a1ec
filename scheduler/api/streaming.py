"""Reading along: text of a language model as it is written, from the worker to whoever asked for the row.

A side channel that is lossy by design. Workers say what they write on the channel of the API process that landed the row
(`Ears`); each answer's text is put in order (`ReadAlong`), and told as events (`EventStream`). The last event is the row from
Postgres, and it alone is the truth: where words are lost, or Redis is away, there are fewer deltas, and nothing else.

Whoever serves another wire (an OpenAI door) takes the events of ``LiveFeed.stream`` as they are::

    events = feed.stream(part, size, key, digest, within_s=60, drop_late=True)
    async with aclosing(events):          # closing them is hanging up: with drop_late the device is free within a second
        async for event in events:
            match event:
                case AskLanded(): ...     # first: from here on the row is stored; errors before it are plain refusals
                case AskDelta(): ...      # text of a task, behind what was told of it before
                case AskReset(): ...      # all that was told of a task is void: another attempt begins anew
                case AskAnswered(): ...   # last: the merged cells
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from motet.protocol.transport import SayListener
from motet.protocol.wire import Said

#: Longest that an ask waits for the channel to be open, in seconds: once in the life of a process.
_OPENS_S = 1.0
#: Words kept of rows that nobody reads yet: a worker may be faster than the thread that has just landed the row.
_EARLY = 256
#: Seconds without an event after which a comment is sent, so that no proxy takes the connection for dead.
_SIGN_OF_LIFE_S = 10.0
EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class AskLanded:
    """The row is stored, and has this index in the job."""

    row: int


@dataclass(frozen=True, slots=True)
class AskDelta:
    """Text that was written of a task's answer, behind the ``begins`` characters that were told before."""

    task: str
    begins: int
    text: str


@dataclass(frozen=True, slots=True)
class AskReset:
    """What was told of this task is void: its worker was lost, and another one writes the answer from its beginning."""

    task: str


class ReadAlong:
    """The answers of one row as they are told: each a beginning of its text, or void. Pure."""

    def __init__(self) -> None:
        #: Task -> its newest attempt, and the characters that were told of it.
        self._told: dict[str, tuple[tuple[int, int], int]] = {}

    def hear(self, said: Said) -> list[AskDelta | AskReset]:
        """What it adds. Words of older attempts, or behind a gap, add nothing."""
        events: list[AskDelta | AskReset] = []
        attempt, told = self._told.get(said.task, (said.attempt, 0))
        if said.attempt < attempt:
            return events
        if said.attempt > attempt:
            if told:
                events.append(AskReset(said.task))
            attempt, told = said.attempt, 0
        fresh = said.text[told - said.begins :] if said.begins <= told else ""
        if fresh:
            events.append(AskDelta(said.task, told, fresh))
        self._told[said.task] = (attempt, told + len(fresh))
        return events


#: (job, row).
_Row: TypeAlias = tuple[str, int]


class Ears:
    """What workers say to this process, for whoever reads along here. Used from the event loop; one thread listens."""

    def __init__(self, redis_url: str) -> None:
        """``redis_url``: "" where there is none; then nothing is heard."""
        #: What workers are told to say it to.
        self.name = secrets.token_hex(8)
        self._listener = SayListener(redis_url, self.name) if redis_url else None
        self._thread: threading.Thread | None = None
        self._readers: dict[_Row, set[asyncio.Queue[Said | None]]] = {}
        self._early: deque[Said] = deque(maxlen=_EARLY)

    async def open(self) -> None:
        """Begin to listen, if that is not done yet, and wait a moment until that is so."""
        listener = self._listener
        if listener is None or self._thread is not None:
            return
        loop = asyncio.get_running_loop()

        def heard(words: Sequence[Said]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(self._hand_out, words)

        self._thread = threading.Thread(target=listener.run, args=(heard,), name="says", daemon=True)
        self._thread.start()
        await asyncio.to_thread(listener.listening.wait, _OPENS_S)

    @contextmanager
    def of(self, job: str, row: int) -> Iterator[asyncio.Queue[Said | None]]:
        """What is said of a row, also just before. Whoever reads may put None there, as an end."""
        words: asyncio.Queue[Said | None] = asyncio.Queue()
        for said in self._early:
            if (said.job, said.row) == (job, row):
                words.put_nowait(said)
        readers = self._readers.setdefault((job, row), set())
        readers.add(words)
        try:
            yield words
        finally:
            readers.discard(words)
            if not readers:
                self._readers.pop((job, row), None)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _hand_out(self, words: Sequence[Said]) -> None:
        for said in words:
            readers = self._readers.get((said.job, said.row))
            if readers is None:
                self._early.append(said)
                continue
            for reader in readers:
                reader.put_nowait(said)


#: An event's name, "" for one without, and its data: JSON, or a word that is none.
SentEvent: TypeAlias = tuple[str, Mapping[str, Any] | str]


class EventStream(Response):
    """Events as they come (``text/event-stream``), until they end or whoever reads them hangs up."""

    media_type = EVENTS

    def __init__(self, events: AsyncGenerator[SentEvent, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        # Its length is not known.
        del self.headers["content-length"]
        self._events = events
        #: On the loop's clock: when something was sent last.
        self._told_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        telling = asyncio.ensure_future(self._tell(send))
        gone = asyncio.ensure_future(hung_up(receive))
        try:
            await asyncio.wait({telling, gone}, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
        finally:
            for task in (telling, gone):
                task.cancel()
            await asyncio.wait({telling, gone})

    async def _tell(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Beside the events and not between them: a wait for each with a time limit is a task for each.
        signs = asyncio.ensure_future(self._give_signs_of_life(send))
        try:
            async for name, data in self._events:
                self._told_at = asyncio.get_running_loop().time()
                said = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
                head = f"event: {name}\n" if name else ""
                body = f"{head}data: {said}\n\n".encode("utf-8", "replace")
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            signs.cancel()
            await asyncio.wait({signs})
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _give_signs_of_life(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._told_at = loop.time()
        while True:
            await asyncio.sleep(self._told_at + _SIGN_OF_LIFE_S - loop.time())
            if loop.time() - self._told_at >= _SIGN_OF_LIFE_S:
                self._told_at = loop.time()
                await send({"type": "http.response.body", "body": b": it goes on\n\n", "more_body": True})


async def hung_up(receive: Receive) -> None:
    """Wait until the caller is gone. Its body must have been read: what is received next is that."""
    while (await receive())["type"] != "http.disconnect":
        pass
