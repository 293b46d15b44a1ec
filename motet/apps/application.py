"""What an application is, what it is asked, and what comes out: data alone. Neighbours: ``run`` plays it, ``scores`` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motet.apps.data.files import DataFile
from motet.datasets import Archive
from motet.demo.stage import StagedCluster
from motet.evaluation.intervals import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How an application shall run."""

    #: Where it writes its pictures and results; it is there.
    folder: Path
    #: Fewer rows, above all for a language model: minutes become one or two. Scores stay scores of what ran.
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A figure of answers beside the truth, and beside what is to be had without them."""

    #: What was answered, such as ``intent, of the last 7 turns``.
    name: str
    #: The figure, as `motet evaluate` calls it: ``accuracy``, ``macro F1``, ``AUC``, ``HR@10`` …
    figure: str
    #: Test rows, none of which was learned from.
    rows: int
    estimate: Estimate
    #: The same figure of honest rivals on the same rows, by name.
    baselines: Mapping[str, Estimate] = field(default_factory=dict)
    #: What a test may demand of the figure on the whole data; None: nothing.
    floor: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "figure": self.figure,
            "rows": self.rows,
            **_told(self.estimate),
            "baselines": {name: _told(one) for name, one in self.baselines.items()},
            "floor": self.floor,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOutcome:
    """What an application measured."""

    scores: tuple[Score, ...] = ()
    #: What has no truth to be measured by -> why, in words.
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    #: Other figures, for the JSON: rows, seconds, tokens.
    measured: Mapping[str, Any] = field(default_factory=dict)
    #: Files that it drew or wrote.
    files: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": [score.to_json() for score in self.scores],
            "unmeasured": dict(self.unmeasured),
            "measured": dict(self.measured),
            "files": [str(path) for path in self.files],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One application, as its module ends in it."""

    run: Callable[[StagedCluster, RunOptions], AppOutcome]
    #: What is registered beside the models that motet ships: arguments of `motet models add`, a line each.
    registers: tuple[str, ...] = ()
    #: Settings of its cluster's processes, by the names of their variables.
    settings: Mapping[str, str] = field(default_factory=dict)
    #: Modules without which it cannot run -> the packages that bring them.
    needs: Mapping[str, str] = field(default_factory=dict)
    #: What it reads that is fetched once, so that what is missing is said before anything starts.
    data: tuple[Archive | DataFile, ...] = ()
    #: Plays on after ``run`` until it is told to stop; None where there is nothing live.
    live: Callable[[StagedCluster, RunOptions], None] | None = None


def _told(estimate: Estimate) -> dict[str, float | None]:
    return {
        name: None if value is None else round(value, 4)
        for name, value in (("value", estimate.value), ("low", estimate.low), ("high", estimate.high))
    }
