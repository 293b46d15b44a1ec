"""How long asks took: counts between bounds, added up over processes, told as percentiles."""

from __future__ import annotations

import random

import pytest

from scheduler.ask_times import BOUNDS_S, added, no_times, place, quantile_s


def counted(*seconds: float) -> list[int]:
    counts = no_times()
    for s in seconds:
        counts[place(s)] += 1
    return counts


def test_percentiles_are_within_a_tenth_of_what_they_stand_for() -> None:
    dice = random.Random(3)
    times = sorted(dice.lognormvariate(-3, 0.8) for _ in range(2000))
    halves = added([counted(*times[::2]), counted(*times[1::2])])
    assert halves == counted(*times)
    for share in (0.01, 0.5, 0.9, 0.99):
        assert quantile_s(halves, share) == pytest.approx(times[int(share * len(times))], rel=0.1)


def test_of_no_ask_no_time_is_told_and_of_the_slowest_the_largest_bound() -> None:
    assert quantile_s(no_times(), 0.5) is None
    assert added([]) == no_times()
    assert quantile_s(counted(1e6), 0.5) == BOUNDS_S[-1]
    assert 0 < (quantile_s(counted(0.0), 0.5) or 0) <= BOUNDS_S[0]
