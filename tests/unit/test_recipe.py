"""Recipes of training runs: they cross the wire whole, and what is no recipe is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.training.recipe import MISSING, Recipe, Target

LABELS = ("a", "b", "c")


def recipe(**changed: Any) -> Recipe:
    targets = (
        Target.single("topic", LABELS, ["a", "b", None, "c"]),
        Target.multi("tags", LABELS, [["a", "c"], [], None, ["b"]]),
        Target.number("urgency", [1.5, None, -2.0, 0.0]),
    )
    facts = {"name": "r", "version": "1", "trunk": "t@1", "job": "j", "train_rows": 3, "test_rows": 1}
    return Recipe(**{**facts, "targets": targets, **changed})


def test_a_recipe_crosses_the_wire_whole() -> None:
    sent = recipe(tune="lora", rate=1e-4, seed=7)
    assert Recipe.loads(sent.dumps()) == sent
    topic, tags, urgency = Recipe.loads(sent.dumps()).targets
    assert list(topic.places()) == [0, 1, MISSING, 2]
    assert (topic.width, tags.width, urgency.width) == (3, 3, 1)


@given(st.lists(st.one_of(st.none(), st.sampled_from(LABELS)), min_size=3, max_size=300))
def test_labels_of_any_rows_cross_the_wire(truth: list[str | None]) -> None:
    sent = recipe(train_rows=len(truth) - 1, test_rows=1, targets=(Target.single("t", LABELS, truth),))
    [target] = Recipe.loads(sent.dumps()).targets
    assert [None if at == MISSING else LABELS[at] for at in target.places()] == truth


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_rows": 1, "test_rows": 3}, "train_rows"),
        ({"head_epochs": 0}, "head_epochs"),
        ({"validation": 0.9}, "validation"),
        ({"validation": math.nan}, "validation"),
        ({"epochs": True}, "epochs"),
        ({"seed": "7"}, "seed"),
        ({"tune": "everything"}, "tune"),
        ({"loss": "product"}, "loss"),
        ({"targets": []}, "targets"),
        ({"test_rows": 2}, "truth"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    spec = {**recipe().to_json(), **change}
    with pytest.raises(ValueError, match=words):
        Recipe.loads(json.dumps(spec))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "7", '{"train_rows": 3}', "\0", '{"train_rows": null, "test_rows": 1}']
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        Recipe.loads(text)


@pytest.mark.parametrize(
    "change",
    [
        {"truth": "%%%"},
        {"truth": ""},
        {"kind": "pair"},
        {"labels": []},
        {"labels": ["a", "b"]},  # a row has the third one
        {"balance": None, "kind": None},
    ],
)
def test_a_target_that_does_not_fit_its_rows_is_refused(change: dict[str, Any]) -> None:
    spec = recipe().to_json()
    spec["targets"][0] |= change
    with pytest.raises(ValueError, match="no recipe"):
        Recipe.loads(json.dumps(spec))
