"""The route of asks: rows of an open job, answered in the same round trip."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motet.errors import InvalidJob, Problem
from motet.messages.jobs import MAX_ASK_ROWS, AskAnswer, AskRequest
from motet.protocol.envelope import pack, packed_plain
from motet.protocol.values import byte_lengths
from scheduler.api.auth import ASK, Caller, Identity, authenticated
from scheduler.api.bodies import clean_object, json_body, taken, whole_body
from scheduler.api.live import AskAnswered, AskEvent, LiveFeed
from scheduler.api.media import with_media
from scheduler.api.records import JobPath
from scheduler.api.refusals import EXPECTED, error_of, refusal
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.result_streams import framed, plain_rows
from scheduler.api.routing import Routes, reply, takes
from scheduler.api.rows import PART_FIELDS, Incoming, columns_in, foldable, read_rows, unpacked
from scheduler.api.streaming import EVENTS, AskDelta, AskLanded, AskReset, EventStream, SentEvent, hung_up
from scheduler.blocks import IncomingPart, keyed

routes = Routes(tags=["jobs"])

_FRAMES = "application/msgpack"
#: With it in ``Accept``, frames come as their asks are answered. Older servers do not know it, and send them in order.
_AS_ANSWERED = "order=done"
#: An ask that takes so many seconds is given up where its caller hangs up. Shorter: a task more for most asks; longer:
#: callers that are gone take the place of others.
_WATCHED_AFTER_S = 0.5
#: And one that is to be aborted then is watched so soon.
_ABORTED_AFTER_S = 0.05
#: Marks a request whose rows are given up where its caller hangs up.
DROPS = "motet.drops"
#: Marks a request whose body has been read whole: what it receives next is that its caller hangs up.
READ = "motet.read"
#: What the log says of it; nobody is there to read it.
_GONE = 499


@dataclass(frozen=True, slots=True)
class CheckedAsk:
    """Rows under one key, read and checked."""

    part: IncomingPart
    key: bytes
    digest: bytes
    bytes: int


@routes.post(
    ASK,
    summary="Ask an open job: its merged rows in the same round trip",
    response_model=AskAnswer,
    response_description="The rows, or with `Accept: application/msgpack` frames of zstd msgpack (docs/http.md).",
    responses={
        504: {"description": "Not answered in time: the rows go on; ask again with the same key."},
    },
    openapi_extra=takes(
        AskRequest, {"rows": [{"text": "My card was charged twice."}], "key": "ticket-81", "within_s": 5}
    ),
)
async def ask(request: Request, use: Use, caller: Caller, job: JobPath) -> Response:
    return await _asked(request, use, caller, job)


#: What the requests that `AsksAhead` serves are known by: to the table of routes that are allowed, to log and metrics.
_ROUTE = routes.routes[0]
_PATH = re.compile(ASK.replace("{job}", "([^/]+)"))


class AsksAhead:
    """Serves asks ahead of FastAPI, whose way to a handler costs as much as all that an ask needs of this process.

    Who may ask is decided as for every route (auth.py); the route above describes it, and FastAPI would serve it alike.
    """

    def __init__(self, app: ASGIApp, use: Resources) -> None:
        self._app, self._use = app, use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = _ROUTE
        request = Request(scope, receive)
        try:
            caller = await authenticated(request, self._use)
            response = await while_there(request, _asked(request, self._use, caller, found[1]))
        except EXPECTED as error:
            response = refusal(error)
        await response(scope, receive, send)


async def while_there(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer; given up where its caller hangs up, so that rows of his which have not landed take nobody's place."""
    answer = asyncio.ensure_future(work)
    gone: asyncio.Future[None] | None = None
    try:
        # Most are answered sooner: these are not watched. Its body has been read by then, or its sender is slow.
        await asyncio.wait({answer}, timeout=_ABORTED_AFTER_S)
        if not answer.done() and not request.scope.get(DROPS):
            await asyncio.wait({answer}, timeout=_WATCHED_AFTER_S - _ABORTED_AFTER_S)
        if not answer.done() and request.scope.get(READ):
            gone = asyncio.ensure_future(hung_up(request.receive))
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=_GONE)
        return await answer
    finally:
        for task in (answer, gone):
            if task is not None:
                task.cancel()


