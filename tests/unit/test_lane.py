"""The interactive lane: what it may take from bulk work that always waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.run.lane import BURST_S, WINDOW_S, Lane

#: Pauses before the next interactive row, and seconds of its micro-batch.
ARRIVALS = st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 1.0)), max_size=40)
SHARES = st.floats(0.1, 0.9)


def turns(arrivals: list[tuple[float, float]], bulk_s: float, share: float) -> list[tuple[float, float]]:
    """When interactive micro-batches began and ended, on a device where bulk always waits."""
    lane, now, due, taken = Lane(share), 0.0, 0.0, []
    for pause_s, seconds in arrivals:
        due += pause_s
        while now < due or not lane.open(now):
            now += bulk_s
        taken.append((now, now + seconds))
        now += seconds
        lane = lane.took(seconds, now)
    return taken


@given(ARRIVALS, st.floats(0.02, 0.3), SHARES)
def test_bulk_that_always_waits_has_its_share_of_any_window_less_one_micro_batch(
    arrivals: list[tuple[float, float]], bulk_s: float, share: float
) -> None:
    # A longer turn is forgiven in part: see ``took``.
    most_s = share * WINDOW_S - BURST_S
    taken = turns([(pause_s, most_s * seconds) for pause_s, seconds in arrivals], bulk_s, share)
    longest = most_s * max((seconds for _, seconds in arrivals), default=0.0)
    for i, (began, _) in enumerate(taken):
        interactive_s = 0.0
        # A window that begins or ends elsewhere has less of interactive work in it.
        for first, last in taken[i:]:
            interactive_s += last - first
            assert interactive_s <= share * max(WINDOW_S, last - began) + longest + 1e-6


@given(ARRIVALS, st.floats(0, 100), SHARES)
def test_a_row_after_a_quiet_window_is_never_held_back(
    arrivals: list[tuple[float, float]], more_s: float, share: float
) -> None:
    lane, now = Lane(share), 0.0
    for pause_s, seconds in arrivals:
        now += pause_s + seconds
        lane = lane.took(seconds, now)
    assert lane.open(now + WINDOW_S + 1e-6 + more_s)


def test_a_burst_is_served_before_bulk_goes_on() -> None:
    lane, now, served = Lane(0.3), 0.0, 0
    while lane.open(now):
        now += 0.01
        lane, served = lane.took(0.01, now), served + 1
    assert BURST_S <= 0.01 * served <= 1.5 * BURST_S


def test_a_model_loaded_for_minutes_closes_the_lane_for_one_window_only() -> None:
    lane = Lane(0.3).took(300.0, 1000.0)
    assert not lane.open(1000.0 + WINDOW_S - 0.01)
    assert lane.open(1000.0 + WINDOW_S + 0.01)


def test_where_asks_are_the_purpose_they_take_most_of_a_device() -> None:
    """Rows that never end, on a device where bulk always waits: each has about its share of the time."""
    for share in (0.3, 0.9):
        lane, now, served_s = Lane(share), 0.0, 0.0
        while now < 100.0:
            if lane.open(now):
                now, served_s = now + 0.01, served_s + 0.01
                lane = lane.took(0.01, now)
            else:
                now += 0.05
        assert share - 0.07 <= served_s / now <= share
