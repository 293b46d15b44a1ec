"""motet itself: its own embedded cluster, one job of four tasks, and every row back in the client's hand."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from work import LOAD_S, Work, do

from motet import Client
from motet.demo.texts import TASKS
from motet.local.cluster import Cluster

#: fp32, as all others compute.
EXACT = {name: replace(task, numerics="exact") for name, task in TASKS.items()}


def run(client: Client, texts: list[str]) -> dict[str, NDArray]:
    """Submit, and read every cell as a user does."""
    job = client.submit(texts, EXACT, reuse=False, progress=False)
    code = {
        task: {name: k for k, name in enumerate(job.tasks[task]["labels"])}
        for task in EXACT
        if task != "vector"
    }
    found: dict[str, NDArray] = {
        "topic": np.zeros(len(texts), np.int16),
        "sentiment": np.zeros(len(texts), np.int16),
        "tone": np.zeros((len(texts), len(code["tone"])), bool),
        "vector": np.zeros((len(texts), 384), np.float16),
    }
    for row in job.results():
        if not row.ok:
            raise RuntimeError(f"row {row.index}: {row.errors}")
        for task in ("topic", "sentiment"):
            found[task][row.index] = code[task][row[task].label]
        for label in row["tone"].labels:
            found["tone"][row.index, code["tone"][label]] = True
        found["vector"][row.index] = row["vector"].numpy()
    return found


def await_loaded(client: Client, work: Work) -> None:
    """Wait for all workers, and send a few rows, then more, until every one has the model in memory."""
    end, rows = time.monotonic() + LOAD_S, len(work.warm_up)
    while sum(bool(worker.resident) for worker in client.workers()) < work.processes:
        if time.monotonic() > end:
            raise TimeoutError(f"not all workers have loaded the model after {LOAD_S:.0f} s")
        if sum(worker.state == "ready" for worker in client.workers()) < work.processes:
            time.sleep(0.05)
        else:
            run(client, work.texts[:rows])
            rows *= 2


def main(work: Work) -> None:
    cluster = Cluster(Path(os.environ["RIVAL_DATA"]), cpus=work.processes, port=0)
    with cluster, Client(cluster.url, cluster.tokens["user"]) as client:
        await_loaded(client, work)
        work.ready()
        work.done(run(client, work.texts))


if __name__ == "__main__":
    do(main)
