"""The accuracy check of a numeric format: the same sentences in fp32 and in the format, and how far they differ.

A format is allowed for a model only if this passes; that is what ``numerics="fast"`` rests on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motet.columns import Column, values
from motet.manifest import Manifest
from motet.wire import TaskOrder
from workers.assemble import assemble
from workers.batching import pack
from workers.engine import Engine, Pass, Prepared

#: A format passes if no vector leaves its direction by more, and labels agree at least so often.
COSINE, AGREEMENT = 0.999, 0.99
#: Numbers agree if they differ by less than this share of their spread.
NUMBER_SHARE = 0.01
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


@dataclass
class Trial:
    """One model loaded in several formats, to see whether they answer alike."""

    engine: Engine
    model: Manifest
    files: Mapping[str, Path]
    device: str = "cpu"
    _handles: dict[str, Any] = field(default_factory=dict)
    _rows: list[Prepared] = field(default_factory=list)

    def answers(self, task: TaskOrder, head: Mapping[str, Path], in_format: str) -> Column:
        """The task's answers to SENTENCES in a format. Raises what engines raise."""
        handle = self._loaded(in_format)
        self.engine.attach(handle, task, head)
        pass_ = Pass(handle, (task,), 0)
        if not self._rows:
            self._rows = [r for r in self.engine.prepare(pass_, SENTENCES) if isinstance(r, Prepared)]
        batches = pack(self._rows, tokens=BATCH_TOKENS)
        parts = [([row.row for row in batch], self.engine.run(pass_, batch)[task.name]) for batch in batches]
        first = parts[0][1]
        return assemble(task.manifest.answers, len(SENTENCES), parts, {}, dim=first.dim, dtype=first.dtype)

    def close(self) -> None:
        for handle in self._handles.values():
            self.engine.unload(handle)
        self._handles.clear()

    def _loaded(self, in_format: str) -> Any:
        if in_format not in self._handles:
            self._handles[in_format] = self.engine.load(
                self.model, self.files, device=self.device, in_format=in_format
            )
        return self._handles[in_format]


def compare(exact: Column, fast: Column, labels: Sequence[str]) -> tuple[bool, dict[str, float]]:
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
    agreement = _agreement(exact, fast, labels)
    return agreement >= AGREEMENT, {"agreement": round(agreement, 4)}


def _agreement(exact: Column, fast: Column, labels: Sequence[str]) -> float:
    """Share of equal decisions: of rows, of (row, label) pairs, or of numbers that are nearly the same."""
    pairs = list(zip(values(exact, labels), values(fast, labels), strict=True))
    if exact.kind == "label":
        return sum(int(a[0] == b[0]) for a, b in pairs) / len(pairs)
    if exact.kind == "labels":
        given = [({label for label, _ in a}, {label for label, _ in b}) for a, b in pairs]
        return 1 - sum(len(a ^ b) for a, b in given) / (len(pairs) * max(1, len(labels)))
    numbers = np.array(pairs, np.float64)
    spread = float(numbers[:, 0].std()) or 1.0
    alike = np.abs(numbers[:, 0] - numbers[:, 1]) <= NUMBER_SHARE * spread
    return int(alike.sum()) / len(pairs)


def _unit(column: Column) -> np.ndarray[Any, np.dtype[np.float64]]:
    vectors = np.array(list(values(column)), np.float64)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray[Any, np.dtype[np.float64]] = vectors / np.maximum(length, 1e-12)
    return unit
