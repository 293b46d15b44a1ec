"""Labelled rows as users have them: what can be learned from is taken, and what cannot is named by row and field."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from motet import InvalidJob, Labels, Number
from motet.training.curves import draw
from motet.training.epochs import Epoch
from motet.training.lesson import Learned, read_lesson
from motet.training.starting import Training, _check_names

TASKS: dict[str, Learned] = {
    "topic": Labels("topic"),
    "tags": Labels("tags", multi=True),
    "urgency": Number("hours"),
}


def rows(n: int = 40, **changed: Any) -> list[dict[str, Any]]:
    return [
        {"text": f"row {i}", "topic": "ab"[i % 2], "tags": ["x", "y"][: i % 3], "hours": i / 2} | changed
        for i in range(n)
    ]


def problem_of(train: Any, test: Any = None, tasks: dict[str, Learned] | None = None) -> str:
    with pytest.raises(InvalidJob) as refused:
        read_lesson(train, test, tasks or TASKS)
    return str(refused.value)


def test_rows_become_texts_and_targets() -> None:
    lesson = read_lesson(rows(), rows(5), TASKS)
    assert (lesson.train_rows, len(lesson.inputs)) == (40, 45)
    topic, tags, urgency = lesson.targets
    assert (topic.labels, tags.labels, urgency.labels) == (("a", "b"), ("x", "y"), ())
    assert list(topic.places())[:4] == [0, 1, 0, 1]


def test_rows_may_lack_labels() -> None:
    some = rows()
    del some[3]["topic"]
    some[4]["tags"] = None
    some[5]["hours"] = None
    topic, tags, urgency = read_lesson(some, rows(5), TASKS).targets
    assert topic.places()[3] == -1
    assert tags.truth[8:10] == b"\xff\xff"
    assert math.isnan(memoryview(urgency.truth).cast("f")[5])


def test_without_test_rows_some_are_kept_for_it_always_the_same() -> None:
    lesson = read_lesson(rows(), None, TASKS)
    assert (lesson.train_rows, len(lesson.inputs)) == (34, 40)
    assert sorted(lesson.inputs) == sorted(row["text"] for row in rows())
    assert read_lesson(rows(), None, TASKS) == lesson
    assert read_lesson(rows(), None, TASKS, seed=1).inputs != lesson.inputs


def test_bars_between_labels_are_read_as_csv_has_them() -> None:
    some = [{**row, "tags": "|".join(row["tags"])} for row in rows()]
    assert read_lesson(some, rows(5), TASKS).targets == read_lesson(rows(), rows(5), TASKS).targets


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": ""}, "row 7, train.text: got an empty text"),
        ({"text": "  "}, "row 7, train.text: got an empty text"),
        ({"text": 5}, "row 7, train.text: got no text"),
        ({"topic": ""}, "row 7, train.topic: got an empty label"),
        ({"topic": math.nan}, "row 7, train.topic: got NaN"),
        ({"topic": ["a"]}, "row 7, train.topic: got list"),
        ({"tags": 5}, "row 7, train.tags: got int"),
        ({"tags": ["x", 0.5]}, "row 7, train.tags: got float"),
        ({"hours": math.nan}, "row 7, train.hours: got NaN"),
        ({"hours": math.inf}, "row 7, train.hours: got infinity"),
        ({"hours": "soon"}, "row 7, train.hours: got 'soon'; expected a number"),
        ({"hours": True}, "row 7, train.hours: got 'True'"),
        ({"hours": "nan"}, "row 7, train.hours: got 'nan'; expected a number"),
        ({"hours": "-inf"}, "row 7, train.hours: got '-inf'; expected a number"),
        ({"hours": 1e39}, "row 7, train.hours: got '1e+39'; expected a number"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, Any], words: str) -> None:
    some = rows()
    some[7] |= change
    assert words in problem_of(some)


def test_every_bad_row_is_named_up_to_twenty() -> None:
    assert problem_of(rows(text="")).count("an empty text") == 20


def test_a_row_that_is_no_mapping_is_named() -> None:
    assert "row 40, train: got a row that is no mapping" in problem_of([*rows(), "text alone"])


def test_a_field_that_no_row_has_is_named_with_those_that_there_are() -> None:
    told = problem_of(rows(), tasks={"mood": Labels("mood")})
    assert "train.mood: got no such field in any row" in told
    assert "hours, tags, text, topic" in told


def test_one_label_only_teaches_nothing() -> None:
    assert "train.topic: got the label 'a' only" in problem_of(rows(topic="a"))
    assert "train.topic: got no label at all" in problem_of(rows(topic=None))
    assert "train.hours: got one number only" in problem_of(rows(hours=1.0))


def test_a_field_of_ids_is_no_field_of_labels() -> None:
    """More labels than a recipe can count ended in an overflow."""
    many = [{"text": "a", "id": f"{n}"} for n in range(40_000)]
    told = problem_of(many, many[:20], {"id": Labels("id")})
    assert "train.id: got 40,000 different labels; expected at most 32,000" in told


def test_a_label_of_a_test_row_that_no_training_row_has_is_named() -> None:
    held_out = rows(5)
    held_out[2]["topic"] = "z"
    held_out[3]["tags"] = ["x", "q"]
    told = problem_of(rows(), held_out)
    assert "row 2, test.topic: got the label 'z', which no training row has; expected one of a, b" in told
    assert "row 3, test.tags: got the label 'q'" in told


def test_too_few_rows_and_no_rows_are_named() -> None:
    assert "train: got 12 rows; expected at least 20" in problem_of(rows(12), rows(5))
    assert "train: got no rows" in problem_of([], rows(5))
    assert "test: got no rows" in problem_of(rows(), [])


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(InvalidJob, match="what to learn"):
        read_lesson(rows(), None, {})


def test_curves_are_drawn_of_any_epochs() -> None:
    told = {
        "topic": {"score": 0.5, "accuracy": 0.5, "macro_f1": 0.4},
        "<b>": {"score": 0.1, "mae": 1.0, "r2": 0.1},
    }
    epochs = [
        Epoch(stage=stage, epoch=n, of=2, loss=loss, validation=told, test=told)
        for stage in ("heads", "all")
        for n, loss in ((1, 0.5), (2, None))
    ]
    picture = draw(epochs, title="a & b")
    assert picture.startswith("<svg")
    assert "a &amp; b" in picture
    assert "&lt;b&gt;" in picture
    assert draw([], title="nothing yet")
    assert "MAE 1" in str(epochs[0])
    assert "50.0%" in str(epochs[0])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "a b/c"}, "name: got a b/c.topic; expected letters, digits, _ . -, up to 100"),
        ({"name": "n" * 100}, "name: got nnnn"),
        ({"version": "1 beta"}, "version: got 1 beta; expected letters, digits"),
        ({"licence": "x" * 2001}, "licence: got xxx"),
        ({"tasks": {"my topic": Labels("topic")}}, "name: got support.my topic; expected letters"),
    ],
)
def test_names_that_no_model_may_have_are_refused_before_it_learns(
    changed: dict[str, Any], words: str
) -> None:
    """It learned, and what came out could not be registered."""
    asked: dict[str, Any] = {field.name: None for field in fields(Training) if field.name != "more"}
    asked |= {"name": "support", "tasks": {"topic": Labels("topic")}, "licence": "MIT"}
    _check_names(Training(**asked), "1")
    with pytest.raises(InvalidJob, match=words):
        _check_names(Training(**asked | changed), changed.get("version", "1"))
