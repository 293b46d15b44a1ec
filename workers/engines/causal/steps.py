"""One step of a language model: which tokens run, their layout for attention, and what is made of the logits.

Nothing of a row is changed before ``take``: a step that runs out of memory can be taken again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from workers.engine import Delta, OutOfMemory
from workers.engines.causal import kv
from workers.engines.causal.rows import ActiveRow, Causal, LabelScore, sized
from workers.engines.causal.runs import CacheRun, Runs, pieces
from workers.engines.causal.sampling import sample
from workers.engines.causal.trees import Bools, Ints
from workers.engines.trunk import onto, settle, torch_errors
from workers.engines.writers import TokenOdds, Writer

#: An answer, its next token, and how likely that is where it is told.
NextToken = tuple[Writer, int, TokenOdds | None]

#: Logits of a step, in numbers of 32 bits: a row with a thousand labels wants them behind as many tokens, which go over
#: several steps. Higher: more memory beside the model; lower: more, smaller steps.
LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}


#: A row whose pieces together see more than so many times its cells attends through masks: a thousand labels would have
#: a kernel for pieces gather the prompt before them a thousand times.
GATHERED = 32


@dataclass(slots=True)
class StepTokens:
    """The tokens of one step."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    #: (row, answer, where in the step).
    decode: list[tuple[ActiveRow, int, int]] = field(default_factory=list)
    #: (row, places of its tree, where in the step the first of them stands).
    prefill: list[tuple[ActiveRow, Ints, int]] = field(default_factory=list)
    #: (row, where in the step): tokens that something comes behind.
    wanted: list[tuple[ActiveRow, int]] = field(default_factory=list)
    shares: list[tuple[ActiveRow, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def add(self, ids: list[int], positions: list[int], slot: int, cells: list[int]) -> None:
        self.ids += ids
        self.positions += positions
        self.slots += [slot] * len(ids)
        self.cells += cells


def plan_step(handle: Causal, budget: int) -> StepTokens:
    """Which tokens run: a decode step of each answer, and prefill as far as the budget goes."""
    planned = StepTokens()
    for row in handle.rows.values():
        for cell, (key, (writer, _, position)) in enumerate(row.decoding.items(), row.cell):
            planned.decode.append((row, key, planned.tokens))
            planned.add([writer.ids[-1]], [position], row.slot, [cell])
            planned.adapters.append(row.adapter_of[writer.name])
    left = max(budget - planned.tokens, 1)
    behind = max(1, LOGITS[torch.device(handle.device).type] // handle.vocabulary - planned.tokens)
    waiting = sorted((r for r in handle.rows.values() if len(r.todo)), key=lambda r: not r.urgent)
    for row in waiting:
        places = row.todo[:left]
        if row.wanted:
            places = _few_wanted(row, places, behind)
            behind -= len(row.behind.intersection(places.tolist()))
        left -= len(places)
        lo = planned.tokens
        planned.add(
            row.tree.tokens[places].tolist(),
            row.tree.positions[places].tolist(),
            row.slot,
            places.tolist(),
        )
        planned.adapters += [row.adapters[place] for place in places.tolist()]
        planned.prefill.append((row, places, lo))
        if left <= 0 or behind <= 0:
            break
    planned.shares = [(row, 1) for row, _, _ in planned.decode] + [
        (row, len(places)) for row, places, _ in planned.prefill
    ]
    return planned


def _few_wanted(row: ActiveRow, places: Ints, most: int) -> Ints:
    """Of these places the first ones, so that something is wanted behind ``most`` of them at most; one at least."""
    if len(places) <= most:
        return places
    wanted = np.isin(places, np.fromiter(row.behind, np.int64))
    return places[: max(1, int(np.searchsorted(wanted.cumsum(), most, side="right")))]


def forward(handle: Causal, planned: StepTokens) -> torch.Tensor:
    """Run the tokens. (wanted, vocabulary) logits in fp32, of the tokens that something comes behind."""
    device = handle.device
    line = onto(np.array([planned.ids, planned.positions, planned.slots, planned.cells], np.int64), device)
    prefills: list[kv.PrefillSpan] = []
    parts: list[CacheRun] = []
    for row, places, lo in planned.prefill:
        mine = pieces(row.tree, places, lo, row.slot) if handle.varlen is not None else []
        if mine and sum(len(part.path) for part in mine) <= GATHERED * len(row.tree):
            parts += mine
        else:
            prefills += _prefills(handle, row, places, lo)
    runs = Runs.of(parts, handle.pool.cells, device, handle.varlen) if parts and handle.varlen else None
    layout = kv.StepLayout(
        pool=handle.pool,
        slots=line[2],
        cells=line[3],
        prefills=prefills,
        decode=_decode(handle, planned) if planned.decode else None,
        windows=handle.windows,
        runs=runs,
    )
    for row, _, at in planned.decode:
        planned.wanted.append((row, at))
    for row, places, lo in planned.prefill:
        behind = row.behind
        planned.wanted += [(row, lo + i) for i, place in enumerate(places.tolist()) if place in behind]
    handle.adapters.tokens = [
        (name, onto(np.array([i for i, one in enumerate(planned.adapters) if one == name]), device))
        for name in sorted(set(planned.adapters) - {""})
    ]
    keep = onto(np.array([at for _, at in planned.wanted], np.int64), device)
    found = handle.model(
        input_ids=line[:1],
        position_ids=line[1:2],
        use_cache=False,
        logits_to_keep=keep if len(keep) else 1,
        layout=layout,
    )
    logits: torch.Tensor = found.logits[0].float()
    return logits


def _prefills(handle: Causal, row: ActiveRow, places: Ints, lo: int) -> Iterator[kv.PrefillSpan]:
    positions = row.tree.positions
    for at in range(0, len(places), kv.TOGETHER):
        some = places[at : at + kv.TOGETHER]
        # Places behind the last one are not there yet, and nothing attends to them.
        cells = int(some[-1]) + 1
        seen = row.tree.seen(some)[:, :cells]
        near = None
        if handle.window is not None:
            near = (seen & (positions[some][:, None] - positions[None, :cells] < handle.window))[None]
        yield kv.PrefillSpan(
            lo + at, lo + at + len(some), row.slot, handle.mask(seen[None]), handle.near(near)
        )


def _decode(handle: Causal, planned: StepTokens) -> kv.DecodeTokens:
    by_slot: dict[int, list[tuple[int, Bools]]] = {}
    for row, key, at in planned.decode:
        by_slot.setdefault(row.slot, []).append((at, row.decoding[key][1]))
    slots = max(by_slot) + 1
    answers = max(map(len, by_slot.values()))
    # To a multiple of eight, as kernels of a GPU want masks: slots have that many.
    eight = 1 if handle.device == "cpu" else 8
    cells = -(-(1 + max(planned.cells[at] for _, _, at in planned.decode)) // eight) * eight
    tokens = np.zeros((slots, answers), np.int64)
    seen = np.zeros((slots, answers, cells), bool)
    seen[:, :, 0] = True  # where there is no answer, something must be attended to
    places, targets = [], []
    near = np.zeros_like(seen) if handle.window is not None else None
    for slot, here in by_slot.items():
        for number, (at, sees) in enumerate(here):
            tokens[slot, number] = at
            seen[slot, number] = sees[:cells]
            seen[slot, number, planned.cells[at]] = True
            if near is not None and handle.window is not None:
                near[slot, number] = _last(seen[slot, number], handle.window)
            places.append(at)
            targets.append(slot * answers + number)
    if near is not None:
        near[:, :, 0] |= ~near.any(-1)
    device = handle.device
    which = onto(np.array([places, targets], np.int64), device)
    return kv.DecodeTokens(
        tokens=onto(tokens, device),
        seen=handle.mask(seen),
        near=handle.near(near),
        places=which[0],
        targets=which[1],
    )


def next_tokens(
    handle: Causal, planned: StepTokens, logits: torch.Tensor
) -> tuple[list[NextToken], list[tuple[LabelScore, float]]]:
    """The next token of each answer that goes on or begins, and what is to be added to labels' scores."""
    number_of = {at: number for number, (_, at) in enumerate(planned.wanted)}
    writing = [(number_of[at], row.decoding[key][0]) for row, key, at in planned.decode]
    scored: list[tuple[int, int]] = []
    scores: list[LabelScore] = []
    for row, places, lo in planned.prefill:
        for at, place in enumerate(places.tolist(), lo):
            if (number := number_of.get(at)) is None:
                continue
            here = row.wanted.get(place, ())
            scores += [score for score, _ in here]
            scored += [(number, token) for _, token in here]
            writing += [(number, writer) for writer in row.begins.get(place, ())]
    if not writing and not scored:
        settle(handle.device)
        return [], []
    tokens, logps, odds = sample(logits, writing, scored, handle.grammar)
    written = [
        (writer, token, odds.get(number))
        for number, ((_, writer), token) in enumerate(zip(writing, tokens, strict=True))
    ]
    return written, list(zip(scores, logps, strict=True))


def take(
    handle: Causal,
    planned: StepTokens,
    written: Sequence[NextToken],
    scored: Sequence[tuple[LabelScore, float]],
) -> None:
    """Write the next token of each answer, begin those whose prompt has been read, and add up labels' scores."""
    for score, logp in scored:
        score.logp += logp
    for writer, token, odds in written:
        writer.take(token, handle.tokens.ends, handle.tokens.words, odds)
    for row, key, at in planned.decode:
        writer, seen, position = row.decoding[key]
        seen[planned.cells[at]] = True
        row.decoding[key] = (writer, seen, position + 1)
        row.cell = planned.cells[at] + 1
        if writer.finish:
            row.ended.append(writer)
            del row.decoding[key]
    for row, places, _ in planned.prefill:
        row.todo = row.todo[len(places) :]
        _cache_prefixes(handle, row)
        for place in row.begins.keys() & set(places.tolist()):
            _begin(handle, row, place)


def deltas(handle: Causal, row: ActiveRow) -> list[Delta]:
    """What may be told of a row's answers since the last step."""
    tokens = handle.tokens
    found = [Delta(row.ticket, one.name, one.news(tokens.words, tokens.in_bytes)) for one in row.told]
    row.told = [writer for writer in row.told if not writer.finish]
    return [delta for delta in found if delta.text]


def _begin(handle: Causal, row: ActiveRow, place: int) -> None:
    """The answers behind this place of the row's tree have their first token."""
    for writer in row.begins.pop(place):
        if writer.finish:
            row.ended.append(writer)
            continue
        seen = sized(row.tree.seen(np.array([place]))[0], handle.pool.cells)
        row.decoding[id(writer)] = (writer, seen, int(row.tree.positions[place]) + 1)


def _cache_prefixes(handle: Causal, row: ActiveRow) -> None:
    """Put fixed prefixes that have been computed into the cache; the least recently used ones go."""
    next_place = int(row.todo[0]) if len(row.todo) else len(row.tree)
    for prefix, places in list(row.prefixes.items()):
        if int(places[-1]) < next_place:
            # Where there is no memory for it, it is computed again.
            with contextlib.suppress(OutOfMemory), torch_errors():
                cells = onto(places, handle.device)
                handle.prefix_cache.put(row.tenant, prefix, handle.pool.read(row.slot, cells))
            del row.prefixes[prefix]
    handle.bound_prefix_cache()


def _last(seen: Bools, window: int) -> Bools:
    """Of the cells that are attended to, the newest so many: an answer's cells are in the order of its positions."""
    kept = np.flatnonzero(seen)[-window:]
    near = np.zeros_like(seen)
    near[kept] = True
    return near
