"""The aggregator: outcomes in, cells out. Stateless; any number may run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from motet.protocol.envelope import BadMessage, unfolded_bytes
from motet.protocol.settings import Settings
from motet.protocol.transport import Entry, SchedulerTransport, TransportLost
from motet.protocol.wire import Outcome, Usage
from scheduler.identity import is_gone, own_name
from scheduler.pulse import pulse
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.outcomes import Recorded, record

log = logging.getLogger(__name__)

#: Entries taken at once: enough to share a commit, few enough to stay far below the reclaim time.
BATCH = 64
#: Bytes of outcomes, unfolded, in one transaction, where one is not larger: labels never come near it, vectors do.
#: Whoever waits for one row waits for the transaction before.
BATCH_BYTES = 6 * 1024 * 1024
#: Outcomes of so few bytes, unfolded, such as those of interactive rows, do not wait for the large ones beside them.
SMALL_BYTES = 32 * 1024
#: Seconds that one read waits for the first entry; also how long a stop may wait for it.
BLOCK_S = 0.5
#: What dead aggregators of this machine left is looked for so often: they are not waited for as those elsewhere are.
_INHERIT_S = 1.0


@dataclass
class Aggregator:
    """One aggregator process. ``step`` is the whole of it."""

    database: Database
    transport: SchedulerTransport
    settings: Settings
    me: str = field(default_factory=own_name)

    def __post_init__(self) -> None:
        self._inherit_at = 0.0
        #: What was read and could not be dealt with, because Postgres or Redis went away meanwhile.
        self._unsettled: list[Entry] = []

    def step(self, block_s: float = BLOCK_S) -> int:
        """Take what waits, commit it, only then acknowledge it. The number of entries dealt with."""
        entries = (
            self._unsettled
            or self._inherited()
            or self.transport.read_outcomes(self.me, BATCH, block_s, self.settings.reclaim_s)
        )
        self._unsettled = list(entries)
        for batch in batches(entries):
            self._settle(batch)
            self._unsettled = [entry for entry in self._unsettled if entry not in batch]
        return len(entries)

    def _inherited(self) -> list[Entry]:
        """What a dead aggregator of this machine had read; as long as there is some it is looked for again at once."""
        now = time.monotonic()
        if now < self._inherit_at:
            return []
        entries = self.transport.inherit(self.me, is_gone, BATCH)
        if not entries:
            self._inherit_at = now + _INHERIT_S
        return entries

    def _settle(self, entries: Sequence[Entry]) -> None:
        """Commit what these entries say, then acknowledge them; bury those that say nothing."""
        outcomes: dict[str, Outcome] = {}
        unreadable: list[tuple[Entry, str]] = []
        for entry in entries:
            try:
                outcomes[entry.id] = Outcome.decode(entry.body)
            except BadMessage as bad:
                unreadable.append((entry, str(bad)[:200]))
        if outcomes:
            done = self._record(list(outcomes.values()))
            self.transport.acknowledge(outcomes)
            if done.dropped or done.failed:
                log.info(
                    "recorded",
                    extra={"accepted": done.accepted, "dropped": done.dropped, "failed": done.failed},
                )
        for entry, why in unreadable:
            log.warning("buried an unreadable outcome", extra={"entry": entry.id, "why": why})
            self.transport.bury(entry, why)

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
                return self._record_failed(failed)
        done = Recorded()
        for outcome in outcomes:
            done.add(self._record([outcome]))
        return done

    def _record_failed(self, outcome: Outcome) -> Recorded:
        """The last try: if even this cannot be recorded the outcome is dropped, and its lease runs out."""
        try:
            return record(self.database, [outcome])
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("an outcome was dropped", extra={"subtask": outcome.subtask})
            return Recorded(dropped=1)


def batches(entries: Sequence[Entry], most_bytes: int = BATCH_BYTES) -> Iterator[list[Entry]]:
    """The small entries, then the large ones, each in order, as many together as fit, one at least.

    What is decoded at a time stays bounded.
    """
    sized = [(entry, unfolded_bytes(entry.body)) for entry in entries]
    for small in (True, False):
        batch: list[Entry] = []
        size = 0
        for entry, more in sized:
            if (more <= SMALL_BYTES) is not small:
                continue
            if batch and size + more > most_bytes:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += more
        if batch:
            yield batch


def run(aggregator: Aggregator, stopping: threading.Event) -> None:
    """Step until ``stopping``. Trouble with Postgres or Redis is waited out: entries stay until they are committed."""
    beat = pulse(aggregator.settings.pulse)
    while not stopping.is_set():
        beat()
        try:
            aggregator.step()
        except (StoreUnavailable, TransportLost) as trouble:
            log.warning("waiting for a service", extra={"trouble": f"{type(trouble).__name__}: {trouble}"})
            time.sleep(0.5)
