"""A task of one row, as a server is asked it."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import queue
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from motet.protocol.columns import CellError
from motet.protocol.wire import TaskOrder
from workers.engine import Delta, Ended
from workers.engines.newest import Newest
from workers.engines.prompts import NOTHING, messages_of, plain
from workers.engines.served.chat_server import ChatServer, Spending
from workers.engines.thoughts import switches

#: Label priors kept for one server. Fewer are asked for again; each is a few numbers.
PRIORS = 1024


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A row as it was handed in: ``Prepared.inputs``."""

    text: str
    fields: Mapping[str, str]
    #: Of the row in its job.
    index: int


@dataclass(slots=True)
class Served:
    """A server, and the rows that it works on."""

    server: ChatServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    #: Ticket -> tasks asked, and the row on the loop.
    rows: dict[Hashable, tuple[int, Future[None]]] = field(default_factory=dict)
    ended: queue.SimpleQueue[tuple[Future[None], Ended]] = field(default_factory=queue.SimpleQueue)
    #: What was written of rows that are told step by step.
    deltas: queue.SimpleQueue[tuple[Future[None], Delta]] = field(default_factory=queue.SimpleQueue)
    #: Tenant, task, the labels where they are a row's own -> how likely they are without any text.
    priors: Newest[tuple[str, ...], tuple[float, ...]] = field(default_factory=lambda: Newest(PRIORS))
    #: Of a server of our own: what keeps its prefix cache apart by tenant. "": a server that may not know of this.
    secret: str = ""
    #: Numbers the rows in the order in which they were handed in.
    turns: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def own(self, tenant: str, turn: int) -> dict[str, Any]:
        """vLLM's fields that only a server of our own is told.

        By what a request's prefix cache is shared: nobody learns from the time of an answer what other tenants have asked
        (its documentation of automatic prefix caching). And who goes first there. Many connections bring requests in
        another order than that in which rows share a prefix, and a small cache has forgotten it by then.
        """
        if not self.secret:
            return {}
        salt = hmac.new(self.secret.encode(), tenant.encode(), "sha256").hexdigest()
        return {"cache_salt": salt, "priority": turn}

    @property
    def asked(self) -> int:
        return sum(tasks for tasks, _ in self.rows.values())


@dataclass(frozen=True, slots=True)
class ServedQuestion:
    """One task for one row."""

    handle: Served
    task: TaskOrder
    asking: RowRequest
    urgent: bool
    #: The row's number among those that were handed in.
    turn: int
    tenant: str
    spending: Spending
    #: Takes what was written since the last time; None where nobody asks.
    tell: Callable[[str], None] | None = None
    #: Why it cannot be asked.
    refused: CellError | None = None

    @property
    def server(self) -> ChatServer:
        return self.handle.server

    def messages(self, share: float = 1.0) -> list[dict[str, str]]:
        """What is asked, about this share of the text."""
        text = self.asking.text
        text = text if share == 1 else text[: int(len(text) * share)]
        return plain(messages_of(self.task.spec, text, self.asking.fields))

    def empty(self) -> list[dict[str, str]]:
        """The same without any text."""
        return plain(messages_of(self.task.spec, NOTHING, dict.fromkeys(self.asking.fields, NOTHING)))

    @property
    def template(self) -> dict[str, Any]:
        """What the server's chat template is told, as vLLM, SGLang and llama.cpp take it."""
        told = switches(self.task.spec)
        return {"chat_template_kwargs": told} if told else {}

    @property
    def own(self) -> dict[str, Any]:
        """What only a server of our own is told."""
        # What somebody waits for goes before all bulk work.
        return self.handle.own(self.tenant, 0 if self.urgent else self.turn)

    async def chat(
        self, messages: Sequence[Mapping[str, str]], *, spare: Collection[str], **options: Any
    ) -> dict[str, Any]:
        # A server without this switch has a model that thinks or not; its thoughts are cut off in any case.
        spare = {*spare, "chat_template_kwargs"}
        return await self.server.chat(
            messages,
            self.spending,
            urgent=self.urgent,
            spare=spare,
            **self.template,
            **self.own,
            **options,
        )
