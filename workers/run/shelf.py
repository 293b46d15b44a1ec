"""The models in the device's memory: loaded, given heads, and pushed out by others when nobody uses them.

Who uses a model and which one gives way are decided under one lock, and a model that gives way is taken out in the same
breath: no attempt can be let in to a model that is about to go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Protocol

from motet.protocol.logs import event
from motet.protocol.manifest import Manifest
from motet.protocol.residency import NeverFits, Resident, evictions
from workers.engine import (
    BatchEngine,
    CannotLoad,
    Detaching,
    DeviceBroken,
    Elastic,
    Engine,
    OutOfMemory,
    spreads,
)
from workers.run.batch_adapter import BatchAdapter
from workers.run.batching import START_TOKENS, Budget, Pace
from workers.run.blobs import CannotFetch, FileRefused
from workers.run.device import Device
from workers.run.stream import Stream
from workers.run.work import ModelKey, Stage, Work

log = logging.getLogger(__name__)

#: Artefacts beside one function that no attempt uses and that stay all the same. Refitting makes a new one each time, so
#: without a limit a worker's memory would fill; a low one reads files again where jobs with several take turns.
ARTEFACTS_KEPT = 4


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

    def find(self, name: str) -> Engine | BatchEngine:
        """Raises CannotLoad where there is no such engine."""
        ...


@dataclass(slots=True)
class Loaded:
    """A model in the device's memory."""

    model: Manifest
    stream: Stream
    #: Of a group of GPUs, what it takes of the first one.
    memory_mb: int
    used: float
    #: Digests of the heads and artefacts beside it.
    heads: set[str]
    #: Of these the artefacts, in the order in which they were attached.
    artefacts: list[str] = field(default_factory=list)
    #: What each of these takes, in MB: it is part of ``memory_mb``.
    artefacts_mb: dict[str, int] = field(default_factory=dict)
    #: The rows inside wait for another machine: their turn comes again then.
    look_at: float = float("-inf")
    #: When a step brought nothing first, of those since the last that did; None: the newest step brought something.
    idle_since: float | None = None
    #: Seconds from then to the newest step, and the most that they may be.
    idle_s: float = 0.0
    most_idle_s: float = float("inf")

    def waits(self, look_at: float, tokens: int) -> None:
        """A step of at most ``tokens`` brought nothing, neither a row that ended nor a token; the next one is then."""
        self.look_at = look_at
        if self.idle_since is None:
            self.idle_since = self.used
            allowed_s = float(getattr(self.stream.engine, "longest_wait_s", 0.0))
            self.most_idle_s = max(self.stream.deadline_s(tokens), allowed_s)
        self.idle_s = self.used - self.idle_since

    def goes_on(self) -> None:
        """A step brought something, or nothing is inside any more."""
        self.idle_since, self.idle_s = None, 0.0


