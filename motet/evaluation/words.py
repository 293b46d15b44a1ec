"""Figures in words, alike in the summary, the terminal and the page. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from motet.evaluation.figures import LOSSES, SHARES, Comparison, Difference, TaskEvaluation
from motet.evaluation.intervals import Estimate

NAMES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "token_f1": "word F1",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "pearson": "Pearson's r",
}


def summary(task: TaskEvaluation) -> str:
    """A task in a line."""
    parts = [rows_words(task)]
    for name, estimate in task.figures.items():
        parts.append(
            f"{NAMES[name]} {figure_words(name, estimate.value)} {interval_words(name, estimate)}".rstrip()
        )
    if task.calibration is not None:
        parts.append(f"calibration error {task.calibration.ece:.3f}")
    return f"{task.task}: {' · '.join(parts)}"


def beside(found: Comparison) -> str:
    """A comparison in a few lines."""
    lines = [f"{found.first} beside {found.second}, {found.rows:,} rows"]
    for name, d in found.figures.items():
        first, second = figure_words(name, d.first), figure_words(name, d.second)
        lines.append(f"  {NAMES[name]}: {first} beside {second}, {difference_words(name, d)}")
    return "\n".join([*lines, f"  {verdict(found)}"])


def figure_words(name: str, value: float | None) -> str:
    """``97.4 %`` of a share of rows, ``0.913`` of another figure."""
    if value is None:
        return "–"
    if name in SHARES:
        return f"{100 * value:.1f} %"
    # An error is in the unit of the labels, and so of any size; all else is at most 1.
    return f"{value:.4g}" if name in LOSSES else f"{value:.3f}"


def interval_words(name: str, estimate: Estimate) -> str:
    """``[95.2, 99.1]``; nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (figure_words(name, end).removesuffix(" %") for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def difference_words(name: str, difference: Difference) -> str:
    """``+1.2 points [-0.3, +2.8]`` of a share of rows, ``+0.012 [-0.004, +0.031]`` of another figure."""
    found = difference.difference
    if found.value is None:
        return "–"
    scale, form = (100, "+.1f") if name in SHARES else (1, "+.4g") if name in LOSSES else (1, "+.3f")
    words = f"{scale * found.value:{form}}" + (" points" if name in SHARES else "")
    if found.low is None or found.high is None:
        return words
    return f"{words} [{scale * found.low:{form}}, {scale * found.high:{form}}]"


def rows_words(task: TaskEvaluation) -> str:
    """``2,225 rows · 3 errors · 40 without a label``."""
    counts = (
        (task.errors, "error" if task.errors == 1 else "errors"),
        (task.skipped, "skipped"),
        (task.unread, "without a label in the answer"),
        (task.unlabelled, "left out, without a true label"),
    )
    rows = f"{task.rows:,} {'row' if task.rows == 1 else 'rows'}"
    return " · ".join([rows, *(f"{n:,} {words}" for n, words in counts if n)])


def verdict(found: Comparison) -> str:
    """What a comparison says of who is right."""
    if found.p is None or found.only_first is None or found.only_second is None:
        return "An interval of the difference that holds 0 tells neither apart from chance."
    p = f"{found.p:.3f}" if found.p >= 0.001 else f"{found.p:.1e}"
    return (
        f"Only {found.first} is right on {found.only_first:,} rows, only {found.second} on {found.only_second:,};"
        f" were both as good, a difference so large had a chance of {p} (McNemar's exact test)."
    )
