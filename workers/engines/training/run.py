"""One training run, as steps of a fraction of a second each: whoever owns the device does other work between them.

First the heads learn on the frozen trunk's vectors, which were computed once and not once an epoch. Where the trunk is
to learn too, it begins with these heads, so that it is not bent to fit random ones (Kumar et al., Fine-Tuning can
Distort Pretrained Features, ICLR 2022). What depends on chance follows from the recipe's seed, the epoch and the step,
so a run that goes on from a checkpoint computes what it would have computed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from motet.protocol.columns import CellError
from motet.protocol.manifest import Manifest
from motet.training.recipe import Recipe
from workers.engine import Prepared
from workers.engines.training.heads import Heads, mean_score, scores
from workers.engines.training.learner import (
    Hopeless,
    Learner,
    adam_state,
    adam_tensors,
    finite,
    let_learn,
    seed_of,
)
from workers.engines.training.lora import merge
from workers.engines.training.state import RunState
from workers.engines.training.team import Team
from workers.engines.training.truth import Parts, Truth
from workers.engines.trunk import Tokens

#: Rows of a batch of heads, and their learning rate and decay (Adam, decoupled).
HEAD_BATCH, HEAD_RATE, HEAD_DECAY = 128, 1e-3, 0.02
#: Batches among which rows are sorted by length: far from padding, near to chance.
POOL = 50
#: Padded tokens of a batch that is only read.
READ_TOKENS = 4096
#: Rows tokenised in one step.
TOKENISED = 2000
#: Seconds of the trunk's learning after which a checkpoint is stored: what a lost worker costs at most.
CHECKPOINT_S = 30.0
#: Epochs of heads whose mean score is looked at: one alone, on few rows, is chance.
SMOOTHED = 3
#: Bytes of a checkpoint that are copied in one step.
COPIED = 32 << 20
#: A format is allowed where no score falls by more than this.
TOLERANCE = 0.003

T = TypeVar("T")
#: Tokens that ran through the trunk in a step, 1 for other work; 0: it waits for its journal.
Steps = Generator[int]


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Some rows of the job that is learned from, in order."""

    texts: Sequence[str]
    #: (rows, dim) fp32, NaN where a row has no vector.
    vectors: np.ndarray[Any, np.dtype[np.float32]]


class Journal(Protocol):
    """What a run reads and what it leaves behind. Another thread than the device's calls it, one call at a time.

    Any method may raise Hopeless, or TryAgain.
    """

    def block(self, number: int, *, texts: bool) -> RowSlice | None:
        """The rows of a block of the job that is learned from; None behind the last one."""
        ...

    def checkpoint(self) -> bytes | None:
        """The newest one that was stored, by this attempt or one before it."""
        ...

    def report(self, key: str, report: Mapping[str, Any], checkpoint: RunState | None) -> None:
        """Tell how far it is; a second report of a key replaces the first. A checkpoint replaces any other."""
        ...

    def store(self, path: Path) -> str:
        """Store a file; its sha256."""
        ...

    def keep(self, files: Sequence[str]) -> None:
        """Files (by digest) that are part of what came out: they stay as long as the job does."""
        ...

    def close(self) -> None:
        """Let go of the line."""
        ...


class TryAgain(Exception):
    """The journal is out of reach now. The run may begin again, at its checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """The loaded trunk. A run learns on a copy of it."""

    manifest: Manifest
    #: None of a trunk that reads pictures, and so its tokenizer: only heads learn on its vectors.
    model: Any = field(repr=False)
    tokens: Tokens | None
    pooling: str
    device: str
    #: Matrix products in bf16, while weights and their changes stay fp32.
    fast: bool
    #: The other devices of its group, which learn with it.
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came out."""

    #: Task -> tensors of its head.
    heads: Mapping[str, Mapping[str, Tensor]]
    #: The trunk's tensors under their names; None where it was left as it is.
    trunk: Mapping[str, Tensor] | None
    #: Formats beside fp32 in which no score is lost.
    formats: tuple[str, ...]
    #: Task -> scores on the test rows, or the validation rows where there are none.
    scores: Mapping[str, Mapping[str, float]]
    #: The same of the heads on the frozen trunk.
    frozen: Mapping[str, Mapping[str, float]]
    seconds: float


