"""How right answers are: figures of labels, sets of labels, numbers and texts beside the truth. Pure; numpy alone.

Formulas are those of scikit-learn's ``sklearn.metrics`` where both have one. An answer of None is no answer: a cell
that is an error or was skipped. It is wrong, and belongs to no label. Every function takes the rows in any order.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFigures:
    """One label: what was given it, and what should have been."""

    label: str
    #: Of the rows that were given it, the share that have it; None where none was given it.
    precision: float | None
    #: Of the rows that have it, the share that were given it; None where none has it.
    recall: float | None
    #: 2 tp / (2 tp + fp + fn); None where it does not occur at all.
    f1: float | None
    #: Rows that have it.
    support: int
    #: Rows that were given it.
    answered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """How often each label was answered with each other one."""

    labels: tuple[str, ...]
    #: ``counts[i][j]``: rows of label i that were answered with label j; the last column is for no label at all.
    counts: tuple[tuple[int, ...], ...]


#: Figures that are shares of rows.
SHARES = frozenset({"accuracy", "exact_match"})
#: Figures that are better where they are smaller, in the unit of the labels or of the costs.
LOSSES = frozenset({"mae", "rmse", "cost"})
#: Numbers are near each other if they differ by less than this share of the truth's spread.
NEAR_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """How often each label, in some order, was rightly given, was given, and should have been."""

    right: Float64s
    said: Float64s
    there: Float64s

    @classmethod
    def of(cls, truth: npt.ArrayLike, answers: npt.ArrayLike) -> LabelCounts:
        """``truth`` and ``answers``: (rows, labels), whether the row has the label, and was given it."""
        t, a = np.asarray(truth, bool), np.asarray(answers, bool)
        return cls(*(np.asarray(which.sum(0), np.float64) for which in (t & a, a, t)))

    def f1(self) -> Float64s:
        """2 right / (said + there) of each label; NaN where it does not occur at all."""
        occurs = self.said + self.there
        found = np.full(occurs.shape, np.nan)
        np.divide(2 * self.right, occurs, out=found, where=occurs > 0)
        return found

    def macro_f1(self) -> float:
        """The mean F1 of all labels that occur. Where none does, in truth and answers, nothing is wrong: 1."""
        occurs = self.said + self.there > 0
        return float(self.f1()[occurs].mean()) if occurs.any() else 1.0

    def micro_f1(self) -> float:
        """F1 of all labels together."""
        occurs = float((self.said + self.there).sum())
        return 2 * float(self.right.sum()) / occurs if occurs else 1.0

    def accuracy(self, rows: int) -> float:
        """The share of the pairs of row and label that are right."""
        wrong = self.said + self.there - 2 * self.right
        return 1 - float(wrong.sum()) / (rows * len(wrong))


# -- one label a row


def accuracy(truth: Sequence[Hashable], answers: Sequence[Hashable | None]) -> float:
    """The share of rows whose answer is the truth."""
    _same_length(truth, answers)
    return sum(a is not None and t == a for t, a in zip(truth, answers, strict=True)) / len(truth)


def macro_f1(truth: Sequence[Hashable], answers: Sequence[Hashable | None]) -> float:
    """The mean F1 of all labels that occur, in the truth or in the answers; each counts alike."""
    _same_length(truth, answers)
    right = Counter(t for t, a in zip(truth, answers, strict=True) if t == a)
    said, there = Counter(a for a in answers if a is not None), Counter(truth)
    found = [*(said.keys() | there.keys())]
    counts = (np.array([count[label] for label in found], np.float64) for count in (right, said, there))
    return LabelCounts(*counts).macro_f1()


def confusion(truth: Sequence[str], answers: Sequence[str | None], labels: Sequence[str] = ()) -> Confusion:
    """Count truth against answers. ``labels`` come first and in their order, then others that occur, sorted."""
    _same_length(truth, answers)
    names = all_labels(truth, answers, labels)
    code = {name: number for number, name in enumerate(names)}
    counts = [[0] * (len(names) + 1) for _ in names]
    for (t, a), n in Counter(zip(truth, answers, strict=True)).items():
        counts[code[t]][len(names) if a is None else code[a]] += n
    return Confusion(labels=names, counts=tuple(map(tuple, counts)))


def label_figures(
    truth: Sequence[str], answers: Sequence[str | None], labels: Sequence[str] = ()
) -> tuple[LabelFigures, ...]:
    """Precision, recall and F1 of each label, in the order of ``confusion``."""
    _same_length(truth, answers)
    return set_figures([(t,) for t in truth], [None if a is None else (a,) for a in answers], labels)


def all_labels(
    truth: Iterable[str], answers: Iterable[str | None], labels: Sequence[str] = ()
) -> tuple[str, ...]:
    """``labels`` in their order, then all others that occur, sorted."""
    others = {*truth, *(a for a in answers if a is not None)} - set(labels)
    return (*labels, *sorted(others))


# -- several labels a row


def exact_match(truth: Sequence[Collection[str]], answers: Sequence[Collection[str] | None]) -> float:
    """The share of rows that were given all their labels and no other."""
    _same_length(truth, answers)
    return sum(
        a is not None and frozenset(t) == frozenset(a) for t, a in zip(truth, answers, strict=True)
    ) / len(truth)


def set_figures(
    truth: Sequence[Collection[str]], answers: Sequence[Collection[str] | None], labels: Sequence[str] = ()
) -> tuple[LabelFigures, ...]:
    """Precision, recall and F1 of each label, each label a question of its own."""
    _same_length(truth, answers)
    there, said, right = Counter[str](), Counter[str](), Counter[str]()
    for t, a in zip(truth, answers, strict=True):
        there.update(set(t))
        if a is not None:
            said.update(set(a))
            right.update(set(t) & set(a))
    return figures_of_counts(all_labels(there, said, labels), right, said, there)


def set_macro_f1(truth: Sequence[Collection[str]], answers: Sequence[Collection[str] | None]) -> float:
    """The mean F1 of all labels that occur; 1 where none does, in truth and answers."""
    labels = all_labels((label for row in truth for label in row), (m for row in answers for m in row or ()))
    return LabelCounts.of(membership(truth, labels), membership(answers, labels)).macro_f1()


def set_accuracy(
    truth: Sequence[Collection[str]], answers: Sequence[Collection[str] | None], labels: Sequence[str]
) -> float:
    """The share of the pairs of row and label that are right; of a row without an answer none is."""
    _same_length(truth, answers)
    there, said = membership(truth, labels), membership(answers, labels)
    silent = np.array([a is None for a in answers])
    said[silent] = ~there[silent]
    return LabelCounts.of(there, said).accuracy(len(truth))


def membership(rows: Sequence[Collection[str] | None], labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(rows, labels): whether the row has the label."""
    given = [frozenset(row or ()) for row in rows]
    return np.array([[label in row for label in labels] for row in given], bool).reshape(len(rows), -1)


