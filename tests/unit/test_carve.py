"""Carving: every row once, sized for the device that asks."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from scheduler.carve import MIN_S, Frontier, OpenBlock, Piece, Range, carve, size_s


def block(number: int, sizes: list[int], *, cursor: int = 0, todo: int = 1) -> OpenBlock:
    return OpenBlock(number, cursor, len(sizes), todo, [0, *accumulate(sizes)])


def piece(number: int, lo: int, hi: int, *, size: int = 10, **kw: object) -> Piece:
    return Piece(number, Range(0, lo, hi, size * (hi - lo)), 1, **kw)  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=40), min_size=1, max_size=6),
    st.lists(st.floats(1, 5000), min_size=1),
)
def test_every_row_is_carved_exactly_once_whatever_the_budgets(
    sizes: list[list[int]], budgets: list[float]
) -> None:
    frontier = Frontier(blocks=[block(i, s, todo=1 + i % 2) for i, s in enumerate(sizes)])
    carved: list[tuple[int, int]] = []
    for turn in range(10_000):
        cut = carve(frontier, budgets[turn % len(budgets)])
        if cut is None:
            break
        assert cut.rows > 0
        carved += [(r.block, i) for r in cut.ranges for i in range(r.lo, r.hi)]
    assert carved == [(b, i) for b, s in enumerate(sizes) for i in range(len(s))]


def test_a_sub_task_takes_as_many_rows_as_fit_the_budget() -> None:
    cut = carve(Frontier(blocks=[block(0, [10] * 100)]), 250)
    assert cut is not None
    assert cut.ranges == (Range(0, 0, 25, 250),)


def test_a_row_larger_than_the_budget_is_still_carved_alone() -> None:
    cut = carve(Frontier(blocks=[block(0, [9000, 10, 10])]), 100)
    assert cut is not None
    assert cut.ranges == (Range(0, 0, 1, 9000),)


def test_a_fast_device_gets_several_blocks_in_one_sub_task() -> None:
    cut = carve(Frontier(blocks=[block(0, [10] * 5, cursor=3), block(1, [10] * 5), block(2, [10] * 5)]), 90)
    assert cut is not None
    assert cut.ranges == (Range(0, 3, 5, 20), Range(1, 0, 5, 50), Range(2, 0, 2, 20))


def test_blocks_with_different_tasks_left_to_do_are_not_mixed() -> None:
    cut = carve(Frontier(blocks=[block(0, [10] * 5, todo=0b11), block(1, [10] * 5, todo=0b01)]), 1000)
    assert cut is not None
    assert [r.block for r in cut.ranges] == [0]


def test_rows_that_came_back_go_before_new_ones() -> None:
    frontier = Frontier(pieces=[piece(7, 3, 5), piece(8, 9, 12)], blocks=[block(1, [10] * 5)])
    cut = carve(frontier, 1000)
    assert cut is not None
    assert cut.pieces == (7, 8)
    assert not frontier.pieces


def test_a_suspect_piece_runs_with_nothing_beside_it() -> None:
    frontier = Frontier(pieces=[piece(1, 0, 4, exclusive=True), piece(2, 4, 8)])
    first, second = carve(frontier, 1000), carve(frontier, 1000)
    assert first is not None
    assert second is not None
    assert (first.exclusive, first.pieces, second.pieces) == (True, (1,), (2,))


def test_a_piece_that_was_tried_before_keeps_its_tries() -> None:
    cut = carve(Frontier(pieces=[piece(1, 0, 4, tries=3), piece(2, 4, 8)]), 1000)
    assert cut is not None
    assert (cut.pieces, cut.tries) == ((1,), 3)


def test_sub_tasks_shrink_as_the_work_runs_out() -> None:
    assert size_s(2.0, 1000.0, 2) == 2.0
    assert size_s(2.0, 4.0, 2) == 1.0
    assert size_s(2.0, 0.1, 2) == MIN_S
