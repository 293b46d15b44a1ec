"""Celery written by hand for speed: all heads in one pass, rows sorted by length, sub-tasks of like cost, a token budget.

The chord's body merges, and keeps the rows in Postgres if that is asked for; arrays travel as they are (pickle).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import psycopg
import table
import trunk
from celery import Celery, chord, signals
from work import Work, do

app = Celery("celery_best", broker=os.environ.get("RIVAL_REDIS"), backend=os.environ.get("RIVAL_REDIS"))
app.conf.update(
    task_serializer="pickle",
    result_serializer="pickle",
    accept_content=["pickle"],
    # The next sub-task goes to whoever is free, not to whoever reserved it.
    worker_prefetch_multiplier=1,
    worker_send_task_events=False,
    # Loading a model takes longer than the four seconds that Celery gives to a process.
    worker_proc_alive_timeout=120,
)


@signals.worker_process_init.connect
def load(**_: Any) -> None:
    trunk.loaded()


@app.task
def answer(rows: list[int], texts: list[str]) -> tuple[list[int], trunk.Answers]:
    return rows, trunk.loaded().all_tasks(texts)


@app.task
def merge(found: list[tuple[list[int], trunk.Answers]], rows: int, postgres: str) -> trunk.Answers:
    merged = trunk.merge(rows, found)
    if postgres:
        with psycopg.connect(postgres) as connection:
            table.create(connection)
            table.store(connection, trunk.loaded().heads, range(rows), merged)
    return merged


def run(texts: list[str], postgres: str) -> trunk.Answers:
    subtasks = [answer.s(rows, [texts[row] for row in rows]) for rows in trunk.parts(texts)]
    return chord(subtasks)(merge.s(len(texts), postgres)).get(interval=0.01)


def main(work: Work) -> None:
    command = [sys.executable, "-m", "celery", "-A", "celery_best", "worker", "-l", "WARNING", "-O", "fair"]
    command += ["-c", str(work.processes), "--without-gossip", "--without-mingle", "--without-heartbeat"]
    worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    postgres = work.postgres if work.store else ""
    try:
        work.await_loaded(worker)
        run(work.warm_up, postgres)
        work.ready()
        work.done(run(work.texts, postgres))
    finally:
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    do(main)
