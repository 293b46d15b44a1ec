"""Live: the asks of one open job are gathered, landed and answered, by this process.

The event loop owns everything here; Postgres is spoken to in threads. Any number of processes may serve one job: rows
are numbered and keys are checked under the job's lock in Postgres (store/feeds.py), each process gathers by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

from motet.errors import Conflict, Late, MotetError, NotFound, Overloaded
from motet.protocol.columns import Column, cut
from motet.protocol.values import Value
from motet.protocol.wire import Said
from motet.states import ENDED
from scheduler.api.ask_meter import AskMeter
from scheduler.api.bell import Bell
from scheduler.api.looks import Looks
from scheduler.api.refusals import Unavailable
from scheduler.api.streaming import AskDelta, AskLanded, AskReset, Ears, ReadAlong
from scheduler.blocks import IncomingPart
from scheduler.policy.gather import Gatherer, GatherFull, Group, Waiting
from scheduler.store import dropping, feeds
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.feeds import FeedLook, LandedAsk, NewAsk
from scheduler.store.landing import LoadingJob, loading
from scheduler.store.results import ShownTask, shown

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Whoever waits looks so often, in seconds, where no word of Postgres comes: a lost word costs no more.
_POLL_S = 1.0
#: Pause before a landing is tried again while Postgres is away, in seconds.
_AGAIN_S = 0.25
#: Rows and UTF-8 bytes of a group at most: about an interactive micro-batch. Larger: a caller waits for the rows of
#: others; smaller: each transaction and each forward pass serves fewer callers.
GROUP_ROWS, GROUP_BYTES = 16, 256 * 1024
#: Groups under way for each worker, and in all: less, and workers wait for the next group; more, and groups stay small.
_EACH, _LEAST, _MOST = 2, 2, 64
#: Seconds for which an ask waits for company at most, while others are under way. Longer: callers wait although a worker
#: may be idle. Shorter: the first of those who ask again together land alone, and a transaction serves few rows.
_PATIENCE_S = 0.02
#: Where text is written a group is one ask, and a worker writes many at once: as many more than it can as this.
#: Less: places of a language model stay empty between two asks; more: rows wait where no refusal is free.
_AHEAD = 1.25
#: Seconds in which callers may still be answered after the process was told to end: less than the server gives them.
_GRACE_S = 8.0
#: Workers are counted so often, in seconds.
_COUNT_S = 2.0
#: Open jobs that a process keeps ready; beyond it those that nobody asks are let go of.
_KEPT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AskAnswered:
    """The merged cells of an ask's rows."""

    first_row: int
    n_rows: int
    #: Task number -> a column of ``n_rows``.
    columns: Mapping[int, Column]
    #: Fold -> what each row was given.
    given: Mapping[str, Sequence[Value]]


#: What ``LiveFeed.stream`` tells: AskLanded first, AskAnswered last.
AskEvent: TypeAlias = AskLanded | AskDelta | AskReset | AskAnswered


@dataclass(eq=False, slots=True, kw_only=True)
class Ask:
    """One caller's rows on their way."""

    part: IncomingPart
    key: bytes
    digest: bytes
    answer: asyncio.Future[AskAnswered]
    #: Its place among those that have not landed; it waits for as long as one of its callers does.
    waiting: Waiting[Ask] = field(init=False)
    #: Who wait for it: all that have asked with its key meanwhile.
    callers: int = 0
    #: Index of its first row in the job, once it has landed, and the block that it is part of.
    row: int | None = None
    block: int | None = None
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    #: It is given up when the last of its callers goes away.
    drop_late: bool = False
    #: Somebody reads along as its text is written.
    told: bool = False

    def lands(self, place: LandedAsk) -> None:
        self.row, self.block = place.first_row + place.lo, place.block
        self.landed.set()

    def fails(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False, slots=True)
class _Block:
    """A block under way: the group that landed it here, if one did, and the asks that wait for it."""

    group: Group[Ask] | None
    #: (the ask, its place in the block)
    asks: list[tuple[Ask, int]] = field(default_factory=list)


