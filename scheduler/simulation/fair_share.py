"""How far apart those are served who wait at the same time, from what the devices of a simulated run did. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from scheduler.simulation.cluster import SimulatedJob
from scheduler.simulation.events import DeviceSpan, RunOutcome


@dataclass(frozen=True, slots=True)
class _Party:
    """A tenant, or one of its jobs."""

    weight: float
    jobs: frozenset[str]
    #: Between these it had rows waiting.
    from_s: float
    until_s: float


def gap_s(jobs: Sequence[SimulatedJob], outcome: RunOutcome) -> float:
    """The most by which the service of two parties, in device-seconds / weight, differed; the smallest weight is 1.

    Since both have rows waiting and until one has none. Loading, and work whose result was not wanted, is no service.
    """
    least = min(job.weight for job in jobs)
    worst = 0.0
    for parties in _peers(jobs, outcome):
        for one, other in combinations(parties, 2):
            from_s, until_s = max(one.from_s, other.from_s), min(one.until_s, other.until_s)
            if from_s < until_s:
                lead = _lead(one, other, outcome.spans, from_s, until_s)
                worst = max(worst, least * float(np.abs(lead).max()))
    return worst


def largest_s(outcome: RunOutcome) -> float:
    """Seconds of the longest sub-task."""
    return max(span.end_s - span.start_s for span in outcome.spans if not span.loads)


def _peers(jobs: Sequence[SimulatedJob], outcome: RunOutcome) -> Iterator[list[_Party]]:
    """The tenants; and the jobs of each tenant."""
    tenants: dict[str, list[SimulatedJob]] = {}
    for job in jobs:
        tenants.setdefault(job.tenant, []).append(job)
    yield [_party(own, own[0].weight, outcome) for own in tenants.values()]
    for own in tenants.values():
        yield [_party([job], 1.0, outcome) for job in own]


def _party(jobs: Sequence[SimulatedJob], weight: float, outcome: RunOutcome) -> _Party:
    return _Party(
        weight,
        frozenset(job.name for job in jobs),
        min(job.at_s for job in jobs),
        max(outcome.backlogged_s[job.name] for job in jobs),
    )


def _lead(
    one: _Party, other: _Party, spans: Iterable[DeviceSpan], from_s: float, until_s: float
) -> NDArray[np.float64]:
    """By how much one has had more than the other since ``from_s``, whenever that begins to change."""
    shares = {**dict.fromkeys(one.jobs, 1 / one.weight), **dict.fromkeys(other.jobs, -1 / other.weight)}
    clipped = [
        (max(span.start_s, from_s), min(span.end_s, until_s), shares[span.job])
        for span in spans
        if span.job in shares and not span.wasted and span.end_s > from_s and span.start_s < until_s
    ]
    if not clipped:
        return np.zeros(1)
    begins, ends, share = np.array(clipped).T
    moments, where = np.unique(np.concatenate([begins, ends]), return_inverse=True)
    change = np.bincount(where, weights=np.concatenate([share, -share]))
    return np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(moments))])
