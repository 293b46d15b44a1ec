"""Labelled rows: what people say is true of some texts, and how much of it a model answers. Imports no torch.

Rows come from a file of the user's, or, for the heads that motet ships, from the public texts that they were trained
and tested on (motet/datasets.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from motet import datasets
from motet.errors import SetupError
from motet.evaluation.measures import accuracy, near_share, r_squared, set_accuracy
from motet.protocol.columns import Column, values
from motet.protocol.manifest import Manifest
from motet.rows import whole_rows

#: A label, a set of labels, or a number.
Label = str | frozenset[str] | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Texts, each once, and by head what is true of each; None where nobody says."""

    texts: tuple[str, ...]
    truth: Mapping[str, tuple[Label | None, ...]]

    def known(self, head: str) -> list[int]:
        """The rows whose truth is known."""
        return [row for row, one in enumerate(self.truth[head]) if one is not None]


def gathered(found: Mapping[str, Mapping[str, Label]]) -> Labelled:
    """Labelled rows from texts with their truth, by head."""
    texts = tuple(sorted({text for one in found.values() for text in one}))
    return Labelled(
        texts=texts, truth={head: tuple(one.get(text) for text in texts) for head, one in found.items()}
    )


def of_shipped(heads: Sequence[Manifest]) -> tuple[Labelled, Labelled]:
    """(to learn from, held out) for those of the heads that motet ships; the split that they were trained with."""
    sides: tuple[dict[str, dict[str, Label]], ...] = ({}, {})
    for head in heads:
        rows = datasets.SHIPPED[head.name]() if head.name in datasets.SHIPPED else []
        # Another head may have the name of one of them.
        if rows and {label for row in rows for label in row.labels} <= set(head.labels):
            for side, part in zip(sides, datasets.split(rows), strict=True):
                side[head.name] = {row.text: _as_truth(sorted(row.labels), head) for row in part}
    learn, held = map(gathered, sides)
    return learn, held


def read_labelled(path: Path, fields: Mapping[str, str], heads: Sequence[Manifest], text: str) -> Labelled:
    """Rows of a file (JSONL, CSV, Parquet); ``fields`` says by head in which field its truth is.

    Raises SetupError or InvalidJob that name the row, counted from 0, and never a text.
    """
    found: dict[str, dict[str, Label]] = {head.name: {} for head in heads}
    for number, (row, _) in enumerate(whole_rows(path)):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or not isinstance(row.get(text), str):
            raise SetupError(f"{where}: got no text in {text!r}; expected one; name its field with --text")
        for head in heads:
            value = row.get(fields[head.name])
            if value is not None and value != "":
                found[head.name][row[text]] = _checked(value, head, f"{where}, {fields[head.name]!r}")
    for head in heads:
        if not found[head.name]:
            raise SetupError(
                f"{path}: no row has {fields[head.name]!r}, which --task names for {head.name}; name another field"
            )
    return gathered(found)


def _checked(value: Any, head: Manifest, where: str) -> Label:
    if head.answers == "number":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SetupError(f"{where}: got {type(value).__name__}; expected a finite number")
        return number
    given = value if isinstance(value, list) and head.answers == "labels" else [value]
    for label in given:
        if label not in head.labels:
            raise SetupError(
                f"{where}: got a label that {head.name} does not have; expected one of {', '.join(head.labels[:20])}"
            )
    return _as_truth(given, head)


def _as_truth(labels: Sequence[str], head: Manifest) -> Label:
    return frozenset(labels) if head.answers == "labels" else labels[0]


def decisions(column: Column, head: Manifest) -> list[Label | None]:
    """What a head decided by row, in the form of the truth; None where it could not answer."""
    of: Mapping[str, Callable[[Any], Label]] = {
        "label": lambda value: str(value[0]),
        "labels": lambda value: frozenset(label for label, _ in value),
        "number": float,
    }
    return [None if value is None else of[head.answers](value) for value in values(column, head.labels)]


def score(said: Sequence[Label | None], truth: Sequence[Label | None], head: Manifest) -> float:
    """Points, 100 at most, over the rows whose truth is known; a row without an answer is wrong.

    Of labels: accuracy (with several labels a row, over all pairs of row and label). Of numbers: the share of their
    variance that is explained.
    """
    pairs = [(s, t) for s, t in zip(said, truth, strict=True) if t is not None]
    if head.answers == "number":
        numbers = np.array([t for _, t in pairs], np.float64)
        # Without an answer, nothing better is known than their mean.
        answers = np.array([numbers.mean() if s is None else s for s, _ in pairs], np.float64)
        return 100 * r_squared(numbers, answers)
    return 100 * agreement([s for s, _ in pairs], [t for _, t in pairs], head)


def agreement(one: Sequence[Label | None], other: Sequence[Label | None], head: Manifest) -> float:
    """Share of equal decisions: of rows, of pairs of row and label, or of numbers that are nearly the same."""
    if head.answers == "labels":
        return set_accuracy(
            cast(Sequence[frozenset[str]], other), cast(Sequence[frozenset[str]], one), head.labels
        )
    if head.answers == "number":
        return near_share(np.array(other, np.float64), np.array(one, np.float64))
    return accuracy(cast(Sequence[str], other), one)
