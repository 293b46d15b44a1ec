"""The hand-written loop: two processes, rows sorted by length, a token budget, all heads in one pass.

What it has found stays in memory, or goes into Postgres part by part.
"""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext

import psycopg
import table
from trunk import Answers, heads, loaded, merge, parts
from work import Work, do


def load() -> None:
    loaded()


def answer(part: tuple[list[int], list[str]]) -> tuple[list[int], Answers]:
    rows, texts = part
    return rows, loaded().all_tasks(texts)


def main(work: Work) -> None:
    labels = heads()
    with (
        multiprocessing.get_context("fork").Pool(work.processes, initializer=load) as pool,
        psycopg.connect(work.postgres) if work.store else nullcontext() as postgres,
    ):
        if postgres:
            table.create(postgres)
        work.await_loaded()

        def run(texts: list[str]) -> Answers:
            found = []
            for rows, answers in pool.imap_unordered(
                answer, [(p, [texts[i] for i in p]) for p in parts(texts)]
            ):
                if postgres:
                    table.store(postgres, labels, rows, answers)
                found.append((rows, answers))
            return merge(len(texts), found)

        run(work.warm_up)
        if postgres:
            table.create(postgres)
        work.ready()
        work.done(run(work.texts))


if __name__ == "__main__":
    do(main)
