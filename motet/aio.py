"""The client for asyncio: open jobs, with the same feeds as motet.feed beneath, whose threads do the waiting.

async with AsyncClient() as client, client.open(tasks, name="risk") as feed:
    row = await feed.ask({"text": "…"})
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from motet.client import Client, Folds, Tasks
from motet.feed import GRACE_S, AskedRow, Feed, late
from motet.job import Job
from motet.media.reading import MEDIA_SIZE
from motet.messages.jobs import Priority
from motet.results import Row
from motet.row_stream import RowStream
from motet.rows import BadRows
from motet.text_deltas import TextDelta

T = TypeVar("T")


async def _apart(work: Callable[[], T]) -> T:
    """The work's outcome, done in a thread of its own. A daemon: a program that ends does not wait for it."""
    done: Future[T] = Future()

    def run() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the work is awaited
            done.set_exception(error)

    threading.Thread(target=run, name="motet-aio", daemon=True).start()
    return await asyncio.wrap_future(done)


class AsyncFeed:
    """As ``motet.Feed``, awaited. Of an ask that is cancelled before its row was sent, nothing is sent."""

    def __init__(self, opened: Callable[[], Feed]) -> None:
        self._opened = opened
        self._feed: Feed | None = None

    @property
    def feed(self) -> Feed:
        """The feed beneath; it is there within ``async with``."""
        if self._feed is None:
            raise RuntimeError("got a feed that is not open; expected `async with client.open(…) as feed`")
        return self._feed

    @property
    def job(self) -> Job:
        return self.feed.job

    async def state(self) -> str:
        """``open`` while it takes rows; then as any job's."""
        return await _apart(lambda: self.feed.state)

    async def ask(self, row: AskedRow, *, within_s: float = 30.0, key: str | None = None) -> Row:
        """The row's merged answers; raises as ``Feed.ask``."""
        feed = self.feed
        if feed.holds_media(row):  # its files are read and sent, which takes a while
            answer = await _apart(lambda: feed.put(row, within_s=within_s, key=key))
        else:
            answer = feed.put(row, within_s=within_s, key=key)
        try:
            async with asyncio.timeout(float(within_s) + GRACE_S):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            raise late(stored=not answer.cancelled()) from None

    async def stream(
        self,
        row: AskedRow,
        *,
        task: str | None = None,
        within_s: float = 300.0,
        key: str | None = None,
        drop_late: bool = True,
    ) -> AsyncGenerator[TextDelta, None]:
        """The row's text as it is written, as ``Feed.stream``. Close it, or cancel whoever awaits it, to give the row up."""
        feed = self.feed

        def begin() -> RowStream:
            return feed.stream(row, task=task, within_s=within_s, key=key, drop_late=drop_late)

        with await _apart(begin) if feed.holds_media(row) else begin() as deltas:
            while (delta := await _apart(lambda: next(deltas, None))) is not None:
                yield delta

    async def rows(self, after: int = 0, *, skip_gone: bool = False) -> AsyncIterator[Row]:
        """Every merged row of the job as it is done, as ``Feed.rows``."""
        groups = self.feed.groups(after, skip_gone=skip_gone)
        while (rows := await _apart(lambda: next(groups, None))) is not None:
            for row in rows:
                yield row

    async def close(self) -> Job:
        """Take no more rows; returns the job, which succeeds when those it has are answered."""
        return await _apart(self.feed.close)

    async def __aenter__(self) -> AsyncFeed:
        self._feed = await _apart(self._opened)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        feed = self.feed
        try:
            await _apart(lambda: feed.__exit__(kind, error, trace))
        except asyncio.CancelledError:
            feed.interrupt()
            raise


class AsyncClient:
    """A line to one motet server for programs of asyncio; ``url``, ``token`` and ``timeout`` as of ``motet.Client``.

    It opens jobs that stay open; what else a client does is done by ``client``, the one beneath, in a thread.
    """

    def __init__(self, url: str | None = None, token: str | None = None, timeout: float = 60.0) -> None:
        self.client = Client(url, token, timeout)

    def open(
        self,
        tasks: Tasks,
        *,
        name: str,
        priority: Priority = "interactive",
        bad_rows: BadRows = "refuse",
        keep_days: float | None = None,
        retention_days: float | None = None,
        state: Folds | None = None,
        notify_when: str | None = None,
        media_root: str | os.PathLike[str] | None = None,
        media_size: int | None = MEDIA_SIZE,
        media_thumbs: bool = False,
    ) -> AsyncFeed:
        """As ``Client.open``, by ``async with``."""
        return AsyncFeed(
            lambda: self.client.open(
                tasks,
                name=name,
                priority=priority,
                bad_rows=bad_rows,
                keep_days=keep_days,
                retention_days=retention_days,
                state=state,
                notify_when=notify_when,
                media_root=media_root,
                media_size=media_size,
                media_thumbs=media_thumbs,
            )
        )

    def feed(
        self,
        name: str,
        *,
        bad_rows: BadRows = "refuse",
        media_root: str | os.PathLike[str] | None = None,
        media_size: int | None = MEDIA_SIZE,
        media_thumbs: bool = False,
    ) -> AsyncFeed:
        """As ``Client.feed``, by ``async with``."""
        return AsyncFeed(
            lambda: self.client.feed(
                name,
                bad_rows=bad_rows,
                media_root=media_root,
                media_size=media_size,
                media_thumbs=media_thumbs,
            )
        )

    async def close(self) -> None:
        """Close the connections. Jobs go on."""
        await _apart(self.client.close)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