class LiveFeed:
    """One open job at this process. Used from the event loop only."""

    def __init__(
        self,
        job: LoadingJob,
        gatherer: Gatherer[Ask],
        database: Database,
        bell: Bell,
        threads: Executor,
        width: Callable[[], int],
        tasks: Sequence[ShownTask],
        ears: Ears | None = None,
    ) -> None:
        self.job, self.tasks = job, tasks
        self._ears = ears or Ears("")
        self._gatherer, self._database = gatherer, database
        self._bell, self._threads, self._width = bell, threads, width
        self._under_way: dict[int, _Block] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = self._pumps_soon = False
        #: Whether the asks that wait for company will be looked at again by themselves.
        self._waking = False
        #: On the loop's clock: when it was seen first that the process is about to end; 0: it is not.
        self._stopping_at = 0.0
        #: Asks without an answer, by their key: a key repeated meanwhile is the same ask.
        self._asks: dict[bytes, Ask] = {}

    @property
    def waiting_rows(self) -> int:
        """Rows that have not landed."""
        return self._gatherer.waiting_rows

    @property
    def idle(self) -> bool:
        return not self._gatherer.waiting_rows and not self._under_way and not self._tasks

    async def ask(
        self,
        part: IncomingPart,
        size: int,
        key: bytes,
        digest: bytes,
        *,
        within_s: float,
        drop_late: bool = False,
    ) -> AskAnswered:
        """The rows' merged cells.

        ``size``: UTF-8 bytes of the rows. ``within_s``: how long the caller waits, in seconds. ``drop_late``: when the
        caller goes away (this is cancelled, or late) the rows are given up, though they have landed.
        Raises Overloaded; Late; Conflict where the key stands for other rows or the job takes none; NotFound where it
        was removed.
        """
        until = asyncio.get_running_loop().time() + within_s
        return await self._as(self._taken(part, size, key, digest, until, drop_late), digest, until)

    async def stream(
        self,
        part: IncomingPart,
        size: int,
        key: bytes,
        digest: bytes,
        *,
        within_s: float,
        drop_late: bool = False,
    ) -> AsyncGenerator[AskEvent, None]:
        """As ``ask``, of one row, told as it comes about: AskLanded, then AskDelta and AskReset as text is written,
        and AskAnswered at the end. Closing it is going away. Raises what ``ask`` does; before AskLanded nothing is told.
        """
        assert len(part) == 1, "only one row is told as it is written"
        await self._ears.open()
        until = asyncio.get_running_loop().time() + within_s
        ask = self._taken(part, size, key, digest, until, drop_late, told=True)
        answer = asyncio.ensure_future(self._as(ask, digest, until))
        landed = asyncio.ensure_future(ask.landed.wait())
        try:
            await asyncio.wait({answer, landed}, return_when=asyncio.FIRST_COMPLETED)
            if ask.row is not None:
                row = ask.row
                with self._ears.of(str(self.job.id), row) as words:
                    yield AskLanded(row)
                    async for event in _read_along(words, answer):
                        yield event
            yield await answer
        finally:
            landed.cancel()
            answer.cancel()
            await asyncio.wait({landed, answer})

    def _taken(
        self,
        part: IncomingPart,
        size: int,
        key: bytes,
        digest: bytes,
        until: float,
        drop_late: bool,
        *,
        told: bool = False,
    ) -> Ask:
        """The ask of this key: one that waits for its answer, or a new one. Raises Overloaded."""
        loop = asyncio.get_running_loop()
        same = self._asks.get(key)
        if same is not None and not same.answer.done():
            same.drop_late = same.drop_late and drop_late
            return same
        ask = Ask(
            part=part, key=key, digest=digest, answer=loop.create_future(), drop_late=drop_late, told=told
        )
        ask.waiting = Waiting(caller=ask, rows=len(part), bytes=size, until=until, droppable=drop_late)
        try:
            self._gatherer.add(ask.waiting, loop.time())
        except GatherFull as full:
            raise Overloaded(str(full), full.retry_after_s) from None
        self._asks[key] = ask
        ask.answer.add_done_callback(self._forget(ask))
        if not self._pumps_soon:
            # As soon as the other rows of its request wait too: so they land together.
            self._pumps_soon = True
            loop.call_soon(self._pump)
        return ask

    def _forget(self, ask: Ask) -> Callable[[asyncio.Future[AskAnswered]], None]:
        def done(answer: asyncio.Future[AskAnswered]) -> None:
            # By now its key may be that of a newer ask.
            if self._asks.get(ask.key) is ask:
                del self._asks[ask.key]
            # Its caller may have gone: then nobody else will look at the error.
            if not answer.cancelled():
                answer.exception()

        return done

    async def _as(self, ask: Ask, digest: bytes, until: float) -> AskAnswered:
        """The answer of an ask, for one of the callers that wait for it."""
        if ask.digest != digest:
            raise _other_rows()
        ask.callers += 1
        ask.waiting.until = max(ask.waiting.until, until)
        try:
            async with asyncio.timeout_at(until):
                return await asyncio.shield(ask.answer)
        except TimeoutError:
            if ask.drop_late and not self._gatherer.waits(ask.waiting):
                raise Late("not answered in time, and given up: ask again", stored=False) from None
            raise _late(stored=not self._gatherer.waits(ask.waiting), row=ask.row) from None
        finally:
            ask.callers -= 1
            # Of rows whose last caller went away before they landed nothing is stored.
            if not ask.callers and self._gatherer.leave(ask.waiting):
                ask.fails(_late(stored=False))
                self._pump()
            elif ask.block is not None:
                self._give_up_unwanted(ask.block)

    def _pump(self) -> None:
        self._pumps_soon = False
        loop = asyncio.get_running_loop()
        for late in self._gatherer.late(loop.time()):
            late.caller.fails(_late(stored=False))
        self._gatherer.width = self._width()
        while (group := self._gatherer.next(loop.time())) is not None:
            self._spawn(self._land(group))
        if self._gatherer.patient_until() > loop.time() and not self._waking:
            self._waking = True
            loop.call_at(self._gatherer.patient_until(), self._woken)

    def _woken(self) -> None:
        self._waking = False
        self._pump()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # -- landing

    async def _land(self, group: Group[Ask]) -> None:
        asks = [waiting.caller for waiting in group.asks]
        try:
            await self._land_all(group, asks)
        except Exception as error:
            if not isinstance(error, MotetError | StoreUnavailable):
                log.error("landing failed", exc_info=error, extra={"job": self.job.id})
            for ask in asks:
                ask.fails(error)
            self._gatherer.failed(group)
            self._pump()

    async def _land_all(self, group: Group[Ask], asks: list[Ask]) -> None:
        """Land what is left of the group until it stands in Postgres. While that is away, callers wait or give up."""
        loop = asyncio.get_running_loop()
        while asks:
            try:
                landed, stored = await self._in_thread(partial(self._store, asks))
            except StoreUnavailable:
                # Whether it was committed nobody knows: the keys will tell.
                if self._bell.stopping or all(ask.waiting.until <= loop.time() for ask in asks):
                    raise
                await asyncio.sleep(_AGAIN_S)
                continue
            except Overloaded as over:
                # The tenant's quota: it may have room for some of them.
                fits = len(asks) // 2
                for ask in asks[fits:]:
                    ask.fails(over)
                asks = asks[:fits]
                continue
            by_key = {place.key: place for place in landed}
            if stored:
                number = landed[0].block
                block = self._under_way.setdefault(number, _Block(group))
                block.group = group
                block.asks += [(ask, by_key[ask.key].lo) for ask in asks]
                for ask in asks:
                    ask.lands(by_key[ask.key])
                self._read()
                self._give_up_unwanted(number)
                return
            for ask in asks:
                if (place := by_key.get(ask.key)) is not None:
                    self._found(ask, place)
            asks = [ask for ask in asks if ask.key not in by_key]
        # Every ask was there before, or was refused.
        self._gatherer.failed(group)
        self._pump()

    def _store(self, asks: Sequence[Ask]) -> tuple[list[LandedAsk], bool]:
        part = _together([ask.part for ask in asks])
        new = [NewAsk(key=ask.key, digest=ask.digest, n_rows=len(ask.part)) for ask in asks]
        # A group is droppable as a whole, or not at all: the time of the last of its callers counts.
        until = max(ask.waiting.until for ask in asks)
        due_s = max(0.0, until - time.monotonic()) if asks[0].waiting.droppable else None
        say = self._ears.name if any(ask.told for ask in asks) else ""
        with self._database.transaction() as connection:
            return feeds.land_asks(connection, self.job, part, new, say=say, due_s=due_s)

    def _found(self, ask: Ask, place: LandedAsk) -> None:
        """Its key landed before, here or in another process: it waits for that block, or has its answer at once."""
        if place.digest != ask.digest:
            ask.fails(_other_rows())
            return
        ask.lands(place)
        self._under_way.setdefault(place.block, _Block(None)).asks.append((ask, place.lo))
        self._read()

    # -- giving up

    def _give_up_unwanted(self, number: int) -> None:
        """Give up a block that was landed here, if its asks may be given up and nobody waits for any of them."""
        block = self._under_way.get(number)
        if block is None or block.group is None or any(a.callers or not a.drop_late for a, _ in block.asks):
            return
        for ask, _ in block.asks:
            # From now on its key stands for new rows.
            if self._asks.get(ask.key) is ask:
                del self._asks[ask.key]
        self._spawn(self._abandon(number))

    async def _abandon(self, number: int) -> None:
        try:
            await self._in_thread(partial(self._abandoned, number))
        except StoreUnavailable:
            # It goes on, and what of it is not begun is late in its time.
            log.warning("a block was not given up", extra={"job": self.job.id, "block": number})

    def _abandoned(self, number: int) -> None:
        with self._database.transaction() as connection:
            dropping.abandon(connection, self.job.id, [number])

    def _again(self, ask: Ask) -> None:
        """Its row was given up by others who used its key, and somebody waits for it: it lands anew."""
        ask.row = ask.block = None
        ask.landed.clear()
        w = ask.waiting
        ask.waiting = Waiting(caller=ask, rows=w.rows, bytes=w.bytes, until=w.until, droppable=ask.drop_late)
        try:
            self._gatherer.add(ask.waiting, asyncio.get_running_loop().time())
        except GatherFull:
            ask.fails(_late(stored=False))
            return
        self._asks[ask.key] = ask

    # -- answering

    def _read(self) -> None:
        if not self._reading:
            self._reading = True
            self._spawn(self._answer())

    async def _answer(self) -> None:
        """Look for the blocks under way at each word about the job, and once a second, until none is left."""
        try:
            with self._bell.heard(self.job.id) as rung:
                while self._under_way:
                    rung.clear()
                    numbers = sorted(self._under_way)
                    try:
                        self._resolve(await self._in_thread(partial(self._look, numbers)), numbers)
                    except Exception as error:
                        # Whatever it was: without another look all would wait for ever, and nothing more would land.
                        if not isinstance(error, StoreUnavailable):
                            log.error("looking failed", exc_info=error, extra={"job": self.job.id})
                        await asyncio.sleep(_AGAIN_S)
                    if self._bell.stopping:
                        self._send_home(asyncio.get_running_loop().time())
                    if self._under_way:
                        try:
                            await asyncio.wait_for(rung.wait(), _POLL_S)
                        except TimeoutError:
                            continue
        finally:
            self._reading = False

    def _send_home(self, now: float) -> None:
        """The process is about to end: those who have waited on for a while are told to ask another one."""
        self._stopping_at = self._stopping_at or now
        if now - self._stopping_at < _GRACE_S:
            return
        gone = Unavailable("this server is about to end: ask again with the same key for the answer")
        for waiting in self._gatherer.drain():
            waiting.caller.fails(gone)
        for ask in list(self._asks.values()):
            ask.fails(gone)
        self._under_way.clear()

    def _look(self, numbers: Sequence[int]) -> FeedLook:
        with self._database.transaction() as connection:
            return feeds.look(connection, self.job.id, numbers, self.job.folds)

    def _resolve(self, found: FeedLook, asked: Sequence[int]) -> None:
        now = asyncio.get_running_loop().time()
        for number, columns in found.answered.items():
            block = self._under_way.pop(number)
            for ask, lo in block.asks:
                if not ask.answer.done():
                    n, row = len(ask.part), ask.row
                    assert row is not None
                    cells = {task: cut(column, lo, lo + n) for task, column in columns.items()}
                    if ask.callers and dropping.is_dropped(cells.values()):
                        self._again(ask)
                        continue
                    given = {name: v[lo : lo + n] for name, v in found.given.get(number, {}).items()}
                    ask.answer.set_result(AskAnswered(first_row=row, n_rows=n, columns=cells, given=given))
            if block.group is not None:
                self._gatherer.answered(block.group, now)
        if found.state is None or found.state in ENDED:
            # Nothing more will be answered of what was looked for.
            gone = NotFound(f"job {self.job.id} was removed")
            error = gone if found.state is None else Conflict(f"job {self.job.id} is {found.state}")
            for number in asked:
                if (block_gone := self._under_way.pop(number, None)) is not None:
                    for ask, _ in block_gone.asks:
                        ask.fails(error)
                    if block_gone.group is not None:
                        self._gatherer.failed(block_gone.group)
        self._pump()


