"""Placeholders: what each of them means, which part of a value it leads to, and the text that stands there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from motet.errors import InvalidJob
from motet.tasks import Classify, Function, Generate, dialogues_of, fields_of, parse
from motet.templates import Reference, filled, is_well_formed, part_of, resolved, text_of

TURNS = [{"role": "user", "content": "Hi {you}"}, {"role": "assistant", "content": "What is it?"}]


@pytest.mark.parametrize(
    ("written", "answers", "meant"),
    [
        ("text", {"topic"}, Reference("text")),
        ("topic", {"topic"}, Reference("topic")),
        ("topic.score", {"topic"}, Reference("topic", ("score",))),
        ("topic.score", set(), Reference("topic.score")),
        ("a.b.c", {"a", "a.b"}, Reference("a.b", ("c",))),
        ("a.b.c[0].d", {"a"}, Reference("a", ("b", "c", 0, "d"))),
        ("who[-1].label", {"who"}, Reference("who", (-1, "label"))),
        ("messages[-7:]", {"who"}, Reference("messages", (slice(-7, None),))),
        ("messages[:2]", (), Reference("messages", (slice(None, 2),))),
        ("customer[home.town]", (), Reference("customer", ("home.town",))),
    ],
)
def test_a_placeholder_means_a_field_an_answer_or_a_part(
    written: str, answers: set[str], meant: Reference
) -> None:
    assert is_well_formed(f"<{{{written}}}>")
    assert resolved(written, answers) == meant


@pytest.mark.parametrize(
    "written",
    ["", "1st", "a b", "a[", "a[]", "a]", "a[1:2:3]", "a[1.5]", "a[0]b", "a[[0]]", "[0]", "a!r", "a:>9"],
)
def test_what_is_no_placeholder_is_refused(written: str) -> None:
    assert not is_well_formed(f"{{{written}}}")
    with pytest.raises(InvalidJob, match="text that names at least one field"):
        parse({"t": {"kind": "classify", "model": "m", "input": f"{{{written}}} {{text}}"}})


@pytest.mark.parametrize(
    ("value", "written", "text"),
    [
        ({"x": {"kind": "sale", "n": 3}}, "x.kind", "sale"),
        ({"x": {"kind": "sale", "n": 3}}, "x[n]", "3"),
        ({"x": {"kind": "sale"}}, "x.price", ""),
        ({"x": None}, "x.price", ""),
        ({"x": "no object"}, "x.price", ""),
        ({"x": ["a", "b", "c"]}, "x[0]", "a"),
        ({"x": ["a", "b", "c"]}, "x[-2:]", "b, c"),
        ({"x": ["a"]}, "x[1]", ""),
        ({"x": ["a"]}, "x[-2]", ""),
        ({"x": [{"y": [1, 2]}]}, "x[0].y[1]", "2"),
        ({"x": {"0": "key"}}, "x[0]", ""),
        ({"x": TURNS}, "x[-1]", "assistant: What is it?"),
        ({"x": TURNS}, "x[-1].content", "What is it?"),
        ({"x": TURNS}, "x[-7:]", "user: Hi {you}\nassistant: What is it?"),
        # A dialogue that some chat reads is stored as JSON.
        ({"x": json.dumps(TURNS)}, "x[:1]", "user: Hi {you}"),
        ({"x": "[no JSON"}, "x[0]", ""),
    ],
)
def test_a_part_stands_there_as_its_text(value: dict[str, Any], written: str, text: str) -> None:
    meant = resolved(written, value)
    assert text_of(part_of(value[meant.name], meant.steps)) == text
    assert filled(f"<{{{written}}}>{{{{}}}}", value, value) == f"<{text}>{{}}"


def test_fields_and_answers_are_told_apart_by_name() -> None:
    tasks = {
        "event": Classify("m", input="{event.kind} {text}"),
        "note": Generate("m", prompt="{event.label}? {messages[-1]} {who[0]}", about="{last.turn}"),
        "who": Function("f", inputs=("event.score", "messages[:2]", "age")),
    }
    # The task's own name means the field, so that event's field is called event.kind.
    assert fields_of(tasks) == ("event.kind", "text", "last.turn", "messages", "age")
    assert tasks["note"].reads("note", tasks) == ("last.turn", "event", "messages", "who")
    assert dialogues_of(tasks) == frozenset()


@pytest.mark.parametrize("inputs", [[], ["a b"], ["{a}"], ["a", "a"], "a", [1], ["a"] * 65])
def test_inputs_that_are_no_names_are_refused(inputs: object) -> None:
    with pytest.raises(InvalidJob) as refused:
        parse({"t": {"kind": "function", "model": "f", "inputs": inputs}})
    (problem,) = refused.value.problems
    assert problem.field == "tasks.t.inputs"
    assert "without braces" in problem.remedy


def test_a_function_without_inputs_keeps_the_spec_and_so_the_digest_of_before() -> None:
    assert "inputs" not in Function("f").to_json()
    assert Function("f", inputs=("a",)).to_json()["inputs"] == ["a"]
