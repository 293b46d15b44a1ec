"""Tasks that read other tasks' answers: they wait block by block, rows without what they need are skipped, all is counted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any
from uuid import UUID

import pytest

from motet.errors import Problem
from motet.head_inputs import as_trained
from motet.protocol.columns import ERROR, CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment, Outcome, Spent, texts_of
from motet.tasks import Choose, Classify, Extract, Function, Generate, Rank, Task
from scheduler.policy.prompt_order import ANSWER_BYTES
from scheduler.store import endings, explain
from scheduler.store.registry import tenant_named
from tests.integration.landing import land, register
from tests.integration.test_protocol import HEAD, House, label_of, texts
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

LLM = Manifest(
    name="llm",
    version="1",
    engine="encoder",
    answers="text",
    files={"w": "1"},
    max_tokens=4096,
    parameters=1000,
)
#: size -> again -> third, each with the row's text beside what it reads.
LEVELS: dict[str, Task] = {
    "third": Classify("length", input="{again}/{size}/{text}"),
    "again": Classify("length", input="{size}: {text}"),
    "size": Classify("length"),
}
RIGHT: dict[str, Callable[[str], str]] = {
    "size": lambda t: HEAD.labels[label_of(t)],
    "again": lambda t: HEAD.labels[label_of(f"{RIGHT['size'](t)}: {t}")],
    "third": lambda t: HEAD.labels[label_of(f"{RIGHT['again'](t)}/{RIGHT['size'](t)}/{t}")],
}


@pytest.fixture
def house(plain_house: House) -> House:  # noqa: F811
    register(plain_house.database, LLM)
    return plain_house


def check(house: House, job: UUID) -> Any:
    """The promise, in SQL, whether the job has ended or not: the counters are what can be read, and what waits waits."""
    j = house.job(job)
    [found] = house.sql(
        "SELECT count(*) FILTER (WHERE status = 'ok') AS ok, count(*) FILTER (WHERE status = 'error') AS error,"
        " count(*) FILTER (WHERE status = 'skipped') AS skipped, count(DISTINCT (row, task)) AS different,"
        " count(*) AS cells FROM results WHERE job_id = :job",
        job=job,
    )
    assert found.cells == found.different
    if j.state in ("running", "loading"):
        # Counted when their place was released; in a sealed column only later.
        assert j.cells_skipped >= found.skipped
    else:
        assert j.cells_ok + j.cells_error + j.cells_skipped == j.n_rows * j.n_tasks
        assert (found.ok, found.error) == (j.cells_ok, j.cells_error)
    if j.state == "succeeded":
        assert found.skipped == j.cells_skipped
        assert found.cells == j.n_rows * j.n_tasks
        states = house.sql("SELECT DISTINCT state FROM block_pass WHERE job_id = :job", job=job)
        assert [s.state for s in states] == ["sealed"]
        assert (
            house.sql(
                "SELECT coalesce(sum(rows_waiting), 0) + coalesce(sum(bytes_waiting), 0) AS n FROM pass"
            )[0].n
            == 0
        )
    waiting = house.sql(
        "SELECT p.rows_waiting, (SELECT coalesce(sum(n - cursor), 0) FROM block_pass b WHERE b.job_id = p.job_id"
        " AND b.pass_number = p.number AND b.state = 'ready') + (SELECT coalesce(sum(hi - lo), 0) FROM piece c"
        " WHERE c.job_id = p.job_id AND c.pass_number = p.number) AS found FROM pass p WHERE p.job_id = :job",
        job=job,
    )
    if j.state in ("running", "loading"):
        assert all(w.rows_waiting == w.found for w in waiting)
    # Nothing is carved before all that it reads is sealed.
    early = house.sql(
        "SELECT b.pass_number, b.block_number FROM block_pass b JOIN pass p ON p.job_id = b.job_id"
        " AND p.number = b.pass_number CROSS JOIN LATERAL unnest(p.needs) n (task)"
        " WHERE b.job_id = :job AND b.state <> 'waiting' AND b.n > 0 AND b.todo <> 0 AND NOT EXISTS (SELECT FROM block_column c"
        " WHERE c.job_id = b.job_id AND c.block_number = b.block_number AND c.task_number = n.task)",
        job=job,
    )
    assert early == []
    return j


def finish(house: House, job: UUID, answer: Callable[[Assignment, Outcome], Outcome] = lambda _, o: o) -> Any:
    """Work until the job ends, checking at every round."""
    for _ in range(80):
        if check(house, job).state not in ("loading", "running"):
            break
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                hand.report(answer(a, hand.outcome(a)))
        house.aggregate()
        house.due()
    return house.job(job)


def failing(
    task: str, when: Callable[[str], bool], error: CellError
) -> Callable[[Assignment, Outcome], Outcome]:
    """Answers in which a task fails on some of its inputs."""

    def answer(a: Assignment, outcome: Outcome) -> Outcome:
        if task not in outcome.columns:
            return outcome
        column = outcome.columns[task]
        bad = [i for i, t in enumerate(a.texts) if when(t)]
        status = bytes(ERROR if i in bad else s for i, s in enumerate(column.status))
        broken = replace(column, status=status, errors=dict.fromkeys(bad, error))
        return replace(outcome, columns={**outcome.columns, task: broken})

    return answer


def reasons(house: House, job: UUID, task: str) -> dict[int, str]:
    rows = house.sql(
        "SELECT row, value FROM results WHERE job_id = :job AND task = :task AND status = 'skipped'",
        job=job,
        task=task,
    )
    return {r.row: f"{r.value['error']}: {r.value['message']}" for r in rows}


def test_rows_that_wait_for_answers_count_with_the_bytes_that_will_be_read_of_them(house: House) -> None:
    tasks = {
        "size": Classify("length", input="{body}"),
        "again": Classify("length", input="{size}: {title}"),
    }
    job = land(house.database, [{"title": f"{i:040}", "body": "x" * 4000} for i in range(30)], tasks)
    with house.database.transaction() as connection:
        tenant = tenant_named(connection, "default")
    with house.database.transaction() as connection:
        waits = explain.standing(connection, tenant, job).passes[1]
    row_bytes = 40 + len(": ") + ANSWER_BYTES
    assert (waits.rows_blocked, waits.bytes_blocked) == (30, 30 * row_bytes)
    assert finish(house, job).state == "succeeded"
    found = house.sql(
        "SELECT sum(bytes) AS size, sum(n_rows) AS n FROM subtask"
        " WHERE job_id = :job AND pass_number = 1 AND state = 'done'",
        job=job,
    )
    assert [(r.size, r.n) for r in found] == [(30 * row_bytes, 30)]


def test_three_levels_are_answered_block_by_block_with_the_answers_they_read(house: House) -> None:
    rows = texts(300)
    job = land(house.database, rows, LEVELS, block_rows=64)
    assert finish(house, job).state == "succeeded"
    for task, right in RIGHT.items():
        assert house.labels(job, task) == [right(t) for t in rows]
    assert house.job(job).cells_skipped == 0


def test_a_later_pass_of_a_block_does_not_wait_for_other_blocks(house: House) -> None:
    land(house.database, texts(3000), LEVELS, block_rows=64)
    house.hands.pop()
    for _ in range(40):
        house.work()
        done = house.sql("SELECT count(*) AS n FROM block_pass WHERE state = 'sealed' AND pass_number = 2")[
            0
        ].n
        first = house.sql("SELECT count(*) AS n FROM block_pass WHERE state = 'sealed' AND pass_number = 0")[
            0
        ].n
        if done:
            break
    assert done > 0
    assert first < 20


def test_rows_whose_upstream_failed_are_skipped_down_all_levels_with_the_first_reason(house: House) -> None:
    rows = texts(100)
    rows[3] = rows[50] = "cannot be read"
    job = land(house.database, rows, LEVELS, block_rows=32)
    answer = failing("size", lambda t: t == "cannot be read", CellError("too_long", "4,000 tokens"))
    j = finish(house, job, answer)
    assert (j.state, j.cells_error, j.cells_skipped) == ("succeeded", 2, 4)
    assert (
        reasons(house, job, "again")
        == reasons(house, job, "third")
        == dict.fromkeys((3, 50), "upstream: size: too_long")
    )
    for task in ("again", "third"):
        labels = house.labels(job, task)
        assert [labels[i] for i in (3, 50)] == ["upstream", "upstream"]
        assert [x for i, x in enumerate(labels) if i not in (3, 50)] == [
            RIGHT[task](t) for i, t in enumerate(rows) if i not in (3, 50)
        ]


def test_a_failure_in_the_middle_leaves_what_does_not_read_it(house: House) -> None:
    tasks = {**LEVELS, "beside": Classify("length", input="{size}!{text}")}
    job = land(house.database, texts(60), tasks, block_rows=25)
    j = finish(house, job, failing("again", lambda t: t.endswith("7"), CellError("engine", "no luck")))
    assert (j.state, j.cells_error, j.cells_skipped) == ("succeeded", 6, 6)
    assert set(reasons(house, job, "third").values()) == {"upstream: again: engine"}
    assert reasons(house, job, "beside") == {}


def test_a_block_without_a_row_left_is_sealed_at_once_and_so_on_down(house: House) -> None:
    job = land(house.database, texts(50), LEVELS, block_rows=20)
    j = finish(house, job, failing("size", lambda _: True, CellError("engine", "no luck")))
    assert (j.state, j.cells_ok, j.cells_error, j.cells_skipped) == ("succeeded", 0, 50, 100)
    assert house.sql("SELECT count(*) AS n FROM subtask WHERE pass_number > 0")[0].n == 0
    assert len(reasons(house, job, "third")) == 50


def test_rows_that_came_in_broken_stay_errors_in_every_task(house: House) -> None:
    rows: list[str | Problem] = [*texts(20)]
    rows[4] = Problem("text", "NUL", "text", "remove it", row=4)
    job = land(house.database, rows, LEVELS, block_rows=7)
    j = finish(house, job, failing("size", lambda t: t.endswith("9"), CellError("engine", "no luck")))
    assert (j.state, j.cells_error, j.cells_skipped) == ("succeeded", 3 + 2, 4)
    assert all(house.labels(job, task)[4] == "bad_row" for task in LEVELS)


def test_what_comes_back_of_a_pass_with_rows_taken_out_is_still_the_right_rows(house: House) -> None:
    """Positions are those of the pass' own order: pieces, a killed worker, retriable errors."""
    rows = texts(90)
    job = land(house.database, rows, LEVELS, block_rows=45)
    broken = {i for i, t in enumerate(rows) if t.endswith("3")}
    tries: dict[str, int] = {}

    def answer(a: Assignment, outcome: Outcome) -> Outcome:
        outcome = failing("size", lambda t: t.endswith("3"), CellError("engine", "no luck"))(a, outcome)
        for task in ("again", "third"):
            if task in outcome.columns:
                tries[task] = tries.get(task, 0) + 1
                if tries[task] == 1:
                    again = CellError("busy", "later", retriable=True)
                    outcome = failing(task, lambda t: t.endswith("7"), again)(a, outcome)
                elif tries[task] == 2:
                    outcome = replace(outcome, verdict="failed", columns={}, error=("engine", "fell over"))
        return outcome

    assert finish(house, job, answer).state == "succeeded"
    for task in ("again", "third"):
        assert [x for i, x in enumerate(house.labels(job, task)) if i not in broken] == [
            RIGHT[task](t) for i, t in enumerate(rows) if i not in broken
        ]
        assert reasons(house, job, task).keys() == broken