class ReadyWorkers(NamedTuple):
    """Workers that take work."""

    workers: int = 0
    #: Answers that language models may write on them at once.
    slots: int = 0


class Feeds:
    """The open jobs that this process serves. Used from the event loop only."""

    def __init__(
        self,
        database: Database,
        bell: Bell,
        count_workers: Callable[[], ReadyWorkers],
        ears: Ears | None = None,
    ) -> None:
        self._database, self._bell, self._count_workers = database, bell, count_workers
        self._ears = ears or Ears("")
        self._feeds: dict[tuple[UUID, UUID], LiveFeed] = {}
        #: Jobs that are read now.
        self._looks = Looks[tuple[UUID, UUID], tuple[LoadingJob, Sequence[ShownTask]]]()
        self.meter = AskMeter(database, self.waiting)
        # One lands while another reads; more would only wait for the job's lock.
        self._threads = ThreadPoolExecutor(2, "asks")
        self._width = self._writing = _LEAST
        self._counted_at = -_COUNT_S
        self._counting: asyncio.Task[None] | None = None

    async def of(self, tenant: UUID, job: UUID) -> LiveFeed:
        """The tenant's job. Raises NotFound, StoreUnavailable."""
        found = self._feeds.get((tenant, job))
        if found is None:
            facts, tasks = await self._looks.at((tenant, job), partial(self._facts, tenant, job))
            found = self._feeds.get((tenant, job))
            if found is None:
                found = self._feeds[tenant, job] = self._new(facts, tasks)
                self._forget_idle()
        self._count()
        return found

    def waiting(self) -> Mapping[UUID, int]:
        """Rows of each open job that wait to land here."""
        return {job: feed.waiting_rows for (_, job), feed in list(self._feeds.items())}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._ears.close()

    def _facts(self, tenant: UUID, job: UUID) -> tuple[LoadingJob, Sequence[ShownTask]]:
        with self._database.transaction() as connection:
            return loading(connection, tenant, job), shown(connection, tenant, job).tasks

    def _new(self, job: LoadingJob, tasks: Sequence[ShownTask]) -> LiveFeed:
        writes = any(kind in ("text", "json") for kind in job.kinds)
        gatherer: Gatherer[Ask] = Gatherer(
            width=self._width,
            max_rows=GROUP_ROWS,
            max_bytes=GROUP_BYTES,
            alone=writes,
            patience_s=_PATIENCE_S,
        )
        width = (lambda: self._writing) if writes else (lambda: self._width)
        return LiveFeed(job, gatherer, self._database, self._bell, self._threads, width, tasks, self._ears)

    def _forget_idle(self) -> None:
        for key in list(self._feeds):
            if len(self._feeds) <= _KEPT:
                break
            if self._feeds[key].idle:
                del self._feeds[key]

    def _count(self) -> None:
        """Count workers now and then, beside: where Redis is away that takes seconds, and nobody waits for it."""
        if time.monotonic() - self._counted_at >= _COUNT_S and (
            self._counting is None or self._counting.done()
        ):
            self._counting = asyncio.ensure_future(self._recount())

    async def _recount(self) -> None:
        ready = await asyncio.to_thread(self._count_workers)
        self._counted_at = time.monotonic()
        self._width = min(_MOST, max(_LEAST, _EACH * ready.workers))
        self._writing = max(self._width, int(_AHEAD * ready.slots))


