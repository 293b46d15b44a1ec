"""Bad is a (row, field): tasks that read it get an error, all others answer the row as usual, and every cell is counted once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from motet.errors import Problem
from motet.protocol.columns import CellError
from motet.protocol.wire import Assignment, Outcome
from motet.tasks import Choose, Classify, Generate, Task, fields_read
from scheduler.policy.needs import needs_of
from tests.integration.api_house import CLASSIFY
from tests.integration.api_house import House as ApiHouse
from tests.integration.api_house import house as api_house  # noqa: F401 - a fixture
from tests.integration.landing import land
from tests.integration.test_dependence import check, failing, finish, reasons, speak
from tests.integration.test_dependence import house as with_llm  # noqa: F401 - a fixture
from tests.integration.test_protocol import HEAD, House, label_of, texts
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

#: One pass for each of the first three; two later ones, of which the last reads no field at all; a pass of a language
#: model whose tasks read different fields; and two that read its answers, of which the last is such a pass as well.
TASKS: dict[str, Task] = {
    "of_title": Classify("length", input="{title}"),
    "of_body": Classify("length", input="{body}"),
    "of_both": Classify("length", input="{title} {body}"),
    "after": Classify("length", input="{of_title}: {body}"),
    "last": Classify("length", input="{of_body}"),
    "mood": Choose("llm", about="{body}", labels=("good", "bad")),
    "titled": Generate("llm", about="{body}", prompt="Is it about {title}?"),
    "reply": Generate("llm", about="{titled}", prompt="Answer."),
    "advice": Generate("llm", about="{mood}", prompt="Advise."),
    "signed": Generate("llm", about="{mood}", prompt="Sign as {title}."),
}


@pytest.fixture
def house(with_llm: House) -> House:  # noqa: F811
    return with_llm


def states(
    tasks: Mapping[str, Task], n: int, broken: set[int], gaps: Mapping[str, set[int]]
) -> dict[tuple[str, int], tuple[str, str]]:
    """What each cell must become: its status, and why it is no answer."""
    names, needs = list(tasks), needs_of(tasks)
    found: dict[tuple[str, int], tuple[str, str]] = {}

    def state(number: int, row: int) -> tuple[str, str]:
        name = names[number]
        if row in broken:
            return "error", "NUL"
        for field in fields_read(name, tasks):
            if row in gaps.get(field, ()):
                return "error", f"{field}: got null"
        for needed in needs[number]:
            status, why = state(needed, row)
            if status != "ok":
                return "skipped", why if status == "skipped" else f"{names[needed]}: bad_row"
        return "ok", ""

    for number, name in enumerate(names):
        for row in range(n):
            found[name, row] = state(number, row)
    return found


def cells(house: House, job: UUID) -> dict[tuple[str, int], tuple[str, str]]:
    rows = house.sql("SELECT task, row, status, value FROM results WHERE job_id = :job", job=job)
    return {(r.task, r.row): (r.status, "" if r.status == "ok" else r.value["message"]) for r in rows}


def check_all(
    house: House,
    job: UUID,
    rows: list[str | Problem],
    gaps: Mapping[str, set[int]],
    tasks: Mapping[str, Task],
) -> None:
    broken = {i for i, row in enumerate(rows) if isinstance(row, Problem)}
    wanted = states(tasks, len(rows), broken, gaps)
    assert cells(house, job) == wanted
    j, count = house.job(job), Counter(status for status, _ in wanted.values())
    assert j.state == "succeeded"
    assert (j.cells_ok, j.cells_error, j.cells_skipped) == (count["ok"], count["error"], count["skipped"])
    right = {
        "of_title": lambda t: t,
        "of_body": lambda t: t,
        "of_both": lambda t: f"{t} {t}",
        "after": lambda t: f"{HEAD.labels[label_of(t)]}: {t}",
        "last": lambda t: HEAD.labels[label_of(t)],
    }
    for task in right.keys() & tasks.keys():
        for i, label in enumerate(house.labels(job, task)):
            row = rows[i]
            if wanted[task, i][0] == "ok" and isinstance(row, str):
                assert label == HEAD.labels[label_of(right[task](row))], (task, i)


def some(dice: random.Random, n: int, share: float) -> set[int]:
    return {i for i in range(n) if dice.random() < share}


@pytest.mark.parametrize("seed", range(6))
def test_every_cell_is_what_the_fields_that_its_task_reads_make_it(house: House, seed: int) -> None:
    dice = random.Random(seed)
    n = dice.randrange(20, 60)
    rows: list[str | Problem] = [*texts(n)]
    for i in some(dice, n, 0.1):
        rows[i] = Problem("rows", "NUL", "text", "remove it", row=i)
    good = {i for i, row in enumerate(rows) if isinstance(row, str)}
    gaps = {name: some(dice, n, dice.choice([0.1, 0.5, 0.95])) & good for name in ("title", "body")}
    job = land(house.database, rows, TASKS, block_rows=dice.choice([1, 5, 16, 100]), gaps=gaps)
    finish(house, job, speak)
    check_all(house, job, rows, gaps, TASKS)


@pytest.mark.parametrize("gone", [("title",), ("body",), ("title", "body")])
def test_a_field_that_is_bad_in_every_row_leaves_the_tasks_that_do_not_read_it(
    house: House, gone: tuple[str, ...]
) -> None:
    rows: list[str | Problem] = [*texts(20)]
    gaps = {name: set(range(20)) for name in gone}
    job = land(house.database, rows, TASKS, block_rows=8, gaps=gaps)
    check(house, job)
    finish(house, job, speak)
    check_all(house, job, rows, gaps, TASKS)
    carved = {
        row.name
        for row in house.sql("SELECT DISTINCT t.name FROM subtask s JOIN task t USING (job_id, pass_number)")
    }
    if gone == ("body",):
        assert carved == {"of_title"}, "nothing is sent that cannot be answered"
    if len(gone) == 2:
        assert carved == set()


def test_rows_that_come_back_are_the_right_ones_and_their_bad_cells_are_counted_once(house: House) -> None:
    """Pieces, retriable errors and given-up rows, in a pass whose tasks read different fields."""
    rows: list[str | Problem] = [*texts(40)]
    gaps = {"title": {3, 4, 5, 17}, "body": {5, 6, 30}}
    tasks = {name: TASKS[name] for name in ("of_title", "mood", "titled", "reply")}
    job = land(house.database, rows, tasks, block_rows=16, gaps=gaps)
    tries: Counter[str] = Counter()

    def answer(a: Assignment, outcome: Outcome) -> Outcome:
        outcome = speak(a, outcome)
        name = a.tasks[0].name
        tries[name] += 1
        if tries[name] == 1:
            busy = CellError("busy", "later", retriable=True)
            return failing(a.tasks[-1].name, lambda t: t.endswith(("3", "7")), busy)(a, outcome)
        if tries[name] == 2:
            return replace(outcome, verdict="failed", columns={}, error=("engine", "fell over"))
        return outcome

    finish(house, job, answer)
    check_all(house, job, rows, gaps, tasks)


def test_a_cell_that_is_bad_anyway_sends_no_row_back(house: House) -> None:
    """Its task was asked only because others of the pass were; that it met trouble which passes is nobody's loss."""
    rows = texts(8)
    tasks = {name: TASKS[name] for name in ("mood", "titled")}
    gaps = {"title": {1, 6}}
    job = land(house.database, rows, tasks, gaps=gaps)
    asked: Counter[str] = Counter()
    busy = CellError("busy", "later", retriable=True)
    fails = failing("titled", lambda t: t in {rows[1], rows[6], rows[3]}, busy)

    def answer(a: Assignment, outcome: Outcome) -> Outcome:
        asked.update(a.texts)
        outcome = speak(a, outcome)
        return fails(a, outcome) if all(asked[t] == 1 for t in a.texts) else outcome

    finish(house, job, answer)
    check_all(house, job, rows, gaps, tasks)
    assert asked == Counter(rows) + Counter([rows[3]]), "only the row whose good cell failed is asked again"