def test_a_resubmission_reuses_every_level_and_a_new_task_reads_what_is_there(house: House) -> None:
    rows = texts(100)
    first = land(house.database, rows, LEVELS, block_rows=32)
    finish(house, first)
    again = land(house.database, rows, LEVELS, block_rows=32)
    assert check(house, again).state == "succeeded"
    assert house.job(again).cells_reused == 300
    # Upstream is there, and what reads it is new: it is released as it lands.
    more = land(
        house.database, rows, {**LEVELS, "fresh": Classify("length", input="{third}-{text}")}, block_rows=32
    )
    assert house.job(more).cells_reused == 300
    ready = house.sql("SELECT state FROM block_pass WHERE job_id = :job AND pass_number = 3", job=more)
    assert {r.state for r in ready} == {"ready"}
    assert finish(house, more).state == "succeeded"
    assert house.labels(more, "fresh") == [HEAD.labels[label_of(f"{RIGHT['third'](t)}-{t}")] for t in rows]


def test_what_is_downstream_may_be_reused_while_upstream_is_done_again(house: House) -> None:
    rows = texts(40)
    finish(house, land(house.database, rows, LEVELS))
    house.sql(
        "UPDATE sealed_column SET key = NULL WHERE id IN (SELECT column_id FROM block_column WHERE task_number = 2)"
    )
    job = land(house.database, rows, LEVELS)
    assert house.job(job).cells_reused == 80
    assert finish(house, job).state == "succeeded"
    assert house.labels(job, "third") == [RIGHT["third"](t) for t in rows]


