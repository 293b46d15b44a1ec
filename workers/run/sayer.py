"""Tells text as it is written, to the process of the API that names its channel in the assignment (`Assignment.say`).

Nothing here is ever the truth: what Redis does not take is dropped, and the outcome holds all of the text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from motet.protocol.transport import TransportLost, WorkerTransport
from motet.protocol.wire import Assignment, Said
from workers.run.stream import WrittenText

#: An answer is told at most so often, in seconds. Longer: readers see jumps. Shorter: more messages for each answer.
SAY_S = 0.05
#: Answers told in one round trip. More: a lost connection costs the words of more answers.
_AT_ONCE = 256


#: Sub-task, attempt, position in it, task.
_Answer = tuple[int, int, int, str]


@dataclass(slots=True)
class _Telling:
    """One answer that is being written."""

    order: Assignment
    row: int
    task: str
    #: Of the row's stay in the engine.
    ticket: Hashable
    #: Characters that were told, or dropped.
    told: int = 0
    waiting: list[str] = field(default_factory=list)
    #: When it was told last.
    at: float = float("-inf")


class Sayer:
    """``write`` and ``forget`` are called by the device's thread and wait for nothing; ``run`` has a thread of its own."""

    def __init__(self, transport: WorkerTransport, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport, self._clock = transport, clock
        self._changed = threading.Condition()
        self._answers: dict[_Answer, _Telling] = {}
        self._stopped = False

    def write(self, texts: Iterable[WrittenText]) -> None:
        """What a step wrote."""
        with self._changed:
            for one in texts:
                order = one.work.order
                # Two tasks that ask the same are written once.
                for task in (name for name, ask in one.work.asks.items() if ask == one.ask and order.say):
                    at = (*order.key, one.row, task)
                    telling = self._answers.get(at)
                    if telling is None or telling.ticket != one.ticket:
                        telling = self._answers[at] = _Telling(order, one.row, task, one.ticket)
                    telling.waiting.append(one.text)
            self._changed.notify()

    def forget(self, order: Assignment) -> None:
        """The attempt has ended. What was not told by then nobody needs: all of it is in the outcome."""
        if order.say:
            with self._changed:
                for at in [at for at in self._answers if at[:2] == order.key]:
                    del self._answers[at]

    def run(self) -> None:
        """Tell what is written until ``stop``."""
        while not self._stopped:
            due_s = self.step()
            with self._changed:
                if not self._stopped:
                    self._changed.wait(due_s)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def step(self) -> float | None:
        """Tell what is due. Seconds until more is; None: nothing waits."""
        now = self._clock()
        words: list[tuple[str, bytes]] = []
        soonest: float | None = None
        with self._changed:
            for telling in self._answers.values():
                if not telling.waiting:
                    continue
                left_s = telling.at + SAY_S - now
                if left_s <= 0 and len(words) < _AT_ONCE:
                    words.append((telling.order.say, self._said(telling, now)))
                else:
                    soonest = max(0.0, left_s) if soonest is None else min(soonest, max(0.0, left_s))
        if words:
            try:
                self._transport.say(words)
            except TransportLost:
                pass  # whoever reads along misses a part of it, and has all of it at the end
        return soonest

    def _said(self, telling: _Telling, now: float) -> bytes:
        text = "".join(telling.waiting)
        order, begins = telling.order, telling.told
        telling.told, telling.at = begins + len(text), now
        telling.waiting.clear()
        return Said(
            job=order.job,
            row=order.indices[telling.row],
            task=telling.task,
            attempt=order.key,
            begins=begins,
            text=text,
        ).encode()
