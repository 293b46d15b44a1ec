"""A large batch through the death of every process of the cluster, one after the other."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import openai
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


@pytest.fixture
def models(cluster: Cluster, tmp_path: Path) -> None:
    for seed, name in enumerate(MODELS[1:]):
        folder = tmp_path / name
        folder.mkdir()
        made = str(a_llama(folder, seed))
        done = register(cluster.url, cluster.tokens["admin"], made, "--name", name)
        assert done.returncode == 0, done.stderr


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
