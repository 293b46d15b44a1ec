"""Carving: every row once, cut in seconds for the device that asks, groups left whole."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.carve import (
    MAX_BYTES,
    MAX_ROWS,
    MIN_S,
    Carved,
    Frontier,
    OpenBlock,
    Piece,
    Range,
    carve,
    size_s,
)
from scheduler.policy.cost import Price

#: A second a kilobyte, and nothing else costs anything.
KB_A_SECOND = Price(0.0, 0.0, 0.001, 0.0)
SIZES = st.lists(st.integers(0, 500), min_size=1, max_size=40)
PRICES = st.builds(Price, st.floats(0, 0.1), st.floats(0, 0.1), st.floats(1e-6, 0.01), st.floats(0, 1e-4))
BUDGETS = st.lists(st.floats(0.001, 5), min_size=1, max_size=5)


def block(number: int, sizes: list[int], *, cursor: int = 0, todo: int = 1, bounds: object = ()) -> OpenBlock:
    return OpenBlock(number, cursor, len(sizes), todo, [0, *accumulate(sizes)], tuple(bounds))  # type: ignore[arg-type]


def piece(number: int, lo: int, hi: int, *, size: int = 10, todo: int = 1, **kw: object) -> Piece:
    return Piece(number, Range(0, lo, hi, size * (hi - lo)), todo, **kw)  # type: ignore[arg-type]


def cut(frontier: Frontier, budget_s: float, price: Price = KB_A_SECOND, *, cap_s: float = 0.0) -> Carved:
    found = carve(frontier, budget_s, price, cap_s=cap_s)
    assert found is not None
    return found


def all_of(frontier: Frontier, budgets: list[float], price: Price, *, cap_s: float = 0.0) -> list[Carved]:
    """Carve to the end; what is left over of a piece becomes a piece, as in the store."""
    found: list[Carved] = []
    while (carved := carve(frontier, budgets[len(found) % len(budgets)], price, cap_s=cap_s)) is not None:
        found.append(carved)
        if carved.leftover is not None:
            frontier.pieces.append(Piece(1000 + len(found), carved.leftover, carved.todo))
    assert frontier.empty
    return found


def test_a_sub_task_has_so_many_rows_at_least_where_they_are_there() -> None:
    frontier = Frontier(blocks=[block(0, [5000] * 20), block(1, [5000] * 3)])
    counts = []
    while (carved := carve(frontier, 1.0, KB_A_SECOND, least=8)) is not None:
        counts.append(carved.rows)
    assert counts == [8, 8, 4, 3]
    come_back = Frontier(pieces=[piece(1, 0, 20, size=5000)])
    carved = carve(come_back, 1.0, KB_A_SECOND, least=8)
    assert carved is not None
    assert carved.leftover is not None
    assert (carved.rows, len(carved.leftover)) == (8, 12)


# -- each row once


@given(st.lists(SIZES, min_size=1, max_size=6), BUDGETS, PRICES)
def test_every_row_is_carved_exactly_once_whatever_the_budgets(
    sizes: list[list[int]], budgets: list[float], price: Price
) -> None:
    frontier = Frontier(blocks=[block(i, s, todo=1 + i % 2) for i, s in enumerate(sizes)])
    carved = all_of(frontier, budgets, price)
    assert all(c.rows > 0 for c in carved)
    rows = [(r.block, i) for c in carved for r in c.ranges for i in range(r.lo, r.hi)]
    assert rows == [(b, i) for b, s in enumerate(sizes) for i in range(len(s))]
    assert sum(c.bytes for c in carved) == sum(map(sum, sizes))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2), st.booleans()), max_size=8), BUDGETS, PRICES)
def test_every_row_of_a_piece_is_carved_exactly_once_and_pieces_with_a_past_go_alone_and_whole(
    pieces: list[tuple[int, int, bool]], budgets: list[float], price: Price
) -> None:
    ends = [0, *accumulate(n for n, _, _ in pieces)]
    waiting = [
        piece(i, lo, hi, tries=tries, exclusive=exclusive)
        for i, ((lo, hi), (_, tries, exclusive)) in enumerate(zip(pairwise(ends), pieces, strict=True))
    ]
    carved = all_of(Frontier(pieces=list(waiting)), budgets, price)
    rows = [i for c in carved for r in c.ranges for i in range(r.lo, r.hi)]
    assert sorted(rows) == list(range(ends[-1]))
    used = [number for c in carved for number in c.pieces]
    assert len(set(used)) == len(used)
    assert set(used) >= {p.id for p in waiting}
    for c in carved:
        mine = [waiting[number] for number in c.pieces if number < 1000]
        if any(p.tries or p.exclusive for p in mine):
            assert (c.ranges, c.leftover) == ((mine[0].range,), None)
            assert (c.tries, c.exclusive) == (mine[0].tries, mine[0].exclusive)


# -- in seconds


@given(SIZES, st.floats(0.001, 5), PRICES)
def test_a_cut_keeps_to_its_budget_unless_it_is_a_single_row(
    sizes: list[int], budget_s: float, price: Price
) -> None:
    carved = cut(Frontier(blocks=[block(0, sizes)]), budget_s, price)
    assert carved.rows == 1 or price.of(carved.rows, carved.bytes) <= budget_s + 1e-9


def test_a_sub_task_takes_as_many_rows_as_fit_the_budget() -> None:
    assert cut(Frontier(blocks=[block(0, [10] * 100)]), 0.25).ranges == (Range(0, 0, 25, 250),)


def test_a_device_twice_as_fast_gets_twice_the_rows_in_the_same_seconds() -> None:
    fast = Price(0.0, 0.0, 0.0005, 0.0)
    assert cut(Frontier(blocks=[block(0, [10] * 100)]), 0.25, fast).rows == 50


def test_rows_cost_too_not_only_their_bytes() -> None:
    assert cut(Frontier(blocks=[block(0, [0] * 100)]), 1.0, Price(0.0, 0.1, 0.0, 0.0)).rows == 10


def test_long_rows_cost_more_a_byte_than_short_ones() -> None:
    square = Price(0.0, 0.0, 0.0, 1e-6)
    assert cut(Frontier(blocks=[block(0, [100] * 1000)]), 1.0, square).bytes == 10_000
    assert cut(Frontier(blocks=[block(0, [1000] * 100)]), 1.0, square).bytes == 1_000


def test_what_a_sub_task_costs_by_itself_is_counted_once_however_many_blocks_it_spans() -> None:
    frontier = Frontier(blocks=[block(i, [10] * 10) for i in range(10)])
    assert cut(frontier, 1.005, Price(0.5, 0.0, 0.001, 0.0)).rows == 50


def test_a_row_larger_than_the_budget_is_still_carved_alone() -> None:
    assert cut(Frontier(blocks=[block(0, [9000, 10, 10])]), 0.1).ranges == (Range(0, 0, 1, 9000),)


def test_a_fast_device_gets_several_blocks_in_one_sub_task() -> None:
    frontier = Frontier(blocks=[block(0, [10] * 5, cursor=3), block(1, [10] * 5), block(2, [10] * 5)])
    assert cut(frontier, 0.095).ranges == (Range(0, 3, 5, 20), Range(1, 0, 5, 50), Range(2, 0, 2, 20))


def test_blocks_with_different_tasks_left_to_do_are_not_mixed() -> None:
    frontier = Frontier(blocks=[block(0, [10] * 5, todo=0b11), block(1, [10] * 5, todo=0b01)])
    assert [r.block for r in cut(frontier, 1.0).ranges] == [0]


def test_a_payload_stays_bounded_however_cheap_its_rows_are() -> None:
    free = Price(0.0, 0.0, 0.0, 0.0)
    assert cut(Frontier(blocks=[block(i, [1] * 5000) for i in range(3)]), 1.0, free).rows == MAX_ROWS
    assert cut(Frontier(blocks=[block(0, [MAX_BYTES // 4] * 10)]), 1.0, free).rows == 4


class Looks(list[int]):
    """Bytes of a block's rows, and how often somebody looked at them."""

    looks = 0

    def __getitem__(self, i: int) -> int:  # type: ignore[override]
        self.looks += 1
        return super().__getitem__(i)


