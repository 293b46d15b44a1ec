"""The deliverer: hands new events to webhooks, and tries each until it came through or its day is over.

It runs in the processes of the API, in one of them at a time. ``step`` is the whole of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, TypeVar

import psycopg

from motet.protocol.settings import Settings
from scheduler.identity import is_gone, own_name
from scheduler.store import webhooks as store
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.listening import event_hints
from scheduler.store.webhooks import DueDelivery
from scheduler.webhooks.posting import NotTaken, post
from scheduler.webhooks.telling import message, message_id, signed_headers

log = logging.getLogger(__name__)

T = TypeVar("T")
#: How a try may end, and what becomes of an event that was tried for too long.
Tried = Literal["delivered", "failed", "given_up"]

#: Messages under way to one webhook. More: a busy receiver is told sooner of many events. Fewer: it is spared.
PER_WEBHOOK = 4
#: Messages under way in all. More: connections of this process. Fewer: many silent receivers hold up the others.
_AT_ONCE = 256
#: Seconds for which a process delivers without saying so anew. Longer: events wait for longer when it dies.
_LEASE_S = 6.0
_RENEW_S = 2.0
#: Seconds after which it is looked for events and due deliveries that nobody told of.
_POLL_S = 1.0
_GIVE_UP_EVERY_S = 60.0
#: Seconds before the second try of a message, and the factor and the bound of those that follow.
_FIRST_S, _FACTOR, _LAST_S = 5.0, 4.0, 4 * 3600.0
#: Seconds for which a webhook is left alone after failures in a row, doubled by each of them, and their bound. Longer: it
#: is told later when it is back. Shorter: a dead receiver is knocked at more often.
_REST_S, _LONGEST_REST_S = 2.5, 300.0


def again_after_s(attempts: int, dice: float) -> float:
    """Seconds until a message is tried again that failed so often, at least once; ``dice``: 0 to 1."""
    return min(_LAST_S, _FIRST_S * _FACTOR ** (min(attempts, 10) - 1)) * (0.8 + 0.4 * dice)


def rest_after_s(failures: int) -> float:
    """Seconds for which a webhook is left alone after so many failures in a row."""
    return float(min(_LONGEST_REST_S, _REST_S * 2 ** min(failures, 10)))


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Hosts of the own network that webhooks may name, each as host or host:port."""
    return frozenset(one.strip().lower() for one in settings.webhook_hosts.split(",") if one.strip())


class Deliverer:
    """Used from one event loop; Postgres is spoken to in two threads of its own."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        me: str = "",
        dice: Callable[[], float] = random.random,
        heard: Callable[[Tried, int], None] = lambda result, count: None,
    ) -> None:
        """``heard``: told how tries end here, and of how many. From any thread."""
        self._database, self._ca = database, settings.webhook_ca
        self._allowed = allowed_hosts(settings)
        self._me, self._dice, self._heard = me or own_name(), dice, heard
        self._threads = ThreadPoolExecutor(2, "webhooks")
        self._under_way: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._rung = asyncio.Event()
        self._renew_at = self._give_up_at = 0.0
        self._leads = False

    async def run(self) -> None:
        """Deliver for ever, or stand by while another process does."""
        listening = asyncio.create_task(self._listen())
        try:
            while True:
                self._rung.clear()
                try:
                    more = await self.step()
                except StoreUnavailable:
                    self._leads, more = False, False
                except Exception:
                    log.exception("deliveries stopped for a moment")
                    more = False
                if not self._leads:
                    await asyncio.sleep(_POLL_S)
                elif not more:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._rung.wait(), _POLL_S)
        finally:
            await self._stop(listening)

    async def step(self) -> bool:
        """Hand over new events and begin what is due, where this process delivers. True where there may be more."""
        more, due = await self._in_thread(self._look)
        for one in due:
            key = one.webhook, one.event
            if key not in self._under_way and len(self._under_way) < _AT_ONCE:
                self._under_way[key] = asyncio.create_task(self._deliver(one))
        return more

    async def drain(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way.values())

    def _look(self) -> tuple[bool, list[DueDelivery]]:
        now = time.monotonic()
        with self._database.transaction() as connection:
            if not self._leads or now >= self._renew_at:
                holder = self._me if self._leads else store.deliverer(connection)
                gone = holder if holder != self._me and is_gone(holder) else None
                self._leads = store.may_deliver(connection, self._me, _LEASE_S, gone)
                self._renew_at = now + _RENEW_S
            if not self._leads:
                return False, []
            if now >= self._give_up_at:
                self._give_up_at = now + _GIVE_UP_EVERY_S
                given_up = store.give_up(connection)
                self._heard("given_up", given_up)
            return store.next_deliveries(connection, PER_WEBHOOK)

    async def _deliver(self, due: DueDelivery) -> None:
        """One try, and its record. Where that is not written, it is tried again: twice is better than never."""
        key, began = (due.webhook, due.event), time.monotonic()
        said = ""
        try:
            body, name = message(due), message_id(due.event, due.created)
            try:
                headers = signed_headers(due.secret, name, time.time(), body)
                await post(due.url, headers, body, allowed=self._allowed, ca=self._ca)
            except NotTaken as why:
                said = str(why)
            await self._in_thread(lambda: self._record(due, said))
            log.info(
                "event not taken" if said else "event delivered",
                extra={
                    "webhook": due.webhook,
                    "event": name,
                    "job": str(due.job),
                    "attempt": due.attempts + 1,
                    "ms": round((time.monotonic() - began) * 1000, 1),
                    "why": said,
                },
            )
        except StoreUnavailable:
            log.warning("a delivery was not recorded", extra={"webhook": due.webhook})
        except Exception:
            # Else it would be tried again at once, for ever.
            log.exception("a delivery failed", extra={"webhook": due.webhook})
            with suppress(StoreUnavailable):
                await self._in_thread(lambda: self._record(due, "the server failed; its log says more"))
        finally:
            del self._under_way[key]
            self._rung.set()

    def _record(self, due: DueDelivery, said: str) -> None:
        with self._database.transaction() as connection:
            if not said:
                store.delivered(connection, due.webhook, due.event)
                given_up = False
            else:
                again_s = again_after_s(due.attempts + 1, self._dice())
                rest_s = rest_after_s(due.failures + 1)
                given_up = store.not_delivered(
                    connection, due.webhook, due.event, said, again_s=again_s, rest_s=rest_s
                )
        self._heard("failed" if said else "delivered", 1)
        self._heard("given_up", int(given_up))

    async def _listen(self) -> None:
        while True:
            try:
                async for _ in event_hints(self._database.libpq_url):
                    self._rung.set()
            except (psycopg.Error, OSError):
                log.warning("listening for events lost")
            await asyncio.sleep(_POLL_S)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _stop(self, listening: asyncio.Task[None]) -> None:
        """What is under way is cut off, and tried again by whoever delivers next."""
        for task in (listening, *self._under_way.values()):
            task.cancel()
        await asyncio.gather(listening, *self._under_way.values(), return_exceptions=True)
        if self._leads:
            with suppress(StoreUnavailable):
                await self._in_thread(self._resign)
        self._threads.shutdown()

    def _resign(self) -> None:
        with self._database.transaction() as connection:
            store.stop_delivering(connection, self._me)
