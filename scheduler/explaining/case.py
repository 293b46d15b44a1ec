"""A case: a job, all that is known of the cluster around it, and what follows for its passes. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from scheduler.policy.capability import why_not, workers
from scheduler.policy.placing.records import Demand, PassId, WorkerState

if TYPE_CHECKING:
    from motet.protocol.wire import Beat
    from scheduler.facts import Facts
    from scheduler.store.explain import Owner, PassStanding, Standing
    from scheduler.store.leases import Held


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job, and all that is known of the cluster around it."""

    standing: Standing
    facts: Facts
    #: Of the jobs in ``facts``.
    owners: Mapping[str, Owner]
    #: Newest beats of live workers; None where Redis is away, and no worker is heard.
    beats: Mapping[str, Beat] | None
    #: Share of a device's memory that models may hold.
    memory_share: float
    #: Share of a device that interactive work may take from bulk that waits.
    lane_share: float
    #: Some dispatcher leads.
    leads: bool
    #: Share of its usual rate at which it sends; None where that is not known.
    throttle: float | None
    subtask_s: float
    ahead_s: float
    depth: int
    now: datetime

    @cached_property
    def id(self) -> str:
        return str(self.standing.job.id)

    @cached_property
    def waits(self) -> list[PassStanding]:
        """Passes with rows that may run now."""
        return [p for p in self.standing.passes if p.demand.rows_waiting > p.rows_later]

    @cached_property
    def workers(self) -> dict[str, WorkerState]:
        """Live workers by name."""
        found = workers(
            self.beats or {},
            self.facts.refusals,
            self.memory_share,
            drained=self.facts.drained,
            suspects={h.worker for h in self.facts.held if h.exclusive},
        )
        return {worker.name: worker for worker in found}

    @cached_property
    def usable(self) -> dict[str, WorkerState]:
        """Workers that may be given work at all."""
        return {name: w for name, w in self.workers.items() if w.barred is None}

    @cached_property
    def sorts(self) -> list[WorkerState]:
        """One usable worker of each sort: a pass that one of a sort can run, refusals apart, all of it can."""
        sorts = (replace(w, name="", boot="", resident=(), refused=frozenset()) for w in self.usable.values())
        return list(dict.fromkeys(sorts))

    def work_s(self, demand: Demand) -> float | None:
        """Predicted device-seconds of what waits of a pass, on the fastest device that can run it."""
        prices = (
            demand.rate(self.facts.rates, worker.kind).price(1.0, demand.bytes_per_token)
            for worker in self.sorts
            if why_not(worker, demand) is None
        )
        return min((p.of(demand.rows_waiting, demand.bytes_waiting) for p in prices), default=None)

    def load_s(self, worker: WorkerState, demand: Demand) -> float:
        return demand.load_s(self.facts.rates, worker.kind)

    @cached_property
    def leases(self) -> dict[str, list[Held]]:
        """Live leases of each worker, the oldest first."""
        found: dict[str, list[Held]] = defaultdict(list)
        for h in sorted(self.facts.held, key=lambda h: -h.age_s):
            found[h.worker].append(h)
        return found

    @cached_property
    def others(self) -> list[Demand]:
        """What waits of other jobs."""
        return [d for d in self.facts.demand if d.job != self.id]

    @cached_property
    def of_pass(self) -> dict[PassId, Demand]:
        return {d.id: d for d in (*self.others, *(p.demand for p in self.standing.passes))}
