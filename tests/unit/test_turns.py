"""Whose turn it is, and which sub-tasks are tokenised, by facts alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.run.turns import next_turn, to_prepare


def sub_task(
    name: str, *, interactive: bool = False, loaded_for: bool = False, exclusive: bool = False
) -> Any:
    return SimpleNamespace(name=name, interactive=interactive, loaded_for=loaded_for, exclusive=exclusive)


def turn(able: list[Any], again: list[Any], *, lane_open: bool) -> str | None:
    found = next_turn(able, again, lane_open=lane_open)
    return getattr(found, "name", None)


BULK, LATER = sub_task("bulk"), sub_task("later")
QUICK, FRESH = sub_task("quick", interactive=True), sub_task("fresh", interactive=True, loaded_for=True)
HALF, QUICK_HALF = sub_task("half"), sub_task("quick half", interactive=True)


@pytest.mark.parametrize(
    ("able", "again", "lane_open", "expected"),
    [
        ([], [], True, None),
        ([BULK, LATER], [], True, "bulk"),
        ([BULK, QUICK], [HALF], True, "quick"),
        ([BULK, QUICK], [HALF], False, "half"),
        ([BULK, QUICK], [QUICK_HALF], False, "bulk"),
        ([BULK, QUICK], [QUICK_HALF, HALF], False, "half"),
        ([BULK], [QUICK_HALF], True, "quick half"),
        ([BULK, QUICK, FRESH], [HALF], False, "fresh"),
        ([QUICK], [], False, None),
    ],
)
def test_the_lane_goes_first_while_it_is_open_then_rows_that_run_again_then_the_oldest(
    able: list[Any], again: list[Any], lane_open: bool, expected: str | None
) -> None:
    assert turn(able, again, lane_open=lane_open) == expected


@pytest.mark.parametrize(
    ("staged", "elsewhere", "headless", "expected"),
    [
        ([BULK, LATER], [], [], ["bulk", "later"]),
        ([BULK, LATER], [BULK], [], []),
        ([BULK, LATER, QUICK], [BULK], [], ["quick"]),
        ([BULK, LATER], [LATER], [], ["bulk"]),
        ([BULK, LATER], [], [BULK], ["later"]),
        ([sub_task("suspect", exclusive=True), LATER], [], [], ["later"]),
    ],
)
def test_a_sub_task_is_tokenised_when_its_model_is_here_but_not_past_an_older_one_that_waits_for_another(
    staged: list[Any], elsewhere: list[Any], headless: list[Any], expected: list[str]
) -> None:
    chosen = to_prepare(
        staged, here=lambda w: w not in elsewhere, whole=lambda w: w not in elsewhere and w not in headless
    )
    assert [work.name for work in chosen] == expected
