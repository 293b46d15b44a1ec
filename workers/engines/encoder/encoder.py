"""An encoder and any number of heads in one pass: one forward, one pooled vector, one product with all heads.

A row may bring several texts: each is one forward, and a head on several of them reads their vectors side by side, and
the numbers beside them (row_inputs.py).

Takes sentence-transformers and transformers folders. A head sits on the un-normalised pooled vector
(workers/engines/heads.py); ``Embed`` asks for the vector itself. Pooling and heads are computed in fp32 whatever format
the trunk runs in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import PLACES, CannotLoad, Pass, Prepared
from workers.engines.answers import logits_column, vector_answer
from workers.engines.encoder.prepacked import PrepackedEncoder, can_prepack
from workers.engines.encoder.row_inputs import (
    RowInputs,
    flaw_of,
    numbers_of,
    prepare_several,
    reads_more,
    with_marks,
)
from workers.engines.heads import FUSED, Fused, Head, fused, read_head, standardised
from workers.engines.newest import Newest
from workers.engines.packed import resident_bytes
from workers.engines.proof import beside_others
from workers.engines.trunk import (
    Tokens,
    cpu_computes,
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
    #: Token ids and mask -> token vectors, as ``PrepackedEncoder`` has it.
    hidden: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    #: Bytes of its weights and buffers.
    bytes: int
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
        held = resident_bytes(trunk)
        prepacks = device == "cpu" and cpu_computes(in_format) and can_prepack(trunk)
        hidden = PrepackedEncoder(trunk) if prepacks else partial(_last_hidden, trunk)
        handle = Encoder(model, device, trunk, tokens, hidden, held)
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
        if reads_more(pass_):
            return prepare_several(tokens, pass_, texts)
        return tokens.prepare(texts, pass_.max_tokens)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        if isinstance(batch[0].inputs, RowInputs):
            return self._run_several(pass_, batch)
        handle: Encoder = pass_.handle
        heads = [t for t in pass_.tasks if t.manifest.trunk_model]
        vectors = [t for t in pass_.tasks if not t.manifest.trunk_model]
        pooled = self._pooled(handle, batch)
        with torch_errors(), torch.inference_mode():
            # One way back from the device for everything.
            parts = fused(heads, handle.heads, handle.fused)(pooled) if heads else []
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

    def _run_several(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        """Of rows that bring several texts, or numbers beside one."""
        handle: Encoder = pass_.handle
        rows: list[RowInputs] = [row.inputs for row in batch]
        vectors = [self._vectors(handle, texts) for texts in zip(*(row.texts for row in rows), strict=True)]
        parts = []
        with torch_errors(), torch.inference_mode():
            for task in pass_.tasks:
                read = [vectors[place] for place in task.spec.get(PLACES, (0,))]
                if not task.manifest.trunk_model:
                    parts.append(read[0])
                    continue
                head = handle.heads[task.manifest.digest]
                if head.numbers is not None:
                    said = numbers_of(rows, task.name, len(head.numbers[0]))
                    read.append(standardised(said, *head.numbers).to(handle.device))
                features = torch.cat(read, 1)
                # What cannot be read is no number in any output, and its cell an error.
                features[[i for i, row in enumerate(rows) if flaw_of(row, task)]] = torch.nan
                parts.append(head(features))
            answers = torch.cat(parts, 1).cpu().numpy()
        columns = {}
        lo = 0
        for task, part in zip(pass_.tasks, parts, strict=True):
            mine = answers[:, lo : lo + part.shape[1]]
            lo += part.shape[1]
            made = logits_column(task, mine) if task.manifest.trunk_model else vector_answer(task, mine)
            columns[task.name] = with_marks(made, rows, task)
        return columns

    def _vectors(self, handle: Encoder, texts: Sequence[Prepared | CellError]) -> torch.Tensor:
        """(n, dim) fp32 of one text of each row, NaN where it cannot be read."""
        good = [i for i, text in enumerate(texts) if isinstance(text, Prepared)]
        found = torch.full((len(texts), handle.manifest.dim), torch.nan, device=handle.device)
        if good:
            pooled = self._pooled(handle, [text for text in texts if isinstance(text, Prepared)])
            found[torch.tensor(good, device=handle.device)] = pooled
        return found

    def unload(self, handle: Encoder) -> None:
        handle.model, handle.hidden = None, _gone
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
            return pool(handle.hidden(ids, mask), mask, handle.manifest.pooling)


def _last_hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return found


def _gone(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    raise AssertionError("the model was unloaded")
