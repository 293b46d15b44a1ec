"""An encoder and any number of heads in one pass: one forward, one pooled vector, one product with all heads.

Takes sentence-transformers and transformers folders. A head sits on the un-normalised pooled vector
(workers/engines/heads.py); ``Embed`` asks for the vector itself. Pooling and heads are computed in fp32 whatever format
the trunk runs in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.answers import logits_column, vector_answer
from workers.engines.heads import FUSED, Fused, Head, read_head
from workers.engines.newest import Newest
from workers.engines.proof import beside_others
from workers.engines.trunk import (
    Tokens,
    free_cache,
    load_reader,
    padded,
    pool,
    torch_errors,
)


@dataclass(slots=True)
class Encoder:
    """A loaded encoder with its heads."""

    manifest: Manifest
    device: str
    model: Any
    tokens: Tokens
    #: Manifest digest -> head, fp32 on the device.
    heads: dict[str, Head] = field(default_factory=dict)
    #: Digests of a pass' heads -> all of them as one.
    fused: Newest[tuple[str, ...], Fused] = field(default_factory=lambda: Newest(FUSED))


class EncoderEngine:
    """Answers classify, number and embed. ``Provable``."""

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Encoder:
        if model.pooling not in ("mean", "cls"):
            raise CannotLoad(f"pooling {model.pooling!r} is neither mean nor cls")
        # A pooler's own weights are often absent; its answer is not read here.
        trunk, tokens = load_reader(
            "AutoModel", model, files, device=device, in_format=in_format, may_miss=("pooler.",)
        )
        width = getattr(trunk.config, "hidden_size", 0)
        if width != model.dim:
            raise CannotLoad(f"its vectors have {width} numbers; the manifest says {model.dim}")
        handle = Encoder(model, device, trunk, tokens)
        self._pooled(handle, [Prepared(0, 1, False, np.zeros(1, np.int32))])  # warm up
        return handle

    def attach(self, handle: Encoder, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if not task.manifest.trunk_model or task.manifest.digest in handle.heads:
            return
        head = read_head(task.manifest, files, handle.manifest.dim)
        with torch_errors():
            handle.heads[task.manifest.digest] = head.to(handle.device)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        tokens: Tokens = pass_.handle.tokens
        return tokens.prepare(texts, pass_.max_tokens)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        handle: Encoder = pass_.handle
        heads = [t for t in pass_.tasks if t.manifest.trunk_model]
        vectors = [t for t in pass_.tasks if not t.manifest.trunk_model]
        pooled = self._pooled(handle, batch)
        with torch_errors(), torch.inference_mode():
            # One way back from the device for everything.
            parts = self._fused(handle, heads)(pooled) if heads else []
            parts += [pooled] if vectors else []
            answers = torch.cat(parts, 1).cpu().numpy()
        columns = {}
        lo = 0
        for task in heads:
            hi = lo + len(handle.heads[task.manifest.digest].bias)
            columns[task.name] = logits_column(task, answers[:, lo:hi])
            lo = hi
        for task in vectors:
            columns[task.name] = vector_answer(task, answers[:, lo:])
        return columns

    def unload(self, handle: Encoder) -> None:
        handle.model = None
        handle.heads.clear()
        handle.fused.clear()
        free_cache(handle.device)

    def among_others(self, handle: Encoder, texts: Sequence[str]) -> float:
        """``Provable``: of the pooled vectors."""
        return beside_others(lambda batch: self._pooled(handle, batch), handle.tokens, texts)

    def _pooled(self, handle: Encoder, batch: Sequence[Prepared]) -> torch.Tensor:
        """One forward pass: (n, dim) fp32 on the device."""
        with torch_errors(), torch.inference_mode():
            ids, mask = padded(batch, handle.tokens.pad, handle.device)
            hidden = handle.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return pool(hidden, mask, handle.manifest.pooling)

    def _fused(self, handle: Encoder, heads: Sequence[TaskOrder]) -> Fused:
        key = tuple(task.manifest.digest for task in heads)
        if (known := handle.fused.get(key)) is None:
            known = Fused([handle.heads[digest] for digest in key])
            handle.fused.put(key, known)
        return known