def test_another_upstream_is_another_column(house: House) -> None:
    rows = texts(20)
    finish(house, land(house.database, rows, {"a": Classify("length"), "b": Classify("length", input="{a}")}))
    other = {"a": Classify("length", max_tokens=16), "b": Classify("length", input="{a}")}
    assert house.job(land(house.database, rows, other)).cells_reused == 0
    # Nor is a field of that name the same as the answer.
    assert house.job(land(house.database, rows, {"b": Classify("length", input="{a}")})).cells_reused == 0


@pytest.mark.parametrize(("error", "kept"), [("too_long", True), ("engine", False)])
def test_skipped_cells_are_kept_for_reuse_only_where_they_would_be_skipped_again(
    house: House, error: str, kept: bool
) -> None:
    rows = texts(30)
    finish(
        house,
        land(house.database, rows, LEVELS),
        failing("size", lambda t: t.endswith("5"), CellError(error, "why")),
    )
    again = land(house.database, rows, LEVELS)
    assert house.job(again).cells_reused == (90 if kept else 0)
    assert finish(house, again).cells_ok == (90 - 9 if kept else 90)


def test_a_job_that_lands_on_reused_failures_skips_at_once(house: House) -> None:
    rows = texts(30)
    size = {"size": LEVELS["size"]}
    finish(
        house, land(house.database, rows, size), failing("size", lambda _: True, CellError("too_long", "why"))
    )
    job = land(house.database, rows, LEVELS)
    j = check(house, job)
    assert (j.state, j.cells_error, j.cells_skipped) == ("succeeded", 30, 60)


