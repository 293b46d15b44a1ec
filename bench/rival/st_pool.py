"""sentence-transformers: one `encode` over its pool of processes, which sorts by length itself; the heads afterwards."""

from __future__ import annotations

import os
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from trunk import MAX_TOKENS, Answers, heads, read_all, say_loaded
from work import Work, do


class Told(SentenceTransformer):
    """Its processes tell the clock when they have their model; all else is as it comes."""

    @classmethod
    def _multi_process_worker(cls, *arguments: Any) -> None:
        say_loaded()
        super()._multi_process_worker(*arguments)


def main(work: Work) -> None:
    whole = SentenceTransformer(os.environ["RIVAL_MODEL"], device="cpu")
    # The heads sit on the pooled vector as it is, before it is brought to length one.
    model = Told(modules=[whole[0], whole[1]], device="cpu")
    model.max_seq_length = MAX_TOKENS
    trained = heads()
    weight = torch.cat([head.weight for head in trained.values()]).T
    bias = torch.cat([head.bias for head in trained.values()])
    pool = model.start_multi_process_pool(["cpu"] * work.processes)

    def run(texts: list[str], rows_each: int | None = None) -> Answers:
        pooled = torch.from_numpy(model.encode(texts, pool=pool, chunk_size=rows_each))
        return read_all(trained, torch.addmm(bias, pooled, weight), pooled)

    try:
        work.await_loaded()
        run(work.warm_up, rows_each=8)
        work.ready()
        work.done(run(work.texts))
    finally:
        model.stop_multi_process_pool(pool)


if __name__ == "__main__":
    do(main)
