"""The dispatcher: one loop that leads, rescues, places, leases and sends.

Deciding is done by pure modules (liveness, place, carve, lifecycle); this shell fetches facts and carries the
decisions out. Any number may run; one leads, the others stand by.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import cast

from motet.protocol import traces
from motet.protocol.settings import Settings
from motet.protocol.transport import SchedulerTransport, TransportLost
from motet.protocol.wire import PROTOCOL, Beat, Control
from scheduler.facts import Facts, read, under_way, workers
from scheduler.identity import is_gone, own_name
from scheduler.payloads import Payloads
from scheduler.policy.carve import MAX_ROWS, Carved, Frontier, carve
from scheduler.policy.cost import Rates
from scheduler.policy.lifecycle import Hopes, lost
from scheduler.policy.liveness import Roster, Watch, attuned, drops, speaks, usable
from scheduler.policy.place import Placer
from scheduler.policy.placing.entries import Flight
from scheduler.policy.placing.rebalancing import Clone, Recall
from scheduler.policy.placing.records import Placement
from scheduler.policy.pressure import throttle
from scheduler.pulse import pulse
from scheduler.store import drains, endings, leases
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.demand import frontier
from scheduler.store.endings import end_job
from scheduler.store.leadership import NotLeading, fence, lead, record_transport, resign
from scheduler.store.leases import Cut, Held, Leased
from scheduler.store.listening import Listener
from scheduler.store.outcomes import record_given_up

log = logging.getLogger(__name__)

#: An upload that stays silent for so long is abandoned.
UPLOAD_SILENT_S = 3600.0
#: Chores that need no haste (overdue jobs, forgotten workers) are done this often.
_CHORES_S = 5.0
#: The sweeper looks so often for jobs to delete; while it finds some it goes on in the next step.
_SWEEP_S = 30.0
#: Sub-tasks sent in one step: with many workers a step must still be much shorter than the leader's lease.
MOST_PER_STEP = 64
#: Who is owed a load, and which deadline comes near, is looked at so often; what idle workers may take over, so often.
_TEND_S, _LATE_S = 1.0, 0.25
#: Rates are read anew so often.
_LEARN_S = 0.5
#: After a wake-up nothing more is done for so long: what comes in bursts is dealt with together.
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

    def __post_init__(self) -> None:
        self._watch = Watch(self.settings.dead_s)
        self._roster, self._hopes = Roster(), Hopes()
        self._payloads = Payloads(self.database)
        self._renew_at = 0.0
        #: When this term began.
        self._led_at = 0.0
        #: A lease may have been committed without our hearing of it: then nobody was sent it.
        self._unheard = False
        #: When leases of live workers that did not survive an emptied Redis are given up; None: it was not emptied.
        self._hear_again_at: float | None = None
        self._chores_at = 0.0
        self._sweep_at = 0.0
        self._tend_at = self._late_at = self._learned_at = 0.0
        self._placer = self._new_placer()
        self._flight_numbers = count()
        #: The last step left something that it could have placed.
        self._more = False
        #: Attempts taken back from a worker, until when it is told so: their messages may still lie in its queue.
        self._recalled: dict[str, dict[leases.LeaseKey, float]] = {}
        self._controls: dict[str, Control] = {}
        #: (worker, boot) of those whose protocol was told to the log.
        self._strangers: set[tuple[str, str]] = set()

    def step(self, now: float) -> int:
        """One round at monotonic time ``now``. The number of sub-tasks sent; 0 for a standby."""
        if not self._lead(now):
            return 0
        epoch = self.epoch
        assert epoch is not None
        # Beats before leases: an attempt that a beat names and no lease does has truly ended.
        live = self._watch.see(self.transport.beats(), now)
        facts = self._read(now)
        if self._rescue(epoch, live, facts, now):
            facts = self._read(now)
        self._note_strangers(live)
        self._learn_of(usable(live, facts.drained), facts, now)
        sent = self._send(epoch, self._decide(now))
        if now >= self._late_at:
            self._late_at = now + _LATE_S
            sent += self._take_over(epoch, facts, now)
        self._tell(epoch, live, facts, now)
        if now >= self._chores_at:
            self._chores_at = now + _CHORES_S
            self._chores(epoch, live, facts, now)
        if now >= self._sweep_at:
            # A slice a step: a job of millions of rows goes while all others are served.
            self._sweep_at = now if self._sweep(epoch) else now + _SWEEP_S
        return sent

    def rest_s(self, now: float) -> float:
        """Seconds until there may be something to do that nobody tells us of."""
        due_s = 0.0 if self._more else self._placer.next_due() - now
        return min(self.settings.tick_s, max(_BREATH_S, due_s))

    def stop(self) -> None:
        """Hand the lead over at once."""
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
            self._begin_to_lead(self.epoch, now)
        return self.epoch is not None

    def _begin_to_lead(self, epoch: int, now: float) -> None:
        log.info("leading", extra={"epoch": epoch})
        self._led_at, self._unheard = now, False
        self._watch = Watch(self.settings.dead_s)
        self._roster, self._hopes = Roster(), Hopes()
        self._controls.clear()
        self._placer = self._new_placer()
        self._learned_at = 0.0
        # We have heard no beat yet, so nobody is late by our clock.
        leases.extend_all(self.database, epoch, self.settings.lease_s)

    def _new_placer(self) -> Placer:
        s = self.settings
        return Placer(Rates(), subtask_s=s.subtask_s, ahead_s=s.ahead_s, depth=s.depth)

    def _read(self, now: float) -> Facts:
        with self.database.transaction() as connection:
            if now < self._learned_at:
                return read(connection, now, self._placer.rates)
            self._learned_at = now + _LEARN_S
            return read(connection, now)

    # -- rescue --------------------------------------------------------------------------------

    def _rescue(self, epoch: int, live: Mapping[str, Beat], facts: Facts, now: float) -> bool:
        """Extend the leases of attempts that are seen alive; close those that are gone, and return their rows."""
        seen, in_vain = self._seen_alive(facts.held, live)
        in_vain |= {h.key for h in facts.held if _left_behind(h, live)}
        in_vain |= self._never_sent(facts.held, now) - seen
        seen -= in_vain
        late = [h.key for h in facts.held if h.key in seen and h.left_s < self.settings.lease_s / 2]
        if late:
            leases.extend(self.database, epoch, late, self.settings.lease_s)
        wiped = self._was_emptied(epoch, facts, now)
        gone = [
            h
            for h in facts.held
            if h.key not in seen
            and (h.expired or h.key in in_vain or _another_boot(h, live) or (wiped and h.worker in live))
        ]
        closed = bool(gone) and self._close(epoch, gone, live)
        self._unheard = False
        return closed

    def _never_sent(self, held: Sequence[Held], now: float) -> set[tuple[int, int]]:
        """Leases that Postgres committed just before it went away: we did not hear of them, and sent nothing."""
        if not self._unheard:
            return set()
        known = self._placer.flights()
        return {h.key for h in held if h.key not in known and h.age_s < now - self._led_at}

    @contextmanager
    def _leasing(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable:
            self._unheard = True
            raise

    def _was_emptied(self, epoch: int, facts: Facts, now: float) -> bool:
        """True once for each time that Redis was restarted or emptied, when live workers have beaten again."""
        identity = self.transport.identity()
        if identity != facts.transport:
            log.warning("redis is new, was restarted or emptied")
            record_transport(self.database, epoch, identity)
            self._controls.clear()
            self._hear_again_at = now + _HEAR_AGAIN_S
        if self._hear_again_at is None or now < self._hear_again_at:
            return False
        self._hear_again_at = None
        return True

    def _seen_alive(
        self, held: Sequence[Held], live: Mapping[str, Beat]
    ) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
        """Leases whose attempt a live worker holds, or whose message still waits in a live worker's queue.

        And those among them that wait at a worker that drains: it takes no more, so they are better off elsewhere.
        """
        seen: set[tuple[int, int]] = set()
        waiting: set[tuple[int, int]] = set()
        for name in {h.worker for h in held}:
            beat = live.get(name)
            if beat is None:
                continue
            mine = {h.key for h in held if h.worker == name and h.boot == beat.boot}
            seen |= mine & set(beat.held)
            if mine - seen:
                queued = mine & self.transport.queued(name)
                if beat.state == "draining":
                    waiting |= queued - seen
                seen |= queued
        return seen, waiting

    def _close(self, epoch: int, gone: Sequence[Held], live: Mapping[str, Beat]) -> bool:
        # An outcome on the stream is as good as a result: it is merged, never rescued.
        waiting = self.transport.waiting_outcomes()
        gone = [h for h in gone if h.key not in waiting]
        if not gone:
            return False
        evidence = {name: self.transport.running(name) for name in {h.worker for h in gone}}
        # Where both leases of a sub-task are gone, the one whose process died tells more.
        by_subtask = {h.subtask: h for h in sorted(gone, key=lambda h: _another_boot(h, live))}
        with self.database.transaction() as connection:
            fence(connection, epoch)
            for subtask in leases.close_lost(connection, gone):
                h = by_subtask[subtask.id]
                running = evidence[h.worker]
                # Silence is no death: only another process in its place proves one.
                died = _another_boot(h, live)
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
        return True

    # -- place, carve, lease, send -------------------------------------------------------------

    def _learn_of(self, beats: Mapping[str, Beat], facts: Facts, now: float) -> None:
        """Tell the policy what has changed since the last step."""
        placer = self._placer
        placer.rates = facts.rates
        held = {h.key: h for h in facts.held}
        for demand in facts.demand:
            placer.want(demand)
        for id_ in placer.wants() - {demand.id for demand in facts.demand}:
            placer.unwanted(id_)
        self._learn_of_workers(beats, facts, now)
        for key in placer.flights():
            if not isinstance(key, tuple):
                # Decided, and never leased: its rows were taken by others, its job has ended, or Postgres was away.
                placer.closed(key, now)
        ended = placer.flights() - held.keys()
        if ended:
            with self.database.transaction() as connection:
                spent = leases.spent(connection, {cast("leases.LeaseKey", key)[0] for key in ended})
            for key in ended:
                state, worker, busy_s = spent.get(cast("leases.LeaseKey", key)[0], ("", "", 0.0))
                flight = placer.flight(key)
                mine = flight is not None and flight.worker.name == worker and state == "done"
                placer.closed(key, now, busy_s if mine else None)
        known = placer.flights()
        demands = {demand.id: demand for demand in facts.demand}
        for key, h in held.items():
            wanted = demands.get((str(h.job), h.pass_number))
            if key not in known and wanted is not None:
                placer.adopt(wanted, h.worker, under_way(h), now)

    def _learn_of_workers(self, beats: Mapping[str, Beat], facts: Facts, now: float) -> None:
        # A suspect that another leader sent, of a pass of which nothing waits: nothing is put beside it.
        taboo = {h.worker for h in facts.held if h.exclusive and self._placer.flight(h.key) is None}
        able = {name: beat for name, beat in beats.items() if name not in taboo}
        for name in self._placer.workers() - able.keys():
            self._placer.gone(name)
        for worker in workers(able, facts.refusals, self.settings.memory_share):
            self._placer.worker(worker, now)

    def _decide(self, now: float) -> list[tuple[Cut, Flight]]:
        """What to send now; nothing is changed yet but in the policy's mind."""
        if now >= self._tend_at:
            self._tend_at = now + _TEND_S
            self._placer.tend(now)
        most = self._most_to_send()
        self._more = False
        frontiers: dict[tuple[str, int], Frontier] = {}
        decided: list[tuple[Cut, Flight]] = []
        if most == 0 or self._placer.next_due() > now:
            return decided
        with self.database.transaction() as connection:
            for p in islice(self._placer.place(now), most):
                at = p.demand.id
                if at not in frontiers:
                    frontiers[at] = frontier(connection, *at, rows=_rows_wanted(p, most), limit=most)
                carved = carve(
                    frontiers[at], p.budget_s, p.price, cap_s=self.settings.subtask_s, least=p.least
                )
                if carved is None:
                    # More may lie behind what was read of it: the next step will see.
                    self._placer.nothing(p, now)
                    self._more = True
                    continue
                cut = _cut(p, carved, self._placer.rates)
                flight = self._placer.opened(
                    p,
                    next(self._flight_numbers),
                    now,
                    rows=carved.rows,
                    size=carved.bytes,
                    seconds=cut.predicted_s,
                    exclusive=carved.exclusive,
                    harmless=carved.deaths == 0,
                )
                decided.append((cut, flight))
        return decided

    def _most_to_send(self) -> int:
        """Sub-tasks of this step at most: fewer while outcomes pile up, or Redis fills."""
        open_share = throttle(self.transport.outcome_backlog(), self.transport.memory_share())
        return int(MOST_PER_STEP * open_share)

    def _send(self, epoch: int, decided: Sequence[tuple[Cut, Flight]]) -> int:
        if not decided:
            return 0
        # Rows before messages: a crash in between leaves a lease to rescue, never a message without a row.
        with self._leasing():
            leased = leases.lease(self.database, epoch, [cut for cut, _ in decided], self.settings.lease_s)
        flights = {id(cut.carved): flight for cut, flight in decided}
        for item in leased:
            self._placer.keyed(flights.pop(id(item.carved)), (item.subtask, item.attempt))
        self._publish(leased)
        return len(leased)

    def _publish(self, leased: Sequence[Leased]) -> None:
        began = time.time()
        self.transport.publish_all(self._payloads.assignments(leased))
        for item in leased:
            _trace_sent(item, began)

    def _take_over(self, epoch: int, facts: Facts, now: float) -> int:
        """Near the end of a pass: give idle workers what waits elsewhere, or a second lease of what lags. How many."""
        words = self._placer.late(now)
        held = {h.key: h for h in facts.held}
        back = [held[w.flight.key] for w in words if isinstance(w, Recall) and w.flight.key in held]
        if back:
            # An outcome on the stream is as good as a result.
            waiting = self.transport.waiting_outcomes()
            back = [h for h in back if h.key not in waiting]
        if back:
            leases.recall(self.database, epoch, back)
            for h in back:
                self._recalled.setdefault(h.worker, {})[h.key] = now + self.settings.lease_s
                log.info("recalled", extra={"subtask": h.subtask, "attempt": h.attempt, "worker": h.worker})
        return len(back) + self._clone(epoch, [w for w in words if isinstance(w, Clone)], now)

    def _clone(self, epoch: int, words: Sequence[Clone], now: float) -> int:
        asked = {cast("leases.LeaseKey", w.flight.key)[0]: w for w in words}
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
            )
            for subtask, w in asked.items()
        ]
        with self._leasing():
            leased = leases.clone(self.database, epoch, clones, self.settings.lease_s)
        for item in leased:
            self._placer.cloned(asked[item.subtask], (item.subtask, item.attempt), now)
            log.info(
                "cloned",
                extra={"subtask": item.subtask, "attempt": item.attempt, "worker": item.worker},
            )
        self._publish(leased)
        return len(leased)

    # -- control and chores --------------------------------------------------------------------

    def _tell(self, epoch: int, live: Mapping[str, Beat], facts: Facts, now: float) -> None:
        """Tell each worker which of its attempts have no lease any more, and whether it is to drain."""
        leased = {h.key for h in facts.held}
        self._recalled = {
            name: kept
            for name, keys in self._recalled.items()
            if (kept := {key: until for key, until in keys.items() if until > now})
        }
        words: dict[str, Control] = {}
        changed: dict[str, Control] = {}
        for name, beat in live.items():
            drop = drops(beat, leased)
            if beat.state == "draining":
                # What was taken back from its queue still lies there: it must not run it when it works again.
                drop = tuple(sorted({*drop, *(self.transport.queued(name) - leased)}))
            if name in self._recalled:
                drop = tuple(sorted({*drop, *self._recalled[name]}))
            drain = name in facts.drained
            words[name] = Control(epoch=epoch, drop=drop, drain=drain)
            if self._controls.get(name) != words[name] or not attuned(beat, drain):
                changed[name] = words[name]
        self.transport.control(changed)
        self._controls = words

    def _note_strangers(self, live: Mapping[str, Beat]) -> None:
        """Say once of each process that speaks another major that it gets no work, and why."""
        strangers = {(name, beat.boot) for name, beat in live.items() if not speaks(beat)}
        for name, boot in sorted(strangers - self._strangers):
            beat = live[name]
            log.warning(
                "incompatible worker: it gets no work until it is upgraded, or we are",
                extra={
                    "worker": name,
                    "boot": boot,
                    "host": beat.host,
                    "version": beat.version,
                    "protocol": beat.protocol,
                    "ours": PROTOCOL,
                },
            )
        self._strangers = strangers

    def _chores(self, epoch: int, live: Mapping[str, Beat], facts: Facts, now: float) -> None:
        known = workers(self._roster.see(live, now), facts.refusals, self.settings.memory_share)
        hopeless = self._hopes.hopeless(facts.demand, known, facts.refusals, now)
        with self.database.transaction() as connection:
            fence(connection, epoch)
            ending = endings.overdue(connection, UPLOAD_SILENT_S) | hopeless
            for job, why in sorted(ending.items()):
                end_job(connection, job, "failed", why)
            drains.forget_the_gone(connection, list(live))

    def _sweep(self, epoch: int) -> bool:
        """Delete some of what is no longer kept, in short transactions. True where more of it may be left."""
        with self.database.transaction() as connection:
            fence(connection, epoch)
            due = endings.due_for_deletion(connection, self.settings.retention_days)
            columns = endings.sweep_columns(connection)
        left = endings.SLICE_BLOCKS
        for job in due:
            with self.database.transaction() as connection:
                fence(connection, epoch)
                gone = endings.delete_slice(connection, job.id)
            if gone:
                log.info("job deleted", extra={"job": str(job.id), "why": job.why, "blocks": job.n_blocks})
            left -= max(1, job.n_blocks)
            if left <= 0:
                break
        return bool(due or columns)


