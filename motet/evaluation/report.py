"""A page of its own about evaluations: figures, confusion matrices, reliability diagrams, two tasks side by side. Pure.

It holds labels and numbers, and no text of a row. This file chooses what is told; motet/pages/report.html draws it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from motet.evaluation import words
from motet.evaluation.figures import Comparison, TaskEvaluation
from motet.evaluation.measures import Confusion
from motet.pages import environment
from motet.tasks import short

#: Labels that a matrix draws; the others, the rarest, are drawn as one.
MOST_LABELS = 24
#: Characters of a label in a picture.
_LABEL = 18


def page(
    evaluations: Sequence[tuple[str, Collection[TaskEvaluation]]], comparisons: Sequence[Comparison] = ()
) -> str:
    """The whole page: comparisons first, then every task of every evaluation, which is given with its title."""
    several = len(evaluations) > 1
    template = environment().get_template("report.html")
    return template.render(
        words=words,
        names=" and ".join(title for title, _ in evaluations),
        comparisons=comparisons,
        grouped=any(task.groups for _, tasks in evaluations for task in tasks),
        tasks=[_task(task, title if several else "") for title, tasks in evaluations for task in tasks],
    )


def _task(task: TaskEvaluation, job: str) -> dict[str, Any]:
    """What the template tells of a task."""
    about = [
        task.model,
        f"labels {task.label_field}" if task.label_field != task.task else "",
        task.counted,
    ]
    figures = [
        (words.figure_name(name), words.figure_words(name, e.value), words.interval_words(name, e))
        for name, e in task.figures.items()
    ]
    scored = task.calibration
    if scored is not None:
        figures.append(("calibration error", f"{scored.ece:.3f}", f"of {scored.rows:,} scores"))
    figures += [
        (f"field {short(key)} right", words.share_words(share), "") for key, share in task.fields.items()
    ]
    return {
        "title": f"{task.task} · {job}" if job else task.task,
        "about": " · ".join(filter(None, about)),
        "warnings": task.warnings,
        "figures": figures,
        "matrix": None if task.confusion is None else _matrix(task.confusion),
        "calibration": scored,
        "labels": task.labels,
    }


# -- who was taken for whom


@dataclass(frozen=True, slots=True)
class _Cell:
    """Rows of one label that were given another, or the same."""

    rows: int
    css: str
    words: str
    #: Opacity: the share of the label's rows, and enough of it for a few of many to be seen.
    strength: float

    @property
    def brief(self) -> str:
        n = self.rows
        return f"{n}" if n < 10_000 else f"{n / 1000:.0f}k" if n < 1_000_000 else f"{n / 1e6:.1f}M"


def _matrix(found: Confusion) -> dict[str, Any]:
    """Sizes in pixels and cells of a confusion matrix, for the template."""
    labels, counts = _drawn(found)
    columns = [*labels, "no answer"] if any(row[-1] for row in counts) else labels
    side = 46 if len(labels) <= 8 else 36 if len(labels) <= 14 else 28
    longest = max(len(short(label, _LABEL)) for label in columns)
    left, top = 7 * longest + 14, 5 * longest + 26
    return {
        "labels": len(found.labels),
        "columns": [short(name, _LABEL) for name in columns],
        "rows": [
            {
                "label": label,
                "short": short(label, _LABEL),
                "cells": [_cell(i, j, labels, answer, counts[i]) for j, answer in enumerate(columns)],
            }
            for i, label in enumerate(labels)
        ],
        "side": side,
        "left": left,
        "top": top,
        "width": left + side * len(columns) + 5 * longest,
        "height": top + side * len(labels) + 24,
    }


def _cell(i: int, j: int, labels: Sequence[str], answer: str, counts: Sequence[int]) -> _Cell:
    n, total = counts[j], sum(counts)
    css = "none" if j == len(labels) else "right" if i == j else "wrong"
    said = f"{n:,} of {total:,} rows of {labels[i]}: {answer}"
    return _Cell(n, css, said, 0.12 + 0.88 * (n / total if total else 0.0))


def _drawn(found: Confusion) -> tuple[list[str], list[list[int]]]:
    """The labels that occur, or the most frequent of them with the others as one; counts of them."""
    n = len(found.labels)
    often = [sum(row) + sum(other[i] for other in found.counts) for i, row in enumerate(found.counts)]
    there = [i for i in range(n) if often[i]]
    kept = there
    if len(there) > MOST_LABELS:
        kept = sorted(sorted(there, key=lambda i: -often[i])[: MOST_LABELS - 1])
    place = {i: k for k, i in enumerate(kept)}
    rest = len(kept)
    size = rest + (len(there) > rest)
    counts = [[0] * (size + 1) for _ in range(size)]
    for i in there:
        for j, count in enumerate(found.counts[i]):
            if count:
                counts[place.get(i, rest)][size if j == n else place.get(j, rest)] += count
    labels = [found.labels[i] for i in kept]
    return labels + ([f"{len(there) - rest} others"] if size > rest else []), counts
