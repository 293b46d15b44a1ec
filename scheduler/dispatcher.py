"""The dispatcher: one loop that leads, rescues, places, leases and sends.

Deciding is done by pure modules (liveness, place, carve, lifecycle); this shell fetches facts and carries the
decisions out. Any number may run; one leads, the others stand by.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import psycopg

from motet import traces
from motet.manifest import Manifest
from motet.settings import Settings
from motet.tasks import render
from motet.transport import SchedulerTransport, TransportLost
from motet.wire import PROTOCOL, Assignment, Beat, Control, TaskOrder
from scheduler.blocks import decode_block, row_order
from scheduler.carve import Carved, Frontier, carve
from scheduler.cost import Rates
from scheduler.lifecycle import Refusal, hopeless, lost
from scheduler.liveness import Watch, attuned, drops, speaks, usable
from scheduler.place import INTERACTIVE, Demand, Placement, Worker, place
from scheduler.store import drains, endings, leases
from scheduler.store.database import WORK, Database, StoreUnavailable
from scheduler.store.endings import end_job
from scheduler.store.leadership import NotLeading, fence, lead, resign, transport_seen
from scheduler.store.leases import Cut, Held, Leased
from scheduler.store.outcomes import record_given_up

log = logging.getLogger(__name__)

#: An upload that stays silent for so long is abandoned.
UPLOAD_SILENT_S = 3600.0
#: Decoded blocks kept between payloads, in bytes of their texts: those of a step, and those that are carved on.
_CACHE_BYTES = 16 * 1024 * 1024
#: Chores that need no haste (overdue jobs, forgotten workers) are done this often.
_CHORES_S = 5.0
#: The sweeper looks so often for jobs to delete; while it finds some it goes on in the next step.
_SWEEP_S = 30.0
#: Sub-tasks sent in one step: with many workers a step must still be much shorter than the leader's lease.
MOST_PER_STEP = 64
#: Beyond so many outcomes that wait, or so full a Redis, nothing more is sent: what is under way must land first.
_MAX_BACKLOG, _MAX_MEMORY = 1000, 0.7
#: After Redis was emptied a worker's first new beats say what it still holds.
_HEAR_AGAIN_S = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What Postgres says at the beginning of a step, read in one transaction."""

    held: list[Held]
    demand: list[Demand]
    refusals: list[Refusal]
    rates: Rates
    #: Workers that an operator drained: they get no more work.
    drained: frozenset[str]
    #: Identity of Redis as a leader last dealt with it.
    transport: str