def test_a_job_that_is_cancelled_while_blocks_wait_is_counted_and_stays_so(house: House) -> None:
    job = land(house.database, texts(200), LEVELS, block_rows=32)
    for _ in range(2):
        house.work()
    late = [(hand, hand.outcome(a)) for hand in house.hands for a in hand.take_all()]
    with house.database.transaction() as connection:
        endings.cancel_job(connection, tenant_named(connection, "default"), job)
    for hand, outcome in late:
        hand.report(outcome)
    house.aggregate()
    for _ in range(3):
        house.work()
    assert check(house, job).state == "cancelled"
    with house.database.transaction() as connection:
        endings.remove_job(connection, tenant_named(connection, "default"), job)
    assert house.sql("SELECT count(*) AS n FROM block_pass")[0].n == 0


def test_rows_given_up_upstream_release_what_waits_for_them(house: House) -> None:
    job = land(house.database, texts(12), LEVELS, block_rows=12)
    for _ in range(200):
        if house.job(job).state != "running":
            break
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                failed = a.tasks[0].name == "size"
                hand.report(
                    hand.outcome(a, verdict="failed", columns={}, error=("engine", "fell over"))
                    if failed
                    else hand.outcome(a)
                )
        house.aggregate()
        house.due()
    j = check(house, job)
    assert (j.state, j.cells_error, j.cells_skipped) == ("succeeded", 12, 24)


