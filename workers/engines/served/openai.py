"""A language model on any OpenAI-compatible server: an existing vLLM, SGLang, llama.cpp, or one that is rented.

An administrator registers its address; workers keep a bounded number of requests in flight. The prompts of one row are
sent one after the other with what they share in front, so that the server's own prefix cache serves them. The key is in
a variable of the workers; a manifest only names it.

Choose: a server that tokenises chats and tells the likelihood of given tokens (vLLM) scores every label, as the torch
engine does. Of any other one the first token's likelihoods are taken, each for the labels that begin with it, and where
there are none, the label that was written gets the score 1. Those two are not calibrated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from motet.protocol.columns import OK, STATE_MASK, TRUNCATED, CellError, Column
from motet.protocol.manifest import KEY_ENV, Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, Delta, Ended, Pass, Prepared, Step
from workers.engines.choice import choice_column
from workers.engines.function import json_column
from workers.engines.prompts import BAD_MESSAGES, BadLabels, BadMessages, messages_of, row_spec
from workers.engines.served.chat_server import (
    ANSWER_S,
    LONGEST_PAUSE_S,
    TRIES,
    ChatServer,
    RequestRefused,
    Spending,
)
from workers.engines.served.label_scores import label_scores
from workers.engines.served.question import RowRequest, Served, ServedQuestion
from workers.engines.served.refusals import CONTEXT_LENGTH
from workers.engines.served.writing import MENDING, written_value
from workers.run.assemble import assemble

#: Requests are let in beyond the server's decode slots by this share of them, so that none is ever free.
AHEAD = 1 / 8
#: Seconds that a step waits for an answer.
STEP_S = 0.02
#: A text that may be cut is cut to these shares until it fits.
CUTS = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
#: UTF-8 bytes of a token, for predictions.
BYTES_PER_TOKEN = 4


class OpenAIEngine:
    """Answers generate, chat, choose and extract."""

    #: All rows inside may be at a request that is tried again and again, and each of them may be asked anew.
    longest_wait_s = (1 + MENDING) * TRIES * (ANSWER_S + LONGEST_PAUSE_S)

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return 0

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Served:
        source = model.source
        if "url" not in source or "model" not in source:
            raise CannotLoad(f"{model.ref} names no server")
        key = ""
        if named := source.get("key_env", ""):
            if not KEY_ENV.fullmatch(named):
                raise CannotLoad(f"{model.ref} names {named!r}; only MOTET_KEY_… may hold a server's key")
            if not (key := os.environ.get(named, "")):
                raise CannotLoad(f"this worker has no {named}, which holds the key of {model.ref}")
        return connect(source["url"], source["model"], key=key, in_flight=int(source.get("in_flight", "16")))

    def attach(self, handle: Served, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if task.manifest.trunk_model:
            raise CannotLoad(f"{task.manifest.ref}: a server's model takes no adapters from here")

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        return [self._prepared(pass_, row, text) for row, text in enumerate(texts)]

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        handle: Served = pass_.handle
        if not urgent and handle.asked >= handle.server.in_flight * (1 + AHEAD):
            return False
        # The row must know its own future before it can end.
        known: Future[Future[None]] = Future()
        future = asyncio.run_coroutine_threadsafe(
            _row(handle, pass_, row, ticket, urgent, next(handle.turns), known), handle.loop
        )
        known.set_result(future)
        handle.rows[ticket] = (len(pass_.tasks), future)
        return True

    def step(self, handle: Served, tokens: int) -> Step:
        """Wait a moment for answers; the server does the rest."""
        ended = []
        with contextlib.suppress(queue.Empty):
            if handle.rows:
                ended.append(handle.ended.get(timeout=STEP_S))
            while True:
                ended.append(handle.ended.get_nowait())
        # All that was told of a row that has ended was told before.
        told = [handle.deltas.get_nowait() for _ in range(handle.deltas.qsize())]
        # One that was forgotten may have ended at the same time.
        mine = [e for future, e in ended if handle.rows.get(e.ticket, (0, None))[1] is future]
        deltas = [d for future, d in told if handle.rows.get(d.ticket, (0, None))[1] is future]
        for one in mine:
            del handle.rows[one.ticket]
        spent = [of_task for one in mine for of_task in one.spent.values()]
        computed = sum(read - cached + written for read, cached, written, _ in spent)
        taken = handle.server.gate.taken / handle.server.in_flight
        return Step(mine, computed, min(1.0, taken) if handle.rows or mine else None, deltas)

    def abort(self, handle: Served, tickets: Collection[Hashable]) -> None:
        """Closes their connections: servers then stop writing."""
        for ticket in tickets:
            if ticket in handle.rows:
                handle.rows.pop(ticket)[1].cancel()

    def unload(self, handle: Served) -> None:
        self.abort(handle, list(handle.rows))
        asyncio.run_coroutine_threadsafe(handle.server.close(), handle.loop).result(10)
        handle.loop.call_soon_threadsafe(handle.loop.stop)
        handle.thread.join(10)

    def _prepared(self, pass_: Pass, row: int, text: str) -> Prepared | CellError:
        fields = {name: column[row] for name, column in pass_.fields.items()}
        said = set()
        try:
            for task in pass_.tasks:
                said |= {part.text for m in messages_of(task.spec, text, fields) for part in m.parts}
        except BadMessages:
            return BAD_MESSAGES
        index = pass_.indices[row] if row < len(pass_.indices) else row
        length = sum(len(one.encode("utf-8", "replace")) for one in said) // BYTES_PER_TOKEN
        return Prepared(row, max(1, length), False, RowRequest(text, fields, index))


def connect(url: str, model: str, *, key: str = "", in_flight: int = 16) -> Served:
    """A server behind an event loop of its own. Nothing is asked of it yet."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="motet-served", daemon=True)
    thread.start()

    async def open_server() -> ChatServer:
        return ChatServer(url=url.rstrip("/"), model=model, key=key, in_flight=in_flight)

    return Served(asyncio.run_coroutine_threadsafe(open_server(), loop).result(30), loop, thread)


