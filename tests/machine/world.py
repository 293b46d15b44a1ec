"""A whole cluster of which every move is one call with small numbers: what the machine draws, and what a replay repeats.

The deciding and storing code is the real one, over a real Postgres; Redis is ``MemoryTransport``, time is the
stage's clock, and workers are models that do all that workers have been seen to do, and worse.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from sqlalchemy import text

from motet.errors import Problem
from motet.folds import Count, Last, Sum
from motet.protocol.columns import ERROR, CellError, Column
from motet.protocol.settings import Settings
from motet.protocol.transport import TransportLost
from motet.protocol.wire import Assignment, Beat, Outcome, Running, Usage
from motet.tasks import Classify
from scheduler.aggregator import Aggregator
from scheduler.dispatcher import BEAT_STEP_S, Dispatcher
from scheduler.policy.capability import workers as able
from scheduler.policy.placing.rebalancing import Clone, Recall
from scheduler.store import drains, endings, leases, registry
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.leadership import NotLeading
from scheduler.store.words import end, tell
from scheduler.store.words import land as landed
from tests.integration.landing import land
from tests.machine.callers import APIS, LANDING_FAULTS, Asked, Callers
from tests.machine.stage import HEAD, OTHER_TRUNK, TRUNK, Broken, Crash, Stage, TappedTransport
from tests.machine.uploads import UPLOAD_FAULTS, Uploads

Key = tuple[int, int]
#: Rules in the order of a play, each with what it was called with.
Play = Sequence[tuple[str, tuple[int, ...]]]

SETTINGS = Settings(subtask_s=0.25, ahead_s=0.5, depth=3)
_TASKS = {
    "size": Classify("length"),
    "again": Classify("length", scores=False),
    "other": Classify("other-length"),
    # These wait, and the last one twice. Each text begins with its row still.
    "then": Classify("length", input="{text}/{size}"),
    "last": Classify("length", input="{text}+{then}"),
    # It runs on the rows that are short by another, and the last one reads it.
    "some": Classify("length", input="{text}:{text}", when="size == 'short'"),
    "after": Classify("length", input="{text}-{some}"),
}
_CHOICES = (
    ("size",),
    ("size", "again"),
    ("size", "other"),
    ("size", "again", "other"),
    ("size", "then"),
    ("size", "then", "last"),
    ("then", "other", "size", "again"),
    ("size", "some", "after"),
    ("other", "size", "some"),
)
#: What some open jobs fold of their rows, whoever reads it.
FOLDS = {
    "n": Count(key="{who}"),
    "spent": Sum("{amount}", key="{who}"),
    "lately": Last("{text}", key="{who}"),
}
#: Numbers of tasks with which a job is opened so.
_FOLDED = (2, 4, 6)
#: Task -> the one whose answer it reads, and what stands between the row's text and that in its own.
NEEDS = {"then": "size", "last": "then", "after": "some"}
_BETWEEN = {"then": "/", "last": "+", "after": "-"}
#: Task -> the one whose answer its condition reads.
HELD_BY = {"some": "size"}
#: The answer to which it holds.
HELD = "short"
#: What befalls a dispatcher at a transaction of its step; "lost" befalls a call to Redis, "swallowed"
#: the answer to one that was carried out.
DISPATCHER_FAULTS = ("crash after", "crash before", "away after", "away before", "freeze", "lost")
AGGREGATOR_FAULTS = ("crash before", "crash after", "away after", "away before", "lost", "swallowed")
MOST_JOBS = 5
_A_MONTH = text("UPDATE block SET done_at = done_at - interval '30 days' WHERE job_id = :job")
#: Around the beat, the death of a silent worker, the lead's and a lease's end.
PAUSES_S = (0.1, 0.5, 2.0, 4.5, 8.5, 20.0)
#: Seconds after which the rows of some callers are dropped, where no worker has begun them.
DUE_S = 3.0
#: Rounds in which a cluster without faults must end every job.
HEAL_ROUNDS = 150
#: Steps of a storm of words, a tenth of a second each; beat steps in which an audit reads what little there is.
_STORM, _AUDIT_STEPS = 16, 5


def label_of(words: str) -> int:
    """The right answer, by which the oracle goes too."""
    return min(2, len(words) // 10)


def label_for(task: str, words: str) -> int:
    """The right answer of a task about a row's text, where it has one."""
    if task in HELD_BY:
        return label_of(f"{words}:{words}")
    if task not in NEEDS:
        return label_of(words)
    return label_of(f"{words}{_BETWEEN[task]}{HEAD.labels[label_for(NEEDS[task], words)]}")


def row_of(words: str) -> int:
    """Each text begins with its row; in an open job and in an upload, with a number."""
    return int(words[1:4])


def kills(words: str) -> bool:
    return words.endswith("!")


