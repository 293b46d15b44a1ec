"""What the leader knows of speeds: read whole when a term begins, and from then on what outcomes have taught."""

from __future__ import annotations

from sqlalchemy import Connection

from scheduler.policy.cost import Rates
from scheduler.policy.placing.entries import Flight
from scheduler.store.rates import Touched, rates, refresh


class Speeds:
    """Which speeds the sub-tasks that ended since the last look may have changed."""

    def __init__(self) -> None:
        #: None: any.
        self._touched: Touched | None = None

    def forget(self) -> None:
        """Words were missed: any may have changed."""
        self._touched = None

    def ended(self, flight: Flight | None) -> None:
        """A sub-task was answered by this flight; None: by one that the policy does not know."""
        if flight is None:
            self._touched = None
        elif self._touched is not None:
            queue, worker = flight.of.queue, flight.at
            self._touched.rates.add(queue.rate_key(worker.kind, flight.demand.rate_key))
            self._touched.loads.add((queue.digest, worker.kind[1]))
            self._touched.workers.add(worker.name)

    def read(self, connection: Connection, known: Rates) -> Rates:
        """What is known now."""
        if self._touched is None:
            known = rates(connection)
        elif self._touched:
            refresh(connection, known, self._touched)
        self._touched = Touched()
        return known
