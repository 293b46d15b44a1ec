"""Prompts, and tasks that wait for others, over HTTP: what is refused, what is planned, what is shown."""

from __future__ import annotations

from typing import Any

import pytest

from motet.messages.activity import JobActivity
from motet.messages.explanation import Explanation
from motet.messages.jobs import JobRecord, Plan
from tests.integration.api_house import CLASSIFY, SPEAKER, TWO, House, house, problems  # noqa: F401 - a fixture
from tests.integration.landing import register
from tests.messages import holds

REPLY = {"kind": "generate", "model": "speaker", "prompt": "Write a reply about {topic}.", "max_tokens": 32}
MOOD = {"kind": "choose", "model": "speaker", "labels": ["good", "bad"]}
TASKS = {"reply": REPLY, **CLASSIFY, "mood": MOOD, "summary": {**REPLY, "prompt": "Summarise."}}


@pytest.fixture(autouse=True)
def speaker(house: House) -> None:  # noqa: F811
    register(house.database, SPEAKER)


def generate(**options: Any) -> dict[str, Any]:
    return {"t": {"kind": "generate", "model": "speaker", "prompt": "Go on.", **options}}


def test_a_job_shows_what_waits_for_what_and_the_labels_it_brought(house: House) -> None:  # noqa: F811
    job = house.open(TASKS, rows=["a", "b"], mean_bytes={"text": 2000})
    assert [(p["tasks"], p["needs"]) for p in job["passes"]] == [
        (["topic"], []),
        (["mood", "summary"], []),
        (["reply"], ["topic"]),
    ]
    assert job["tasks"]["mood"]["labels"] == ["good", "bad"]
    assert {job["tasks"][name]["first"] for name in ("reply", "mood", "summary")} == {"text"}
    assert (job["usage"]["tokens_out"], job["usage"]["tokens_cached"]) == (0, 0)
    holds(JobRecord, job)
    activity = house.call("GET", f"/v1/jobs/{job['id']}/activity").json()
    holds(JobActivity, activity)
    assert [p["blocks"]["waiting"] for p in activity["passes"]] == [0, 0, 1]
    explained = house.call("GET", f"/v1/jobs/{job['id']}/explain").json()
    holds(Explanation, explained)
    assert [p["rows"]["blocked"] for p in explained["passes"]] == [0, 0, 2]
    assert [p["needs"] for p in explained["passes"]] == [[], [], ["topic"]]
    assert any("2 rows of reply wait for topic" in note for note in explained["notes"])


def test_only_real_fields_are_asked_of_rows(house: House) -> None:  # noqa: F811
    job = house.open({**TASKS, "more": {**REPLY, "about": "{reply}"}})
    assert house.put(job["id"], 0, ["a"]).status_code == 200


def test_tasks_that_wait_for_each_other_are_refused_by_name(house: House) -> None:  # noqa: F811
    tasks = {"a": {**REPLY, "prompt": "{b}"}, "b": {**REPLY, "prompt": "{a}"}}
    for path in ("/v1/jobs", "/v1/plan"):
        [problem] = problems(house.call("POST", path, json={"tasks": tasks}))
        assert "a reads b reads a" in problem["got"]


def test_a_vector_in_a_prompt_is_refused(house: House) -> None:  # noqa: F811
    [problem] = problems(
        house.call("POST", "/v1/jobs", json={"tasks": {**TWO, "reply": {**REPLY, "prompt": "{vector}"}}})
    )
    assert problem["got"] == "{vector}, which is a vector"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objct"}, "objct"),
        ({"properties": []}, "properties"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"x-guidance": {"lenient": True}, "not": {"pattern": "^(a|a)*b$"}}, "x-guidance"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_where_it_stands(
    house: House,  # noqa: F811
    schema: dict[str, Any],
    words: str,
) -> None:
    tasks = {"t": {"kind": "extract", "model": "speaker", "schema": schema}, **generate(schema=schema)}
    for name, task in tasks.items():
        found = problems(house.call("POST", "/v1/plan", json={"tasks": {name: task}}))
        assert found[0]["field"] == f"tasks.{name}.schema"
        assert words in found[0]["got"]


