"""Routes of requests that wait for their answer: each is one or more rows of the open job behind its door."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from motet.errors import Conflict, InvalidJob, NotFound
from motet.messages.jobs import Submission
from motet.tasks import Function, Task
from scheduler.api.answer_schemas import schema_problems
from scheduler.api.asks import READ, while_there
from scheduler.api.auth import Identity
from scheduler.api.bodies import clean_object, json_body, whole_body
from scheduler.api.live import AskAnswered, LiveFeed
from scheduler.api.openai.answers import body_of, cells_of
from scheduler.api.openai.lines import check_length
from scheduler.api.openai.naming import check_dimensions, decoder, find_model
from scheduler.api.openai.parameters import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES
from scheduler.api.openai.requests import (
    ANSWER,
    ASKED,
    OPTIONS,
    TEXT,
    AskedRequest,
    read_request,
    task_of,
    text_of,
)
from scheduler.api.opening import planned_with
from scheduler.api.resources import Resources
from scheduler.api.result_streams import plain_rows
from scheduler.api.submissions import CheckedSubmission, new_job
from scheduler.blocks import IncomingPart, keyed
from scheduler.store import doors, opening
from scheduler.store.registry import Registered, find_models

#: Bytes of a request: a list of 2,048 inputs has room.
_MOST_BYTES = 32 * 1024 * 1024
#: Seconds that a caller waits at most: as long as their SDK does.
_WITHIN_S = 600.0
#: Rows of one ask; more are several asks, so that others' rows come between.
_ASK_ROWS = 16
#: Open jobs of one tenant behind doors; beyond it the one is closed that was not used for the longest time.
MOST_DOORS = 32
#: Days for which what was asked is kept after its door was closed.
_KEPT_DAYS = 30.0
#: Endpoints whose requests are rows of the job behind another one's door.
_SAME_DOOR = {RESPONSES: CHAT, RERANK: EMBEDDINGS, CLASSIFY: EMBEDDINGS}
#: A door is noted as used so often, in seconds.
_NOTED_S = 300.0


def _door_name(asked: AskedRequest) -> str:
    """What requests have in common that one door answers, beside tenant and model."""
    endpoint = _SAME_DOOR.get(asked.endpoint, asked.endpoint)
    if not asked.tasks:
        return endpoint
    tasks = json.dumps({name: task.to_json() for name, task in asked.tasks.items()}, sort_keys=True)
    return f"{endpoint} {hashlib.sha256(tasks.encode()).hexdigest()}"


async def feed_of(use: Resources, tenant: UUID, asked: AskedRequest, model: Registered) -> LiveFeed:
    """The open job behind a door, made where there is none."""
    at = (tenant, _door_name(asked), model.id)
    found, now = use.known_doors.get(at), time.monotonic()
    if found is None:
        job = await run_in_threadpool(_door, use, tenant, asked, model)
    else:
        job, noted = found
        if now - noted <= _NOTED_S:
            return await use.feeds.of(tenant, job)
        await run_in_threadpool(_note, use, job)
    use.known_doors.put(at, (job, now))
    return await use.feeds.of(tenant, job)


def _note(use: Resources, job: UUID) -> None:
    with use.database.transaction() as connection:
        doors.used_door(connection, job)


def _door(use: Resources, tenant: UUID, request: AskedRequest, model: Registered) -> UUID:
    endpoint = _door_name(request)
    with use.database.transaction() as connection:
        found = doors.find_door(connection, tenant, endpoint, model.id)
        if found is not None:
            doors.used_door(connection, found)
            return found
    use.door.admit(interactive=True)
    ref = model.manifest.ref
    said = Submission(
        tasks={},
        name=f"openai {request.endpoint} {ref}",
        priority="interactive",
        reuse=False,
        bad_rows="error",
        retention_days=_KEPT_DAYS,
        open=True,
    )
    digest = hashlib.sha256(f"{endpoint} {ref}".encode()).digest()
    tasks = {ANSWER: task_of(request.endpoint, ref), **request.tasks}
    asked = CheckedSubmission(said=said, tasks=tasks, digest=digest)
    made = new_job(uuid.uuid4(), tenant, asked, planned_with(use, asked, None), None)
    with use.database.transaction() as connection:
        doors.lock_doors(connection, tenant)
        found = doors.find_door(connection, tenant, endpoint, model.id)
        if found is not None:
            return found
        job = opening.open_job(connection, made, max_active_jobs=use.settings.max_active_jobs)
        doors.put_door(connection, tenant, endpoint, model.id, job, most=MOST_DOORS)
        return job


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
        request.scope[READ] = True
        asked, model = await run_in_threadpool(_read, use, endpoint, raw)
        return await while_there(request, _answered(use, caller.tenant, asked, model))


def _read(use: Resources, endpoint: str, raw: bytes) -> tuple[AskedRequest, Registered]:
    body: Mapping[str, Any] = clean_object(json_body(raw))
    name = body.get("model")
    model = find_model(use, endpoint, name) if isinstance(name, str) and 0 < len(name) <= 200 else None
    asked = read_request(endpoint, body, decoder(use, None if model is None else model.manifest))
    assert model is not None, "a request without a model is refused"
    check_dimensions(asked.dimensions, model.manifest)
    check_length(asked, use.settings.max_row_bytes)
    return replace(asked, tasks=_resolved(use, asked.tasks)), model


def _resolved(use: Resources, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks with the versions that their models have now. Raises InvalidJob where they do not fit together."""
    if not tasks:
        return {}
    wrong = schema_problems(tasks)
    if wrong:
        raise InvalidJob(wrong)
    with use.database.transaction() as connection:
        found = find_models(connection, {ref for task in tasks.values() for ref in task.registered})
    refs = {name: model.manifest.ref for name, model in found.items()}
    resolved: dict[str, Task] = {}
    for name, task in tasks.items():
        # One that is not there is told of when the door is made.
        fixed = replace(task, model=refs.get(task.model, task.model))
        if isinstance(fixed, Function) and fixed.artefact:
            fixed = replace(fixed, artefact=refs.get(fixed.artefact, fixed.artefact))
        resolved[name] = fixed
    return resolved


