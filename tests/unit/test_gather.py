"""Gather: a lone caller never waits, groups grow with the load, and refusing stores nothing."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.gather import MAX_WAITING_ROWS, Gatherer, GatherFull, Group, Waiting


def gatherer(
    *, width: int = 2, max_rows: int = 16, max_bytes: int = 1000, alone: bool = False, patience_s: float = 0.0
) -> Gatherer[object]:
    return Gatherer(width=width, max_rows=max_rows, max_bytes=max_bytes, alone=alone, patience_s=patience_s)


def ask(caller: object = "one", *, rows: int = 1, size: int = 10, until: float = inf) -> Waiting[object]:
    return Waiting(caller=caller, rows=rows, bytes=size, until=until)


def callers(group: Group[object] | None) -> list[object]:
    assert group is not None
    return [a.caller for a in group.asks]


def test_a_lone_caller_lands_at_once() -> None:
    g = gatherer()
    g.add(ask("a"), 0.0)
    assert callers(g.next(0.0)) == ["a"]
    assert g.next(0.0) is None


def test_while_enough_is_under_way_callers_gather_and_land_together_at_the_next_answer() -> None:
    g = gatherer(width=1)
    g.add(ask("a"), 0.0)
    first = g.next(0.0)
    assert first is not None
    for name in "bcd":
        g.add(ask(name), 0.0)
    assert g.next(0.1) is None
    g.answered(first, 0.2)
    assert callers(g.next(0.2)) == ["b", "c", "d"]


def test_those_who_ask_again_together_land_together() -> None:
    g = gatherer(width=3, patience_s=0.02)
    g.add(ask("long"), 0.0)
    assert callers(g.next(0.0)) == ["long"]
    for name in "abcdef":
        g.add(ask(name), 0.0)
    group = g.next(0.0)
    assert callers(group) == list("abcdef")
    g.answered(group, 1.0)  # type: ignore[arg-type]
    g.add(ask("a"), 1.0)
    g.add(ask("b"), 1.001)
    assert g.next(1.001) is None
    assert g.patient_until() == 1.02
    g.add(ask("c"), 1.002)
    # Seven were here, so three are one group's share: the others are answered in another one.
    assert callers(g.next(1.002)) == ["a", "b", "c"]


def test_nobody_waits_longer_for_those_who_do_not_come_again() -> None:
    g = gatherer(width=3, patience_s=0.02)
    g.add(ask("long"), 0.0)
    g.next(0.0)
    for name in "abcdef":
        g.add(ask(name), 0.0)
    g.answered(g.next(0.0), 1.0)  # type: ignore[arg-type]
    g.add(ask("a"), 1.0)
    assert g.next(1.019) is None
    assert callers(g.next(1.02)) == ["a"]
    # Two are here: neither waits for those who went.
    g.add(ask("b"), 1.03)
    assert callers(g.next(1.03)) == ["b"]


def test_nobody_waits_for_company_behind_a_full_group() -> None:
    g = gatherer(width=3, max_rows=2, patience_s=0.005)
    for name in "abcd":
        g.add(ask(name), 0.0)
    assert callers(g.next(0.0)) == ["a", "b"]
    assert callers(g.next(0.0)) == ["c", "d"]


def test_a_group_holds_no_more_rows_and_bytes_than_one_micro_batch() -> None:
    g = gatherer(max_rows=4, max_bytes=100)
    for name, rows, size in (("a", 2, 10), ("b", 2, 10), ("c", 1, 90), ("d", 1, 20)):
        g.add(ask(name, rows=rows, size=size), 0.0)
    assert callers(g.next(0.0)) == ["a", "b"]
    assert callers(g.next(0.0)) == ["c"]


def test_an_ask_larger_than_a_group_lands_alone_and_is_not_stuck() -> None:
    g = gatherer(max_rows=4)
    g.add(ask("large", rows=64), 0.0)
    g.add(ask("next"), 0.0)
    assert callers(g.next(0.0)) == ["large"]


def test_where_text_is_written_callers_do_not_wait_for_each_other() -> None:
    g = gatherer(width=3, alone=True)
    g.add(ask("a"), 0.0)
    g.add(ask("b"), 0.0)
    assert callers(g.next(0.0)) == ["a"]
    assert callers(g.next(0.0)) == ["b"]


def test_too_many_waiting_rows_are_refused_with_a_time_to_come_back() -> None:
    g = gatherer()
    g.add(ask(rows=MAX_WAITING_ROWS), 0.0)
    with pytest.raises(GatherFull) as refused:
        g.add(ask(), 0.0)
    assert refused.value.retry_after_s >= 1.0
    assert g.waiting_rows == MAX_WAITING_ROWS


def test_a_caller_that_would_give_up_first_is_refused_at_once() -> None:
    g = gatherer()
    g.row_s = 0.1
    g.add(ask(rows=20), 0.0)
    with pytest.raises(GatherFull):
        g.add(ask(until=1.0), 0.0)
    g.add(ask(until=3.0), 0.0)


def test_after_an_outage_callers_are_sent_away_for_seconds_and_not_for_hours() -> None:
    g = gatherer()
    g.row_s = 100.0
    g.add(ask(rows=20), 0.0)
    with pytest.raises(GatherFull) as refused:
        g.add(ask(until=60.0), 0.0)
    assert refused.value.retry_after_s <= 30.0


def test_giving_up_may_be_put_off() -> None:
    g = gatherer(width=0)
    first, second = ask("a", until=1.0), ask("b", until=5.0)
    g.add(first, 0.0)
    g.add(second, 0.0)
    first.until = 3.0
    assert g.late(2.0) == []
    assert g.late(3.0) == [first]
    assert g.late(5.0) == [second]


def test_who_leaves_before_landing_leaves_nothing() -> None:
    g = gatherer(width=1)
    first, second = ask("a"), ask("b")
    g.add(first, 0.0)
    g.add(second, 0.0)
    assert g.leave(first)
    assert callers(g.next(0.0)) == ["b"]
    assert not g.leave(second)


def test_who_has_given_up_is_taken_out() -> None:
    g = gatherer()
    g.add(ask("a", until=1.0), 0.0)
    g.add(ask("b"), 0.0)
    assert [a.caller for a in g.late(1.0)] == ["a"]
    assert callers(g.next(1.0)) == ["b"]
    assert g.waiting_rows == 0


def test_a_group_that_did_not_land_makes_room_and_teaches_nothing() -> None:
    g = gatherer(width=1)
    before = g.row_s
    g.add(ask("a"), 0.0)
    first = g.next(0.0)
    assert first is not None
    g.add(ask("b"), 0.0)
    g.failed(first)
    g.answered(first, 100.0)
    assert callers(g.next(0.0)) == ["b"]
    assert g.row_s == before


moves = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 64)),
        st.tuples(st.just("next"), st.just(0)),
        st.tuples(st.just("answer"), st.integers(0, 9)),
        st.tuples(st.just("leave"), st.integers(0, 99)),
    ),
    max_size=80,
)


@given(moves=moves, width=st.integers(1, 4), alone=st.booleans())
def test_every_ask_lands_once_in_order_or_leaves(
    moves: list[tuple[str, int]], width: int, alone: bool
) -> None:
    g = gatherer(width=width, alone=alone, max_rows=100, max_bytes=10_000)
    added: list[Waiting[object]] = []
    left: list[Waiting[object]] = []
    landed: list[Waiting[object]] = []
    under: list[Group[object]] = []

    def land() -> None:
        group = g.next(0.0)
        if group is not None:
            assert group.rows <= 100 or len(group.asks) == 1
            assert not alone or len(group.asks) == 1
            under.append(group)
            landed.extend(group.asks)
        assert g.under_way <= width

    for number, (kind, value) in enumerate(moves):
        if kind == "add":
            one = ask(number, rows=value)
            g.add(one, 0.0)
            added.append(one)
        elif kind == "next":
            land()
        elif kind == "answer" and under:
            g.answered(under.pop(value % len(under)), 1.0)
        elif kind == "leave" and added:
            one = added[value % len(added)]
            if g.leave(one):
                left.append(one)
        assert g.waiting_rows == sum(a.rows for a in added if a not in landed and a not in left)
    for _ in moves:
        while under:
            g.answered(under.pop(), 1.0)
        land()
    assert [a for a in added if a not in left] == landed
    assert g.waiting_rows == 0
