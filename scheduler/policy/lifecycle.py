"""What becomes of rows whose attempt did not answer them: which return, when, and which are given up. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from scheduler.policy.capability import LASTING, why_not
from scheduler.policy.carve import Range, part
from scheduler.policy.liveness import GRACE_S
from scheduler.policy.placing.records import Demand, PassId, Refusal, WorkerState

#: A row with a retriable error is tried so often in all; then its error is final.
MAX_TRIES = 5
#: A sub-task whose worker died so often before it ran any row of it is given up: loading or reading it kills.
MAX_DEATHS_UNSEEN = 10
#: A single row that killed its process so often, running alone, is poison.
MAX_DEATHS_ALONE = 2
#: Seconds between two looks at what is hopeless after which the leader counts as away: nobody's silence counts then.
_AWAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Return:
    """Rows to put back as one piece."""

    range: Range
    tries: int = 0
    deaths: int = 0
    exclusive: bool = False
    #: Seconds until they may be carved again.
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GivenUp:
    """One row whose cells become errors."""

    block: int
    position: int
    error: str
    message: str


def backoff_s(tries: int) -> float:
    """Seconds before the next try: 0.5, 1, 2, 4."""
    return float(0.5 * 2 ** max(0, tries - 1))


def runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Positions as maximal [lo, hi) runs, ascending."""
    found: list[tuple[int, int]] = []
    for p in sorted(set(positions)):
        if found and found[-1][1] == p:
            found[-1] = (found[-1][0], p + 1)
        else:
            found.append((p, p + 1))
    return found


def lost(
    ranges: Sequence[Range], *, tries: int, deaths: int, exclusive: bool, suspects: Sequence[int], died: bool
) -> tuple[list[Return], list[GivenUp]]:
    """Rows of a sub-task whose last live lease is gone.

    ``died``: its process ended while it was there. ``suspects``: positions in the sub-task of the rows that
    were in the running micro-batch then. Only those are blamed; nothing that ran beside others is condemned.
    """
    if not died:
        return [Return(r, tries=tries, deaths=deaths, exclusive=exclusive) for r in ranges], []
    if not suspects:
        return _unseen(ranges, tries=tries, deaths=deaths, exclusive=exclusive)
    if exclusive:
        return _halve(ranges, tries=tries, deaths=deaths)
    back: list[Return] = []
    start = 0
    for r in ranges:
        inside = [r.lo + p - start for p in suspects if start <= p < start + len(r)]
        start += len(r)
        if not inside:
            back.append(Return(r, tries=tries))
            continue
        # One piece from the first suspect to the last: rows between them lose nothing by running apart.
        lo, hi = min(inside), max(inside) + 1
        back.append(Return(part(r, lo, hi), tries=tries, exclusive=True))
        back.extend(Return(part(r, a, b), tries=tries) for a, b in ((r.lo, lo), (hi, r.hi)) if b > a)
    return back, []


def _unseen(
    ranges: Sequence[Range], *, tries: int, deaths: int, exclusive: bool
) -> tuple[list[Return], list[GivenUp]]:
    """The process died while they waited there. That is nobody's fault, until it happens again and again.

    An exclusive sub-task keeps its count: that is of deaths seen while it ran alone.
    """
    if exclusive:
        return [Return(r, tries=tries, deaths=deaths, exclusive=True) for r in ranges], []
    if deaths + 1 < MAX_DEATHS_UNSEEN:
        after_s = 0.0 if deaths == 0 else min(8.0, backoff_s(deaths))
        return [Return(r, tries=tries, deaths=deaths + 1, after_s=after_s) for r in ranges], []
    message = f"its process died {deaths + 1} times before a row of it ran"
    return [], [GivenUp(r.block, p, "worker_died", message) for r in ranges for p in range(r.lo, r.hi)]


def _halve(ranges: Sequence[Range], *, tries: int, deaths: int) -> tuple[list[Return], list[GivenUp]]:
    """An exclusive sub-task killed its process: split it, or give its single row up after two deaths alone."""
    back: list[Return] = []
    given_up: list[GivenUp] = []
    for r in ranges:
        if len(r) > 1:
            middle = (r.lo + r.hi) // 2
            back.extend(
                Return(part(r, a, b), tries=tries, exclusive=True)
                for a, b in ((r.lo, middle), (middle, r.hi))
            )
        elif deaths + 1 < MAX_DEATHS_ALONE:
            back.append(Return(r, tries=tries, deaths=deaths + 1, exclusive=True))
        else:
            given_up.append(
                GivenUp(r.block, r.lo, "poison", f"its process died {deaths + 1} times while it ran alone")
            )
    return back, given_up


def failed(
    ranges: Sequence[Range], *, tries: int, deaths: int, exclusive: bool, error: str, blameless: bool
) -> tuple[list[Return], list[GivenUp]]:
    """Rows of an attempt that failed as a whole. ``blameless``: the transport's or worker's fault, not theirs."""
    if blameless:
        return [Return(r, tries=tries, deaths=deaths, exclusive=exclusive, after_s=0.2) for r in ranges], []
    if tries + 1 >= MAX_TRIES:
        message = f"the attempt failed {tries + 1} times"
        return [], [GivenUp(r.block, p, error, message) for r in ranges for p in range(r.lo, r.hi)]
    after_s = backoff_s(tries + 1)
    return [
        Return(r, tries=tries + 1, deaths=deaths, exclusive=exclusive, after_s=after_s) for r in ranges
    ], []


@dataclass
class Hopes:
    """When some worker could last run each waiting pass, by the leader's clock.

    Only in memory: where another leader begins, the grace begins anew.
    """

    #: Pass -> when a worker could run it last, and when it waited last. It may wait with pauses: a try is put off.
    _known: dict[PassId, tuple[float, float]] = field(default_factory=dict)
    _looked: float = float("-inf")

    def hopeless(
        self,
        demand: Sequence[Demand],
        workers: Sequence[WorkerState],
        refusals: Sequence[Refusal],
        now: float,
    ) -> dict[UUID, str]:
        """Jobs with a pass that no worker could run in the last ``GRACE_S``, and that some worker refused; and why.

        ``workers``: all that are lately known, also those that restart. Where none of them has tried, a job waits.
        """
        if now - self._looked > _AWAY_S:
            self._known.clear()
        self._looked = now
        for d in demand:
            hope, _ = self._known.get(d.id, (now, now))
            able = any(why_not(worker, d) not in LASTING for worker in workers)
            self._known[d.id] = (now if able else hope, now)
        self._known = {id_: at for id_, at in self._known.items() if now - at[1] < GRACE_S}
        found: dict[UUID, str] = {}
        for d in demand:
            if now - self._known[d.id][0] >= GRACE_S and (why := _refused(d, workers, refusals)):
                found[UUID(d.job)] = f"no worker can load {d.model.ref}: {why}"
        return found


def _refused(demand: Demand, workers: Sequence[WorkerState], refusals: Sequence[Refusal]) -> str | None:
    """Why a worker that is lately known could not load a model of this pass; None where none has tried."""
    boots = {worker.name: worker.boot for worker in workers}
    return next(
        (r.why for r in refusals if r.model_id in demand.model_ids and boots.get(r.worker) == r.boot), None
    )
