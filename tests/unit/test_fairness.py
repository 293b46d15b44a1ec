"""Fairness: who is served next, and what a queue of changing keys says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.policy.fairness import BULK, CLASS_WEIGHTS, NORMAL, Account, FairQueue, begun

WEIGHTS = st.floats(0.1, 10)
QUANTA = st.floats(0.01, 20)


def present(parent: Account, weight: float = 1.0) -> Account:
    account = Account(weight, parent)
    account.come()
    return account


def serve(
    accounts: list[Account], seconds: Callable[[Account], float], until_s: float
) -> dict[Account, float]:
    """Serve whoever comes first until so much was served: what each was given."""
    given_s = dict.fromkeys(accounts, 0.0)
    while sum(given_s.values()) < until_s:
        first = min(accounts, key=lambda a: a.start)
        begun(first.charge(seconds(first)))
        given_s[first] += seconds(first)
    return given_s


# -- accounts


@given(st.lists(WEIGHTS, min_size=2, max_size=5), st.lists(QUANTA, min_size=1, max_size=60))
def test_two_that_wait_all_the_time_never_differ_by_more_than_a_quantum_each(
    weights: list[float], quanta: list[float]
) -> None:
    """By seconds / weight, over any interval: the bound of start-time fair queueing (its theorem 1)."""
    root = Account(1.0)
    accounts = [present(root, weight) for weight in weights]
    longest = dict.fromkeys(accounts, 0.0)
    served = [dict.fromkeys(accounts, 0.0)]
    for quantum in quanta:
        first = min(accounts, key=lambda a: a.start)
        begun(first.charge(quantum))
        longest[first] = max(longest[first], quantum / first.weight)
        served.append({**served[-1], first: served[-1][first] + quantum / first.weight})
    for one in accounts:
        for other in accounts:
            lead = [now[one] - now[other] for now in served]
            assert max(lead) - min(lead) <= longest[one] + longest[other] + 1e-6


@given(
    st.lists(st.tuples(st.sampled_from(["come", "go", "serve"]), st.integers(0, 3), QUANTA), max_size=80),
    st.lists(WEIGHTS, min_size=4, max_size=4),
)
def test_the_bound_holds_from_the_moment_that_both_are_there(
    events: list[tuple[str, int, float]], weights: list[float]
) -> None:
    """Whoever comes and goes meanwhile, and whatever the newcomer was given before."""
    root = Account(1.0)
    accounts = [Account(weight, root) for weight in weights]
    longest = dict.fromkeys(accounts, 0.0)
    #: (one, other) -> how far one led while both were there: least, most, now.
    leads: dict[tuple[Account, Account], tuple[float, float, float]] = {}
    for what, number, quantum in events:
        account = accounts[number]
        if what == "come" and not account.present:
            account.come()
            leads |= {(account, other): (0.0, 0.0, 0.0) for other in accounts if other.present}
        elif what == "go" and account.present:
            account.go()
            leads = {pair: lead for pair, lead in leads.items() if account not in pair}
        elif what == "serve" and root.present:
            first = min((a for a in accounts if a.present), key=lambda a: a.start)
            begun(first.charge(quantum))
            longest[first] = max(longest[first], quantum / first.weight)
            for (one, other), (least, most, lead) in leads.items():
                lead += quantum / first.weight * ((one is first) - (other is first))
                leads[one, other] = (min(least, lead), max(most, lead), lead)
    for (one, other), (least, most, _) in leads.items():
        assert most - least <= longest[one] + longest[other] + 1e-6


def test_a_newcomer_starts_where_the_others_are_never_at_zero() -> None:
    root = Account(1.0)
    old = present(root)
    serve([old], lambda _: 1.0, 1000)
    new = present(root)
    assert new.start == root.clock == 999
    assert serve([old, new], lambda _: 1.0, 100)[old] == pytest.approx(50, abs=1)


def test_who_pauses_saves_nothing_up() -> None:
    root = Account(1.0)
    busy, lazy = present(root), present(root)
    lazy.go()
    serve([busy], lambda _: 1.0, 1000)
    lazy.come()
    assert serve([busy, lazy], lambda _: 1.0, 100)[lazy] == pytest.approx(50, abs=1)


def test_who_was_served_ahead_of_others_and_pauses_is_still_ahead_when_it_comes_back() -> None:
    root = Account(1.0)
    greedy, patient = present(root), present(root)
    greedy.charge(100)
    greedy.go()
    greedy.come()
    assert serve([greedy, patient], lambda _: 1.0, 100)[patient] == 100


def test_an_account_is_away_only_when_nothing_below_it_is_left() -> None:
    root = Account(1.0)
    tenant, other = Account(1.0, root), present(root)
    first, second = Account(1.0, tenant), Account(1.0, tenant)
    first.come()
    second.come()
    first.go()
    begun(other.charge(50))
    begun(other.charge(50))
    assert (tenant.start, tenant.present, root.present) == (0.0, 1, 2)
    second.go()
    second.come()
    assert tenant.start == 50


def test_work_that_still_waits_for_its_device_holds_no_newcomer_back() -> None:
    root = Account(1.0)
    tenant = Account(1.0, root)
    job = present(tenant)
    turns = [job.charge(10) for _ in range(3)]
    assert (job.start, tenant.start, tenant.clock, root.clock) == (30, 30, 0, 0)
    begun(turns[1])
    assert (tenant.clock, root.clock) == (10, 10)
    begun(turns[0])
    assert (tenant.clock, root.clock) == (10, 10)


def test_seconds_are_shared_by_weight() -> None:
    root = Account(1.0)
    light, heavy = present(root, 1.0), present(root, 3.0)
    given_s = serve([light, heavy], lambda a: 2.0 if a is light else 0.5, 4000)
    assert given_s[heavy] / given_s[light] == pytest.approx(3, rel=0.01)


def test_normal_work_gets_four_times_what_bulk_work_gets() -> None:
    root = Account(1.0)
    normal, bulk = present(root, CLASS_WEIGHTS[NORMAL]), present(root, CLASS_WEIGHTS[BULK])
    given_s = serve([normal, bulk], lambda _: 2.0, 1000)
    assert given_s[normal] / given_s[bulk] == pytest.approx(4, rel=0.02)


def test_a_tenant_with_many_jobs_gets_no_more_than_one_with_a_single_job() -> None:
    root = Account(1.0)
    many, single = Account(1.0, root), Account(1.0, root)
    jobs = [present(many) for _ in range(9)] + [present(single)]
    given_s = dict.fromkeys(jobs, 0.0)
    for _ in range(1000):
        tenant = min((many, single), key=lambda a: a.start)
        job = min((j for j in jobs if j.parent is tenant), key=lambda a: a.start)
        job.charge(1.0)
        given_s[job] += 1.0
    assert given_s[jobs[-1]] == pytest.approx(500, abs=1)
    assert all(given_s[job] == pytest.approx(500 / 9, abs=1) for job in jobs[:-1])


@given(st.lists(st.tuples(QUANTA, QUANTA), min_size=1, max_size=40), WEIGHTS)
def test_an_account_and_all_above_it_stand_where_what_was_truly_used_puts_them(
    quanta: list[tuple[float, float]], weight: float
) -> None:
    root = Account(1.0)
    tenant = Account(weight, root)
    jobs = [Account(1.0, tenant), Account(2.0, tenant)]
    for i, (predicted, used) in enumerate(quanta):
        jobs[i % 2].charge(predicted)
        jobs[i % 2].correct(used - predicted)
    used_s = [sum(used for _, used in quanta[i::2]) for i in range(2)]
    assert jobs[0].start == pytest.approx(used_s[0], abs=1e-6)
    assert jobs[1].start == pytest.approx(used_s[1] / 2, abs=1e-6)
    assert tenant.start == pytest.approx(sum(used_s) / weight, abs=1e-6)


def test_who_lags_is_owed_device_seconds_whatever_its_weight() -> None:
    root = Account(1.0)
    served, waiting = present(root), present(root, 2.0)
    serve([served], lambda _: 1.0, 11)
    assert (waiting.owed, served.owed) == (20, -1)


# -- a line


@dataclass(eq=False)
class Guest:
    number: int
    key: float
    waits: bool = True


def queue_of(*guests: Guest) -> FairQueue[Guest]:
    queue = FairQueue[Guest](lambda g: (g.key,), lambda g: g.waits)
    for guest in guests:
        queue.join(guest)
    return queue


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "leave", "grow", "shrink", "look"]),
            st.integers(0, 5),
            st.integers(0, 30),
        ),
        max_size=120,
    )
)
@example([("join", 1, 0), ("shrink", 0, 1), ("shrink", 1, 2), ("join", 0, 0)])
def test_the_first_in_line_is_whoever_a_look_at_everybody_would_find(
    events: list[tuple[str, int, int]],
) -> None:
    guests = [Guest(i, 0.0, waits=False) for i in range(6)]
    queue = queue_of()
    for what, number, amount in [*events, ("look", 0, 0)]:
        guest = guests[number]
        if what == "join":
            guest.waits = True
            queue.join(guest)
        elif what == "leave":
            guest.waits = False
        elif what == "grow":
            guest.key += amount
        elif what == "shrink":
            guest.key -= amount
            queue.again(guest)
        else:
            first = queue.first()
            least = min((g.key for g in guests if g.waits), default=None)
            assert (first.key if first is not None else None) == least
            assert first is None or first.waits


def test_whoever_joins_twice_is_in_line_once() -> None:
    guest = Guest(0, 1.0)
    queue = queue_of(guest, guest)
    guest.waits = False
    assert queue.first() is None
    assert not queue._heap


def test_who_left_and_comes_back_stands_where_its_key_puts_it() -> None:
    back, other = Guest(0, 1.0), Guest(1, 2.0)
    queue = queue_of(back, other)
    back.waits = False
    assert queue.first() is other
    back.waits, back.key = True, 3.0
    queue.join(back)
    assert queue.first() is other
    other.key = 4.0
    assert queue.first() is back


def test_among_equals_those_who_came_first_go_first() -> None:
    guests = [Guest(i, 0.0) for i in range(5)]
    queue = queue_of(*guests)
    found = []
    while (first := queue.first()) is not None:
        found.append(first.number)
        first.waits = False
    assert found == [0, 1, 2, 3, 4]


def test_a_line_forgets_those_who_left() -> None:
    guests = [Guest(i, float(i)) for i in range(100)]
    queue = queue_of(*guests)
    for guest in guests:
        guest.waits = False
        guest.key -= 0.5
        queue.again(guest)
    assert queue.first() is None
    assert not queue._heap
    assert not queue._keys


def test_keys_that_grow_cost_few_looks_however_long_the_line() -> None:
    """Ten thousand rounds of a thousand guests, each served and put back: some two looks a round, not a thousand."""
    looks = 0

    def key(guest: Guest) -> tuple[float, ...]:
        nonlocal looks
        looks += 1
        return (guest.key,)

    queue = FairQueue[Guest](key, lambda g: g.waits)
    for i in range(1000):
        queue.join(Guest(i, float(i % 7)))
    looks = 0
    for i in range(10_000):
        first = queue.first()
        assert first is not None
        first.key += 1 + i % 3
    assert looks < 60_000
