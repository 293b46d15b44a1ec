"""Schemas of strangers: what is refused before a job opens, and that no check takes longer than it may."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.errors import Problem
from motet.tasks import Embed, Extract, Generate
from scheduler.api import answer_schemas
from scheduler.api.answer_schemas import schema_problems
from workers.engines import schemas
from workers.engines.schemas import violation

#: An engine that tries again and again needs 2 ** 200 tries to see that it does not match.
BACKTRACKS, AS = "^(a|a)*b$", "a" * 200
#: Seconds of a core after which a test is given up that would go on for ever.
_PATIENCE_S = 20.0


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails what uses a core for much longer than it may. Python's ``re`` looks at signals while it matches."""

    def give_up(_: int, __: FrameType | None) -> None:
        raise AssertionError("it goes on and on")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, _PATIENCE_S)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def doubling(n: int, keyword: str) -> dict[str, Any]:
    """A short schema that unfolds to 2 ** n of them, all about one value."""
    chain: dict[str, Any] = {f"a{i}": {keyword: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(n)}
    return {"$defs": {**chain, f"a{n}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def merging(n: int) -> dict[str, Any]:
    """A short schema in which each step into a value doubles what must be merged into one."""
    chain: dict[str, Any] = {
        f"a{i}": {"type": "object", "properties": {"p": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}}}
        for i in range(n)
    }
    leaf = {"type": "string", "pattern": "^a+$"}
    return {"$defs": {**chain, f"a{n}": leaf}, "$ref": "#/$defs/a0"}


def problems(*all_of_them: Mapping[str, Any]) -> list[Problem]:
    return schema_problems({f"t{i}": Extract("m", schema=schema) for i, schema in enumerate(all_of_them)})


TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"child": {"$ref": "#/$defs/node"}, "word": {"type": "string"}},
        }
    },
}


def test_what_can_be_kept_is_taken_also_where_it_names_itself_further_down() -> None:
    assert problems(
        TREE,
        {"type": "object", "additionalProperties": False, "properties": {"n": {"enum": [1, 2]}}},
        {"$id": "https://example.com/answer", "$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}},
        # Data, not schemas.
        {"enum": [{"$ref": "#/nowhere"}]},
        doubling(5, "anyOf"),
        {"type": "string", "pattern": BACKTRACKS},
    ) == []  # fmt: skip
    assert schema_problems({"vector": Embed("m"), "plain": Generate("m", prompt="Go.")}) == []


@pytest.mark.parametrize(
    ("schema", "got"),
    [
        (
            {"not": {"properties": {"a": {"pattern": BACKTRACKS}}}, "x-guidance": {"lenient": True}},
            "x-guidance, which tells the library",
        ),
        ({"properties": {"a": {"anyOf": [{"x-guidance": {}}]}}}, "x-guidance, which tells the library"),
        ({"not": {"pattern": BACKTRACKS}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
        ({"patternProperties": {"(?!a)": {}}}, "look-around"),
        ({"$ref": "#"}, "a $ref that leads back to itself"),
        ({"anyOf": [{"type": "string"}, {"$ref": "#"}]}, "a $ref that leads back to itself"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "the $ref '/$defs/none'"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "the $ref 'http://127.0.0.1:9/schema'"),
        (doubling(10, "anyOf"), "a value that is held to 4,094 schemas at once"),
        (doubling(60, "allOf"), "a value that is held to billions of schemas at once"),
        ({"type": "objct"}, "type: 'objct'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_kept_or_could_take_for_ever_is_refused_with_the_reason(
    schema: dict[str, Any], got: str
) -> None:
    [problem] = problems(schema)
    assert problem.field == "tasks.t0.schema"
    assert got in problem.got
    assert problem.expected


def test_a_schema_that_takes_for_ever_to_prepare_is_refused_and_those_before_it_are_not() -> None:
    [problem] = problems({"type": "object"}, merging(40))
    assert problem.field == "tasks.t1.schema"
    assert problem.got.startswith("a schema that takes more than 4 s or 2,048 MB to prepare")


def test_a_schema_that_came_before_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "title": "asked for twice"}
    assert problems(schema) == []
    monkeypatch.setattr(answer_schemas, "_checked", lambda _: pytest.fail("it is known"))
    assert problems(schema, schema) == []


# -- answers


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("schema", "value", "broken"),
    [
        ({"type": "string", "pattern": BACKTRACKS}, AS, "pattern"),
        ({"type": "integer", "pattern": BACKTRACKS}, AS, "type"),
        # An answer that keeps its schema, and that is found out only behind what does not match.
        ({"type": "string", "pattern": "^((a|a)*b|a*)$"}, AS, None),
        ({"patternProperties": {BACKTRACKS: False}}, {AS: 1}, None),
        ({"patternProperties": {BACKTRACKS: True}, "additionalProperties": False}, {AS: 1}, "additionalProperties"),
        ({"additionalProperties": {"pattern": BACKTRACKS}}, {"x": AS}, "pattern"),
    ],
)  # fmt: skip
def test_no_pattern_is_tried_again_and_again(schema: dict[str, Any], value: Any, broken: str | None) -> None:
    found = violation(value, schema)
    assert (found is None) if broken is None else (f"it breaks {broken!r} of the schema at /" in str(found))


@pytest.mark.usefixtures("bounded")
def test_an_answer_that_is_held_to_too_much_is_an_error_and_not_an_endless_check() -> None:
    doubles = {"properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["x"]}
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [doubles, doubles]}}}
    value: dict[str, Any] = {}
    for _ in range(60):
        value = {"c": value}
    assert violation(value, schema) == "it takes too long to hold it against the schema; simplify the schema"
    assert violation({"x": 1}, schema) is None, "each answer has all its checks"


def test_an_answer_that_is_nested_deep_or_held_to_itself_is_an_error_and_ends_no_worker() -> None:
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"child": value}
    assert violation(value, TREE) == "it is nested too deep to be checked"
    assert violation(1, {"$ref": "#"}) == "it is nested too deep to be checked"


def test_a_schema_of_before_is_held_against_answers_as_far_as_that_can_be_told() -> None:
    assert "cannot be matched" in str(violation("ab", {"pattern": "(?=a)"}))
    assert violation(1, {"$ref": "http://127.0.0.1:9/schema"}) == "a $ref of the schema names nothing in it"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab0é \n", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)
_PATTERN = st.sampled_from(["a", "^a", "b$", "^(a|b)*$", "^[^0]+$", "^$", r"^\d+$", "é", "^.{2}$"])
_SCHEMA = st.recursive(
    st.sampled_from([{}, {"type": "string"}, {"type": "integer", "minimum": 0}, {"enum": [None, "a", 1]}])
    | _PATTERN.map(lambda pattern: {"pattern": pattern}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
            "patternProperties": st.dictionaries(_PATTERN, inner, max_size=2),
            "additionalProperties": inner | st.booleans(),
            "required": st.lists(st.text("ab", max_size=1), max_size=1),
            "items": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
        },
    ),
    max_leaves=5,
)


@given(_SCHEMA, _JSON)
def test_the_verdict_is_that_of_the_library_as_it_comes(schema: dict[str, Any], value: Any) -> None:
    kept = False
    with suppress(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(value)
        kept = True
    assert (violation(value, schema) is None) is kept


def test_checks_left_over_from_one_answer_do_not_count_for_the_next() -> None:
    many = {"items": {"type": "integer"}}
    rows = list(range(schemas.MOST_CHECKS // 2))
    assert [violation(rows, many) for _ in range(3)] == [None] * 3
