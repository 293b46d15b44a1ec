"""Language models on a real cluster: what waits for answers, what is killed, cancelled and asked again.

The model is a tiny one with random weights, so that every answer can be computed beside it, one prompt at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import psycopg
import pytest

from motet import Choose, Client, Function, Generate, Row, Task, TextDelta
from motet.local.cluster import Cluster
from motet.protocol.wire import TaskOrder
from tests.acceptance.test_a_real_job import rows, until, workers_of
from tests.registering import register
from tests.tiny_language import a_llama
from workers.engine import Pass, Prepared
from workers.engines.causal.causal import CausalEngine
from workers.registrar.describe import describe_folder
from workers.run.batch_adapter import run_to_the_end

LABELS = ("good", "bad", "neither")
NAME = "tiny-language"


def tasks(most: int = 12) -> dict[str, Task]:
    return {
        "summary": Generate(NAME, prompt="Summarise this.", max_tokens=most, numerics="exact"),
        "title": Generate(NAME, prompt="Write a title.", max_tokens=most, numerics="exact"),
        "mood": Choose(NAME, labels=LABELS, numerics="exact"),
    }


def with_reply(most: int = 12) -> dict[str, Task]:
    reply = Generate(NAME, prompt="Answer a {mood} letter.", max_tokens=most, numerics="exact")
    return {**tasks(most), "reply": reply}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """The model, registered with the cluster."""
    made = a_llama(tmp_path_factory.mktemp("tiny-language"))
    done = register(cluster.url, cluster.tokens["admin"], str(made), "--name", NAME)
    assert done.returncode == 0, done.stderr
    return made


class Alone:
    """The engine by itself, one row and one task after the other."""

    def __init__(self, folder: Path) -> None:
        self.model = describe_folder(folder, name=NAME, version="1", licence="", source={}).manifest
        files = {path.name: path for path in folder.iterdir()}
        self.engine = CausalEngine()
        self.handle = self.engine.load(self.model, files, device="cpu", in_format="fp32")

    def says(self, task: Task, text: str, first: str, fields: Mapping[str, str] | None = None) -> str:
        order = TaskOrder(name="it", spec={**task.to_json(), "first": first}, manifest=self.model)
        told = {name: (value,) for name, value in (fields or {}).items()}
        [row] = self.engine.prepare(Pass(self.handle, (order,), 0, told), [text])
        assert isinstance(row, Prepared)
        [cell] = _values(run_to_the_end(self.engine, Pass(self.handle, (order,), 0), [row])["it"])
        return cell


def _values(column: object) -> list[str]:
    from motet.protocol.columns import Column, values

    assert isinstance(column, Column)
    return [v["text"] if isinstance(v, dict) else v[0] for v in values(column, LABELS)]


def test_tasks_about_one_text_share_its_prefill_and_a_reply_waits_for_the_mood(
    client: Client, cluster: Cluster, folder: Path
) -> None:
    texts = rows(40, "l")
    plan = client.plan(texts, with_reply())
    assert [len(p.tasks) for p in plan.passes] == [3, 1]
    job = client.submit(texts, with_reply())
    merged = list(job.results())
    alone = Alone(folder)
    first, then = (one.first for one in plan.passes)
    for i in (0, 7, 39):
        said = {name: str(merged[i][name]) for name in with_reply()}
        expected = {name: alone.says(task, texts[i], first) for name, task in tasks().items()}
        expected["reply"] = alone.says(with_reply()["reply"], texts[i], then, {"mood": expected["mood"]})
        assert said == expected
    usage = job.usage
    assert usage["tokens_cached"] > 0
    assert 0 < usage["tokens_out"] <= 3 * 12 * 40
    with psycopg.connect(cluster.database_url) as sql:
        [summed] = sql.execute(
            "SELECT sum(tokens_out), sum(tokens_cached) FROM spent WHERE job_id = %s", [job.id]
        ).fetchall()
    assert summed == (usage["tokens_out"], usage["tokens_cached"])


def test_a_worker_killed_in_the_middle_of_many_answers_costs_no_cell(
    client: Client, cluster: Cluster, folder: Path
) -> None:
    texts = rows(240, "lk")
    job = client.submit(texts, with_reply(24))
    until(lambda: job.progress.ok > 0 or any(w.held for w in client.workers()), 60, "work under way")
    workers_of(cluster)[0].send_signal(signal.SIGKILL)
    merged = list(job.results())
    assert (job.state, job.progress.ok, job.progress.error) == ("succeeded", 960, 0)
    alone = Alone(folder)
    first = client.plan(texts, with_reply(24)).passes[0].first
    for i in (3, 120, 239):
        assert str(merged[i]["summary"]) == alone.says(tasks(24)["summary"], texts[i], first)
    again = client.submit(texts, with_reply(24))
    again.wait()
    assert again.progress.reused == 960
    assert again.usage["tokens_out"] == 0


def test_cancelling_ends_answers_that_are_being_written(client: Client, folder: Path) -> None:
    job = client.submit(rows(400, "lc"), with_reply(100))
    until(lambda: any(w.held for w in client.workers()), 60, "work under way")
    job.cancel()
    until(lambda: not any(w.held for w in client.workers()), 10, "free workers")
    assert job.state == "cancelled"
    cells = job.progress
    assert cells.ok + cells.error + cells.skipped == 1600


def test_a_row_that_does_not_fit_skips_what_waits_for_it_and_nothing_else(
    client: Client, folder: Path
) -> None:
    texts = [*rows(10, "ls"), "word " * 3000, *rows(10, "lt")]
    job = client.submit(texts, {"mood": tasks()["mood"], "reply": with_reply()["reply"]})
    merged = list(job.results())
    assert [row.index for row in merged if not row.ok] == [10]
    assert {name: (cell.status, cell.error.error) for name, cell in merged[10].items() if cell.error} == {
        "mood": ("error", "context_length"),
        "reply": ("skipped", "upstream"),
    }
    progress = job.progress
    assert (progress.ok, progress.error, progress.skipped) == (40, 1, 1)


def test_circles_and_answers_that_no_sentence_can_hold_are_refused(client: Client, folder: Path) -> None:
    from motet import InvalidJob

    circle: dict[str, Task] = {
        "a": Generate(NAME, prompt="{b}"),
        "b": Generate(NAME, prompt="{a}"),
    }
    with pytest.raises(InvalidJob, match="a"):
        client.submit(["x"], circle)
    with pytest.raises(InvalidJob):
        client.submit(["x"], {"a": Function("no-such-function")})


@pytest.mark.parametrize(
    ("example", "says"),
    [("openai_batch", "24 of 24 lines answered, each once"), ("openai_chat", "tokens read once")],
)
def test_openai_s_own_client_is_answered_by_a_real_model(
    cluster: Cluster, folder: Path, example: str, says: str
) -> None:
    """The examples as they stand, with the variables that `motet token create --openai` prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "examples" / f"{example}.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "OPENAI_BASE_URL": f"{cluster.url}/openai/v1",
            "OPENAI_API_KEY": cluster.tokens["user"],
            "MODEL": NAME,
        },
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_text_is_read_as_it_is_written_and_is_all_of_the_answer(client: Client, folder: Path) -> None:
    reply = {"reply": Generate(NAME, prompt="Write a letter.", max_tokens=60, numerics="exact")}
    with client.open(reply, name="letters") as feed, ThreadPoolExecutor(4) as threads:

        def read(text: str) -> tuple[list[TextDelta], Row | None]:
            with feed.stream(text, task="reply", within_s=60) as deltas:
                return list(deltas), deltas.row

        told = list(threads.map(read, rows(8, "ws")))
        whole = [str(feed.ask(text)["reply"]) for text in rows(8, "ws")]
    for (deltas, row), text in zip(told, whole, strict=True):
        assert row is not None
        assert "".join(map(str, deltas)) == str(row["reply"]) == text
        assert not any(delta.reset for delta in deltas)
    assert sum(len(deltas) for deltas, _ in told) > 2 * len(told)


def test_a_reader_that_goes_away_frees_the_device_within_a_second(
    client: Client, cluster: Cluster, folder: Path
) -> None:
    most = {
        f"t{i}": Generate(NAME, prompt=f"Write letter {i}.", max_tokens=400, numerics="exact")
        for i in range(8)
    }
    with client.open(most, name="long letters") as feed:
        deltas = feed.stream(rows(1, "wa")[0], within_s=60)
        next(deltas)
        deltas.close()
        gone = time.time()
        until(lambda: feed.job.refresh().progress.skipped == 8, 5, "skipped cells")
        assert time.time() - gone < 1
        until(lambda: dropped_at(cluster) > gone, 5, "a worker that lets go of it")
        assert dropped_at(cluster) - gone < 1


def dropped_at(cluster: Cluster) -> float:
    """When a worker last let go of an attempt, by the log."""
    lines = (cluster.data / "logs" / "workers.log").read_text("utf-8", "replace").splitlines()
    told = [json.loads(line)["at"] for line in lines if '"event": "dropped"' in line]
    return max((datetime.fromisoformat(at).timestamp() for at in told), default=0.0)