def test_rows_that_are_given_up_do_not_count_a_bad_cell_again(house: House) -> None:
    rows = texts(6)
    tasks = {name: TASKS[name] for name in ("mood", "titled")}
    job = land(house.database, rows, tasks, gaps={"title": {1}, "body": {4}})

    def falls_over(a: Assignment, outcome: Outcome) -> Outcome:
        return replace(outcome, verdict="failed", columns={}, error=("engine", "fell over"))

    for _ in range(10):
        j = finish(house, job, falls_over)
    assert (j.state, j.cells_ok, j.cells_error, j.cells_skipped) == ("succeeded", 0, 12, 0)
    found = cells(house, job)
    assert found["titled", 1] == ("error", "title: got null")
    assert found["mood", 1][1] != "title: got null"
    assert found["mood", 4] == found["titled", 4] == ("error", "body: got null")


def test_answers_are_reused_by_what_each_task_reads(house: House) -> None:
    rows: list[str | Problem] = [*texts(30)]
    gaps = {"body": {2, 9}}
    tasks = {name: task for name, task in TASKS.items() if isinstance(task, Classify)}
    first = land(house.database, rows, tasks, gaps=gaps)
    finish(house, first)
    again = land(house.database, rows, tasks, gaps=gaps)
    assert (house.job(again).state, house.job(again).cells_reused) == ("succeeded", 5 * 30)
    check_all(house, again, rows, gaps, tasks)
    # Where the body is there, only what reads it is computed; an empty text is no missing one.
    whole = land(house.database, rows, tasks)
    assert house.job(whole).cells_reused == 30
    finish(house, whole)
    check_all(house, whole, rows, {}, tasks)