# -- language models


def of_json(*answers: str) -> Column:
    raw = [a.encode() for a in answers]
    offsets = [0, *accumulate(map(len, raw))]
    return Column(
        kind="json",
        status=bytes(len(raw)),
        arrays={"offsets": struct.pack(f"<{len(offsets)}i", *offsets), "bytes": b"".join(raw)},
    )


def spent(n: int, cached: int = 0) -> Spent:
    return Spent(
        tokens_in=struct.pack(f"<{n}I", *range(10, 10 + n)),
        tokens_cached=struct.pack(f"<{n}I", *([cached] * n)),
        tokens_out=struct.pack(f"<{n}I", *range(n)),
        seconds=struct.pack(f"<{n}f", *([0.25] * n)),
    )


def speak(a: Assignment, outcome: Outcome) -> Outcome:
    """What an obedient language model answers: what it was asked, in capitals."""
    columns: dict[str, Column] = {}
    for order in a.tasks:
        match order.spec["kind"]:
            case "generate":
                columns[order.name] = of_json(
                    *(f'{{"text": "{t.upper()}", "finish": "stop"}}' for t in a.texts)
                )
            case "function":
                columns[order.name] = of_json(*(["1"] * len(a.texts)))
            case "choose":
                codes = struct.pack(f"<{len(a.texts)}h", *(len(t) % 2 for t in a.texts))
                columns[order.name] = Column(
                    kind="label",
                    status=bytes(len(a.texts)),
                    arrays={"codes": codes, "scores": bytes(4 * len(a.texts))},
                )
            case _:
                columns[order.name] = outcome.columns[order.name]
    used = {
        name: spent(len(a.texts), cached=i) for i, name in enumerate(columns) if a.model.answers == "text"
    }
    return replace(outcome, columns=columns, spent=used)


def seen(
    house: House, job: UUID, answer: Callable[[Assignment, Outcome], Outcome] = speak
) -> list[Assignment]:
    """Every assignment of a job, while it is worked off."""
    found: list[Assignment] = []

    def note(a: Assignment, outcome: Outcome) -> Outcome:
        found.append(a)
        return answer(a, outcome)

    assert finish(house, job, note).state == "succeeded"
    return found


PROMPTS: Mapping[str, Task] = {
    "mood": Choose("llm", labels=("good", "bad")),
    "summary": Generate("llm", prompt="Summarise for {reader}."),
    "reply": Generate("llm", prompt="Answer {summary}, it is {mood}.", temperature=0.5),
}


def test_prompts_come_with_all_that_they_read(house: House) -> None:
    rows = ["abc", "no", "one more"]
    job = land(house.database, rows, PROMPTS, block_rows=2)
    sent = seen(house, job)
    first = [a for a in sent if a.tasks[0].name == "mood"]
    then = [a for a in sent if a.tasks[0].name == "reply"]
    assert {t.name for a in first for t in a.tasks} == {"mood", "summary"}
    assert sorted(t for a in first for t in a.texts) == sorted(rows)
    # What other templates read, whatever task reads it; no index where nothing is drawn.
    assert all(a.fields == {"reader": a.texts} and a.indices == () for a in first)
    assert all({t.spec["first"] for t in a.tasks} == {"text"} for a in sent)
    for a in then:
        assert a.fields["summary"] == tuple(t.upper() for t in a.texts)
        assert a.fields["mood"] == tuple(("good", "bad")[len(t) % 2] for t in a.texts)
        assert [rows[i] for i in a.indices] == list(a.texts)
    assert house.labels(job, "mood") == ["bad", "good", "good"]


