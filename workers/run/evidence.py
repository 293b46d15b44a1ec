"""What runs, written down before it does: after a death only these rows are suspected of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from motet.protocol.logs import event
from motet.protocol.transport import TransportLost, WorkerTransport
from motet.protocol.wire import Running
from workers.run.attempts import Key

log = logging.getLogger(__name__)

#: While Redis is away, it is tried again only so often.
MARK_AGAIN_S = 2.0


class Evidence:
    """The mark in Redis of one process. Belongs to the thread that owns the device."""

    def __init__(
        self, transport: WorkerTransport, boot: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transport, self._boot, self._clock = transport, boot, clock
        self._marked: Mapping[Key, tuple[int, ...]] | None = None
        self._again_at = float("-inf")

    def mark(self, rows: Mapping[Key, tuple[int, ...]] | None) -> None:
        """Write down the rows that run from now on; None: none do. While Redis is away work goes on without it."""
        if rows == self._marked or self._clock() < self._again_at:
            return
        try:
            self._transport.mark_running(None if rows is None else Running(boot=self._boot, rows=rows))
            self._marked = rows
        except TransportLost as error:
            event(log, "what runs could not be written down", logging.WARNING, why=str(error))
            self._again_at = self._clock() + MARK_AGAIN_S
