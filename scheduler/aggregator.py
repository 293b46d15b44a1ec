"""The aggregator: outcomes in, cells out. Stateless; any number may run."""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from motet.settings import Settings
from motet.transport import Entry, SchedulerTransport, TransportLost
from motet.wire import BadMessage, Outcome, Usage
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.outcomes import Recorded, record

log = logging.getLogger(__name__)

#: Entries taken at once: enough to share a commit, few enough to stay far below the reclaim time.
BATCH = 64
#: Bytes of outcomes in one transaction, where one is not larger: labels never come near it, vectors do. Whoever waits for
#: one row waits for the transaction before.
BATCH_BYTES = 4 * 1024 * 1024
#: Outcomes of so few bytes, such as those of interactive rows, do not wait for the large ones beside them.
SMALL_BYTES = 16 * 1024
#: Seconds that one read waits for the first entry; also how long a stop may wait for it.
BLOCK_S = 0.5


@dataclass
class Aggregator:
    """One aggregator process. ``step`` is the whole of it."""

    database: Database
    transport: SchedulerTransport
    settings: Settings
    me: str = field(default_factory=lambda: f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}")

    def step(self, block_s: float = BLOCK_S) -> int:
        """Take what waits, commit it, only then acknowledge it. The number of entries dealt with."""
        entries = self.transport.read_outcomes(self.me, BATCH, block_s, self.settings.reclaim_s)
        for batch in batches(entries):
            self._settle(batch)
        return len(entries)

    def _settle(self, entries: Sequence[Entry]) -> None:
        """Commit what these entries say, then acknowledge them."""
        outcomes: list[Outcome] = []
        read: list[str] = []
        for entry in entries:
            try:
                outcomes.append(Outcome.decode(entry.body))
                read.append(entry.id)
            except BadMessage as bad:
                log.warning("buried an unreadable outcome", extra={"entry": entry.id, "why": str(bad)[:200]})
                self.transport.bury(entry, str(bad)[:200])
        if outcomes:
            done = self._record(outcomes)
            self.transport.acknowledge(read)
            if done.dropped or done.failed:
                log.info(
                    "recorded",
                    extra={"accepted": done.accepted, "dropped": done.dropped, "failed": done.failed},
                )

    def _record(self, outcomes: Sequence[Outcome]) -> Recorded:
        """Record them together; if that fails for a reason nobody foresaw, one by one, so that one cannot stop all."""
        try:
            return record(self.database, outcomes)
        except StoreUnavailable:
            raise
        except Exception as error:
            log.exception("outcomes could not be recorded", extra={"outcomes": len(outcomes)})
            if len(outcomes) == 1:
                why = ("bad_outcome", type(error).__name__)
                failed = replace(
                    outcomes[0], verdict="failed", columns={}, usage=Usage(), error=why, refused=""
                )
                return record(self.database, [failed])
        done = Recorded()
        for outcome in outcomes:
            done.add(self._record([outcome]))
        return done


def batches(entries: Sequence[Entry], most_bytes: int = BATCH_BYTES) -> Iterator[list[Entry]]:
    """The small entries, then the large ones, each in order, as many together as fit, one at least.

    What is decoded at a time stays bounded.
    """
    for small in (True, False):
        batch: list[Entry] = []
        size = 0
        for entry in entries:
            if (len(entry.body) <= SMALL_BYTES) is not small:
                continue
            if batch and size + len(entry.body) > most_bytes:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += len(entry.body)
        if batch:
            yield batch


def run(aggregator: Aggregator, stopping: threading.Event) -> None:
    """Step until ``stopping``. Trouble with Postgres or Redis is waited out: entries stay until they are committed."""
    while not stopping.is_set():
        try:
            aggregator.step()
        except (StoreUnavailable, TransportLost) as trouble:
            log.warning("waiting for a service", extra={"trouble": f"{type(trouble).__name__}: {trouble}"})
            time.sleep(0.5)