async def _answered(use: Resources, tenant: UUID, asked: AskedRequest, model: Registered) -> Response:
    rows = asked.rows()
    groups = [rows[at : at + _ASK_ROWS] for at in range(0, len(rows), _ASK_ROWS)]
    asks = [asyncio.ensure_future(_ask(use, tenant, asked, model, group)) for group in groups]
    try:
        asked_of = await asyncio.gather(*asks)
    finally:
        for ask in asks:
            ask.cancel()
    feed, answers = asked_of[0][0], [answer for _, answer in asked_of]
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


def beside(asked: AskedRequest, feed: LiveFeed, answer: AskAnswered) -> dict[str, Any]:
    """What the tasks beside a chat answered."""
    if not asked.tasks:
        return {}
    tasks = [task for task in feed.tasks if task.name in asked.tasks]
    columns = [answer.columns[task.number] for task in tasks]
    [row] = plain_rows(tasks, columns, answer.first_row, answer.given)
    return {"x_motet": {"tasks": {task.name: row[task.name] for task in tasks}, "errors": row["errors"]}}


def part_of(asked: AskedRequest, rows: Sequence[tuple[str, str]]) -> tuple[IncomingPart, int]:
    """Rows of a request as they land, and their UTF-8 bytes."""
    columns: dict[str, list[str]] = {ASKED: [text for text, _ in rows]}
    if asked.options is not None:
        columns[OPTIONS] = [options for _, options in rows]
    if any(TEXT in task.reads(name, asked.tasks) for name, task in asked.tasks.items()):
        columns[TEXT] = [text_of(text) for text, _ in rows]
    return IncomingPart(columns=columns), sum(
        len(text.encode()) for values in columns.values() for text in values
    )


def forget_door(use: Resources, tenant: UUID, asked: AskedRequest, model: Registered) -> None:
    """Its job takes no rows any more."""
    use.known_doors.drop((tenant, _door_name(asked), model.id))


async def _ask(
    use: Resources, tenant: UUID, asked: AskedRequest, model: Registered, rows: Sequence[tuple[str, str]]
) -> tuple[LiveFeed, AskAnswered]:
    part, size = part_of(asked, rows)
    for last in (False, True):
        feed = await feed_of(use, tenant, asked, model)
        await use.door.admit_ask(interactive=feed.job.interactive)
        key = keyed(feed.job.secret, secrets.token_bytes(32))
        try:
            with use.feeds.meter.ask(feed.job.id, len(part)):
                return feed, await feed.ask(part, size, key, key, within_s=_WITHIN_S)
        except (Conflict, NotFound):
            # It was closed, by its age, by another door or by its owner: the next one is made.
            if last:
                raise
            forget_door(use, tenant, asked, model)
    raise AssertionError("the second try returns or raises")
