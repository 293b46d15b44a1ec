"""Who reads whose answer: names, order and circles."""

from __future__ import annotations

import pytest

from motet.tasks import Classify, Generate, Task, fields_of
from scheduler.policy.needs import cycle_of, cycle_problem, levels_of, needs_of


def ask(prompt: str, about: str = "{text}") -> Generate:
    return Generate("llm", prompt=prompt, about=about)


MAIL: dict[str, Task] = {
    "reply": ask("Write a reply to a {mood} customer about {topic}, {tone}."),
    "mood": Classify("mood"),
    "topic": ask("Topic, given that it sounds {mood}?"),
    "french": ask("Translate.", about="{reply}"),
}


def test_a_name_is_the_answer_of_the_task_of_that_name_and_a_field_otherwise() -> None:
    assert needs_of(MAIL) == ((1, 2), (), (1,), (0,))
    assert fields_of(MAIL) == ("text", "tone")


def test_its_own_name_is_a_field_for_a_task_and_its_answer_for_all_others() -> None:
    tasks: dict[str, Task] = {
        "mood": Classify("mood", input="{mood}"),
        "reply": ask("Answer.", about="{mood}"),
    }
    assert needs_of(tasks) == ((), (0,))
    assert fields_of(tasks) == ("mood",)


def test_a_task_stands_behind_the_longest_way_to_it() -> None:
    assert levels_of(needs_of(MAIL)) == [2, 0, 1, 3]
    assert levels_of(((), (0,), (0, 1), (1,))) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("needs", "cycle"),
    [
        ((), ()),
        (((1,), (0,)), (0, 1)),
        (((), (2,), (3,), (1,)), (1, 2, 3)),
        # Whoever waits for a circle, without being part of it, is not named.
        (((1,), (2,), (1,)), (1, 2)),
        (((1, 2), (2,), ()), ()),
    ],
)
def test_circles_are_found_and_only_they(needs: tuple[tuple[int, ...], ...], cycle: tuple[int, ...]) -> None:
    assert cycle_of(needs) == cycle


def test_a_refusal_names_the_whole_circle() -> None:
    tasks: dict[str, Task] = {"a": ask("{b}"), "b": ask("{c}"), "c": ask("{a}")}
    (problem,) = cycle_problem(list(tasks), needs_of(tasks))
    assert problem.field == "tasks.a"
    assert "a reads b reads c reads a" in problem.got
