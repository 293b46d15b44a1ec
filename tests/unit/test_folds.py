"""Folds: what a row is given is what a recomputation over the rows before it gives, as exactly as docs/live.md says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.errors import InvalidJob
from motet.folds import Count, Ewm, Fold, Last, Max, Mean, Sum, parse_folds, sent_fields, stored_fields
from motet.protocol.envelope import unwrap, wrap
from motet.protocol.values import Value
from motet.tasks import Function, Generate
from scheduler.blocks import IncomingPart
from scheduler.policy.folds import BUCKETS, KeyState, fold_rows, groups_of, keeps_s, keys_of, misfits, time_of

WINDOW_S = 60.0
WIDTH_S = WINDOW_S / BUCKETS
FOLDS: Mapping[str, Fold] = {
    "n": Count(key="{who}", window="60s", at="{t}"),
    "n_all": Count(key="{who}"),
    "spent": Sum("{x}", key="{who}", window="60s", at="{t}"),
    "usual": Mean("{x}", key="{who}", window="60s", at="{t}"),
    "most": Max("{x}", key="{who}", window="60s", at="{t}"),
    "last": Last("{x}", key="{who}", at="{t}"),
    "trend": Ewm("{x}", key="{who}", half_life="20s", at="{t}"),
}
#: (key, time, value)
Event = tuple[str | None, float, int | None]


def part_of(rows: Sequence[Mapping[str, Value]], **bad: Any) -> IncomingPart:
    return IncomingPart(columns={name: [row[name] for row in rows] for name in rows[0]}, **bad)


def fold(
    folds: Mapping[str, Fold],
    rows: Sequence[Mapping[str, Value]],
    states: Mapping[bytes, KeyState] | None = None,
    *,
    now: float = 0.0,
    **bad: Any,
) -> tuple[list[dict[str, Value]], dict[bytes, KeyState], IncomingPart]:
    """What each row is given, and the states behind them, as they would be read again."""
    part = part_of(rows, **bad)
    digests = {
        t: [None if k is None else f"{t}={k!r}".encode() for k in keys_of(t, part)] for t in groups_of(folds)
    }
    done = fold_rows(folds, part, digests, states or {}, now)
    given_ = [{name: done.part.columns[name][i] for name in folds} for i in range(len(rows))]
    return given_, {**(states or {}), **unwrap(wrap(dict(done.states)))}, done.part


def landed(events: Sequence[Event]) -> list[dict[str, Value]]:
    rows: list[dict[str, Value]] = [{"who": who, "t": t, "x": x} for who, t, x in events]
    return fold(FOLDS, rows)[0]


keys = st.sampled_from(["a", "b", None])
steps = st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 90))
amounts = st.one_of(st.none(), st.integers(-50, 50))


@given(st.lists(st.tuples(keys, steps, amounts), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_a_row_is_given_what_a_recomputation_over_the_rows_before_it_gives(
    drawn: list[tuple[str | None, float, int | None]],
) -> None:
    at, events = 1e9, list[Event]()
    for who, step, x in drawn:
        at += step
        events.append((who, at, x))
    for i, (found, (who, t, _)) in enumerate(zip(landed(events), events, strict=True)):
        mine = [(s, x) for w, s, x in events[:i] if w == who and who is not None]
        bucket = math.floor(t / WIDTH_S)
        inside = [(s, x) for s, x in mine if math.floor(s / WIDTH_S) > bucket - BUCKETS]
        # All that is younger than the window but its oldest sixtieth, and nothing older.
        assert {s for s, _ in mine if s > t - WINDOW_S + WIDTH_S} <= {s for s, _ in inside}
        assert all(s > t - WINDOW_S for s, _ in inside)
        xs, every = [x for _, x in inside if x is not None], [(s, x) for s, x in mine if x is not None]
        assert found["n"] == len(inside)
        assert found["n_all"] == len(mine)
        assert found["spent"] == sum(xs)
        assert found["usual"] == (pytest.approx(sum(xs) / len(xs)) if xs else None)
        assert found["most"] == max(xs, default=None)
        assert found["last"] == (every[-1][1] if every else None)
        weights = [2.0 ** (-(every[-1][0] - s) / 20) for s, _ in every]
        mean = sum(w * x for w, (_, x) in zip(weights, every, strict=True)) / sum(weights) if every else None
        if not every or t - every[-1][0] <= 32 * 20:
            assert found["trend"] == (None if mean is None else pytest.approx(mean, rel=1e-6, abs=1e-6))


@given(st.lists(st.tuples(keys, st.floats(0, 200), amounts), min_size=1, max_size=60))
@settings(deadline=None, max_examples=40)
def test_rows_that_come_late_are_counted_once_where_they_belong(events: list[Event]) -> None:
    for i, (found, (who, t, _)) in enumerate(zip(landed(events), events, strict=True)):
        mine = [s for w, s, _ in events[:i] if w == who and who is not None]
        bucket = math.floor(t / WIDTH_S)
        inside = [s for s in mine if bucket - BUCKETS < math.floor(s / WIDTH_S) <= bucket]
        if t >= max(mine, default=0.0):
            assert found["n"] == len(inside)
        # To one that is late itself some of what was then is forgotten; nothing is added.
        assert isinstance(found["n"], int)
        assert found["n"] <= len(inside)
        newest = max((s for w, s, x in events[:i] if w == who and x is not None), default=None)
        held = [x for w, s, x in events[:i] if w == who and s == newest and x is not None]
        assert found["last"] == (held[-1] if held and who is not None else None)


@given(st.lists(st.tuples(keys, steps, amounts), min_size=1, max_size=40), st.data())
@settings(deadline=None, max_examples=25)
def test_it_does_not_matter_how_rows_are_grouped_to_landings(
    drawn: list[tuple[str | None, float, int | None]], data: st.DataObject
) -> None:
    at, rows = 1e9, list[dict[str, Value]]()
    for who, step, x in drawn:
        at += step
        rows.append({"who": who, "t": at, "x": x})
    states: dict[bytes, KeyState] = {}
    apart: list[dict[str, Value]] = []
    left = rows
    while left:
        size = data.draw(st.integers(1, len(left)))
        found, states, _ = fold(FOLDS, left[:size], states)
        apart += found
        left = left[size:]
    together, end, _ = fold(FOLDS, rows)
    assert apart == together
    assert states == end


def test_a_key_takes_bounded_storage_however_many_rows_it_has() -> None:
    rows: list[dict[str, Value]] = [{"who": "a", "t": 1e9 + i / 7, "x": i} for i in range(5_000)]
    _, states, _ = fold(FOLDS, rows)
    (state,) = states.values()
    assert max(len(entry) for entry in state if isinstance(entry, dict)) <= BUCKETS
    assert len(wrap(state)) < 4_000


def test_ints_and_decimals_add_up_exactly_and_keep_their_types() -> None:
    folds = {"s": Sum("{x}", key="{k}"), "m": Max("{x}", key="{k}")}
    rows: list[dict[str, Value]] = [
        {"k": 1, "x": 2**62},
        {"k": 1, "x": Decimal("0.1")},
        {"k": 1, "x": Decimal("0.2")},
        {"k": 1, "x": 0.5},
        {"k": 1, "x": 0},
    ]
    given_, _, _ = fold(folds, rows)
    assert [row["s"] for row in given_[:4]] == [
        0,
        2**62,
        Decimal(2**62) + Decimal("0.1"),
        Decimal(2**62) + Decimal("0.3"),
    ]
    assert given_[4]["s"] == pytest.approx(2.0**62)
    assert [type(row["m"]) for row in given_[1:]] == [int] * 4


def test_a_sum_beyond_64_bits_is_an_error_of_who_reads_it_until_it_is_back() -> None:
    folds = {"s": Sum("{x}", key="{k}")}
    big = 2**63 - 1
    given_, states, part = fold(folds, [{"k": "a", "x": x} for x in (big, big, -big, 1)])
    assert [row["s"] for row in given_] == [0, big, "", big]
    assert part.bad_fields == {"s": {2: ("overflow", "s: what was folded of its key is beyond 64 bits")}}
    again, _, part = fold(folds, [{"k": "a", "x": 0}], states)
    assert again == [{"s": ""}]
    assert list(part.bad_fields) == ["s"]


def test_floats_too_large_are_an_error_and_no_infinity() -> None:
    folds = {"s": Sum("{x}", key="{k}"), "m": Mean("{x}", key="{k}")}
    _, _, part = fold(folds, [{"k": "a", "x": 1.7e308}, {"k": "a", "x": 1.7e308}, {"k": "a", "x": 1.0}])
    assert {name: list(bad) for name, bad in part.bad_fields.items()} == {"s": [2], "m": [2]}


def test_keys_have_their_types_and_null_is_no_key() -> None:
    part = part_of([{"a": 1, "b": "x"}, {"a": "1", "b": None}, {"a": None, "b": "y"}])
    assert keys_of("{a}", part) == [1, "1", None]
    assert keys_of("{a}/{b}", part) == ["1/x", None, None]
    folds = {"n": Count(key="{a}")}
    rows: list[dict[str, Value]] = [{"a": k} for k in (1, 1, "1", True, None, None, 1)]
    assert [row["n"] for row in fold(folds, rows)[0]] == [0, 1, 0, 0, 0, 0, 2]


def test_keys_of_two_templates_are_two() -> None:
    folds = {"n": Count(key="{a}"), "m": Count(key="{b}"), "x": Max("{a}", key="{b}")}
    rows: list[dict[str, Value]] = [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 2}]
    assert fold(folds, rows)[0] == [
        {"n": 0, "m": 0, "x": None},
        {"n": 0, "m": 1, "x": 1},
        {"n": 1, "m": 0, "x": None},
    ]


def test_a_row_that_is_bad_for_a_fold_neither_takes_nor_adds() -> None:
    folds = {"n": Count(key="{k}"), "s": Sum("{x}", key="{k}")}
    why = ("bad_row", "x: got text")
    given_, _, part = fold(
        folds,
        [{"k": "a", "x": 1}, {"k": "a", "x": ""}, {"k": "", "x": ""}, {"k": "a", "x": 5}],
        bad={2: ("bad_row", "no row")},
        bad_fields={"x": {1: why}, "s": {1: why}},
    )
    assert given_ == [{"n": 0, "s": 0}, {"n": 1, "s": ""}, {"n": "", "s": ""}, {"n": 2, "s": 1}]
    assert part.bad_fields == {"x": {1: why}, "s": {1: why}}


def test_last_keeps_any_value_for_as_long_as_its_window() -> None:
    folds = {"city": Last("{c}", key="{k}", window="1h", at="{t}")}
    rows: list[dict[str, Value]] = [
        {"k": 1, "c": ["a", 2], "t": 0},
        {"k": 1, "c": None, "t": 3599},
        {"k": 1, "c": date(2026, 12, 1), "t": 3600},
        {"k": 1, "c": "x", "t": 3601},
    ]
    assert [row["city"] for row in fold(folds, rows)[0]] == [None, ["a", 2], None, date(2026, 12, 1)]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (1.5, 1.5),
        (Decimal("2.5"), 2.5),
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01 01:00:00+01:00", 0.0),
        ("1970-01-02", 86_400.0),
        (date(1970, 1, 2), 86_400.0),
        (datetime(1970, 1, 1, 0, 0, 1), 1.0),
        (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), 1.0),
        (datetime(1, 1, 1), -62_135_596_800.0),
        ("yesterday", None),
        ("", None),
        (True, None),
        (None, None),
        ([1], None),
        # Milliseconds.
        (1_764_500_000_000, None),
    ],
)
def test_what_a_time_is(value: Value, seconds: float | None) -> None:
    assert time_of(value) == seconds


def test_what_cannot_be_folded_is_named_by_its_field() -> None:
    columns: dict[str, list[Value]] = {
        "who": ["a"] * 6,
        "t": [1, "soon", 3, None, 5, 6],
        "x": ["12", 1, None, 2, True, Decimal("1E+400")],
    }
    found = misfits({"n": FOLDS["n"], "spent": FOLDS["spent"]}, columns, {"x": {0}})
    assert {name: {i: (m.field, m.got) for i, m in bad.items()} for name, bad in found.items()} == {
        "n": {1: ("t", "text"), 3: ("t", "null")},
        "spent": {1: ("t", "text"), 3: ("t", "null"), 4: ("x", "bool"), 5: ("x", "decimal")},
    }
    long: dict[str, list[Value]] = {"c": ["é" * 512, "é" * 513]}
    assert list(misfits({"l": Last("{c}", key="{c}")}, long, {})["l"]) == [1]


def test_a_key_is_kept_for_the_longest_of_its_folds() -> None:
    day, week = Count(key="{a}", window="1d"), Max("{x}", key="{a}", window="1w")
    trend, ever = Ewm("{x}", key="{a}", half_life="1d"), Sum("{x}", key="{a}")
    assert keeps_s({"d": day, "w": week}) == 7 * 86_400
    assert keeps_s({"d": day, "e": trend}) == 32 * 86_400
    assert keeps_s({"d": day, "s": ever}) is None


# -- specs -----------------------------------------------------------------------------------------

TASKS = {
    "risk": Function("rule", input="{n_week}"),
    "note": Generate("llm", prompt="{text}, the {n_week}th: {risk}"),
}


def test_callers_send_what_tasks_and_folds_read_and_no_state() -> None:
    folds = parse_folds(
        {
            "n_week": {"kind": "count", "key": "{who}", "window": "7d", "at": "{t}"},
            "spent": Sum("{x}", key="{who}").to_json(),
        },
        TASKS,
    )
    assert sent_fields(TASKS, folds) == ("text", "who", "t", "x")
    assert stored_fields(TASKS, folds) == ("n_week", "text", "who", "t", "x", "spent")


@pytest.mark.parametrize(
    ("state", "field"),
    [
        ([], "state"),
        ({}, "state"),
        ({f"s{i}": {"kind": "count", "key": "{k}"} for i in range(33)}, "state"),
        ({"no name": {"kind": "count", "key": "{k}"}}, "state"),
        ({"risk": {"kind": "count", "key": "{k}"}}, "state.risk"),
        ({"a": {"kind": "count", "key": "{b}"}, "b": {"kind": "count", "key": "{k}"}}, "state.a"),
        ({"a": "count"}, "state.a"),
        ({"a": {"kind": "median", "key": "{k}"}}, "state.a.kind"),
        ({"a": {"kind": "count"}}, "state.a.key"),
        ({"a": {"kind": "count", "key": "all"}}, "state.a.key"),
        ({"a": {"kind": "count", "key": "{k"}}, "state.a.key"),
        ({"a": {"kind": "count", "key": "{k}", "window": 7}}, "state.a.window"),
        ({"a": {"kind": "count", "key": "{k}", "window": "0s"}}, "state.a.window"),
        ({"a": {"kind": "count", "key": "{k}", "window": "7 days"}}, "state.a.window"),
        ({"a": {"kind": "count", "key": "{k}", "window": "9999d"}}, "state.a.window"),
        ({"a": {"kind": "count", "key": "{k}", "value": "{x}"}}, "state.a.value"),
        ({"a": {"kind": "sum", "key": "{k}"}}, "state.a.value"),
        ({"a": {"kind": "sum", "key": "{k}", "value": "{x}{y}"}}, "state.a.value"),
        ({"a": {"kind": "sum", "key": "{k}", "value": "{x}", "at": "t"}}, "state.a.at"),
        ({"a": {"kind": "ewm", "key": "{k}", "value": "{x}"}}, "state.a.half_life"),
        ({"a": {"kind": "ewm", "key": "{k}", "value": "{x}", "half_life": ""}}, "state.a.half_life"),
        (
            {"a": {"kind": "ewm", "key": "{k}", "value": "{x}", "half_life": "1d", "window": "1d"}},
            "state.a.window",
        ),
    ],
)
def test_a_fold_that_is_none_is_refused_by_name(state: object, field: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        parse_folds(state, TASKS)
    assert field in [problem.field for problem in refused.value.problems]
