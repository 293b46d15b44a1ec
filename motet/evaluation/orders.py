"""How well scores and lists put right things first: ROC AUC, average precision, hit rate, NDCG. Pure; numpy alone.

Where scikit-learn's ``sklearn.metrics`` has a figure, the formula is its own, with rows of one score taken together. A
row without an answer has the worst rank: its score is below every other one, its list is empty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from motet.evaluation.measures import Float64s


class OrderFigures:
    """Figures of the same scores however often each row counts: rows are sorted once, so that thousands are cheap."""

    def __init__(
        self, truth: Sequence[bool], scores: Sequence[float | None], top: Sequence[float] = ()
    ) -> None:
        """``top``: shares of the rows in per cent, each above 0 and at most 100."""
        if len(truth) != len(scores) or not len(truth):
            raise ValueError(
                f"got {len(truth)} true values and {len(scores)} scores; expected as many, and one at least"
            )
        said = np.array([-math.inf if score is None else score for score in scores], np.float64)
        if np.isnan(said).any():
            raise ValueError("got a score that is NaN; expected a number, or None where there is no answer")
        self._order = np.argsort(-said, kind="stable")
        said = said[self._order]
        #: Where each run of rows with one score begins.
        self._starts = np.flatnonzero(np.concatenate([[True], said[1:] != said[:-1]]))
        self._truth = np.asarray(truth, np.float64)[self._order]
        self._top = tuple(top)

    def of(self, weights: Float64s) -> Float64s:
        """ROC AUC, average precision, Kolmogorov–Smirnov, then precision and recall of each top share.

        NaN where a figure is not defined: without a positive row all but precision, without a negative one the first
        and the third.
        """
        weights = weights[self._order]
        rows = np.add.reduceat(weights, self._starts)
        there = np.add.reduceat(weights * self._truth, self._starts)
        hits, said = np.cumsum(there), np.cumsum(rows)
        positive, negative = hits[-1], said[-1] - hits[-1]
        auc = precision = gap = math.nan
        if positive > 0:
            precision = float((there * hits / np.maximum(said, 1)).sum() / positive)
        if positive > 0 and negative > 0:
            # A negative row is beaten by every positive one before it, and by half of those with its score.
            auc = float(((rows - there) * (hits - there / 2)).sum() / (positive * negative))
            gap = float(np.abs(hits / positive - (said - hits) / negative).max())
        tops = [figure for share in self._top for figure in _at_top(share, rows, there, hits, said)]
        return np.array([auc, precision, gap, *tops])


def _at_top(
    share: float, rows: Float64s, there: Float64s, hits: Float64s, said: Float64s
) -> tuple[float, float]:
    """Precision and recall of the first ``share`` per cent of the rows, rounded up to whole rows.

    Of rows with one score, of which only some fit in, the mean of all ways to choose them is taken.
    """
    taken = min(math.ceil(share / 100 * said[-1] - 1e-9), said[-1])
    last = int(np.searchsorted(said, taken))
    found = hits[last]
    if rows[last] > 0:
        found -= there[last] * (said[last] - taken) / rows[last]
    return float(found / taken), float(found / hits[-1]) if hits[-1] else math.nan


def roc_auc(truth: Sequence[bool], scores: Sequence[float | None]) -> float:
    """How likely a positive row has a higher score than a negative one; of the same score counts a half."""
    return float(OrderFigures(truth, scores).of(np.ones(len(truth)))[0])


def average_precision(truth: Sequence[bool], scores: Sequence[float | None]) -> float:
    """Σ (recall n - recall n-1) · precision n over all thresholds n, not interpolated."""
    return float(OrderFigures(truth, scores).of(np.ones(len(truth)))[1])


def kolmogorov_smirnov(truth: Sequence[bool], scores: Sequence[float | None]) -> float:
    """The largest distance of the distributions of positive and negative rows' scores."""
    return float(OrderFigures(truth, scores).of(np.ones(len(truth)))[2])


def precision_recall_at_top(
    truth: Sequence[bool], scores: Sequence[float | None], share: float
) -> tuple[float, float]:
    """Precision and recall of the ``share`` per cent of the rows with the highest scores."""
    _, _, _, precision, recall = OrderFigures(truth, scores, (share,)).of(np.ones(len(truth)))
    return float(precision), float(recall)


# -- lists


def hit_at(truth: Collection[str], answer: Sequence[str] | None, k: int) -> float:
    """1 if any true id is among the first ``k`` of the answer, else 0."""
    return float(any(_gains(truth, answer, k)))


def ndcg_at(truth: Collection[str], answer: Sequence[str] | None, k: int) -> float:
    """Normalised discounted cumulated gain of the first ``k``, of binary gains.

    Σ gain of rank r ÷ log2(r + 1), over the same sum of the best list there is, with the gain 1 of a true id and 0 of
    any other. Järvelin and Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, ACM TOIS 20(4), 2002, with the
    discount that is usual since Burges et al. (ICML 2005), as in scikit-learn.
    """
    gained = sum(1 / math.log2(rank + 1) for rank, gain in enumerate(_gains(truth, answer, k), 1) if gain)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(set(truth)), k) + 1))
    return gained / best


def _gains(truth: Collection[str], answer: Sequence[str] | None, k: int) -> Iterator[bool]:
    """Whether each of the first ``k`` ids is a true one. An id that comes again counts where it came first."""
    return (each in truth for each in [*dict.fromkeys(answer or ())][:k])