class Shelf:
    """The models that are loaded, and the memory they hold. Loading and unloading belong to the device's thread."""

    def __init__(
        self,
        device: Device,
        engines: Engines,
        files: Files,
        budget_mb: int,
        lock: threading.Condition,
        in_use: Callable[[], Collection[ModelKey]],
        heads_in_use: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``budget_mb``: what models may hold of one GPU. ``in_use``: the models that must stay, ``heads_in_use``: the
        digests of what must stay beside them; asked under ``lock``."""
        self._device, self._engines, self._files, self._budget_mb = device, engines, files, budget_mb
        self._lock, self._in_use, self._heads_in_use, self._clock = lock, in_use, heads_in_use, clock
        #: Changed under the lock, and by the device's thread alone.
        self.loaded: dict[ModelKey, Loaded] = {}
        start = Budget(START_TOKENS[device.kind])
        #: What was learned of models, whether they are loaded or not.
        self.paces: defaultdict[ModelKey, Pace] = defaultdict(lambda: Pace(start))

    def missing(self, work: Work) -> list[Manifest]:
        """The models of this attempt that are not in memory: its trunk, its heads."""
        loaded = self.loaded.get(work.model)
        heads = work.heads
        if loaded is None:
            return [work.order.model, *(task.manifest for task in heads)]
        return [task.manifest for task in heads if task.manifest.digest not in loaded.heads]

    def room(self, work: Work) -> bool:
        """Its model is here, or can be made so now (or never, which loading will find out). Under the lock."""
        if work.model in self.loaded:
            return True
        try:
            engine = self._engines.find(work.order.model.engine)
            need_mb = self._need_mb(engine, work.order.model, work.key.format)
            return self._evictions(need_mb) is not None and self._share_out(need_mb)
        except DeviceBroken:
            raise
        except Exception:  # noqa: BLE001 - loading will meet the same, and fails this attempt alone
            return True

    def longest_load_s(self, model: Manifest, usual_s: float) -> float:
        """Seconds after which loading this model hangs: its engine's word, or the usual ones."""
        try:
            return float(getattr(self._engines.find(model.engine), "longest_load_s", usual_s))
        except CannotLoad:
            return usual_s

    def left_s(self, work: Work) -> float:
        """Predicted seconds of what is left of an attempt. Under the lock."""
        cost = self.paces[work.model].cost
        if work.stage is Stage.READY and cost.known and self.loaded[work.model].stream.whole:
            return cost.backlog_s(work.tokens_waiting)
        if work.order.predicted_s:
            return work.order.predicted_s * work.unanswered / max(1, len(work.order.texts))
        return cost.backlog_s(work.usage.text_bytes // 4)

    def bring(self, work: Work, model: Manifest) -> bool:
        """Load the attempt's model, or attach one of its heads. False: there is no room before others are free.

        Raises CannotLoad, NeverFits, CannotFetch, OutOfMemory, DeviceBroken, and what a stranger's engine raises.
        """
        if model == work.order.model:
            return self._load(work.model, model)
        loaded = self.loaded[work.model]
        if model.trunk != work.order.model.trunk:
            raise CannotLoad("it sits on another trunk")
        task = next(t for t in work.heads if t.manifest.digest == model.digest)
        artefact_mb = model.memory_mb() if model.answers == "artefact" else 0
        if artefact_mb and not self._make_room(artefact_mb, beside=work.model):
            return False
        with self._files.folder(model) as files:
            loaded.stream.engine.attach(loaded.stream.handle, task, files)
        loaded.heads.add(model.digest)
        if model.answers == "artefact":
            self._put_away_artefacts(loaded, but=model.digest, its_mb=artefact_mb)
        return True

    def _make_room(self, need_mb: int, beside: ModelKey | None = None) -> bool:
        """Evict what must go for so much more memory, but for the model that it is ``beside``. False: there is none
        before others are free."""
        with self._lock:
            chosen = self._evictions(need_mb, beside)
            gone = [self.loaded.pop(victim) for victim in chosen or ()]
        self._unload(gone)
        return chosen is not None and self._share_out(need_mb)

    def _put_away_artefacts(self, loaded: Loaded, but: str, its_mb: int) -> None:
        """Keep a few of those that nobody uses, the last ones attached. Engines hold rows only inside a step."""
        loaded.artefacts = [one for one in loaded.artefacts if one != but]
        with self._lock:
            used = self._heads_in_use()
            gone = [one for one in loaded.artefacts if one not in used][:-ARTEFACTS_KEPT]
            loaded.artefacts = [one for one in loaded.artefacts if one not in gone] + [but]
            loaded.heads.difference_update(gone)
            loaded.memory_mb += its_mb - sum(loaded.artefacts_mb.pop(one, 0) for one in gone)
            loaded.artefacts_mb[but] = its_mb
        for digest in gone:
            if isinstance(loaded.stream.engine, Detaching):
                loaded.stream.engine.detach(loaded.stream.handle, digest)

    def free(self, but: ModelKey) -> bool:
        """Push out all models that nobody uses; False where there was none. Raises DeviceBroken."""
        with self._lock:
            used = {but, *self._in_use()}
            gone = [self.loaded.pop(key) for key in list(self.loaded) if key not in used]
        self.unload(*gone)
        return bool(gone)

    def unload(self, *gone: Loaded) -> None:
        """Free the memory of models that were taken out: it is the others'. Raises DeviceBroken."""
        self._unload(gone)
        self._share_out()

    def _unload(self, gone: Collection[Loaded]) -> None:
        for loaded in gone:
            try:
                loaded.stream.engine.unload(loaded.stream.handle)
            except DeviceBroken:
                raise
            except Exception as error:  # noqa: BLE001 - a stranger's engine
                event(log, "unloading failed", logging.WARNING, error=type(error).__name__)
            event(log, "evicted", model=loaded.model.ref)

    def _load(self, key: ModelKey, model: Manifest) -> bool:
        found = self._engines.find(model.engine)
        need_mb = self._need_mb(found, model, key[1])
        if not self._make_room(need_mb):
            return False
        began = self._clock()
        engine = found if isinstance(found, Engine) else BatchAdapter(found)
        with self._files.folder(model) as files:
            handle = engine.load(model, files, device=self._device.torch_name, in_format=key[1])
        stream = Stream(
            engine,
            handle,
            whole=engine is not found,
            pace=self.paces[key],
            device_kind=self._device.kind,
            free=lambda: self.free(but=key),
        )
        with self._lock:
            self.loaded[key] = Loaded(model, stream, need_mb, self._clock(), set())
        self._share_out()
        event(log, "loaded", model=model.ref, format=key[1], seconds=round(self._clock() - began, 3))
        return True

    def _share_out(self, need_mb: int = 0) -> bool:
        """Let models that are faster with more memory have what all others leave, and ``need_mb``, in equal parts.

        False: rows inside must end before they can give it back. Raises DeviceBroken.
        """
        streams = [loaded.stream for loaded in self.loaded.values()]
        elastic = [(s.engine, s.handle) for s in streams if isinstance(s.engine, Elastic)]
        if not elastic:
            return True
        spare_mb = self._budget_mb - need_mb - sum(loaded.memory_mb for loaded in self.loaded.values())
        each_mb = max(0, spare_mb) // len(elastic)
        given_back = [engine.stretch(handle, each_mb) for engine, handle in elastic]
        return all(given_back)

    def _need_mb(self, engine: Engine | BatchEngine, model: Manifest, in_format: str) -> int:
        """What the first GPU of a group must hold of a model, which is the fullest: most engines use it alone.

        Raises ValueError and more where a stranger's engine gives no number.
        """
        whole_mb = max(0, int(engine.memory_mb(model, in_format)))
        return ceil(whole_mb / self._device.gpus) if spreads(engine) else whole_mb

    def _evictions(self, need_mb: int, beside: ModelKey | None = None) -> list[ModelKey] | None:
        residents = [Resident(key, m.memory_mb, m.used) for key, m in self.loaded.items()]
        in_use = self._in_use() if beside is None else {beside, *self._in_use()}
        return evictions(residents, need_mb, self._budget_mb, in_use)


def why_not(model: Manifest, error: Exception) -> tuple[str, str, str]:
    """Why an attempt cannot run for one of its models: the error, words, and the digest of what can never be loaded."""
    match error:
        case CannotLoad() | NeverFits() | FileRefused():
            return "cannot_load", f"{model.ref}: {error}", model.digest
        case CannotFetch():
            return "cannot_fetch", str(error), ""
        case OutOfMemory():
            return "out_of_memory", f"{model.ref} does not fit now", ""
    return "cannot_load", f"{model.ref}: {type(error).__name__}", ""
