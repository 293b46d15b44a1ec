"""Heads on one pooled vector: small layers of several tasks, read from their files and computed in one product.

A head is a linear layer on the un-normalised pooled vector (``head.safetensors``: ``weight`` (labels, dim), ``bias``
(labels)), or on a hidden layer of it (``hidden.weight`` (units, dim), ``hidden.bias`` (units), GELU; then ``weight`` is
(labels, units)). They are computed in fp32 whatever format their trunk runs in. A head on several texts reads their
vectors side by side, and numbers beside them as ``standardised`` makes them features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import gelu

from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad
from workers.engines.newest import Newest

#: Sets of heads whose weights are kept beside each other: each takes as much memory as its heads.
FUSED = 64
#: Tensors in the file of a head that reads numbers: of each number, what to subtract and then to multiply by.
NUMBERS_CENTER, NUMBERS_SCALE = "numbers.center", "numbers.scale"


@dataclass(frozen=True, slots=True)
class Head:
    """(outputs, dim or units) and (outputs,); with a hidden layer also (units, dim) and (units,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor] | None = None
    #: Of each number that it reads, what to subtract and then to multiply by, on the CPU; None: it reads none.
    numbers: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: str) -> Head:
        hidden = None if self.hidden is None else (self.hidden[0].to(device), self.hidden[1].to(device))
        return Head(self.weight.to(device), self.bias.to(device), hidden, self.numbers)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(n, outputs), alone."""
        if self.hidden is not None:
            features = gelu(torch.addmm(self.hidden[1], features, self.hidden[0].T))
        return torch.addmm(self.bias, features, self.weight.T)


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


def fused(
    tasks: Sequence[TaskOrder], heads: Mapping[str, Head], known: Newest[tuple[str, ...], Fused]
) -> Fused:
    """The heads of these tasks as one. ``heads``: by the digest of their manifest; ``known``: sets that were fused before."""
    key = tuple(task.manifest.digest for task in tasks)
    if (found := known.get(key)) is None:
        found = Fused([heads[digest] for digest in key])
        known.put(key, found)
    return found


def read_head(manifest: Manifest, files: Mapping[str, Path], dim: int) -> Head:
    """A head in fp32, checked against its manifest. ``dim``: of one text's vector. Raises CannotLoad."""
    from safetensors.torch import load_file

    try:
        # Numbers are as exact as rows hold them: of large ones fp32 would keep less than their deviation.
        found = {
            name: tensor.double() if name in (NUMBERS_CENTER, NUMBERS_SCALE) else tensor.float()
            for name, tensor in load_file(files["head.safetensors"]).items()
        }
        hidden = (found["hidden.weight"], found["hidden.bias"]) if "hidden.weight" in found else None
        beside = (found[NUMBERS_CENTER], found[NUMBERS_SCALE]) if manifest.numbers else None
        head = Head(found["weight"], found["bias"], hidden, beside)
    except Exception as error:
        raise CannotLoad(
            f"head {manifest.ref}: head.safetensors cannot be read: {type(error).__name__}"
        ) from error
    outputs = 1 if manifest.answers == "number" else len(manifest.labels)
    n = len(manifest.numbers)
    if beside is not None and any(tuple(tensor.shape) != (n,) for tensor in beside):
        raise CannotLoad(f"head {manifest.ref}: it knows other numbers than the {n} of its manifest")
    dim = features_of(dim, max(1, len(manifest.inputs)), n)
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


def standardised(numbers: torch.Tensor, center: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Features of numbers (n, numbers), fp32: each as deviations from its mean, and whether it is missing, side by side.

    A missing number is its mean.
    """
    missing = numbers.isnan()
    z = ((numbers.double() - center.double()) * scale.double()).masked_fill(missing, 0.0)
    return torch.cat([z, missing.double()], 1).float()


def features_of(dim: int, texts: int, numbers: int) -> int:
    """Features of a head on so many texts and numbers."""
    return dim * texts + 2 * numbers