@dataclass
class Job:
    """What was submitted, and what the oracle has seen of it."""

    id: UUID
    rows: list[str | Problem]
    tasks: tuple[str, ...]
    #: Its rows come by asking; those that have landed are read from Postgres at each look.
    asked: bool = False
    #: Its rows come in parts, while those before are run.
    uploaded: bool = False
    deleted: bool = False
    #: Of an open job: first row of each block that has landed, and how many it has.
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: Rows that were deleted from its front, and their cells by ok, error and skipped.
    gone: set[int] = field(default_factory=set)
    past: Counter[str] = field(default_factory=Counter)
    #: Counters and cells as of its end; nothing of them changes afterwards.
    frozen: tuple[Any, ...] | None = None
    #: (row, task) -> its answer, once it has one.
    cells: dict[tuple[int, str], Any] = field(default_factory=dict)
    #: Number in a row's text -> reports that said that the row failed; dying processes in which it ran with nothing beside it, or at all.
    failures: Counter[int] = field(default_factory=Counter)
    died_alone: Counter[int] = field(default_factory=Counter)
    suspects: set[int] = field(default_factory=set)


@dataclass
class Hand:
    """A worker. It does nothing by itself."""

    name: str
    boots: int = 1
    seq: int = 0
    state: str = "ready"
    #: Running, frozen (silent, and goes on later), or gone until somebody starts it.
    life: str = "up"
    holding: dict[Key, Assignment] = field(default_factory=dict)
    #: Attempts that this process ended; it runs none twice.
    ended: set[Key] = field(default_factory=set)
    left: set[Key] = field(default_factory=set)
    #: The micro-batch under way: positions, and the attempts that they are of. A drop does not stop it.
    batch: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    batch_of: dict[Key, Assignment] = field(default_factory=dict)

    @property
    def boot(self) -> str:
        return f"{self.name}-boot-{self.boots}"


