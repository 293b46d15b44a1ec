"""What no schedule can beat: the shortest time, and the fewest loads, by linear programming.

In a time T devices of one kind k (n_k of them, alike in speed) work x[m,k] seconds for model m and load it y[m,k] times:

    sum over k of speed_k x[m,k]        = work_m                every row is done
    x[m,k]                              <= (T - load_m) y[m,k]  a device that works for m has loaded it first
    sum over m of x[m,k] + load_m y[m,k] <= n_k T               nobody does two things at once
    sum over k of y[m,k]                >= 1,  0 <= y[m,k] <= n_k

Any schedule that ends by T gives such numbers: let y[m,k] be how many devices of kind k ever worked for m. Each of
them loaded m at least once, because memory is empty at first, and had at most T - load_m seconds left for it. So the
least T with a solution is a lower bound, the more so as y may be a fraction and messages, memory and the size of
sub-tasks cost nothing. A device that is slower than it says is a kind of its own, with its true speed. ``work_m`` is
the work as it turned out: seconds that the attempts that counted really took, on a device of speed 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from scheduler.simulation.cluster import Scenario

Amounts = NDArray[np.float64]

#: Relative width at which the search for the least time ends.
_CLOSE = 1e-5


def least_makespan_s(scenario: Scenario, work_s: Mapping[str, float], known_s: float) -> float:
    """A time below which no schedule can end. ``known_s``: one at which some schedule did."""
    problem = _Problem(scenario, work_s)
    low, high = problem.naive_s(), known_s
    while high - low > _CLOSE * known_s:
        middle = (low + high) / 2
        low, high = (low, middle) if problem.possible(middle) else (middle, high)
    return low


def least_loads(scenario: Scenario, work_s: Mapping[str, float], makespan_s: float) -> int:
    """Loads that any schedule as short as this one has at least: the same program with whole y, its sum least."""
    return _Problem(scenario, work_s).least_loads(makespan_s)


class _Problem:
    """The program for one scenario: columns are all x, then all y, models varying slower than kinds."""

    def __init__(self, scenario: Scenario, work_s: Mapping[str, float]) -> None:
        kinds = Counter(d.true_speed for d in scenario.devices)
        self.speeds, self.counts = np.array(list(kinds)), np.array(list(kinds.values()), dtype=float)
        self.work_s = np.array(list(work_s.values()))
        self.load_s = np.array([scenario.models[name].load_s for name in work_s])
        models, each = np.eye(len(self.work_s)), np.eye(len(self.speeds))
        n = len(self.work_s) * len(self.speeds)
        none = np.zeros((len(self.work_s), n))
        #: Rows done: models x columns. Loaded at least once: the same. Busy: kinds x columns.
        self.done = np.hstack([np.kron(models, self.speeds), none])
        self.loaded = np.hstack([none, np.kron(models, np.ones_like(self.speeds))])
        self.busy = np.hstack([np.kron(np.ones_like(self.work_s), each), np.kron(self.load_s, each)])
        self.most = np.r_[np.full(n, np.inf), np.tile(self.counts, len(self.work_s))]
        self.n = n

    def naive_s(self) -> float:
        """All devices busy, and nothing loaded."""
        return float(self.work_s.sum() / (self.speeds @ self.counts))

    def possible(self, makespan_s: float) -> bool:
        if makespan_s <= self.load_s.max():
            return False
        return bool(self._solve(np.zeros(2 * self.n), makespan_s, whole=False).status == 0)

    def least_loads(self, makespan_s: float) -> int:
        found = self._solve(np.r_[np.zeros(self.n), np.ones(self.n)], makespan_s, whole=True)
        return ceil(found.mip_dual_bound - 1e-6)

    def _solve(self, cost: Amounts, makespan_s: float, *, whole: bool) -> OptimizeResult:
        after_load_s = np.repeat(makespan_s - self.load_s, len(self.speeds))
        return milp(
            cost,
            constraints=[
                LinearConstraint(self.done, self.work_s, self.work_s),
                LinearConstraint(np.hstack([np.eye(self.n), -np.diag(after_load_s)]), ub=0.0),
                LinearConstraint(self.busy, ub=self.counts * makespan_s),
                LinearConstraint(self.loaded, lb=1.0),
            ],
            integrality=np.r_[np.zeros(self.n), np.full(self.n, float(whole))],
            bounds=Bounds(np.zeros(2 * self.n), self.most),
            options={"time_limit": 10.0},
        )
