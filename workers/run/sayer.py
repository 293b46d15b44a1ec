"""Tells text as it is written, to the process of the API that names its channel in the assignment (`Assignment.say`).

Nothing here is ever the truth: what Redis does not take is dropped, and the outcome holds all of the text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from motet.protocol.transport import TransportLost, WorkerTransport
from motet.protocol.wire import Assignment, Said, encode_said
from workers.run.stream import WrittenText

#: An answer is told at most so often, in seconds. Longer: readers see jumps. Shorter: more messages for each answer.
SAY_S = 0.05
#: The same for each of the answers that are written at once, up to ``SAY_MOST_S``: an event for each token of 16 of them
#: took API, callers and worker a twentieth of the machine from the model. Longer: their readers see jumps. Shorter: what
#: they read is written more slowly.
SAY_EACH_S, SAY_MOST_S = 0.02, 0.3

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
    #: Nothing of it was told yet.
    new: bool = True


class Sayer:
    """``write`` and ``forget`` are called by the device's thread and wait for nothing; ``run`` has a thread of its own."""

    def __init__(self, transport: WorkerTransport, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport, self._clock = transport, clock
        self._changed = threading.Condition()
        self._answers: dict[_Answer, _Telling] = {}
        self._stopped = False
        #: When all that waited was told last.
        self._told_at = float("-inf")

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
        """Tell what is due: an answer's first words at once, what follows all answers together. Seconds until more is
        due; None: nothing waits."""
        now = self._clock()
        said: dict[str, list[Said]] = {}
        with self._changed:
            left_s = self._told_at + self._pause_s() - now
            if left_s <= 0:
                self._told_at = now
            waiting = [telling for telling in self._answers.values() if telling.waiting]
            due = [telling for telling in waiting if left_s <= 0 or telling.new]
            for telling in due:
                said.setdefault(telling.order.say, []).append(_said(telling))
            waits = len(due) < len(waiting)
        if said:
            try:
                self._transport.say([(api, encode_said(words)) for api, words in said.items()])
            except TransportLost:
                pass  # whoever reads along misses a part of it, and has all of it at the end
        return max(0.0, left_s) if waits else None

    def _pause_s(self) -> float:
        return min(max(SAY_S, SAY_EACH_S * len(self._answers)), SAY_MOST_S)


def _said(telling: _Telling) -> Said:
    """What is told of an answer now."""
    text = "".join(telling.waiting)
    order, begins = telling.order, telling.told
    telling.told, telling.new = begins + len(text), False
    telling.waiting.clear()
    return Said(
        job=order.job,
        row=order.indices[telling.row],
        task=telling.task,
        attempt=order.key,
        begins=begins,
        text=text,
    )