@pytest.mark.parametrize("sizes", [[8000] * 192 + [20] * 8000, [0] * 8000 + [9000] * 192, [50] * 8192])
def test_a_cut_is_found_in_few_looks_however_unlike_the_rows_are(sizes: list[int]) -> None:
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        cumulative = Looks([0, *accumulate(sizes)])
        budget_s = share * sum(sizes) / 1000
        frontier = Frontier(blocks=[OpenBlock(0, 0, len(sizes), 1, cumulative)])
        assert cut(frontier, budget_s).bytes / 1000 <= budget_s
        assert cumulative.looks < 80


def test_sub_tasks_shrink_as_the_work_runs_out() -> None:
    assert size_s(2.0, 1000.0, 2) == 2.0
    assert size_s(2.0, 4.0, 2) == 1.0
    assert size_s(2.0, 0.1, 2) == MIN_S


@given(st.floats(0.01, 10), st.floats(0, 1e6), st.floats(0, 1e4))
def test_a_sub_task_is_within_the_cap_and_never_below_the_least(
    cap_s: float, left_s: float, n: float
) -> None:
    assert MIN_S <= size_s(cap_s, left_s, n) <= max(MIN_S, cap_s)


# -- rows that came back


def test_rows_that_came_back_go_before_new_ones() -> None:
    frontier = Frontier(pieces=[piece(7, 3, 5), piece(8, 9, 12)], blocks=[block(1, [10] * 5)])
    assert cut(frontier, 1.0).pieces == (7, 8)
    assert not frontier.pieces
    assert len(frontier.blocks) == 1


