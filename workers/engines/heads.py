"""Heads on one pooled vector: small layers of several tasks, read from their files and computed in one product.

A head is a linear layer on the un-normalised pooled vector (``head.safetensors``: ``weight`` (labels, dim), ``bias``
(labels)), or on a hidden layer of it (``hidden.weight`` (units, dim), ``hidden.bias`` (units), GELU; then ``weight`` is
(labels, units)). They are computed in fp32 whatever format their trunk runs in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import gelu

from motet.protocol.manifest import Manifest
from workers.engine import CannotLoad

#: Sets of heads whose weights are kept beside each other: each takes as much memory as its heads.
FUSED = 64


@dataclass(frozen=True, slots=True)
class Head:
    """(outputs, dim or units) and (outputs,); with a hidden layer also (units, dim) and (units,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: str) -> Head:
        hidden = None if self.hidden is None else (self.hidden[0].to(device), self.hidden[1].to(device))
        return Head(self.weight.to(device), self.bias.to(device), hidden)


class Fused:
    """Several heads: one product for the linear ones and all hidden layers, and one more for each hidden layer."""

    def __init__(self, heads: Sequence[Head]) -> None:
        firsts = [head.hidden or (head.weight, head.bias) for head in heads]
        self._heads = heads
        self._widths = [len(bias) for _, bias in firsts]
        self._weight = torch.cat([weight for weight, _ in firsts]).T.contiguous()
        self._bias = torch.cat([bias for _, bias in firsts])

    def __call__(self, pooled: torch.Tensor) -> list[torch.Tensor]:
        """(n, outputs) of each head."""
        firsts = torch.split(torch.addmm(self._bias, pooled, self._weight), self._widths, dim=1)
        return [
            first if head.hidden is None else torch.addmm(head.bias, gelu(first), head.weight.T)
            for head, first in zip(self._heads, firsts, strict=True)
        ]


def read_head(manifest: Manifest, files: Mapping[str, Path], dim: int) -> Head:
    """A head in fp32, checked against its manifest. Raises CannotLoad."""
    from safetensors.torch import load_file

    try:
        found = {name: tensor.float() for name, tensor in load_file(files["head.safetensors"]).items()}
        hidden = (found["hidden.weight"], found["hidden.bias"]) if "hidden.weight" in found else None
        head = Head(found["weight"], found["bias"], hidden)
    except Exception as error:
        raise CannotLoad(
            f"head {manifest.ref}: head.safetensors cannot be read: {type(error).__name__}"
        ) from error
    outputs = 1 if manifest.answers == "number" else len(manifest.labels)
    if hidden is not None:
        units = len(hidden[1]) if hidden[1].ndim == 1 else -1
        _check_shape(manifest, "hidden layer", *hidden, (units, dim))
        dim = units
    _check_shape(manifest, "weight", head.weight, head.bias, (outputs, dim))
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise CannotLoad(f"head {manifest.ref}: its weights hold NaN or infinity")
    return head


def _check_shape(
    manifest: Manifest, name: str, weight: torch.Tensor, bias: torch.Tensor, shape: tuple[int, int]
) -> None:
    if tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
        raise CannotLoad(
            f"head {manifest.ref}: {name} {tuple(weight.shape)}, bias {tuple(bias.shape)}; expected {shape}"
        )