def _another_boot(held: Held, live: Mapping[str, Beat]) -> bool:
    """Another process beats in the place of the one that held this lease."""
    return held.worker in live and live[held.worker].boot != held.boot


def _left_behind(held: Held, live: Mapping[str, Beat]) -> bool:
    """Its worker says that it came there and cannot run: its payload was lost, or cannot be read."""
    beat = live.get(held.worker)
    return beat is not None and beat.boot == held.boot and held.key in beat.left


def _trace_sent(item: Leased, began: float) -> None:
    traces.add(
        item.job,
        traces.SEND,
        began,
        subtask=item.subtask,
        attempt=item.attempt,
        pass_number=item.pass_number,
        worker=item.worker,
        rows=item.carved.rows,
        bytes=item.carved.bytes,
        predicted_s=item.predicted_s,
    )


def _cut(p: Placement, carved: Carved, rates: Rates) -> Cut:
    model = p.demand.model
    return Cut(
        job=p.demand.job,
        pass_number=p.demand.pass_number,
        worker=p.worker.name,
        boot=p.worker.boot,
        device=p.worker.device_name,
        device_kind=p.worker.device_kind,
        predicted_s=p.price.of(carved.rows, carved.bytes),
        carved=carved,
        measured=rates.measured((model.trunk or model.digest, p.worker.device_name, p.demand.numerics)),
    )


