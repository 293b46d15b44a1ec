"""Task specs: what is asked, checked once, carried unchanged."""

from __future__ import annotations

import pytest

from motet.errors import InvalidJob
from motet.tasks import Chat, Choose, Classify, Embed, Extract, Generate, Rank, Task, parse
from motet.templates import placeholders, render


def test_a_task_survives_the_wire() -> None:
    tasks = {
        "topic": Classify("news-topics", scores=True),
        "v": Embed("m", dtype="fp16", input="{title}: {body}"),
        "best": Rank("r", query="What of {title}?", documents="{pages[:9]}", max_tokens=256),
    }
    assert parse({name: t.to_json() for name, t in tasks.items()}) == tasks


@pytest.mark.parametrize("thinking", [None, True, False])
def test_whether_a_model_thinks_survives_the_wire(thinking: bool | None) -> None:
    tasks: dict[str, Task] = {
        "text": Generate("m", prompt="Go on.", thinking=thinking),
        "next": Chat("m", thinking=thinking),
        "label": Choose("m", labels=("a", "b"), thinking=thinking),
        "form": Extract("m", schema={"type": "object"}, thinking=thinking),
    }
    assert parse({name: task.to_json() for name, task in tasks.items()}) == tasks


def test_a_model_thinks_as_it_likes_unless_a_label_or_a_form_is_asked_for() -> None:
    specs = {
        "text": {"kind": "generate", "model": "m", "prompt": "Go on."},
        "next": {"kind": "chat", "model": "m"},
        "label": {"kind": "choose", "model": "m", "labels": ["a", "b"]},
        "form": {"kind": "extract", "model": "m", "schema": {}},
    }
    thinking = {name: getattr(task, "thinking") for name, task in parse(specs).items()}  # noqa: B009
    assert thinking == {"text": None, "next": None, "label": False, "form": False}
    assert "thinking" not in parse(specs)["text"].to_json()


def test_a_template_names_its_fields_in_order() -> None:
    assert placeholders("{title} and {body}, {title} {{not}}") == ("title", "body")


def test_text_of_a_row_is_data_and_never_a_template() -> None:
    assert render("{a}{b} {{x}}", {"a": "{b}", "b": "}}"}) == "{b}}} {x}"


@pytest.mark.parametrize(
    ("tasks", "field", "word"),
    [
        (None, "tasks", "object"),
        ([], "tasks", "object"),
        ({}, "tasks", "at least one"),
        ({"": {"kind": "embed", "model": "m"}}, "tasks", "rename"),
        ({"a b": {"kind": "embed", "model": "m"}}, "tasks", "rename"),
        ({"a": 3}, "tasks.a", "an object"),
        ({"a": {"model": "m"}}, "tasks.a.kind", "classify"),
        ({"a": {"kind": ["embed"], "model": "m"}}, "tasks.a.kind", "classify"),
        ({"a": {"kind": "embed"}}, "tasks.a.model", "motet models"),
        ({"a": {"kind": "embed", "model": 7}}, "tasks.a.model", "registered"),
        ({"a": {"kind": "embed", "model": "m", "input": "no field"}}, "tasks.a.input", "field"),
        ({"a": {"kind": "embed", "model": "m", "input": "{a.__class__!r}"}}, "tasks.a.input", "field"),
        ({"a": {"kind": "embed", "model": "m", "input": "{a} {"}}, "tasks.a.input", "field"),
        ({"a": {"kind": "embed", "model": "m", "input": "{a}\0"}}, "tasks.a.input", "field"),
        ({"a": {"kind": "embed", "model": "m", "input": "{a}\ud800"}}, "tasks.a.input", "field"),
        ({"a": {"kind": "embed", "model": "m", "max_tokens": 0}}, "tasks.a.max_tokens", "whole number"),
        ({"a": {"kind": "embed", "model": "m", "max_tokens": True}}, "tasks.a.max_tokens", "whole number"),
        ({"a": {"kind": "embed", "model": "m", "max_tokens": 2**63}}, "tasks.a.max_tokens", "whole number"),
        ({"a": {"kind": "embed", "model": "m", "numerics": "int8"}}, "tasks.a.numerics", "exact"),
        ({"a": {"kind": "embed", "model": "m", "normalize": 1}}, "tasks.a.normalize", "true or false"),
        ({"a": {"kind": "embed", "model": "m", "modle": 1}}, "tasks.a.modle", "remove"),
        ({"a": {"kind": "rank", "model": "m", "documents": "{a} {b}"}}, "tasks.a.documents", "list"),
        ({"a": {"kind": "rank", "model": "m", "documents": "docs"}}, "tasks.a.documents", "list"),
        ({"a": {"kind": "rank", "model": "m", "query": ""}}, "tasks.a.query", "text"),
        ({"a": {"kind": "rank", "model": "m", "input": "{text}"}}, "tasks.a.input", "remove"),
        ({"a": {"kind": "chat", "model": "m", "thinking": "off"}}, "tasks.a.thinking", "true, false or null"),
        ({"a": {"kind": "embed", "model": "m", "thinking": True}}, "tasks.a.thinking", "remove"),
    ],
)
def test_a_wrong_task_is_refused_with_its_field_and_a_remedy(tasks: object, field: str, word: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        parse(tasks)
    problem = refused.value.problems[0]
    assert problem.field == field
    assert word in str(problem)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(InvalidJob) as refused:
        parse({"a": {"kind": "x"}, "b": {"kind": "embed", "model": "", "input": "z"}})
    assert [p.field for p in refused.value.problems] == ["tasks.a.kind", "tasks.b.model", "tasks.b.input"]
