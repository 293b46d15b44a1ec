"""What an evaluation was asked for beyond the figures of each kind: checked once, before anything is read. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from motet.errors import InvalidJob
from motet.tasks import short

#: Costs of a row: ``{"FN": 5, "FP": 1}`` of a binary truth, or {true label: {answer: cost}}.
Costs: TypeAlias = "Mapping[str, float] | Mapping[str, Mapping[str, float]]"

#: Costs of a binary truth, by whether the answer is right and whether it is the positive one.
OUTCOMES = ("TP", "FP", "FN", "TN")
#: The key of a cost for rows without an answer.
NO_ANSWER = "no answer"
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherFigures:
    """Further figures; nothing is asked for by default."""

    #: The label that a score is about.
    positive: str | None = None
    #: Shares of the rows in per cent, for precision and recall.
    top: tuple[float, ...] = ()
    #: Lengths of lists, for hit rate and NDCG.
    at: tuple[int, ...] = ()
    #: Outcome -> cost of a row.
    outcomes: Mapping[str, float] = field(default_factory=dict)
    #: True label -> answer -> cost of a row.
    matrix: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: A score from here on is a positive answer.
    threshold: float = THRESHOLD

    @classmethod
    def of(
        cls,
        *,
        positive: str | None = None,
        top: float | Sequence[float] = (),
        at: int | Sequence[int] = (),
        costs: Costs | None = None,
        threshold: float = THRESHOLD,
    ) -> FurtherFigures:
        """Raises InvalidJob for what cannot be meant."""
        shares = (top,) if isinstance(top, int | float | str) else top
        for share in shares:
            if not _is_number(share) or not 0 < share <= 100:
                raise InvalidJob.of(
                    "top", short(share), "per cent, above 0 and at most 100", "such as 1, 5, 10"
                )
        lengths = (at,) if isinstance(at, int | float | str) else at
        for length in lengths:
            if type(length) is not int or length < 1:
                raise InvalidJob.of("at", short(length), "a whole number of 1 or more", "such as 10")
        if not _is_number(threshold):
            raise InvalidJob.of("threshold", short(threshold), "a finite number", "such as 0.5")
        outcomes, matrix = _costs(costs)
        return cls(
            positive=positive,
            top=tuple(dict.fromkeys(map(float, shares))),
            at=tuple(dict.fromkeys(lengths)),
            outcomes=outcomes,
            matrix=matrix,
            threshold=float(threshold),
        )


def _costs(costs: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Costs of outcomes or of labels; both empty where there are none."""
    if costs is None:
        return {}, {}
    form = '{"FN": 5, "FP": 1} or {"true label": {"answer": cost}}'
    if not isinstance(costs, Mapping) or not costs:
        got = "nothing" if isinstance(costs, Mapping) else f"a value of type {type(costs).__name__}"
        raise InvalidJob.of("costs", got, form, "name what a mistake costs")
    nested = [isinstance(value, Mapping) for value in costs.values()]
    if all(nested):
        for label, row in costs.items():
            for answer, cost in row.items():
                _check_cost(f"costs.{short(label)}.{short(answer)}", cost)
        return {}, {str(label): {str(a): float(c) for a, c in row.items()} for label, row in costs.items()}
    if any(nested):
        raise InvalidJob.of("costs", "both numbers and objects", form, "write one of the two")
    for outcome, cost in costs.items():
        if outcome not in OUTCOMES:
            raise InvalidJob.of(
                f"costs.{short(outcome)}",
                "an unknown outcome",
                ", ".join(OUTCOMES),
                "name the false or true positive or negative, such as FN=5,FP=1",
            )
        _check_cost(f"costs.{outcome}", cost)
    return {outcome: float(cost) for outcome, cost in costs.items()}, {}


def _check_cost(where: str, cost: Any) -> None:
    if not _is_number(cost):
        raise InvalidJob.of(where, short(cost), "a finite number", "write what such a row costs")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
