"""One task's answers beside the truth: its figures with their intervals, and two tasks side by side. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from motet.errors import InvalidJob
from motet.evaluation.answered import RIGHT_OR_WRONG, Answered, AnswerKind, right_rows, sampled
from motet.evaluation.calibration import Calibration, calibration
from motet.evaluation.intervals import (
    RESAMPLES,
    SEED,
    Estimate,
    mcnemar,
    wilson,
)
from motet.evaluation.measures import (
    SHARES,
    Confusion,
    LabelFigures,
    all_labels,
    confusion,
    figures_of_counts,
    folded,
    label_figures,
    same_json,
    set_figures,
)
from motet.evaluation.words import difference_words, figure_name, figure_words, interval_words
from motet.words import count


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvaluation:
    """How well one task answered."""

    #: The job's id.
    job: str = ""
    task: str
    #: The field of the labels that it was compared with.
    label_field: str
    #: The model, as ``name@version``.
    model: str = ""
    kind: AnswerKind
    #: Rows that have a label; the figures are of these.
    rows: int
    #: Rows without a label, left out.
    unlabelled: int
    #: Cells that are errors, or were skipped. They count as wrong, or have the worst rank; the errors of numbers, which
    #: are not right or wrong, leave them out.
    errors: int
    skipped: int
    #: Texts in which no label could be read. They count as wrong.
    unread: int
    #: Groups of rows that intervals resample; 0 where they resample rows.
    groups: int = 0
    #: Rows that are positive, where scores are beside a binary truth; else None.
    positive: int | None = None
    #: Name -> figure with its interval: FIGURES says which, and those that were asked for behind them.
    figures: Mapping[str, Estimate]
    #: Each label for itself; for kinds that have labels.
    labels: tuple[LabelFigures, ...] = ()
    #: For ``label`` alone.
    confusion: Confusion | None = None
    #: Where the answers have scores.
    calibration: Calibration | None = None
    #: For ``json``: field of the true object -> the share of rows in which it is right.
    fields: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    answered: Answered = field(repr=False, compare=False)

    @property
    def accuracy(self) -> float | None:
        """The share of rows that are right; for several labels, spans, texts and JSON, right as a whole. None for
        numbers."""
        return next((e.value for name, e in self.figures.items() if name in SHARES), None)

    @property
    def macro_f1(self) -> float | None:
        """The mean F1 of all labels that occur; None where there are no labels."""
        found = self.figures.get("macro_f1")
        return None if found is None else found.value

    def compare(self, other: TaskEvaluation, *, resamples: int = RESAMPLES, seed: int = SEED) -> Comparison:
        """This task and another one, of this job or another, that answered the same rows. Raises InvalidJob."""
        return compare(self, other, resamples=resamples, seed=seed)

    @property
    def counted(self) -> str:
        """``2,225 rows · 3 errors · 40 without a label``."""
        counts = (
            (self.errors, "error" if self.errors == 1 else "errors"),
            (self.skipped, "skipped"),
            (self.unread, "without a label in the answer"),
            (self.unlabelled, "left out, without a true label"),
        )
        rows = count(self.rows, "row")
        if self.groups:
            rows += f" in {self.groups:,} groups"
        if self.positive is not None:
            rows += f", {self.positive:,} of them positive"
        return " · ".join([rows, *(f"{n:,} {words}" for n, words in counts if n)])

    def __str__(self) -> str:
        parts = [self.counted]
        for name, estimate in self.figures.items():
            words = (
                f"{figure_name(name)} {figure_words(name, estimate.value)} {interval_words(name, estimate)}"
            )
            parts.append(words.rstrip())
        if self.calibration is not None:
            parts.append(f"calibration error {self.calibration.ece:.3f}")
        return f"{self.task}: {' · '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "answered"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One figure of two tasks."""

    first: float | None
    second: float | None
    #: First minus second.
    difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two tasks on the same rows. An interval of a difference that does not hold 0 tells them apart."""

    #: Their names, with the job where they are of two.
    first: str
    second: str
    #: Rows behind the figures; for numbers only rows that both tasks answered.
    rows: int
    figures: Mapping[str, Difference]
    #: Rows that only the first has right, and only the second; None where rows are not right or wrong.
    only_first: int | None
    only_second: int | None
    #: Of McNemar's exact test; None where rows are not right or wrong, and where they come in groups: it takes them for
    #: independent.
    p: float | None
    #: Groups of rows that intervals resample; 0 where they resample rows.
    groups: int = 0

    @property
    def verdict(self) -> str:
        """Which of the two is right more often, and whether that may be chance."""
        if self.only_first is not None and self.only_second is not None and self.groups:
            return (
                f"Only {self.first} is right on {self.only_first:,} rows, only {self.second} on"
                f" {self.only_second:,}. Rows of one group are not independent: there is no McNemar's test, and an"
                " interval of the difference that holds 0 tells neither apart from chance."
            )
        if self.p is None or self.only_first is None or self.only_second is None:
            return "An interval of the difference that holds 0 tells neither apart from chance."
        p = f"{self.p:.3f}" if self.p >= 0.001 else f"{self.p:.1e}"
        return (
            f"Only {self.first} is right on {self.only_first:,} rows, only {self.second} on {self.only_second:,};"
            f" were both as good, a difference so large had a chance of {p} (McNemar's exact test)."
        )

    def __str__(self) -> str:
        groups = f" in {self.groups:,} groups" if self.groups else ""
        lines = [f"{self.first} beside {self.second}, {self.rows:,} rows{groups}"]
        for name, d in self.figures.items():
            first, second = figure_words(name, d.first), figure_words(name, d.second)
            lines.append(
                f"  {figure_name(name)}: {first} beside {second}, {difference_words(name, d.difference)}"
            )
        return "\n".join([*lines, f"  {self.verdict}"])

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def measure(
    answered: Answered,
    *,
    job: str = "",
    task: str = "",
    label_field: str = "",
    model: str = "",
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> TaskEvaluation:
    """Everything that can be said of these answers. Raises ValueError where there is no row."""
    if not answered.truth:
        raise ValueError("got no row with a label; expected one at least")
    figures: dict[str, Estimate] = {}
    for view in (answered, *answered.views):
        (values,), intervals = sampled((view,), resamples, seed)
        # A group is one draw, so that rows in groups say no more than so many rows.
        independent = len(set(view.groups)) or len(view.truth)
        figures |= {
            name: _estimate(name, value, interval, independent)
            for name, value, interval in zip(view.figure_names, values, intervals, strict=True)
        }
    scored, warnings = _calibrated(answered)
    return TaskEvaluation(
        job=job,
        task=task,
        label_field=label_field,
        model=model,
        kind=answered.kind,
        rows=len(answered.truth),
        unlabelled=answered.unlabelled,
        errors=answered.errors,
        skipped=answered.skipped,
        unread=answered.unread,
        groups=len(set(answered.groups)),
        positive=next(
            (sum(view.truth) for view in (answered, *answered.views) if view.kind == "binary"), None
        ),
        figures=figures,
        labels=_labels(answered),
        confusion=confusion(answered.truth, answered.answers, answered.labels)
        if answered.kind == "label"
        else None,
        calibration=scored,
        fields=_fields(answered) if answered.kind == "json" else {},
        warnings=(*answered.warnings, *warnings),
        answered=answered,
    )


def compare(
    first: TaskEvaluation, second: TaskEvaluation, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Comparison:
    """Two tasks on the same rows: a paired bootstrap of each difference, and McNemar's test of who is right.

    Raises InvalidJob where they did not answer the same question on the same rows.
    """
    shared = _shared_views(first, second)
    pairs = [_both_answered(a, b) for a, b in shared]
    figures: dict[str, Difference] = {}
    for a, b in pairs:
        (values, others), intervals = sampled((a, b), resamples, seed)
        figures |= {
            name: Difference(
                first=_defined(x), second=_defined(y), difference=Estimate(_defined(x - y), *interval)
            )
            for name, x, y, interval in zip(a.figure_names, values, others, intervals, strict=True)
        }
    a, b = pairs[0]
    only_first = only_second = None
    if a.kind in RIGHT_OR_WRONG:
        right = list(zip(right_rows(a), right_rows(b), strict=True))
        only_first = sum(x and not y for x, y in right)
        only_second = sum(y and not x for x, y in right)
    return Comparison(
        first=_name(first, second),
        second=_name(second, first),
        rows=len(a.truth),
        figures=figures,
        only_first=only_first,
        only_second=only_second,
        p=mcnemar(only_first, only_second)
        if only_first is not None and only_second is not None and not a.groups
        else None,
        groups=len(set(a.groups)),
    )


def _both_answered(a: Answered, b: Answered) -> tuple[Answered, Answered]:
    """Of numbers only the rows that both have answered."""
    if a.kind != "number":
        return a, b
    both = [x is not None and y is not None for x, y in zip(a.answers, b.answers, strict=True)]
    return a.kept(both), b.kept(both)


def _shared_views(first: TaskEvaluation, second: TaskEvaluation) -> list[tuple[Answered, Answered]]:
    """What both can be compared by: answers of one kind, scores beside the same truth, costs. Raises InvalidJob."""
    theirs = {(view.kind, view.figure_names): view for view in _views(second)}
    shared = [
        (view, other) for view in _views(first) if (other := theirs.get((view.kind, view.figure_names)))
    ]
    if not shared:
        got, expected = f"{first.answered.kind} and {second.answered.kind}", "answers of one kind"
        remedy = "compare others; what was written is read as labels with as_labels (--as-labels TASK)"
    elif first.label_field != second.label_field:
        got = f"labels {first.label_field!r} and {second.label_field!r}"
        expected, remedy = "the same labels for both", "name the field of both (--task TASK=FIELD)"
    elif any(list(a.rows) != list(b.rows) or not all(map(_same_truth, a.truth, b.truth)) for a, b in shared):
        got, expected = "other rows or labels", "the same for both"
        remedy = "evaluate both with the same labels"
    elif any(list(a.groups) != list(b.groups) for a, b in shared):
        got, expected = "other groups", "the same groups of rows for both"
        remedy = "evaluate both with the same group"
    else:
        return shared
    raise InvalidJob.of(f"compare.{first.task} {second.task}", got, expected, remedy)


def _views(task: TaskEvaluation) -> tuple[Answered, ...]:
    return (task.answered, *task.answered.views)


def _same_truth(one: Any, other: Any) -> bool:
    """Whether two true values are the same, but for how each of two models spells its labels."""
    if isinstance(one, str) and isinstance(other, str):
        return folded(one) == folded(other)
    if isinstance(one, frozenset) and isinstance(other, frozenset):
        return len(one) == len(other)
    return bool(one == other)


def _name(task: TaskEvaluation, beside: TaskEvaluation) -> str:
    return task.task if task.job == beside.job else f"{task.task} of {task.job}"


def _estimate(name: str, value: float, interval: tuple[float | None, float | None], rows: int) -> Estimate:
    if (name in SHARES or name.startswith("hit_rate_at_")) and value in (0.0, 1.0):
        # No resample of rows that are all right holds a wrong one, however few they are.
        interval = wilson(round(value * rows), rows)
    return Estimate(_defined(value), *interval)


# -- parts of an evaluation


def _labels(answered: Answered) -> tuple[LabelFigures, ...]:
    match answered.kind:
        case "label":
            return label_figures(answered.truth, answered.answers, answered.labels)
        case "labels":
            return set_figures(answered.truth, answered.answers, answered.labels)
        case "spans":
            right, said, there = Counter[str](), Counter[str](), Counter[str]()
            for t, a in answered.pairs():
                there.update(span[2] for span in t)
                said.update(span[2] for span in a or ())
                right.update(span[2] for span in t & (a or frozenset()))
            return figures_of_counts(all_labels(there, said, answered.labels), right, said, there)
        case _:
            return ()


def _calibrated(answered: Answered) -> tuple[Calibration | None, tuple[str, ...]]:
    """Scores beside whether they were right: of each answer, or of every label where there may be several."""
    scores: list[float] = []
    right: list[bool] = []
    for (t, a), score in zip(answered.pairs(), answered.scores, strict=False):
        if a is None or score is None:
            continue
        if isinstance(score, Mapping):
            scores += score.values()
            right += (label in t for label in score)
        else:
            scores.append(score)
            right.append(t == a)
    if not scores:
        return None, ()
    try:
        return calibration(scores, right), ()
    except ValueError:
        return None, ("its scores are not all from 0 to 1, so that they cannot be probabilities",)


def _fields(answered: Answered) -> dict[str, float]:
    """For each key of true objects the share of rows that have it in which the answer has the same there."""
    has, same = Counter[str](), Counter[str]()
    for t, a in answered.pairs():
        if isinstance(t, Mapping):
            has.update(map(str, t))
            said = a if isinstance(a, Mapping) else {}
            same.update(str(key) for key in t if key in said and same_json(t[key], said[key]))
    return {key: same[key] / n for key, n in has.items()}


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
