"""The herald: the launcher's word to the scheduler that a worker's process has ended, said at once.

It is the beat with which the next process will begin: another boot in a worker's place proves that the one before
is dead (docs/decisions/0005), and its rows go on elsewhere while the next one still starts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from motet.protocol.logs import event
from motet.protocol.transport import RedisWorkerTransport, TransportLost
from motet.protocol.wire import Beat

log = logging.getLogger(__name__)

#: Wait between two tries while Redis is away.
RETRY_S = 0.25


class Herald:
    """One thread that tells, however long that takes, so that the launcher never waits for Redis."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        """``tell``: says once that ``worker`` now is the process ``boot``. Raises TransportLost."""
        self._tell = tell
        self._changed = threading.Condition()
        #: Worker -> the boot to tell of: only its newest counts.
        self._waiting: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="herald", daemon=True)

    def announce(self, worker: str, boot: str) -> None:
        """Have it told. Twice is harmless, and late too: the process that it names begins with the same beat."""
        with self._changed:
            self._waiting[worker] = boot
            self._changed.notify_all()
        if not self._thread.is_alive():
            self._thread.start()

    def finish(self, patience_s: float) -> bool:
        """Wait until all is told. False where that took longer than ``patience_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, patience_s)

    def step(self) -> bool:
        """Tell of those that wait. False where Redis is away: they wait on."""
        with self._changed:
            waiting = dict(self._waiting)
        for worker, boot in waiting.items():
            try:
                self._tell(worker, boot)
            except TransportLost:
                return False
            with self._changed:
                if self._waiting.get(worker) == boot:
                    del self._waiting[worker]
                self._changed.notify_all()
        return True

    def _run(self) -> None:
        lost = False
        while True:
            with self._changed:
                if lost:
                    self._changed.wait(RETRY_S)
                self._changed.wait_for(lambda: bool(self._waiting))
            was_lost, lost = lost, not self.step()
            if lost and not was_lost:
                event(log, "redis lost", logging.WARNING)


def tell(redis_url: str, worker: str, boot: str) -> None:
    """Set the worker's beat to that of a process which starts. Raises TransportLost."""
    transport = RedisWorkerTransport(redis_url, worker)
    try:
        transport.beat(Beat(worker=worker, boot=boot, seq=0, state="starting"))
    finally:
        transport.close()