def test_parts_of_answers_and_of_fields_come_as_text_and_functions_get_values(house: House) -> None:
    register(house.database, Manifest(name="fn", version="1", engine="encoder", answers="json"))
    rows: list[dict[str, Any]] = [
        {"text": f"row {i}", "turns": [{"role": "user", "content": f"<{i}>"}] * 2, "age": i or None}
        for i in range(3)
    ]
    job = land(
        house.database,
        rows,
        {
            "mood": Choose("llm", labels=("good", "bad")),
            "summary": Generate("llm", prompt="Summarise."),
            "reply": Generate(
                "llm", prompt="It ended by {summary.finish} as {mood.label}.", about="{turns[-1]}"
            ),
            "risk": Function(
                "fn", inputs=("mood", "summary.text", "turns[0].content", "age", "summary.gone")
            ),
        },
        block_rows=2,
        gaps={},
    )
    sent = seen(house, job)
    reply = {a.texts: a.fields for a in sent if a.tasks[0].name == "reply"}
    assert sorted(t for texts_ in reply for t in texts_) == [f"user: <{i}>" for i in range(3)]
    assert all(f["summary.finish"] == ("stop",) * len(t) for t, f in reply.items())
    assert {word for f in reply.values() for word in f["mood.label"]} <= {"good", "bad"}
    given = [v for a in sent if a.tasks[0].name == "risk" for v in a.values]
    assert [g["age"] for g in sorted(given, key=lambda g: g["turns[0].content"])] == [None, 1, 2]
    for g in given:
        assert g["mood"]["label"] in ("good", "bad")
        assert isinstance(g["mood"]["score"], float)
        assert g["summary.text"].startswith("ROW ")
        assert g["summary.gone"] is None
    assert check(house, job).state == "succeeded"


def choose_the_last(a: Assignment, outcome: Outcome) -> Outcome:
    """Of a row's own labels the last one; an error where they are none."""
    columns = dict(speak(a, outcome).columns)
    for order in a.tasks:
        if order.spec["kind"] == "choose":
            lists = map(json.loads, a.fields[order.spec["labels"]])
            columns[order.name] = of_json(*(json.dumps({"label": one[-1], "score": 0.5}) for one in lists))
    return replace(outcome, columns=columns, spent=speak(a, outcome).spent)


def test_labels_of_a_row_come_as_a_list_and_what_was_chosen_is_read_like_any_label(house: House) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"row {i}", "hits": [f"hit {i}", "x" * (1 + i % 2)]} for i in range(6)
    ]
    tasks: dict[str, Task] = {
        "pick": Choose("llm", labels="{hits}"),
        "why": Generate("llm", prompt="Why {pick}, so {pick.score}?"),
        "twice": Generate("llm", prompt="Again.", when="pick == 'xx'"),
        "of": Choose("llm", labels="{data.names}", about="{text} {pick}"),
        "data": Extract("llm", schema={"type": "object"}),
    }

    def answer(a: Assignment, outcome: Outcome) -> Outcome:
        said = choose_the_last(a, outcome)
        data = {"data": of_json(*['{"names": ["a", "b"]}'] * len(a.texts))}
        return replace(said, columns={**said.columns, **(data if "data" in said.columns else {})})

    job = land(house.database, rows, tasks, block_rows=4)
    sent = seen(house, job, answer)
    why = [a for a in sent if a.tasks[0].name == "why"]
    assert sorted(word for a in why for word in a.fields["pick"]) == ["x"] * 3 + ["xx"] * 3
    assert all(set(a.fields["pick.score"]) == {"0.5"} for a in why)
    assert sum(len(a.texts) for a in sent if a.tasks[0].name == "twice") == 3
    of = [a.fields["{data.names}"] for a in sent if a.tasks[0].name == "of"]
    assert {one for lists in of for one in lists} == {'["a", "b"]'}
    assert check(house, job).state == "succeeded"


