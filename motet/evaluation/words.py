"""Figures in words, alike in the summary, the terminal and the page. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from motet.evaluation.intervals import Estimate
from motet.evaluation.measures import LOSSES, SHARES

_NAMES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "token_f1": "word F1",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "pearson": "Pearson's r",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "ks": "Kolmogorov–Smirnov",
    "cost": "mean cost of a row",
}
#: Names of figures that end with a number, and the words for them.
_NUMBERED: Mapping[str, str] = {
    "precision_top_": "precision of the top {} %",
    "recall_top_": "recall of the top {} %",
    "hit_rate_at_": "HR@{}",
    "ndcg_at_": "NDCG@{}",
}
#: Of those, the ones that are shares.
_SHARES = ("precision_top_", "recall_top_", "hit_rate_at_")


def figure_name(name: str) -> str:
    """``macro-F1``, ``precision of the top 5 %``."""
    for start, words in _NUMBERED.items():
        if name.startswith(start):
            return words.format(name.removeprefix(start))
    return _NAMES[name]


def _is_share(name: str) -> bool:
    return name in SHARES or name.startswith(_SHARES)


def figure_words(name: str, value: float | None) -> str:
    """``97.4 %`` of a share of rows, ``0.913`` of another figure."""
    if value is None:
        return "–"
    if _is_share(name):
        return share_words(value)
    # An error is in the unit of the labels, and so of any size; all else is at most 1.
    return f"{value:.4g}" if name in LOSSES else f"{value:.3f}"


def share_words(value: float | None) -> str:
    """``97.4 %``."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval_words(name: str, estimate: Estimate) -> str:
    """``[95.2, 99.1]``; nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (figure_words(name, end).removesuffix(" %") for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def difference_words(name: str, found: Estimate) -> str:
    """``+1.2 points [-0.3, +2.8]`` of a share of rows, ``+0.012 [-0.004, +0.031]`` of another figure."""
    if found.value is None:
        return "–"
    scale, form = (100, "+.1f") if _is_share(name) else (1, "+.4g") if name in LOSSES else (1, "+.3f")
    words = f"{scale * found.value:{form}}" + (" points" if _is_share(name) else "")
    if found.low is None or found.high is None:
        return words
    return f"{words} [{scale * found.low:{form}}, {scale * found.high:{form}}]"
