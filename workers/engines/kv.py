"""Keys and values of all rows in flight, and attention over them: what a language model remembers.

The pool has a slot for each row; a slot has a cell for each token of the row's prompts, which its tasks share, and of
their answers, as they are written. So what tasks have in common is stored and read once (Juravsky et al., Hydragen,
2024), and a step runs the tokens of all rows through the model in one go, those of beginnings and those that are
written alike; only attention tells them apart. It is registered with transformers under ``ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

Bools = NDArray[np.bool_]

#: Name of this attention in a model's configuration.
ATTENTION = "motet"
#: Cells of a slot are given in steps of this.
STEP = 64
#: Tokens of a prompt that attend together: more would look at more of what stands behind them, and is masked.
TOGETHER = 128


class Pool:
    """Slots of equal length in the device's memory: keys and values of every layer, as [slots, cells, heads, width]."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str) -> None:
        """``shapes``: of each layer, its key-value heads and the widths of a key and of a value."""
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self.slots = self.cells = 0
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def lay_out(self, slots: int, cells: int, keep: Sequence[int] = ()) -> None:
        """Make it so many slots of so many cells; slots ``keep`` become the first ones, in that order.

        Raises what torch raises where memory is short; then it is as it was.
        """
        if (slots, cells) == (self.slots, self.cells) and not keep:
            return
        kept = torch.tensor(list(keep), dtype=torch.long, device=self._device)
        common = min(cells, self.cells)
        fresh = []
        for number, (heads, *widths) in enumerate(self._shapes):
            pair = []
            for which, width in enumerate(widths):
                # Not empty: what nobody attends to is multiplied by zero, which a NaN would survive.
                made = torch.zeros(slots, cells, heads, width, dtype=self._dtype, device=self._device)
                if keep:
                    made[: len(keep), :common] = self.layers[number][which][kept, :common]
                pair.append(made)
            fresh.append((pair[0], pair[1]))
        self.layers, self.slots, self.cells = fresh, slots, cells

    def read(self, slot: int, cells: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A copy of these cells of a slot."""
        return [(keys[slot, cells], values[slot, cells]) for keys, values in self.layers]

    def write(
        self, slot: int, cells: torch.Tensor, kept: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Put back what ``read`` gave, into the same number of cells."""
        for (keys, values), (k, v) in zip(self.layers, kept, strict=True):
            keys[slot, cells] = k
            values[slot, cells] = v


@dataclass(frozen=True, slots=True)
class Beginning:
    """Tokens [lo, hi) of a step that are part of one row's prompts: at most ``TOGETHER``."""

    lo: int
    hi: int
    slot: int
    #: ``additive`` of what each of them attends to; and the same within a sliding window, where layers have one.
    seen: torch.Tensor
    near: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Writing:
    """The newest tokens of all answers that are being written, for slots 0, 1, … up to the last one that writes."""

    #: (slots, answers): where in the step each token stands; where there is none, any token stands for it.
    tokens: torch.Tensor
    #: ``additive`` of what each of them attends to, and that within a sliding window.
    seen: torch.Tensor
    near: torch.Tensor | None
    #: The tokens that are there, and where in (slots x answers) each one is.
    places: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class Flight:
    """One step: where its tokens go, and what attends to what."""

    pool: Pool
    #: Of each token its slot, and its cell.
    slots: torch.Tensor
    cells: torch.Tensor
    beginnings: Sequence[Beginning]
    writing: Writing | None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flight: Flight,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it: query, key, value as [1, heads, tokens, width]."""
    keys, values = flight.pool.layers[int(module.layer_idx)]  # type: ignore[arg-type]
    keys[flight.slots, flight.cells] = key[0].transpose(0, 1)
    values[flight.slots, flight.cells] = value[0].transpose(0, 1)
    answer = query.new_empty(query.shape[2], query.shape[1], values.shape[3])
    for b in flight.beginnings:
        mask = b.near if sliding_window and b.near is not None else b.seen
        k, v = (x[b.slot : b.slot + 1, : mask.shape[-1]].transpose(1, 2) for x in (keys, values))
        found = _grouped(query[:, :, b.lo : b.hi], k, v, mask, scaling)
        answer[b.lo : b.hi] = found[0].transpose(0, 1)
    if (w := flight.writing) is not None:
        mask = w.near if sliding_window and w.near is not None else w.seen
        rows, answers = w.tokens.shape
        k, v = (x[:rows, : mask.shape[-1]].transpose(1, 2) for x in (keys, values))
        asked = query[0].transpose(0, 1)[w.tokens].transpose(1, 2)
        found = _grouped(asked, k, v, mask, scaling)
        answer[w.places] = found.transpose(1, 2).reshape(rows * answers, *answer.shape[1:])[w.targets]
    return answer[None], None


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention where several query heads share a key head: they are queries of one head, so keys are read once.

    query [rows, heads, tokens, width], key and value [rows, key heads, cells, width], mask as ``additive`` makes it.
    """
    rows, heads, tokens, width = query.shape
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1] * tokens, width)
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, heads, tokens, -1)


def additive(seen: Bools, groups: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What is attended to, (rows, tokens, cells), as a mask for ``groups`` query heads to a key head: added to scores.

    Made once for a step: each layer would have to turn a mask of truth values into this one.
    """
    mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32("-inf"))).to(device, dtype)
    return mask[:, None].repeat(1, 1, groups, 1)


def register() -> None:
    """Make this attention known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
