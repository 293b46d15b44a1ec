"""The executor: one thread that owns the device and keeps rows of several sub-tasks in flight.

A Celery message only brings work here (reference: performance 4.8). Each `step` loads one model, runs one
micro-batch, formed across sub-tasks of the same pass, or takes the rows inside a language model one token further
(workers/flow.py); whoever waits interactively goes first at each step, as long as the lane has not had its share
(workers/lane.py).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from motet.columns import CellError, Column, cut
from motet.logs import event
from motet.manifest import Manifest
from motet.residency import NeverFits, Resident, evictions
from motet.transport import TransportLost, WorkerTransport
from motet.wire import Assignment, Running, TaskOrder
from workers.attempts import Attempts, Key
from workers.batching import (
    LONGEST_STEP_S,
    START_TOKENS,
    Budget,
    Cost,
    fitting,
    limit,
    longest_first,
    overhead_tokens,
)
from workers.blobs import CannotFetch, Refused
from workers.device import Device
from workers.engine import (
    CannotLoad,
    ContinuousEngine,
    DeviceBroken,
    Engine,
    OutOfMemory,
    Pass,
    Prepared,
)
from workers.flow import Flow
from workers.lane import Lane
from workers.pulse import LOADING_SILENCE_S, SILENCE_S
from workers.reporter import Reporter
from workers.work import PassKey, Stage, Work, format_for

log = logging.getLogger(__name__)

#: Bulk is cut short for so long after somebody waited interactively.
INTERACTIVE_S = 10.0
#: Rows of other sub-tasks fill up a micro-batch only where they are nearly as long as its longest.
LIKE_LENGTH = 0.75
#: Deadlines of the watchdog. The first micro-batch of a model may compile, tune and allocate.
RUN_S, FIRST_RUN_S, LOAD_S, PREPARE_S = 8.0, 60.0, 300.0, 120.0
#: The first one of a model whose speed other processes have measured on such a device.
FIRST_MEASURED_S = 10.0
#: While rows inside an engine wait for another machine, they are looked at so often.
LOOK_S = 0.01
#: While Redis is away, evidence for poison is tried again only so often.
MARK_AGAIN_S = 2.0

ModelKey = tuple[str, str]


class Files(Protocol):
    """Where the files of models come from."""

    def fetch(self, model: Manifest) -> None:
        """Bring its files to this host. Slow; any thread. Raises CannotFetch."""
        ...

    def folder(self, model: Manifest) -> AbstractContextManager[Mapping[str, Path]]:
        """Its files by relative path, in a folder that exists inside the context. Raises CannotFetch."""
        ...


class Engines(Protocol):
    """The engines installed here."""

    def find(self, name: str) -> Engine:
        """Raises CannotLoad where there is no such engine."""
        ...


@dataclass(slots=True)
class Loaded:
    """A model in the device's memory."""

    engine: Engine
    handle: Any
    model: Manifest
    memory_mb: int
    used: float
    #: Digests of the heads beside it.
    heads: set[str]
    #: Of an engine whose rows end one by one.
    flow: Flow | None = None
    #: The rows inside wait for another machine: their turn comes again then.
    look_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: rows of one pass, those of one sub-task beside each other."""

    key: PassKey
    rows: tuple[tuple[Work, Prepared], ...]

    @property
    def prepared(self) -> list[Prepared]:
        return [row for _, row in self.rows]

    @property
    def interactive(self) -> bool:
        return self.rows[0][0].interactive

    @property
    def padded_tokens(self) -> int:
        return max(row.length for _, row in self.rows) * len(self.rows)

    def by_work(self) -> Iterator[tuple[Work, int, int]]:
        """Each sub-task with the range of its rows."""
        lo = 0
        for work, group in itertools.groupby((work for work, _ in self.rows), key=lambda w: w):
            hi = lo + sum(1 for _ in group)
            yield work, lo, hi
            lo = hi

    def halves(self) -> tuple[Batch, Batch]:
        middle = len(self.rows) // 2
        return Batch(self.key, self.rows[:middle]), Batch(self.key, self.rows[middle:])


@dataclass(frozen=True, slots=True)
class Activity:
    """What the device does now, and when that becomes suspicious."""

    what: str
    since: float
    limit_s: float


class Executor:
    """Owns the device. ``submit``, ``drop`` and the questions may come from any thread; ``step`` from one."""

    def __init__(
        self,
        *,
        worker: str,
        boot: str,
        device: Device,
        engines: Engines,
        files: Files,
        transport: WorkerTransport,
        attempts: Attempts,
        reporter: Reporter,
        budget_mb: int,
        broken: Callable[[], None],
        spawn: Callable[[Callable[[], None], bool], object],
        pulse: Callable[[int], None] = lambda silence_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``budget_mb``: memory that models may hold. ``broken``: ends the process, for a device that is lost.
        ``spawn``: runs a function away from the device's thread; True: not behind those that came with False.
        ``pulse``: tells the launcher how many seconds this process may be silent from now."""
        self._worker, self._boot, self._device = worker, boot, device
        self._engines, self._files = engines, files
        self._transport, self._attempts, self._reporter = transport, attempts, reporter
        self._budget_mb, self._broken = budget_mb, broken
        self._spawn, self._pulse, self._clock = spawn, pulse, clock

        #: Guards all that follows; notified when there may be something to do.
        self._changed = threading.Condition()
        self._news = 0
        self._stopped = False
        self._arrivals = itertools.count()
        self._works: dict[Key, Work] = {}
        self._loaded: dict[ModelKey, Loaded] = {}
        start = Budget(START_TOKENS[device.kind])
        self._budgets: defaultdict[ModelKey, Budget] = defaultdict(lambda: start)
        self._costs: defaultdict[ModelKey, Cost] = defaultdict(Cost)
        #: The budget before a micro-batch did not fit, and the rows of that one.
        self._roomy: dict[ModelKey, tuple[Budget, frozenset[tuple[Key, int]]]] = {}
        #: Parts of micro-batches that failed for an unknown reason: they run as they are, to find the row.
        self._halves: list[Batch] = []
        self._interactive_at = float("-inf")
        self._lane = Lane()
        self._activity: Activity | None = None
        self._preparing: dict[Work, float] = {}
        #: A suspect runs: nothing may be prepared beside it.
        self._alone = False
        self._marked: Mapping[Key, tuple[int, ...]] | None = None
        self._mark_again_at = float("-inf")
        self._busy_s = 0.0
        self.rows_done = 0

    # -- from any thread

    def submit(self, order: Assignment) -> Work:
        """Take an attempt on. Fetches its models' files first; ``Work.finished`` is set when all is done."""
        work = Work.of(order, format_for(order, self._device.formats), next(self._arrivals))
        with self._changed:
            self._works[order.key] = work
            if order.interactive:
                self._interactive_at = self._clock()
        model = order.model
        try:
            # Importing an engine may take seconds: better here than under the lock.
            self._engines.find(model.engine)
            for model in self._missing(work):
                self._files.fetch(model)
        except (CannotLoad, Refused) as error:
            self._refuse(work, model, error)
            return work
        except CannotFetch as error:
            self._fail(work, "cannot_fetch", str(error))
            return work
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt must not stay held without an end
            self._fail(work, "engine", type(error).__name__)
            return work
        with self._changed:
            work.stage = Stage.STAGED
            admitted = self._admit(work)
            self._wake()
        self._prepare_soon(admitted)
        return work

    def drop(self, keys: Collection[Key]) -> None:
        """Forget attempts for which nobody waits. What runs of them now ends at the micro-batch's end, unreported."""
        with self._changed:
            gone = [self._works.pop(key) for key in keys if key in self._works]
            self._wake()
        for work in gone:
            self._let_go(work)
            event(log, "dropped", subtask=work.order.subtask, attempt=work.order.attempt)

    def stop(self) -> None:
        """End ``run`` at the next micro-batch boundary."""
        with self._changed:
            self._stopped = True
            self._wake()

    def stuck(self) -> str | None:
        """What has gone on for too long, in words for a log; None while all is well."""
        now = self._clock()
        activity, preparing = self._activity, list(self._preparing.values())
        if activity and now - activity.since > activity.limit_s:
            return f"{activity.what} for {now - activity.since:.0f} s, at most {activity.limit_s:.0f}"
        if preparing and now - min(preparing) > PREPARE_S:
            return f"preparing for {now - min(preparing):.0f} s, at most {PREPARE_S:.0f}"
        return None

    def loading(self) -> bool:
        """Whether a model is being loaded now."""
        activity = self._activity
        return activity is not None and activity.what == "loading"

    def backlog_s(self) -> float:
        """Predicted seconds of the work held here and not yet done."""
        with self._changed:
            return sum(self._left_s(work) for work in self._works.values())

    def busy_s(self) -> float:
        """Seconds that the device has worked since the start, up to now."""
        activity = self._activity
        return self._busy_s + (self._clock() - activity.since if activity else 0.0)

    def resident(self) -> tuple[str, ...]:
        """Digests of the models in memory."""
        with self._changed:
            return tuple(sorted({digest for digest, _ in self._loaded}))

    # -- on the device's thread

    def run(self) -> None:
        """Step until stopped; sleep while there is nothing to do."""
        while not self._stopped:
            news = self._news
            if not self.step():
                self._sleep_until_news(news)

    def _sleep_until_news(self, seen: int) -> None:
        with self._changed:
            elsewhere = any(m.flow is not None and m.flow.waits for m in self._loaded.values())
            self._changed.wait_for(lambda: self._stopped or self._news != seen, LOOK_S if elsewhere else None)

    def step(self) -> bool:
        """Load one model, run one micro-batch, or take a flow one step further. False: there is nothing to do now."""
        self._prepare_soon(self._admit_all())
        with self._changed:
            for loaded in self._loaded.values():
                if loaded.flow is not None:
                    loaded.flow.forget(self._holds)
            self._halves = [kept for half in self._halves if (kept := self._still_held(half)).rows]
            able = sorted(filter(self._can_go_on, self._works.values()), key=lambda work: work.arrived)
            waiting: list[Batch | Work] = [*self._halves, *able]
            bulk_waits = not all(one.interactive for one in waiting)
            turn = self._turn(able, lane_open=not bulk_waits or self._lane.open(self._clock()))
        began = self._clock()
        if turn is None:
            self._mark(None)
        elif isinstance(turn, Batch):
            self._run(turn)
        elif self._missing(turn):
            self._load(turn)
        elif turn.stage is Stage.READY:
            self._go_on(turn)
        else:
            self._prepare_alone(turn)
        if turn is not None and turn.interactive and bulk_waits:
            self._lane = self._lane.took(self._clock() - began, self._clock())
        return turn is not None

    def _turn(self, able: Sequence[Work], *, lane_open: bool) -> Batch | Work | None:
        """Whose turn it is: a micro-batch to run, or a work to load a model for, to go on with the flow that it is part
        of, or, a suspect, to prepare.

        Whoever waits interactively, then what is left of failed micro-batches, then the oldest. While the lane is
        closed no interactive work, but for one that a model was just loaded for.
        """
        first = next((w for w in able if w.interactive and (lane_open or w.loaded_for)), None)
        if first is None:
            for i in reversed(range(len(self._halves))):
                if lane_open or not self._halves[i].interactive:
                    return self._halves.pop(i)
            first = next((w for w in able if not w.interactive), None)
        if first is None or first.stage is not Stage.READY or self._flow_of(first) is not None:
            return first
        return self._batch(first)

    def _still_held(self, half: Batch) -> Batch:
        return Batch(half.key, tuple((work, row) for work, row in half.rows if self._holds(work)))

    def _can_go_on(self, work: Work) -> bool:
        """Its rows can run, or its model can be loaded now."""
        if work.stage is Stage.READY:
            flow = self._flow_of(work)
            if flow is None:
                return bool(work.rows)
            look_at = self._loaded[_model(work.key)].look_at
            return (bool(work.rows) or flow.holds(work)) and self._clock() >= look_at
        return work.stage is Stage.STAGED and self._room(work)

    def _batch(self, first: Work) -> Batch:
        """The next micro-batch: the longest rows of ``first``; its last one is filled up with other sub-tasks' rows.

        So sub-tasks end one after the other, and not all at the same time with the device idle behind them.
        """
        if first.interactive:
            self._interactive_at = self._clock()
        budget, cost = self._budgets[_model(first.key)], self._costs[_model(first.key)]
        tokens, max_rows = limit(
            budget,
            cost,
            self._device.kind,
            interactive_waits=self._clock() - self._interactive_at < INTERACTIVE_S,
        )
        longest = first.rows[0].length
        overhead = overhead_tokens(cost, self._device.kind)
        room = fitting(first.rows, tokens=tokens, max_rows=max_rows, overhead_tokens=overhead)
        rows = [(first, row) for row in _take(first, 0, room)]
        room = min(max_rows, tokens // max(1, longest)) - len(rows)
        for work in self._beside(first):
            if room <= 0:
                break
            lo = next((i for i, row in enumerate(work.rows) if row.length <= longest), len(work.rows))
            like = sum(1 for row in work.rows[lo : lo + room] if row.length >= LIKE_LENGTH * longest)
            rows += [(work, row) for row in _take(work, lo, lo + like)]
            room -= like
        return Batch(first.key, tuple(rows))

    def _beside(self, first: Work) -> list[Work]:
        """Other works whose rows may share a micro-batch with it."""
        if first.order.exclusive or first.rows:
            return []
        return [
            w
            for w in self._works.values()
            if w is not first
            and w.stage is Stage.READY
            and w.key == first.key
            and w.interactive == first.interactive
            and not w.order.exclusive
        ]

    def _run(self, batch: Batch) -> None:
        loaded = self._loaded[_model(batch.key)]
        alone = batch.rows[0][0].order.exclusive
        with self._by_itself() if alone else nullcontext():
            began = self._clock()
            self._activity = Activity("running", began, self._limit_s(batch))
            self._mark(batch)
            try:
                answers = self._answers(loaded, batch)
            except OutOfMemory:
                self._shrink(batch)
                return
            except DeviceBroken:
                self._lost_device()
                return
            except Exception as error:  # noqa: BLE001 - a stranger's engine: the row at fault is found below
                self._split(batch, error)
                return
            finally:
                took = self._rest(loaded, began)
        self._learn(batch, took)
        self._give(batch, answers, took)

    def _rest(self, loaded: Loaded, began: float) -> float:
        """The device has done with this model what began then. How many seconds it took."""
        loaded.used = self._clock()
        took = loaded.used - began
        self._busy_s += took
        self._activity = None
        return took

    def _limit_s(self, batch: Batch) -> float:
        """When it has run for so long it hangs."""
        cost = self._costs[_model(batch.key)]
        if cost.known:
            return max(RUN_S, 10 * cost.seconds(batch.padded_tokens))
        works = [(work, [row.row for _, row in batch.rows[lo:hi]]) for work, lo, hi in batch.by_work()]
        if not all(work.order.measured for work, _ in works):
            return FIRST_RUN_S
        return max(FIRST_MEASURED_S, 10 * sum(work.predicted_s(rows) for work, rows in works))

    def _answers(self, loaded: Loaded, batch: Batch) -> Mapping[str, Column]:
        tasks = batch.rows[0][0].tasks
        answers = loaded.engine.run(Pass(loaded.handle, tasks, batch.key.max_tokens), batch.prepared)
        for task in tasks:
            _check(answers[task.name], task, len(batch.rows))
        return answers

    # -- rows that end one by one

    def _flow_of(self, work: Work) -> Flow | None:
        loaded = self._loaded.get(_model(work.key))
        return loaded.flow if loaded is not None else None

    def _go_on(self, first: Work) -> None:
        """Take the rows inside its model one step further, and let in what there is room for."""
        model = _model(first.key)
        loaded, cost = self._loaded[model], self._costs[model]
        flow = loaded.flow
        assert flow is not None
        if first.interactive:
            self._interactive_at = self._clock()
        tokens, _ = limit(
            self._budgets[model],
            cost,
            self._device.kind,
            interactive_waits=self._clock() - self._interactive_at < INTERACTIVE_S,
            longest_s=LONGEST_STEP_S[self._device.kind],
        )
        began = self._clock()
        first_s = FIRST_MEASURED_S if first.order.measured else FIRST_RUN_S
        limit_s = max(RUN_S, 10 * cost.seconds(tokens)) if cost.known else first_s
        self._activity = Activity("running", began, limit_s)
        with self._by_itself() if first.order.exclusive or flow.alone else nullcontext():
            try:
                with self._changed:
                    ready = [w for w in self._works.values() if w.stage is Stage.READY and w.rows]
                    mine = [w for w in ready if _model(w.key) == model]
                flow.let_in(sorted(mine, key=lambda w: (not w.interactive, w.arrived)))
                self._mark_rows(flow.running())
                step, ended = flow.step(tokens)
            except OutOfMemory:
                self._flow_too_large(loaded, flow)
                return
            except DeviceBroken:
                self._lost_device()
                return
            except Exception as error:  # noqa: BLE001 - the row at fault is found by halves
                event(log, "step failed", logging.WARNING, rows=len(flow), error=type(error).__name__)
                for work, row in flow.failed():
                    self._lose_row(work, row, CellError("engine", type(error).__name__))
                return
            finally:
                took = self._rest(loaded, began)
        if step.computed_tokens:
            self._learn_step(model, step.computed_tokens, step.computed_tokens, took)
        elif not ended:
            loaded.look_at = self._clock() + LOOK_S
        for work, row, one in ended:
            for task in work.tasks:
                _check(one.columns[task.name], task, 1)
            work.end(row, one)
            self.rows_done += 1
            self._finish_if_done(work)

    def _flow_too_large(self, loaded: Loaded, flow: Flow) -> None:
        event(log, "out of memory", logging.WARNING, rows=len(flow))
        if self._evict_unused(but=next(key for key, one in self._loaded.items() if one is loaded)):
            return
        for work, row in flow.out_of_memory():
            self._lose_row(
                work, row, CellError("out_of_memory", "one row alone does not fit", retriable=True)
            )

    def _lose_row(self, work: Work, row: Prepared, error: CellError) -> None:
        work.lose(row.row, error)
        self._finish_if_done(work)

    def _learn(self, batch: Batch, took: float) -> None:
        tokens = sum(row.length for _, row in batch.rows)
        self._learn_step(_model(batch.key), batch.padded_tokens, tokens, took)

    def _learn_step(self, model: ModelKey, padded: int, tokens: int, took: float) -> None:
        self._costs[model] = self._costs[model].observed(padded, took)
        before = self._budgets[model]
        self._budgets[model] = before.observed(padded, tokens, took)
        if self._budgets[model].tokens != before.tokens:
            event(log, "budget", model=model[0][:12], format=model[1], tokens=self._budgets[model].tokens)

    def _give(self, batch: Batch, answers: Mapping[str, Column], took: float) -> None:
        longest = max(row.length for _, row in batch.rows)
        for work, lo, hi in batch.by_work():
            rows = [row for _, row in batch.rows[lo:hi]]
            work.give(rows, {ask: cut(column, lo, hi) for ask, column in answers.items()})
            work.charge(rows, longest * len(rows), took * len(rows) / len(batch.rows))
            self.rows_done += len(rows)
            self._finish_if_done(work)

    def _shrink(self, batch: Batch) -> None:
        """There was no room for it: halve, remember, and run its rows again in smaller micro-batches."""
        model = _model(batch.key)
        event(log, "out of memory", logging.WARNING, rows=len(batch.rows), tokens=batch.padded_tokens)
        rows = frozenset((work.order.key, row.row) for work, row in batch.rows)
        before, among = self._roomy.get(model, (None, frozenset()))
        if len(batch.rows) == 1 and not self._evict_unused(but=model):
            if before and rows <= among:
                # It was this row, and not how many ran with it: what fitted before will fit again.
                self._budgets[model] = before
            self._lose(batch, CellError("out_of_memory", "one row alone does not fit", retriable=True))
            return
        if len(batch.rows) > 1:
            if not rows <= among:
                self._roomy[model] = (self._budgets[model], rows)
            self._budgets[model] = self._budgets[model].out_of_memory(batch.padded_tokens)
        with self._changed:
            for work, lo, hi in batch.by_work():
                work.rows = longest_first([row for _, row in batch.rows[lo:hi]] + work.rows)

    def _split(self, batch: Batch, error: Exception) -> None:
        """It failed for a reason nobody knows: run its halves, until the row at fault stands alone."""
        if len(batch.rows) == 1:
            self._lose(batch, CellError("engine", type(error).__name__))
            return
        event(log, "micro-batch failed", logging.WARNING, rows=len(batch.rows), error=type(error).__name__)
        first, second = batch.halves()
        self._halves += [second, first]

    def _lose(self, batch: Batch, error: CellError) -> None:
        for work, row in batch.rows:
            self._lose_row(work, row, error)

    def _finish_if_done(self, work: Work) -> None:
        if work.unanswered == 0 and self._remove(work):
            self._reporter.put(work.order.key, partial(work.outcome, self._worker, self._boot), work.finished)

    def _refuse(self, work: Work, model: Manifest, why: Exception) -> None:
        """This model cannot be loaded here, now or later."""
        self._fail(work, "cannot_load", f"{model.ref}: {why}", refused=model.digest)

    def _fail(self, work: Work, error: str, words: str, *, refused: str = "") -> None:
        """The attempt as a whole cannot be run here."""
        event(
            log,
            "attempt failed",
            logging.WARNING,
            subtask=work.order.subtask,
            attempt=work.order.attempt,
            error=error,
            why=words,
        )
        if self._remove(work):
            outcome = work.failure(self._worker, self._boot, (error, words), refused=refused)
            self._reporter.put(work.order.key, lambda: outcome, work.finished)

    # -- models

    def _load(self, work: Work) -> None:
        """Make the work's model and heads resident. A model that cannot be loaded fails the attempt, not the worker."""
        # Whoever ran last must not be suspected if loading kills the process.
        self._mark(None)
        began = self._clock()
        self._activity = Activity("loading", began, self._longest_load_s(work.order.model))
        self._pulse(LOADING_SILENCE_S)
        model = work.order.model
        missing = self._missing(work)
        try:
            for model in missing:
                self._make_resident(work, model)
        except (CannotLoad, NeverFits, Refused) as error:
            self._refuse(work, model, error)
        except CannotFetch as error:
            self._fail(work, "cannot_fetch", str(error))
        except OutOfMemory:
            if not self._evict_unused(but=_model(work.key)):
                self._fail(work, "out_of_memory", f"{model.ref} does not fit now")
        except DeviceBroken:
            self._lost_device()
        except Exception as error:  # noqa: BLE001 - a stranger's engine
            self._fail(work, "cannot_load", f"{model.ref}: {type(error).__name__}")
        finally:
            took = self._clock() - began
            self._busy_s += took
            self._activity = None
            self._pulse(SILENCE_S)
            if work.order.model in missing:
                # Heads beside a model that is here already take next to nothing: that is no load to learn from.
                work.charge_load(took)

    def _longest_load_s(self, model: Manifest) -> float:
        try:
            return float(getattr(self._engines.find(model.engine), "longest_load_s", LOAD_S))
        except CannotLoad:
            return LOAD_S

    def _make_resident(self, work: Work, model: Manifest) -> None:
        """Load the work's model, or attach one of its heads to it."""
        key = _model(work.key)
        if model == work.order.model:
            engine = self._engines.find(model.engine)
            need_mb = engine.memory_mb(model, work.key.format)
            for victim in self._evictions(need_mb) or ():
                self._unload(victim)
            began = self._clock()
            with self._files.folder(model) as files:
                handle = engine.load(model, files, device=self._device.torch_name, in_format=work.key.format)
            flow = Flow(engine, handle) if isinstance(engine, ContinuousEngine) else None
            with self._changed:
                self._loaded[key] = Loaded(engine, handle, model, need_mb, self._clock(), set(), flow)
            event(log, "loaded", model=model.ref, format=key[1], seconds=round(self._clock() - began, 3))
            return
        loaded = self._loaded[key]
        if model.trunk != work.order.model.trunk:
            raise CannotLoad("it sits on another trunk")
        task = next(t for t in work.heads if t.manifest.digest == model.digest)
        with self._files.folder(model) as files:
            loaded.engine.attach(loaded.handle, task, files)
        loaded.heads.add(model.digest)

    def _missing(self, work: Work) -> list[Manifest]:
        """The models of this work that are not in memory."""
        with self._changed:
            loaded = self._loaded.get(_model(work.key))
            heads = [
                t.manifest for t in work.heads if loaded is None or t.manifest.digest not in loaded.heads
            ]
            return heads if loaded else [work.order.model, *heads]

    def _room(self, work: Work) -> bool:
        """Its model is here, or can be made so now (or never, which loading will find out)."""
        if _model(work.key) in self._loaded:
            return True
        try:
            engine = self._engines.find(work.order.model.engine)
            return self._evictions(engine.memory_mb(work.order.model, work.key.format)) is not None
        except (CannotLoad, NeverFits):
            return True

    def _evictions(self, need_mb: int) -> list[ModelKey] | None:
        residents = [Resident(key, m.memory_mb, m.used) for key, m in self._loaded.items()]
        return evictions(residents, need_mb, self._budget_mb, self._in_use())

    def _in_use(self) -> set[ModelKey]:
        held = [w for w in self._works.values() if w.stage in (Stage.PREPARING, Stage.READY)]
        return {_model(w.key) for w in (*held, *self._preparing)}

    def _evict_unused(self, but: ModelKey) -> bool:
        """Free what memory can be freed; False where there was nothing to free."""
        with self._changed:
            unused = [key for key in self._loaded if key != but and key not in self._in_use()]
        for key in unused:
            self._unload(key)
        return bool(unused)

    def _unload(self, key: ModelKey) -> None:
        with self._changed:
            loaded = self._loaded.pop(key)
        loaded.engine.unload(loaded.handle)
        event(log, "evicted", model=loaded.model.ref, format=key[1])

    def _lost_device(self) -> None:
        event(log, "device broken", logging.ERROR)
        self._broken()

    # -- preparing rows

    def _admit_all(self) -> list[Work]:
        with self._changed:
            return [w for work in list(self._works.values()) for w in self._admit(work)]

    def _admit(self, work: Work) -> list[Work]:
        """Let it in if its model is in memory: from here on the model stays, and its rows may be tokenised.

        Not past an older work that waits for another model: else its room might never become free.
        """
        older = [
            w
            for w in self._works.values()
            if w.stage is Stage.STAGED and w.arrived < work.arrived and _model(w.key) not in self._loaded
        ]
        if work.stage is not Stage.STAGED or work.order.exclusive or self._missing(work):
            return []
        if older and not work.interactive:
            return []
        work.stage = Stage.PREPARING
        return [work]

    def _prepare_soon(self, admitted: Sequence[Work]) -> None:
        for work in admitted:
            self._spawn(partial(self._prepare, work), work.interactive)

    def _prepare(self, work: Work) -> None:
        """Tokenise, on another thread, while the device runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            if not self._holds(work):
                return
            self._preparing[work] = self._clock()
        rows = self._prepared(work)
        with self._changed:
            del self._preparing[work]
            work.prepared(rows)
            self._wake()
        self._finish_if_done(work)

    def _prepare_alone(self, work: Work) -> None:
        """Tokenise a suspect with nothing beside it, and with all its rows as evidence."""
        work.stage = Stage.PREPARING
        with self._by_itself():
            self._activity = Activity("preparing", self._clock(), PREPARE_S)
            self._mark_rows({work.order.key: tuple(range(len(work.order.texts)))})
            rows = self._prepared(work)
            self._activity = None
        with self._changed:
            work.prepared(rows)
        self._finish_if_done(work)

    def _prepared(self, work: Work) -> list[Prepared | CellError]:
        loaded = self._loaded[_model(work.key)]
        order = work.order
        pass_ = Pass(
            loaded.handle,
            work.tasks,
            work.key.max_tokens,
            order.fields,
            order.indices,
            order.tenant,
            f"{order.subtask}.{order.attempt}.{order.nonce}",
        )
        try:
            return _prepare_all(loaded.engine, pass_, work.order.texts)
        except Exception as error:  # noqa: BLE001 - a stranger's engine, or a tokenizer's panic
            event(log, "preparing failed", logging.WARNING, error=type(error).__name__)
            return [_prepare_one(loaded.engine, pass_, row, text) for row, text in enumerate(order.texts)]

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Nothing is prepared meanwhile: a death inside is the fault of what runs inside."""
        with self._changed:
            self._alone = True
            self._changed.wait_for(lambda: not self._preparing)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    # -- small parts

    def _mark(self, batch: Batch | None) -> None:
        if batch is None:
            self._mark_rows(None)
            return
        self._mark_rows(
            {
                work.order.key: tuple(row.row for _, row in batch.rows[lo:hi])
                for work, lo, hi in batch.by_work()
            }
        )

    def _mark_rows(self, rows: Mapping[Key, tuple[int, ...]] | None) -> None:
        """Write down what runs, as evidence for poison. While Redis is away work goes on without it."""
        if rows == self._marked or self._clock() < self._mark_again_at:
            return
        try:
            self._transport.mark_running(None if rows is None else Running(boot=self._boot, rows=rows))
            self._marked = rows
        except TransportLost as error:
            event(log, "what runs could not be written down", logging.WARNING, why=str(error))
            self._mark_again_at = self._clock() + MARK_AGAIN_S

    def _holds(self, work: Work) -> bool:
        return self._works.get(work.order.key) is work

    def _remove(self, work: Work) -> bool:
        """Take it out; False where it was dropped before."""
        with self._changed:
            if not self._holds(work):
                return False
            del self._works[work.order.key]
            self._wake()
            return True

    def _let_go(self, work: Work) -> None:
        self._attempts.release(work.order.key)
        work.finished.set()

    def _left_s(self, work: Work) -> float:
        cost = self._costs[_model(work.key)]
        if work.stage is Stage.READY and cost.known and self._flow_of(work) is None:
            return cost.backlog_s(work.tokens_waiting)
        if work.order.predicted_s:
            return work.order.predicted_s * work.unanswered / max(1, len(work.order.texts))
        return cost.backlog_s(work.usage.text_bytes // 4)

    def _wake(self) -> None:
        self._news += 1
        self._changed.notify_all()


def _model(key: PassKey) -> ModelKey:
    return (key.model, key.format)


def _take(work: Work, lo: int, hi: int) -> list[Prepared]:
    """Remove rows ``lo`` to ``hi`` from those that wait."""
    taken = work.rows[lo:hi]
    del work.rows[lo:hi]
    return taken


def _check(column: Column, task: TaskOrder, rows: int) -> None:
    """Raise ValueError for an answer that an engine should not have given."""
    if column.kind != task.column_kind or len(column) != rows:
        raise ValueError(
            f"{len(column)} answers of kind {column.kind}; expected {rows} of kind {task.column_kind}"
        )
    if column.kind == "vector" and column.dim != task.manifest.dim:
        raise ValueError(f"vectors of {column.dim}; expected {task.manifest.dim}")
    column.check()


def _prepare_all(engine: Engine, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
    try:
        rows = engine.prepare(pass_, texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001
        # A panic in Rust is a BaseException; it is no reason to end.
        raise RuntimeError(type(error).__name__) from None
    if len(rows) != len(texts):
        raise ValueError(f"{len(rows)} rows prepared of {len(texts)}")
    return rows


def _prepare_one(engine: Engine, pass_: Pass, row: int, text: str) -> Prepared | CellError:
    mine = replace(
        pass_,
        fields={name: column[row : row + 1] for name, column in pass_.fields.items()},
        indices=pass_.indices[row : row + 1],
    )
    try:
        (prepared,) = _prepare_all(engine, mine, [text])
    except Exception as error:  # noqa: BLE001 - this row is the one at fault
        return CellError("engine", type(error).__name__)
    return replace(prepared, row=row) if isinstance(prepared, Prepared) else prepared
