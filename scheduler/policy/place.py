"""Place: which worker gets work of which pass now, and what is taken back or doubled near the end. Pure.

The `Placer` hears of workers, of waiting passes and of leases, and answers workers that ask for work. Its rooms are in
``placing/``: the ledger keeps what it hears, the choice answers, rebalancing looks after what the choice alone would
leave unfair or late. The dispatcher and the simulator drive the same class. It has no clock: ``now`` is any one that
only rises.
"""

from __future__ import annotations

from collections.abc import Hashable

from scheduler.policy.cost import Rates
from scheduler.policy.placing.asking import Asks
from scheduler.policy.placing.choice import Choice
from scheduler.policy.placing.entries import Flight
from scheduler.policy.placing.ledger import Ledger
from scheduler.policy.placing.predictions import Predictions
from scheduler.policy.placing.rebalancing import Clone, Rebalancing, Recall


class Placer:
    """Who works on what. Events in, placements out."""

    def __init__(self, rates: Rates, *, subtask_s: float, ahead_s: float, depth: int) -> None:
        """``subtask_s``: seconds of a sub-task at most. ``ahead_s``: a worker asks when it has less left than this.
        ``depth``: bulk sub-tasks at a worker at most, the running one included."""
        self._predictions = predictions = Predictions(rates)
        self.asks = asks = Asks(predictions, ahead_s=ahead_s, depth=depth)
        self.ledger = ledger = Ledger(predictions, asks)
        self.choice = choice = Choice(ledger, predictions, asks, subtask_s=subtask_s, depth=depth)
        self._rebalancing = Rebalancing(ledger, predictions, asks, choice, subtask_s=subtask_s)
        # Asked for each sub-task, so without a call in between.
        self.place, self.next_due = choice.place, choice.next_due
        # Events go to the ledger as they are.
        self.worker, self.gone = ledger.worker, ledger.gone
        self.want, self.wants, self.unwanted = ledger.want, ledger.wants, ledger.unwanted
        self.demand, self.rows_waiting, self.passes_of = ledger.demand, ledger.rows_waiting, ledger.passes_of
        self.opened, self.nothing, self.keyed = ledger.opened, ledger.nothing, ledger.keyed
        self.adopt, self.closed = ledger.adopt, ledger.closed
        self.flight, self.flights = ledger.flight, ledger.flights

    @property
    def rates(self) -> Rates:
        """All that was learned of speeds and loads."""
        return self._predictions.rates

    @rates.setter
    def rates(self, rates: Rates) -> None:
        self._predictions.rates = rates

    def workers(self) -> frozenset[str]:
        """Names of the workers that may be given work."""
        return frozenset(self.ledger.workers)

    def tend(self, now: float) -> None:
        """Once a second: deadlines, workers that must switch models for fairness, and models that end late."""
        self._rebalancing.tend(now)

    def late(self, now: float) -> list[Recall | Clone]:
        """What idle workers should take over of that which waits or lags elsewhere."""
        return self._rebalancing.late(now)

    def cloned(self, clone: Clone, key: Hashable, now: float) -> Flight | None:
        """A second lease was given. None: its worker has gone."""
        return self.ledger.cloned(clone.flight, clone.worker.name, key, now, clone.seconds)