async def _asked(request: Request, use: Resources, caller: Identity, job: str) -> Response:
    feed = await use.feeds.of(caller.tenant, job_id(job))
    # Before its body is read: what is refused costs no memory, and nothing of it is stored.
    with use.feeds.meter.door(feed.job.id):
        await use.door.admit_ask(interactive=feed.job.interactive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    async with AsyncExitStack() as held:
        body = whole_body(request, use, 2 * MAX_ASK_ROWS * use.settings.max_row_bytes)
        raw = await held.enter_async_context(body)
        request.scope[READ] = True
        asked, incoming = (_columns if kind == _FRAMES else _rows)(feed, raw, use.settings.max_row_bytes)
        if incoming.has_media:
            mine = feed.job
            incoming = await run_in_threadpool(
                with_media, use, mine.tenant, mine.secret, incoming, refuse=False
            )
        request.scope[DROPS] = asked.drop_late
        accepted = request.headers.get("accept", "")
        if EVENTS in accepted:
            return await _streamed(use, feed, incoming, asked, held, frames=kind == _FRAMES)
        frames = _FRAMES in accepted
        if asked.keys is None:
            return _reply(feed, [await _answer(use, feed, incoming, asked.key, asked)], frames=frames)
        if asked.key is not None:
            raise InvalidJob(
                Problem("key", "a key beside keys", "one of the two", "leave key out: each row has its own")
            )
        if len(asked.keys) != len(asked.rows):
            raise InvalidJob(
                Problem(
                    "keys",
                    f"{len(asked.keys)} keys",
                    f"{len(asked.rows)}, a key for each row",
                    "add the others",
                )
            )
        work = [_answer(use, feed, incoming.row(i), key, asked) for i, key in enumerate(asked.keys)]
        if frames and _AS_ANSWERED in accepted and len(work) > 1:
            return _AsAnswered(feed, work, held.pop_all())
        answers = await asyncio.gather(*work, return_exceptions=True)
        return _reply(feed, answers, frames=frames)


def _rows(feed: LiveFeed, raw: bytes, max_row_bytes: int) -> tuple[AskRequest, Incoming]:
    """An ask in JSON. Raises InvalidJob where it is none; its bad rows are marked."""
    body = json_body(raw)
    # Rows are looked at one by one later: theirs may be bad without the ask being so.
    clean_object({k: v for k, v in body.items() if k != "rows"} if type(body) is dict else body)
    asked = taken(AskRequest, body)
    job = feed.job
    return asked, read_rows(asked.rows, job.asked, max_row_bytes, job.dialogues, job.media)


def _columns(feed: LiveFeed, raw: bytes, max_row_bytes: int) -> tuple[AskRequest, Incoming]:
    """The same in msgpack, with the rows in the form of parts: values keep types that JSON cannot carry."""
    body = unpacked(raw)
    job = feed.job
    incoming = columns_in(body, job.asked, max_row_bytes, job.dialogues, job.media)
    options = {k: v for k, v in body.items() if k not in PART_FIELDS}
    # The rows stand in the columns: the message is asked for their number alone.
    return taken(AskRequest, clean_object(options | {"rows": [""] * len(incoming)})), incoming


async def _answer(
    use: Resources, feed: LiveFeed, incoming: Incoming, key: str | None, asked: AskRequest
) -> AskAnswered:
    with use.feeds.meter.ask(feed.job.id, len(incoming)):
        ask = checked_ask(feed, incoming, key)
        return await feed.ask(
            ask.part, ask.bytes, ask.key, ask.digest, within_s=asked.within_s, drop_late=asked.drop_late
        )


async def _streamed(
    use: Resources,
    feed: LiveFeed,
    incoming: Incoming,
    asked: AskRequest,
    held: AsyncExitStack,
    *,
    frames: bool,
) -> Response:
    """The row as events. What goes wrong before it is stored is refused as without them.

    ``frames``: the row itself as a frame, for whoever asked in msgpack; else as people read it. ``held``: what is let go
    of when it is answered.
    """
    keys = (asked.key,) if asked.keys is None else asked.keys
    if len(asked.rows) != 1 or len(keys) != 1:
        problem = Problem("rows", f"{len(asked.rows)} rows", "one row", "ask each in a request of its own")
        raise InvalidJob(problem)
    ask = checked_ask(feed, incoming, keys[0])
    told = feed.stream(
        ask.part, ask.bytes, ask.key, ask.digest, within_s=asked.within_s, drop_late=asked.drop_late
    )
    events = _metered(use, feed, told, held.pop_all())
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_told(feed, first, events, frames=frames))


async def _metered(
    use: Resources, feed: LiveFeed, events: AsyncGenerator[AskEvent, None], held: AsyncExitStack
) -> AsyncGenerator[AskEvent, None]:
    async with held, aclosing(events):
        with use.feeds.meter.ask(feed.job.id, 1):
            async for event in events:
                if isinstance(event, AskAnswered):
                    break
                yield event
        # Once it is there it is counted as answered, whether its caller hears it or not.
        yield event


