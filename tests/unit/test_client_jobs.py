"""The client against a small API over a real socket: submitting, resuming, watching, streaming, ending."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from motet import (
    Chat,
    Choose,
    Classify,
    Client,
    Conflict,
    Embed,
    Generate,
    InvalidJob,
    JobFailed,
    NotFound,
    Overloaded,
    Unauthorized,
    Unreachable,
)
from motet.http import Address, Http
from tests.unit.fake_api import ADMIN, TOKEN, FakeApi, serving

TOPIC = {"topic": Classify("news-topics")}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving() as fake:
        yield fake


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    with connected(api) as line:
        yield line


def connected(api: FakeApi, *, token: str = TOKEN, timeout_s: float = 10.0, **injected: Any) -> Client:
    """A client that does not sleep between tries."""
    injected.setdefault("sleep", lambda seconds: None)
    return Client.over(Http(Address(url=api.url, token=token), timeout_s=timeout_s, **injected))


def lines(n: int) -> Iterator[str]:
    return (f"row {i}" for i in range(n))


# -- submit


def test_a_small_job_is_one_request(api: FakeApi, client: Client) -> None:
    job = client.submit(["a", "b", "c"], TOPIC)
    assert api.requests == [("POST", "/v1/jobs")]
    assert [str(row["topic"]) for row in job.results()] == ["sport", "tech", "sport"]


def test_a_large_job_is_sent_in_parts_and_streamed_back_in_order(api: FakeApi, client: Client) -> None:
    job = client.submit(
        lines(5000), {**TOPIC, "vector": Embed("all-MiniLM-L6-v2", dtype="fp16")}, progress=False
    )
    assert api.count("PUT", "/parts/4") == 1
    rows = list(job.results())
    assert [row.index for row in rows] == list(range(5000))
    assert rows[1023]["vector"].vector == [1023.0, 0.5]
    assert list(rows[0]) == ["topic", "vector"]


def test_only_the_fields_that_tasks_read_are_sent(api: FakeApi, client: Client) -> None:
    client.submit(
        [{"title": "t", "body": "b", "iban": "DE89"}], {"topic": Classify("m", input="{title}: {body}")}
    )
    [job] = api.jobs.values()
    assert job.columns == [{"title": ["t"], "body": ["b"]}]
    assert "DE89" not in json.dumps(job.opening)


def test_a_name_of_another_task_is_no_field_of_the_row(api: FakeApi, client: Client) -> None:
    tasks = {
        "mood": Choose("m", labels=("glad", "sad"), about="{body}"),
        "reply": Generate("m", prompt="Answer a {mood} customer, {name}.", about="{body}"),
        "name": Generate("m", prompt="Spell {name}.", about="{mood}", system="You are {role}."),
    }
    client.submit([{"body": "b", "role": "r", "name": "Ann", "mood": "not read"}], tasks)
    [job] = api.jobs.values()
    # "name" reads the field of its own name; "reply" reads the task "name".
    assert job.columns == [{"body": ["b"], "name": ["Ann"], "role": ["r"]}]


@pytest.mark.parametrize("days", [float("nan"), float("inf"), True])
def test_days_that_are_no_number_never_reach_the_server(api: FakeApi, client: Client, days: Any) -> None:
    with pytest.raises(InvalidJob, match=r"expires_days.*expected a finite number"):
        client.create_token("laptop", expires_days=days)
    with pytest.raises(InvalidJob, match=r"retention_days.*expected a finite number"):
        client.submit(["text"], {"topic": Classify("m")}, retention_days=days)
    assert api.requests == []


def test_tasks_that_read_only_each_other_never_reach_the_server(api: FakeApi, client: Client) -> None:
    tasks = {"a": Generate("m", prompt="x", about="{b}"), "b": Generate("m", prompt="x", about="{a}")}
    with pytest.raises(InvalidJob, match="read only each other"):
        client.submit(["text"], tasks)
    assert api.requests == []


def test_a_dialogue_reaches_the_server_as_json(api: FakeApi, client: Client) -> None:
    dialogue = [{"role": "user", "content": "Hi"}]
    client.submit([dialogue, {"messages": dialogue}], {"answer": Chat("m")})
    client.submit([{"past": dialogue}], {"answer": Chat("m", messages="{past}")})
    first, second = api.jobs.values()
    assert first.columns == [{"messages": ['[{"role":"user","content":"Hi"}]'] * 2}]
    assert list(second.columns[0]) == ["past"]


def test_the_lengths_of_the_first_rows_are_told_where_a_prompt_can_be_turned(
    api: FakeApi, client: Client
) -> None:
    summary = {"summary": Generate("m", prompt="Sum up for {who}.")}
    rows = [{"text": "é" * 10, "who": "me", "other": "x"}] * 3
    client.submit(rows, summary)
    client.submit(rows * 400, summary)
    client.submit(rows, TOPIC)
    turned, in_parts, plain = api.jobs.values()
    assert turned.opening["mean_bytes"] == in_parts.opening["mean_bytes"] == {"text": 20.0, "who": 2.0}
    assert "mean_bytes" not in plain.opening


def test_a_job_of_exactly_one_part_needs_no_second(api: FakeApi, client: Client) -> None:
    job = client.submit(lines(1024), TOPIC)
    assert (api.count("POST", "/jobs"), job.rows) == (1, 1024)
    job = client.submit(lines(1025), TOPIC)
    assert (api.count("PUT", "/parts/1"), job.rows) == (1, 1025)


@pytest.mark.parametrize("source", [[], iter(()), ""])
def test_an_empty_job_never_reaches_the_server(api: FakeApi, client: Client, source: Any) -> None:
    with pytest.raises(InvalidJob):
        client.submit(source, TOPIC)
    assert api.requests == []


@pytest.mark.parametrize(
    ("tasks", "field"),
    [
        ({}, "tasks"),
        ([], "tasks"),
        ({"a b": Classify("m")}, "tasks"),
        ({"topic": {"kind": "guess", "model": "m"}}, "tasks.topic.kind"),
        ({"topic": Classify("m", input="no field")}, "tasks.topic.input"),
        ({"topic": "classify:m"}, "tasks.topic"),
    ],
)
def test_wrong_tasks_never_reach_the_server(api: FakeApi, client: Client, tasks: Any, field: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        client.submit(["a"], tasks)
    assert caught.value.problems[0].field == field
    assert api.requests == []


def test_an_unknown_model_is_told_with_the_words_of_the_api(client: Client) -> None:
    with pytest.raises(InvalidJob) as caught:
        client.submit(["a"], {"topic": Classify("unknown")})
    assert caught.value.problems[0].field == "tasks.topic.model"


def test_a_refused_job_leaves_nothing_on_the_server(api: FakeApi, client: Client) -> None:
    with pytest.raises(InvalidJob) as caught:
        client.submit([*lines(4000), 7, *lines(10)], TOPIC)
    assert [p.row for p in caught.value.problems] == [4000]
    assert api.count("PUT", "/parts/0") == 1
    assert api.jobs == {}


def test_a_source_that_breaks_leaves_nothing_on_the_server(api: FakeApi, client: Client) -> None:
    def breaks() -> Iterator[str]:
        yield from lines(3000)
        raise RuntimeError("the database is gone")

    with pytest.raises(RuntimeError, match="gone"):
        client.submit(breaks(), TOPIC)
    assert api.jobs == {}


def test_bad_rows_become_error_cells_where_that_is_asked_for(api: FakeApi, client: Client) -> None:
    job = client.submit(["a", 7, "c"], TOPIC, bad_rows="error")
    rows = list(job.results())
    assert [row["topic"].status for row in rows] == ["ok", "error", "ok"]
    assert rows[1].errors["topic"].error == "bad_row"
    assert rows[1]["topic"].value is None
    assert job.partial


# -- broken lines


@pytest.mark.parametrize("how", ["lost", "unheard", 503, 502, 429, "torn"])
def test_a_submission_whose_answer_is_lost_gives_one_job(api: FakeApi, client: Client, how: Any) -> None:
    api.fail_once("POST", "/v1/jobs", how)
    job = client.submit(["a"], TOPIC)
    assert list(api.jobs) == [job.id]


@pytest.mark.parametrize("how", ["lost", "unheard", 503, "torn"])
@pytest.mark.parametrize("end", ["/v1/jobs", "/parts/0", "/parts/2", "/parts/3", "/close"])
def test_a_broken_upload_goes_on_at_its_part(api: FakeApi, client: Client, end: str, how: Any) -> None:
    api.fail_once("POST" if end in ("/close", "/v1/jobs") else "PUT", end, how, times=2)
    job = client.submit(lines(4000), TOPIC)
    assert [row.index for row in job.results()] == list(range(4000))
    assert [api.count("PUT", f"/parts/{n}") for n in range(4) if not end.endswith(f"/{n}")].count(1) >= 3
    texts = [text for columns in api.jobs[job.id].columns for text in columns["text"]]
    assert texts == list(lines(4000))


def test_an_upload_that_broke_off_is_picked_up_by_its_key(api: FakeApi) -> None:
    api.fail_once("PUT", "/parts/2", 503, times=1000)
    clock = iter(range(0, 100_000, 8)).__next__
    with connected(api, timeout_s=20.0, clock=clock) as impatient, pytest.raises(Overloaded):
        impatient.submit(lines(4000), TOPIC, key="night-17")
    [left] = api.jobs.values()
    assert (left.state, left.rows) == ("loading", 2048)

    api.fail_once("PUT", "nothing", 503)
    api.requests.clear()
    with connected(api) as client:
        job = client.submit(lines(4000), TOPIC, key="night-17")
    assert job.id == left.id
    assert [path for method, path in api.requests if method == "PUT"] == [
        f"/v1/jobs/{job.id}/parts/2",
        f"/v1/jobs/{job.id}/parts/3",
    ]
    assert job.wait().rows == 4000


@pytest.mark.parametrize("key", ["ключ", "a\nb", "k" * 500])
def test_a_key_may_be_any_text(client: Client, key: str) -> None:
    """No header holds it as it is."""
    first = client.submit(["a"], TOPIC, key=key)
    assert client.submit(["a"], TOPIC, key=key).id == first.id


@pytest.mark.parametrize("key", [7, b"k", "a\ud800"])
def test_a_key_that_is_no_text_is_refused(client: Client, key: Any) -> None:
    with pytest.raises(InvalidJob, match="key: got a"):
        client.submit(["a"], TOPIC, key=key)


def test_the_same_key_gives_the_same_job_and_another_job_is_a_conflict(api: FakeApi, client: Client) -> None:
    first = client.submit(lines(3000), TOPIC, key="k")
    assert client.submit(lines(3000), TOPIC, key="k").id == first.id
    with pytest.raises(Conflict):
        client.submit(lines(3000), {"tone": Classify("tone")}, key="k")


def test_other_rows_under_the_key_of_an_unfinished_upload_are_a_conflict(api: FakeApi) -> None:
    api.fail_once("POST", "/close", 401)
    with connected(api) as client:
        with pytest.raises(Unauthorized):
            client.submit(lines(3000), TOPIC, key="k")
        with pytest.raises(Conflict):
            client.submit(lines(2000), TOPIC, key="k")


def test_an_upload_without_a_key_that_fails_for_good_is_removed(api: FakeApi, client: Client) -> None:
    api.fail_once("PUT", "/parts/1", 422)
    with pytest.raises(InvalidJob, match="as asked"):
        client.submit(lines(3000), TOPIC)
    assert api.jobs == {}


def test_retries_wait_as_long_as_the_server_asks_and_then_give_up(api: FakeApi) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    api.fail_once("GET", "/v1/workers", 503, times=1000)
    with (
        connected(api, timeout_s=30.0, sleep=sleep, clock=lambda: now[0], dice=lambda: 1.0) as client,
        pytest.raises(Overloaded, match="come back later") as caught,
    ):
        client.workers()
    assert caught.value.retry_after == 0.01
    assert slept == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]


def test_a_server_that_was_never_there_is_told_soon_and_with_a_remedy() -> None:
    slept: list[float] = []
    http = Http(Address(url="http://127.0.0.1:9", token=TOKEN), timeout_s=3600.0, sleep=slept.append)
    with Client.over(http) as client, pytest.raises(Unreachable, match="motet up"):
        client.workers()
    assert len(slept) < 100


def test_what_could_be_done_twice_with_harm_is_not_sent_twice(api: FakeApi) -> None:
    with connected(api, token=ADMIN) as client:
        api.fail_once("POST", "/tokens", "unheard")
        with pytest.raises(Unreachable):
            client.create_token("laptop")
        assert api.count("POST", "/tokens") == 1
        api.fail_once("POST", "/tokens", 503)
        assert client.create_token("laptop").token == "t2.made"


# -- watching and streaming


def test_results_stream_while_the_job_runs(api: FakeApi, client: Client) -> None:
    api.eager = False
    job = client.submit(lines(3000), TOPIC)
    fake = api.jobs[job.id]
    assert job.state == "running"
    api.finish(fake, [0])
    rows = job.results()
    assert [next(rows).index for _ in range(1024)] == list(range(1024))
    assert job.progress.share == pytest.approx(1024 / 3000)
    api.finish(fake)
    assert [row.index for row in rows] == list(range(1024, 3000))
    assert job.progress.rate == 1500.0


def test_results_come_in_the_order_of_their_being_done_where_that_is_asked_for(
    api: FakeApi, client: Client
) -> None:
    api.eager = False
    job = client.submit(lines(3000), TOPIC)
    api.finish(api.jobs[job.id], [2, 0])
    api.finish(api.jobs[job.id])
    assert [block.number for block in job.blocks(order="done")] == [2, 0, 1]
    assert [block.number for block in job.blocks()] == [0, 1, 2]


@pytest.mark.parametrize("how", ["lost", "unheard", "torn", 503])
def test_a_broken_stream_goes_on_at_its_block(api: FakeApi, client: Client, how: Any) -> None:
    job = client.submit(lines(5000), TOPIC)
    rows = job.results()
    first = [next(rows).index for _ in range(100)]
    api.fail_once("GET", "/results", how, times=2)
    assert first + [row.index for row in rows] == list(range(5000))


def test_some_tasks_can_be_asked_for_in_any_order(client: Client) -> None:
    job = client.submit(["a"], {**TOPIC, "tone": Classify("tone"), "vector": Embed("e", dtype="fp16")})
    [row] = job.results(["vector", "topic"])
    assert list(row) == ["vector", "topic"]
    assert "tone" not in row
    with pytest.raises(NotFound, match="topic, tone, vector"):
        list(job.results(["mood"]))
    with pytest.raises(TypeError, match=r"\['topic'\]"):
        list(job.results("topic"))


def test_a_cancelled_job_gives_the_rows_that_it_has_and_then_says_so(api: FakeApi, client: Client) -> None:
    api.eager = False
    job = client.submit(lines(3000), TOPIC)
    api.finish(api.jobs[job.id], [0])
    assert job.cancel().state == "cancelled"
    seen = []
    with pytest.raises(JobFailed, match="cancelled by its owner") as caught:
        seen.extend(job.results())
    assert caught.value.job_id == job.id
    assert len(seen) == 1024
    assert len(list(job.results(check=False))) == 1024
    assert job.progress.skipped == 3000 - 1024


def test_wait_returns_the_job_or_raises_what_became_of_it(api: FakeApi, client: Client) -> None:
    assert client.submit(["a"], TOPIC).wait().progress.ok == 1
    api.eager = False
    job = client.submit(["a"], TOPIC)
    with pytest.raises(TimeoutError, match="goes on"):
        job.wait(timeout=0.01)
    job.cancel()
    with pytest.raises(JobFailed):
        job.wait()
    assert job.wait(check=False) is job


def test_an_ended_job_is_not_asked_for_again(api: FakeApi, client: Client) -> None:
    job = client.submit(["a"], TOPIC).wait()
    api.requests.clear()
    assert (job.state, job.reason, job.usage["tokens"], job.progress.done) == ("succeeded", "", 90, 1)
    assert api.requests == []


def test_ctrl_c_leaves_the_job_running_and_says_how_to_pick_it_up(
    api: FakeApi, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    api.eager = False
    job = client.submit(["a"], TOPIC)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    job._sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        job.wait()
    assert f"motet watch {job.id}" in capsys.readouterr().err
    assert api.jobs[job.id].state == "running"


def test_errors_are_paged_through(client: Client) -> None:
    job = client.submit([1, "a", 2, 3, "b", 4], {**TOPIC, "tone": Classify("tone")}, bad_rows="error")
    found = list(job.errors())
    assert [(e.row, e.task) for e in found] == [(r, t) for r in (0, 2, 3, 5) for t in ("topic", "tone")]
    assert found[0].error == "bad_row"


def test_a_job_outlives_its_client(api: FakeApi, client: Client) -> None:
    mine = client.submit(["a"], TOPIC, name="mine").id
    with connected(api) as other:
        job = other.job(mine)
        assert (job.name, job.rows, [p.tasks for p in job.passes]) == ("mine", 1, [("topic",)])
        job.delete()
        with pytest.raises(NotFound):
            other.job(mine)


@pytest.mark.parametrize("job_id", ["", "..", "../tokens", "a/b", "a?b", "nope", "a b", "é", "\0"])
def test_an_id_that_is_none_is_not_found_and_never_another_path(
    api: FakeApi, client: Client, job_id: str
) -> None:
    with pytest.raises(NotFound):
        client.job(job_id)
    assert {path for _, path in api.requests} <= {"/v1/jobs/nope"}


def test_jobs_are_paged_through_newest_first(api: FakeApi, client: Client) -> None:
    for _ in range(120):
        client.submit(["a"], TOPIC)
    assert [job.id for job in client.jobs()] == [f"job-{n}" for n in range(120, 0, -1)]
    assert len(list(client.jobs(limit=60))) == 60
    assert list(client.jobs("running")) == []


# -- planning, and what there is


def test_a_plan_shows_how_tasks_share_a_pass(client: Client) -> None:
    plan = client.plan(lines(2000), {**TOPIC, "tone": Classify("tone")})
    assert (plan.rows, plan.tasks, len(plan.passes)) == (2000, 2, 1)
    assert plan.unfused_tokens == 2 * plan.tokens > 0
    assert plan.passes[0].tasks == ("topic", "tone")
    assert "2 tasks → 1 pass" in str(plan)


def test_a_plan_of_nothing_is_refused(client: Client) -> None:
    with pytest.raises(InvalidJob):
        client.plan([], TOPIC)


def test_a_rollback_whose_answer_was_lost_is_not_sent_again(api: FakeApi) -> None:
    with connected(api, token=ADMIN) as client:
        for version in ("0", "1"):
            client.promote(f"news-topics@{version}", "prod")
        api.fail_once("POST", "rollback", "unheard")
        with pytest.raises(Unreachable):
            client.rollback("news-topics@prod")
        assert [alias.ref for alias in client.aliases()] == ["news-topics@0"], "it went back, and once"
    assert api.count("POST", "rollback") == 1


def test_models_workers_and_tokens_are_listed(api: FakeApi) -> None:
    with connected(api, token=ADMIN) as client:
        assert [m.ref for m in client.models()] == ["news-topics@1"]
        assert client.model("news-topics@1").labels == ("sport", "tech")
        [worker] = client.workers()
        assert (worker.worker, worker.rate_tokens_s, worker.held) == ("w1", None, 1)
        [token] = client.tokens()
        assert (token.id, token.token) == ("t1", None)
        assert "secret" not in repr(client.create_token("x"))
        client.revoke_token("t1")
        with pytest.raises(Conflict, match="running job"):
            client.remove_model("news-topics@1")
        with pytest.raises(NotFound):
            client.model("other")


def test_a_wrong_token_is_unauthorized(api: FakeApi) -> None:
    with connected(api, token="wrong.token") as client, pytest.raises(Unauthorized, match="not known"):
        client.workers()