def test_pieces_are_put_together_up_to_the_budget() -> None:
    frontier = Frontier(pieces=[piece(1, 0, 50), piece(2, 50, 150), piece(3, 150, 200)])
    assert cut(frontier, 1.0).pieces == (1, 3)
    assert cut(frontier, 1.0).pieces == (2,)


def test_a_piece_that_was_cut_for_a_faster_device_is_split_and_the_rest_waits_again() -> None:
    frontier = Frontier(pieces=[piece(1, 10, 110), piece(2, 110, 120)])
    carved = cut(frontier, 0.3)
    assert (carved.pieces, carved.ranges) == ((1,), (Range(0, 10, 40, 300),))
    assert carved.leftover == Range(0, 40, 110, 700)
    assert [p.id for p in frontier.pieces] == [2]


def test_a_piece_that_is_only_little_too_long_is_left_whole() -> None:
    carved = cut(Frontier(pieces=[piece(1, 0, 100)]), 0.8)
    assert (carved.rows, carved.leftover) == (100, None)


def test_a_single_row_that_came_back_is_never_split() -> None:
    assert cut(Frontier(pieces=[piece(1, 0, 1, size=9000)]), 0.1).rows == 1


@pytest.mark.parametrize("past", [{"tries": 1}, {"deaths": 1}, {"exclusive": True}])
def test_a_piece_with_a_past_is_not_split(past: dict[str, int]) -> None:
    assert cut(Frontier(pieces=[piece(1, 0, 100, **past)]), 0.1).rows == 100


def test_pieces_with_different_tasks_left_to_do_are_not_mixed() -> None:
    frontier = Frontier(pieces=[piece(1, 0, 4), piece(2, 4, 8, todo=0b10)])
    assert cut(frontier, 1.0).pieces == (1,)


def test_a_suspect_piece_runs_with_nothing_beside_it() -> None:
    frontier = Frontier(pieces=[piece(1, 0, 4, exclusive=True), piece(2, 4, 8)])
    first, second = cut(frontier, 1.0), cut(frontier, 1.0)
    assert (first.exclusive, first.pieces, second.pieces) == (True, (1,), (2,))


@pytest.mark.parametrize("past", [{"tries": 3}, {"deaths": 1}, {"exclusive": True}])
def test_a_piece_with_a_past_is_never_added_to_a_blameless_one(past: dict[str, int]) -> None:
    frontier = Frontier(pieces=[piece(1, 0, 4), piece(2, 4, 8, **past)])
    assert cut(frontier, 1.0).pieces == (1,)


def test_a_piece_that_was_tried_before_keeps_its_tries_and_deaths() -> None:
    carved = cut(Frontier(pieces=[piece(1, 0, 4, tries=3, deaths=1), piece(2, 4, 8)]), 1.0)
    assert (carved.pieces, carved.tries, carved.deaths) == ((1,), 3, 1)


