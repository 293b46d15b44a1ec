"""The cost model: right soon after a bad guess, steady under noise, and never negative."""

from __future__ import annotations

import random
from itertools import combinations
from math import exp, isfinite
from statistics import mean, median

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.policy.cost import PACE_RANGE, PRIOR_BYTES_PER_TOKEN, Rate, RateKey, Rates, Workload

KEY: RateKey = ("trunk", "NVIDIA L4", "fast")
SECONDS_PER_TOKEN = 5e-5
SEEDS = range(20)


def truth(work: Workload) -> float:
    """Seconds that this work takes, but for noise."""
    return 0.01 + 2e-4 * work.rows + SECONDS_PER_TOKEN * work.tokens + 2e-8 * work.squares


def noise(dice: random.Random, sigma: float = 0.3) -> float:
    """Of mean 1."""
    return exp(dice.gauss(-sigma * sigma / 2, sigma))


def rows_of(length: float, seconds: float = 1.5) -> Workload:
    """Rows of one length that take about so long."""
    rows = max(1, int(seconds / truth(Workload(1, length, length * length))))
    return Workload(rows, rows * length, rows * length * length)


def any_rows(dice: random.Random) -> Workload:
    """A sub-task as it is carved: rows of about one length, but of another one each time."""
    return rows_of(min(512.0, max(4.0, exp(dice.gauss(4.5, 0.8)))), dice.uniform(0.5, 2.0))


def guess(wrong: float = 1.0) -> Rate:
    return Rate.prior(wrong * SECONDS_PER_TOKEN)


def work_goes_on(
    rates: Rates, dice: random.Random, worker: str, times: int = 1, *, slower: float = 1.0
) -> None:
    for _ in range(times):
        work = any_rows(dice)
        seconds = truth(work) * slower * noise(dice)
        rates.observe(KEY, worker, guess(), work, seconds, 4 * work.tokens)


def error_of_the_kind(rates: Rates) -> float:
    """Predicted beside true seconds, over works of all lengths."""
    dice = random.Random(0)
    works = [any_rows(dice) for _ in range(40)]
    return median(rates.learned[KEY].seconds(work) / truth(work) for work in works)


@pytest.mark.parametrize("wrong", [1.0, 30.0, 1 / 30])
def test_predictions_are_within_a_tenth_of_the_truth_after_twenty_noisy_outcomes(wrong: float) -> None:
    errors = []
    for seed in SEEDS:
        dice, rate = random.Random(seed), guess(wrong)
        for i in range(60):
            work = any_rows(dice)
            if i >= 20:
                errors.append(abs(rate.seconds(work) / truth(work) - 1))
            rate = rate.observed(work, truth(work) * noise(dice))
    assert mean(errors) <= 0.10


@pytest.mark.parametrize("wrong", [30.0, 1 / 30])
def test_a_bad_guess_is_right_after_two_outcomes(wrong: float) -> None:
    for seed in SEEDS:
        dice, rate = random.Random(seed), guess(wrong)
        for _ in range(2):
            work = any_rows(dice)
            rate = rate.observed(work, truth(work) * noise(dice, 0.05))
        for _ in range(20):
            work = any_rows(dice)
            assert 1 / 1.5 < rate.seconds(work) / truth(work) < 1.5


@pytest.mark.parametrize(("usual", "then"), [(64, 256), (256, 64), (64, 400)])
def test_rows_of_another_length_are_priced_right_soon_after_many_of_one_length(
    usual: float, then: float
) -> None:
    for seed in SEEDS:
        dice, rate = random.Random(seed), guess(3.0)
        for _ in range(100):
            rate = rate.observed(rows_of(usual), truth(rows_of(usual)) * noise(dice))
        other = rows_of(then)
        assert 1 / 2.5 < rate.seconds(other) / truth(other) < 2.5
        for _ in range(10):
            rate = rate.observed(other, truth(other) * noise(dice))
        assert 1 / 1.4 < rate.seconds(other) / truth(other) < 1.4


def test_ten_thousand_outcomes_of_one_length_do_not_wear_it_out() -> None:
    dice, rate = random.Random(1), guess()
    for i in range(10_000):
        work = rows_of(100, 0.5 + i % 3)
        assert i < 20 or 1 / 2 < rate.seconds(work) / truth(work) < 2
        rate = rate.observed(work, truth(work) * noise(dice))
    assert all(rate.covariance[5 * i] > 0 for i in range(4))
    for i, j in combinations(range(4), 2):
        assert rate.covariance[4 * i + j] == pytest.approx(rate.covariance[4 * j + i], rel=1e-6), "symmetric"


@pytest.mark.parametrize("cold_at", [0, 1, 2, 3, 10])
def test_a_cold_start_is_forgotten(cold_at: int) -> None:
    errors = []
    for seed in SEEDS:
        dice, rates = random.Random(seed), Rates()
        for i in range(40):
            work_goes_on(rates, dice, "w", slower=20.0 if i == cold_at else 1.0)
        errors.append(error_of_the_kind(rates) * rates.pace("w"))
    assert median(errors) == pytest.approx(1.0, abs=0.1)
    assert all(1 / 1.6 < error < 1.6 for error in errors), "of twenty times"


class Cluster:
    """Four workers of one kind: three are well and report four times as often as the last, once that is slow."""

    def __init__(self, seed: int) -> None:
        self.dice, self.rates = random.Random(seed), Rates()

    def all_are_well(self, rounds: int) -> None:
        for _ in range(rounds):
            for worker in ("a", "b", "c", "slow"):
                work_goes_on(self.rates, self.dice, worker)

    def one_is_slow(self, outcomes: int) -> None:
        for _ in range(outcomes):
            for worker in ("a", "b", "c"):
                work_goes_on(self.rates, self.dice, worker, 4)
            work_goes_on(self.rates, self.dice, "slow", slower=4.0)


