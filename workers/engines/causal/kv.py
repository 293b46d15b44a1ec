"""Keys and values of all rows in flight, and attention over them: what a language model remembers.

The pool has a slot for each row; a slot has a cell for each token of the row's prompts, which its tasks share, and of
their answers, as they are written. So what tasks have in common is stored and read once (Juravsky et al., Hydragen,
2024), and a step runs the tokens of all rows through the model in one go, prefill and decode alike; only attention
tells them apart. It is registered with transformers under ``ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.engine import CannotLoad
from workers.engines.causal.runs import Runs
from workers.engines.causal.trees import Bools
from workers.engines.trunk import onto

#: Name of this attention in a model's configuration.
ATTENTION = "motet"
#: Cells of a slot are given in steps of this.
STEP = 64
#: Tokens of a prompt that attend together: more would look at more of what stands behind them, and is masked.
TOGETHER = 128
#: Keywords of attention that need nothing here: answers beside attention's own, and what is looked at apart.
_WITHOUT_EFFECT = frozenset(
    {"dropout", "is_causal", "output_attentions", "output_router_logits", "position_ids", "use_cache"}
)


class Pool:
    """Slots of equal length in the device's memory: keys and values of every layer, as [slots, cells, heads, width].

    They are parts of one piece of memory for each layer, which stays when slots are laid out anew: on a GPU two pools
    beside each other would need twice the memory.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str) -> None:
        """``shapes``: of each layer, its key-value heads and the widths of a key and of a value."""
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self.slots = self.cells = 0
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        #: Of each layer its whole memory, [tokens, heads, width].
        self._memory: list[list[torch.Tensor]] = []

    @property
    def tokens(self) -> int:
        """Tokens that its memory has room for."""
        return min((len(one) for pair in self._memory for one in pair), default=0)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: keys and values of all layers."""
        numbers = sum(heads * (of_key + of_value) for heads, of_key, of_value in self._shapes)
        return numbers * self._dtype.itemsize

    def lay_out(self, slots: int, cells: int, keep: Sequence[int] = ()) -> None:
        """Make it so many slots of so many cells; slots ``keep`` become the first ones, in that order.

        While slots are kept, memory that they need no more stays with it. Raises what torch raises where memory is
        short; then all is as it was, or nothing is there if none was to be kept.
        """
        if (slots, cells) == (self.slots, self.cells) and not keep:
            return
        if not keep:
            # Nobody needs the old memory beside the new one.
            self.slots = self.cells = 0
            self.layers, self._memory = [], []
        if slots * cells > self.tokens:
            self._grow(slots * cells)
        common = min(cells, self.cells)
        spare = self._spare(len(keep))
        order = torch.tensor(list(keep), dtype=torch.long, device=self._device)
        layers = []
        for number, pair in enumerate(self._memory):
            views = []
            for which, memory in enumerate(pair):
                view = memory[: slots * cells].view(slots, cells, *memory.shape[1:])
                if keep:
                    # By way of a copy: old and new places overlap.
                    held = spare[memory.shape[1:]]
                    torch.index_select(self.layers[number][which], 0, order, out=held)
                    view[: len(keep), :common] = held[:, :common]
                views.append(view)
            layers.append((views[0], views[1]))
        self.layers, self.slots, self.cells = layers, slots, cells

    def shrink(self) -> None:
        """Give back the memory that its slots do not need. Raises what torch raises where memory is short."""
        for number, pair in enumerate(self._memory):
            self._memory[number] = [memory[: self.slots * self.cells].clone() for memory in pair]
            self._see(number)

    def _grow(self, tokens: int) -> None:
        """More memory, layer by layer; each has what it had at any time."""
        if not self._memory:
            self._memory = [
                [self._zeros(tokens, heads, width) for width in widths] for heads, *widths in self._shapes
            ]
            return
        used = self.slots * self.cells
        for number, pair in enumerate(self._memory):
            fresh = [self._zeros(tokens, *memory.shape[1:]) for memory in pair]
            for new, old in zip(fresh, pair, strict=True):
                new[:used] = old[:used]
            self._memory[number] = fresh
            self._see(number)

    def _see(self, number: int) -> None:
        """Let a layer's slots be those of its memory."""
        shape = (self.slots, self.cells)
        keys, values = (m[: self.slots * self.cells].view(*shape, *m.shape[1:]) for m in self._memory[number])
        self.layers[number] = (keys, values)

    def _zeros(self, tokens: int, heads: int, width: int) -> torch.Tensor:
        # Not empty: what nobody attends to is multiplied by zero, which a NaN would survive.
        return torch.zeros(tokens, heads, width, dtype=self._dtype, device=self._device)

    def _spare(self, slots: int) -> dict[torch.Size, torch.Tensor]:
        """Room for so many slots of one layer, by heads and width: asked for before anything is changed."""
        if not slots:
            return {}
        return {
            shape: torch.empty(slots, self.cells, *shape, dtype=self._dtype, device=self._device)
            for shape in {memory.shape[1:] for pair in self._memory for memory in pair}
        }

    def read(self, slot: int, cells: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A copy of these cells of a slot."""
        return [(keys[slot, cells], values[slot, cells]) for keys, values in self.layers]

    def write(
        self, slot: int, cells: torch.Tensor, stored: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Put back what ``read`` gave, into the same number of cells."""
        for (keys, values), (k, v) in zip(self.layers, stored, strict=True):
            keys[slot, cells] = k
            values[slot, cells] = v


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens [lo, hi) of a step that are part of one row's prompts: at most ``TOGETHER``."""

    lo: int
    hi: int
    slot: int
    #: ``additive`` of what each of them attends to; and the same within a sliding window, where layers have one.
    seen: torch.Tensor
    near: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    """The tokens of a decode step of all answers, for slots 0, 1, … up to the last one that writes."""

    #: (slots, answers): where in the step each token stands; where there is none, any token stands for it.
    tokens: torch.Tensor
    #: ``additive`` of what each of them attends to, and that within a sliding window.
    seen: torch.Tensor
    near: torch.Tensor | None
    #: The tokens that are there, and where in (slots x answers) each one is.
    places: torch.Tensor
    targets: torch.Tensor


class UnsupportedByKernel(Exception):
    """This model's attention does something that the kernel of `Runs` does not."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """One step: where its tokens go, and what attends to what."""

    pool: Pool
    #: Of each token its slot, and its cell.
    slots: torch.Tensor
    cells: torch.Tensor
    prefills: Sequence[PrefillSpan]
    decode: DecodeTokens | None
    #: Of each layer the tokens that its sliding window holds; None: it attends to all tokens before.
    windows: Sequence[int | None]
    #: Instead of ``prefills``: parts of prompts for a kernel that takes them at once.
    runs: Runs | None = None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: StepLayout,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it: query, key, value as [1, heads, tokens, width].

    ``s_aux``: of each query head, the score of a sink, which takes its share of attention and gives nothing.
    ``softcap``: scores are pressed below it by tanh. Raises CannotLoad where a layer asks for anything else.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    _check(module, attention_mask, others)
    window = sliding_window or None
    if window not in (None, layout.windows[layer]):
        raise CannotLoad(
            f"layer {layer} attends to a window of {window} tokens; its configuration says {layout.windows[layer]}"
        )
    keys, values = layout.pool.layers[layer]
    keys[layout.slots, layout.cells] = key[0].transpose(0, 1)
    values[layout.slots, layout.cells] = value[0].transpose(0, 1)
    answer = query.new_empty(query.shape[2], query.shape[1], values.shape[3])

    def attended(asked: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _grouped(asked, k, v, mask, scaling, sinks=s_aux, softcap=softcap)

    if (runs := layout.runs) is not None:
        if s_aux is not None or softcap is not None:
            raise UnsupportedByKernel
        answer[runs.tokens] = runs.attend(query[0].transpose(0, 1), keys, values, scaling, window)
    for b in layout.prefills:
        mask = b.seen if window is None or b.near is None else b.near
        k, v = (x[b.slot : b.slot + 1, : mask.shape[-1]].transpose(1, 2) for x in (keys, values))
        found = attended(query[:, :, b.lo : b.hi], k, v, mask)
        answer[b.lo : b.hi] = found[0].transpose(0, 1)
    if (w := layout.decode) is not None:
        mask = w.seen if window is None or w.near is None else w.near
        rows, answers = w.tokens.shape
        k, v = (x[:rows, : mask.shape[-1]].transpose(1, 2) for x in (keys, values))
        asked = query[0].transpose(0, 1)[w.tokens].transpose(1, 2)
        found = attended(asked, k, v, mask)
        answer[w.places] = found.transpose(1, 2).reshape(rows * answers, *answer.shape[1:])[w.targets]
    return answer[None], None


def _check(module: torch.nn.Module, attention_mask: torch.Tensor | None, others: Mapping[str, Any]) -> None:
    """Raise CannotLoad where a layer asks for something that ``attend`` does not do, and would silently leave out."""
    wants = [name for name, value in others.items() if not (name in _WITHOUT_EFFECT or value is None)]
    if attention_mask is not None:
        wants.append("a mask of its own")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        wants.append("attention to later tokens")
    if others.get("dropout"):
        wants.append("dropout")
    if wants:
        raise CannotLoad(f"its attention wants {', '.join(sorted(wants))}, which this engine does not do")


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention where several query heads share a key head: they are queries of one head, so keys are read once.

    query [rows, heads, tokens, width], key and value [rows, key heads, cells, width], mask as ``additive`` makes it.
    """
    rows, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    folded = query.reshape(rows, key_heads, heads // key_heads * tokens, width)
    if sinks is None and softcap is None:
        found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return found.reshape(rows, heads, tokens, -1)
    scores = (folded @ key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores + mask
    if sinks is not None:
        beside = sinks.float().reshape(1, key_heads, -1, 1).repeat_interleave(tokens, 2)
        scores = torch.cat([scores, beside.expand(rows, -1, -1, -1)], -1)
    shares = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (shares @ value).reshape(rows, heads, tokens, -1)


def additive(seen: Bools, groups: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What is attended to, (rows, tokens, cells), as a mask for ``groups`` query heads to a key head: added to scores.

    Made once for a step: each layer would have to turn a mask of truth values into this one.
    """
    if device == "cpu":
        mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32("-inf"))).to(dtype)
    else:
        # A byte a cell travels, and it is widened there.
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask.masked_fill_(~onto(np.ascontiguousarray(seen), device), float("-inf"))
    return mask[:, None].repeat(1, 1, groups, 1)


def register() -> None:
    """Make this attention known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