def figures_of_counts(
    labels: Sequence[str], right: Mapping[str, int], said: Mapping[str, int], there: Mapping[str, int]
) -> tuple[LabelFigures, ...]:
    """Figures of labels that were rightly given, given, and that should have been so many times."""
    counts = (np.array([count.get(m, 0) for m in labels], np.float64) for count in (right, said, there))
    return tuple(
        LabelFigures(
            label=label,
            precision=right.get(label, 0) / said[label] if said.get(label) else None,
            recall=right.get(label, 0) / there[label] if there.get(label) else None,
            f1=None if math.isnan(f1) else float(f1),
            support=there.get(label, 0),
            answered=said.get(label, 0),
        )
        for label, f1 in zip(labels, LabelCounts(*counts).f1(), strict=True)
    )


# -- numbers


class NumberFigures:
    """Figures of the same numbers however often each row counts: sums are taken once, so that thousands are cheap."""

    def __init__(self, truth: npt.ArrayLike, answers: npt.ArrayLike) -> None:
        t, a = np.asarray(truth, np.float64), np.asarray(answers, np.float64)
        if t.shape != a.shape or not t.size:
            raise ValueError(
                f"got {t.size} true numbers and {a.size} answers; expected as many, and one at least"
            )
        # Around their means, so that no digits are lost where numbers are large and differ little.
        dt, da, off = t - t.mean(), a - a.mean(), a - t
        self._least = 1e-24 * np.array([t.mean() ** 2, a.mean() ** 2])
        self._terms = np.stack([np.abs(off), off**2, dt, da, dt**2, da**2, dt * da, np.ones_like(t)])

    def of(self, weights: Float64s) -> Float64s:
        """As ``number_figures``, of rows that count so many times."""
        *sums, rows = self._terms @ weights
        if rows == 0:
            return np.full(4, math.nan)
        off, squares, t, a, tt, aa, ta = np.array(sums) / rows
        # The variance of equal numbers comes out at a rounding error, not at 0.
        flat_t = tt - t * t <= 1e-12 * tt + self._least[0]
        flat_a = aa - a * a <= 1e-12 * aa + self._least[1]
        r2 = math.nan if flat_t else 1 - squares / (tt - t * t)
        both = math.sqrt((tt - t * t) * (aa - a * a)) if not flat_t and not flat_a else math.nan
        return np.array([off, math.sqrt(squares), r2, np.clip((ta - t * a) / both, -1, 1)])


