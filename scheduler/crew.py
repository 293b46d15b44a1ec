"""The crew: live workers as of their newest beats, and whose beat says something new."""

from __future__ import annotations

from operator import attrgetter

from motet.protocol.transport import Heard
from motet.protocol.wire import Beat
from scheduler.policy.liveness import Watch

#: What of a beat the leader acts on. All else is for people, and is new in every beat of a worker that works.
_says = attrgetter(
    *("boot", "state", "protocol", "held", "left", "engines", "device_kind", "device_name"),
    *("memory_mb", "gpus", "spreads", "formats", "resident"),
)


class Crew:
    """What the leader heard of all workers."""

    def __init__(self, dead_s: float) -> None:
        self._watch = Watch(dead_s)
        #: Newest beat of every live worker.
        self.live: dict[str, Beat] = {}

    def hear(self, heard: Heard, now: float) -> set[str]:
        """Take in the newest beats. Workers that came, went, or say something new."""
        before, self.live = self.live, self._watch.see(heard.beats, now, heard.renewed)
        changed = set() if before.keys() == self.live.keys() else before.keys() ^ self.live.keys()
        for name, new in self.live.items():
            old = before.get(name)
            if old is not new and old is not None and _says(old) != _says(new):
                changed.add(name)
        return changed
