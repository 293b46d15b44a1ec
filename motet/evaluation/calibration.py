"""Whether scores are what they seem: of the answers with a score of 0.8, are 80 % right? Pure; numpy alone.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017: https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: As many as in the paper.
BINS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers whose score is above ``low`` and at most ``high``; the first bin has 0 too."""

    low: float
    high: float
    rows: int
    #: Mean score, and the share that is right; 0 in an empty bin.
    score: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Scores beside the share that is right, in bins of equal width."""

    #: Expected calibration error: the gap between score and accuracy, averaged over the answers.
    ece: float
    #: The largest gap of a bin that is not empty.
    largest_gap: float
    #: Answers with a score.
    rows: int
    bins: tuple[Bin, ...]


def calibration(scores: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS) -> Calibration:
    """Put scores from 0 to 1 into bins beside whether each answer is right. Raises ValueError for other scores."""
    said, hit = np.asarray(scores, np.float64), np.asarray(right, np.float64)
    if said.shape != hit.shape or not said.size:
        raise ValueError(f"got {said.size} scores of {hit.size} answers; expected as many, and one at least")
    # fp32 may bring a probability a little above 1.
    if not (said >= -1e-5).all() or not (said <= 1 + 1e-5).all():
        raise ValueError("got a score outside 0 to 1; expected probabilities")
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, said, side="left") - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    least_one = np.maximum(rows, 1)
    score = np.bincount(place, said, bins) / least_one
    accuracy = np.bincount(place, hit, bins) / least_one
    gaps = np.abs(score - accuracy)
    return Calibration(
        ece=float(rows @ gaps / rows.sum()),
        largest_gap=float(gaps.max()),
        rows=int(rows.sum()),
        bins=tuple(
            Bin(
                low=float(edges[i]),
                high=float(edges[i + 1]),
                rows=int(rows[i]),
                score=float(score[i]),
                accuracy=float(accuracy[i]),
            )
            for i in range(bins)
        ),
    )
