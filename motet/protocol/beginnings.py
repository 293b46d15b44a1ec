"""What two texts, or two lists of tokens, begin with alike. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many leading characters or tokens are the same."""
    lo, hi = 0, min(len(a), len(b))
    if a[:hi] == b[:hi]:
        return hi
    # Halves are compared at once; what is left is short.
    while hi - lo > 16:
        middle = (lo + hi) // 2
        if a[lo:middle] == b[lo:middle]:
            lo = middle
        else:
            hi = middle
    return next(i for i in range(lo, hi) if a[i] != b[i])
