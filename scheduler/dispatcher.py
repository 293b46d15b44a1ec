"""The dispatcher: one loop that leads, rescues, places, leases and sends.

Deciding is done by pure modules (liveness, place, carve, lifecycle); this shell fetches facts and carries the
decisions out. Any number may run; one leads, the others stand by.

A step has two halves. The quick step takes in what the words of committed transactions name, and gives work to whoever
can have some. The beat step, four times a second whatever is said, hears all workers in one read, rescues, takes over,
and tells workers what to drop. What a step reads is what changed since the last one; all is read at the start of a term,
where words were missed, and, slice by slice, by the audit (scheduler/audit.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import cast
from uuid import UUID

from motet.protocol.settings import Settings
from motet.protocol.transport import SchedulerTransport
from motet.protocol.wire import Beat
from motet.states import State
from scheduler.audit import Audit, Differences
from scheduler.controls import Controls
from scheduler.crew import Crew, another_boot, draining, left_behind, one_of_each_kind, seen_alive
from scheduler.facts import Flags, read_flags, under_way
from scheduler.identity import is_gone, own_name
from scheduler.lease_book import LeaseBook, held_of, job_id
from scheduler.payloads import Payloads
from scheduler.policy.capability import workers
from scheduler.policy.carve import MAX_ROWS, Carved, Frontier, carve
from scheduler.policy.cost import Rates
from scheduler.policy.lifecycle import Hopes, lost
from scheduler.policy.liveness import Roster
from scheduler.policy.place import Placer
from scheduler.policy.placing.entries import Flight
from scheduler.policy.placing.rebalancing import TEND_S, Clone, Recall
from scheduler.policy.placing.records import Demand, Placement
from scheduler.policy.pressure import throttle
from scheduler.publishing import Publisher, publish
from scheduler.side_thread import SideThread
from scheduler.speeds import Speeds
from scheduler.store import drains, dropping, leases
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.demand import Lengths, all_jobs_waiting, demand_of, ends_and_demand, frontier
from scheduler.store.endings import end_job, overdue
from scheduler.store.leadership import fence, lead, record_transport, resign
from scheduler.store.leases import Cut, Fate, Held, Leased, LeaseKey
from scheduler.store.manifests import Manifests
from scheduler.store.outcomes import record_given_up
from scheduler.store.words import EVERYTHING, SILENCE, Words
from scheduler.sweeper import sweep

log = logging.getLogger(__name__)

#: An upload that stays silent for so long is abandoned.
UPLOAD_SILENT_S = 3600.0
#: Seconds between two beat steps. Longer: a death is seen later. Shorter: ten thousand beats are read more often.
BEAT_STEP_S = 0.25
#: Chores that need no haste (overdue jobs, forgotten workers) are done this often.
_CHORES_S = 5.0
#: The sweeper looks so often for jobs to delete; while it finds some it goes on in the next step.
_SWEEP_S = 30.0
#: Sub-tasks sent in one step at most. More: a step lasts longer, and the next beat step begins later. Fewer: the
#: statements of a step are shared by fewer.
MOST_PER_STEP = 256
#: Leases that are extended beside the step, and workers that are heard while Postgres is asked, or for which a process of
#: its own publishes, at least. For fewer the handing over takes longer than it saves.
_MANY_LEASES, _MANY_WORKERS = 100, 1_000
#: Workers that the policy learns of in one beat step at most: ten thousand that come at once would make it too long.
_WORKERS_PER_STEP = 2_000
#: What outcomes have taught is read so often.
_LEARN_S = 0.5
#: Seconds of rest between two quick steps that nobody asked for. Shorter: a processor is kept busy by small changes.
_BREATH_S = 0.01
#: After Redis was emptied a worker's first new beats say what it still holds.
_HEAR_AGAIN_S = 2.5


@dataclass
class Dispatcher:
    """One dispatcher process. ``step`` is the whole of it."""

    database: Database
    transport: SchedulerTransport
    settings: Settings
    me: str = field(default_factory=own_name)
    epoch: int | None = None
    #: What audits of this process have found.
    differences: int = 0
    #: Sends the sub-tasks of full steps; None: the step does so itself.
    publisher: Publisher | None = None

    def __post_init__(self) -> None:
        self._manifests, self._lengths = Manifests(), Lengths()
        self._payloads = Payloads(self.database, self._manifests)
        self._flight_numbers = count()
        #: Extends many leases, and asks for flags, within a step.
        self._beside = SideThread()
        self._renew_at = self._chores_at = self._sweep_at = 0.0
        #: When leases of live workers that did not survive an emptied Redis are given up; None: it was not emptied.
        self._hear_again_at: float | None = None
        self._know_nothing(0.0)

    def _know_nothing(self, now: float) -> None:
        """As a term begins: nothing that was known in another one is gone by."""
        s = self.settings
        #: When this term began.
        self._led_at = now
        self._crew, self._roster, self._hopes = Crew(s.dead_s), Roster(), Hopes()
        self._placer = Placer(Rates(), subtask_s=s.subtask_s, ahead_s=s.ahead_s, depth=s.depth)
        self._book = LeaseBook()
        self._audit = Audit(self._book, self._placer, self._manifests)
        self._flags = Flags()
        #: What was said and is not dealt with yet.
        self._words = EVERYTHING
        #: Jobs of which the leader itself changed what waits; those that are read anew in the next beat step; and
        #: those with rows that were put off, with the time at which some of them may be carved.
        self._touched: set[UUID] = set()
        self._stale: set[UUID] = set()
        self._later: dict[UUID, float] = {}
        #: Leases that the policy does not know: of passes of which nothing waits, or of workers that get no work.
        self._orphans: dict[LeaseKey, Held] = {}
        #: Decided, and not leased yet: key in the policy -> job.
        self._unleased: dict[int, UUID] = {}
        #: A lease may have been committed without our hearing of it: then nobody was sent it; those that were found.
        self._unheard = False
        self._never_sent: set[LeaseKey] = set()
        #: Workers whose leases are to be looked at, and of whom the policy is to learn.
        self._doubtful: set[str] = set()
        self._to_learn: set[str] = set()
        self._controls, self._speeds = Controls(self.transport), Speeds()
        #: Workers that nothing is put beside what they do.
        self._taboo: set[str] = set()
        #: Share of its usual rate at which the leader sends, as of the last beat step.
        self._open_share = 1.0
        self._beat_at = self._tend_at = self._learned_at = 0.0

    def step(self, now: float, words: Words = EVERYTHING) -> int:
        """One round at monotonic time ``now``, in which ``words`` were said since the last one. The number of sub-tasks
        sent; 0 for a standby."""
        self._words |= words
        if not self._lead(now) or self.epoch is None:
            return 0
        try:
            return self._step(self.epoch, now)
        except StoreUnavailable:
            # Whether it was committed nobody knows.
            self._words = EVERYTHING
            raise

    def _step(self, epoch: int, now: float) -> int:
        beats = now >= self._beat_at or self._words.everything or self._words.drains
        if beats:
            self._beside.end()
            self._look(epoch, now)
        sent = self._quick_step(epoch, now)
        if beats:
            self._beside.end()
            sent += self._take_over(epoch, now)
            self._controls.tell(epoch, self._crew.live, self._book.keys(), self._flags.drained, now)
            self._look_after(epoch, now)
        return sent

    def rest_s(self, now: float) -> float:
        """Seconds until there may be something to do that nobody tells us of."""
        if self.epoch is None:
            return self.settings.tick_s
        due = self._beat_at
        if self._touched or self._unleased:
            due = now
        elif self._most_to_send():
            due = min(due, self._placer.next_due(), *self._later.values())
        return max(_BREATH_S, due - now)

    def stop(self) -> None:
        """Hand the lead over, once all that is leased is sent."""
        self._beside.end()
        self._end_publishing()
        if self.publisher is not None:
            self.publisher.close()
        if self.epoch is not None:
            resign(self.database, self.me, self.epoch)
            self.epoch = None

    def _lead(self, now: float) -> bool:
        """Renew or take the lead. Between renewals the fence in every transaction is what counts."""
        if self.epoch is not None and now < self._renew_at:
            return True
        led = self.epoch
        self.epoch = lead(self.database, self.me, led, self.settings.leader_lease_s, is_gone)
        self._renew_at = now + self.settings.leader_lease_s / 5
        if self.epoch is not None and self.epoch != led:
            log.info("leading", extra={"epoch": self.epoch})
            self._know_nothing(now)
            # We have heard no beat yet, so nobody is late by our clock.
            leases.extend_all(self.database, self.epoch, self.settings.lease_s)
        return self.epoch is not None

    # -- the quick step: what the words name ---------------------------------------------------

    def _quick_step(self, epoch: int, now: float) -> int:
        """Take in what was said, and give work to whoever can have some. Nobody is judged here: the beats are of before."""
        self._catch_up(now)
        return self._send(epoch, self._decide(now))

    def _catch_up(self, now: float) -> None:
        """Take in what changed since the last step: leases that ended, and what waits now of the jobs that were named."""
        for flight, job in self._unleased.items():
            # Its rows were taken by others, its job has ended, or Postgres was away.
            self._placer.closed(flight, now)
            self._touched.add(job)
        self._unleased.clear()
        words = self._words
        if words.everything:
            self._read_anew(now)
        else:
            keys = self._book.of(words.done, words.ended)
            jobs = words.landed | words.ended | self._touched
            jobs |= {job for job, at in self._later.items() if at <= now}
            if keys or jobs:
                with self.database.reading() as connection:
                    fates, waits, more_at = ends_and_demand(connection, keys, now, jobs, self._manifests)
                self._take_ends(fates, now)
                self._want(jobs, waits, more_at)
            self._stale |= words.done_of - jobs
        self._words = SILENCE
        self._touched.clear()

    def _read_anew(self, now: float) -> None:
        """Read everything."""
        self._speeds.forget()
        with self.database.reading() as connection:
            stored = {h.key: h for h in leases.held(connection)}
            fates = leases.fates(connection, self._book.keys() - stored.keys())
            wanted = [
                (page, demand_of(connection, now, page, self._manifests))
                for page in all_jobs_waiting(connection)
            ]
        found = [h for key, h in stored.items() if key not in self._book]
        if self._unheard:
            # Postgres committed them just before it went away: we did not hear of them, and sent nothing.
            self._never_sent |= {h.key for h in found if h.age_s < now - self._led_at}
        self._take_in(found)
        self._take_ends(fates, now)
        for page, more in wanted:
            self._want(page, *more)
        nothing_waits = {UUID(job) for job, _ in self._placer.wants()}.difference(
            *(page for page, _ in wanted)
        )
        self._want(nothing_waits, [], {})
        self._stale.clear()
        self._audit.begun(now)

    def _take_in(self, found: Collection[Held]) -> None:
        """Leases that are stored and were not known here: of another leader."""
        for h in found:
            self._book.add(h)
            self._orphans[h.key] = h
            self._doubtful.add(h.worker)

    def _take_ends(self, fates: Mapping[LeaseKey, Fate], now: float) -> None:
        """Let go of the leases that ended."""
        for key, fate in fates.items():
            if not fate.leased:
                flight = self._placer.flight(key)
                if fate.state == "lost" and (held := self._book.get(key)) is not None:
                    # Given up by whoever waited: its worker may hold it though it has not said so yet.
                    self._controls.recalled(held.worker, key, now + self.settings.lease_s)
                mine = fate.state == "done" and flight is not None and flight.at.name == fate.worker
                if mine:
                    self._controls.ended(fate.worker, key, now)
                if mine or (fate.state == "done" and flight is None):
                    self._speeds.ended(flight)
                self._let_go(key, now, fate.busy_s if mine else None)

    def _let_go(self, key: LeaseKey, now: float, busy_s: float | None = None) -> None:
        self._placer.closed(key, now, busy_s)
        self._orphans.pop(key, None)
        held = self._book.drop(key)
        if held is not None:
            self._controls.due.add(held.worker)

    def _want(self, jobs: Collection[UUID], demands: Sequence[Demand], more_at: Mapping[UUID, float]) -> None:
        """What waits now of these jobs."""
        self._audit.heard(jobs)
        waiting = {demand.id for demand in demands}
        for demand in demands:
            self._placer.want(demand)
        for job in jobs:
            for id_ in self._placer.passes_of(str(job)):
                if id_ not in waiting:
                    self._placer.unwanted(id_)
            self._later.pop(job, None)
        self._later.update(more_at)
        self._stale.difference_update(jobs)

    # -- the beat step: who is there, and what became of what they hold -------------------------

    def _look(self, epoch: int, now: float) -> None:
        """Hear all workers; rescue what is lost; tell the policy who may be given work."""
        flags: Callable[[], Flags] = partial(self._read_flags, now)
        if len(self._crew.live) >= _MANY_WORKERS:
            flags = self._beside.begin(flags)
        changed = self._crew.hear(self.transport.hear(), now)
        # Whatever fails from here on, these are looked at again.
        self._doubtful |= changed.workers
        self._to_learn |= changed.themselves
        self._controls.due |= changed.workers
        self._beat_at = now + BEAT_STEP_S
        if self.publisher is not None and len(self._crew.live) >= _MANY_WORKERS:
            self.publisher.want(now)
        self._heed(flags())
        if self._flags.late:
            dropping.expire(self.database, epoch, self._flags.late)
        self._touched |= self._stale
        self._catch_up(now)
        self._rescue(epoch, now)
        self._controls.note_strangers(self._crew.live, changed.themselves)
        self._learn_of_workers(now)
        self._open_share = throttle(self.transport.outcome_backlog(), self.transport.memory_share())
        if now >= self._tend_at:
            self._tend_at = now + TEND_S
            self._placer.tend(now)

    def _read_flags(self, now: float) -> Flags:
        """What operators, aggregators and the clock of the database say of workers and leases. Speeds are learned too.

        It may be done beside the step while workers are heard, so it touches nothing that hearing does."""
        with self.database.reading() as connection:
            flags = read_flags(connection, self.settings.lease_s / 2)
            if now >= self._learned_at:
                self._learned_at = now + _LEARN_S
                self._placer.rates = self._speeds.read(connection, self._placer.rates)
        return flags

    def _heed(self, flags: Flags) -> None:
        before, self._flags = self._flags, flags
        self._to_learn |= before.drained ^ flags.drained
        self._controls.due |= before.drained ^ flags.drained
        self._to_learn |= {r.worker for r in set(before.refusals) ^ set(flags.refusals)}

    def _rescue(self, epoch: int, now: float) -> None:
        """Of leases that end soon, and of workers of which something is new: extend those of attempts that are seen alive;
        close those that are gone, and return their rows."""
        book, live, due = self._book, self._crew.live, self._flags.due
        wiped = self._was_emptied(epoch, now)
        if wiped:
            # Whatever no queue holds is given up.
            self._end_publishing()
        asked: Container[LeaseKey] = book if wiped else due.keys() | self._never_sent
        candidates: dict[LeaseKey, Held] = {}
        for name in book.workers() if wiped else self._doubtful:
            candidates |= book.at(name)
        candidates |= {key: h for key in (*due, *self._never_sent) if (h := book.get(key)) is not None}
        seen, in_vain = seen_alive(self.transport, live, candidates, asked)
        in_vain |= left_behind(candidates, live)
        in_vain |= self._never_sent - seen
        seen -= in_vain
        late = [key for key in due if key in seen]
        if late:
            extending = (self.database, epoch, late, self.settings.lease_s)
            if len(late) < _MANY_LEASES:
                leases.extend(*extending)
            else:
                self._beside.begin(leases.extend, *extending)
        gone = [
            h
            for key, h in candidates.items()
            if key not in seen
            and (due.get(key) or key in in_vain or another_boot(h, live) or (wiped and h.worker in live))
        ]
        for h in self._close(epoch, gone, live) if gone else ():
            self._let_go(h.key, now)
            self._touched.add(h.job)
        # Those that wait on the stream, and those that come into a queue that drains, are looked at again.
        self._doubtful = {h.worker for h in gone if h.key in book}
        drains = draining({h.worker for h in candidates.values()}, live)
        self._doubtful |= {name for name in drains if book.at(name)}
        self._unheard = False
        self._never_sent.clear()

    @contextmanager
    def _leasing(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable:
            self._unheard = True
            raise

    def _was_emptied(self, epoch: int, now: float) -> bool:
        """True once for each time that Redis was restarted or emptied, when live workers have beaten again."""
        identity = self.transport.identity()
        if identity != self._flags.transport:
            log.warning("redis is new, was restarted or emptied")
            record_transport(self.database, epoch, identity)
            self._controls.lost(self._crew.live.keys())
            self._hear_again_at = now + _HEAR_AGAIN_S
        if self._hear_again_at is None or now < self._hear_again_at:
            return False
        self._hear_again_at = None
        return True

    def _close(self, epoch: int, gone: Sequence[Held], live: Mapping[str, Beat]) -> Sequence[Held]:
        """Close these leases, and return their rows. Those that were closed."""
        # An outcome on the stream is as good as a result: it is merged, never rescued.
        waiting = self.transport.waiting_outcomes()
        gone = [h for h in gone if h.key not in waiting]
        if not gone:
            return ()
        evidence = self.transport.running_at(sorted({h.worker for h in gone}))
        # Where both leases of a sub-task are gone, the one whose process died tells more.
        by_subtask = {h.subtask: h for h in sorted(gone, key=lambda h: another_boot(h, live))}
        with self.database.transaction() as connection:
            fence(connection, epoch)
            for subtask in leases.close_lost(connection, gone):
                h = by_subtask[subtask.id]
                running = evidence[h.worker]
                # Silence is no death: only another process in its place proves one.
                died = another_boot(h, live)
                seen = running is not None and running.boot == h.boot
                suspects = running.rows.get(h.key, ()) if running is not None and seen else ()
                returns, given_up = lost(
                    subtask.ranges,
                    tries=subtask.tries,
                    deaths=subtask.deaths,
                    exclusive=subtask.exclusive,
                    suspects=suspects,
                    died=died,
                )
                leases.put_back(connection, subtask.job, subtask.pass_number, returns)
                if given_up:
                    record_given_up(connection, subtask, given_up)
                log.warning(
                    "rescued",
                    extra={
                        "job": str(subtask.job),
                        "subtask": subtask.id,
                        "attempt": h.attempt,
                        "worker": h.worker,
                        "died": died,
                        "suspects": len(suspects),
                        "poison": len(given_up),
                    },
                )
        return gone

    def _learn_of_workers(self, now: float) -> None:
        """Tell the policy what is new of workers, and of the leases that another leader gave them."""
        flags, live, placer = self._flags, self._crew.live, self._placer
        # A suspect that another leader sent, of a pass of which nothing waits: nothing is put beside it.
        taboo = {h.worker for h in self._orphans.values() if h.exclusive}
        self._to_learn |= taboo ^ self._taboo
        self._taboo = taboo
        some = sorted(self._to_learn)[:_WORKERS_PER_STEP]
        beats = {name: live[name] for name in some if name in live}
        for name in some:
            if name not in beats:
                placer.gone(name)
        for worker in workers(
            beats, flags.refusals, self.settings.memory_share, drained=flags.drained, suspects=taboo
        ):
            if worker.barred is None:
                placer.worker(worker, now)
            else:
                placer.gone(worker.name)
        self._to_learn.difference_update(some)
        for key, h in list(self._orphans.items()):
            demand = placer.demand((str(h.job), h.pass_number))
            if demand is not None and placer.adopt(demand, h.worker, under_way(h), now) is not None:
                del self._orphans[key]

    # -- place, carve, lease, send -------------------------------------------------------------

    def _decide(self, now: float) -> list[tuple[Cut, Flight]]:
        """What to send now; nothing is changed yet but in the policy's mind."""
        most = self._most_to_send()
        frontiers: dict[tuple[str, int], Frontier] = {}
        decided: list[tuple[Cut, Flight]] = []
        exhausted: set[UUID] = set()
        if most == 0 or self._placer.next_due() > now:
            return decided
        with self.database.reading() as connection:
            for p in islice(self._placer.place(now), most):
                at = p.demand.id
                if at not in frontiers:
                    rows = _rows_wanted(p, most)
                    frontiers[at] = frontier(connection, *at, self._lengths, rows=rows, limit=most)
                carved = carve(
                    frontiers[at], p.budget_s, p.price, cap_s=self.settings.subtask_s, least=p.least
                )
                if carved is None:
                    # More may lie behind what was read of it.
                    self._placer.nothing(p, now)
                    exhausted.add(job_id(p.demand.job))
                    continue
                rows, size = carved.rows, carved.bytes
                cut = _cut(p, carved, p.price.of(rows, size))
                number = next(self._flight_numbers)
                flight = self._placer.opened(
                    p,
                    number,
                    now,
                    rows=rows,
                    size=size,
                    seconds=cut.predicted_s,
                    exclusive=carved.exclusive,
                    harmless=carved.deaths == 0,
                )
                self._unleased[number] = job_id(p.demand.job)
                decided.append((cut, flight))
        # Where nothing could be carved at all it is not asked for again at once.
        (self._touched if decided else self._stale).update(exhausted)
        return decided

    def _most_to_send(self) -> int:
        """Sub-tasks of one step at most: fewer while outcomes pile up, or Redis fills."""
        return int(MOST_PER_STEP * self._open_share)

    def _send(self, epoch: int, decided: Sequence[tuple[Cut, Flight]]) -> int:
        # Rows before messages: a crash in between leaves a lease to rescue, never a message without a row.
        leased = self._lease(epoch, decided) if decided else ()
        # Those of the step before go first.
        self._end_publishing()
        # Behind a full step another one follows at once, and need not wait.
        full = len(leased) >= MOST_PER_STEP
        if not (full and self.publisher is not None and self.publisher.begin(leased)):
            self._publish(leased)
        return len(leased)

    def _lease(self, epoch: int, decided: Sequence[tuple[Cut, Flight]]) -> Sequence[Leased]:
        with self._leasing():
            leased = leases.lease(self.database, epoch, [cut for cut, _ in decided], self.settings.lease_s)
        flights = {id(cut.carved): flight for cut, flight in decided}
        for item in leased:
            flight = flights.pop(id(item.carved))
            del self._unleased[cast("int", flight.key)]
            self._placer.keyed(flight, (item.subtask, item.attempt))
            self._book.add(held_of(item, flight.worker.boot))
        return leased

    def _publish(self, leased: Sequence[Leased]) -> None:
        publish(self.transport, self._payloads, leased)

    def _end_publishing(self) -> None:
        """Wait until all that is leased is sent. Raises what the publisher met."""
        if self.publisher is not None:
            self._publish(self.publisher.end())

    # -- take over, control and chores: the beat step's other half ------------------------------

    def _take_over(self, epoch: int, now: float) -> int:
        """Near the end of a pass: give idle workers what waits elsewhere, or a second lease of what lags. How many."""
        words = self._placer.late(now)
        if words:
            # What is taken back must not come into a queue afterwards.
            self._end_publishing()
        keys = (cast("LeaseKey", w.flight.key) for w in words if isinstance(w, Recall))
        back = [h for key in keys if (h := self._book.get(key)) is not None]
        if back:
            # An outcome on the stream is as good as a result.
            waiting = self.transport.waiting_outcomes()
            back = [h for h in back if h.key not in waiting]
        if back:
            self._recall(epoch, back, now)
        return len(back) + self._clone(epoch, [w for w in words if isinstance(w, Clone)], now)

    def _recall(self, epoch: int, back: Sequence[Held], now: float) -> None:
        leases.recall(self.database, epoch, back)
        for h in back:
            self._controls.recalled(h.worker, h.key, now + self.settings.lease_s)
            log.info("recalled", extra={"subtask": h.subtask, "attempt": h.attempt, "worker": h.worker})
        with self.database.reading() as connection:
            fates = leases.fates(connection, [h.key for h in back])
        self._take_ends(fates, now)
        self._touched |= {h.job for h in back}

    def _clone(self, epoch: int, words: Sequence[Clone], now: float) -> int:
        asked = {cast("LeaseKey", w.flight.key)[0]: w for w in words}
        if not asked:
            return 0
        clones = [
            leases.SecondLease(
                subtask=subtask,
                worker=w.worker.name,
                boot=w.worker.boot,
                device=w.worker.device_name,
                device_kind=w.worker.device_kind,
                predicted_s=w.seconds,
                measured=w.measured,
            )
            for subtask, w in asked.items()
        ]
        with self._leasing():
            leased = leases.clone(self.database, epoch, clones, self.settings.lease_s)
        for item in leased:
            self._placer.cloned(asked[item.subtask], (item.subtask, item.attempt), now)
            self._book.add(held_of(item, asked[item.subtask].worker.boot, clone=True))
            log.info(
                "cloned",
                extra={"subtask": item.subtask, "attempt": item.attempt, "worker": item.worker},
            )
        self._publish(leased)
        return len(leased)

    def _look_after(self, epoch: int, now: float) -> None:
        """What needs no haste, each in its time: chores, the sweeper, a slice of the audit."""
        if now >= self._chores_at:
            self._chores_at = now + _CHORES_S
            self._chores(epoch, now)
        if now >= self._sweep_at:
            # A slice a step: a job of millions of rows goes while all others are served.
            self._sweep_at = (
                now if sweep(self.database, epoch, self.settings.retention_days) else now + _SWEEP_S
            )
        with self.database.reading() as connection:
            found = self._audit.go_on(connection, now)
            fates = leases.fates(connection, found.ended) if found.ended else {}
        if found:
            self._put_right(found, fates, now)

    def _put_right(self, found: Differences, fates: Mapping[LeaseKey, Fate], now: float) -> None:
        """The leader went by what was not so. It goes on by what is, and says that it did not."""
        self.differences += len(found)
        self.transport.count_differences(len(found))
        log.error(
            "what the leader went by was not what is stored",
            extra={
                "unknown_leases": len(found.unknown),
                "ended_leases": len(found.ended),
                "passes": len(found.waiting),
            },
        )
        self._take_in(found.unknown)
        self._take_ends(fates, now)
        self._touched |= found.jobs()

    def _chores(self, epoch: int, now: float) -> None:
        flags, live, placer = self._flags, self._crew.live, self._placer
        waiting = [demand for id_ in sorted(placer.wants()) if (demand := placer.demand(id_)) is not None]
        refusing = {r.worker for r in flags.refusals}
        # What one of a kind can run the others can, but for those that refused something.
        some = one_of_each_kind(self._roster.see(live, now), refusing) if waiting else {}
        known = workers(some, flags.refusals, self.settings.memory_share)
        hopeless = self._hopes.hopeless(waiting, known, flags.refusals, now)
        with self.database.transaction() as connection:
            fence(connection, epoch)
            ending = overdue(connection, UPLOAD_SILENT_S) | hopeless
            for job, why in sorted(ending.items()):
                end_job(connection, job, State.FAILED, why)
            drains.forget_the_gone(
                connection, [name for name in sorted(flags.drained | refusing) if name in live]
            )


def _cut(p: Placement, carved: Carved, seconds: float) -> Cut:
    return Cut(
        job=p.demand.job,
        pass_number=p.demand.pass_number,
        worker=p.worker.name,
        boot=p.worker.boot,
        device=p.worker.device_name,
        device_kind=p.worker.device_kind,
        predicted_s=seconds,
        carved=carved,
        measured=p.measured,
    )


def _rows_wanted(p: Placement, subtasks: int) -> int:
    """Rows that this many sub-tasks like the one placed would take."""
    row_s = max(1e-9, p.price.of(1, p.demand.bytes_waiting / max(1, p.demand.rows_waiting)) - p.price.start_s)
    return subtasks * min(MAX_ROWS, 1 + int(p.budget_s / row_s))
