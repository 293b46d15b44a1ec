"""The pulse: how a launcher notices that a worker's process stands still, though it exists.

Inside the process a watchdog ends what hangs (workers/run/beat.py). It cannot run while the process is stopped, or while
a call in C keeps Python's lock. So it says each half second, through a socket, that it runs; the launcher listens.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

#: Seconds of silence after which a process counts as frozen: at work, while it loads a model (a driver may keep
#: Python's lock for long), and before its first pulse, when it imports. At work: before the leases of a worker whose
#: beat has stopped end, so that the scheduler hears of a death, and suspects the rows that ran.
SILENCE_S, LOADING_SILENCE_S, STARTING_SILENCE_S = 8, 60, 120
#: A launcher that has not looked for so long was stopped itself, or its machine was.
AWAY_S = 3.0


class Pulse:
    """A worker's end of the socket."""

    def __init__(self, fd: int) -> None:
        """Takes the file descriptor over."""
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        # Programs that an engine starts must not keep it open.
        self._socket.set_inheritable(False)

    def say(self, silence_s: int) -> None:
        """This process runs; one that says nothing more for ``silence_s`` is frozen. Never waits, never raises."""
        with contextlib.suppress(OSError):
            self._socket.send(b"alive %d" % silence_s)


@dataclass
class Pulses:
    """What a launcher has heard of each worker, by its own monotonic clock. Pure."""

    #: Worker -> when it was heard last, and how long it may be silent then.
    _heard: dict[str, tuple[float, float]] = field(default_factory=dict)
    _looked: float = float("-inf")

    def hear(self, worker: str, now: float, silence_s: float) -> None:
        self._heard[worker] = (now, silence_s)

    def forget(self, worker: str) -> None:
        self._heard.pop(worker, None)

    def silent(self, now: float) -> list[str]:
        """The workers that have been silent for too long."""
        if now - self._looked > AWAY_S:
            # We were away, so nobody's silence counts: all are given their time again.
            self._heard = {worker: (now, limit) for worker, (_, limit) in self._heard.items()}
        self._looked = now
        return [worker for worker, (at, limit) in self._heard.items() if now - at > limit]
