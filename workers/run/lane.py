"""The interactive lane: how much of the device it may take from bulk work that waits. Pure; seconds come in.

Interactive work goes first at every micro-batch boundary. So that bulk work goes on under any amount of it, the
lane owes what it took while bulk waited. Its debt melts with time, and beyond a burst bulk goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Of any ``WINDOW_S`` or more in which bulk always waits, the lane takes at most its share and one turn more.
WINDOW_S = 5.0
#: What it may take in a row. One-row jobs that come at once are then all served before bulk goes on.
BURST_S = 0.25


@dataclass(frozen=True, slots=True)
class Lane:
    """What the interactive lane of one device owes to bulk: a bucket that leaks."""

    #: ``MOTET_LANE_SHARE``; more than a burst is of a window.
    share: float
    owed_s: float = 0.0
    #: When that was so.
    at: float = 0.0

    def open(self, now: float) -> bool:
        """Whether interactive work goes before bulk that waits. Always, where the lane was idle for a window."""
        return self._owed(now) < BURST_S

    def took(self, seconds: float, now: float) -> Lane:
        """Count a turn that ended now, during which bulk waited: a micro-batch, or the loading of a model.

        It never owes more than the share of one window, so that a long load keeps others waiting for at most that.
        """
        return replace(self, owed_s=min(self._owed(now) + seconds, self.share * WINDOW_S), at=now)

    def _owed(self, now: float) -> float:
        # What it has under full bulk for ever: with a burst just before, no window exceeds its share.
        steady = self.share - BURST_S / WINDOW_S
        return max(0.0, self.owed_s - steady * (now - self.at))
