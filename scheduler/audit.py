"""The audit: everything that the leader goes by is read anew, a slice in each beat step, and must be as the leader has it.

Words tell the leader what changed, so it finds nothing. What it finds was missed by a fault: that is told to the log,
counted, and then put right. A commit whose word is still on its way is no difference: what differs is looked at again in
the next beat step, and counts where it still differs in the same way.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from uuid import UUID

from sqlalchemy import Connection

from scheduler.lease_book import LeaseBook
from scheduler.policy.place import Placer
from scheduler.policy.placing.records import PassId
from scheduler.store import leases
from scheduler.store.demand import demand_of, jobs_waiting
from scheduler.store.leases import Held, LeaseKey
from scheduler.store.manifests import Manifests

log = logging.getLogger(__name__)

#: Seconds from one audit's begin to the next one's. Longer: a fault stays unseen for longer. Shorter: more is read for nothing.
AUDIT_S = 30.0
#: Leases, and jobs, of one slice: some milliseconds each.
_LEASES, _JOBS = 1_000, 100
_FIRST_JOB = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Differences:
    """What is stored and the leader does not have, or has otherwise."""

    #: Live leases that are not in the book; and keys of the book that are no live leases.
    unknown: tuple[Held, ...] = ()
    ended: tuple[LeaseKey, ...] = ()
    #: Pass -> (rows that wait as the leader has it, as it is stored).
    waiting: tuple[tuple[PassId, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.unknown) + len(self.ended) + len(self.waiting)

    def jobs(self) -> set[UUID]:
        """Jobs with a pass that differs."""
        return {UUID(job) for (job, _), _, _ in self.waiting}


@dataclass
class Audit:
    """Where an audit stands."""

    book: LeaseBook
    placer: Placer
    manifests: Manifests
    #: When the next one begins; None: one is under way.
    _begins_at: float | None = 0.0
    #: The leases behind this one, and then the jobs behind that one, are still to be looked at.
    _lease: int | None = 0
    _job: UUID | None = None
    #: The book as of the begin, by id: what came into it since then the next audit looks at.
    _keys: list[LeaseKey] = field(default_factory=list)
    _doubts: Differences = field(default_factory=Differences)

    def begun(self, now: float) -> None:
        """All was read at this moment."""
        self._begins_at, self._doubts = now + AUDIT_S, Differences()

    def heard(self, jobs: Collection[UUID]) -> None:
        """What waits of these jobs was read at this moment. What differed before was on its way; of a job whose rows keep
        coming another moment may differ just so."""
        if self._doubts.waiting:
            kept = tuple(one for one in self._doubts.waiting if UUID(one[0][0]) not in jobs)
            self._doubts = replace(self._doubts, waiting=kept)

    def go_on(self, connection: Connection, now: float) -> Differences:
        """Look at the next slice, if it is time; what is certain by now of the slice before."""
        certain = self._certain(connection, now) if self._doubts else Differences()
        self._doubts = Differences()
        if self._begins_at is not None:
            if now < self._begins_at:
                return certain
            self._begins_at, self._lease, self._job = None, 0, None
            self._keys = sorted(self.book.keys())
        if self._lease is not None:
            self._doubts = self._look_at_leases(connection, self._lease)
        elif self._job is not None:
            self._doubts = self._look_at_jobs(connection, self._job, now)
        else:
            self._begins_at = now + AUDIT_S
        return certain

    def _look_at_leases(self, connection: Connection, after: int) -> Differences:
        stored = leases.held_keys(connection, after, _LEASES)
        last: int | None = None
        if len(stored) == _LEASES:
            # The last sub-task may have a second lease that is not among these.
            last = stored[-1][0] - 1
            stored = [key for key in stored if key[0] <= last]
        self._lease = last
        if last is None:
            self._job = _FIRST_JOB
        keys = set(stored)
        unknown = keys - self.book.keys()
        begins = bisect_left(self._keys, (after + 1, 0))
        ends = len(self._keys) if last is None else bisect_left(self._keys, (last + 1, 0))
        return Differences(
            unknown=tuple(leases.held(connection, unknown)) if unknown else (),
            ended=tuple(key for key in self._keys[begins:ends] if key not in keys and key in self.book),
        )

    def _look_at_jobs(self, connection: Connection, after: UUID, now: float) -> Differences:
        jobs = jobs_waiting(connection, after, _JOBS)
        self._job = jobs[-1] if len(jobs) == _JOBS else None
        here = set(jobs) | {
            job
            for job in map(UUID, {job for job, _ in self.placer.wants()})
            if after < job and (self._job is None or job <= self._job)
        }
        return self._of_jobs(connection, here, now)

    def _of_jobs(self, connection: Connection, jobs: Collection[UUID], now: float) -> Differences:
        demands, _ = demand_of(connection, now, jobs, self.manifests)
        stored = {d.id: d.rows_waiting for d in demands}
        known = {id_ for job in jobs for id_ in self.placer.passes_of(str(job))}
        found = ((id_, self.placer.rows_waiting(id_), stored.get(id_, 0)) for id_ in known | stored.keys())
        return Differences(waiting=tuple(sorted(one for one in found if one[1] != one[2])))

    def _certain(self, connection: Connection, now: float) -> Differences:
        """Of what differed a moment ago that which still does."""
        doubts = self._doubts
        unknown = [h for h in doubts.unknown if h.key not in self.book]
        ended = [key for key in doubts.ended if key in self.book]
        fates = leases.fates(connection, [*(h.key for h in unknown), *ended]) if unknown or ended else {}
        waiting = self._of_jobs(connection, doubts.jobs(), now).waiting if doubts.waiting else ()
        return Differences(
            unknown=tuple(h for h in unknown if fates[h.key].leased),
            ended=tuple(key for key in ended if not fates[key].leased),
            waiting=tuple(one for one in doubts.waiting if one in waiting),
        )
