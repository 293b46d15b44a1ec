"""An encoder and any number of heads in one pass: one forward, one pooled vector, one product with all heads.

Takes sentence-transformers and transformers folders. A head is a linear layer on the un-normalised pooled vector
(``head.safetensors``: ``weight`` (labels, dim), ``bias`` (labels)); ``Embed`` asks for the vector itself. Pooling
and heads are computed in fp32 whatever format the trunk runs in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.columns import CellError, Column
from motet.manifest import Manifest
from motet.wire import TaskOrder
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.answers import Floats, logits_column, vector_column
from workers.engines.trunk import Tokens, load_transformer, padded, torch_errors


@dataclass(slots=True)
class Encoder:
    """A loaded encoder with its heads."""

    manifest: Manifest
    device: str
    model: Any
    tokens: Tokens
    #: Manifest digest -> (weight, bias), fp32 on the device.
    heads: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    #: Digests of a pass' heads -> their weights as one matrix (dim, all labels), and one bias.
    fused: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class EncoderEngine:
    """Answers classify, number and embed."""

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Encoder:
        if model.pooling not in ("mean", "cls"):
            raise CannotLoad(f"pooling {model.pooling!r} is neither mean nor cls")
        # A pooler's own weights are often absent; its answer is not read here.
        trunk = load_transformer(
            "AutoModel", files, device=device, in_format=in_format, may_miss=("pooler.",)
        )
        width = getattr(trunk.config, "hidden_size", 0)
        if width != model.dim:
            raise CannotLoad(f"its vectors have {width} numbers; the manifest says {model.dim}")
        handle = Encoder(model, device, trunk, Tokens(files["tokenizer.json"], model.max_tokens))
        self._pooled(handle, [Prepared(0, 1, False, np.zeros(1, np.int32))])  # warm up
        return handle

    def attach(self, handle: Encoder, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if not task.manifest.trunk_model or task.manifest.digest in handle.heads:
            return
        weight, bias = _read_head(task.manifest, files, handle.manifest.dim)
        with torch_errors():
            handle.heads[task.manifest.digest] = (weight.to(handle.device), bias.to(handle.device))

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        tokens: Tokens = pass_.handle.tokens
        return tokens.prepare(texts, pass_.max_tokens)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        handle: Encoder = pass_.handle
        heads = [t for t in pass_.tasks if t.manifest.trunk_model]
        vectors = [t for t in pass_.tasks if not t.manifest.trunk_model]
        pooled = self._pooled(handle, batch)
        with torch_errors(), torch.inference_mode():
            weight, bias = self._fused(handle, heads)
            # One product for all heads, and one way back from the device for everything.
            parts = [torch.addmm(bias, pooled, weight)] if heads else []
            parts += [pooled] if vectors else []
            answers = torch.cat(parts, 1).cpu().numpy()
        columns = {}
        lo = 0
        for task in heads:
            hi = lo + len(handle.heads[task.manifest.digest][1])
            columns[task.name] = logits_column(task, answers[:, lo:hi])
            lo = hi
        for task in vectors:
            columns[task.name] = _vector_column(task, answers[:, lo:])
        return columns

    def unload(self, handle: Encoder) -> None:
        handle.model = None
        handle.heads.clear()
        handle.fused.clear()
        if handle.device != "cpu":
            torch.cuda.empty_cache()

    def _pooled(self, handle: Encoder, batch: Sequence[Prepared]) -> torch.Tensor:
        """One forward pass: (n, dim) fp32 on the device."""
        with torch_errors(), torch.inference_mode():
            ids, mask = padded(batch, handle.tokens.pad, handle.device)
            hidden = handle.model(input_ids=ids, attention_mask=mask).last_hidden_state
            if handle.manifest.pooling == "cls":
                first: torch.Tensor = hidden[:, 0].float()
                return first
            if mask is None:
                mean: torch.Tensor = hidden.mean(1, dtype=torch.float32)
                return mean
            kept = mask.unsqueeze(-1)
            total: torch.Tensor = (hidden * kept.to(hidden.dtype)).sum(1, dtype=torch.float32)
            return total / kept.sum(1)

    def _fused(self, handle: Encoder, heads: Sequence[TaskOrder]) -> tuple[torch.Tensor, torch.Tensor]:
        key = tuple(task.manifest.digest for task in heads)
        if key not in handle.fused:
            weights = [handle.heads[digest][0] for digest in key]
            biases = [handle.heads[digest][1] for digest in key]
            handle.fused[key] = (
                (torch.cat(weights).T.contiguous(), torch.cat(biases))
                if key
                else (torch.empty(0), torch.empty(0))
            )
        return handle.fused[key]


def _vector_column(task: TaskOrder, pooled: Floats) -> Column:
    if task.spec.get("normalize", True):
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    return vector_column(pooled, task.spec.get("dtype", "fp32"))


def _read_head(manifest: Manifest, files: Mapping[str, Path], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A head's weight and bias in fp32, checked against its manifest. Raises CannotLoad."""
    from safetensors.torch import load_file

    try:
        found = load_file(files["head.safetensors"])
        weight, bias = found["weight"].float(), found["bias"].float()
    except Exception as error:
        raise CannotLoad(
            f"head {manifest.ref}: head.safetensors cannot be read: {type(error).__name__}"
        ) from error
    outputs = 1 if manifest.answers == "number" else len(manifest.labels)
    if tuple(weight.shape) != (outputs, dim) or tuple(bias.shape) != (outputs,):
        raise CannotLoad(
            f"head {manifest.ref}: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; expected ({outputs}, {dim})"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise CannotLoad(f"head {manifest.ref}: its weights hold NaN or infinity")
    return weight, bias
