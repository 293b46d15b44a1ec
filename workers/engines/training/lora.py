"""Low-rank changes of a trunk's linear layers (Hu et al., LoRA, ICLR 2022), which are merged into it at the end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen linear layer and what is learned beside it: W x + B (A x) * 2, where B begins at zero."""

    def __init__(self, frozen: nn.Linear, rank: int, dice: torch.Generator) -> None:
        super().__init__()
        self.frozen = frozen
        rank = min(rank, *frozen.weight.shape)
        down = torch.randn(rank, frozen.in_features, generator=dice) / math.sqrt(frozen.in_features)
        self.down = nn.Parameter(down.to(frozen.weight.device))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank, device=frozen.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + 2.0 * (x @ self.down.T @ self.up.T)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One layer that computes the same."""
        self.frozen.weight += 2.0 * (self.up @ self.down).to(self.frozen.weight.dtype)
        return self.frozen


def put_in(trunk: nn.Module, rank: int, seed: int) -> None:
    """Replace every linear layer of the trunk but the pooler, and freeze all the rest."""
    trunk.requires_grad_(False)
    dice = torch.Generator().manual_seed(seed)
    for parent, name, layer in _layers(trunk, nn.Linear):
        setattr(parent, name, LowRank(layer, rank, dice))


def merge(trunk: nn.Module) -> None:
    """Make plain layers of them again."""
    for parent, name, layer in _layers(trunk, LowRank):
        setattr(parent, name, layer.merged())


def _layers(trunk: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """The layers of a kind with their parents and names, but for the pooler's."""
    return [
        (parent, name, child)
        for path, parent in trunk.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, kind) and "pooler" not in f"{path}.{name}"
    ]
