"""From logits and vectors to columns: labels, several labels, numbers, vectors. numpy in, little-endian bytes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from motet.protocol.columns import ERROR, OK, CellError, Column
from motet.protocol.wire import TaskOrder
from motet.tasks import UNSURE, Classify

Floats = NDArray[np.float32]

NOT_FINITE = CellError("not_finite", "the model answered NaN or infinity")
#: A label is given when its score reaches this, where the manifest names no threshold.
THRESHOLD = 0.5


def label_column(logits: Floats, *, every_score: bool, apart: bool = False) -> Column:
    """Single-label: softmax over (n, labels); the winner and its score, all scores on request.

    ``apart``: each label's score is a chance of its own, the sigmoid of its logit.
    """
    bad = ~_finite(logits)
    known = np.where(bad[:, None], 0, logits)
    scores = _sigmoid(known) if apart else _softmax(known)
    codes = scores.argmax(1)
    arrays = {
        "codes": np.where(bad, 0, codes).astype("<i2").tobytes(),
        "scores": np.where(bad, 0, scores[np.arange(len(scores)), codes]).astype("<f4").tobytes(),
    }
    if every_score:
        arrays["all"] = np.where(bad[:, None], 0, scores).astype("<f4").tobytes()
    return _column("label", bad, arrays)


def abstaining(column: Column, task: TaskOrder) -> Column:
    """The column of a classifier, with its word for rows whose best score is below ``min_score`` (motet.tasks.Classify)."""
    least = task.spec.get("min_score")
    if least is None:
        return column
    known = task.manifest.labels
    labels = Classify("", min_score=least, otherwise=task.spec.get("otherwise")).labels_of(known)
    word = labels.index(task.spec.get("otherwise") or UNSURE)
    scores = np.frombuffer(column.arrays["scores"], "<f4")
    codes = np.frombuffer(column.arrays["codes"], "<i2")
    unsure = (scores < least) & (np.frombuffer(column.status, np.uint8) == OK)
    arrays = {**column.arrays, "codes": np.where(unsure, word, codes).astype("<i2").tobytes()}
    if "all" in arrays and len(labels) > len(known):
        every = np.frombuffer(arrays["all"], "<f4").reshape(len(scores), -1)
        arrays["all"] = np.pad(every, ((0, 0), (0, 1))).astype("<f4").tobytes()
    return replace(column, arrays=arrays)


def labels_column(logits: Floats, thresholds: Sequence[float], *, every_score: bool) -> Column:
    """Multi-label: sigmoid over (n, labels); the labels that reach their threshold, best first."""
    bad = ~_finite(logits)
    scores = _sigmoid(np.where(bad[:, None], 0, logits))
    limits = np.asarray(thresholds or [THRESHOLD] * logits.shape[1], np.float32)
    given = (scores >= limits) & ~bad[:, None]
    order = np.argsort(-scores, axis=1, kind="stable")
    in_order = np.take_along_axis(given, order, 1)
    rows, places = np.nonzero(in_order)
    codes = order[rows, places]
    arrays = {
        "offsets": np.concatenate([[0], np.cumsum(given.sum(1))]).astype("<i4").tobytes(),
        "codes": codes.astype("<i2").tobytes(),
        "scores": scores[rows, codes].astype("<f4").tobytes(),
    }
    if every_score:
        arrays["all"] = np.where(bad[:, None], 0, scores).astype("<f4").tobytes()
    return _column("labels", bad, arrays)


def number_column(logits: Floats) -> Column:
    """Regression: the first of (n, 1)."""
    bad = ~_finite(logits[:, :1])
    return _column("number", bad, {"numbers": np.where(bad, 0, logits[:, 0]).astype("<f8").tobytes()})


def vector_column(vectors: Floats, dtype: Literal["fp32", "fp16"]) -> Column:
    """Vectors (n, dim) in the element type that was asked for."""
    with np.errstate(over="ignore"):
        cast = vectors.astype("<f2" if dtype == "fp16" else "<f4")
    bad = ~_finite(cast)
    cast[bad] = 0
    return _column("vector", bad, {"vectors": cast.tobytes()}, dim=vectors.shape[1], dtype=dtype)


def vector_answer(task: TaskOrder, pooled: Floats) -> Column:
    """Pooled vectors (n, dim) as a task asks for them."""
    if task.spec.get("normalize", True):
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    return vector_column(pooled, task.spec.get("dtype", "fp32"))


def _column(
    kind: Literal["label", "labels", "number", "vector"],
    bad: NDArray[np.bool_],
    arrays: dict[str, bytes],
    *,
    dim: int = 0,
    dtype: Literal["fp32", "fp16", ""] = "",
) -> Column:
    return Column(
        kind=kind,
        status=np.where(bad, ERROR, OK).astype(np.uint8).tobytes(),
        arrays=arrays,
        errors={int(row): NOT_FINITE for row in np.nonzero(bad)[0]},
        dim=dim,
        dtype=dtype,
    )


def _finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows hold finite numbers only."""
    finite: NDArray[np.bool_] = np.isfinite(values).all(axis=1, keepdims=True)[:, 0]
    return finite


def _softmax(logits: Floats) -> Floats:
    powers: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(logits: Floats) -> Floats:
    with np.errstate(over="ignore"):
        scores: Floats = np.divide(1, 1 + np.exp(-logits), dtype=np.float32)
    return scores


def logits_column(task: TaskOrder, logits: Floats) -> Column:
    """What a task's own logits (rows, labels) say, by the kind of answer that its manifest names."""
    every_score = bool(task.spec.get("scores"))
    match task.manifest.answers:
        case "label":
            return abstaining(label_column(logits, every_score=every_score), task)
        case "labels":
            return labels_column(logits, task.manifest.thresholds, every_score=every_score)
        case "number":
            return number_column(logits)
        case other:
            raise ValueError(f"a model with logits cannot answer {other}")