# -- on the loop


async def _row(
    handle: Served,
    pass_: Pass,
    row: Prepared,
    ticket: Hashable,
    urgent: bool,
    turn: int,
    known: Future[Future[None]],
) -> None:
    place = await asyncio.wrap_future(known)

    def tells(task: TaskOrder) -> Callable[[str], None] | None:
        if not pass_.deltas or task.spec["kind"] == "choose" or task.spec.get("schema") is not None:
            return None
        return lambda text: handle.deltas.put((place, Delta(ticket, task.name, text))) if text else None

    def question(task: TaskOrder) -> ServedQuestion:
        """With what the row says of its options for itself, and its labels."""
        refused = None
        try:
            task = replace(task, spec=row_spec(task.spec, row.inputs.fields))
        except BadLabels as bad:
            refused = bad.cell
        return ServedQuestion(
            handle, task, row.inputs, urgent, turn, pass_.tenant, Spending(), tells(task), refused=refused
        )

    questions = [question(task) for task in pass_.tasks]
    # Begun in this order, and so sent one after the other.
    columns = await asyncio.gather(*map(_column, questions))
    spent = {}
    for q in questions:
        s = q.spending
        spent[q.task.name] = (s.tokens_in, s.cached, s.tokens_out, s.seconds)
    ended = Ended(ticket, {q.task.name: c for q, c in zip(questions, columns, strict=True)}, spent)
    handle.ended.put((place, ended))


async def _column(q: ServedQuestion) -> Column:
    """The task's column of one row. Whatever goes wrong is its error."""
    if q.refused is not None:
        return _failed(q, q.refused)
    shares = (
        1.0,
        *(CUTS if q.task.spec.get("too_long") == "truncate" and q.task.spec["kind"] != "chat" else ()),
    )
    for share in shares:
        try:
            column = await _answer(q, share)
        except RequestRefused as refused:
            if refused.cell != CONTEXT_LENGTH or share == shares[-1]:
                return _failed(q, refused.cell)
        except Exception as error:  # noqa: BLE001 - a stranger's answer: the row's own error
            return _failed(
                q, CellError("engine", f"the server's answer cannot be read: {type(error).__name__}")
            )
        else:
            return column if share == 1 else _marked(column)
    raise AssertionError("the last share returns")


async def _answer(q: ServedQuestion, share: float) -> Column:
    if q.task.spec["kind"] == "choose":
        return choice_column(await label_scores(q, share), q.task.spec)
    return json_column([await written_value(q, share)])


# -- columns of one row


def _failed(q: ServedQuestion, cell: CellError) -> Column:
    return assemble(q.task.column_kind, 1, [], {0: cell})


def _marked(column: Column) -> Column:
    """The same, said of a text that was cut."""
    if column.status[0] & STATE_MASK != OK:
        return column
    return Column(kind=column.kind, status=bytes([column.status[0] | TRUNCATED]), arrays=column.arrays)