async def _told(
    feed: LiveFeed, first: AskEvent, events: AsyncGenerator[AskEvent, None], *, frames: bool
) -> AsyncGenerator[SentEvent, None]:
    try:
        yield _sent(feed, first, frames=frames)
        async for event in events:
            yield _sent(feed, event, frames=frames)
    except EXPECTED as error:
        yield "error", {"error": _error(error)}
    finally:
        await events.aclose()


def _sent(feed: LiveFeed, event: AskEvent, *, frames: bool) -> SentEvent:
    match event:
        case AskLanded():
            return "landed", {"row": event.row}
        case AskDelta():
            return "delta", {"task": event.task, "from": event.begins, "text": event.text}
        case AskReset():
            return "reset", {"task": event.task}
    if frames:
        return "row", {"frame": base64.b64encode(_frame(feed, event)).decode()}
    [row] = _plain(feed, event)
    return "row", row


def _plain(feed: LiveFeed, answer: AskAnswered) -> list[dict[str, Any]]:
    """The rows of an answer as people read them."""
    columns = [answer.columns[task.number] for task in feed.tasks]
    return plain_rows(feed.tasks, columns, answer.first_row, answer.given)


def checked_ask(feed: LiveFeed, incoming: Incoming, key: str | None) -> CheckedAsk:
    """The rows under their key. Raises InvalidJob for bad ones, where the job refuses them."""
    if feed.job.bad_rows == "refuse":
        incoming.refuse_bad_rows(0)
    if feed.job.folds:
        incoming = foldable(incoming, feed.job.folds)
        if feed.job.bad_rows == "refuse":
            incoming.refuse_bad_rows(0)
    part = incoming.part()
    secret = feed.job.secret
    name = key.encode() if key is not None else secrets.token_bytes(16)
    content = packed_plain(
        [{n: list(v) for n, v in part.columns.items()}, dict(part.bad), dict(part.bad_fields)]
    )
    return CheckedAsk(
        part=part,
        # A key may be a word of the caller's own: only its digest is stored.
        key=keyed(secret, hashlib.sha256(name).digest()),
        digest=keyed(secret, hashlib.sha256(content).digest()),
        bytes=sum(sum(byte_lengths(values)) for values in part.columns.values()),
    )


def _reply(feed: LiveFeed, answers: Sequence[AskAnswered | BaseException], *, frames: bool) -> Response:
    if frames:
        return Response(b"".join(map(framed, (_frame(feed, a) for a in answers))), media_type=_FRAMES)
    rows: list[dict[str, Any]] = []
    for answer in answers:
        if isinstance(answer, AskAnswered):
            rows += _plain(feed, answer)
        else:
            rows.append({"error": _error(answer)})
    return reply(AskAnswer(rows=tuple(rows)))


class _AsAnswered(Response):
    """Frames in the order in which the asks are answered, each with the place of its ask: none waits for the slowest."""

    def __init__(
        self, feed: LiveFeed, work: Sequence[Coroutine[Any, Any, AskAnswered]], held: AsyncExitStack
    ) -> None:
        """``held``: what is let go of when all are answered."""
        super().__init__(media_type=_FRAMES)
        # Not known yet.
        del self.headers["content-length"]
        self._feed, self._work, self._held = feed, work, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_ = {asyncio.ensure_future(one): place for place, one in enumerate(self._work)}
        gone = asyncio.ensure_future(hung_up(receive))
        start: Message | None = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            async with self._held:
                while open_:
                    await asyncio.wait({*open_, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done():
                        if start is not None:
                            # Nobody reads it; the log does.
                            await Response(status_code=_GONE)(scope, receive, send)
                        return
                    answered = [one for one in open_ if one.done()]
                    body = b"".join(framed(self._told(one, open_.pop(one))) for one in answered)
                    if start is not None:
                        # With the first of them, so that these are one packet.
                        await send(start)
                        start = None
                    await send({"type": "http.response.body", "body": body, "more_body": bool(open_)})
        finally:
            for task in (*open_, gone):
                task.cancel()

    def _told(self, answer: asyncio.Future[AskAnswered], place: int) -> bytes:
        return _frame(self._feed, answer.exception() or answer.result(), place)


def _frame(feed: LiveFeed, answer: AskAnswered | BaseException, place: int | None = None) -> bytes:
    """``place``: of the ask in its request, told where frames come in another order."""
    where = {} if place is None else {"ask": place}
    if not isinstance(answer, AskAnswered):
        return pack(where | {"error": _error(answer)})
    return pack(
        where
        | {
            "block": 0,
            "first_row": answer.first_row,
            "rows": answer.n_rows,
            "columns": {t.name: answer.columns[t.number].to_wire() for t in feed.tasks},
            **({"state": dict(answer.given)} if answer.given else {}),
        }
    )


def _error(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, Exception):
        raise error
    return error_of(error).to_json(sparse=True)
