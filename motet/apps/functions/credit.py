"""A credit risk by logistic regression, as a function that workers run, and the JSON of weights that it reads.

Numbers are standardised, with the median in place of what is missing and an indicator that says so; words are one-hot.
Fitted by Newton's method with a ridge. numpy alone, and only to fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Strength of the ridge on standardised columns. Higher: rare words count for less.
RIDGE = 1.0
#: Newton's steps at most; it has converged after some eight.
_STEPS = 30
#: Reasons told of each risk.
_REASONS = 3


def assess(rows: Sequence[Mapping[str, Any]], *, artefact: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The probability that each loan goes bad, and what raises it most: ``{"score", "reasons"}``. Runs at the workers."""
    return [_assessed(row, artefact) for row in rows]


def _assessed(row: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, float] = {}
    for name, number in model["numbers"].items():
        value = row.get(name)
        missing = value is None
        standard = ((number["median"] if missing else value) - number["mean"]) / number["deviation"]
        parts[f"{name} unknown" if missing else f"{name} {value:g}"] = (
            number["weight"] * standard + number["missing"] * missing
        )
    for name, weights in model["words"].items():
        parts[f"{name} {row.get(name) or 'unknown'}"] = weights.get(row.get(name) or "", 0.0)
    risen = sorted((part for part in parts if parts[part] > 0), key=lambda part: -parts[part])
    odds = model["bias"] + sum(parts.values())
    return {"score": round(1 / (1 + math.exp(-odds)), 4), "reasons": risen[:_REASONS]}


def fit(
    rows: Sequence[Mapping[str, Any]], bad: Sequence[bool], *, numbers: Sequence[str], words: Sequence[str]
) -> dict[str, Any]:
    """The weights that ``assess`` reads: plain JSON. A word that stands nowhere in the rows weighs nothing."""
    import numpy as np

    told: dict[str, Any] = {"numbers": {}, "words": {}}
    columns: list[Any] = []
    for name in numbers:
        values = np.array([math.nan if row[name] is None else row[name] for row in rows], float)
        missing = np.isnan(values)
        median = float(np.median(values[~missing]))
        values[missing] = median
        mean, deviation = float(values.mean()), float(values.std()) or 1.0
        told["numbers"][name] = {"median": median, "mean": mean, "deviation": deviation}
        columns += [(values - mean) / deviation, missing.astype(float)]
    for name in words:
        told["words"][name] = sorted({row[name] or "" for row in rows})
        columns += [
            np.array([(row[name] or "") == word for row in rows], float) for word in told["words"][name]
        ]
    bias, *weights = _newton(np.column_stack([np.ones(len(rows)), *columns]), np.array(bad, float))
    left = iter(map(float, weights))
    for number in told["numbers"].values():
        number |= {"weight": next(left), "missing": next(left)}
    return {
        "bias": float(bias),
        "numbers": told["numbers"],
        "words": {name: {word: next(left) for word in every} for name, every in told["words"].items()},
    }


def _newton(columns: Any, truth: Any) -> Any:
    """Weights of the penalised likelihood's maximum; the bias, which stands first, has no ridge."""
    import numpy as np

    ridge = np.full(columns.shape[1], RIDGE)
    ridge[0] = 0.0
    weights = np.zeros(columns.shape[1])
    for _ in range(_STEPS):
        said = 1 / (1 + np.exp(-columns @ weights))
        slope = columns.T @ (said - truth) + ridge * weights
        curve = (columns * (said * (1 - said))[:, None]).T @ columns + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        weights = weights - step
        if np.abs(step).max() < 1e-8:
            break
    return weights
