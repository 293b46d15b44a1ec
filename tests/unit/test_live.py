"""Live: the asks of one process, with a store that is slow, away, broken, or ends the job."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest

from motet.errors import Late, MotetError
from motet.protocol.columns import Column
from scheduler.api import live
from scheduler.api.bell import Bell
from scheduler.api.live import Ask, AskAnswered, Feeds, LiveFeed, ReadyWorkers
from scheduler.api.refusals import Unavailable
from scheduler.blocks import IncomingPart
from scheduler.policy.gather import Gatherer
from scheduler.store.database import StoreUnavailable
from scheduler.store.feeds import FeedLook, LandedAsk


class Store(LiveFeed):
    """A feed whose Postgres is this object: blocks are answered when ``answers`` says so."""

    def __init__(self, threads: ThreadPoolExecutor, *, width: int = 1) -> None:
        self.landed: dict[bytes, LandedAsk] = {}
        self.blocks = 0
        self.answers = True
        #: Raised by the next landings and looks, one each.
        self.failing: list[Exception] = []
        self.failing_looks: list[Exception] = []
        self.bell = Bell("postgresql://nowhere")
        gatherer: Gatherer[Ask] = Gatherer(width=width, max_rows=16, max_bytes=1 << 20)
        job: Any = type("Job", (), {"id": uuid.uuid4()})()
        nowhere: Any = None
        super().__init__(job, gatherer, nowhere, self.bell, threads, lambda: width, ())

    def _store(self, asks: Sequence[Ask]) -> tuple[list[LandedAsk], bool]:
        if self.failing:
            raise self.failing.pop(0)
        known = [self.landed[a.key] for a in asks if a.key in self.landed]
        if known:
            return known, False
        lo, found = 0, []
        for a in asks:
            one = LandedAsk(
                key=a.key, digest=a.digest, block=self.blocks, lo=lo, n_rows=len(a.part), first_row=0
            )
            self.landed[a.key] = one
            found.append(one)
            lo += len(a.part)
        self.blocks += 1
        return found, True

    def _look(self, numbers: Sequence[int]) -> FeedLook:
        if self.failing_looks:
            raise self.failing_looks.pop(0)
        column = Column(kind="label", status=bytes(64), arrays={"codes": bytes(128), "scores": bytes(256)})
        return FeedLook(state="open", answered={n: {0: column} for n in numbers if self.answers})

    async def asks(self, key: str, within_s: float = 5.0, digest: str = "same") -> AskAnswered:
        part = IncomingPart(columns={"text": ["a"]})
        return await self.ask(part, 1, key.encode(), digest.encode(), within_s=within_s)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_POLL_S", 0.02)
    monkeypatch.setattr(live, "_AGAIN_S", 0.01)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def test_a_caller_that_gives_up_takes_its_key_from_nobody_else(threads: ThreadPoolExecutor) -> None:
    """Two callers with one key: the first has little time, and the rows wait for the second all the same."""

    async def play() -> None:
        feed = Store(threads)
        feed.answers = False
        before = asyncio.ensure_future(feed.asks("before"))
        await asyncio.sleep(0.02)
        hasty = asyncio.ensure_future(feed.asks("shared", within_s=0.05))
        patient = asyncio.ensure_future(feed.asks("shared"))
        gone = asyncio.ensure_future(feed.asks("cancelled"))
        beside = asyncio.ensure_future(feed.asks("cancelled"))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(Late):
            await hasty
        await asyncio.sleep(0.02)
        feed.answers = True
        for answer in await asyncio.gather(before, patient, beside):
            assert answer.n_rows == 1
        assert {key.decode() for key in feed.landed} == {"before", "shared", "cancelled"}

    asyncio.run(play())


def test_nothing_lands_once_all_callers_of_a_key_are_gone(threads: ThreadPoolExecutor) -> None:
    async def play() -> None:
        feed = Store(threads)
        feed.answers = False
        before = asyncio.ensure_future(feed.asks("before"))
        await asyncio.sleep(0.02)
        found = await asyncio.gather(
            *(feed.asks("shared", within_s=s) for s in (0.02, 0.05)), return_exceptions=True
        )
        assert [isinstance(one, Late) and one.stored for one in found] == [False, False]
        feed.answers = True
        await before
        await asyncio.sleep(0.05)
        assert list(feed.landed) == [b"before"]
        assert feed.idle

    asyncio.run(play())


def test_a_key_is_free_again_as_soon_as_its_ask_has_failed(threads: ThreadPoolExecutor) -> None:
    """In the same turn of the loop, before anybody is told of the failure; and stays that of the new ask afterwards."""

    async def play() -> None:
        feed = Store(threads)
        feed.answers = False
        first = asyncio.ensure_future(feed.asks("key"))
        await asyncio.sleep(0)
        feed._asks[b"key"].fails(RuntimeError("broken"))
        again = asyncio.ensure_future(feed.asks("key"))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await first
        await asyncio.sleep(0.05)
        assert b"key" in feed._asks
        feed.answers = True
        assert (await again).n_rows == 1
        assert not feed._asks

    asyncio.run(play())


@pytest.mark.parametrize("error", [StoreUnavailable("away"), RuntimeError("a fault of ours"), KeyError(7)])
def test_a_look_that_fails_leaves_nobody_waiting_for_ever(
    threads: ThreadPoolExecutor, error: Exception
) -> None:
    async def play() -> None:
        feed = Store(threads)
        feed.failing_looks = [error, error]
        assert (await feed.asks("key", within_s=2.0)).n_rows == 1
        assert (await feed.asks("next", within_s=2.0)).n_rows == 1

    asyncio.run(play())


def test_a_commit_whose_answer_was_lost_lands_once_and_is_answered(threads: ThreadPoolExecutor) -> None:
    async def play() -> None:
        feed = Store(threads)
        store = feed._store

        def lost(asks: Sequence[Ask]) -> Any:
            store(asks)
            feed._store = store  # type: ignore[method-assign]
            raise StoreUnavailable("nobody knows")

        feed._store = lost  # type: ignore[method-assign]
        assert (await feed.asks("key")).first_row == 0
        assert feed.blocks == 1
        assert (await feed.asks("next")).n_rows == 1

    asyncio.run(play())


def test_who_waits_when_the_process_is_told_to_end_is_told_to_come_back(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_GRACE_S", 0.1, raising=False)

    async def play() -> None:
        feed = Store(threads)
        feed.answers = False
        waiting = []
        for key in ("landed", "queued"):
            waiting.append(asyncio.ensure_future(feed.asks(key, within_s=60)))
            await asyncio.sleep(0.05)
        feed.bell.stop()
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 2.0)
        assert [type(one) for one in found] == [Unavailable, Unavailable]
        assert list(feed.landed) == [b"landed"]

    asyncio.run(play())


def test_rows_that_come_together_land_together(threads: ThreadPoolExecutor) -> None:
    """A client sends the rows of its threads in one request: the first of them does not run off alone."""

    async def play() -> None:
        feed = Store(threads, width=4)
        await asyncio.gather(*(feed.asks(str(n)) for n in range(32)))
        assert feed.blocks == 2

    asyncio.run(play())


def test_ten_thousand_callers_of_one_job_cost_seconds_not_minutes(threads: ThreadPoolExecutor) -> None:
    """What does not fit is refused at once, what fits is answered; nobody is looked for in a queue from end to end."""

    async def play() -> tuple[int, int]:
        feed = Store(threads, width=4)
        found = await asyncio.gather(
            *(feed.asks(str(n), within_s=30) for n in range(10_000)), return_exceptions=True
        )
        assert feed.idle
        answered = sum(isinstance(one, AskAnswered) for one in found)
        return answered, sum(isinstance(one, MotetError) for one in found)

    answered, refused = asyncio.run(asyncio.wait_for(play(), 30))
    assert answered + refused == 10_000
    assert answered >= 1000


def test_workers_that_cannot_be_counted_hold_nobody_up() -> None:
    """Redis may take seconds to say that it is away: that is no caller's business."""

    async def play() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def count() -> ReadyWorkers:
            import time

            time.sleep(0.5)
            loop.call_soon_threadsafe(ended.set)
            return ReadyWorkers(9, 288)

        database: Any = None
        feeds = Feeds(database, Bell("postgresql://nowhere"), count)
        feeds._facts = lambda tenant, job: (_job(job), ())  # type: ignore[method-assign]
        began = loop.time()
        await asyncio.gather(*(feeds.of(uuid.uuid4(), uuid.uuid4()) for _ in range(8)))
        assert loop.time() - began < 0.3
        await ended.wait()
        await asyncio.sleep(0.05)
        assert (feeds._width, feeds._writing) == (18, 360)
        feeds.close()

    asyncio.run(play())


def _job(job: UUID) -> Any:
    return type("Job", (), {"id": job, "kinds": ("label",)})()
