"""The interactive lane: what it may take from bulk work that always waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.run.lane import BURST_S, SHARE, WINDOW_S, Lane

#: Pauses before the next interactive row, and seconds of its micro-batch.
ARRIVALS = st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 1.0)), max_size=40)


def turns(arrivals: list[tuple[float, float]], bulk_s: float) -> list[tuple[float, float]]:
    """When interactive micro-batches began and ended, on a device where bulk always waits."""
    lane, now, due, taken = Lane(), 0.0, 0.0, []
    for pause_s, seconds in arrivals:
        due += pause_s
        while now < due or not lane.open(now):
            now += bulk_s
        taken.append((now, now + seconds))
        now += seconds
        lane = lane.took(seconds, now)
    return taken


@given(ARRIVALS, st.floats(0.02, 0.3))
def test_bulk_that_always_waits_has_its_share_of_any_window_less_one_micro_batch(
    arrivals: list[tuple[float, float]], bulk_s: float
) -> None:
    taken = turns(arrivals, bulk_s)
    longest = max((seconds for _, seconds in arrivals), default=0.0)
    for i, (began, _) in enumerate(taken):
        interactive_s = 0.0
        # A window that begins or ends elsewhere has less of interactive work in it.
        for first, last in taken[i:]:
            interactive_s += last - first
            assert interactive_s <= SHARE * max(WINDOW_S, last - began) + longest + 1e-6


@given(ARRIVALS, st.floats(0, 100))
def test_a_row_after_a_quiet_window_is_never_held_back(
    arrivals: list[tuple[float, float]], more_s: float
) -> None:
    lane, now = Lane(), 0.0
    for pause_s, seconds in arrivals:
        now += pause_s + seconds
        lane = lane.took(seconds, now)
    assert lane.open(now + WINDOW_S + 1e-6 + more_s)


def test_a_burst_is_served_before_bulk_goes_on() -> None:
    lane, now, served = Lane(), 0.0, 0
    while lane.open(now):
        now += 0.01
        lane, served = lane.took(0.01, now), served + 1
    assert BURST_S <= 0.01 * served <= 1.5 * BURST_S


def test_a_model_loaded_for_minutes_closes_the_lane_for_one_window_only() -> None:
    lane = Lane().took(300.0, 1000.0)
    assert not lane.open(1000.0 + WINDOW_S - 0.01)
    assert lane.open(1000.0 + WINDOW_S + 0.01)
