"""What workers are told: which attempts they are to drop, whether they are to drain. Only whom something is new for is told."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from itertools import takewhile

from motet.protocol.transport import SchedulerTransport
from motet.protocol.wire import PROTOCOL, Beat, Control
from scheduler.policy.liveness import attuned, drops, speaks
from scheduler.store.leases import LeaseKey

log = logging.getLogger(__name__)

#: Seconds in which a worker's beats stop naming an attempt that it has ended itself. Longer: one that did not notice is told
#: to drop it later. Shorter: workers are told what they know.
_ENDING_S = 3.0
#: Workers that are told something in one beat step at most: ten thousand at once would make it too long.
_MOST = 2_000


class Controls:
    """The words that workers were told last in this term, and whom to look at again."""

    def __init__(self, transport: SchedulerTransport) -> None:
        self._transport = transport
        self._told: dict[str, Control] = {}
        #: Workers for whom something may be new.
        self.due: set[str] = set()
        #: Attempts taken back from a worker, until when it is told so: their messages may still lie in its queue.
        self._recalled: dict[str, dict[LeaseKey, float]] = {}
        #: Attempts that their worker has ended itself, and until when a beat may name them still, oldest first.
        self._ended: dict[LeaseKey, tuple[str, float]] = {}
        #: (worker, boot) of those whose protocol was told to the log.
        self._strangers: set[tuple[str, str]] = set()

    def recalled(self, worker: str, key: LeaseKey, until: float) -> None:
        """An attempt was taken back from a worker's queue."""
        self._recalled.setdefault(worker, {})[key] = until

    def ended(self, worker: str, key: LeaseKey, now: float) -> None:
        """The outcome of an attempt was recorded that a worker has reported."""
        self._ended[key] = (worker, now + _ENDING_S)

    def lost(self, workers: Collection[str]) -> None:
        """Redis was emptied: what was told to these workers is gone."""
        self._told.clear()
        self.due.update(workers)

    def tell(
        self,
        epoch: int,
        live: Mapping[str, Beat],
        leased: AbstractSet[LeaseKey],
        drained: AbstractSet[str],
        now: float,
    ) -> None:
        """Tell workers which of their attempts have no lease any more, and whether they are to drain."""
        self.due |= self._recalled.keys()
        self._recalled = {
            name: kept
            for name, keys in self._recalled.items()
            if (kept := {key: until for key, until in keys.items() if until > now})
        }
        for key in [key for key, _ in takewhile(lambda ended: ended[1][1] <= now, self._ended.items())]:
            self.due.add(self._ended.pop(key)[0])
        names = sorted(self.due)
        some = [name for name in names[:_MOST] if name in live]
        queues = self._transport.queued_at([name for name in some if live[name].state == "draining"])
        words: dict[str, Control] = {}
        nothing = {drain: Control(epoch=epoch, drain=drain) for drain in (False, True)}
        for name in some:
            # What was taken back from the queue of a worker that drains still lies there: it must not run it when it works again.
            lying = (key for key in queues.get(name, ()) if key not in leased)
            unknown = (key for key in drops(live[name], leased) if key not in self._ended)
            drop = {*unknown, *lying, *self._recalled.get(name, ())}
            drain = name in drained
            words[name] = (
                Control(epoch=epoch, drop=tuple(sorted(drop)), drain=drain) if drop else nothing[drain]
            )
        deaf = {name for name, word in words.items() if not attuned(live[name], word.drain)}
        self._transport.control(
            {name: word for name, word in words.items() if name in deaf or self._told.get(name) != word}
        )
        self._told |= words
        self.due = {*names[_MOST:], *deaf, *queues}

    def note_strangers(self, live: Mapping[str, Beat], changed: Collection[str]) -> None:
        """Say once of each process that speaks another major that it gets no work, and why."""
        for name in sorted(changed):
            beat = live.get(name)
            if beat is None or speaks(beat) or (name, beat.boot) in self._strangers:
                continue
            self._strangers.add((name, beat.boot))
            log.warning(
                "incompatible worker: it gets no work until it is upgraded, or we are",
                extra={
                    "worker": name,
                    "boot": beat.boot,
                    "host": beat.host,
                    "version": beat.version,
                    "protocol": beat.protocol,
                    "ours": PROTOCOL,
                },
            )
        self._strangers = {(name, boot) for name, boot in self._strangers if name in live}
