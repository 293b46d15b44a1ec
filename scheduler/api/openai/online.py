"""Routes of requests that wait for their answer: each is one or more rows of the open job behind its door."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from motet.errors import InvalidJob
from motet.protocol.values import Value
from motet.tasks import Task
from scheduler.api.answer_schemas import schema_problems
from scheduler.api.asks import DROPS, READ, while_there
from scheduler.api.auth import Identity
from scheduler.api.bodies import clean_object, json_body, whole_body
from scheduler.api.live import AskAnswered, LiveFeed
from scheduler.api.openai.answers import body_of, cells_of
from scheduler.api.openai.beside import with_versions
from scheduler.api.openai.landing import WITHIN_S, beside, part_of, through_door
from scheduler.api.openai.lines import check_length
from scheduler.api.openai.naming import check_dimensions, decoder, find_model
from scheduler.api.openai.parameters import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES
from scheduler.api.openai.requests import AskedRequest, asked_of, read_request
from scheduler.api.openai.streams import streamed
from scheduler.api.resources import Resources
from scheduler.blocks import keyed
from scheduler.store.registry import Registered, find_models

#: Bytes of a request: a list of 2,048 inputs has room.
_MOST_BYTES = 32 * 1024 * 1024
#: Rows of one ask; more are several asks, so that others' rows come between.
_ASK_ROWS = 16


# -- routes


async def chat(request: Request, use: Resources, caller: Identity) -> Response:
    return await _answer(request, use, caller, CHAT)


async def complete(request: Request, use: Resources, caller: Identity) -> Response:
    return await _answer(request, use, caller, COMPLETIONS)


async def embed(request: Request, use: Resources, caller: Identity) -> Response:
    return await _answer(request, use, caller, EMBEDDINGS)


async def respond(request: Request, use: Resources, caller: Identity) -> Response:
    return await _answer(request, use, caller, RESPONSES)


async def rerank(request: Request, use: Resources, caller: Identity) -> Response:
    return await _answer(request, use, caller, RERANK)


async def classify(request: Request, use: Resources, caller: Identity) -> Response:
    return await _answer(request, use, caller, CLASSIFY)


async def _answer(request: Request, use: Resources, caller: Identity, endpoint: str) -> Response:
    async with whole_body(request, use, _MOST_BYTES) as raw:
        request.scope[READ] = request.scope[DROPS] = True
        asked, model = await run_in_threadpool(_read, use, endpoint, raw)
        answered = streamed if asked.stream else _answered
        return await while_there(request, answered(use, caller.tenant, asked, model))


def _read(use: Resources, endpoint: str, raw: bytes) -> tuple[AskedRequest, Registered]:
    body: Mapping[str, Any] = clean_object(json_body(raw))
    name = body.get("model")
    model = find_model(use, endpoint, name) if isinstance(name, str) and 0 < len(name) <= 200 else None
    asked = read_request(endpoint, body, decoder(use, None if model is None else model.manifest))
    assert model is not None, "a request without a model is refused"
    check_dimensions(asked.dimensions, model.manifest)
    check_length(asked, use.settings.max_row_bytes)
    return replace(asked_of(asked, model.manifest), tasks=_resolved(use, asked.tasks)), model


def _resolved(use: Resources, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks with the versions that their models have now. Raises InvalidJob where they do not fit together."""
    if not tasks:
        return {}
    wrong = schema_problems(tasks)
    if wrong:
        raise InvalidJob(wrong)
    with use.database.transaction() as connection:
        found = find_models(connection, {ref for task in tasks.values() for ref in task.registered})
    # One that is not there is told of when the door is made.
    return with_versions(tasks, {name: model.manifest for name, model in found.items()})


async def _answered(use: Resources, tenant: UUID, asked: AskedRequest, model: Registered) -> Response:
    rows = asked.rows()
    groups = [rows[at : at + _ASK_ROWS] for at in range(0, len(rows), _ASK_ROWS)]
    asks = [asyncio.ensure_future(_ask(use, tenant, asked, model, group)) for group in groups]
    try:
        gathered = await asyncio.gather(*asks)
    finally:
        for ask in asks:
            ask.cancel()
    feed, answers = gathered[0][0], [answer for _, answer in gathered]
    cells = [cell for answer in answers for cell in cells_of(answer.columns[0])]
    lengths: Sequence[int] = ()
    if asked.options is None:
        counted = partial(use.counter.lengths, model.manifest, asked.texts)
        most = model.manifest.max_tokens
        lengths = [min(n, most or n) for n in await run_in_threadpool(counted)]
    name, created = secrets.token_hex(12), int(time.time())
    # Comparing vectors takes a while.
    body, _ = await run_in_threadpool(body_of, asked, cells, lengths, name=name, created=created)
    return JSONResponse({**body, **beside(asked, feed, answers[0])})


async def _ask(
    use: Resources, tenant: UUID, asked: AskedRequest, model: Registered, rows: Sequence[Mapping[str, Value]]
) -> tuple[LiveFeed, AskAnswered]:
    part, size = part_of(rows)

    async def ask(feed: LiveFeed) -> tuple[LiveFeed, AskAnswered]:
        key = keyed(feed.job.secret, secrets.token_bytes(32))
        with use.feeds.meter.ask(feed.job.id, len(part)):
            return feed, await feed.ask(part, size, key, key, within_s=WITHIN_S, drop_late=True)

    return await through_door(use, tenant, asked, model, ask)
