"""How far a figure may be chance: the bootstrap over rows, Wilson's interval, McNemar's exact test. Pure; numpy alone.

A resample is as many rows, drawn with replacement (Efron and Tibshirani, An Introduction to the Bootstrap, 1993). A
figure here depends on a row through its pattern alone, such as (label, answer); so it is enough to draw how often each
pattern comes, which is the same distribution and makes a million rows cost what their patterns cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from motet.evaluation.measures import Float64s, Int64s

#: Resamples, and the seed that makes an interval the same each time.
RESAMPLES, SEED = 2000, 0
#: The share of intervals that hold the true figure.
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; all three are None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bootstrap(
    figures: Callable[[Float64s], Float64s], counts: Int64s, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Float64s:
    """The figures of ``resamples`` resamples, one a line.

    ``counts[i]`` is how many rows have pattern i; ``figures`` computes its figures from such counts. The order of the
    patterns decides what is drawn, so it must not hang on the order of the rows.
    """
    dice = np.random.default_rng(seed)
    rows, patterns = int(counts.sum()), len(counts)
    shares = counts / rows
    return np.array([figures(_drawn(dice, rows, patterns, shares)) for _ in range(resamples)])


def _drawn(dice: np.random.Generator, rows: int, patterns: int, shares: Float64s) -> Float64s:
    if rows == patterns:
        # Each row is its own pattern: the same distribution, without a binomial for each.
        return np.bincount(dice.integers(0, rows, rows), minlength=rows).astype(np.float64)
    return dice.multinomial(rows, shares).astype(np.float64)


def percentiles(values: Float64s) -> list[tuple[float | None, float | None]]:
    """The 95 % percentile interval of each column. Resamples in which a figure is not defined do not count; where
    that is more than half of them, there is no interval."""
    found: list[tuple[float | None, float | None]] = []
    for column in values.T:
        defined = column[~np.isnan(column)]
        if 2 * len(defined) < len(column):
            found.append((None, None))
        else:
            low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            found.append((float(low), float(high)))
    return found


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927); it is not empty where all rows or none are right."""
    z = 1.959963984540054
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: how likely two equally good models differ at least so much.

    ``only_first``: rows that the first has right and the second wrong; ``only_second`` the other way round. Rows on
    which both are right or both wrong say nothing.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    # log C(n, i) - n log 2 for i from 0 to k, summed without overflow.
    i = np.arange(1, k + 1, dtype=np.float64)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))]) - n * math.log(2)
    most = float(logs.max())
    return min(1.0, 2 * math.exp(most) * float(np.exp(logs - most).sum()))
