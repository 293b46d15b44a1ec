"""The interactive lane: how much of the device it may take from bulk work that waits. Pure; seconds come in.

Interactive work goes first at every micro-batch boundary. So that bulk work goes on under any amount of it, the
lane owes what it took while bulk waited. Its debt melts with time, and beyond a burst bulk goes first.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Of any ``WINDOW_S`` or more in which bulk always waits, the lane takes at most this share and one turn more.
SHARE, WINDOW_S = 0.3, 5.0
#: What it may take in a row. One-row jobs that come at once are then all served before bulk goes on.
BURST_S = 0.25
#: Share of the device that it has under full bulk for ever: with a burst just before, no window exceeds ``SHARE``.
STEADY = SHARE - BURST_S / WINDOW_S


@dataclass(frozen=True, slots=True)
class Lane:
    """What the interactive lane of one device owes to bulk: a bucket that leaks."""

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
        return Lane(min(self._owed(now) + seconds, SHARE * WINDOW_S), now)

    def _owed(self, now: float) -> float:
        return max(0.0, self.owed_s - STEADY * (now - self.at))
