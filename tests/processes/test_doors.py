"""OpenAI's doors through the death of processes: a large batch, and a stream that is being told."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import openai
import psycopg
import pytest
from openai import OpenAI

from motet.local.cluster import Cluster
from tests.acceptance.test_a_real_job import workers_of
from tests.registering import register
from tests.tiny_language import a_llama

LINES = 20_000
#: Distinct requests for each model: equal lines run once, so the batch is large and its work is not.
DISTINCT = 150
MODELS = ("all-MiniLM-L6-v2", "tiny-one", "tiny-two")
PROCESSES = ("api", "dispatch", "aggregate", "valkey", "postgres")


def line(number: int) -> dict[str, object]:
    model, text = MODELS[number % 3], f"text {number % DISTINCT}"
    chat = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 1 + number % 2}
    url, asked = ("embeddings", {"input": text}) if model == MODELS[0] else ("chat/completions", chat)
    return {
        "custom_id": f"id-{number}",
        "method": "POST",
        "url": f"/v1/{url}",
        "body": {"model": model, **asked},
    }


@pytest.fixture(scope="module")
def models(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    for seed, name in enumerate(MODELS[1:]):
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        made = str(a_llama(folder, seed))
        done = register(cluster.url, cluster.tokens["admin"], made, "--name", name)
        assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("models")
def test_a_stream_whose_worker_is_killed_goes_on_and_nothing_is_told_twice(cluster: Cluster) -> None:
    asked: dict[str, Any] = {
        "model": MODELS[1],
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "max_tokens": 400,
        "temperature": 1.0,
        "seed": 11,
        "n": 8,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    with OpenAI(base_url=f"{cluster.url}/openai/v1", api_key=cluster.tokens["user"]) as client:
        whole = client.chat.completions.create(**asked).choices
        told, ends, likelihoods = [""] * 8, [""] * 8, {}
        # Known before: who holds the rows would have written them by the time that it is found.
        workers = workers_of(cluster)
        assert workers
        with client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    told[choice.index] += choice.delta.content or ""
                    ends[choice.index] = choice.finish_reason or ends[choice.index]
                    if choice.logprobs is not None:
                        likelihoods[choice.index] = [one.token for one in choice.logprobs.content or ()]
                # Some of it is told, and most of it is not written yet.
                if any(told):
                    while workers:
                        workers.pop().kill()
                usage = chunk.usage
    assert told == [choice.message.content for choice in whole]
    assert likelihoods == {
        choice.index: [one.token for one in (choice.logprobs and choice.logprobs.content) or ()]
        for choice in whole
    }
    assert all(likelihoods.values())
    assert set(ends) <= {"stop", "length"}
    assert usage is not None
    assert usage.completion_tokens > 0
    with psycopg.connect(cluster.database_url) as sql:
        [(lost,)] = sql.execute("SELECT sum(attempts_lost) FROM job WHERE name LIKE 'openai %'").fetchall()
    assert lost > 0, "it was killed after it had reported"


@pytest.mark.usefixtures("models")
def test_a_batch_of_twenty_thousand_lines_survives_the_death_of_every_process(cluster: Cluster) -> None:
    raw = "\n".join(json.dumps(line(n)) for n in range(LINES)).encode()
    with OpenAI(
        base_url=f"{cluster.url}/openai/v1", api_key=cluster.tokens["user"], max_retries=10
    ) as client:
        file = client.files.create(file=("lines.jsonl", raw), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="1h"
        )
        victims = [*PROCESSES, "worker"]
        until = time.monotonic() + 280
        seen: set[str] = set()
        while made.status not in ("completed", "failed", "expired", "cancelled"):
            assert time.monotonic() < until, made
            if victims:
                victim = victims.pop(0)
                pid = workers_of(cluster)[0].pid if victim == "worker" else cluster.pids[victim]
                os.kill(pid, signal.SIGKILL)
            time.sleep(1.0)
            try:
                made = client.batches.retrieve(made.id)
            except (openai.APIConnectionError, openai.InternalServerError):
                continue
            seen.add(made.status)
        assert not victims, f"it was done before every process had died: {seen}"
        assert made.status == "completed", made
        assert made.request_counts is not None
        assert (made.request_counts.total, made.request_counts.completed) == (LINES, LINES)
        assert made.output_file_id is not None
        answers = [json.loads(one) for one in client.files.content(made.output_file_id).iter_lines()]
    assert len(answers) == LINES
    assert {one["custom_id"] for one in answers} == {f"id-{n}" for n in range(LINES)}