async def _read_along(
    words: asyncio.Queue[Said | None], answer: asyncio.Future[AskAnswered]
) -> AsyncGenerator[AskDelta | AskReset, None]:
    """What is said of a row until it is answered."""
    reading = ReadAlong()
    # The end comes as a word too: to wait for either of two things would cost two tasks for each word.
    answer.add_done_callback(lambda _: words.put_nowait(None))
    while (said := await words.get()) is not None and not answer.done():
        for event in reading.hear(said):
            yield event


def _late(*, stored: bool, row: int | None = None) -> Late:
    where = f"row {row} of the job" if row is not None else "what was stored of it"
    return Late(
        f"not answered in time: {where} goes on; ask again with the same key for its answer"
        if stored
        else "not landed in time: nothing was stored, and nothing runs; ask again",
        stored=stored,
        row=row,
    )


def _other_rows() -> Conflict:
    return Conflict("this key was used for other rows; use a new key")


def _together(parts: Sequence[IncomingPart]) -> IncomingPart:
    """The parts, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, list[Any]] = {name: [] for name in parts[0].columns}
    bad: dict[int, tuple[str, str]] = {}
    bad_fields: dict[str, dict[int, tuple[str, str]]] = {}
    rows = 0
    for part in parts:
        for name, texts in part.columns.items():
            columns[name] += texts
        bad.update((rows + i, why) for i, why in part.bad.items())
        for name, of in part.bad_fields.items():
            bad_fields.setdefault(name, {}).update((rows + i, why) for i, why in of.items())
        rows += len(part)
    return IncomingPart(columns=columns, bad=bad, bad_fields=bad_fields)
