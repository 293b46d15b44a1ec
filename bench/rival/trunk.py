"""The trunk and its heads in plain torch and transformers: what every rival computes with, in whatever process.

Nothing of motet is in here. Answers are numpy arrays by name: for a single-label task its codes and scores, for a
multi-label one which labels reach their threshold and all scores, and the embedding, fp16 and of length one.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

Answers = dict[str, NDArray]

#: Task -> its head; ``vector``, the fourth task, needs none.
HEADS = {"topic": "news-topics", "sentiment": "review-sentiment", "tone": "tone"}
TASKS = (*HEADS, "vector")
#: Tokens of a row that are read.
MAX_TOKENS = 256
#: Padded tokens of a micro-batch: the fastest on one core, where 512 to 2,048 hardly differ.
BUDGET_TOKENS = 1024
#: A longer text costs no more: it is cut. For whoever sorts and cuts by characters.
MOST_CHARS = 1200

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Head:
    """A linear layer on the pooled vector, with the names of what it tells apart."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "head.json").read_text("utf-8"))
        weights = load_file(folder / "head.safetensors")
        self.labels: list[str] = about["labels"]
        self.thresholds = np.array(about["thresholds"], np.float32) if about["head"] == "multi" else None
        self.weight, self.bias = weights["weight"], weights["bias"]


class Trunk:
    """One copy of the model, for one process with one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        folder = os.environ["RIVAL_MODEL"]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.heads = heads()
        self.weight = torch.cat([head.weight for head in self.heads.values()]).T.contiguous()
        self.bias = torch.cat([head.bias for head in self.heads.values()])
        self.all_tasks(["a few words", "some more words to warm up with"] * 4)
        say_loaded()

    def one_task(self, task: str, texts: Sequence[str], batch: int = 32) -> Answers:
        """One task in a pass of its own, in batches as they come, each padded to its longest row."""
        found = []
        for lo in range(0, len(texts), batch):
            tokens = self.tokenizer(
                list(texts[lo : lo + batch]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            pooled = self._pooled(tokens["input_ids"], tokens["attention_mask"])
            found.append(read_vector(pooled) if task == "vector" else self._read(task, pooled))
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def all_tasks(self, texts: Sequence[str], budget: int = BUDGET_TOKENS) -> Answers:
        """All tasks in one pass: rows sorted by length, longest first, in batches of so many padded tokens."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        pooled = torch.empty(len(ids), self.model.config.hidden_size)
        while order:
            longest = len(ids[order[0]])
            rows, order = order[: max(1, budget // longest)], order[max(1, budget // longest) :]
            padded = np.zeros((len(rows), longest), np.int64)
            mask = np.zeros_like(padded)
            for i, row in enumerate(rows):
                padded[i, : len(ids[row])] = ids[row]
                mask[i, : len(ids[row])] = 1
            pooled[rows] = self._pooled(torch.from_numpy(padded), torch.from_numpy(mask))
        return read_all(self.heads, torch.addmm(self.bias, pooled, self.weight), pooled)

    def _pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean of the last layer over the real tokens: (n, 384)."""
        with torch.inference_mode():
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def _read(self, task: str, pooled: torch.Tensor) -> Answers:
        head = self.heads[task]
        return read_head(task, head, torch.addmm(head.bias, pooled, head.weight.T))


@functools.cache
def loaded() -> Trunk:
    """The trunk of this process, loaded when it is first asked for."""
    return Trunk()


def heads() -> dict[str, Head]:
    """The heads by task."""
    return {task: Head(Path(os.environ["RIVAL_HEADS"]) / name) for task, name in HEADS.items()}


def read_all(heads: Mapping[str, Head], logits: torch.Tensor, pooled: torch.Tensor) -> Answers:
    """What all heads' logits, side by side, and the pooled vectors say."""
    found = read_vector(pooled)
    lo = 0
    for task, head in heads.items():
        found |= read_head(task, head, logits[:, lo : lo + len(head.labels)])
        lo += len(head.labels)
    return found


def read_head(task: str, head: Head, logits: torch.Tensor) -> Answers:
    if head.thresholds is not None:
        scores = torch.sigmoid(logits).numpy()
        return {task: scores >= head.thresholds, f"{task}_score": scores}
    best = torch.softmax(logits, 1).max(1)
    return {task: best.indices.numpy().astype(np.int16), f"{task}_score": best.values.numpy()}


def read_vector(pooled: torch.Tensor) -> Answers:
    return {"vector": torch.nn.functional.normalize(pooled).numpy().astype(np.float16)}


def longest_first(texts: Sequence[str]) -> list[int]:
    """The rows in the order of their length, by characters: nobody has tokenised them yet."""
    return sorted(range(len(texts)), key=lambda row: -len(texts[row]))


def parts(texts: Sequence[str], chars: int = 16_000) -> Iterator[list[int]]:
    """Rows, longest first, in parts of about the same cost: some tenths of a second, so that all end together."""
    part: list[int] = []
    size = 0
    for row in longest_first(texts):
        part.append(row)
        size += min(len(texts[row]), MOST_CHARS)
        if size >= chars:
            yield part
            part, size = [], 0
    if part:
        yield part


def merge(rows: int, found: Sequence[tuple[Sequence[int], Answers]]) -> Answers:
    """Parts of rows with their answers, whatever their order, as one array of all rows by name."""
    merged: Answers = {}
    for part, answers in found:
        for name, values in answers.items():
            if name not in merged:
                merged[name] = np.zeros((rows, *values.shape[1:]), values.dtype)
            merged[name][part] = values
    return merged


def say_loaded() -> None:
    """For the clock: when this process had its model."""
    Path(os.environ["RIVAL_OUT"], f"loaded-{os.getpid()}").write_text(str(time.monotonic()), "ascii")
