"""One task's answers beside the truth: its figures with their intervals, and two tasks side by side. Pure.

Whatever the kind of answer, a row is reduced to a pattern that all its figures depend on; figures are functions of how
often each pattern occurs. So one bootstrap serves every kind, and a pair of tasks as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import compress
from typing import Any, Literal, TypeAlias

import numpy as np

from motet.errors import InvalidJob, Problem
from motet.evaluation.calibration import Calibration, calibration
from motet.evaluation.intervals import (
    RESAMPLES,
    SEED,
    Estimate,
    bootstrap,
    mcnemar,
    percentiles,
    wilson,
)
from motet.evaluation.measures import (
    SHARES,
    Confusion,
    Float64s,
    LabelCounts,
    LabelFigures,
    NumberFigures,
    all_labels,
    confusion,
    figures_of_counts,
    folded,
    label_figures,
    normalised,
    same_json,
    set_figures,
    token_f1,
)
from motet.evaluation.words import NAMES, difference_words, figure_words, interval_words

#: What truth and answers are: a label; a set of labels; a set of (start, end, label); a number; a text; any JSON.
AnswerKind = Literal["label", "labels", "spans", "number", "text", "json"]

#: From how often each pattern occurs to the figures, in the order of FIGURES.
_Weigh: TypeAlias = "Callable[[Float64s], Float64s]"

#: The figures of each kind. The first says which share of the rows is right, but for numbers.
FIGURES: Mapping[AnswerKind, tuple[str, ...]] = {
    "label": ("accuracy", "macro_f1"),
    "labels": ("exact_match", "macro_f1", "micro_f1"),
    "spans": ("exact_match", "macro_f1", "micro_f1"),
    "number": ("mae", "rmse", "r2", "pearson"),
    "text": ("exact_match", "token_f1"),
    "json": ("exact_match",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a task said of the rows that have a label, and the label."""

    kind: AnswerKind
    #: Index of each row in the job.
    rows: Sequence[int]
    truth: Sequence[Any]
    #: None where there is no answer, or none that counts.
    answers: Sequence[Any]
    #: For ``label``: each answer's score, None where it has none. For ``labels`` with all scores: {label: score}.
    scores: Sequence[Any] = ()
    #: The labels that the model knows, in its order.
    labels: tuple[str, ...] = ()
    #: Of the rows: cells that are errors, that were skipped, and texts in which no label could be read.
    errors: int = 0
    skipped: int = 0
    unread: int = 0
    #: Rows of the job without a label, which are left out.
    unlabelled: int = 0
    #: What somebody should look at.
    warnings: tuple[str, ...] = ()


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
    #: Cells that are errors, or were skipped. They count as wrong; for numbers, which are not right or wrong, they
    #: are left out.
    errors: int
    skipped: int
    #: Texts in which no label could be read. They count as wrong.
    unread: int
    #: Name -> figure with its interval: FIGURES says which.
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
        rows = f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}"
        return " · ".join([rows, *(f"{n:,} {words}" for n, words in counts if n)])

    def __str__(self) -> str:
        parts = [self.counted]
        for name, estimate in self.figures.items():
            words = f"{NAMES[name]} {figure_words(name, estimate.value)} {interval_words(name, estimate)}"
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
    #: Rows that the figures are of; for numbers those that both have answered.
    rows: int
    figures: Mapping[str, Difference]
    #: Rows that only the first has right, and only the second; None for numbers.
    only_first: int | None
    only_second: int | None
    #: Of McNemar's exact test; None for numbers.
    p: float | None

    @property
    def verdict(self) -> str:
        """Which of the two is right more often, and whether that may be chance."""
        if self.p is None or self.only_first is None or self.only_second is None:
            return "An interval of the difference that holds 0 tells neither apart from chance."
        p = f"{self.p:.3f}" if self.p >= 0.001 else f"{self.p:.1e}"
        return (
            f"Only {self.first} is right on {self.only_first:,} rows, only {self.second} on {self.only_second:,};"
            f" were both as good, a difference so large had a chance of {p} (McNemar's exact test)."
        )

    def __str__(self) -> str:
        lines = [f"{self.first} beside {self.second}, {self.rows:,} rows"]
        for name, d in self.figures.items():
            first, second = figure_words(name, d.first), figure_words(name, d.second)
            lines.append(f"  {NAMES[name]}: {first} beside {second}, {difference_words(name, d.difference)}")
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
    (values,), intervals = _sampled((answered,), resamples, seed)
    figures = {
        name: _estimate(name, value, interval, len(answered.truth))
        for name, value, interval in zip(FIGURES[answered.kind], values, intervals, strict=True)
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
    a, b = first.answered, second.answered
    _check_comparable(first, second)
    if a.kind == "number":
        both = [x is not None and y is not None for x, y in zip(a.answers, b.answers, strict=True)]
        a, b = _kept(a, both), _kept(b, both)
    (values, others), intervals = _sampled((a, b), resamples, seed)
    right = [_right(side) for side in (a, b)]
    only_first = sum(x and not y for x, y in zip(*right, strict=True))
    only_second = sum(y and not x for x, y in zip(*right, strict=True))
    counted = a.kind != "number"
    return Comparison(
        first=_name(first, second),
        second=_name(second, first),
        rows=len(a.truth),
        figures={
            name: Difference(
                first=_defined(x), second=_defined(y), difference=Estimate(_defined(x - y), *interval)
            )
            for name, x, y, interval in zip(FIGURES[a.kind], values, others, intervals, strict=True)
        },
        only_first=only_first if counted else None,
        only_second=only_second if counted else None,
        p=mcnemar(only_first, only_second) if counted else None,
    )


def _check_comparable(first: TaskEvaluation, second: TaskEvaluation) -> None:
    a, b = first.answered, second.answered
    if a.kind != b.kind:
        got, expected = f"{a.kind} and {b.kind}", "answers of one kind"
        remedy = "compare others; what was written is read as labels with as_labels (--as-labels TASK)"
    elif first.label_field != second.label_field:
        got = f"labels {first.label_field!r} and {second.label_field!r}"
        expected, remedy = "the same labels for both", "name the field of both (--task TASK=FIELD)"
    elif list(a.rows) != list(b.rows) or not all(map(_same_truth, a.truth, b.truth)):
        got, expected = "other rows or labels", "the same for both"
        remedy = "evaluate both with the same labels"
    else:
        return
    raise InvalidJob(Problem(f"compare.{first.task} {second.task}", got, expected, remedy))


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
    if name in SHARES and value in (0.0, 1.0):
        # No resample of rows that are all right holds a wrong one, however few they are.
        interval = wilson(round(value * rows), rows)
    return Estimate(_defined(value), *interval)


# -- patterns of rows


def _sampled(
    sides: Sequence[Answered], resamples: int, seed: int
) -> tuple[list[Float64s], list[tuple[float | None, float | None]]]:
    """The figures of each side, and the intervals of the only side's figures or of the differences of two."""
    kind = sides[0].kind
    if kind == "number":
        sides = [_kept(side, [answer is not None for answer in side.answers]) for side in sides]
    if not sides[0].truth:
        undefined = np.full(len(FIGURES[kind]), np.nan)
        return [undefined for _ in sides], [(None, None) for _ in undefined]
    pattern, weigher = _KINDS[kind]
    found = Counter(
        zip(*([pattern(t, a) for t, a in zip(s.truth, s.answers, strict=True)] for s in sides), strict=True)
    )
    # In an order that is the same however the rows stand: what is drawn hangs on it.
    patterns, counts = zip(*sorted(found.items(), key=repr), strict=True)
    weighs = [weigher(column) for column in zip(*patterns, strict=True)]
    often = np.array(counts, np.int64)

    def figures(weights: Float64s) -> Float64s:
        return weighs[0](weights) if len(weighs) == 1 else weighs[0](weights) - weighs[1](weights)

    draws = bootstrap(figures, often, resamples=resamples, seed=seed)
    return [weigh(often.astype(np.float64)) for weigh in weighs], percentiles(draws)


def _weigh_items(patterns: Sequence[Any]) -> _Weigh:
    """Figures of sets of items, each of which has a label; (truth, answer) are tuples of (item, label)."""
    known = sorted({label for t, a in patterns for _, label in (*t, *(a or ()))})
    code = {label: number for number, label in enumerate(known)}
    whole = np.array([a is not None and t == a for t, a in patterns], np.float64)
    right = _Occurrences(
        ((i, code[m]) for i, (t, a) in enumerate(patterns) for _, m in {*t} & {*(a or ())}), len(code)
    )
    said = _Occurrences(((i, code[m]) for i, (_, a) in enumerate(patterns) for _, m in a or ()), len(code))
    there = _Occurrences(((i, code[m]) for i, (t, _) in enumerate(patterns) for _, m in t), len(code))

    def weigh(weights: Float64s) -> Float64s:
        counts = LabelCounts(right.count(weights), said.count(weights), there.count(weights))
        return np.array([weights @ whole / weights.sum(), counts.macro_f1(), counts.micro_f1()])

    return weigh


class _Occurrences:
    """Which label occurs in which pattern."""

    def __init__(self, pairs: Iterable[tuple[int, int]], labels: int) -> None:
        table = np.array(list(pairs), np.int64).reshape(-1, 2)
        self._pattern, self._label, self._labels = table[:, 0], table[:, 1], labels

    def count(self, weights: Float64s) -> Float64s:
        """How often each label occurs, in patterns that occur so often."""
        return np.asarray(np.bincount(self._label, weights[self._pattern], self._labels), np.float64)


def _weigh_labels(patterns: Sequence[Any]) -> _Weigh:
    items = _weigh_items(patterns)
    return lambda weights: items(weights)[:2]


def _weigh_means(patterns: Sequence[Any]) -> _Weigh:
    """Figures that are means over rows."""
    table = np.array(patterns, np.float64)
    return lambda weights: weights @ table / weights.sum()


def _weigh_numbers(patterns: Sequence[Any]) -> _Weigh:
    truth, answers = np.array(patterns, np.float64).T
    return NumberFigures(truth, answers).of


def _label_pattern(truth: str, answer: str | None) -> Hashable:
    return ((truth, truth),), None if answer is None else ((answer, answer),)


def _labels_pattern(truth: Collection[str], answer: Collection[str] | None) -> Hashable:
    return tuple((m, m) for m in sorted(truth)), None if answer is None else tuple(
        (m, m) for m in sorted(answer)
    )


def _spans_pattern(truth: Collection[Any], answer: Collection[Any] | None) -> Hashable:
    def items(spans: Collection[Any]) -> Hashable:
        return tuple((span, span[2]) for span in sorted(spans))

    return items(truth), None if answer is None else items(answer)


def _text_pattern(truth: str, answer: str | None) -> Hashable:
    if answer is None:
        return False, 0.0
    return normalised(truth) == normalised(answer), token_f1(truth, answer)


def _json_pattern(truth: Any, answer: Any) -> Hashable:
    return (answer is not None and same_json(truth, answer),)


def _number_pattern(truth: float, answer: float | None) -> Hashable:
    return truth, answer


_KINDS: Mapping[AnswerKind, tuple[Callable[[Any, Any], Hashable], Callable[[Sequence[Any]], _Weigh]]] = {
    "label": (_label_pattern, _weigh_labels),
    "labels": (_labels_pattern, _weigh_items),
    "spans": (_spans_pattern, _weigh_items),
    "number": (_number_pattern, _weigh_numbers),
    "text": (_text_pattern, _weigh_means),
    "json": (_json_pattern, _weigh_means),
}


# -- parts of an evaluation


def _right(answered: Answered) -> list[bool]:
    """Whether each row is right as a whole."""
    match answered.kind:
        case "text" | "json":
            pattern = _KINDS[answered.kind][0]
            return [bool(pattern(t, a)[0]) for t, a in _pairs(answered)]  # type: ignore[index]
        case _:
            return [a is not None and bool(t == a) for t, a in _pairs(answered)]


def _labels(answered: Answered) -> tuple[LabelFigures, ...]:
    match answered.kind:
        case "label":
            return label_figures(answered.truth, answered.answers, answered.labels)
        case "labels":
            return set_figures(answered.truth, answered.answers, answered.labels)
        case "spans":
            right, said, there = Counter[str](), Counter[str](), Counter[str]()
            for t, a in _pairs(answered):
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
    for (t, a), score in zip(_pairs(answered), answered.scores, strict=False):
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
    for t, a in _pairs(answered):
        if isinstance(t, Mapping):
            has.update(map(str, t))
            said = a if isinstance(a, Mapping) else {}
            same.update(str(key) for key in t if key in said and same_json(t[key], said[key]))
    return {key: same[key] / n for key, n in has.items()}


def _pairs(answered: Answered) -> Iterator[tuple[Any, Any]]:
    return zip(answered.truth, answered.answers, strict=True)


def _kept(answered: Answered, mask: Sequence[bool]) -> Answered:
    """Only the rows that are marked."""
    truth, answers, rows = (
        list(compress(column, mask)) for column in (answered.truth, answered.answers, answered.rows)
    )
    return replace(answered, truth=truth, answers=answers, rows=rows, scores=())


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