@dataclass
class Dispatcher:
    """One dispatcher process. ``step`` is the whole of it."""

    database: Database
    transport: SchedulerTransport
    settings: Settings
    me: str = field(default_factory=lambda: f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}")
    epoch: int | None = None

    def __post_init__(self) -> None:
        self._watch = Watch(self.settings.dead_s)
        self._payloads = _Payloads(self.database)
        self._renew_at = 0.0
        #: When leases of live workers that did not survive an emptied Redis are given up; None: it was not emptied.
        self._hear_again_at: float | None = None
        self._chores_at = 0.0
        self._sweep_at = 0.0
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
        facts = self._read()
        if self._rescue(epoch, live, facts, now):
            facts = self._read()
        self._note_strangers(live)
        sent = self._send(epoch, self._decide(usable(live, facts.drained), facts))
        self._tell(epoch, live, facts)
        if now >= self._chores_at:
            self._chores_at = now + _CHORES_S
            self._chores(epoch, live, facts)
        if now >= self._sweep_at:
            # A slice a step: a job of millions of rows goes while all others are served.
            self._sweep_at = now if self._sweep(epoch) else now + _SWEEP_S
        return sent

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
        self.epoch = lead(self.database, self.me, led, self.settings.leader_lease_s)
        self._renew_at = now + self.settings.leader_lease_s / 5
        if self.epoch is not None and self.epoch != led:
            self._begin_to_lead(self.epoch)
        return self.epoch is not None

    def _begin_to_lead(self, epoch: int) -> None:
        log.info("leading", extra={"epoch": epoch})
        self._watch = Watch(self.settings.dead_s)
        self._controls.clear()
        # We have heard no beat yet, so nobody is late by our clock.
        leases.extend_all(self.database, epoch, self.settings.lease_s)

    def _read(self) -> Facts:
        with self.database.transaction() as connection:
            return Facts(
                held=leases.held(connection),
                demand=leases.demand(connection),
                refusals=leases.refusals(connection),
                rates=leases.rates(connection),
                drained=drains.drained(connection),
                transport=transport_seen(connection),
            )

    # -- rescue --------------------------------------------------------------------------------

    def _rescue(self, epoch: int, live: Mapping[str, Beat], facts: Facts, now: float) -> bool:
        """Extend the leases of attempts that are seen alive; close those that are gone, and return their rows."""
        seen, waiting = self._seen_alive(facts.held, live)
        seen -= waiting
        late = [h.key for h in facts.held if h.key in seen and h.left_s < self.settings.lease_s / 2]
        if late:
            leases.extend(self.database, epoch, late, self.settings.lease_s)
        wiped = self._was_emptied(epoch, facts, now)
        gone = [
            h
            for h in facts.held
            if h.key not in seen
            and (h.expired or h.key in waiting or _another_boot(h, live) or (wiped and h.worker in live))
        ]
        return bool(gone) and self._close(epoch, gone, live)

    def _was_emptied(self, epoch: int, facts: Facts, now: float) -> bool:
        """True once for each time that Redis was restarted or emptied, when live workers have beaten again."""
        identity = self.transport.identity()
        if identity != facts.transport:
            log.warning("redis is new, was restarted or emptied")
            leases.record_transport(self.database, epoch, identity)
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
        by_subtask = {h.subtask: h for h in gone}
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

    def _decide(self, beats: Mapping[str, Beat], facts: Facts) -> list[Cut]:
        """Facts in, sub-tasks out; nothing is changed yet."""
        if not beats or not facts.demand or self._congested():
            return []
        refused = {
            name: frozenset(r.model_id for r in facts.refusals if r.worker == name and r.boot == beat.boot)
            for name, beat in beats.items()
        }
        placements = place(
            facts.demand,
            _workers(beats, facts.held),
            facts.rates,
            refused,
            subtask_s=self.settings.subtask_s,
            depth=self.settings.depth,
        )
        frontiers: dict[tuple[str, int], Frontier] = {}
        cuts: list[Cut] = []
        with self.database.transaction() as connection:
            for p in islice(placements, MOST_PER_STEP):
                where = (p.demand.job, p.demand.pass_number)
                if where not in frontiers:
                    frontiers[where] = leases.frontier(connection, *where)
                carved = carve(frontiers[where], p.budget_bytes)
                if carved is not None:
                    cuts.append(_cut(p, carved))
        return cuts

    def _congested(self) -> bool:
        return self.transport.outcome_backlog() > _MAX_BACKLOG or self.transport.memory_share() > _MAX_MEMORY

    def _send(self, epoch: int, cuts: Sequence[Cut]) -> int:
        if not cuts:
            return 0
        began = time.time()
        # Rows before messages: a crash in between leaves a lease to rescue, never a message without a row.
        leased = leases.lease(self.database, epoch, cuts, self.settings.lease_s)
        by_worker: dict[str, list[Assignment]] = {}
        for item in leased:
            assignment = self._payloads.assignment(item)
            if assignment is not None:
                by_worker.setdefault(item.worker, []).append(assignment)
        for name, assignments in by_worker.items():
            self.transport.publish(name, assignments)
        for item in leased:
            _trace_sent(item, began)
        return len(leased)

    # -- control and chores --------------------------------------------------------------------

    def _tell(self, epoch: int, live: Mapping[str, Beat], facts: Facts) -> None:
        """Tell each worker which of its attempts have no lease any more, and whether it is to drain."""
        leased = {h.key for h in facts.held}
        words: dict[str, Control] = {}
        changed: dict[str, Control] = {}
        for name, beat in live.items():
            drop = drops(beat, leased)
            if beat.state == "draining":
                # What was taken back from its queue still lies there: it must not run it when it works again.
                drop = tuple(sorted({*drop, *(self.transport.queued(name) - leased)}))
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

    def _chores(self, epoch: int, live: Mapping[str, Beat], facts: Facts) -> None:
        with self.database.transaction() as connection:
            fence(connection, epoch)
            ending = leases.overdue(connection, UPLOAD_SILENT_S) | hopeless(
                facts.demand, facts.refusals, live
            )
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


def _cut(p: Placement, carved: Carved) -> Cut:
    return Cut(
        job=p.demand.job,
        pass_number=p.demand.pass_number,
        worker=p.worker.name,
        boot=p.worker.boot,
        device=p.worker.device_name,
        predicted_s=carved.bytes * p.seconds_per_byte,
        carved=carved,
    )


def _workers(beats: Mapping[str, Beat], held: Sequence[Held]) -> list[Worker]:
    """Beats and live leases as what the placement policy sees."""
    theirs: dict[str, list[Held]] = {name: [] for name in beats}
    for h in held:
        theirs.get(h.worker, []).append(h)
    return [
        Worker(
            name=name,
            boot=b.boot,
            device_kind=b.device_kind,
            device_name=b.device_name,
            engines=b.engines,
            resident=b.resident,
            leases=len(theirs[name]),
            leased_s=sum(h.predicted_s for h in theirs[name]),
            exclusive=any(h.exclusive for h in theirs[name]),
        )
        for name, b in beats.items()
    ]


