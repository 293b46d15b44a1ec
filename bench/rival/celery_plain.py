"""Celery as it is usually written: a group of sub-tasks per task, batches of 32 as they come, a chord that merges.

A sub-task is a task and 256 rows; answers travel as JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import trunk
from celery import Celery, chord, signals
from work import Work, do

ROWS = 256

app = Celery("celery_plain", broker=os.environ.get("RIVAL_REDIS"), backend=os.environ.get("RIVAL_REDIS"))
# Loading a model takes longer than the four seconds that Celery gives to a process.
app.conf.worker_proc_alive_timeout = 120


@signals.worker_process_init.connect
def load(**_: Any) -> None:
    trunk.loaded()


@app.task
def answer(task: str, first_row: int, texts: list[str]) -> dict[str, Any]:
    found = trunk.loaded().one_task(task, texts)
    return {"first_row": first_row, "answers": {name: values.tolist() for name, values in found.items()}}


@app.task
def merge(found: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = [{} for _ in range(rows)]
    for part in found:
        for name, values in part["answers"].items():
            for row, value in enumerate(values, part["first_row"]):
                merged[row][name] = value
    return merged


def run(texts: list[str]) -> trunk.Answers:
    subtasks = [
        answer.s(task, lo, texts[lo : lo + ROWS]) for task in trunk.TASKS for lo in range(0, len(texts), ROWS)
    ]
    rows = chord(subtasks)(merge.s(len(texts))).get()
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def main(work: Work) -> None:
    command = [sys.executable, "-m", "celery", "-A", "celery_plain", "worker", "-l", "WARNING"]
    worker = subprocess.Popen(
        [*command, "-c", str(work.processes)], stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    try:
        work.await_loaded(worker)
        run(work.warm_up)
        work.ready()
        work.done(run(work.texts))
    finally:
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    do(main)
