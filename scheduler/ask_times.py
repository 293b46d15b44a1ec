"""How long asks took, as counts between fixed bounds: small to store, and added up over processes. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

#: Upper bounds in seconds, four to each doubling from 2 ms to 64 s; what took longer stands behind the last.
#: Fewer: percentiles are off by more than a tenth; more: longer rows in ask_span.
BOUNDS_S: tuple[float, ...] = tuple(0.002 * 2 ** (i / 4) for i in range(61))


def place(seconds: float) -> int:
    """The index of the count for an ask that took so long."""
    return bisect_left(BOUNDS_S, seconds)


def no_times() -> list[int]:
    """A count of 0 at each place."""
    return [0] * (len(BOUNDS_S) + 1)


def added(counts: Sequence[Sequence[int]]) -> list[int]:
    """The counts of all of them together."""
    return [sum(column) for column in zip(*counts, strict=True)] if counts else no_times()


def quantile_s(counts: Sequence[int], share: float) -> float | None:
    """Seconds within which this share of the asks was answered; None where none was.

    Evenly spread between two bounds; the largest bound for those beyond it.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, below = share * total, 0
    for i, n in enumerate(counts[: len(BOUNDS_S)]):
        if n and below + n >= wanted:
            low = BOUNDS_S[i - 1] if i else 0.0
            return low + (BOUNDS_S[i] - low) * max(0.0, wanted - below) / n
        below += n
    return BOUNDS_S[-1]
