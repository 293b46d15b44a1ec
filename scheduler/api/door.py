"""The door: whether new rows are taken now. Facts are at most about a second old, so no request pays for them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from motet.errors import Overloaded
from motet.messages.cluster import Reason
from motet.protocol.settings import Settings
from motet.protocol.transport import Lag, SchedulerTransport, TransportLost
from scheduler.api.looks import Looks
from scheduler.policy.pressure import OUTCOMES, PressureFacts, overloads
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.pressure import data_folder, unfinished_rows

log = logging.getLogger(__name__)

_FRESH_S = 1.0
#: After a slow look the next waits so many times as long: a Redis that is away must not delay every request.
_REST = 5.0
_MB = 1 << 20


class Door:
    """One per process. Safe between threads."""

    def __init__(
        self,
        database: Database,
        transport: SchedulerTransport | None,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._transport, self._settings, self._clock = database, transport, settings, clock
        self._looking = Lock()
        #: Those that asks wait for.
        self._looks = Looks[None, PressureFacts]()
        self._facts: PressureFacts | None = None
        self._look_again_at = 0.0
        self._refused_for: list[Reason] = []

    def admit(self, *, interactive: bool, uploading: bool = False) -> None:
        """Raises Overloaded where rows like these are not taken now, StoreUnavailable where nobody knows."""
        _judge(self.look(), interactive=interactive, uploading=uploading)

    async def admit_ask(self, *, interactive: bool) -> None:
        """As ``admit``, for the event loop: once a second one ask waits for a look, all others go by what is known.

        While Postgres is away nothing is refused here: the landing waits for it as long as the caller does.
        """
        known, looks = self._facts, self._looks
        if known is None or (self._clock() >= self._look_again_at and not looks.under_way(None)):
            with suppress(StoreUnavailable):
                await looks.at(None, self.look)
        if self._facts is not None:
            _judge(self._facts, interactive=interactive)

    def look(self) -> PressureFacts:
        """The facts as of a moment ago. Raises StoreUnavailable."""
        known = self._facts
        if known is not None and self._clock() < self._look_again_at:
            return known
        # One looks; the others go by what was known before, where anything was.
        if not self._looking.acquire(blocking=known is None):
            assert known is not None
            return known
        try:
            if self._facts is None or self._clock() >= self._look_again_at:
                began = self._clock()
                self._facts = self._ask()
                now = self._clock()
                self._look_again_at = now + max(_FRESH_S, _REST * (now - began))
                self._tell(self._facts)
            return self._facts
        finally:
            self._looking.release()

    def _ask(self) -> PressureFacts:
        with self._database.transaction() as connection:
            running, loading = unfinished_rows(connection)
            folder = data_folder(connection) if self._settings.min_free_mb else None
        lag, memory_share = self._redis()
        return PressureFacts(
            rows_running=running,
            rows_loading=loading,
            max_waiting_rows=self._settings.max_waiting_rows,
            lag=lag,
            memory_share=memory_share,
            free_bytes=_free_bytes(folder),
            min_free_bytes=self._settings.min_free_mb * _MB,
        )

    def _redis(self) -> tuple[Lag | None, float | None]:
        if self._transport is None:
            return None, None
        try:
            entries = self._transport.outcome_backlog()
            # To ask for its age brings a whole outcome along, and it counts beyond the hard limit only.
            lag = self._transport.outcome_lag() if entries >= OUTCOMES[1] else Lag(entries, 0.0)
            return lag, self._transport.memory_share()
        except TransportLost:
            return None, None

    def _tell(self, facts: PressureFacts) -> None:
        """Write down when the door is shut and when it opens, once each."""
        reasons = [overload.reason for overload in overloads(facts)]
        if reasons != self._refused_for:
            self._refused_for = reasons
            log.warning(
                "new rows are refused" if reasons else "new rows are taken", extra={"reasons": reasons}
            )


def _judge(facts: PressureFacts, *, interactive: bool, uploading: bool = False) -> None:
    worst = next(overloads(facts, interactive=interactive, uploading=uploading), None)
    if worst is not None:
        raise Overloaded(f"{worst.what}; {worst.remedy}", worst.retry_after_s)


def _free_bytes(folder: str | None) -> int | None:
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except OSError:
        # The socket leads into a container or to a pooler: that folder is not one of ours.
        return None
