"""The open jobs behind doors, and requests as rows of them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

from starlette.concurrency import run_in_threadpool

from motet.errors import Conflict, NotFound
from motet.messages.jobs import Submission
from motet.protocol.values import Value, byte_lengths
from scheduler.api.live import AskAnswered, LiveFeed
from scheduler.api.openai.answers import told_beside
from scheduler.api.openai.beside import ANSWER, key_of
from scheduler.api.openai.parameters import CHAT, CLASSIFY, EMBEDDINGS, RERANK, RESPONSES
from scheduler.api.openai.requests import AskedRequest, task_of
from scheduler.api.opening import planned_with, with_models
from scheduler.api.resources import Resources
from scheduler.api.submissions import CheckedSubmission, new_job
from scheduler.blocks import IncomingPart
from scheduler.store import doors, opening
from scheduler.store.registry import Registered

T = TypeVar("T")

#: Seconds that a caller waits at most: as long as their SDK does.
WITHIN_S = 600.0
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
    endpoint = asked.endpoint if asked.pairs else _SAME_DOOR.get(asked.endpoint, asked.endpoint)
    tasks = key_of(asked.tasks)
    return f"{endpoint} {hashlib.sha256(tasks.encode()).hexdigest()}" if tasks else endpoint


async def _feed_of(use: Resources, tenant: UUID, asked: AskedRequest, model: Registered) -> LiveFeed:
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
    tasks = {ANSWER: task_of(request.endpoint, ref, pairs=request.pairs), **request.tasks}
    asked = CheckedSubmission(said=said, tasks=tasks, digest=digest)
    asked, models = with_models(use, asked)
    made = new_job(uuid.uuid4(), tenant, asked, planned_with(asked, None, models), None)
    with use.database.transaction() as connection:
        doors.lock_doors(connection, tenant)
        found = doors.find_door(connection, tenant, endpoint, model.id)
        if found is not None:
            return found
        job = opening.open_job(connection, made, max_active_jobs=use.settings.max_active_jobs)
        doors.put_door(connection, tenant, endpoint, model.id, job, most=MOST_DOORS)
        return job


def beside(asked: AskedRequest, feed: LiveFeed, answer: AskAnswered) -> dict[str, Any]:
    """What the tasks beside a chat answered."""
    tasks = [task for task in feed.tasks if task.name in asked.tasks]
    return told_beside(tasks, [answer.columns[task.number] for task in tasks])


def part_of(rows: Sequence[Mapping[str, Value]]) -> tuple[IncomingPart, int]:
    """Rows of a request as they land, and their UTF-8 bytes."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return IncomingPart(columns=columns), sum(sum(byte_lengths(values)) for values in columns.values())


async def through_door(
    use: Resources,
    tenant: UUID,
    asked: AskedRequest,
    model: Registered,
    ask: Callable[[LiveFeed], Awaitable[T]],
) -> T:
    """What ``ask`` makes of the open job behind a door; where that takes no rows any more, of the next one.

    Raises Overloaded where rows are refused now, and what ``ask`` raises.
    """
    for last in (False, True):
        feed = await _feed_of(use, tenant, asked, model)
        with use.feeds.meter.door(feed.job.id):
            await use.door.admit_ask(interactive=feed.job.interactive)
        try:
            return await ask(feed)
        except (Conflict, NotFound):
            # It was closed, by its age, by another door or by its owner: the next one is made.
            if last:
                raise
            use.known_doors.drop((tenant, _door_name(asked), model.id))
    raise AssertionError("the second try returns or raises")
