"""Conditions: what is understood, what a row's values make of them, and what is refused with words."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.conditions import BadCondition, condition
from motet.errors import InvalidJob
from motet.tasks import Classify, parse


@pytest.mark.parametrize(
    ("written", "row", "holds"),
    [
        ("alert != 'none' and risk > 0.4", {"alert": "fire", "risk": 0.5}, True),
        ("alert != 'none' and risk > 0.4", {"alert": "none", "risk": 0.5}, False),
        ("risk > 0.4", {"risk": None}, False),
        ("not risk > 0.4", {"risk": None}, True),
        ("risk == null or risk >= 1", {"risk": 1}, True),
        ("0.2 < risk <= 0.4", {"risk": Decimal("0.4")}, True),
        ("risk > -1", {"risk": 0}, True),
        ("{news-topic} in ['a', 'b {c}']", {"news-topic": "b {c}"}, True),
        ("'fee' in last.content", {"last.content": "a fee!"}, True),
        ("kind not in ('x', y)", {"kind": 1, "y": 1}, False),
        ('event.kind == "it\'s"', {"event.kind": "it's"}, True),
        (r"event.kind == 'it\'s #1'", {"event.kind": "it's #1"}, True),
        ("messages[-1].content != ''", {"messages[-1].content": ""}, False),
        ("who", {"who": []}, False),
        ("who and not gone", {"who": [1], "gone": None}, True),
        ("n == '1'", {"n": 1}, False),
        ("n == 1", {"n": True}, False),
        ("n == true", {"n": True}, True),
        ("day < '2026-01-01'", {"day": date(2025, 1, 1)}, False),
        ("'a' < 'b' and x", {"x": 1}, True),
    ],
)
def test_a_condition_is_held_against_the_values_of_a_row(
    written: str, row: dict[str, Any], holds: bool
) -> None:
    held = condition(written)
    assert set(held.placeholders) == set(row)
    assert held.holds(row) is holds


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "cannot be read"),
        ("a ==", "cannot be read"),
        ("{a b} == 1", "{a b}, which names no field"),
        ("a == 'it''s'", "two texts side by side"),
        ("a > 1 # and b > 2", "a # outside"),
        ("a, b", "compared with nothing"),
        ("a and ['x']", "compared with nothing"),
        ("1 == 1", "reads no field"),
        ("f(x) == 1", "f(x)"),
        ("a + 1 > 2", "a + 1"),
        ("a is null", "the operator is"),
        ("[x for x in a]", "neither a name"),
        ("a ** 99 > 1", "neither a name"),
        ("a == b'x'", "neither a name"),
        ("(" * 400 + "a" + ")" * 400, "cannot be read"),
        ("not " * 240 + "a", "operators and values"),
        ("a" * 1001, "1000 characters"),
        ("a\0", "NUL"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_reason(written: str, why: str) -> None:
    with pytest.raises(BadCondition):
        condition(written)
    with pytest.raises(InvalidJob) as refused:
        parse({"t": {"kind": "classify", "model": "m", "when": written}})
    (problem,) = refused.value.problems
    assert problem.field == "tasks.t.when"
    assert why in problem.got


@given(st.text(st.sampled_from("ab.[]{}()'\"<>=!&|~ 019-+*/,:\\\nnotandrin"), max_size=40))
def test_any_text_is_a_condition_or_refused(written: str) -> None:
    try:
        held = condition(written)
    except BadCondition:
        return
    held.holds(dict.fromkeys(held.placeholders, "a"))


def test_what_a_condition_names_is_read() -> None:
    tasks = {"topic": Classify("m"), "more": Classify("m", when="topic.score < 0.5 and age > 3")}
    assert tasks["more"].reads("more", tasks) == ("text", "topic", "age")
    assert "when" not in tasks["topic"].to_json()