def number_figures(truth: npt.ArrayLike, answers: npt.ArrayLike) -> Float64s:
    """Mean absolute error, root mean squared error, R² and Pearson's r.

    R² is 1 - squared errors ÷ squared deviations of the truth. NaN where a figure is not defined: R² of a truth that
    is all the same, r where either side is.
    """
    return NumberFigures(truth, answers).of(np.ones(np.shape(truth)))


def r_squared(truth: npt.ArrayLike, answers: npt.ArrayLike) -> float:
    """The share of the truth's variance that is explained; 0 where there is none."""
    found = float(number_figures(truth, answers)[2])
    return 0.0 if math.isnan(found) else found


def near_share(truth: npt.ArrayLike, answers: npt.ArrayLike) -> float:
    """The share of numbers that differ from the truth by NEAR_SHARE of its spread at most. NaN is no answer."""
    t, a = np.asarray(truth, np.float64), np.asarray(answers, np.float64)
    return float((np.abs(a - t) <= NEAR_SHARE * (float(t.std()) or 1.0)).mean())


def mean_absolute_error(truth: npt.ArrayLike, answers: npt.ArrayLike) -> float:
    return float(number_figures(truth, answers)[0])


def root_mean_squared_error(truth: npt.ArrayLike, answers: npt.ArrayLike) -> float:
    return float(number_figures(truth, answers)[1])


# -- texts


def normalised(text: str) -> str:
    """The text as it is compared: NFKC, without case, punctuation and symbols as spaces, one space between words.

    As Rajpurkar et al. compare answers (SQuAD, EMNLP 2016), but English articles stay, since texts may be in any
    language; a decimal point or minus sign within a word stays too.
    """
    plain = folded(text)
    kept = [
        c if c.isalnum() or unicodedata.category(c)[0] == "M" or _within_number(plain, i) else " "
        for i, c in enumerate(plain)
    ]
    return " ".join("".join(kept).split())


def folded(text: str) -> str:
    """The text without case, and with one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _within_number(text: str, at: int) -> bool:
    """Whether this is the point of ``3.5``, the comma of ``1,000`` or the minus of ``-2``."""
    if not text[at + 1 : at + 2].isdigit():
        return False
    if text[at] in ".,":
        return at > 0 and text[at - 1].isdigit()
    return text[at] == "-" and (at == 0 or text[at - 1].isspace())


def token_f1(truth: str, answer: str) -> float:
    """How far the words of two texts are the same, 0 to 1: SQuAD's F1 over ``normalised`` words."""
    t, a = normalised(truth).split(), normalised(answer).split()
    if not t or not a:
        return float(t == a)
    return 2 * (Counter(t) & Counter(a)).total() / (len(t) + len(a))


def same_json(truth: Any, answer: Any) -> bool:
    """Whether two JSON values say the same: texts as ``normalised``, numbers by value, keys in any order."""
    if isinstance(truth, str) and isinstance(answer, str):
        return normalised(truth) == normalised(answer)
    if isinstance(truth, Mapping) and isinstance(answer, Mapping):
        return truth.keys() == answer.keys() and all(same_json(truth[key], answer[key]) for key in truth)
    if isinstance(truth, list | tuple) and isinstance(answer, list | tuple):
        return len(truth) == len(answer) and all(map(same_json, truth, answer))
    # True is no 1 here, though Python has it so; but 1 is 1.0.
    comparable = isinstance(truth, bool) == isinstance(answer, bool)
    return comparable and bool(truth == answer)


class LabelReader:
    """Reads a label out of what a language model wrote.

    A text that is a label, but for case and spaces, or in its ``normalised`` form, is that label. Any other is the one
    label that stands in it as whole words; a label within a longer one that stands there (``glad`` in ``very glad``)
    does not count. None where no label stands in it, or more than one: nothing is guessed.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        for label in sorted(labels):
            self._exact.setdefault(folded(label), label)
        plain = Counter(map(normalised, self._exact.values()))
        # "C" and "C++" are the same when normalised: such labels are only known as they are.
        self._plain = {
            p: label for label in self._exact.values() if (p := normalised(label)) and plain[p] == 1
        }
        self._longest_first = sorted(self._plain, key=lambda words: (-len(words), words))

    def read(self, text: str) -> str | None:
        """The label that this text is, or None."""
        plain = normalised(text)
        if (label := self._exact.get(folded(text)) or self._plain.get(plain)) is not None:
            return label
        rest, found = f" {plain} ", []
        for words in self._longest_first:
            if f" {words} " in rest:
                found.append(words)
                # What stood on both sides of it must not become a label together.
                rest = rest.replace(f" {words} ", " | ")
        return self._plain[found[0]] if len(found) == 1 else None


def _same_length(truth: Sequence[Any], answers: Sequence[Any]) -> None:
    if len(truth) != len(answers) or not len(truth):
        raise ValueError(
            f"got {len(truth)} true values and {len(answers)} answers; expected as many, and one at least"
        )
