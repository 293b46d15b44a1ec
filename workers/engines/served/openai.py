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
import hashlib
import hmac
import itertools
import json
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from motet.protocol.columns import OK, STATE_MASK, TRUNCATED, CellError, Column
from motet.protocol.manifest import KEY_ENV, Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, Delta, Ended, Pass, Prepared, Step
from workers.engines.choice import choice_column
from workers.engines.function import json_column
from workers.engines.newest import Newest
from workers.engines.prompts import (
    BAD_MESSAGES,
    NOTHING,
    OWN_LABELS,
    BadLabels,
    BadMessages,
    counted,
    labels_of,
    messages_of,
    plain,
    row_spec,
)
from workers.engines.schemas import violation
from workers.engines.served.chat_server import (
    ANSWER_S,
    LONGEST_PAUSE_S,
    TRIES,
    ChatServer,
    RequestRefused,
    Spending,
)
from workers.engines.served.likelihoods import told_likelihoods
from workers.engines.served.naming import beginnings, named
from workers.engines.served.refusals import ANSWER_LENGTH, CONTEXT_LENGTH
from workers.engines.telling import Teller
from workers.engines.thoughts import switches, without_thoughts
from workers.run.assemble import assemble

#: Requests are let in beyond the server's decode slots by this share of them, so that none is ever free.
AHEAD = 1 / 8
#: Seconds that a step waits for an answer.
STEP_S = 0.02
#: More tries where an answer breaks its schema: a server that constrains needs none.
MENDING = 2
#: A prompt without room for its whole answer is asked for less of one; a text that may be cut, cut to these shares.
LESS, CUTS = (1, 1 / 4, 1 / 16, 0), (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
#: The temperature of a server that is told none: a task that asks for it needs not say so.
SERVERS_TEMPERATURE = 1.0
#: Tokens for the thoughts of a model that thinks before it names a label, whatever it is told: as many as fit.
THOUGHT_TOKENS = (4096, 1024, 256)
#: Label priors kept for one server. Fewer are asked for again; each is a few numbers.
PRIORS = 1024
#: UTF-8 bytes of a token, for predictions.
BYTES_PER_TOKEN = 4
#: What a row may say of how tokens are drawn; the last two are vLLM's own.
SAMPLING = ("top_p", "frequency_penalty", "presence_penalty", "top_k", "repetition_penalty")
#: Log-likelihood of a label that is not even among the likeliest tokens, below the last of those.
UNSEEN = -2.0


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A row as it was handed in: ``Prepared.inputs``."""

    text: str
    fields: Mapping[str, str]
    #: Of the row in its job.
    index: int


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """What a server's model wrote."""

    text: str
    finish: str
    #: As ``counted`` takes them; None where they are not asked for.
    likelihoods: Sequence[Any] | None = None


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


@dataclass(frozen=True, slots=True)
class _Question:
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

    def question(task: TaskOrder) -> _Question:
        """With what the row says of its options for itself, and its labels."""
        refused = None
        try:
            task = replace(task, spec=row_spec(task.spec, row.inputs.fields))
        except BadLabels as bad:
            refused = bad.cell
        return _Question(
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


async def _column(q: _Question) -> Column:
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


async def _answer(q: _Question, share: float) -> Column:
    if q.task.spec["kind"] == "choose":
        scores = await _label_scores(q, share)
        return choice_column(scores, q.task.spec)
    if q.task.spec.get("options"):
        return json_column([await _counted(q, share)])
    if q.task.spec.get("schema") is not None:
        return json_column([await _by_schema(q, share)])
    teller = Teller(q.task.spec.get("stop") or ())
    said = await _written(q, q.messages(share), told=_told_by(q, teller))
    if q.tell is not None:
        q.tell(teller.rest(said.text.strip()))
    return json_column([{"text": said.text.strip(), "finish": said.finish}])


async def _counted(q: _Question, share: float) -> dict[str, Any]:
    """The answer of a row with options of its own."""
    schema = q.task.spec.get("schema")
    if q.task.spec.get("raw"):
        said = await _continued(q)
    elif schema is not None:
        said = await _constrained(q, q.messages(share), schema)
    else:
        teller = Teller(q.task.spec.get("stop") or ())
        said = await _written(q, q.messages(share), told=_told_by(q, teller))
        if q.tell is not None:
            q.tell(teller.rest(said.text.strip()))
    spent = q.spending
    used = (spent.tokens_in, spent.cached, spent.tokens_out)
    return counted(said.text.strip(), said.finish, used, said.likelihoods)


async def _continued(q: _Question) -> ServedAnswer:
    """How the model goes on with the text as it stands."""
    spec = q.task.spec
    stops = list(spec.get("stop") or ())
    choice = await q.server.complete(
        q.asking.text,
        q.spending,
        urgent=q.urgent,
        max_tokens=int(spec["max_tokens"]),
        temperature=float(spec.get("temperature", 0.0)),
        **({"stop": stops} if stops else {}),
        **({"seed": int(spec["seed"])} if "draw" in spec else {}),
        **({} if (told := spec.get("logprobs")) is None else {"logprobs": int(told)}),
        **_sampling(spec),
        **q.own,
    )
    whole = str(choice.get("text") or "").replace("\0", "")
    return _answered(spec, choice, whole, stops)


def _told_by(q: _Question, teller: Teller) -> Callable[[str], None] | None:
    """What takes an answer's text while it is written; None where all of it may turn out to be a thought."""
    if (tell := q.tell) is None or q.task.spec.get("thinking") is not None:
        return None
    return lambda text: tell(teller.more(text))


async def _written(q: _Question, messages: Sequence[Mapping[str, str]], **options: Any) -> ServedAnswer:
    """What the model writes, and how it ended: with less room than asked for where server or context has no more."""
    spec = q.task.spec
    wanted = int(spec["max_tokens"])
    # The answer is cut before a stop text in any case.
    spare = {"stop"}
    if spec.get("stop"):
        options["stop"] = list(spec["stop"])
    options["temperature"] = temperature = float(spec.get("temperature", 0.0))
    if temperature == SERVERS_TEMPERATURE:
        spare.add("temperature")
    if temperature > 0:
        seed = int(spec.get("seed", 0))
        said = f"{seed}/{spec.get('draw', q.asking.index)}/{q.task.name}"
        options["seed"] = int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "big") >> 1
        if seed == 0:
            spare.add("seed")
    options |= _sampling(spec)
    if (likeliest := spec.get("logprobs")) is not None:
        options |= {"logprobs": True, "top_logprobs": int(likeliest)}
    for most in sorted({max(1, int(wanted * part)) for part in LESS}, reverse=True):
        try:
            choice = await q.chat(messages, max_tokens=most, spare=spare, **options)
        except RequestRefused as refused:
            if refused.cell not in (CONTEXT_LENGTH, ANSWER_LENGTH) or most == 1:
                raise
        else:
            whole = _text(choice)
            if spec.get("thinking") is not None and spec.get("schema") is None:
                whole = without_thoughts(whole)
            return _answered(spec, choice, whole, spec.get("stop") or ())
    raise AssertionError("one token is the least")


def _sampling(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of how tokens are drawn, beside temperature and seed, by the names that vLLM gives it."""
    return {name: spec[name] for name in SAMPLING if name in spec}


def _answered(
    spec: Mapping[str, Any], choice: Mapping[str, Any], whole: str, stops: Sequence[str]
) -> ServedAnswer:
    """The answer up to the first stop text."""
    text = _until(whole, stops)
    cut_short = choice.get("finish_reason") == "length" and text == whole
    likelihoods = None if spec.get("logprobs") is None else told_likelihoods(choice, len(text))
    return ServedAnswer(text, "length" if cut_short else "stop", likelihoods)


def _text(choice: Mapping[str, Any]) -> str:
    if choice.get("finish_reason") == "content_filter":
        raise RequestRefused(CellError("refused", "the model's server withholds the answer"))
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return (content or "").replace("\0", "") if isinstance(content, str | None) else ""


def _until(text: str, stops: Sequence[str]) -> str:
    """Some servers leave the stop text in, and some take none."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


# -- schemas


async def _by_schema(q: _Question, share: float) -> Any:
    """A value that keeps the schema, or why there is none."""
    schema = q.task.spec["schema"]
    messages = q.messages(share)
    broken = ""
    for _ in range(1 + MENDING):
        said = await _constrained(q, messages, schema)
        if said.finish == "length":
            return CellError("schema", "max_tokens were written before the value was whole; allow more")
        value, broken = _checked(said.text, schema)
        if not broken:
            return value
        messages = [
            *messages,
            {"role": "assistant", "content": said.text},
            {"role": "user", "content": f"This is not right: {broken}. Answer again, with the JSON alone."},
        ]
    return CellError("schema", broken)


async def _constrained(
    q: _Question, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]
) -> ServedAnswer:
    """An answer that the server holds to the schema; where it cannot, the schema is part of what it is told."""
    if q.server.constrains:
        try:
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
            return await _written(q, messages, response_format=form)
        except RequestRefused as refused:
            if refused.status not in (400, 404, 415, 422) or refused.cell in (CONTEXT_LENGTH, ANSWER_LENGTH):
                raise
            if refused.parameter not in ("", "response_format"):
                raise
            # Whether it is the schema or the server that cannot, the next request tells.
            told = await _written(q, _told(messages, schema))
            q.server.constrains = False
            return told
    return await _written(q, _told(messages, schema))


def _told(messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> list[Mapping[str, str]]:
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    words = f"\n\nAnswer with JSON alone, which keeps this JSON Schema: {json.dumps(schema, sort_keys=True)}"
    told = [dict(m) for m in messages]
    told[first]["content"] += words
    return [*told]


def _checked(text: str, schema: Mapping[str, Any]) -> tuple[Any, str]:
    """The value, and what is wrong with it, without a word of it."""
    for said in (text, without_thoughts(text)):
        fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", said, re.DOTALL)
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(fenced.group(1) if fenced else said)
            return value, violation(value, schema) or ""
    return None, "what was written is no JSON"


# -- labels


async def _label_scores(q: _Question, share: float) -> list[float]:
    """A logarithm for each label; only their differences mean something."""
    if q.server.scores is not False:
        try:
            return await _likelihoods(q, share)
        except RequestRefused as refused:
            if q.server.scores or refused.status not in (400, 404, 405, 415, 422, 501):
                raise
            if refused.cell == CONTEXT_LENGTH:
                raise
            q.server.scores = False
    return await _first_tokens(q, share)


async def _likelihoods(q: _Question, share: float) -> list[float]:
    """Of every label as the whole answer, against its likelihood without any text."""
    texts = labels_of(q.task.spec)
    labels = [
        await q.server.tokens(urgent=q.urgent, prompt=label, add_special_tokens=False) for label in texts
    ]
    found = await _sums(q, q.messages(share), labels)
    if q.task.spec.get("calibrate", True):
        known, key = q.handle.priors, (q.tenant, q.task.name, *(q.task.spec.get(OWN_LABELS) or ()))
        if (prior := known.get(key)) is None:
            prior = tuple(await _sums(q, q.empty(), labels))
            known.put(key, prior)
        found = [a - b for a, b in zip(found, prior, strict=True)]
    q.server.scores = True
    return found


async def _sums(
    q: _Question, messages: Sequence[Mapping[str, str]], labels: Sequence[Sequence[int]]
) -> list[float]:
    prompt = await q.server.tokens(
        urgent=q.urgent, messages=list(messages), add_generation_prompt=True, **q.template
    )

    async def one(label: Sequence[int]) -> float:
        choice = await q.server.complete(
            [*prompt, *label],
            q.spending,
            urgent=q.urgent,
            max_tokens=1,
            temperature=0.0,
            echo=True,
            logprobs=1,
            **q.own,
        )
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
        mine = told[len(prompt) : len(prompt) + len(label)]
        if len(mine) < len(label) or not all(isinstance(p, int | float) for p in mine):
            raise RequestRefused(
                CellError("refused", "the server does not tell the likelihood of given tokens"), 404
            )
        return float(sum(mine))

    return list(await asyncio.gather(*map(one, labels)))


async def _first_tokens(q: _Question, share: float) -> list[float]:
    """By what the answer begins with."""
    labels = labels_of(q.task.spec)
    longest = max(len(label.encode("utf-8", "replace")) for label in labels)
    choice = await _named_label(q, share, 4 + longest // 2)
    text = _text(choice)
    answer = without_thoughts(text)
    written = named(answer, labels)
    # Likelihoods are of the first token, and so of a thought where there is one.
    thought = answer != text or q.server.thoughts
    shares = beginnings([] if thought else _likeliest(choice), labels, written)
    if not any(shares):
        if written is None:
            raise RequestRefused(CellError("no_label", "what was written is none of the labels"))
        shares = [float(i == written) for i in range(len(labels))]
        return [math.log(share) if share else -100.0 for share in shares]
    least = math.log(min(share for share in shares if share))
    return [math.log(share) if share else least + UNSEEN for share in shares]


async def _named_label(q: _Question, share: float, most: int) -> dict[str, Any]:
    """What the model writes where it shall name a label: with room for thoughts before, where it needs that."""
    known = q.server.thoughts
    choice = await _labelled(q, share, most) if not known else None
    if choice is not None and not _all_thoughts(choice):
        return choice
    for more in THOUGHT_TOKENS:
        if known and more > known:
            continue
        try:
            choice = await _labelled(q, share, most + more)
        except RequestRefused as refused:
            if refused.cell not in (CONTEXT_LENGTH, ANSWER_LENGTH):
                raise
            continue
        if not _all_thoughts(choice):
            q.server.thoughts = max(known, more)
        break
    return choice or await _labelled(q, share, most)


async def _labelled(q: _Question, share: float, most: int) -> dict[str, Any]:
    return await q.chat(
        q.messages(share),
        # The first token's likelihoods are those without a temperature, and a server may have one of its own.
        spare=("temperature", "logprobs", "top_logprobs"),
        temperature=0.0,
        max_tokens=most,
        logprobs=True,
        top_logprobs=20,
    )


def _all_thoughts(choice: Mapping[str, Any]) -> bool:
    """There was no room for an answer behind the thoughts, which some servers do not even tell."""
    return choice.get("finish_reason") == "length" and not without_thoughts(_text(choice)).strip()


def _likeliest(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likeliest first tokens with their probabilities."""
    content = (choice.get("logprobs") or {}).get("content") or [{}]
    found = content[0].get("top_logprobs") or []
    return [(str(one["token"]), math.exp(min(0.0, float(one["logprob"])))) for one in found]


# -- columns of one row


def _failed(q: _Question, cell: CellError) -> Column:
    return assemble(q.task.column_kind, 1, [], {0: cell})


def _marked(column: Column) -> Column:
    """The same, said of a text that was cut."""
    if column.status[0] & STATE_MASK != OK:
        return column
    return Column(kind=column.kind, status=bytes([column.status[0] | TRUNCATED]), arrays=column.arrays)
