"""The executor: one thread that owns the device and keeps rows of several sub-tasks in flight.

A Celery message only brings work here (reference: performance 4.8). Each `step` gives one turn (workers/run/turns.py): it
loads a model (workers/run/shelf.py), or lets rows into a loaded one and takes those inside a step further
(workers/run/stream.py). Whatever an engine raises ends a row or an attempt, never the worker.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

from motet.protocol.columns import CellError
from motet.protocol.logs import event
from motet.protocol.manifest import Manifest
from motet.protocol.transport import WorkerTransport
from motet.protocol.wire import Assignment
from workers.engine import DeviceBroken, OutOfMemory, Prepared
from workers.launch.pulse import LOADING_SILENCE_S, SILENCE_S
from workers.run.attempts import Attempts, Key
from workers.run.device import Device
from workers.run.evidence import Evidence
from workers.run.lane import Lane
from workers.run.media import Media
from workers.run.preparing import Preparing
from workers.run.reporter import Reporter
from workers.run.sayer import Sayer
from workers.run.shelf import Engines, Files, Loaded, Shelf, why_not
from workers.run.stream import FIRST_RUN_S, StepResult, Stream, Suspects, Unsound
from workers.run.turns import next_turn, to_prepare
from workers.run.work import ModelKey, Stage, Work, format_for

log = logging.getLogger(__name__)

#: Bulk is cut short for so long after somebody waited interactively.
INTERACTIVE_S = 10.0
#: Deadlines of the watchdog, beside those of steps (workers/run/stream.py).
LOAD_S, PREPARE_S = 300.0, 120.0
#: While rows inside an engine wait for another machine, they are looked at so often: those that somebody waits for, and
#: others. Longer: an answer lies there, or a place that it left. Shorter: looking takes CPU from a server on the same cores,
#: for 144 rows 2 % of one at 0.01.
LOOK_S, LOOK_AT_BULK_S = 0.01, 0.1
#: An attempt at one of these stages keeps its model in memory.
IN_USE = (Stage.PREPARING, Stage.READY)


class Occupation(NamedTuple):
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
        lane_share: float,
        broken: Callable[[], None],
        spawn: Callable[[Callable[[], None], bool], object],
        sayer: Sayer,
        media: Media,
        pulse: Callable[[int], None] = lambda silence_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``budget_mb``: memory of one GPU that models may hold. ``lane_share``: of the device, see lane.py.
        ``broken``: ends the process, for a device that is lost. ``spawn``: runs a function away from the device's
        thread; True: not behind those that came with False. ``sayer``: tells text as it is written. ``media``:
        fetches pictures. ``pulse``: tells the launcher how many seconds this process may be silent from now.
        """
        self._worker, self._boot, self._device = worker, boot, device
        self._engines, self._files, self._attempts, self._reporter = engines, files, attempts, reporter
        self._broken, self._sayer, self._media, self._pulse, self._clock = broken, sayer, media, pulse, clock

        #: Guards the attempts and the shelf; notified when there may be something to do.
        self._changed = threading.Condition()
        self._news, self._stopped = 0, False
        self._arrivals = itertools.count()
        #: In the order of their arrival.
        self._works: dict[Key, Work] = {}
        self._shelf = Shelf(
            device, engines, files, budget_mb, self._changed, self._in_use, self._heads_in_use, clock
        )
        self._preparing = Preparing(
            self._changed, spawn, self._stream_for, self._ready, self._lost_device, clock
        )
        self._evidence = Evidence(transport, boot, clock)
        self._interactive_at, self._lane = float("-inf"), Lane(lane_share)
        self._activity: Occupation | None = None
        self._busy_s, self.rows_done = 0.0, 0

    # -- from any thread

    def submit(self, order: Assignment) -> Work:
        """Take an attempt on. Fetches its models' files and its rows' media first; ``Work.finished`` is set when all is done."""
        work = Work.of(order, format_for(order, self._device.formats), next(self._arrivals))
        with self._changed:
            self._works[order.key] = work
            if order.interactive:
                self._interactive_at = self._clock()
        model = order.model
        try:
            # Importing an engine may take seconds: better here than under the lock.
            self._engines.find(model.engine)
            for model in self._shelf.missing(work):
                self._files.fetch(model)
            work.media = self._media.of(order, lambda: self._holds(work))
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt must not stay held without an end
            self._fail(work, *why_not(model, error))
            return work
        with self._changed:
            work.stage = Stage.STAGED
            self._wake()
        self._prepare_next()
        return work

    def drop(self, keys: Collection[Key]) -> None:
        """Forget attempts for which nobody waits. What runs of them now ends at the step's end, unreported."""
        with self._changed:
            gone = [self._works.pop(key) for key in keys if key in self._works]
            self._wake()
        for work in gone:
            self._sayer.forget(work.order)
            self._attempts.release(work.order.key)
            work.finished.set()
            event(log, "dropped", **work.ids)

    def stop(self) -> None:
        """End ``run`` at the next step."""
        with self._changed:
            self._stopped = True
            self._wake()

    def stuck(self) -> str | None:
        """What has gone on for too long, in words for a log; None while all is well."""
        known = [("preparing", self._preparing.longest_s(), PREPARE_S)]
        known += [("no progress", one.idle_s, one.most_idle_s) for one in list(self._shelf.loaded.values())]
        if activity := self._activity:
            known.append((activity.what, self._clock() - activity.since, activity.limit_s))
        return next(
            (f"{what} for {s:.0f} s, at most {most:.0f}" for what, s, most in known if s > most), None
        )

    def loading(self) -> bool:
        """Whether a model is being loaded now."""
        return (activity := self._activity) is not None and activity.what == "loading"

    def waited_for(self) -> bool:
        """Whether it holds what somebody waits for, who may go away. Any thread may ask."""
        with self._changed:
            return any(work.interactive for work in self._works.values())

    def backlog_s(self) -> float:
        """Predicted seconds of the work held here and not yet done."""
        with self._changed:
            return sum(self._shelf.left_s(work) for work in self._works.values())

    def busy_s(self) -> float:
        """Seconds that the device has worked since the start, up to now."""
        activity = self._activity
        return self._busy_s + (self._clock() - activity.since if activity else 0.0)

    def resident(self) -> tuple[str, ...]:
        """Digests of the models in memory."""
        with self._changed:
            return tuple(sorted({digest for digest, _ in self._shelf.loaded}))

    # -- on the device's thread

    def run(self) -> None:
        """Step until stopped; sleep while there is nothing to do."""
        while not self._stopped:
            seen = self._news
            if not self.step():
                with self._changed:
                    # Rows inside an engine may wait for another machine, which tells nobody here.
                    looks = [one.look_at for one in self._shelf.loaded.values() if one.stream.waits]
                    if not self._stopped and self._news == seen:
                        self._changed.wait(max(LOOK_S, min(looks) - self._clock()) if looks else None)

    def step(self) -> bool:
        """Give one turn: load a model, or take one a step further. False: there is nothing to do now."""
        if self._stopped:
            return False
        try:
            return self._give_turn()
        except DeviceBroken:
            self._lost_device()
            return False

    def _give_turn(self) -> bool:
        self._prepare_next()
        self._forget_dropped()
        now = self._clock()
        with self._changed:
            able = [work for work in self._works.values() if self._can_go_on(work, now)]
            streams = [loaded.stream for loaded in self._shelf.loaded.values() if now >= loaded.look_at]
            again = [group for stream in streams for group in reversed(stream.suspects)]
            bulk_waits = not all(w.interactive for w in able) or not all(group.interactive for group in again)
            turn = next_turn(able, again, lane_open=not bulk_waits or self._lane.open(now))
        if turn is None:
            # Rows that wait inside for another machine stay written down: to change the mark is a round trip.
            if not any(len(one.stream) for one in self._shelf.loaded.values()):
                self._evidence.mark(None)
            return False
        interactive: bool = turn.interactive
        if isinstance(turn, Suspects):
            self._advance(turn.rows[0][0], turn)
        elif turn.stage is Stage.READY:
            self._advance(turn, None)
        elif missing := self._shelf.missing(turn):
            self._load(turn, missing)
        else:
            self._prepare_alone(turn)
        if interactive and bulk_waits:
            self._lane = self._lane.took(self._clock() - now, self._clock())
        return True

    def _can_go_on(self, work: Work, now: float) -> bool:
        """Its rows can run, or its model can be loaded now."""
        if work.stage is Stage.READY:
            loaded = self._shelf.loaded[work.model]
            return now >= loaded.look_at and (bool(work.rows) or loaded.stream.holds(work))
        return work.stage is Stage.STAGED and self._shelf.room(work)

    def _advance(self, first: Work, group: Suspects | None) -> None:
        """Let rows of ``first`` into its model and others that may go along, or a group; then go on with all inside."""
        loaded = self._shelf.loaded[first.model]
        stream, progress = loaded.stream, StepResult()
        if group is None and first.interactive:
            self._interactive_at = self._clock()
        tokens, rows = stream.limit(
            interactive_waits=self._clock() - self._interactive_at < INTERACTIVE_S,
            waited_for=group is None and first.interactive,
        )
        with self._preparing.nothing_beside() if first.exclusive or stream.alone else nullcontext():
            began = stepping = self._clock()
            self._activity = Occupation("running", began, FIRST_RUN_S)
            if loaded.idle_since is not None:
                # Meanwhile a server has worked on the rows inside.
                self._busy_s += began - loaded.used
            if not len(stream):
                loaded.goes_on()
            try:
                if group is None:
                    with self._changed:
                        works = self._works.values()
                        ready = [work for work in works if work.rows and work.model == first.model]
                    lost = stream.let_in(first, ready, tokens, rows)
                else:
                    lost = stream.let_in_again(group)
                if len(stream):
                    self._activity = Occupation("running", began, stream.deadline_s(tokens))
                    self._evidence.mark(stream.running())
                    if not stream.whole:
                        # Rows come in once, and have many steps: what that takes is no part of what a token costs.
                        stepping = self._clock()
                    progress = stream.step(tokens)
            except Unsound as error:
                self._give_up(first.model, error)
                return
            finally:
                loaded.used = self._clock()
                took = loaded.used - began
                self._busy_s += took
                self._activity = None
        for work, row, why in (*lost, *progress.lost):
            work.lose(row.row, why)
            self._finish_if_done(work)
        if progress.waits:
            look_s = LOOK_S if stream.waited_for else LOOK_AT_BULK_S
            loaded.waits(loaded.used + look_s, tokens)
            return
        loaded.goes_on()
        self._take(loaded, progress, took, loaded.used - stepping)

    def _take(self, loaded: Loaded, progress: StepResult, took: float, step_s: float) -> None:
        """Learn from a step, and hand out what it brought. ``took``: seconds of the turn; ``step_s``: of its tokens."""
        if progress.written:
            self._sayer.write(progress.written)
        if progress.computed:
            before = (pace := loaded.stream.pace).budget.tokens
            pace.observed(progress.computed, progress.tokens, step_s)
            if pace.budget.tokens != before:
                event(log, "budget", model=loaded.model.ref, tokens=pace.budget.tokens)
        count = sum(len(rows) for _, rows, _, _ in progress.answered)
        for work, rows, columns, consumed in progress.answered:
            work.take(rows, columns)
            if consumed is None:
                work.charge(rows, progress.computed * len(rows) // count, took * len(rows) / count)
            else:
                work.charge_consumed(rows[0], consumed)
            self.rows_done += len(rows)
            self._finish_if_done(work)

    def _forget_dropped(self) -> None:
        for key, loaded in list(self._shelf.loaded.items()):
            try:
                if loaded.stream.waits:
                    loaded.stream.forget(self._holds)
            except Unsound as error:
                self._give_up(key, error)

    def _give_up(self, key: ModelKey, why: Unsound) -> None:
        """An engine that cannot put rows out is in no known state: its model goes, and its attempts come back."""
        with self._changed:
            held = [w for w in self._works.values() if w.model == key and w.stage in IN_USE]
            for work in held:
                self._fail(work, "engine", f"{work.order.model.ref}: rows cannot be put out: {why}")
            gone = self._shelf.loaded.pop(key)
        self._shelf.unload(gone)

    # -- the end of an attempt

    def _finish_if_done(self, work: Work) -> None:
        if work.unanswered == 0 and self._remove(work):
            self._reporter.put(work.order.key, partial(work.outcome, self._worker, self._boot), work.finished)

    def _fail(self, work: Work, error: str, words: str, refused: str = "") -> None:
        """The attempt as a whole cannot be run here. ``refused``: digest of the model that never can."""
        event(log, "attempt failed", logging.WARNING, **work.ids, error=error, why=words)
        if self._remove(work):
            outcome = work.failure(self._worker, self._boot, (error, words), refused=refused)
            self._reporter.put(work.order.key, lambda: outcome, work.finished)

    # -- models

    def _load(self, work: Work, missing: Sequence[Manifest]) -> None:
        """Make the work's model and heads resident. A model that cannot be loaded fails the attempt, not the worker."""
        # Rows that ran last must not be suspected if loading kills the process.
        self._evidence.mark(None)
        began, model = self._clock(), work.order.model
        self._activity = Occupation("loading", began, self._shelf.longest_load_s(model, LOAD_S))
        self._pulse(LOADING_SILENCE_S)
        try:
            for model in missing:
                if not self._shelf.bring(work, model):
                    return
        except DeviceBroken:
            raise
        except Exception as error:  # noqa: BLE001 - a stranger's engine
            if not isinstance(error, OutOfMemory) or not self._shelf.free(but=work.model):
                self._fail(work, *why_not(model, error))
        finally:
            took = self._clock() - began
            self._busy_s += took
            self._activity = None
            self._pulse(SILENCE_S)
            if work.order.model in missing:
                # Heads beside a model that is here already take next to nothing: that is no load to learn from.
                work.charge_load(took)

    def _in_use(self) -> set[ModelKey]:
        """The models that must stay. Under the lock."""
        return {w.model for w in self._works.values() if w.stage in IN_USE} | self._preparing.models()

    def _heads_in_use(self) -> set[str]:
        """Digests of what must stay beside the models. Under the lock."""
        return {task.manifest.digest for w in self._works.values() if w.stage in IN_USE for task in w.heads}

    def _lost_device(self) -> None:
        event(log, "device broken", logging.ERROR)
        self._stopped = True
        self._broken()

    # -- preparing rows

    def _prepare_next(self) -> None:
        """Let attempts in whose models are in memory: from here on these stay, and the rows may be tokenised."""
        with self._changed:
            staged = [work for work in self._works.values() if work.stage is Stage.STAGED]
            if not staged:
                return
            loaded, missing = self._shelf.loaded, self._shelf.missing
            chosen = list(to_prepare(staged, lambda w: w.model in loaded, lambda w: not missing(w)))
            for work in chosen:
                work.stage = Stage.PREPARING
        self._preparing.soon(chosen)

    def _prepare_alone(self, work: Work) -> None:
        """Tokenise a suspect with nothing beside it, and with all its rows as evidence."""
        work.stage = Stage.PREPARING
        self._activity = Occupation("preparing", self._clock(), PREPARE_S)
        self._evidence.mark({work.order.key: tuple(range(len(work.order.texts)))})
        self._preparing.now(work)
        self._activity = None

    def _stream_for(self, work: Work) -> Stream | None:
        """Where its rows will go; None where nobody waits for them any more. Under the lock."""
        return self._shelf.loaded[work.model].stream if self._holds(work) else None

    def _ready(self, work: Work, rows: Sequence[Prepared | CellError]) -> None:
        with self._changed:
            loaded = self._shelf.loaded.get(work.model)
            work.prepared(rows, streamed=loaded is not None and not loaded.stream.whole)
            if loaded is not None:
                # It may let these in now.
                loaded.look_at = float("-inf")
            self._wake()
        self._finish_if_done(work)

    # -- small parts

    def _holds(self, work: Work) -> bool:
        return self._works.get(work.order.key) is work

    def _remove(self, work: Work) -> bool:
        """Take it out; False where it was dropped before."""
        with self._changed:
            if not self._holds(work):
                return False
            del self._works[work.order.key]
            self._sayer.forget(work.order)
            work.pass_ = None  # its outcome may wait for Redis, and must not keep a model in memory
            self._wake()
            return True

    def _wake(self) -> None:
        self._news += 1
        self._changed.notify_all()
