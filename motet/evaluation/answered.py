"""Answers beside the truth, row by row, and what is drawn from them: patterns of rows, and figures of resampled rows. Pure.

Whatever the kind of answer, a row is reduced to a pattern that all its figures depend on; figures are functions of how
often each pattern occurs. So one bootstrap serves every kind, and a pair of tasks as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any, Literal, TypeAlias

import numpy as np

from motet.evaluation.intervals import bootstrap, percentiles
from motet.evaluation.measures import (
    Float64s,
    LabelCounts,
    NumberFigures,
    normalised,
    same_json,
    token_f1,
)
from motet.evaluation.orders import OrderFigures, hit_at, ndcg_at

#: What truth and answers are: a label; a set of labels; a set of (start, end, label); a number; a text; any JSON; true
#: or false, with a score; a set of ids, with a list of ids; a label, with what the answer costs.
AnswerKind = Literal["label", "labels", "spans", "number", "text", "json", "binary", "ranking", "cost"]

#: From how often each pattern occurs to the figures, in the order of FIGURES.
_Weigh: TypeAlias = "Callable[[Float64s], Float64s]"

#: The figures of each kind. The first says which share of the rows is right, where rows are right or wrong.
FIGURES: Mapping[AnswerKind, tuple[str, ...]] = {
    "label": ("accuracy", "macro_f1"),
    "labels": ("exact_match", "macro_f1", "micro_f1"),
    "spans": ("exact_match", "macro_f1", "micro_f1"),
    "number": ("mae", "rmse", "r2", "pearson"),
    "text": ("exact_match", "token_f1"),
    "json": ("exact_match",),
    "binary": ("roc_auc", "average_precision", "ks"),
    "ranking": (),
    "cost": ("cost",),
}
#: Kinds whose rows are right or wrong as a whole.
RIGHT_OR_WRONG = frozenset({"label", "labels", "spans", "text", "json"})


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
    #: Oddities of labels or scores, in words for the user.
    warnings: tuple[str, ...] = ()
    #: The group of each row, such as a customer; groups are resampled where there are any, and rows where not.
    groups: Sequence[str] = ()
    #: For ``binary``: shares of the rows in per cent, for precision and recall.
    top: tuple[float, ...] = ()
    #: For ``ranking``: lengths of lists.
    at: tuple[int, ...] = ()
    #: Other looks at the same rows, whose figures stand beside those of this one.
    views: tuple[Answered, ...] = ()

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Its figures in their order, without those of its views."""
        tops = (f"{figure}_top_{share:g}" for share in self.top for figure in ("precision", "recall"))
        lists = (f"{figure}_at_{k}" for k in self.at for figure in ("hit_rate", "ndcg"))
        return (*FIGURES[self.kind], *tops, *lists)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """The truth and the answer of each row."""
        return zip(self.truth, self.answers, strict=True)

    def kept(self, mask: Sequence[bool]) -> Answered:
        """Only the rows that are marked, without their scores."""
        truth, answers, rows, groups = (
            list(compress(column, mask)) for column in (self.truth, self.answers, self.rows, self.groups)
        )
        return replace(self, truth=truth, answers=answers, rows=rows, groups=groups, scores=())


