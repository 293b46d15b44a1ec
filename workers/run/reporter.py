"""Puts outcomes on the stream, however long that takes, away from the thread that owns the device."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from motet.protocol.logs import event
from motet.protocol.transport import TransportLost, WorkerTransport
from motet.protocol.wire import Outcome
from workers.run.attempts import Attempts, Key

log = logging.getLogger(__name__)

#: Wait between two tries while Redis is away.
RETRY_S = 0.5


class Reporter:
    """One thread that encodes and sends outcomes in the order in which they were finished."""

    def __init__(self, transport: WorkerTransport, attempts: Attempts) -> None:
        self._transport = transport
        self._attempts = attempts
        self._waiting: queue.SimpleQueue[tuple[Key, Callable[[], Outcome], threading.Event]] = (
            queue.SimpleQueue()
        )
        self._stopped = threading.Event()

    def put(self, key: Key, outcome: Callable[[], Outcome], sent: threading.Event) -> None:
        """Report what ``outcome`` returns, then set ``sent``. Its columns are put together over here."""
        self._waiting.put((key, outcome, sent))

    def step(self, patience_s: float = 0.0) -> bool:
        """Send one outcome; False where none came within ``patience_s``."""
        try:
            key, outcome, sent = (
                self._waiting.get(timeout=patience_s) if patience_s else self._waiting.get_nowait()
            )
        except queue.Empty:
            return False
        # Held until it is on the stream: in between the scheduler would take it for lost.
        self._send(key, outcome())
        self._attempts.release(key)
        sent.set()
        return True

    def run(self) -> None:
        while not self._stopped.is_set():
            self.step(patience_s=0.5)

    def stop(self) -> None:
        """Give up what could not be sent: its lease ends by itself."""
        self._stopped.set()

    def _send(self, key: Key, outcome: Outcome) -> None:
        body = outcome.encode()
        subtask, attempt = key
        tries = 0
        while not self._attempts.dropped(key) and not self._stopped.is_set():
            try:
                # Twice is harmless (a time-out may hide a success): the second is fenced off.
                self._transport.report(subtask, attempt, body)
            except TransportLost:
                tries += 1
                if tries == 1:
                    event(log, "redis lost, outcome waits", logging.WARNING, subtask=subtask, attempt=attempt)
                self._stopped.wait(RETRY_S)
                continue
            u = outcome.usage
            event(
                log,
                "reported",
                subtask=subtask,
                attempt=attempt,
                verdict=outcome.verdict,
                error=outcome.error[0] if outcome.error else None,
                bytes=len(body),
                tokens=u.tokens,
                micro_batches=u.micro_batches,
                busy_s=round(u.busy_s, 4),
                load_s=round(u.load_s, 3),
            )
            return