@pytest.fixture
def clusters() -> list[Cluster]:
    return [Cluster(seed) for seed in SEEDS]


def test_a_worker_that_turns_slow_is_found_within_eight_outcomes_and_its_kind_stays_fast(
    clusters: list[Cluster],
) -> None:
    moved = []
    for cluster in clusters:
        cluster.all_are_well(20)
        before = error_of_the_kind(cluster.rates)
        cluster.one_is_slow(8)
        assert cluster.rates.pace("slow") > 1.8 * max(map(cluster.rates.pace, "abc"))
        moved.append(error_of_the_kind(cluster.rates) / before)
    assert median(moved) < 1.15
    assert max(moved) < 1.25


def test_the_pace_of_a_slow_worker_returns_when_it_recovers(clusters: list[Cluster]) -> None:
    for cluster in clusters:
        cluster.all_are_well(10)
        cluster.one_is_slow(20)
        cluster.all_are_well(30)
        others = mean(map(cluster.rates.pace, "abc"))
        assert 0.5 < cluster.rates.pace("slow") / others < 1.8


def test_a_slow_worker_is_predicted_slow_and_the_others_are_not(clusters: list[Cluster]) -> None:
    slow, well = [], []
    for cluster in clusters:
        cluster.all_are_well(10)
        cluster.one_is_slow(20)
        kind = error_of_the_kind(cluster.rates)
        slow.append(kind * cluster.rates.pace("slow"))
        well.append(kind * cluster.rates.pace("a"))
    assert median(slow) == pytest.approx(4.0, rel=0.25)
    assert median(well) == pytest.approx(1.0, rel=0.15)


counts = st.integers(1, 1 << 40)
observations = st.lists(
    st.tuples(counts, counts, st.floats(0, 1), st.floats(0, 1e7), st.integers(0, 1 << 40)), max_size=12
)


@given(observations, st.floats(1e-12, 1e6))
@example([(1, 1, 0.0, 1e7, 0), (1, 1 << 39, 1.0, 1e-300, 0), (1, 1, 0.0, 1e7, 0)], 1e-12)
def test_whatever_the_wire_lets_through_no_coefficient_is_negative_or_infinite(
    seen: list[tuple[int, int, float, float, int]], per_token: float
) -> None:
    rates = Rates()
    for rows, tokens, unlike, seconds, text_bytes in seen:
        least, most = tokens**2 / rows, float(tokens) ** 2
        squares = min(most, max(0.0, least + unlike * (most - least)))
        rates.observe(KEY, "w", Rate.prior(per_token), Workload(rows, tokens, squares), seconds, text_bytes)
    rate = rates.learned.get(KEY, Rate.prior(per_token))
    assert all(isfinite(c) and c >= 0 for c in rate.coefficients)
    assert all(map(isfinite, rate.covariance))
    assert all(isfinite(value) and value > 0 for value in (rate.bytes_per_token, rate.seconds_per_token))
    least_pace, most_pace = PACE_RANGE
    assert least_pace <= rates.pace("w") <= most_pace


def test_a_job_s_own_ratio_of_bytes_to_tokens_prices_its_bytes() -> None:
    rate = Rate((0.0, 0.0, 1e-3, 0.0), (0.0,) * 16, bytes_per_token=4.0)
    assert rate.price().of(10, 4000) == pytest.approx(1.0)
    assert rate.price(bytes_per_token=2.0).of(10, 4000) == pytest.approx(2.0)
    assert rate.price(pace=3.0).of(10, 4000) == pytest.approx(3.0)
    assert rate.price().of(0, 0) == 0.0


def test_long_rows_cost_more_than_their_bytes() -> None:
    price = Rate((0.0, 0.0, 1e-4, 1e-6), (0.0,) * 16, bytes_per_token=4.0).price()
    assert price.of(10, 40_000) > 1.5 * price.of(100, 40_000)


def test_the_ratio_of_bytes_to_tokens_is_that_of_the_texts_seen() -> None:
    rate = guess()
    assert rate.bytes_per_token == PRIOR_BYTES_PER_TOKEN
    rate = rate.observed(rows_of(100), 1.0, 2 * rows_of(100).tokens)
    assert rate.bytes_per_token == pytest.approx(2.0)
    assert rate.tokens_per_row == pytest.approx(100)


def test_an_unknown_device_reads_texts_as_the_known_ones_do_and_is_guessed_by_its_kind() -> None:
    rates = Rates({KEY: guess().observed(rows_of(100), 1.0, 2 * rows_of(100).tokens)})
    gpu, cpu = (
        rates.of(("trunk", "another", "fast"), device_kind=kind, parameters=100_000_000)
        for kind in ("cuda", "cpu")
    )
    assert gpu.bytes_per_token == pytest.approx(2.0)
    assert gpu.seconds_per_token < cpu.seconds_per_token / 100
    assert rates.of(KEY, device_kind="cpu", parameters=1) is rates.learned[KEY]


def test_loading_is_guessed_from_its_bytes_and_then_learned() -> None:
    rates = Rates()
    assert rates.load_s("m", "d", weights_bytes=5e9) > rates.load_s("m", "d", weights_bytes=1e8) > 0
    for seconds in (20.0, 10.0):
        rates.loaded(("m", "d"), seconds)
    assert rates.load_s("m", "d", weights_bytes=5e9) == 15.0
    assert rates.load_s("m", "other", weights_bytes=0) == Rates().load_s("m", "d", weights_bytes=0)
