"""Pictures of applications as SVG, from one template (motet/pages/chart.svg): panels side by side, of lines, bars or a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from motet.evaluation import Estimate, TaskEvaluation
from motet.pages import COLOURS, environment

#: Pixels: the plot of a panel, and the room left of, above and below it.
_WIDTH, _HEIGHT, _LEFT, _TOP, _FOOT, _GAP = 340, 230, 70, 64, 56, 40
#: Pixels: the longest bar, and a letter of a label.
_BAR, _LETTER = 300, 6.8


@dataclass(frozen=True, slots=True)
class Lines:
    """Values over x: name of a line -> its (x, y) points, in order of x."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    x: str = ""
    y: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """Estimates beside each other, each with its interval."""

    title: str
    bars: Mapping[str, Estimate]
    #: The first one is what was made, in colour; the others stand beside it for comparison, in grey.
    rivals: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """How often what is true of a line was answered with what is true of a column: ``counts[line][column]``."""

    title: str
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    rows: str = "true"
    columns: str = "answered"


Panel = Lines | Bars | Matrix


def draw(path: Path, title: str, panels: Sequence[Panel]) -> Path:
    """Write the picture to ``path`` (.svg) and return it. Raises SetupError without Jinja2."""
    drawn, left = [], 0.0
    for panel in panels:
        one = _DRAWN[type(panel)](panel)
        drawn.append({**one, "left": left})
        left += one["width"] + _GAP
    height = max(one["height"] for one in drawn)
    template = environment().get_template("chart.svg")
    path.write_text(template.render(title=title, panels=drawn, width=left, height=height), "utf-8")
    return path


def matrix_of(task: TaskEvaluation, most: int) -> list[Matrix]:
    """The confusion matrix of a task's ``most`` frequent labels; nothing where it has none."""
    if task.confusion is None:
        return []
    frequent = sorted(task.labels, key=lambda label: -label.support)[:most]
    at = [task.confusion.labels.index(one.label) for one in frequent]
    counts = [[task.confusion.counts[i][j] for j in at] for i in at]
    title = f"{task.task}: the {len(at)} most frequent of {len(task.labels)} labels"
    return [Matrix(title, [one.label for one in frequent], counts)]


def _lines(panel: Lines) -> dict[str, Any]:
    points = [point for line in panel.lines.values() for point in line]
    x = _Scale([one for one, _ in points], _LEFT, _LEFT + _WIDTH)
    y = _Scale([one for _, one in points], _TOP + _HEIGHT, _TOP, rounded=True)
    return {
        "kind": "lines",
        "title": panel.title,
        "x": panel.x,
        "y": panel.y,
        "across": x.levels(),
        "up": y.levels(),
        "box": (_LEFT, _TOP, _LEFT + _WIDTH, _TOP + _HEIGHT),
        "lines": [
            {"name": name, "colour": at % COLOURS, "points": [(x.of(a), y.of(b)) for a, b in line]}
            for at, (name, line) in enumerate(panel.lines.items())
            if line
        ],
        "width": _LEFT + _WIDTH,
        "height": _TOP + _HEIGHT + _FOOT + 16 * len(panel.lines),
    }


def _bars(panel: Bars) -> dict[str, Any]:
    known = {name: one for name, one in panel.bars.items() if one.value is not None}
    ends = [0.0, *(e for one in known.values() for e in (one.value, one.high) if e is not None)]
    left = 24 + _words_px(known)
    x = _Scale(ends, left, left + _BAR, rounded=True)
    bars = [
        {
            "name": name,
            "colour": COLOURS - 1 if panel.rivals and at else at % COLOURS,
            "y": _TOP + 30 * at,
            "from": x.of(0.0),
            "to": x.of(one.value or 0.0),
            "interval": None if one.low is None or one.high is None else (x.of(one.low), x.of(one.high)),
            "words": f"{one.value:.3f}",
        }
        for at, (name, one) in enumerate(known.items())
    ]
    foot = _TOP + 30 * len(bars)
    return {
        "kind": "bars",
        "title": panel.title,
        "across": x.levels(),
        "box": (left, _TOP - 8, left + _BAR, foot),
        "bars": bars,
        "width": left + _BAR + 50,
        "height": foot + _FOOT,
    }


def _matrix(panel: Matrix) -> dict[str, Any]:
    most = max((max(line, default=0) for line in panel.counts), default=0) or 1
    n = len(panel.labels)
    side = max(12, min(40, 300 // max(n, 1)))
    left = 24 + _words_px(panel.labels)
    top = _TOP + _words_px(panel.labels)
    return {
        "kind": "matrix",
        "title": panel.title,
        "rows": panel.rows,
        "columns": panel.columns,
        "side": side,
        "cells": [
            {
                "x": left + side * j,
                "y": top + side * i,
                "depth": round(count / most, 3),
                "right": i == j,
                "words": str(count) if side >= 24 and count else "",
            }
            for i, line in enumerate(panel.counts)
            for j, count in enumerate(line)
        ],
        "labels": [
            {"name": name, "at": side * i + side / 2 + 4, "left": left, "top": top}
            for i, name in enumerate(panel.labels)
        ],
        "width": left + side * n + 0.5 * _words_px(panel.labels),
        "height": top + side * n + 20,
    }


def _words_px(words: Iterable[str]) -> float:
    """The room that the longest of these takes."""
    return max((_LETTER * len(one) for one in words), default=0.0)


_DRAWN: Mapping[type, Any] = {Lines: _lines, Bars: _bars, Matrix: _matrix}


class _Scale:
    """Values to pixels."""

    def __init__(
        self, values: Sequence[float], low_px: float, high_px: float, *, rounded: bool = False
    ) -> None:
        """``rounded``: it begins and ends at a round value, so that a line of the grid stands at either end."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if high <= low:
            high = low + 1.0
        rough = (high - low) / 5
        power = 10.0 ** floor(log10(rough))
        self._step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        if rounded:
            low, high = (
                self._step * floor(low / self._step + 1e-9),
                self._step * ceil(high / self._step - 1e-9),
            )
        self._low, self._high = low, high
        self._from, self._to = low_px, high_px

    def of(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return round(self._from + share * (self._to - self._from), 1)

    def levels(self) -> list[tuple[str, float]]:
        """Round values with their places, two to seven of them."""
        steps = range(ceil(self._low / self._step - 1e-9), floor(self._high / self._step + 1e-9) + 1)
        return [(f"{n * self._step:.3g}", self.of(n * self._step)) for n in steps]
