"""Further looks at the same rows, where they were asked for: scores beside a binary truth, lists of ids, costs. Pure.

``told`` turns JSON answers into the kind that they are, and adds the looks as ``Answered.views``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from motet.errors import InvalidJob
from motet.evaluation.answered import Answered
from motet.evaluation.further import NO_ANSWER, FurtherFigures
from motet.evaluation.measures import folded
from motet.tasks import short

#: What stands for true and false where no positive label is named.
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def plain_kind(found: Answered, asked: FurtherFigures, *, is_part: bool) -> Answered:
    """JSON answers as the kind that they are: lists of ids where lists are asked for, numbers beside a binary truth.

    A part of an answer that is a number beside a number is one; a whole answer stays JSON, with its exact match.
    """
    if found.kind != "json":
        return found
    said = [answer for answer in found.answers if answer is not None]
    if asked.at and any(_ids(answer) is not None for answer in said):
        return _ranking(found, asked.at)
    if not said or not all(map(_is_number, said)):
        return found
    if is_part and (truth := _numbers(found.truth)) is not None:
        found = replace(found, kind="number", truth=truth, answers=_finite(found.answers))
    if asked.positive is None and _numbers(found.truth) is not None:
        return found
    flags = binary(found.truth, asked.positive)
    if flags is not None:
        return _binary(found, flags, _finite(found.answers), asked)
    if is_part and found.kind == "json":
        raise InvalidJob.of(
            "labels",
            "neither numbers nor two values beside a part that is a number",
            "numbers, 0 and 1, or true and false",
            "name the label that the number is about (--positive LABEL)",
        )
    return found


def told(found: Answered, asked: FurtherFigures, sure: Sequence[float | None] | None = None) -> Answered:
    """The same with its views. ``sure``: for labels, the score of the positive label of each row."""
    views = []
    flags, scores = None, sure
    if found.kind == "binary":
        flags, scores = found.truth, found.answers
        found = replace(found, top=asked.top)
    elif found.kind in ("number", "json") and all(a is None or _is_number(a) for a in found.answers):
        flags, scores = binary(found.truth, asked.positive), _finite(found.answers)
        scores = scores if any(score is not None for score in scores) else None
    elif asked.positive is not None and found.kind in ("label", "labels"):
        flags = binary(found.truth, asked.positive)
    if found.kind != "binary" and flags is not None and scores is not None:
        views.append(_binary(found, flags, scores, asked))
    costs = _row_costs(found, asked, flags, scores)
    if costs is not None:
        views.append(_bare(found, kind="cost", answers=costs))
    return replace(found, views=tuple(views))


def binary(truth: Sequence[Any], positive: str | None) -> list[bool] | None:
    """Whether each row has the positive label, or is true or 1; None where no row has it, or some are neither."""
    if positive is not None:
        wanted = folded(positive)
        found = [any(folded(_text(each)) == wanted for each in _each(value)) for value in truth]
        return found if any(found) else None
    flags = [_FLAGS.get(folded(_text(value))) for value in truth]
    return None if None in flags else [bool(flag) for flag in flags]


def positive_score(value: Any, positive: str, labels: Sequence[str], kind: str) -> float:
    """The score of the positive label in a decoded answer of labels; NaN where it is not told.

    Of two labels the other one's is 1 minus it. Of several labels a row, one that was not given and has no score is 0:
    below every one that was given.
    """
    every = value[-1] if isinstance(value, tuple) and isinstance(value[-1], Mapping) else None
    if every is not None:
        return float(every.get(positive, math.nan))
    if kind == "labels":
        return float(dict(value).get(positive, 0.0))
    label, score = value[:2]
    if label == positive:
        return float(score)
    return 1 - float(score) if len(labels) == 2 else math.nan


def _binary(
    found: Answered, flags: Sequence[bool], scores: Sequence[float | None], asked: FurtherFigures
) -> Answered:
    return replace(_bare(found, kind="binary", answers=scores), truth=flags, top=asked.top)


def _bare(found: Answered, **changes: Any) -> Answered:
    """The same rows without what belongs to their own kind."""
    return replace(found, **{"scores": (), "labels": (), "warnings": (), "top": (), "at": (), **changes})


# -- lists of ids


def _ranking(found: Answered, at: tuple[int, ...]) -> Answered:
    """Lists of ids beside the true ids. An answer that is no list of ids is counted, and has the worst rank."""
    truth = []
    for row, value in zip(found.rows, found.truth, strict=True):
        ids = _ids(value if isinstance(value, list | tuple) else [value])
        if not ids:
            raise InvalidJob.of(
                "labels",
                "an empty list" if isinstance(value, list) and not value else "something else",
                "an id or a list of ids",
                "write null where a row has none",
                row,
            )
        truth.append(frozenset(ids))
    answers = [None if answer is None else _ids(answer) for answer in found.answers]
    unread = answers.count(None) - found.answers.count(None)
    warnings = found.warnings
    if unread:
        which = "answer is" if unread == 1 else "answers are"
        warnings = (*warnings, f"{unread:,} {which} no list of ids; they have the worst rank")
    return replace(found, kind="ranking", truth=truth, answers=answers, at=at, warnings=warnings)


def _ids(value: Any) -> tuple[str, ...] | None:
    """A list of ids, or of objects with an ``id``, as texts; None where it is none."""
    if not isinstance(value, list | tuple):
        return None
    found = [each.get("id") if isinstance(each, Mapping) else each for each in value]
    if not all(isinstance(each, str | int) and not isinstance(each, bool) for each in found):
        return None
    return tuple(map(str, found))


# -- costs


def _row_costs(
    found: Answered,
    asked: FurtherFigures,
    flags: Sequence[bool] | None,
    scores: Sequence[float | None] | None,
) -> list[float] | None:
    """What each row costs; None where its kind has no costs."""
    if asked.matrix and found.kind == "label":
        table = _Table(asked.matrix)
        return [table.cost(t, a) for t, a in found.pairs()]
    if not asked.outcomes or flags is None:
        return None
    if found.kind in ("label", "labels"):
        wanted = folded(str(asked.positive))
        said = [None if a is None else any(folded(m) == wanted for m in _each(a)) for a in found.answers]
    elif scores is not None:
        said = [None if score is None else score >= asked.threshold for score in scores]
    else:
        return None
    return [_outcome_cost(t, a, asked.outcomes) for t, a in zip(flags, said, strict=True)]


def _outcome_cost(truth: bool, answer: bool | None, outcomes: Mapping[str, float]) -> float:
    """An answer that is missing is wrong."""
    right = truth == answer
    if truth:
        return outcomes.get("TP" if right else "FN", 0.0)
    return outcomes.get("TN" if right else "FP", 0.0)


class _Table:
    """Costs by true label and answer, however their case is."""

    def __init__(self, matrix: Mapping[str, Mapping[str, float]]) -> None:
        self._costs = {folded(t): {folded(a): cost for a, cost in row.items()} for t, row in matrix.items()}

    def cost(self, truth: str, answer: str | None) -> float:
        """A right answer costs nothing unless it is told; none costs as much as the worst. Raises InvalidJob."""
        row = self._costs.get(folded(truth))
        if row is None:
            raise InvalidJob.of(
                "costs",
                f"no costs of rows whose label is {short(truth)!r}",
                "costs of every label that occurs",
                f'add {{"{short(truth)}": {{"answer": cost}}}}',
            )
        if answer is None:
            return row.get(NO_ANSWER, max(row.values(), default=0.0))
        cost = row.get(folded(answer), 0.0 if folded(answer) == folded(truth) else None)
        if cost is None:
            raise InvalidJob.of(
                f"costs.{short(truth)}",
                f"no cost of the answer {short(answer)!r}",
                "one of every answer that occurs",
                f'add "{short(answer)}": cost',
            )
        return cost


# -- values


def _each(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, frozenset | list | tuple) else [value]


def _text(value: Any) -> str:
    """A value as a label is written: whole numbers, true and false as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """All of them as numbers, which a table may hold as text; None where one is none."""
    try:
        found = [math.nan if isinstance(value, bool) else float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if all(map(math.isfinite, found)) else None


def _finite(values: Sequence[Any]) -> list[float | None]:
    """Numbers that have an order; NaN, infinity and what is beyond a float is no answer."""
    found = [None if value is None else _numbers([value]) for value in values]
    return [None if each is None else each[0] for each in found]