# -- groups of rows with a common prefix


@given(
    st.lists(st.lists(SIZES, min_size=1, max_size=6), min_size=1, max_size=4), BUDGETS, st.floats(0.01, 10)
)
def test_a_group_is_never_parted_unless_it_alone_exceeds_the_cap(
    blocks: list[list[list[int]]], budgets: list[float], cap_s: float
) -> None:
    """And then only where the cap is full: its rows go out in as few sub-tasks as can be."""
    rows = [[size for group in groups for size in group] for groups in blocks]
    bounds = [[0, *accumulate(len(group) for group in groups)][:-1] for groups in blocks]
    open_blocks = [block(i, s, bounds=b) for i, (s, b) in enumerate(zip(rows, bounds, strict=True))]
    carved = all_of(Frontier(blocks=list(open_blocks)), budgets, KB_A_SECOND, cap_s=cap_s)
    assert [(r.block, i) for c in carved for r in c.ranges for i in range(r.lo, r.hi)] == [
        (b, i) for b, s in enumerate(rows) for i in range(len(s))
    ]
    for r in (r for c in carved for r in c.ranges):
        edges = [*bounds[r.block], len(rows[r.block])]
        if r.hi not in edges:
            begin, end = max(e for e in edges if e < r.hi), min(e for e in edges if e > r.hi)
            assert r.lo >= begin
            assert sum(rows[r.block][begin:end]) / 1000 > cap_s - 1e-9
            assert sum(rows[r.block][r.lo : r.hi + 1]) / 1000 > 0.99 * cap_s - 1e-9


def test_a_group_goes_out_whole_even_beyond_the_budget() -> None:
    frontier = Frontier(blocks=[block(0, [10] * 100, bounds=(0, 60))])
    assert cut(frontier, 0.25, cap_s=2.0).ranges == (Range(0, 0, 60, 600),)
    assert cut(frontier, 0.25, cap_s=2.0).ranges == (Range(0, 60, 100, 400),)


def test_a_cut_is_moved_back_to_where_the_last_whole_group_ends() -> None:
    frontier = Frontier(blocks=[block(0, [10] * 100, bounds=(0, 20, 40, 60))])
    assert cut(frontier, 0.55, cap_s=2.0).ranges == (Range(0, 0, 40, 400),)


def test_a_group_larger_than_the_cap_is_cut_at_the_cap_and_its_rest_stays_together() -> None:
    frontier = Frontier(blocks=[block(0, [10] * 100, bounds=(0, 90))])
    assert [c.rows for c in all_of(frontier, [0.1], KB_A_SECOND, cap_s=0.5)] == [50, 40, 10]


def test_a_group_of_the_next_block_that_does_not_fit_any_more_waits_for_its_own_sub_task() -> None:
    frontier = Frontier(blocks=[block(0, [10] * 5), block(1, [10] * 50, bounds=(0, 30))])
    assert cut(frontier, 0.25, cap_s=2.0).ranges == (Range(0, 0, 5, 50),)
    assert cut(frontier, 0.25, cap_s=2.0).ranges == (Range(1, 0, 30, 300),)


def test_so_many_rows_at_least_are_whole_groups() -> None:
    frontier = Frontier(blocks=[block(0, [5000] * 20, bounds=range(0, 20, 3))])
    counts = []
    while (carved := carve(frontier, 1.0, KB_A_SECOND, least=8)) is not None:
        counts.append(carved.rows)
    assert counts == [6, 6, 8]
    large = Frontier(blocks=[block(0, [5000] * 20, bounds=(0, 12))])
    carved = carve(large, 1.0, KB_A_SECOND, least=8)
    assert carved is not None
    assert carved.rows == 8, "the cap is full with less: it is cut all the same"


def test_small_blocks_that_callers_wait_for_are_cut_whole_or_wait() -> None:
    frontier = Frontier(blocks=[block(0, [500] * 16), block(1, [10] * 3), block(2, [500] * 16)])
    counts = []
    while (carved := carve(frontier, 9.0, KB_A_SECOND, least=16)) is not None:
        counts.append([(r.block, len(r)) for r in carved.ranges])
    assert counts == [[(0, 16), (1, 3)], [(2, 16)]]
