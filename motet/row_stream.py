"""A row of an open job whose text is read as it is written: ``Feed.stream``."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from motet.errors import Late, MotetError, Overloaded, Unreachable
from motet.http import Http, error_told
from motet.protocol.envelope import unpack
from motet.results import Block, Cell, Row
from motet.text_deltas import TextDelta, ToldText

if TYPE_CHECKING:
    import httpx

#: An event's name and its data.
EventRead: TypeAlias = tuple[str, Mapping[str, Any]]
#: Seconds between two tries, where the server is away.
_AGAIN_S = 0.25
#: The server gives a sign of life every 10 s: one that is silent for so long is gone.
_SILENT_S = 30.0


class RowStream:
    """The text of one row, as it is written; and ``row``, as it was answered, once all of it has been read.

    Leaving it early, by ``close``, by ``with`` or by ``del``, is hanging up: a row that was asked with ``drop_late`` is
    given up, and its device is free within a second.
    """

    def __init__(
        self,
        http: Http,
        path: str,
        content: Callable[[float], bytes],
        specs: Mapping[str, Any],
        tasks: Sequence[str],
        *,
        within_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``content``: the request, by the seconds that are left. ``tasks``: those of which text is told."""
        self._http, self._path, self._content, self._specs = http, path, content, specs
        self._clock, self._until = clock, clock() + within_s
        self._told = {task: ToldText(task) for task in tasks}
        #: The row's merged answers; None until it is there.
        self.row: Row | None = None
        #: Index of the row in the job, once it is stored.
        self.index: int | None = None
        self._answer: httpx.Response | None = None
        self._closed = threading.Event()
        self._deltas = self._read()

    def __iter__(self) -> Iterator[TextDelta]:
        return self

    def __next__(self) -> TextDelta:
        return next(self._deltas)

    def __enter__(self) -> RowStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. From any thread: one that waits for text then finds no more. Twice is harmless."""
        self._closed.set()
        answer = self._answer
        if answer is not None:
            # Not by closing the answer: a thread that reads of it would keep the connection open.
            line = answer.extensions.get("network_stream")
            ends = line.get_extra_info("socket") if line is not None else None
            with suppress(OSError):
                if ends is not None:
                    ends.shutdown(socket.SHUT_RDWR)

    def _read(self) -> Iterator[TextDelta]:
        while self.row is None and not self._closed.is_set():
            for text in self._told.values():
                text.anew()
            try:
                for name, data in self._events():
                    yield from self._take(name, data)
            except (Unreachable, Overloaded) as error:
                if self._closed.is_set():
                    return
                pause_s = error.retry_after_s if isinstance(error, Overloaded) else _AGAIN_S
                if self._clock() + pause_s >= self._until:
                    raise
                self._closed.wait(pause_s)

    def _take(self, name: str, data: Mapping[str, Any]) -> Iterator[TextDelta]:
        text = self._told.get(data.get("task", ""))
        delta = None
        match name:
            case "landed":
                self.index = int(data["row"])
            case "delta" if text is not None:
                delta = text.more(str(data["text"]))
            case "reset" if text is not None:
                text.anew()
            case "error":
                raise error_told(data["error"])
            case "row":
                row = Row(Block.from_wire(unpack(base64.b64decode(data["frame"])), self._specs), 0)
                # Whatever was not told before.
                for task, told in self._told.items():
                    said = _text_of(row[task])
                    if said is not None and (rest := told.end(said)) is not None:
                        yield rest
                self.row = row
        if delta is not None:
            yield delta

    def _events(self) -> Iterator[EventRead]:
        """The events of one request. Raises Unreachable where they break off."""
        left_s = self._until - self._clock()
        if left_s <= 0:
            raise Late("not answered in time: ask again", stored=False)
        headers = {"Content-Type": "application/msgpack", "Accept": "text/event-stream"}
        with self._http.answering(self._path, self._content(left_s), headers, _SILENT_S) as answer:
            self._answer = answer
            try:
                yield from read_events(answer.iter_lines())
            finally:
                self._answer = None
        if self.row is None:
            raise Unreachable("the connection was lost before the row was answered; ask again with its key")


def read_events(lines: Iterator[str]) -> Iterator[EventRead]:
    """The events of a ``text/event-stream``. Raises MotetError for data that is no JSON object."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            try:
                data = json.loads(value)
            except ValueError:
                data = None
            if not isinstance(data, dict):
                raise MotetError("an event that cannot be read: is there a proxy that changes answers?")
            yield name, data


def _text_of(cell: Cell) -> str | None:
    """What a language model wrote; None where the answer is something else, or there is none."""
    return str(cell.value) if cell.ok and cell.answers.written else None