class World:
    """One play on the stage."""

    def __init__(self, stage: Stage, check: Callable[[World], None] | None) -> None:
        stage.empty()
        self.stage = stage
        self.now = 100.0
        self.transport = TappedTransport(clock=lambda: self.now)
        self.transport.watch = self._look_at_messages
        self.dispatchers: dict[str, Dispatcher] = {}
        self.aggregators: dict[str, Aggregator] = {}
        self.born = 0
        for role in ("A", "B"):
            self._start_dispatcher(role)
        for role in ("agg0", "agg1"):
            self._start_aggregator(role)
        self.hands = [Hand(f"w{i}") for i in range(3)]
        self.jobs: dict[UUID, Job] = {}
        self.callers = Callers(stage)
        self.uploads = Uploads(stage)
        #: Every attempt that any worker ever took: what may be reported late.
        self.taken: list[tuple[Hand, str, Assignment]] = []
        #: What workers reported of their own attempts since Redis was emptied last: key -> states that may come of it.
        self.reported: dict[Key, set[str]] = {}
        #: What may cost each row one more attempt: faults that lose work, and attempts that fail.
        self.costs = 0
        self.deaths = 0
        #: Sub-tasks that were committed.
        self.known: set[int] = set()
        #: The policy's words for the next step.
        self.words: list[tuple[str, int, int]] = []
        self.log: list[tuple[str, tuple[int, ...]]] = []
        #: What a dispatcher goes by is wrong now, on purpose.
        self.spoiled = False
        self.check = check
        #: What the oracle saw last.
        self.before: Any = None

    # -- playing

    def do(self, rule: str, *numbers: int) -> None:
        """One move, after which every invariant must hold. Raises Broken."""
        self.log.append((rule, numbers))
        getattr(self, f"rule_{rule}")(*numbers)
        self.callers.listen(APIS[len(self.log) % 2])
        self._look()

    def _look(self) -> None:
        self.callers.note_gone()
        for dispatcher in self.dispatchers.values():
            if dispatcher.differences and not self.spoiled:
                raise Broken(f"10: {dispatcher.me} went by {dispatcher.differences} things that were not so")
        if self.check is not None:
            self.check(self)

    def play(self, moves: Play) -> None:
        for rule, numbers in moves:
            self.do(rule, *numbers)
        self.heal()

    @property
    def database(self) -> Database:
        return self.stage.taps["machine"]

    def _advance(self, seconds: float) -> None:
        self.now += seconds
        self.stage.advance(seconds)

    # -- jobs

    def rule_submit(self, rows: int, block_rows: int, tasks: int, special: int, family: int) -> None:
        """A job of 1 to 12 rows. ``special``: which row kills (odd) or came broken (even); jobs of a family share texts."""
        if len(self.jobs) >= MOST_JOBS:
            return
        rows = rows % 12 + 1
        job = UUID(int=len(self.jobs) + 1)
        # Families of their own for most jobs: else the second one reuses all.
        head = "ab"[family % 2] if family < 4 else chr(ord("c") + len(self.jobs))
        texts: list[str | Problem] = [f"{head}{i:03d}{'x' * (i * 7 % 23)}" for i in range(rows)]
        if special < rows:
            if special % 2:
                texts[special] = f"{texts[special]}!"
            else:
                texts[special] = Problem("text", "NUL", "text", "remove it", row=special)
        names = _CHOICES[tasks % len(_CHOICES)]
        # No two are as old as each other: then the order of jobs is that of their submission.
        self._advance(0.01)
        land(self.database, texts, {n: _TASKS[n] for n in names}, block_rows=block_rows % 6 + 2, job_id=job)
        self.jobs[job] = Job(job, texts, names)

    def _some_job(self, i: int) -> Job | None:
        there = [j for j in self.jobs.values() if not j.deleted]
        return there[i % len(there)] if there else None

    def rule_cancel(self, i: int) -> None:
        """Of a job, one time in three; else most jobs would end so."""
        if i % 3 == 0 and (job := self._some_job(i // 3)) is not None:
            with self.database.transaction() as connection:
                endings.cancel_job(connection, registry.tenant_named(connection, "default"), job.id)

    def rule_delete(self, i: int) -> None:
        if i % 3 == 0 and (job := self._some_job(i // 3)) is not None:
            with self.database.transaction() as connection:
                endings.remove_job(connection, registry.tenant_named(connection, "default"), job.id)
            job.deleted = True
            self.callers.forget(job.id)
            self.uploads.jobs.pop(job.id, None)

    # -- uploads

    def rule_upload(self, rows: int, block_rows: int, tasks: int, special: int) -> None:
        """An upload begins: its first part lands."""
        if len(self.jobs) >= MOST_JOBS:
            return
        job, names = UUID(int=len(self.jobs) + 1), _CHOICES[tasks % len(_CHOICES)]
        texts = _part(0, rows, special)
        self._advance(0.01)
        self.uploads.begin(job, texts, {n: _TASKS[n] for n in names}, block_rows % 6 + 2)
        self.jobs[job] = Job(job, texts, names, uploaded=True)

    def rule_part(self, api: int, i: int, rows: int, special: int, same: int, fault: int) -> None:
        """A part lands, of other rows or (``same`` 0) of those of the first one; half of them go wrong at first."""
        if (job := self._some_upload(i)) is None:
            return
        there = self.uploads.jobs[job]
        texts = there.parts[0] if same % 4 == 0 else _part(there.rows, rows, special)
        if self.uploads.more(APIS[api % 2], job, texts, UPLOAD_FAULTS[fault % len(UPLOAD_FAULTS)]):
            self.jobs[job].rows = [*self.jobs[job].rows, *texts]

    def rule_part_again(self, api: int, i: int, number: int) -> None:
        """The answer to a part was lost: it is sent again."""
        if (job := self._some_upload(i)) is not None:
            self.uploads.again(APIS[api % 2], job, number)

    def rule_close_late(self, api: int, i: int, fault: int) -> None:
        """All parts are there: an upload is closed, whatever of it has run by now."""
        if (job := self._some_upload(i)) is not None:
            self.uploads.close(APIS[api % 2], job, UPLOAD_FAULTS[fault % len(UPLOAD_FAULTS)])

    def _some_upload(self, i: int) -> UUID | None:
        there = list(self.uploads.jobs)
        return there[i % len(there)] if there else None

    # -- open jobs

    def rule_open(self, tasks: int) -> None:
        """A job that takes rows until it is closed."""
        if len(self.jobs) >= MOST_JOBS:
            return
        job, names = UUID(int=len(self.jobs) + 1), _CHOICES[tasks % len(_CHOICES)]
        self._advance(0.01)
        folds = FOLDS if tasks % len(_CHOICES) in _FOLDED else None
        land(self.database, [], {n: _TASKS[n] for n in names}, job_id=job, priority=0, folds=folds)
        self.jobs[job] = Job(job, [], names, asked=True)
        self.callers.opened(job, names)

    def rule_ask(self, api: int, i: int, rows: int, special: int) -> None:
        """A caller asks, and lands alone; or one of another caller lands with it."""
        if (job := self._some_open(i)) is not None:
            asks = [self.callers.new(job, rows, special)]
            if rows % 2:
                asks.append(self.callers.new(job, rows))
            self.callers.land(APIS[api % 2], asks)

    def rule_ask_again(self, api: int, i: int, how: int) -> None:
        """A key is used again: for the same rows, beside a new one or alone, or for other rows."""
        if (old := self._some_ask(i)) is None:
            return
        match how % 3:
            case 0:
                asks = [self.callers.again(old)]
            case 1:
                asks = [self.callers.new(old.job, 0), self.callers.again(old)]
            case _:
                asks = [self.callers.other_rows(old)]
        self.callers.land(APIS[api % 2], asks)

    def rule_land_crash(self, api: int, i: int, rows: int, fault: int) -> None:
        """A process of the API dies before or after it commits a landing, or loses Postgres and lands again."""
        if (job := self._some_open(i)) is not None:
            asks = [self.callers.new(job, rows), self.callers.new(job, 0)]
            self.callers.land(APIS[api % 2], asks, LANDING_FAULTS[fault % len(LANDING_FAULTS)])

    def rule_race(self, api: int, i: int, how: int) -> None:
        """Two processes of the API want the lock of a job at once."""
        if (job := self._some_open(i)) is not None:
            self.callers.race(APIS[api % 2], APIS[(api + 1) % 2], job, how)

    def rule_close(self, api: int, i: int, fault: int) -> None:
        """Of an open job, one time in three; half of them go wrong."""
        if i % 3 == 0 and (job := self._some_open(i // 3)) is not None:
            self.callers.close(APIS[api % 2], job, (*LANDING_FAULTS, "", "", "", "")[fault % 8])

    def rule_forget_front(self, i: int) -> None:
        """A month passes for the answered rows of an open job: the next steps of a dispatcher sweep them away."""
        if (job := self._some_open(i)) is None:
            return
        with self.database.transaction() as connection:
            connection.execute(_A_MONTH, {"job": job})
        for dispatcher in self.dispatchers.values():
            dispatcher._sweep_at = 0.0

    def rule_ask_drop(self, api: int, i: int, rows: int) -> None:
        """A caller asks that does not want its answer late, or alone with another such."""
        if (job := self._some_open(i)) is not None:
            asks = [self.callers.new(job, rows, drop=True) for _ in range(1 + rows % 2)]
            self.callers.land(APIS[api % 2], asks, due_s=DUE_S)

    def rule_expire(self, which: int) -> None:
        """Such callers' time is over, and a dispatcher steps."""
        self._advance(DUE_S)
        self._tick("AB"[which % 2])

    def rule_abandon(self, api: int, i: int, fault: int) -> None:
        """Such callers go away; half of the time that goes wrong."""
        asks = [a for a in self.callers.asks if a.drop and a.place is not None]
        if asks:
            asked = asks[-1 - i % len(asks)]
            self.callers.abandon(APIS[api % 2], asked, (*LANDING_FAULTS, "", "", "", "")[fault % 8])

    def _some_open(self, i: int) -> UUID | None:
        """A job that was opened to be asked, whatever became of it."""
        there = [job for job in self.callers.jobs if not self.jobs[job].deleted]
        return there[i % len(there)] if there else None

    def _some_ask(self, i: int) -> Asked | None:
        asks = self.callers.asks
        return asks[-1 - i % len(asks)] if asks else None

    # -- dispatchers

    def _start_dispatcher(self, role: str) -> None:
        self.born += 1
        tap = self.stage.taps[role]
        dispatcher = Dispatcher(tap, self.transport, SETTINGS, me=f"{role}{self.born}")
        tap.me = dispatcher.me
        self.dispatchers[role] = dispatcher

    def rule_tick(self, which: int) -> None:
        """Half a second passes, all workers beat, a dispatcher steps."""
        self._tick("AB"[which % 2])

    def rule_tick_fault(self, which: int, at: int, fault: int) -> None:
        """The same, and a fault befalls the dispatcher at the ``at``-th transaction of its step."""
        self._tick("AB"[which % 2], at, DISPATCHER_FAULTS[fault % len(DISPATCHER_FAULTS)])

    def rule_round(self, who: int) -> None:
        """A round as it should go: a dispatcher steps; of the workers some do all that they have; it is recorded."""
        self._tick("A")
        self._look()
        for w, hand in enumerate(self.hands):
            self._take(hand)
            if who >> w & 1:
                self._do_all(hand)
        self._aggregate("agg0")

    def rule_breathe(self, which: int) -> None:
        """A dispatcher steps in whose time nobody has beaten and nothing passed."""
        self._step("AB"[which % 2])

    def _tick(self, role: str, at: int = 0, fault: str = "") -> None:
        self._advance(0.5)
        self._beat_all()
        self._step(role, at, fault)

    def _step(self, role: str, at: int = 0, fault: str = "") -> None:
        tap, dispatcher = self.stage.taps[role], self.dispatchers[role]
        tap.arm(at, fault)
        if fault == "freeze":
            tap.meanwhile = lambda: self._while_frozen(role)
        if fault == "lost":
            self.transport.fails_in = at
        self._put_words(dispatcher)
        words, looks = self.stage.listeners[role].wait(0.0), self.transport.looks
        lost = None if words.everything else self._lost()
        try:
            dispatcher.step(self.now, words)
            if lost is not None and looks == self.transport.looks and self._lost() - lost:
                raise Broken(f"11: {role} heard nobody, and gave up sub-tasks {self._lost() - lost}")
        except NotLeading:
            dispatcher.epoch = None
        except (StoreUnavailable, TransportLost):
            self.costs += 1
        except Crash:
            self._start_dispatcher(role)
            self.costs += 1
        finally:
            self.transport.fails_in = None
            if dispatcher.epoch is None:
                # A standby does not listen; whoever was replaced does not any more.
                self.stage.listeners[role].close()
            self.costs += tap.struck and fault == "freeze"
            tap.arm()

    def _lost(self) -> set[int]:
        """Sub-tasks that were given up, of jobs that run on."""
        query = "SELECT s.id FROM subtask s JOIN job j ON j.id = s.job_id WHERE s.state = 'lost' AND j.state IN ('open', 'loading', 'running')"
        with self.database.transaction() as connection:
            return set(connection.exec_driver_sql(query).scalars())

    def rule_storm(self, which: int) -> None:
        """Transactions commit ten times a second, and each has something to say."""
        role = "AB"[which % 2]
        self._tick(role)
        began, looks, epoch = self.now, self.transport.looks, self.dispatchers[role].epoch
        for _ in range(_STORM):
            self._advance(0.1)
            self._beat_all()
            with self.database.transaction() as connection:
                tell(connection, [landed(job) for job in self.jobs] or [end(UUID(int=0))])
            self._step(role)
        heard, most = self.transport.looks - looks, (self.now - began) / BEAT_STEP_S
        if epoch is not None and self.dispatchers[role].epoch == epoch and heard < most / 2:
            raise Broken(
                f"12: {role} heard all workers {heard} times in {self.now - began:.1f} s full of words"
            )

    def rule_deafen(self, which: int) -> None:
        """The connection breaks on which a dispatcher listens."""
        self.stage.listeners["AB"[which % 2]].close()

    def rule_audit(self, which: int) -> None:
        """A dispatcher reads everything anew, and finds that it is as it thinks."""
        self._audit("AB"[which % 2])

    def _audit(self, role: str) -> None:
        self.dispatchers[role]._audit._begins_at = self.now
        for _ in range(_AUDIT_STEPS):
            self._tick(role)

    def rule_spoil(self, which: int, i: int) -> None:
        """A dispatcher forgets a live lease, by a fault that nobody thought of: its next audit must say so."""
        role = "AB"[which % 2]
        self._tick(role)
        dispatcher = self.dispatchers[role]
        keys = sorted(dispatcher._book.keys())
        if dispatcher.epoch is None or not keys:
            return
        epoch, key = dispatcher.epoch, keys[i % len(keys)]
        dispatcher._let_go(key, self.now)
        # Its worker is told to drop it.
        self.costs += 1
        self.spoiled, dispatcher._audit._begins_at = True, self.now
        for _ in range(_AUDIT_STEPS):
            self._tick(role)
            if dispatcher.differences or dispatcher.epoch != epoch or key in dispatcher._book:
                break
        with self.database.transaction() as connection:
            leased = leases.fates(connection, [key])[key].leased
        self.spoiled, found, dispatcher.differences = False, dispatcher.differences, 0
        if leased and dispatcher.epoch == epoch and not found:
            raise Broken(f"10: {role} had forgotten lease {key}, and its audit did not say so")

    def _while_frozen(self, role: str) -> None:
        """One dispatcher stands still between two transactions, for longer than any lease; the other one finds out."""
        self.stage.taps[role].arm()
        self.stage.taps[role].struck = True
        self._note_subtasks()
        for _ in range(4):
            self._advance(2.5)
            self._beat_all()
            self._step("B" if role == "A" else "A")

    def _put_words(self, dispatcher: Dispatcher) -> None:
        """The policy may say at any time that something is to be taken back, or doubled: the machine says it here."""
        words, self.words = self.words, []
        placer = dispatcher._placer
        if not words or dispatcher.epoch is None:
            return

        def late(now: float) -> list[Recall | Clone]:
            del placer.late
            said: list[Recall | Clone] = []
            keys = sorted(key for key in placer.flights() if isinstance(key, tuple))
            places = able(
                {name: beat for name, beat in self.transport.newest_beats.items() if beat.state == "ready"},
                (),
                1.0,
            )
            for kind, i, w in words if keys and places else ():
                flight = placer.flight(keys[i % len(keys)])
                assert flight is not None
                if kind == "recall":
                    said.append(Recall(flight))
                else:
                    said.append(Clone(flight, places[w % len(places)], 0.1))
            return said

        placer.late = late

    def rule_recall(self, i: int) -> None:
        self.words.append(("recall", i, 0))

    def rule_clone(self, i: int, w: int) -> None:
        self.words.append(("clone", i, w))
        self.costs += 1

    def rule_advance(self, i: int) -> None:
        """Time passes in which nobody does anything."""
        self._advance(PAUSES_S[i])

    def _look_at_messages(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        self._note_subtasks()
        for a in (a for some in by_worker.values() for a in some):
            if a.subtask not in self.known:
                raise Broken(f"5: a message of sub-task {a.subtask} is sent, and its lease is not committed")

    def _note_subtasks(self) -> None:
        with self.database.transaction() as connection:
            self.known |= set(connection.exec_driver_sql("SELECT id FROM subtask").scalars())

    # -- aggregators

    def _start_aggregator(self, role: str) -> None:
        self.born += 1
        self.aggregators[role] = Aggregator(
            self.stage.taps[role], self.transport, SETTINGS, me=f"{role}-{self.born}"
        )

    def rule_aggregate(self, which: int) -> None:
        self._aggregate(f"agg{which % 2}")

    def rule_aggregate_fault(self, which: int, fault: int) -> None:
        """An aggregator's commit or acknowledgement goes wrong. That may cost nobody an attempt."""
        self._aggregate(f"agg{which % 2}", AGGREGATOR_FAULTS[fault % len(AGGREGATOR_FAULTS)])

    def _aggregate(self, role: str, fault: str = "") -> None:
        tap = self.stage.taps[role]
        tap.arm(0, fault)
        if fault == "lost":
            self.transport.fails_in = 1
        self.transport.swallows = fault == "swallowed"
        try:
            self.aggregators[role].step(0.0)
        except (StoreUnavailable, TransportLost):
            pass
        except Crash:
            self._start_aggregator(role)
        finally:
            self.transport.fails_in, self.transport.swallows = None, False
            tap.arm()

    # -- workers

    def _hand(self, w: int) -> Hand:
        return self.hands[w % len(self.hands)]

    def _beat_all(self) -> None:
        for hand in self.hands:
            if hand.life == "up":
                self._beat(hand)

    def _beat(self, hand: Hand) -> None:
        hand.seq += 1
        control = self.transport.worker(hand.name).beat(self._word_of(hand))
        if hand.state == "starting":
            hand.state = "ready"
        if control is None:
            return
        for key in control.drop:
            hand.holding.pop(key, None)
        hand.state = "draining" if control.drain else "ready"

    def _word_of(self, hand: Hand) -> Beat:
        return Beat(
            worker=hand.name,
            boot=hand.boot,
            seq=hand.seq,
            state=hand.state,
            engines=("encoder",),
            device_name="hand",
            resident=(TRUNK.digest, OTHER_TRUNK.digest),
            held=tuple(hand.holding),
            left=tuple(sorted(hand.left)),
        )

    def rule_take(self, w: int) -> None:
        """A worker takes all messages that wait for it."""
        self._take(self._hand(w))

    def _take(self, hand: Hand) -> None:
        side = self.transport.worker(hand.name)
        while hand.life == "up" and hand.state == "ready" and (key := side.take()) is not None:
            if key in hand.holding or key in hand.ended:
                continue
            raw = side.fetch(*key)
            if raw is None:
                hand.left.add(key)
                continue
            hand.holding[key] = Assignment.decode(raw)
            self.taken.append((hand, hand.boot, hand.holding[key]))

    def rule_work(self, w: int) -> None:
        """A worker takes what waits for it and does all of it, in order."""
        hand = self._hand(w)
        self._take(hand)
        self._do_all(hand)

    def _do_all(self, hand: Hand) -> None:
        for a in list(hand.holding.values()):
            if hand.life != "up" or a.key not in hand.holding:
                return
            self._begin(hand, [(a, tuple(range(len(a.texts))))])
            if a.key in hand.holding:
                self._finish(hand, a, 0)

    def rule_begin(self, w: int, i: int, lo: int, n: int, beside: int) -> None:
        """A micro-batch begins: some rows of an attempt, and all rows of the next one if ``beside`` is odd."""
        hand = self._hand(w)
        held = list(hand.holding.values())
        if not held or hand.life != "up":
            return
        a = held[i % len(held)]
        lo %= len(a.texts)
        batch = [(a, tuple(range(lo, min(len(a.texts), lo + 1 + n % 4))))]
        b = held[(i + 1) % len(held)]
        if beside % 2 and a is not b and not a.exclusive and not b.exclusive:
            batch.append((b, tuple(range(len(b.texts)))))
        self._begin(hand, batch)

    def _begin(self, hand: Hand, batch: Sequence[tuple[Assignment, tuple[int, ...]]]) -> None:
        hand.batch = {a.key: rows for a, rows in batch}
        hand.batch_of = {a.key: a for a, _ in batch}
        self._mark(hand)
        if any(kills(a.texts[p]) for a, rows in batch for p in rows):
            self._die(hand, told=True)

    def _mark(self, hand: Hand) -> None:
        side = self.transport.worker(hand.name)
        side.mark_running(Running(boot=hand.boot, rows=dict(hand.batch)) if hand.batch else None)

    def rule_finish(self, w: int, i: int, how: int) -> None:
        """A worker reports an attempt: right (0 to 3), twice, failed, for no fault of its rows, flaky, or in a wrong form."""
        hand = self._hand(w)
        held = list(hand.holding.values())
        if not held or hand.life != "up":
            return
        a = held[i % len(held)]
        if any(map(kills, a.texts)):
            self._begin(hand, [(a, tuple(range(len(a.texts))))])
        else:
            self._finish(hand, a, how)

    def _finish(self, hand: Hand, a: Assignment, how: int) -> None:
        self._report(hand, hand.boot, a, how)
        hand.holding.pop(a.key, None)
        hand.ended.add(a.key)
        if hand.batch.pop(a.key, None) is not None:
            self._mark(hand)

    def _report(self, hand: Hand, boot: str, a: Assignment, how: int) -> None:
        outcome = Outcome(
            subtask=a.subtask,
            attempt=a.attempt,
            nonce=a.nonce,
            worker=hand.name,
            boot=boot,
            verdict="done",
            columns={t.name: _answers(a.texts) for t in a.tasks},
            usage=Usage(tokens=len(a.texts), computed_tokens=len(a.texts), busy_s=0.001, micro_batches=1),
        )
        blamed: Sequence[str] = ()
        match how % 9:
            case 5:
                outcome, blamed = _failed(outcome, "engine"), a.texts
            case 6:
                outcome = _failed(outcome, "cannot_fetch")
            case 7:
                outcome, blamed = _flaky(outcome), a.texts[:1]
            case 8:
                outcome, blamed = replace(outcome, columns={}), a.texts
        job = self.jobs[UUID(a.job)]
        for words in blamed:
            job.failures[row_of(words)] += 1
        self.costs += how % 9 > 4
        for _ in range(2 if how % 9 == 4 else 1):
            self._send(hand, outcome)
        self.reported.setdefault(a.key, set()).add("failed" if how % 9 in (5, 6, 8) else "done")

    def _send(self, hand: Hand, outcome: Outcome) -> None:
        self.transport.worker(hand.name).report(outcome.subtask, outcome.attempt, outcome.encode())

    def rule_late(self, i: int, how: int) -> None:
        """A report of any attempt that was ever taken comes in: a process that froze, or a slow network."""
        told = [t for t in self.taken if not any(map(kills, t[2].texts))]
        if told:
            hand, boot, a = told[-1 - i % len(told)]
            self._report(hand, boot, a, how)

    def rule_forge(self, i: int, how: int) -> None:
        """A wrong answer comes in that nobody has the right to give."""
        if not self.taken:
            return
        hand, boot, a = self.taken[-1 - i % len(self.taken)]
        forged = Outcome(
            subtask=a.subtask,
            attempt=a.attempt,
            nonce="guessed",
            worker=hand.name,
            boot=boot,
            verdict="done",
            columns={t.name: _answers(a.texts, 1) for t in a.tasks},
        )
        _, _, other = self.taken[i % len(self.taken)]
        match how % 5:
            case 0:
                pass
            case 1:
                forged = replace(forged, nonce=a.nonce, attempt=a.attempt + 1)
            case 2:
                forged = replace(forged, subtask=other.subtask, attempt=other.attempt, nonce=a.nonce)
                if other.nonce == a.nonce:
                    return
            case 3:
                forged = _failed(forged, "engine")
            case _:
                self.transport.worker(hand.name).report(a.subtask, a.attempt, b"garbage")
                return
        self._send(hand, forged)

    def rule_die(self, w: int, told: int, evidence: int) -> None:
        """A process is killed. Its launcher says so at once, or its host is gone with it; evidence may be lost."""
        hand = self._hand(w)
        if hand.life == "gone":
            return
        if evidence % 4 == 3:
            self.transport.worker(hand.name).mark_running(None)
        self._die(hand, told=bool(told % 3))

    def _die(self, hand: Hand, told: bool) -> None:
        self.deaths += 1
        self.costs += 1
        self._remember_batch(hand)
        hand.life = "gone"
        if told:
            self._restart(hand)

    def _remember_batch(self, hand: Hand) -> None:
        """Who ran in a process that is about to end, and whether alone: nobody else may be blamed for it."""
        ran = [
            (self.jobs[UUID(hand.batch_of[key].job)], row_of(hand.batch_of[key].texts[p]))
            for key, rows in hand.batch.items()
            for p in rows
        ]
        for job, row in ran:
            job.suspects.add(row)
            if len(ran) == 1:
                job.died_alone[row] += 1

    def _restart(self, hand: Hand) -> None:
        hand.boots += 1
        hand.life, hand.state, hand.seq = "up", "starting", 0
        for kept in (hand.holding, hand.batch, hand.ended, hand.left):
            kept.clear()
        self.transport.worker(hand.name).beat(self._word_of(hand))

    def rule_start(self, w: int) -> None:
        """A host comes back."""
        if self._hand(w).life == "gone":
            self._restart(self._hand(w))

    def rule_freeze(self, w: int) -> None:
        if self._hand(w).life == "up":
            self._hand(w).life = "frozen"
            self.costs += 1

    def rule_thaw(self, w: int) -> None:
        if self._hand(w).life == "frozen":
            self._hand(w).life = "up"

    def rule_drain(self, w: int, on: int) -> None:
        name = self._hand(w).name
        with self.database.transaction() as connection:
            if on % 2:
                drains.drain(connection, {name: ""}, "somebody")
            else:
                drains.resume(connection, [name])
        # What waited there is done elsewhere.
        self.costs += on % 2

    # -- Redis

    def rule_drop_message(self, w: int, i: int) -> None:
        queue = self.transport.queues.get(self._hand(w).name)
        if queue:
            queue.pop(i % len(queue))
            self.costs += 1

    def rule_drop_payload(self, w: int) -> None:
        mine = [key for key in self.transport.payloads if key[0] == self._hand(w).name]
        if mine:
            del self.transport.payloads[mine[-1]]
            self.costs += 1

    def rule_double_message(self, w: int, i: int) -> None:
        queue = self.transport.queues.get(self._hand(w).name)
        if queue:
            queue.append(queue[i % len(queue)])

    def rule_reorder(self, w: int) -> None:
        """A queue and the stream are turned round."""
        queue = self.transport.queues.get(self._hand(w).name)
        if queue:
            queue.reverse()
        self.transport.entries = dict(reversed(self.transport.entries.items()))

    def rule_double_entry(self, i: int) -> None:
        entries = list(self.transport.entries.values())
        if entries:
            (subtask, attempt), body = entries[i % len(entries)]
            # As an entry of its own: not as a report, which would drop a payload.
            self.transport._next += 1
            name = f"{self.transport._next}-0"
            self.transport.entries[name] = ((subtask, attempt), body)
            self.transport.reported_at[name] = self.now

    def rule_wipe(self, luck: int) -> None:
        """Redis is emptied, or starts again with nothing: one time in four."""
        if luck % 4 != 3:
            return
        self.transport.empty()
        self.reported.clear()
        self.costs += 1

    # -- the end

    def heal(self) -> None:
        """No more faults: within some rounds every job ends, each row has its answer, and an audit finds nothing."""
        self.words.clear()
        for role in ("A", "B"):
            self._audit(role)
            self._look()
        for hand in self.hands:
            if hand.life == "gone":
                self._restart(hand)
            hand.life = "up"
        with self.database.transaction() as connection:
            drains.resume(connection, [hand.name for hand in self.hands])
        for asked in [a for a in self.callers.asks if a.place is None and not a.refused]:
            self.callers.land("api0", [asked])
        self._go_on()
        for job in list(self.callers.jobs):
            self.callers.close("api1", job)
        for job in list(self.uploads.jobs):
            self.uploads.close("api1", job)
        self._go_on()
        self.callers.listen("api0")
        self._look()

    def _go_on(self) -> None:
        """Until every job has ended, or takes rows still and all that have come are answered."""
        for _ in range(HEAL_ROUNDS):
            if self._over():
                break
            self._advance(1.0)
            self._beat_all()
            self._step("A")
            self._step("B")
            self._look()
            for hand in self.hands:
                self._take(hand)
                self._do_all(hand)
            self._aggregate("agg0")
            self._aggregate("agg1")
            self.callers.listen("api0")
            self._look()

    def _over(self) -> bool:
        with self.database.transaction() as connection:
            waiting = connection.exec_driver_sql(
                "SELECT count(*) FROM job"
                " WHERE state = 'running' OR state IN ('open', 'loading') AND blocks_done < n_blocks"
            ).scalar_one()
        return not waiting and not self.transport.entries


def _part(first: int, rows: int, special: int) -> list[str | Problem]:
    """1 to 6 rows with the numbers from ``first`` on, of which one kills or came broken, as in ``rule_submit``."""
    texts: list[str | Problem] = [f"u{i:03d}{'x' * (i * 7 % 23)}" for i in range(first, first + rows % 6 + 1)]
    if special < len(texts):
        texts[special] = (
            f"{texts[special]}!" if special % 2 else Problem("text", "NUL", "text", "remove it", row=special)
        )
    return texts


def _answers(texts: Sequence[str], beside: int = 0) -> Column:
    """``beside`` what is right."""
    n = len(texts)
    codes = [(label_of(words) + beside) % 3 for words in texts]
    return Column(
        kind="label",
        status=bytes(n),
        arrays={"codes": struct.pack(f"<{n}h", *codes), "scores": struct.pack(f"<{n}f", *([0.5] * n))},
    )


def _failed(outcome: Outcome, error: str) -> Outcome:
    return replace(outcome, verdict="failed", columns={}, error=(error, "it broke"))


def _flaky(outcome: Outcome) -> Outcome:
    """The first row met trouble that passes."""
    return replace(
        outcome,
        columns={
            name: replace(
                c,
                status=bytes([ERROR]) + c.status[1:],
                errors={0: CellError("engine", "the device hiccuped", retriable=True)},
            )
            for name, c in outcome.columns.items()
        },
    )
