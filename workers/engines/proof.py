"""The proof that rows do not mix: a row among others gives what it gives alone, on the true weights.

A language model reads several rows in one line of tokens, as workers/engines/causal/causal.py lets it: pieces of prompts, and
decode tokens of answers. It is compared with the plain model of transformers, which reads one row and nothing else. An
encoder reads rows side by side, filled up to the longest. What may be admitted by it: workers/engines/proved.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Prepared
from workers.engines.causal import kv
from workers.engines.causal.row_prompts import RowPrompts
from workers.engines.causal.rows import ActiveRow, Causal, LabelScore
from workers.engines.causal.steps import StepTokens, forward
from workers.engines.causal.trees import tree
from workers.engines.proved import ELSEWHERE
from workers.engines.trunk import Tokens, torch_errors
from workers.engines.writers import Writer

#: Tokens of the rows of a language model: a piece of one needs two masks (kv.TOGETHER), and no two are of one length. More and
#: longer rows take longer to register, and show nothing else.
ROW_TOKENS = (9, 40, 17, kv.TOGETHER + 60, 24)
#: The last tokens of each row come one at a time, as an answer's do.
WRITTEN = 3
#: Windows of attention are narrowed to this many tokens for the proof, so that its rows are longer.
NARROW = 16
#: Words of an encoder's shorter rows. Its longest is as long as the model reads, up to LONGEST tokens, since attention
#: over more takes minutes on a CPU.
ROW_WORDS = (1, 5, 30)
LONGEST = 2048


def among_others(loaded: Causal, ids: Sequence[int], most: int) -> float:
    """How far the logits of rows in one line are from those of the plain model, which reads one row at a time.

    ``ids``: tokens of ordinary text, cut into rows of at most ``most``. Of each row the median token's distance, as a
    share of its logits' length; of these the largest. Raises CannotLoad, OutOfMemory, DeviceBroken.
    """
    rows = _rows(ids, most)
    try:
        with torch_errors(), torch.inference_mode(), _narrowed(loaded) as windows:
            plain = _one_at_a_time(loaded.model, rows, loaded.device)
            found = _in_one_line(loaded, windows, rows)
    except (CannotLoad, OutOfMemory, DeviceBroken):
        raise
    except Exception as error:
        raise CannotLoad(not_in_one_line(loaded.model, error)) from error
    # Logits mean the same whatever is added to all of them.
    return max(
        apart(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True))
        for a, b in zip(found, plain, strict=True)
    )


def not_in_one_line(model: Any, error: Exception) -> str:
    """Why a language model is refused whose forward pass fails in an unforeseen way."""
    return (
        f"{model.config.model_type}: its forward pass cannot read several rows in one line ({type(error).__name__}); "
        f"{ELSEWHERE}"
    )


def beside_others(
    answers: Callable[[Sequence[Prepared]], Any], tokens: Tokens, texts: Sequence[str]
) -> float:
    """How far an encoder's answers to rows side by side are from its answers to one row at a time.

    ``answers`` gives (rows, numbers). The largest distance of a row's numbers, as a share of their length. Raises
    OutOfMemory, DeviceBroken.
    """
    words = " ".join(texts).split()
    some = [" ".join(words[:count]) for count in (*ROW_WORDS, len(words))]
    rows = [row for row in tokens.prepare(some, LONGEST) if isinstance(row, Prepared)]
    together = torch.as_tensor(answers(rows))
    alone = torch.cat([torch.as_tensor(answers([row])) for row in rows])
    return max(apart(a, b) for a, b in zip(together[:, None], alone[:, None], strict=True))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of the median vector of (vectors, numbers). A NaN counts as infinitely far.

    Not of the farthest one: a router between experts that are equally good goes another way by the last bit.
    """
    share = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=1e-9)
    return float(share.nan_to_num(nan=float("inf")).median())