def test_a_head_on_several_texts_is_sent_what_each_of_them_names(house: House) -> None:
    pair = replace(HEAD, name="pair", inputs=("{a}|", "{b}"), numbers=("n", "size.score"))
    near = replace(pair, name="near", numbers=("n",))
    register(house.database, pair, near)
    rows: list[dict[str, Any]] = [{"a": f"a {i}", "b": f"b{i}", "n": i or None} for i in range(5)]
    size = Classify("length", input="{b}")
    both = as_trained(Classify("pair"), pair)

    def sent_of(tasks: dict[str, Task]) -> list[Assignment]:
        job = land(house.database, rows, tasks, block_rows=3)
        sent = seen(house, job, lambda _, outcome: outcome)
        assert check(house, job).state == "succeeded"
        return [a for a in sent if a.tasks[0].name != "size"]

    for a in sent_of({"size": size, "both": both}):
        assert texts_of(a.tasks) == ("{a}|", "{b}")
        assert set(a.fields) == {"a", "b", "n", "size.score"}
        assert [f"{x}|{y}" for x, y in zip(a.fields["a"], a.fields["b"], strict=True)] == list(a.texts)
        assert set(a.fields["n"]) <= {"", "1", "2", "3", "4"}
        assert list(map(float, a.fields["size.score"])) == [0.5] * len(a.texts)
    # Fused with what reads one of the texts, of which the answers are there already: it brings both all the same.
    near_task = as_trained(Classify("near"), near)
    for a in sent_of({"other": size, "near": near_task}):
        assert [t.name for t in a.tasks] == ["near"]
        assert (set(a.fields), texts_of(a.tasks)) == ({"a", "b", "n"}, ("{a}|", "{b}"))
    # And the other way round: the text that is read alone comes alone.
    for a in sent_of({"near": near_task, "third": replace(size, scores=True)}):
        assert [t.name for t in a.tasks] == ["third"]
        assert (a.fields, texts_of(a.tasks)) == ({}, ("{b}",))
        assert set(a.texts) <= {f"b{i}" for i in range(5)}


def test_a_cross_encoder_gets_its_query_and_its_documents_as_values(house: House) -> None:
    """Fields of the row, a part of one, and what another task answered; nothing of them goes a second time."""
    register(house.database, Manifest(name="ranker", version="1", engine="encoder", answers="ranking"))
    rows: list[dict[str, Any]] = [
        {"text": f"row {i}", "lang": "de", "pages": [f"a{i}", "b", f"c{i}"]} for i in range(3)
    ]
    tasks: dict[str, Task] = {
        "summary": Generate("llm", prompt="Summarise."),
        "best": Rank("ranker", query="In {lang}: {summary}", documents="{pages[:2]}"),
        "top": Rank("ranker", query="{text}", documents="{pages}"),
    }
    job = land(house.database, rows, tasks, block_rows=2, gaps={})
    sent = {a.tasks[0].name: a for a in seen(house, job) if a.tasks[0].name != "summary"}
    assert all(a.fields == {} and a.max_tokens == 0 for a in sent.values())
    for given in sent["best"].values:
        assert isinstance(given, dict)
        assert given["summary"]["text"].startswith("ROW ")
        assert (given["lang"], len(given["pages[:2]"])) == ("de", 2)
    for given in sent["top"].values:
        assert isinstance(given, dict)
        number = given["text"].removeprefix("row ")
        assert given == {"text": f"row {number}", "pages": [f"a{number}", "b", f"c{number}"]}
    assert check(house, job).state == "succeeded"


CONDITIONAL: Mapping[str, Task] = {
    "mood": Choose("llm", labels=("good", "bad")),
    "reply": Generate("llm", prompt="Answer, it is {mood}.", when="mood == 'bad' and age < 30"),
    "check": Generate("llm", prompt="Is {reply} right?"),
    "old": Generate("llm", prompt="Greet.", when="age >= 30"),
}


