"""The accuracy check of a numeric format: the same sentences in fp32 and in the format, and how far they differ.

A format is allowed for a model only if this passes; that is what ``numerics="fast"`` rests on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motet.protocol.columns import CellError, Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import BatchEngine, Engine, Pass, Prepared
from workers.registrar.labelled import agreement, decisions
from workers.run.assemble import assemble
from workers.run.batch_adapter import run_to_the_end
from workers.run.batching import pack

#: A format passes if no vector leaves its direction by more, and labels agree at least so often.
COSINE, AGREEMENT = 0.999, 0.99
#: Vectors of pictures.
COSINE_SEEN = 0.99
#: Labels of a language model whose scores in fp32 are closer than this are both right.
NEAR_TIE = 0.1
#: Scores of a cross-encoder, from 0 to 1, that are closer than this are equally good.
NEAR_SCORE = 0.01
BATCH_TOKENS = 1024

_WHO = ("The council", "My neighbour", "A small company from Leeds", "Our new teacher", "The goalkeeper", "Nobody here",
        "The central bank", "An old friend of mine", "The support team", "Her second film")  # fmt: skip
_WHAT = ("announced on Monday that prices will rise", "was far better than I had expected",
         "refused to give my money back", "finished the work two days early", "lost by three goals in the last minutes",
         "said that the software update deletes photographs", "made everybody laugh until the very end",
         "is still waiting for an answer from the ministry")  # fmt: skip
_MORE = ("", ", and that was all.", ", although the reviews had warned us not to hope for too much.",
         ". I would not recommend it to anyone who has better things to do on a Sunday afternoon.",
         "! Thank you so much, we will certainly come back next year with the whole family.",
         ". Shares fell by four per cent in early trading in London, while analysts spoke of a difficult quarter for "
         "the whole industry, with weak demand from abroad and rising costs for energy and transport at home.")  # fmt: skip

#: Ordinary English of many lengths: news, complaints, praise, sport.
SENTENCES: tuple[str, ...] = tuple(
    f"{who} {what}{more}"
    for (who, what), more in zip(itertools.product(_WHO, _WHAT), itertools.cycle(_MORE), strict=False)
) + tuple(
    f"{_WHO[i % len(_WHO)]} {_WHAT[i % len(_WHAT)]}{_MORE[(i // 7) % len(_MORE)]} "
    f"{_WHO[(i * 3 + 1) % len(_WHO)]} {_WHAT[(i * 5 + 2) % len(_WHAT)]}{_MORE[(i // 3) % len(_MORE)]}"
    for i in range(160)
)
#: What a language model is tried on, which takes long: every twentieth. A server has passed its trials elsewhere.
FEW, VERY_FEW = SENTENCES[::20], SENTENCES[::40]
#: What it is asked there: the likelier label decides, and that it writes something at all.
LABELS = ("complaint", "praise", "news", "sport")
WRITTEN_TOKENS = 8


@dataclass(frozen=True)
class Trial:
    """A model and tasks on it, asked in one pass, to see whether it answers alike in several formats."""

    engine: Engine | BatchEngine
    model: Manifest
    files: Mapping[str, Path]
    #: Each task with the files of its own head.
    tasks: Sequence[tuple[TaskOrder, Mapping[str, Path]]]
    device: str = "cpu"
    texts: Sequence[str] = SENTENCES
    #: What is read in place of the texts, by a model that reads pictures; one for each text.
    pictures: Sequence[bytes] = ()

    def answers(self, in_format: str) -> dict[str, Column]:
        """The answers to the texts by task name. Raises what engines raise."""
        with self.loaded(in_format) as pass_:
            return self.run(pass_)

    @contextmanager
    def loaded(self, in_format: str) -> Iterator[Pass]:
        """The pass of all tasks, with the model in memory. Raises what engines raise."""
        handle = self.engine.load(self.model, self.files, device=self.device, in_format=in_format)
        try:
            for task, head in self.tasks:
                self.engine.attach(handle, task, head)
            yield Pass(handle, tuple(task for task, _ in self.tasks), 0, values=self.pictures)
        finally:
            self.engine.unload(handle)

    def run(self, pass_: Pass) -> dict[str, Column]:
        """The answers of a loaded pass."""
        prepared = self.engine.prepare(pass_, self.texts)
        errors = {i: row for i, row in enumerate(prepared) if isinstance(row, CellError)}
        batches = pack([row for row in prepared if isinstance(row, Prepared)], tokens=BATCH_TOKENS)
        parts = [([row.row for row in batch], run_to_the_end(self.engine, pass_, batch)) for batch in batches]
        answers = {}
        for task in pass_.tasks:
            columns = [(rows, part[task.name]) for rows, part in parts]
            dim, dtype = max(((c.dim, c.dtype) for _, c in columns), default=(0, ""))
            answers[task.name] = assemble(
                task.column_kind, len(self.texts), columns, errors, dim=dim, dtype=dtype
            )
        return answers


def compare(exact: Column, fast: Column, model: Manifest) -> tuple[bool, dict[str, float]]:
    """Whether a format answers as fp32 does, and what was measured."""
    if exact.counts()[0] < len(exact) or fast.counts()[0] < len(fast):
        return False, {"ok_share": min(exact.counts()[0], fast.counts()[0]) / max(1, len(exact))}
    if exact.kind == "vector":
        a, b = (_unit(column) for column in (exact, fast))
        cosines = (a * b).sum(1)
        lowest = float(cosines.min())
        return lowest >= COSINE, {
            "cosine_min": round(lowest, 6),
            "cosine_mean": round(float(cosines.mean()), 6),
        }
    if model.answers == "ranking":
        share = _same_best(exact, fast)
        return share >= AGREEMENT, {"agreement": round(share, 4)}
    share = agreement(decisions(fast, model), decisions(exact, model), model)
    return share >= AGREEMENT, {"agreement": round(share, 4)}


def compare_seeing(exact: Column, fast: Column, model: Manifest) -> tuple[bool, dict[str, float]]:
    """The same of a model that reads pictures: vectors may turn further, and a near tie of labels is none of the format's.

    One that tells a thousand things apart is sure of few of the pictures that are drawn for this.
    """
    passed, measured = compare(exact, fast, model)
    if "cosine_min" in measured:
        return measured["cosine_min"] >= COSINE_SEEN, measured
    if exact.kind != "label" or "agreement" not in measured:
        return passed, measured
    pairs = zip(values(exact, model.labels), values(fast, model.labels), strict=True)
    near = [a[0] == b[0] or a[2][a[0]] - a[2][b[0]] <= NEAR_TIE for a, b in pairs]
    share = sum(near) / len(near)
    return share >= AGREEMENT, {"agreement": round(share, 4), "same_label": measured["agreement"]}


def compare_writing(exact: Mapping[str, Column], fast: Mapping[str, Column]) -> tuple[bool, dict[str, float]]:
    """Whether a language model decides in a format as in fp32: by the task that chooses, and the one that writes.

    Likelihoods that are nearly equal change places in any other rounding, and what is written then goes another way. So
    a choice agrees where it is the same, or where fp32 itself held both labels for equally likely (NEAR_TIE); these
    must be as many as the labels of a classifier. The share of equal beginnings of what is written is told beside.
    """
    chosen, written = "choose", "generate"
    for answers in (exact, fast):
        ok = min(answers[task].counts()[0] for task in (chosen, written))
        if ok < len(answers[chosen]):
            return False, {"ok_share": ok / max(1, len(answers[chosen]))}
    pairs = list(zip(values(exact[chosen], LABELS), values(fast[chosen], LABELS), strict=True))
    same = [a[0] == b[0] for a, b in pairs]
    near = [a[2][a[0]] - a[2][b[0]] <= NEAR_TIE for a, b in pairs]
    share = sum(s or n for s, n in zip(same, near, strict=True)) / len(pairs)
    begun = [
        a["text"].split()[:1] == b["text"].split()[:1]
        for a, b in zip(values(exact[written]), values(fast[written]), strict=True)
    ]
    return share >= AGREEMENT, {
        "agreement": round(share, 4),
        "same_label": round(sum(same) / len(pairs), 4),
        "same_first_word": round(sum(begun) / len(pairs), 4),
    }


def _same_best(exact: Column, fast: Column) -> float:
    """Share of rankings with the same document in front, or with one that fp32 itself held for nearly as good."""
    same = 0
    for a, b in zip(values(exact), values(fast), strict=True):
        scores = {one["index"]: one["score"] for one in a}
        same += a[0]["score"] - scores[b[0]["index"]] <= NEAR_SCORE
    return same / max(1, len(exact))


def _unit(column: Column) -> np.ndarray[Any, np.dtype[np.float64]]:
    vectors = np.array(list(values(column)), np.float64)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray[Any, np.dtype[np.float64]] = vectors / np.maximum(length, 1e-12)
    return unit
