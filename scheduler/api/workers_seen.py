"""Which workers go on beating: a beat is news when (boot, sequence) has changed. No worker's clock is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from motet.protocol.wire import Beat


@dataclass
class WorkersSeen:
    """Remembers when each worker's beat last changed, as far as this process has looked. Safe between threads."""

    dead_s: float
    #: Worker -> boot and sequence of its newest beat, and since when that is the newest. Replaced whole, never
    #: changed: another thread that looks meanwhile finds all workers in it.
    _changed: Mapping[str, tuple[str, int, float]] = field(default_factory=dict)

    def silent(self, beats: Mapping[str, Beat], now: float) -> set[str]:
        """Workers known to be silent: their beat is the one that was there ``dead_s`` ago, or longer."""
        before, seen = self._changed, dict[str, tuple[str, int, float]]()
        for name, beat in beats.items():
            known = before.get(name)
            same = known is not None and known[:2] == (beat.boot, beat.seq)
            seen[name] = known if known is not None and same else (beat.boot, beat.seq, now)
        self._changed = seen
        return {name for name, (_, _, since) in seen.items() if now - since >= self.dead_s}