def test_a_task_runs_where_its_condition_holds_and_the_rest_is_counted(house: House) -> None:
    rows: list[dict[str, Any]] = [{"text": "x" * (1 + i % 4), "age": i} for i in range(40)]
    job = land(house.database, rows, CONDITIONAL, block_rows=16)
    sent = seen(house, job)
    wanted = {
        "reply": {i for i, r in enumerate(rows) if len(r["text"]) % 2 and r["age"] < 30},
        "old": {i for i, r in enumerate(rows) if r["age"] >= 30},
    }
    for task, right in wanted.items():
        done = sum(len(a.texts) for a in sent if a.tasks[0].name == task)
        skipped = reasons(house, job, task)
        assert done == len(right), "a row that is not the task's costs nothing"
        assert set(skipped) == set(range(40)) - right
        assert {why.partition(":")[0] for why in skipped.values()} == {"condition"}
    # What reads an answer that was not asked for is skipped too, and says whose.
    assert set(reasons(house, job, "check").values()) == {"upstream: reply: condition"}
    j = check(house, job)
    assert (j.cells_ok, j.cells_error) == (40 + 2 * len(wanted["reply"]) + len(wanted["old"]), 0)
    again = land(house.database, rows, CONDITIONAL, block_rows=16)
    assert house.job(again).state == "succeeded", "equal conditions on equal answers are reused"
    assert (house.job(again).cells_ok, house.job(again).cells_skipped) == (j.cells_ok, j.cells_skipped)


def test_a_row_that_cannot_be_compared_is_an_error_or_skipped_by_its_upstream(house: House) -> None:
    rows: list[dict[str, Any]] = [{"text": "abc", "age": 1} for _ in range(4)]
    job = land(house.database, rows, CONDITIONAL, block_rows=4, gaps={"age": [1], "text": [2]})
    seen(house, job)
    assert reasons(house, job, "reply") == {}
    assert set(reasons(house, job, "old")) == {0, 3}
    j = check(house, job)
    # mood: row 2. reply, check and old: rows 1 and 2, but check reads no age: it is skipped by reply in row 1.
    assert (j.cells_error, j.cells_skipped) == (1 + 2 + 1 + 2, 1 + 2)


def test_tokens_are_counted_with_the_cells_and_their_sums_agree(house: House) -> None:
    job = land(house.database, texts(50), PROMPTS, block_rows=16)
    sent = seen(house, job)
    [total] = house.sql(
        "SELECT sum(tokens_in) AS tokens_in, sum(tokens_cached) AS cached, sum(tokens_out) AS out, sum(device_s) AS s"
        " FROM spent WHERE job_id = :job",
        job=job,
    )
    j = house.job(job)
    assert (total.tokens_in, total.cached, total.out) == (j.tokens, j.tokens_cached, j.tokens_out)
    assert total.out == sum(sum(range(len(a.texts))) * len(a.tasks) for a in sent)
    assert total.s == pytest.approx(0.25 * 3 * 50)
    places = house.sql("SELECT count(*) AS n FROM spent WHERE job_id = :job", job=job)[0].n
    assert places == 4 * 3


@pytest.mark.parametrize("wrong", [{"other": spent(1)}, {"mood": spent(1)}])
def test_an_outcome_whose_tokens_fit_nothing_is_not_believed(house: House, wrong: dict[str, Spent]) -> None:
    job = land(house.database, texts(8), PROMPTS)
    lies = 0

    def answer(a: Assignment, outcome: Outcome) -> Outcome:
        nonlocal lies
        lies += 1
        return replace(speak(a, outcome), spent=wrong) if lies == 1 else speak(a, outcome)

    assert finish(house, job, answer).state == "succeeded"
    [total] = house.sql("SELECT sum(tokens_out) AS out FROM spent")
    assert (total.out, house.sql("SELECT count(*) AS n FROM subtask WHERE state = 'failed'")[0].n) == (
        house.job(job).tokens_out,
        1,
    )


def test_what_was_drawn_is_not_reused_nor_what_reads_it(house: House) -> None:
    rows = texts(10)
    tasks = {**PROMPTS, "of_reply": Generate("llm", prompt="Shorter.", about="{reply}")}
    seen(house, land(house.database, rows, tasks))
    assert house.job(land(house.database, rows, tasks)).cells_reused == 20


def test_speed_is_learned_under_the_shape_of_the_pass(house: House) -> None:
    job = land(house.database, texts(400), {"summary": PROMPTS["summary"]})
    seen(house, job)
    [key] = house.sql("SELECT rate_key FROM pass WHERE job_id = :job", job=job)
    assert key.rate_key.startswith(f"{LLM.digest}:")
    learned = {row.trunk for row in house.sql("SELECT trunk FROM rate")}
    assert learned <= {key.rate_key}
