"""How thoughts are told from answers by their tags."""

from __future__ import annotations

import pytest

from workers.engines.served.writing import _checked
from workers.engines.thoughts import begins_thought, switches, without_thoughts


@pytest.mark.parametrize(
    ("text", "begun", "answer"),
    [
        ("Fine.", False, "Fine."),
        ("<think>Hm.</think>Fine.", False, "Fine."),
        ("\n<think>\nHm.\n</think>\n\nFine.", False, "\n\nFine."),
        ("Hm.</think>Fine.", False, "Fine."),
        ("Hm.</think>Fine.", True, "Fine."),
        ("<think>Hm", False, ""),
        ("Hm", True, ""),
        ("", False, ""),
        # An answer about such tags.
        ("The tags <think> and </think> are ours.", False, "The tags <think> and </think> are ours."),
        ("<think>Hm.</think>Write </think> then.", False, "Write </think> then."),
    ],
)
def test_an_answer_stands_behind_the_first_thought(text: str, begun: bool, answer: str) -> None:
    assert without_thoughts(text, begun=begun) == answer


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("assistant\n", False),
        ("assistant\n<think>\n", True),
        ("assistant\n<think>\n\n</think>\n\n", False),
        ("<think>old</think> assistant <think>", True),
    ],
)
def test_a_prompt_may_have_begun_a_thought(prompt: str, begun: bool) -> None:
    assert begins_thought(prompt) is begun


def test_a_template_is_told_nothing_where_a_task_says_nothing() -> None:
    assert switches({}) == switches({"thinking": None}) == {}
    assert set(switches({"thinking": False}).values()) == {False}


def test_json_that_holds_a_tag_is_json() -> None:
    value = {"a": "</think>"}
    assert _checked('{"a": "</think>"}', {}) == (value, "")
    assert _checked('Hm.</think>{"a": "</think>"}', {}) == (value, "")