def test_a_schema_that_can_be_kept_is_taken(house: House) -> None:  # noqa: F811
    schema = {
        "type": "object",
        "properties": {
            "amount": {"type": "number"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
        },
        "required": ["amount"],
        "additionalProperties": False,
    }
    assert house.open(generate(schema=schema))["tasks"]["t"]["schema"] == schema


@pytest.mark.parametrize("sizes", [7, {"text": -1}, {"text": "x"}, {"text": True}, ["text"]])
def test_sizes_that_are_none_are_refused(house: House, sizes: Any) -> None:  # noqa: F811
    [problem] = problems(house.call("POST", "/v1/jobs", json={"tasks": TASKS, "mean_bytes": sizes}))
    assert problem["field"] == "mean_bytes"


def test_a_plan_tells_what_comes_first_and_what_sharing_saves(house: House) -> None:  # noqa: F811
    long = "Follow the rules. " * 100
    tasks = {"a": {**REPLY, "prompt": "A?"}, "b": {**REPLY, "prompt": "B?"}}
    rows = ["x" * 4000] * 4
    plan = house.call("POST", "/v1/plan", json={"tasks": tasks, "rows": rows, "total_rows": 40}).json()
    holds(Plan, plan)
    [one] = plan["passes"]
    assert one["first"] == "text"
    assert one["unfused_tokens"] > 1.9 * one["tokens"]
    assert one["tokens_out"] == plan["tokens_out"] == 2 * 32 * 40
    by_rows = {"tasks": {"a": {**REPLY, "prompt": long}}, "rows": ["short"] * 4, "total_rows": 400}
    [one] = house.call("POST", "/v1/plan", json=by_rows).json()["passes"]
    assert one["first"] == "instruction"
    assert one["unfused_tokens"] > 20 * one["tokens"]
    # What the client says of all rows outweighs the few that came along.
    [one] = house.call("POST", "/v1/plan", json={**by_rows, "mean_bytes": {"text": 10**6}}).json()["passes"]
    assert one["first"] == "text"


def test_a_plan_tells_on_which_share_of_the_rows_a_condition_lets_a_pass_run(house: House) -> None:  # noqa: F811
    tasks = {
        **CLASSIFY,
        "old": {**REPLY, "prompt": "Greet.", "when": "age >= 30"},
        "reply": {**REPLY, "when": "topic != 'sport' and topic.score > 0.5"},
    }
    asked = {"tasks": tasks, "rows": [{"text": "word", "age": i} for i in range(40)], "total_rows": 400}
    planned = house.call("POST", "/v1/plan", json=asked).json()
    holds(Plan, planned)
    shares = {p["tasks"][0]: (p["share"], p["tokens"]) for p in planned["passes"]}
    assert {task: share for task, (share, _) in shares.items()} == {"topic": 1.0, "old": 0.25, "reply": 1.0}
    asked["tasks"]["old"].pop("when")
    everywhere = house.call("POST", "/v1/plan", json=asked).json()
    every = {p["tasks"][0]: p["tokens"] for p in everywhere["passes"]}
    assert shares["old"][1] == pytest.approx(every["old"] / 4, rel=0.05)
    # A condition on a field alone is held against the sample, whichever answers the prompt waits for.
    asked["tasks"]["old"] |= {"prompt": "Greet a reader of {topic}.", "when": "age >= 30"}
    [old] = [
        p
        for p in house.call("POST", "/v1/plan", json=asked).json()["passes"]
        if p["tasks"] == ["old"] and p["needs"] == ["topic"]
    ]
    assert (old["share"], old["tokens_out"]) == (0.25, 32 * 100)


def test_a_plan_of_tasks_that_wait_needs_no_answers(house: House) -> None:  # noqa: F811
    plan = house.call("POST", "/v1/plan", json={"tasks": TASKS, "rows": ["one text"]}).json()
    assert [p["needs"] for p in plan["passes"]] == [[], [], ["topic"]]
    holds(Plan, plan)


def test_a_row_may_hold_a_dialogue_where_a_chat_reads_it(house: House) -> None:  # noqa: F811
    tasks = {"next": {"kind": "chat", "model": "speaker"}}
    talk = [{"role": "user", "content": "Hello"}]
    assert house.open(tasks, rows=[{"messages": talk}])["rows"] == 1
    [problem] = problems(
        house.call(
            "POST", "/v1/jobs", json={"tasks": tasks, "rows": [{"messages": talk}, {"messages": "Hello"}]}
        )
    )
    assert (problem["row"], problem["field"]) == (1, "rows.messages")
    job = house.open(tasks)["id"]
    lines = b'{"messages": [{"role": "user", "content": "Hello"}]}\n'
    assert house.put_raw(job, 0, lines, "application/x-ndjson").json()["rows"] == 1
