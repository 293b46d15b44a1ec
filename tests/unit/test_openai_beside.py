"""Tasks beside chats in one job: names that differ, and what reads them; and the lines of a batch, counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.conditions import condition, with_names
from motet.protocol.columns import ERROR, OK, SKIPPED, Column
from motet.protocol.manifest import Manifest
from motet.tasks import Chat, Choose, Classify, Function, Generate, Rank, Task
from scheduler.api.openai.beside import is_given_names, key_of, renamed, with_versions
from scheduler.api.openai.counted_lines import CountedLines, LineNote
from scheduler.api.openai.lines import FileSurvey, LineKind, job_tasks, survey
from scheduler.api.openai.parameters import CHAT, EMBEDDINGS
from scheduler.api.openai.refusals import DoorError
from scheduler.api.openai.requests import AskedRequest
from scheduler.store.registry import Registered
from tests.integration.api_house import SPEAKER

NAMES = {"answer": "chat-0", "topic": "topic-1", "a.b": "a.b-2"}


def test_a_task_reads_others_by_their_new_names_and_nothing_else_of_it_changes() -> None:
    task = Generate(
        "m",
        about="{text} {{answer}} {answer.text} {topic} {answers} {a.b.c} {a}",
        prompt="Is {topic.score} much? {answer[0]}",
        when="topic == 'answer' and {answer.text} != \"{topic}\" and a.b.c in [1] or not other.topic",
    )
    told = renamed("mine", task, NAMES)
    assert isinstance(told, Generate)
    assert told.about == "{text} {{answer}} {chat-0.text} {topic-1} {answers} {a.b-2.c} {a}"
    assert told.prompt == "Is {topic-1.score} much? {chat-0[0]}"
    assert told.when is not None
    assert condition(told.when).placeholders == ("topic-1", "chat-0.text", "a.b-2.c", "other.topic")
    assert renamed("mine", told, {"none": "some"}) == told
    # Its own name means a field.
    assert renamed("topic", Classify("m", input="{topic} {answer}"), NAMES).placeholders == (
        "topic",
        "chat-0",
    )


@pytest.mark.parametrize(
    "written",
    [
        "a.b > 1",
        "mood == 'ä' and {news-topic} in ['crime', 'wär'] and not{risk} > 1",
        "not (who[0].label == null) or customer[x] < -2",
        "messages[-7:] and true",
    ],
)
def test_a_condition_with_the_same_names_means_the_same(written: str) -> None:
    again = with_names(written, lambda name: name)
    assert condition(again).placeholders == condition(written).placeholders
    assert with_names(again, lambda name: name) == again


def kind(endpoint: str, model: str, beside: Mapping[str, Task]) -> LineKind:
    return LineKind(endpoint, model, False, key_of(beside))


def test_the_first_set_of_tasks_keeps_its_names_and_others_get_numbers() -> None:
    first: dict[str, Task] = {
        "topic": Classify("topics@1"),
        "gist": Generate("m@1", about="{answer}", prompt="?"),
    }
    second: dict[str, Task] = {
        "topic": Classify("topics@2", when="answer.finish == 'stop'"),
        "chat-0": Classify("t@1"),
    }
    found = FileSurvey()
    for endpoint, beside in ((EMBEDDINGS, {}), (CHAT, first), (CHAT, second), (CHAT, {})):
        found.kinds[kind(endpoint, "m@1", beside)] = beside
    made = job_tasks(found)
    assert list(made.tasks) == [
        "embedding-0",
        "answer",
        "gist",
        "topic",
        "chat-4",
        "chat-0-5",
        "topic-6",
        "chat-7",
    ]
    assert found.tasks == len(made.tasks)
    assert [list(numbers) for numbers in made.numbers.values()] == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert all(task.conditional for task in made.tasks.values())
    assert isinstance(made.tasks["answer"], Chat)
    topic = made.tasks["topic-6"]
    assert (topic.model, topic.when) == ("topics@2", "{chat-4.finish} == 'stop'")
    alone = FileSurvey(kinds={kind(CHAT, "m@1", {}): {}})
    assert [(name, task.conditional) for name, task in job_tasks(alone).tasks.items()] == [("chat-0", False)]


def test_heads_on_several_texts_and_labels_of_a_row_are_asked_by_the_new_names() -> None:
    head = Manifest(
        name="both", version="2", engine="encoder", answers="label", trunk_model="m@1", trunk="a" * 64,
        inputs=("{text}", "{answer.text}"), numbers=("topic.score",),
    )  # fmt: skip
    tasks = {"topic": Classify("t@1"), "both": Classify("both")}
    told = with_versions(tasks, {"both": head})
    assert told == {
        "topic": tasks["topic"],
        "both": Classify("both@2", input=head.inputs, numbers=head.numbers),
    }
    both = renamed("both", told["both"], NAMES)
    assert both.placeholders == ("text", "chat-0.text", "topic-1.score")
    pick = renamed("pick", Choose("m@1", labels="{answer.names}"), NAMES)
    assert pick.placeholders == ("text", "chat-0.names")
    assert renamed("pick", Choose("m@1", labels=("a", "{answer}")), NAMES).placeholders == ("text",)
    with pytest.raises(DoorError, match="a task about"):
        with_versions(tasks, {"both": replace(head, inputs=("{history}", "{text}"))})


def test_a_function_that_is_given_answers_by_name_is_known() -> None:
    plain = {"f": Function("f", input="{answer}"), "g": Function("g", inputs=("text",))}
    assert not is_given_names(plain)
    assert is_given_names({**plain, "h": Function("h", inputs=("answer.text",))})
    assert not is_given_names({"r": Rank("r", query="{text}", documents="{answer}")})


def test_a_file_of_many_sets_of_tasks_is_refused_before_they_are_checked(tmp_path: Path) -> None:
    """A check plans a job and asks the registry: a file may have 200,000 lines, each with a set of its own."""
    lines = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": CHAT,
            "body": {
                "model": "speaker",
                "messages": [{"role": "user", "content": "?"}],
                "tasks": {"pick": Choose("speaker", labels=("a", str(n))).to_json()},
            },
        }
        for n in range(50)
    ]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
    checked: list[AskedRequest] = []
    found = survey(
        tmp_path / "lines",
        lambda name: Registered(1, SPEAKER),
        lambda _: lambda ids: "",
        max_row_bytes=1 << 18,
        max_tasks=7,
        goes_on=lambda: None,
        check_tasks=checked.append,
    )
    assert [(one["code"], one["line"]) for one in found.errors] == [("too_many_models", 4)]
    assert "more than 7 tasks" in found.errors[0]["message"]
    assert len(checked) == 3


def note(rows: int, *places: int, task: int = 0, beside: int = 0) -> str:
    return json.dumps(LineNote(task, places or (0,), beside, rows))


def column(*states: int) -> Column:
    return Column(kind="json", status=bytes(states))


def counted(
    lines: CountedLines, *blocks: tuple[int, int, Sequence[str], Mapping[int, Column]]
) -> list[tuple[int, int]]:
    told = []
    for block in blocks:
        lines.add(*block)
        told.append((lines.completed, lines.failed))
    return told


def test_a_line_is_counted_once_all_of_its_rows_are_done_whichever_block_is_first() -> None:
    # Lines: one of two rows, one that stands in the file three times, one of four rows over three blocks, one that failed.
    first: Any = (0, 0, [note(2), "", note(1, 5, 6, 7), note(4)], {0: column(OK, OK, OK, OK)})
    second: Any = (1, 4, ["", ""], {0: column(OK, OK)})
    third: Any = (2, 6, ["", note(1)], {0: column(OK, ERROR)})
    assert counted(CountedLines(), first, second, third) == [(4, 0), (4, 0), (5, 1)]
    assert counted(CountedLines(), third, second, first) == [(0, 1), (0, 1), (5, 1)]
    assert counted(CountedLines(), second, first, third)[-1] == (5, 1)


def test_a_line_whose_rows_failed_in_part_has_failed_and_tasks_beside_it_are_none_of_its_rows() -> None:
    rows: Any = (0, 0, [note(2), "", note(1, task=1, beside=1)], {})
    columns = {
        0: column(OK, ERROR, SKIPPED),
        1: column(SKIPPED, SKIPPED, OK),
        2: column(SKIPPED, SKIPPED, ERROR),
    }
    assert counted(CountedLines(), (*rows[:3], columns)) == [(1, 1)]
