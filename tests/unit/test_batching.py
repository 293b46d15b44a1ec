"""Micro-batches, the learned budget and the cost model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.run.batching import (
    GAIN,
    MOST_ROWS,
    PATIENCE,
    PROBE_ROWS,
    PROBE_TOKENS,
    SAMPLES,
    Budget,
    Cost,
    fitting,
    limit,
    longest_first,
    overhead_tokens,
    pack,
    padded_tokens,
)


@dataclass(frozen=True)
class Row:
    length: int
    name: int = 0


LENGTHS = st.lists(st.integers(1, 600), max_size=200)


@given(LENGTHS, st.integers(1, 5000), st.integers(1, 64))
def test_packing_keeps_every_row_once_within_the_budget_and_longest_first(
    lengths: list[int], tokens: int, max_rows: int
) -> None:
    rows = [Row(length, i) for i, length in enumerate(lengths)]
    batches = pack(rows, tokens=tokens, max_rows=max_rows)
    assert sorted(r.name for b in batches for r in b) == list(range(len(rows)))
    assert all(len(b) == 1 or padded_tokens(b) <= tokens for b in batches)
    assert all(len(b) <= max_rows for b in batches)
    flat = [r.length for b in batches for r in b]
    assert flat == sorted(flat, reverse=True)


@given(LENGTHS, st.integers(1, 5000))
def test_every_batch_but_the_last_is_full(lengths: list[int], tokens: int) -> None:
    batches = pack([Row(n) for n in lengths], tokens=tokens)
    for batch in batches[:-1]:
        assert batch[0].length * (len(batch) + 1) > tokens or len(batch) == MOST_ROWS


@given(LENGTHS.filter(bool), st.integers(1, 5000), st.floats(0.5, 500))
def test_the_cut_has_the_most_real_tokens_for_what_it_costs(
    lengths: list[int], tokens: int, overhead: float
) -> None:
    rows = longest_first([Row(n) for n in lengths])
    most = fitting(rows, tokens=tokens)

    def worth(count: int) -> float:
        return sum(r.length for r in rows[:count]) / (overhead + max(1, rows[0].length) * count)

    found = fitting(rows, tokens=tokens, overhead_tokens=overhead)
    assert 1 <= found <= most
    assert worth(found) == max(worth(count) for count in range(1, most + 1))


def test_a_cut_stands_before_rows_that_are_much_shorter_unless_starting_again_costs_more() -> None:
    rows = [Row(100)] * 4 + [Row(20)] * 20
    assert fitting(rows, tokens=2400, overhead_tokens=64) == 4
    assert fitting(rows, tokens=2400, overhead_tokens=4000) == 24


def test_the_overhead_is_measured_and_never_far_below_the_guess() -> None:
    cost = free = Cost()
    for tokens in (100, 1000, 200, 900):
        cost = cost.observed(tokens, 0.01 + tokens / 5000)
        free = free.observed(tokens, 1e-5 + tokens / 5000)
    assert overhead_tokens(cost, "cpu") == pytest.approx(50)
    assert overhead_tokens(Cost(), "cpu") == 64
    assert overhead_tokens(free, "cpu") == 16


def test_rows_of_one_length_keep_their_order() -> None:
    rows = [Row(5, 0), Row(9, 1), Row(5, 2), Row(9, 3)]
    assert [r.name for r in longest_first(rows)] == [1, 3, 0, 2]


def test_a_row_longer_than_the_budget_runs_alone() -> None:
    assert pack([Row(900), Row(100)], tokens=512) == [[Row(900)], [Row(100)]]
    assert fitting([], tokens=512) == 0


def test_sorted_rows_waste_little_where_arrival_order_wastes_most() -> None:
    lengths = [8, 250, 12, 7, 240, 9, 30, 256] * 64
    rows = [Row(n) for n in lengths]
    real = sum(lengths)
    packed = sum(padded_tokens(b) for b in pack(rows, tokens=1024))
    arrival = sum(padded_tokens(rows[i : i + 32]) for i in range(0, len(rows), 32))
    assert real / packed > 0.95
    assert real / arrival < 0.45


def climb(budget: Budget, rate_at: dict[int, float]) -> Budget:
    """Feed full micro-batches until the budget has settled, at these tokens per second."""
    for _ in range(200):
        if budget.settled:
            break
        tokens = budget.tokens
        budget = budget.observed(tokens, tokens, tokens / rate_at[tokens])
    return budget


def test_the_budget_doubles_while_throughput_gains_and_falls_back_when_it_loses() -> None:
    found = climb(Budget(1024), {1024: 5000, 2048: 6000, 4096: 7000, 8192: 5500})
    assert (found.tokens, found.settled) == (4096, True)


def test_the_budget_stays_where_doubling_gained_less_than_it_must() -> None:
    found = climb(Budget(1024), {1024: 5000, 2048: 5000 * (GAIN - 0.01)})
    assert (found.tokens, found.settled) == (2048, True)


def test_micro_batches_that_did_not_fill_the_budget_are_no_evidence() -> None:
    budget = Budget(1024)
    assert budget.observed(500, 500, 0.1) == budget
    assert budget.observed(1000, 900, 0.1).seen == 1


def test_one_slow_micro_batch_does_not_spoil_a_level() -> None:
    budget = Budget(1024)
    for seconds in (0.2, 9.0, 0.2, 0.2)[:SAMPLES]:
        budget = budget.observed(1024, 1024, seconds)
    assert budget.below == (1024, 1024 / 0.2)


def test_what_was_lost_to_a_lack_of_memory_comes_back_step_by_step_and_later_where_it_was_too_large_again() -> (
    None
):
    budget = Budget(16384, settled=True).out_of_memory(16384).out_of_memory(8192)
    assert budget.tokens == 4096
    waits = []
    for _ in range(3):
        before, steps = budget.tokens, 0
        while budget.tokens == before and steps < 4 * PATIENCE:
            budget, steps = budget.observed(budget.tokens, budget.tokens, 0.1), steps + 1
        waits.append((budget.tokens, steps))
    assert waits == [(8192, PATIENCE), (16384, PATIENCE), (16384, 4 * PATIENCE)]
    again = budget.out_of_memory(16384).out_of_memory(8192)
    assert (again.tokens, again.patience) == (4096, 2 * PATIENCE)


def test_out_of_memory_sets_a_ceiling() -> None:
    budget = Budget(16384).out_of_memory(16000)
    assert (budget.tokens, budget.ceiling) == (8000, 8000)
    assert climb(budget, {8000: 1e6}).tokens == 8000
    assert budget.out_of_memory(1).tokens == 1


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0.001, 10)), min_size=1, max_size=50))
def test_the_cost_model_never_predicts_negative_or_falling_time(seen: list[tuple[int, float]]) -> None:
    cost = Cost()
    for tokens, seconds in seen:
        cost = cost.observed(tokens, seconds)
    predicted = [cost.seconds(t) for t in (1, 10, 1000, 100_000)]
    assert predicted == sorted(predicted)
    assert predicted[0] >= 0
    assert cost.tokens_in(0.05) >= 1
    assert cost.backlog_s(1000) >= 0


def test_small_interactive_batches_do_not_make_bulk_look_dear() -> None:
    cost = Cost()
    for _ in range(10):
        cost = cost.observed(16_384, 0.002 + 16_384 * 4e-7)
        cost = cost.observed(12, 0.002)
    assert cost.tokens_in(0.05) > 50_000
    assert abs(cost.seconds(16_384) - 0.00855) < 0.001


def test_a_cold_start_is_forgotten_at_once() -> None:
    cost = Cost().observed(512, 5.0).observed(512, 0.1).observed(1024, 0.2)
    assert cost.seconds(1024) < 0.25


def test_micro_batches_are_cut_short_while_somebody_waits() -> None:
    cost = Cost()
    for _ in range(5):
        cost = cost.observed(1000, 0.2)
    assert limit(Budget(1024), cost, "cpu", interactive_waits=False) == (1024, MOST_ROWS)
    assert 495 <= limit(Budget(1024), cost, "cpu", interactive_waits=True)[0] <= 500
    assert 245 <= limit(Budget(1024), cost, "cuda", interactive_waits=True)[0] <= 250


def test_a_model_nobody_has_timed_yet_starts_with_a_small_probe() -> None:
    assert limit(Budget(16_384), Cost(), "cuda", interactive_waits=False) == (PROBE_TOKENS, PROBE_ROWS)


def test_no_micro_batch_keeps_the_first_interactive_row_waiting_for_long() -> None:
    slow = Cost().observed(10, 1.0)  # a function that takes a tenth of a second for each row
    assert limit(Budget(1024), slow, "cpu", interactive_waits=False)[0] == 2


def test_rows_that_are_waited_for_are_not_cut_to_one_where_short_ones_made_a_model_look_slow() -> None:
    """Micro-batches of one row teach nothing of what a start costs, and would go on for ever."""
    cost = Cost()
    for _ in range(20):
        cost = cost.observed(18, 0.1)
    assert limit(Budget(1024), cost, "cpu", interactive_waits=True)[0] < 2 * 18
    assert limit(Budget(1024), cost, "cpu", interactive_waits=True, waited_for=True)[0] >= 16 * 18


def test_a_function_that_takes_seconds_is_asked_few_rows_at_a_time_by_those_who_wait_too() -> None:
    slow = Cost().observed(10, 10.0)
    assert limit(Budget(1024), slow, "cpu", interactive_waits=True, waited_for=True)[0] == 2


def test_what_is_slow_to_start_is_not_run_row_by_row() -> None:
    asks_a_server = Cost()
    for tokens in (100, 1000, 200, 900):
        asks_a_server = asks_a_server.observed(tokens, 1.0 + tokens / 1000)
    assert 950 <= asks_a_server.tokens_in(0.1) <= 1050
    assert 950 <= asks_a_server.tokens_in(1.5) <= 1050
    assert 2950 <= asks_a_server.tokens_in(4.0) <= 3050