def sampled(
    sides: Sequence[Answered], resamples: int, seed: int
) -> tuple[list[Float64s], list[tuple[float | None, float | None]]]:
    """The figures of each side, and the intervals of the only side's figures or of the differences of two."""
    kind = sides[0].kind
    if kind == "number":
        sides = [side.kept([answer is not None for answer in side.answers]) for side in sides]
    if not sides[0].truth:
        undefined = np.full(len(sides[0].figure_names), np.nan)
        return [undefined for _ in sides], [(None, None) for _ in undefined]
    pattern, weigher = _reduction(sides[0])
    rows = list(
        zip(*([pattern(t, a) for t, a in zip(s.truth, s.answers, strict=True)] for s in sides), strict=True)
    )
    found = Counter(rows)
    # Sorted, because the draws depend on the order of the patterns, and must not depend on that of the rows.
    patterns, counts = zip(*sorted(found.items(), key=repr), strict=True)
    weighs = [weigher(column) for column in zip(*patterns, strict=True)]
    often = np.array(counts, np.int64)

    def figures(weights: Float64s) -> Float64s:
        return weighs[0](weights) if len(weighs) == 1 else weighs[0](weights) - weighs[1](weights)

    if sides[0].groups:
        clusters = _Clusters(sides[0].groups, rows, patterns)
        draws = bootstrap(
            lambda weights: figures(clusters.weights(weights)), clusters.ones, resamples=resamples, seed=seed
        )
    else:
        draws = bootstrap(figures, often, resamples=resamples, seed=seed)
    return [weigh(often.astype(np.float64)) for weigh in weighs], percentiles(draws)


class _Clusters:
    """How often each pattern comes where whole groups are drawn: the cluster bootstrap.

    Groups are drawn with replacement, as many as there are, and each brings all its rows (Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 3.8). A resample has about as many rows, not as many.
    """

    def __init__(self, groups: Sequence[str], rows: Sequence[Hashable], patterns: Sequence[Hashable]) -> None:
        number = {group: i for i, group in enumerate(sorted(set(groups)))}
        code = {pattern: i for i, pattern in enumerate(patterns)}
        pairs = Counter((number[g], code[row]) for g, row in zip(groups, rows, strict=True))
        table = np.array([(*pair, n) for pair, n in sorted(pairs.items())], np.int64)
        self._group, self._pattern, self._rows = table.T
        self._patterns = len(patterns)
        #: Each group once.
        self.ones = np.ones(len(number), np.int64)

    def weights(self, drawn: Float64s) -> Float64s:
        """From how often each group is drawn to how often each pattern comes."""
        often = np.bincount(self._pattern, drawn[self._group] * self._rows, self._patterns)
        return np.asarray(often, np.float64)


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


def _binary_pattern(truth: bool, answer: float | None) -> Hashable:
    return truth, answer


def _weigh_order(patterns: Sequence[Any], top: Sequence[float]) -> _Weigh:
    truth, scores = zip(*patterns, strict=True)
    return OrderFigures(truth, scores, top).of


def _ranking_pattern(truth: Collection[str], answer: Sequence[str] | None, at: Sequence[int]) -> Hashable:
    return tuple(figure(truth, answer, k) for k in at for figure in (hit_at, ndcg_at))


def _cost_pattern(_truth: Any, cost: float) -> Hashable:
    return (cost,)


_KINDS: Mapping[AnswerKind, tuple[Callable[[Any, Any], Hashable], Callable[[Sequence[Any]], _Weigh]]] = {
    "label": (_label_pattern, _weigh_labels),
    "labels": (_labels_pattern, _weigh_items),
    "spans": (_spans_pattern, _weigh_items),
    "number": (_number_pattern, _weigh_numbers),
    "text": (_text_pattern, _weigh_means),
    "json": (_json_pattern, _weigh_means),
    "cost": (_cost_pattern, _weigh_means),
}


def _reduction(
    answered: Answered,
) -> tuple[Callable[[Any, Any], Hashable], Callable[[Sequence[Any]], _Weigh]]:
    """From truth and answer to a pattern, and from patterns to what weighs them."""
    match answered.kind:
        case "binary":
            return _binary_pattern, partial(_weigh_order, top=answered.top)
        case "ranking":
            return partial(_ranking_pattern, at=answered.at), _weigh_means
        case kind:
            return _KINDS[kind]


def right_rows(answered: Answered) -> list[bool]:
    """Whether each row is right as a whole."""
    match answered.kind:
        case "text" | "json":
            pattern = _KINDS[answered.kind][0]
            return [bool(pattern(t, a)[0]) for t, a in answered.pairs()]  # type: ignore[index]
        case _:
            return [a is not None and bool(t == a) for t, a in answered.pairs()]
