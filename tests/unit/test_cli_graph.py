"""The graph of a plan: what it says, that nothing is wider than the terminal, and that bars lead somewhere."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest

from motet.cli.graph import graph, shared, worth_drawing
from motet.messages.jobs import PlannedPass

TASKS = ("summary", "sentiment", "topic")


def planned(*tasks: str, **more: Any) -> PlannedPass:
    more = {"kind": "causal m", "model": "qwen3-0.6b@1", "first": "text", **more}
    return PlannedPass(tasks=tasks, **more)


def drawn(*passes: PlannedPass, width: int = 130) -> list[str]:
    lines = [line.plain for line in graph(passes, width)]
    assert all(len(line) <= width for line in lines), (width, lines)
    return lines


TWO = (
    planned("summary", "sentiment", tokens=540, unfused_tokens=1000),
    planned("reply", needs=("sentiment",), tokens=100, unfused_tokens=100),
)


def test_a_task_that_waits_hangs_on_the_answer_that_it_reads() -> None:
    assert drawn(*TWO) == [
        "rows ─▶ pass 0  qwen3-0.6b  summary · sentiment   one prefill for 2 tasks: 46 % of tokens saved",
        "        └─ sentiment ─▶ pass 1  qwen3-0.6b  reply",
    ]


def test_several_beginnings_fork_from_the_rows_and_a_join_names_all_that_it_reads() -> None:
    assert drawn(
        planned("topic", "vector", model="minilm@1", first="", tokens=10, unfused_tokens=20),
        planned("sentiment", "summary"),
        planned("reply", needs=("topic", "sentiment")),
        planned("check", needs=("reply", "summary")),
        planned("title", needs=("topic",)),
    ) == [
        "rows ┬▶ pass 0  minilm  topic · vector   one forward pass for 2 tasks: 50 % of tokens saved",
        "     │  └─ topic ─▶ pass 4  qwen3-0.6b  title",
        "     └▶ pass 1  qwen3-0.6b  sentiment · summary",
        "        └─ topic · sentiment ─▶ pass 2  qwen3-0.6b  reply",
        "           └─ reply · summary ─▶ pass 3  qwen3-0.6b  check",
    ]


@pytest.mark.parametrize("width", range(60, 131))
def test_whatever_the_width_every_pass_and_task_is_there(width: int) -> None:
    many = tuple(f"task_number_{i}" for i in range(9))
    lines = drawn(
        planned(*many, model="smollm2-135m-instruct@1", tokens=10, unfused_tokens=100),
        planned("a", needs=many[:1], first="instruction", tokens=5, unfused_tokens=10),
        planned("b", needs=("a", *many[:7]), tokens=5, unfused_tokens=10),
        planned("c", "d", needs=("b",), model="smollm2-135m-instruct@1", tokens=5, unfused_tokens=10),
        planned("e", needs=("a",)),
        width=width,
    )
    text = " ".join(" ".join(lines).replace("│", " ").split())
    assert re.findall(r"pass (\d)", text) == ["0", "1", "2", "3", "4"]
    assert all(name in text for name in many)
    assert "one prefill for 9 tasks: 90 % of tokens saved" in text
    assert "instruction first, one prefill for all rows: 50 % of tokens saved" in text
    for above, below in pairwise(lines):
        # What hangs on a bar hangs on something: a bar, a fork, or the line of what it waits for.
        assert all(above[at] not in "└─ ·" for at, sign in enumerate(below) if sign in "└├│"), (above, below)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (planned("a", "b", tokens=50, unfused_tokens=100), "one prefill for 2 tasks: 50 % of tokens saved"),
        (planned("a", tokens=50, unfused_tokens=100), "a common beginning, read once: 50 % of tokens saved"),
        (planned("a", "b", tokens=100, unfused_tokens=100), ""),
        (planned("a"), ""),
    ],
)
def test_only_what_is_saved_is_told(one: PlannedPass, words: str) -> None:
    assert shared(one) == words


def test_tasks_beside_each_other_need_no_graph() -> None:
    assert worth_drawing(TWO)
    assert not worth_drawing([planned("topic", "vector", first="")])