def test_a_task_whose_rows_are_all_bad_releases_what_waits_for_it(house: House) -> None:
    tasks = {"of_body": TASKS["of_body"], "last": TASKS["last"], "of_title": TASKS["of_title"]}
    job = land(house.database, texts(10), tasks, gaps={"body": set(range(10))}, block_rows=4)
    assert len(reasons(house, job, "last")) == 10, "sealed as it lands"
    assert finish(house, job).cells_ok == 10


def test_a_job_that_is_cancelled_counts_its_bad_cells_once(house: House) -> None:
    from scheduler.store import endings
    from scheduler.store.registry import tenant_named

    job = land(house.database, texts(60), TASKS, block_rows=16, gaps={"title": {1, 20}, "body": {2, 40}})
    house.work()
    with house.database.transaction() as connection:
        endings.cancel_job(connection, tenant_named(connection, "default"), job)
    assert check(house, job).state == "cancelled"


# -- over HTTP

TWO_FIELDS = {
    "of_title": {**CLASSIFY["topic"], "input": "{title}"},
    "of_body": {**CLASSIFY["topic"], "input": "{body}"},
}
ROWS: list[Any] = [
    {"title": "t0", "body": "b0"},
    {"title": "\0", "body": "b1"},
    {"title": "t2", "n": None},
    7,
]


def test_all_forms_of_a_part_give_the_same_cells(api_house: ApiHouse) -> None:  # noqa: F811
    import json

    import msgpack

    lines = "\n".join(map(json.dumps, ROWS)).encode()
    columns = {
        "columns": {"title": ["t0", "\0", "t2", ""], "body": ["b0", "b1", None, ""]},
        "bad": {3: ["bad_row", "got a number; expected text, or an object of field to value"]},
        "bad_fields": {
            "body": [["bad_row", "body: got no such field; expected a value (the row has title, n)", [2]]]
        },
    }
    found = []
    for raw, kind in ((lines, "application/x-ndjson"), (msgpack.packb(columns), "application/msgpack")):
        job = api_house.open(TWO_FIELDS, bad_rows="error")["id"]
        landed = api_house.put_raw(job, 0, raw, kind).json()
        assert (landed["rows"], landed["bad_rows"]) == (4, 3)
        assert api_house.close(job, 1, 4).json()["cells"]["error"] == 4
        api_house.answer(job, 0)
        found.append(job)
    inline = api_house.open(TWO_FIELDS, bad_rows="error", rows=ROWS)["id"]
    assert api_house.job(inline)["cells"]["reused"] == 8, "it says the same"
    for job in [*found, inline]:
        errors = api_house.call("GET", f"/v1/jobs/{job}/errors").json()["errors"]
        assert [(e["row"], e["task"]) for e in errors] == [
            (1, "of_title"),
            (2, "of_body"),
            (3, "of_title"),
            (3, "of_body"),
        ]
        done = api_house.job(job)
        assert (done["state"], done["cells"]["ok"], done["cells"]["error"]) == ("succeeded", 4, 4)


def test_a_refusal_names_the_fields_that_tasks_read_and_no_other(api_house: ApiHouse) -> None:  # noqa: F811
    answer = api_house.call("POST", "/v1/jobs", json={"tasks": TWO_FIELDS, "rows": ROWS})
    assert answer.status_code == 422
    problems = answer.json()["error"]["problems"]
    assert [(p["row"], p["field"]) for p in problems] == [(1, "rows.title"), (2, "rows.body"), (3, "rows")]
    unread = [{"title": "t", "body": "b", "n": None}, {"title": "t", "body": "b", "n": {"a": [1.5]}}]
    assert api_house.call("POST", "/v1/jobs", json={"tasks": TWO_FIELDS, "rows": unread}).status_code == 202


def test_a_plan_counts_for_each_pass_the_rows_that_it_can_read(api_house: ApiHouse) -> None:  # noqa: F811
    def tokens(rows: list[Any]) -> list[int]:
        body = {"tasks": TWO_FIELDS, "rows": rows, "bad_rows": "error"}
        answer = api_house.call("POST", "/v1/plan", json=body)
        assert answer.status_code == 200, answer.text
        return [p["tokens"] for p in answer.json()["passes"]]

    whole = [{"title": "one two", "body": "three four"}] * 4
    title, body = tokens(whole)
    assert tokens([*whole[:2], *[{"title": "one two"}] * 2]) == [title, body // 2]
