"""A model that was compressed through the API of a real cluster, and runs on its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from motet import Classify, Client, Embed
from motet.local.cluster import Cluster
from tests.acceptance.test_a_real_job import TASKS, rows


def test_a_compressed_model_runs_on_the_same_workers_and_its_heads_fuse_on_it(
    cluster: Cluster, client: Client, tmp_path: Path
) -> None:
    texts = rows(64, "packed")
    truth = [str(row["topic"]) for row in client.submit(texts, {"topic": TASKS["topic"]}).results()]
    labelled = tmp_path / "rows.jsonl"
    labelled.write_text(
        "".join(json.dumps({"text": t, "topic": one}) + "\n" for t, one in zip(texts, truth, strict=True))
    )
    command = (
        "compress all-MiniLM-L6-v2 --to int8 --json --tolerance 5 --task news-topics=topic --threads 1 --rows"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", "from motet.cli import main; main()", *command.split(), str(labelled)],
        env={**os.environ, "MOTET_URL": cluster.url, "MOTET_TOKEN": cluster.tokens["admin"]}
        | {"MOTET_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["forms"][-1]["memory_mb"] < 0.26 * told["forms"][0]["memory_mb"]
    tasks = {"topic": Classify("news-topics-int8"), "vector": Embed("all-MiniLM-L6-v2-int8")}
    assert len(client.plan(texts, tasks).passes) == 1
    found = list(client.submit(texts, tasks).results())
    kept = sum(str(row["topic"]) == one for row, one in zip(found, truth, strict=True))
    assert kept >= 0.95 * len(texts)
    assert len(found[0]["vector"].vector) == 384
