"""Parts of prompts as runs, for a kernel that attends within many sequences of different lengths at once.

A run is a stretch of a path of a row's tree (trees.py): its tokens attend to all that stands on the path before them, and
to each other in order. So a step's prompts are a list of sequences of which the last tokens ask, which is what FlashAttention
takes (Dao, FlashAttention-2, 2023; torch.nn.attention.varlen): no mask, and no call for each piece. Keys and values of the
paths are gathered for it; that moves less memory than masks would take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from workers.engines.causal.trees import Ints, Tree
from workers.engines.trunk import onto


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where sequences lie end to end, those that ask and those that they see: as kernels take it."""

    #: Where the tokens, and the cells, of each one begin, and where the last ones end (int32).
    starts: torch.Tensor
    seen_starts: torch.Tensor
    longest: int
    longest_seen: int

    @classmethod
    def of(cls, counts: NDArray[np.int64], lengths: NDArray[np.int64], device: str) -> Sequences:
        """``counts``: of each, the tokens that ask, which are its last ones. ``lengths``: all that it sees."""
        starts = np.stack([np.concatenate([[0], np.cumsum(each)]) for each in (counts, lengths)])
        ends = onto(starts.astype(np.int32), device)
        return cls(ends[0], ends[1], int(counts.max()), int(lengths.max()))


#: query [asking, heads, width], keys and values [seen, key heads, width], where their sequences lie, the scale of scores,
#: and the tokens before it that a token attends to (None: all).
Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequences, float, int | None], torch.Tensor]
#: How far two ways to compute attention in half precision may be apart, of numbers about 1.
NEAR = 0.02


@dataclass(frozen=True, slots=True)
class CacheRun:
    """Tokens of a step, from ``at`` on, which stand at the end of ``path``: cells of a slot, in order."""

    at: int
    count: int
    slot: int
    path: Ints


@dataclass(frozen=True, slots=True)
class Runs:
    """The pieces of one step, on the device."""

    #: Where in the step the asking tokens stand; the cells they see, counted over all slots.
    tokens: torch.Tensor
    seen: torch.Tensor
    sequences: Sequences
    varlen: Varlen

    @classmethod
    def of(cls, pieces: Sequence[CacheRun], cells: int, device: str, varlen: Varlen) -> Runs:
        """``cells``: of each slot of the pool."""
        counts = np.array([piece.count for piece in pieces])
        lengths = np.array([len(piece.path) for piece in pieces])
        tokens = np.concatenate([np.arange(piece.at, piece.at + piece.count) for piece in pieces])
        seen = np.concatenate([piece.slot * cells + piece.path for piece in pieces])
        # One way for all of it.
        every = onto(np.concatenate([tokens, seen]), device)
        sequences = Sequences.of(counts, lengths, device)
        return cls(every[: len(tokens)], every[len(tokens) :], sequences, varlen)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """[asking, heads, width] for query [tokens of the step, heads, width] and a layer's [slots, cells, heads, width]."""
        return self.varlen(
            query[self.tokens],
            keys.flatten(0, 1)[self.seen],
            values.flatten(0, 1)[self.seen],
            self.sequences,
            scaling,
            window,
        )


def pieces(tree: Tree, places: Ints, at: int, slot: int) -> list[CacheRun]:
    """Places of a row's tree, which stand in a step from ``at`` on, as runs: each goes down one path without a gap."""
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(tree.positions[places]) != 1)) + 1
    found = []
    for run in np.split(np.arange(len(places)), breaks):
        last = places[run[-1:]]
        path = np.flatnonzero(tree.seen(last)[0])
        found.append(CacheRun(at + int(run[0]), len(run), slot, path))
    return found


def flash(
    device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int, value_width: int
) -> Varlen | None:
    """The kernel, where this device has it for such heads, and computes what `one_by_one` does; else None."""
    if not device.startswith("cuda") or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0) or width != value_width or width % 8 or width > 256:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        where: Sequences,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        # A window of the kernel does not count the token itself; (-1, 0) are all tokens before.
        found = varlen_attn(
            query,
            keys,
            values,
            where.starts,
            where.seen_starts,
            where.longest,
            where.longest_seen,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        assert isinstance(found, torch.Tensor)
        return found

    return attend if agrees(attend, device, dtype, heads, key_heads, width) else None


def agrees(varlen: Varlen, device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Whether a kernel computes what `one_by_one` does, on made-up sequences: it is asked before it is relied upon."""
    dice = torch.Generator().manual_seed(0)
    counts, lengths = np.array([5, 1, 33, 64]), np.array([5, 70, 40, 200])

    def made(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, width, generator=dice).to(device, dtype)

    query = made(int(counts.sum()), heads)
    keys, values = (made(int(lengths.sum()), key_heads) for _ in range(2))
    where = (Sequences.of(counts, lengths, device), width**-0.5)
    try:
        for window in (None, 16):
            found = varlen(query, keys, values, *where, window)
            expected = one_by_one(query.float(), keys.float(), values.float(), *where, window)
            if not (found.float() - expected).abs().max() < NEAR:
                return False
    except RuntimeError:
        return False
    return True


def one_by_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    where: Sequences,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """What a kernel must compute: each sequence by itself, with a mask. A ``Varlen`` for any device."""
    groups = query.shape[1] // keys.shape[1]
    answer = torch.empty_like(query)
    bounds, seen_bounds = where.starts.tolist(), where.seen_starts.tolist()
    for lo, hi, first, last in zip(bounds, bounds[1:], seen_bounds, seen_bounds[1:], strict=False):
        # The asking tokens are the last ones of their sequence.
        at = torch.arange(last - first - (hi - lo), last - first, device=query.device)[:, None]
        behind = at - torch.arange(last - first, device=query.device)
        seen = (behind >= 0) & (behind < (window or last))
        k, v = (x[first:last].transpose(0, 1).repeat_interleave(groups, 0) for x in (keys, values))
        found = scaled_dot_product_attention(
            query[lo:hi].transpose(0, 1), k, v, attn_mask=seen, scale=scaling
        )
        answer[lo:hi] = found.transpose(0, 1)
    return answer