@contextmanager
def _narrowed(loaded: Causal) -> Iterator[tuple[int | None, ...]]:
    """Windows of NARROW tokens instead of the model's own: what each layer then attends to."""
    holders: list[Any] = [loaded.model.config.get_text_config(), *loaded.model.modules()]
    wide = [h for h in holders if (getattr(h, "sliding_window", None) or 0) > NARROW]
    was = [holder.sliding_window for holder in wide]
    try:
        for holder in wide:
            holder.sliding_window = NARROW
        yield tuple(window and min(window, NARROW) for window in loaded.windows)
    finally:
        for holder, window in zip(wide, was, strict=True):
            holder.sliding_window = window


def _rows(ids: Sequence[int], most: int) -> list[list[int]]:
    """Rows of different lengths and of different tokens; two of them begin alike."""
    rows = []
    at = 0
    for length in ROW_TOKENS:
        length = max(WRITTEN + 1, min(length, most))
        rows.append([ids[i % len(ids)] for i in range(at, at + length)])
        at += length
    rows[-1][:2] = rows[0][:2]
    return rows


def _one_at_a_time(model: Any, rows: Sequence[Sequence[int]], device: str) -> list[torch.Tensor]:
    """Logits behind each token of each row, (tokens, vocabulary), by the model's own attention."""
    model.set_attn_implementation("eager")
    try:
        return [
            model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float().cpu()
            for row in rows
        ]
    finally:
        model.set_attn_implementation(kv.ATTENTION)


def _in_one_line(
    loaded: Causal, windows: tuple[int | None, ...], rows: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """The same, where each step reads pieces of several rows, as the engine runs its steps."""
    handle = replace(loaded, windows=windows)
    handle.pool.lay_out(len(rows), -(-max(map(len, rows)) // kv.STEP) * kv.STEP)
    inside = [_inside(slot, ids) for slot, ids in enumerate(rows)]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    try:
        for step in _steps(rows):
            planned = StepTokens()
            for number, lo, hi in step:
                _plan(planned, inside[number], lo, hi, handle.pool.cells)
            logits = forward(handle, planned).cpu()
            for (row, _), behind in zip(planned.wanted, logits, strict=True):
                found[row.slot].append(behind)
    finally:
        handle.pool.lay_out(0, 0)
    return [torch.stack(behind) for behind in found]


def _inside(slot: int, ids: Sequence[int]) -> ActiveRow:
    """A row inside the engine, of which the logits behind every token are wanted."""
    every = LabelScore("", False)
    return ActiveRow(
        ticket=slot,
        tenant="",
        urgent=False,
        asking=RowPrompts((), 0),
        tree=tree([ids]),
        slot=slot,
        todo=np.arange(len(ids)),
        adapters=[],
        prefixes={},
        begins={},
        scores=[every],
        wanted={place: [(every, 0)] for place in range(len(ids))},
        read={},
        computed={},
        cell=0,
    )


def _plan(planned: StepTokens, row: ActiveRow, lo: int, hi: int, cells: int) -> None:
    """Add a piece of a row to a step: one token as a decode step, more as a part of its prompt."""
    at, places = planned.tokens, np.arange(lo, hi)
    planned.add(row.tree.tokens[lo:hi].tolist(), places.tolist(), row.slot, places.tolist())
    planned.adapters += [""] * (hi - lo)
    if hi - lo > 1:
        planned.prefill.append((row, places, at))
        return
    writer = Writer.of("", {}, 1, 0, None)
    row.decoding = {0: (writer, np.arange(cells) < lo, lo)}
    planned.decode.append((row, 0, at))


def _steps(rows: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (row, lo, hi) of each step. Every other row begins a step later, so that some write and others read."""
    pieces = [_pieces(len(row)) for row in rows]
    for step in range(max(map(len, pieces)) + 1):
        under_way = [(row, step - row % 2) for row in range(len(rows))]
        yield [(row, *pieces[row][at]) for row, at in under_way if 0 <= at < len(pieces[row])]


def _pieces(length: int) -> list[tuple[int, int]]:
    """A prompt in two pieces, a quarter of it first, then one token at a time."""
    end = length - WRITTEN
    cuts = sorted({0, end // 4, *range(end, length + 1)})
    return list(itertools.pairwise(cuts))