class Run:
    """``go`` is the whole of it; ``trained`` is there once it has ended."""

    def __init__(
        self, recipe: Recipe, trunk: Trunk, journal: Journal, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.recipe, self.trunk, self.journal = recipe, trunk, journal
        self.parts = Parts.of(recipe)
        self.truths = [Truth.of(target) for target in recipe.targets]
        self.trained: Trained | None = None
        self.clock, self._began = clock, clock()
        self._line = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._told: list[Future[None]] = []
        self._checkpoint: Future[None] | None = None

    def go(self) -> Steps:
        """Raises Hopeless, and what the journal and torch raise."""
        learns = self.recipe.tune != "heads" and self.recipe.epochs > 0
        texts, vectors = yield from self._gathered(texts=learns)
        heads = Heads(self.recipe, self.truths, vectors, self.parts.train)
        yield from self._learn_heads(heads, vectors)
        told_on = self.parts.test if len(self.parts.test) else self.parts.validation
        with torch.no_grad():
            frozen = scores(heads, heads(heads.with_numbers(vectors[told_on], told_on)), told_on)
        if not learns:
            self.trained = self._made(heads, None, self.trunk.manifest.formats, frozen, frozen)
            return
        tuning = Tuning(self, heads, texts)
        yield from tuning.go()
        exact = yield from tuning.scored(told_on, fast=False)
        formats: tuple[str, ...] = ()
        if self.trunk.fast:
            fast = yield from tuning.scored(told_on, fast=True)
            formats = ("bf16",) if no_worse(fast, exact) else ()
        self.trained = self._made(heads, tuning.weights(), formats, exact, frozen)

    def close(self) -> None:
        """Let go of what it began. Safe in the middle."""
        self._line.shutdown(wait=False, cancel_futures=True)
        self.journal.close()

    def call(self, act: Callable[[], T]) -> Generator[int, None, T]:
        """What the journal answers; the device does other work meanwhile."""
        answer = self._line.submit(act)
        while not answer.done():
            yield 0
        return answer.result()

    def tell(self, key: str, report: Mapping[str, Any], checkpoint: RunState | None = None) -> None:
        """Tell the journal, and go on. What failed earlier is raised here."""
        for one in self._told:
            if one.done():
                one.result()
        self._told = [one for one in self._told if not one.done()]
        self._told.append(self._line.submit(self.journal.report, key, report, checkpoint))
        if checkpoint is not None:
            self._checkpoint = self._told[-1]

    @property
    def telling_much(self) -> bool:
        """A checkpoint is still on its way: one at a time is enough memory."""
        return self._checkpoint is not None and not self._checkpoint.done()

    def _made(self, heads: Heads, trunk: Any, formats: Any, told: Any, frozen: Any) -> Trained:
        return Trained(
            heads={t.target.name: heads.export(number) for number, t in enumerate(self.truths)},
            trunk=trunk,
            formats=formats,
            scores=told,
            frozen=frozen,
            seconds=self.clock() - self._began,
        )

    def _gathered(self, *, texts: bool) -> Generator[int, None, tuple[list[str], Tensor]]:
        found: list[str] = []
        vectors: list[Tensor] = []
        read = partial(self.journal.block, texts=texts)
        while (rows := (yield from self.call(partial(read, len(vectors))))) is not None:
            dim = self.trunk.manifest.vector_dim({"features": self.recipe.features})
            if len(rows.vectors) and rows.vectors.shape[1] != dim:
                first = sum(map(len, vectors))
                raise Hopeless(
                    f"rows from {first} on of job {self.recipe.job} have vectors of {rows.vectors.shape[1]} numbers; "
                    f"the trunk's have {dim}"
                )
            found += rows.texts
            vectors.append(torch.from_numpy(rows.vectors))
            yield 1
        every = torch.cat(vectors) if vectors else torch.empty(0, 0)
        wanted = (self.recipe.train_rows + self.recipe.test_rows) * self.recipe.texts
        if len(every) != wanted or (texts and len(found) != wanted):
            raise Hopeless(f"job {self.recipe.job} has {len(every):,} rows, and the recipe is for {wanted:,}")
        if not torch.isfinite(every).all():
            row = int((~torch.isfinite(every).all(1)).nonzero()[0])
            raise Hopeless(f"row {row} of job {self.recipe.job} has no vector; leave the row out")
        # A head reads the vectors of a row's texts side by side.
        return found, every.reshape(-1, self.recipe.texts * every.shape[1])

    # -- heads on the frozen trunk

    def _learn_heads(self, heads: Heads, vectors: Tensor) -> Steps:
        recipe, parts = self.recipe, self.parts
        adam = torch.optim.AdamW(heads.parameters(), lr=HEAD_RATE, weight_decay=HEAD_DECAY)
        best = Best(recipe.patience, smoothed=SMOOTHED)
        held_out = parts.validation if len(parts.validation) else parts.train
        for epoch in range(1, recipe.head_epochs + 1):
            lost, seen = 0.0, 0
            heads.train()
            order = parts.train[torch.randperm(len(parts.train), generator=_dice(recipe.seed, epoch))]
            for at, rows in enumerate(torch.split(order, HEAD_BATCH)):
                torch.manual_seed(seed_of(recipe.seed, epoch, at))
                _rate(
                    adam, HEAD_RATE * (1 - ((epoch - 1) + at * HEAD_BATCH / len(order)) / recipe.head_epochs)
                )
                loss, _ = heads.loss(heads(heads.with_numbers(vectors[rows], rows)), rows)
                if loss.requires_grad:
                    adam.zero_grad()
                    torch.autograd.backward(loss)
                    adam.step()
                    lost, seen = lost + finite(loss, "heads", epoch) * len(rows), seen + len(rows)
                if at % POOL == POOL - 1:
                    yield 1
            heads.eval()
            with torch.no_grad():
                told = {
                    part: scores(heads, heads(heads.with_numbers(vectors[rows], rows)), rows)
                    for part, rows in (("validation", held_out), ("test", parts.test))
                }
            self.tell(
                f"heads {epoch:04}",
                {
                    "stage": "heads",
                    "epoch": epoch,
                    "of": recipe.head_epochs,
                    "loss": lost / max(1, seen),
                    **told,
                },
            )
            if not best.goes_on(mean_score(told["validation"]), epoch, heads):
                break
            yield 1
        best.restore(heads)
        heads.eval()


@dataclass
class Best:
    """The best state so far, and when to give up on a better one."""

    patience: int
    #: Scores whose mean counts.
    smoothed: int = 1
    last: list[float] = field(default_factory=list)
    score: float = -math.inf
    epoch: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def goes_on(self, score: float, epoch: int, *modules: torch.nn.Module) -> bool:
        """Whether another epoch is worth it."""
        self.last = [*self.last, score][-self.smoothed :]
        score = sum(self.last) / len(self.last)
        if not score <= self.score:
            self.score, self.epoch = score, epoch
            for name, tensor in _learning(modules):
                # Into the same memory as before, where there is some.
                self.state[name] = (
                    tensor.detach().clone()
                    if name not in self.state
                    else self.state[name].copy_(tensor.detach())
                )
        return not self.patience or epoch - self.epoch < self.patience

    @torch.no_grad()
    def restore(self, *modules: torch.nn.Module) -> None:
        for name, tensor in _learning(modules):
            if name in self.state:
                tensor.copy_(self.state[name])


class Tuning:
    """The second stage: a copy of the trunk learns together with the heads."""

    def __init__(self, run: Run, heads: Heads, texts: Sequence[str]) -> None:
        self._run, self._recipe, self._trunk = run, run.recipe, run.trunk
        assert run.trunk.tokens is not None, "a trunk without a tokenizer does not learn"
        self._texts, self._tokens = texts, run.trunk.tokens
        model = copy.deepcopy(run.trunk.model).train()
        let_learn(model, run.recipe)
        self._model, self._heads = model, heads.to(run.trunk.device).train()
        self._learner = Learner(
            run.recipe,
            model,
            self._heads,
            pooling=run.trunk.pooling,
            pad=self._tokens.pad,
            device=run.trunk.device,
            fast=run.trunk.fast,
        )
        self._prepared = self._learner.texts
        self._best = Best(run.recipe.patience)
        self._stored = -math.inf

    def go(self) -> Steps:
        run, recipe = self._run, self._recipe
        for lo in range(0, len(self._texts), TOKENISED):
            self._prepared += _readable(
                self._tokens.prepare(self._texts[lo : lo + TOKENISED], recipe.max_tokens),
                lo,
                recipe.texts,
            )
            yield 1
        first_epoch, first_step, lost, seen = 1, 0, 0.0, 0
        saved = yield from run.call(run.journal.checkpoint)
        if saved is not None:
            first_epoch, first_step, lost, seen = self._load(RunState.read(saved))
        team = Team(self._learner, self._trunk.others) if self._teams() else None
        try:
            if team is not None:
                yield from run.call(team.gather)
                team.join()
            yield from self._epochs((team or self._learner).learn, first_epoch, first_step, lost, seen)
        finally:
            if team is not None:
                team.close()
        self._best.restore(self._model, self._heads)
        merge(self._model)

    def _teams(self) -> bool:
        """Whether there are other devices, and no other run of this process has them."""
        return bool(self._trunk.others) and not torch.distributed.is_initialized()

    def _epochs(
        self,
        learn: Callable[[Tensor, int, int, int], float],
        first_epoch: int,
        first_step: int,
        lost: float,
        seen: int,
    ) -> Steps:
        run, recipe, parts = self._run, self._recipe, self._run.parts
        held_out = parts.validation if len(parts.validation) else parts.train
        self._stored = run.clock()
        for epoch in range(first_epoch, recipe.epochs + 1):
            batches = self._batches(epoch)
            for step in range(first_step, len(batches)):
                rows = batches[step]
                lost, seen = lost + learn(rows, epoch, step, len(batches)) * len(rows), seen + len(rows)
                yield from self._store(epoch, step + 1, lost, seen)
                yield sum(map(self._learner.length, rows.tolist()))
            told = {
                "validation": (yield from self.scored(held_out, fast=self._trunk.fast)),
                "test": (yield from self.scored(parts.test, fast=self._trunk.fast)),
            }
            goes_on = self._best.goes_on(mean_score(told["validation"]), epoch, self._model, self._heads)
            report = {
                "stage": recipe.tune,
                "epoch": epoch,
                "of": recipe.epochs,
                "loss": lost / max(1, seen),
                **told,
            }
            first_step, lost, seen = 0, 0.0, 0
            # One that goes on from an ended run finds no epoch left.
            after = epoch + 1 if goes_on else recipe.epochs + 1
            run.tell(f"{recipe.tune} {epoch:04}", report)
            yield from self._store(after, 0, 0.0, 0)
            if not goes_on:
                break

    def weights(self) -> dict[str, Tensor]:
        return {
            name: tensor.detach().float().cpu().contiguous()
            for name, tensor in self._model.state_dict().items()
            if not name.startswith("pooler.")
        }

    def scored(self, rows: Tensor, *, fast: bool) -> Generator[int, None, dict[str, dict[str, float]]]:
        """What the present weights are worth on these rows."""
        answers = torch.empty(len(rows), sum(t.target.width for t in self._run.truths))
        length = self._learner.length
        order = sorted(range(len(rows)), key=lambda i: length(int(rows[i])))
        self._model.eval()
        self._heads.eval()
        lo = 0
        while lo < len(order):
            hi = lo + 1
            while hi < len(order) and (hi + 1 - lo) * length(int(rows[order[hi]])) <= READ_TOKENS:
                hi += 1
            batch = rows[order[lo:hi]]
            with torch.inference_mode():
                features = self._learner.features(batch, fast=fast)
                answers[order[lo:hi]] = self._heads(features).float().cpu()
            lo = hi
            yield sum(map(length, batch.tolist()))
        self._model.train()
        self._heads.train()
        return scores(self._heads, answers, rows)

    def _batches(self, epoch: int) -> list[Tensor]:
        """The training rows of an epoch: rows of like length together, in an order of chance."""
        dice = _dice(self._recipe.seed, epoch)
        train, size = self._run.parts.train, self._recipe.batch_rows
        batches: list[Tensor] = []
        for some in torch.split(train[torch.randperm(len(train), generator=dice)], POOL * size):
            lengths = torch.tensor(list(map(self._learner.length, some.tolist())))
            batches += torch.split(some[lengths.argsort(stable=True)], size)
        return [batches[i] for i in torch.randperm(len(batches), generator=dice).tolist()]

    # -- checkpoints

    def _store(self, epoch: int, step: int, lost: float, seen: int) -> Steps:
        """Where to go on, if the newest checkpoint is old and none is on its way."""
        run = self._run
        if run.clock() - self._stored > CHECKPOINT_S and not run.telling_much:
            run.tell("checkpoint", {}, (yield from self._state(epoch, step, lost, seen)))
            self._stored = run.clock()

    def _state(self, epoch: int, step: int, lost: float, seen: int) -> Generator[int, None, RunState]:
        """Where to go on, and a copy of all that learns, made in steps that are short."""
        now = {f"now.{name}": t for name, t in _learning((self._model, self._heads))}
        # The best state is the present one after most epochs: then it is not stored twice.
        best = {} if self._best.epoch == epoch - 1 and step == 0 else self._best.state
        found = now | {f"best.{name}": t for name, t in best.items()}
        found |= adam_tensors(self._learner.adam)
        tensors: dict[str, Tensor] = {}
        copied = 0
        for name, tensor in found.items():
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            copied += tensor.numel() * tensor.element_size()
            if copied > COPIED:
                yield 1
                copied = 0
        return RunState(
            tensors,
            {"at": [epoch, step, lost, seen], "best": [self._best.score, self._best.epoch, bool(best)]},
        )

    def _load(self, saved: RunState) -> tuple[int, int, float, int]:
        tensors = saved.tensors
        with torch.no_grad():
            for name, tensor in _learning((self._model, self._heads)):
                tensor.copy_(tensors[f"now.{name}"])
        self._best.score, self._best.epoch, apart = saved.facts["best"]
        prefix = "best." if apart else "now."
        self._best.state = {
            name.removeprefix(prefix): t.to(self._trunk.device, copy=True)
            for name, t in tensors.items()
            if name.startswith(prefix)
        }
        adam = self._learner.adam
        adam.load_state_dict(
            {"state": adam_state(tensors), "param_groups": adam.state_dict()["param_groups"]}
        )
        epoch, step, lost, seen = saved.facts["at"]
        return int(epoch), int(step), float(lost), int(seen)


def no_worse(fast: Mapping[str, Mapping[str, float]], exact: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether no task's score falls by more than the tolerance."""
    return all(fast[task]["score"] >= exact[task]["score"] - TOLERANCE for task in exact)


def _learning(modules: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{number}.{name}", parameter


def _readable(texts: Sequence[Prepared | CellError], first: int, of_row: int) -> Iterator[Prepared]:
    """``of_row``: texts of each row."""
    for offset, text in enumerate(texts):
        if isinstance(text, CellError):
            raise Hopeless(f"row {(first + offset) // of_row}: {text.message}")
        yield text


def _rate(adam: torch.optim.Optimizer, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate


def _dice(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))