def _rows_wanted(p: Placement, subtasks: int) -> int:
    """Rows that this many sub-tasks like the one placed would take."""
    row_s = max(1e-9, p.price.of(1, p.demand.bytes_waiting / max(1, p.demand.rows_waiting)) - p.price.start_s)
    return subtasks * min(MAX_ROWS, 1 + int(p.budget_s / row_s))


def run(dispatcher: Dispatcher, wake: Listener, stopping: threading.Event) -> None:
    """Step until ``stopping``. Trouble with Postgres or Redis is waited out."""
    tick_s = dispatcher.settings.tick_s
    beat = pulse(dispatcher.settings.pulse)
    while not stopping.is_set():
        beat()
        try:
            if dispatcher.step(time.monotonic()) == MOST_PER_STEP:
                continue  # there may be room for more
            if dispatcher.epoch is None:
                stopping.wait(tick_s)  # and not for what the leader is told, which is often
                continue
        except NotLeading:
            dispatcher.epoch = None
            continue
        except (StoreUnavailable, TransportLost) as trouble:
            log.warning("waiting for a service", extra={"trouble": f"{type(trouble).__name__}: {trouble}"})
            stopping.wait(tick_s)
        wake.wait(dispatcher.rest_s(time.monotonic()))
    wake.close()
    try:
        dispatcher.stop()
    except StoreUnavailable:
        log.warning("could not resign: the lease will run out by itself")