@dataclass
class _Payloads:
    """Builds assignments; keeps the blocks and passes it decoded lately."""

    database: Database

    def __post_init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], tuple[dict[str, list[str]], Sequence[int], int]] = (
            OrderedDict()
        )
        self._passes: OrderedDict[tuple[str, int], _Pass] = OrderedDict()

    def assignment(self, leased: Leased) -> Assignment | None:
        """The message of a leased sub-task; None where its job was removed meanwhile."""
        p = self._pass(leased.job, leased.pass_number)
        if p is None:
            return None
        texts: list[str] = []
        blocks = self._texts(leased.job, sorted({r.block for r in leased.carved.ranges}))
        for r in leased.carved.ranges:
            if r.block not in blocks:
                return None
            columns, order = blocks[r.block]
            texts += (
                render(p.input, {f: column[order[i]] for f, column in columns.items()})
                for i in range(r.lo, r.hi)
            )
        return Assignment(
            subtask=leased.subtask,
            attempt=leased.attempt,
            nonce=leased.nonce,
            job=leased.job,
            tenant=p.tenant,
            pass_kind=p.kind,
            model=p.model,
            numerics=p.numerics,  # type: ignore[arg-type]
            max_tokens=p.max_tokens,
            tasks=tuple(order for number, order in p.tasks if leased.carved.todo >> number & 1),
            texts=tuple(texts),
            exclusive=leased.carved.exclusive,
            interactive=p.priority == INTERACTIVE,
            predicted_s=leased.predicted_s,
        )

    def _pass(self, job: str, number: int) -> _Pass | None:
        known = self._passes.get((job, number))
        if known is not None:
            return known
        with self.database.transaction() as connection:
            found = leases.pass_of(connection, job, number)
        if found is None:
            return None
        row, tasks = found
        known = _Pass(
            kind=row.kind,
            numerics=row.numerics,
            max_tokens=row.max_tokens,
            input=row.input,
            model=Manifest.from_json(row.manifest),
            tenant=str(row.tenant_id),
            priority=row.priority,
            tasks=tuple(
                (t.number, TaskOrder(name=t.name, spec=t.spec, manifest=Manifest.from_json(t.manifest)))
                for t in tasks
            ),
        )
        self._passes[job, number] = known
        while len(self._passes) > 256:
            self._passes.popitem(last=False)
        return known

    def _texts(
        self, job: str, numbers: Sequence[int]
    ) -> dict[int, tuple[dict[str, list[str]], Sequence[int]]]:
        missing = [n for n in numbers if (job, n) not in self._blocks]
        if missing:
            with self.database.transaction() as connection:
                fetched = leases.block_texts(connection, job, missing)
            for number, (payload, order) in fetched.items():
                self._blocks[job, number] = (decode_block(payload), row_order(order), len(payload) * 4)
        found = {}
        for n in numbers:
            if (job, n) in self._blocks:
                self._blocks.move_to_end((job, n))
                found[n] = self._blocks[job, n][:2]
        while sum(size for _, _, size in self._blocks.values()) > _CACHE_BYTES and len(self._blocks) > len(
            numbers
        ):
            self._blocks.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    kind: str
    numerics: str
    max_tokens: int
    input: str
    model: Manifest
    tenant: str
    priority: int
    tasks: tuple[tuple[int, TaskOrder], ...]


@dataclass
class Listener:
    """Waits for NOTIFY on a channel, on a connection of its own; a lost connection is only a slower tick."""

    database: Database
    channel: str = WORK
    _connection: psycopg.Connection[tuple[object, ...]] | None = None

    def wait(self, timeout_s: float) -> None:
        """Return at a notification, or after ``timeout_s``."""
        try:
            if self._connection is None:
                self._connection = psycopg.connect(
                    self.database.libpq_url, autocommit=True, connect_timeout=3
                )
                self._connection.execute(f"LISTEN {self.channel}")
                # What was said before we listened is not repeated: look once without waiting.
                return
            for _ in self._connection.notifies(timeout=timeout_s, stop_after=1):
                pass
        except (psycopg.Error, OSError):
            self.close()
            time.sleep(min(timeout_s, 0.5))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def run(dispatcher: Dispatcher, wake: Listener, stopping: threading.Event) -> None:
    """Step until ``stopping``. Trouble with Postgres or Redis is waited out."""
    tick_s = dispatcher.settings.tick_s
    while not stopping.is_set():
        try:
            if dispatcher.step(time.monotonic()) == MOST_PER_STEP:
                continue  # there may be room for more
        except NotLeading:
            dispatcher.epoch = None
        except (StoreUnavailable, TransportLost) as trouble:
            log.warning("waiting for a service", extra={"trouble": f"{type(trouble).__name__}: {trouble}"})
            stopping.wait(tick_s)
        wake.wait(tick_s)
    wake.close()
    try:
        dispatcher.stop()
    except StoreUnavailable:
        log.warning("could not resign: the lease will run out by itself")
