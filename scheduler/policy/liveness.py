"""Who is alive: a worker whose (boot, seq) has changed lately, by the leader's own monotonic clock. Pure.

A beat's own time is never read, so a wrong clock on a worker changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from motet.protocol.wire import PROTOCOL, Beat

#: Seconds for which a worker counts as known after its last beat, and a job may be without an able worker before it
#: fails. Shorter: a healthy job fails while the only worker that can run it is started again, or its host is.
#: Longer: a user waits longer for the word that a model cannot be loaded.
GRACE_S = 180.0


@dataclass
class Watch:
    """What the leader has seen of each worker's beats."""

    dead_s: float
    _newest: dict[str, tuple[str, int]] = field(default_factory=dict)
    _changed: dict[str, float] = field(default_factory=dict)
    #: When we looked last.
    _looked: float = float("-inf")

    def see(
        self, beats: Mapping[str, Beat], now: float, renewed: Iterable[str] | None = None
    ) -> dict[str, Beat]:
        """Take in the newest beats; return those of live workers. ``renewed``: those that are new, where that is known."""
        if now - self._looked > self.dead_s / 2:
            # We were away (Redis or Postgres was), so nobody's silence counts: all are given their time again.
            self._changed = dict.fromkeys(self._changed, now)
        self._looked = now
        if renewed is None:
            before, self._newest = self._newest, {name: (b.boot, b.seq) for name, b in beats.items()}
            renewed = [name for name, mark in self._newest.items() if before.get(name) != mark]
        changed = self._changed
        changed.update(dict.fromkeys(renewed, now))
        if changed.keys() != beats.keys():
            changed.update(dict.fromkeys(beats.keys() - changed.keys(), now))
            for name in changed.keys() - beats.keys():
                del changed[name]
        # Mostly nobody is late, and then nobody is looked at one by one.
        if now - min(changed.values(), default=now) < self.dead_s:
            return dict(beats)
        return {name: b for name, b in beats.items() if now - changed[name] < self.dead_s}


@dataclass
class Roster:
    """What each worker can do that beat in the last ``GRACE_S``, as far as the leader has looked."""

    _known: dict[str, tuple[Beat, float]] = field(default_factory=dict)

    def see(self, live: Mapping[str, Beat], now: float) -> dict[str, Beat]:
        """Take in the beats of live workers; return the newest of every worker that is lately known.

        A process that starts names no engine yet: until it does it has those of the one before it, and its own boot.
        """
        for name, beat in live.items():
            if not speaks(beat):
                continue
            if not beat.engines:
                if name not in self._known:
                    continue
                beat = replace(self._known[name][0], boot=beat.boot, state=beat.state)
            self._known[name] = (beat, now)
        self._known = {name: known for name, known in self._known.items() if now - known[1] < GRACE_S}
        return {name: beat for name, (beat, _) in self._known.items()}


def speaks(beat: Beat) -> bool:
    """Whether a worker's protocol is of our major: what it is sent it understands, and what it says is what we read."""
    return beat.protocol == PROTOCOL


def attuned(beat: Beat, drain: bool) -> bool:
    """Whether a worker does what the flag says. One that does not is told again: its word was lost, or is of old."""
    return (beat.state == "draining") == drain


def drops(beat: Beat, leased: AbstractSet[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Attempts that a worker holds without a live lease: cancelled, lost, or done elsewhere."""
    return tuple(key for key in beat.held if key not in leased)
