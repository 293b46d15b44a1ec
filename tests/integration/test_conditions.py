"""A conditional task is asked its own rows alone: of the others its cells are skipped, once, whatever else is wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

import pytest

from motet.errors import Problem
from motet.states import Skip
from motet.tasks import Classify, Generate, Task, fields_read
from scheduler.policy.needs import needs_of
from tests.integration.landing import land
from tests.integration.test_bad_fields import cells, some
from tests.integration.test_dependence import check, finish, speak
from tests.integration.test_dependence import house as with_llm  # noqa: F401 - a fixture
from tests.integration.test_protocol import House, texts
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

#: Two that share a pass, two that read their answers, and a pass of a language model of which one task is conditional.
TASKS: dict[str, Task] = {
    "one": Classify("length", input="{body}", conditional=True),
    "other": Classify("length", input="{body}", scores=True, conditional=True),
    "always": Classify("length", input="{title}"),
    "after": Classify("length", input="{one}: {body}"),
    "asked": Generate("llm", about="{body}", prompt="Say it.", conditional=True),
    "titled": Generate("llm", about="{body}", prompt="Is it about {title}?"),
    "reply": Generate("llm", about="{asked}", prompt="Answer.", conditional=True),
}


@pytest.fixture
def house(with_llm: House) -> House:  # noqa: F811
    return with_llm


def wanted(
    n: int, broken: set[int], gaps: Mapping[str, set[int]], unasked: Mapping[str, set[int]]
) -> dict[tuple[str, int], str]:
    """The status of each cell."""
    names, needs = list(TASKS), needs_of(TASKS)

    def state(number: int, row: int) -> str:
        name = names[number]
        if row in broken:
            return "error"
        if row in unasked.get(name, ()):
            return "skipped"
        if any(row in gaps.get(field, ()) for field in fields_read(name, TASKS)):
            return "error"
        return "ok" if all(state(needed, row) == "ok" for needed in needs[number]) else "skipped"

    return {(name, row): state(number, row) for number, name in enumerate(names) for row in range(n)}


def check_all(house: House, job: UUID, expected: Mapping[tuple[str, int], str]) -> None:
    assert {at: status for at, (status, _) in cells(house, job).items()} == expected
    j, count = house.job(job), Counter(expected.values())
    assert (j.state, j.cells_ok, j.cells_error, j.cells_skipped) == (
        "succeeded",
        count["ok"],
        count["error"],
        count["skipped"],
    )


@pytest.mark.parametrize("seed", range(4))
def test_each_task_is_asked_its_own_rows_and_no_other(house: House, seed: int) -> None:
    dice = random.Random(seed)
    n = dice.randrange(20, 60)
    rows: list[str | Problem] = [*texts(n)]
    for i in some(dice, n, 0.1):
        rows[i] = Problem("rows", "NUL", "text", "remove it", row=i)
    broken = {i for i, row in enumerate(rows) if isinstance(row, Problem)}
    gaps = {name: some(dice, n, dice.choice([0.0, 0.2])) - broken for name in ("title", "body")}
    shares = [0.0, 0.5, 1.0]
    unasked = {name: some(dice, n, dice.choice(shares)) for name, t in TASKS.items() if t.conditional}
    job = land(
        house.database, rows, TASKS, block_rows=dice.choice([1, 5, 16, 100]), gaps=gaps, unasked=unasked
    )
    check(house, job)
    sent: Counter[str] = Counter()

    def answer(a: object, outcome: object) -> object:
        sent.update(task.name for task in a.tasks for _ in a.texts)  # type: ignore[attr-defined]
        return speak(a, outcome)  # type: ignore[arg-type]

    finish(house, job, answer)  # type: ignore[arg-type]
    check_all(house, job, wanted(n, broken, gaps, unasked))
    if len(unasked["one"]) == len(unasked["other"]) == n:
        assert not sent["one"]


def test_a_row_that_is_nobody_s_is_sent_to_nobody_and_says_why(house: House) -> None:
    n = 12
    tasks = {name: TASKS[name] for name in ("one", "other")}
    own = {"one": set(range(6)), "other": set(range(6, n))}
    unasked = {name: set(range(n)) - rows for name, rows in own.items()}
    job = land(house.database, texts(n), tasks, unasked=unasked)
    finish(house, job, speak)
    found = cells(house, job)
    assert {at for at, (status, _) in found.items() if status == "ok"} == {
        (name, row) for name, rows in own.items() for row in rows
    }
    (why,) = house.sql("SELECT DISTINCT value FROM results WHERE status = 'skipped'")
    assert why.value["error"] == Skip.CONDITION


def test_the_same_rows_are_reused_only_under_the_same_conditions(house: House) -> None:
    tasks = {"one": TASKS["one"]}
    plain = {"one": replace(TASKS["one"], conditional=False)}
    first = land(house.database, texts(8), tasks, unasked={"one": {1, 2}})
    finish(house, first, speak)
    same = house.job(land(house.database, texts(8), tasks, unasked={"one": {1, 2}}))
    assert (same.state, same.cells_reused, same.cells_skipped) == ("succeeded", 8, 2)
    other = house.job(land(house.database, texts(8), tasks, unasked={"one": {3}}))
    assert other.cells_reused == 0
    whole = land(house.database, texts(8), plain)
    finish(house, whole, speak)
    unmarked = house.job(land(house.database, texts(8), tasks))
    assert (unmarked.state, unmarked.cells_reused) == ("succeeded", 8), (
        "a condition that always holds is none"
    )
