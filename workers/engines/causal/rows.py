"""A loaded language model and the rows inside it: how a row is let in, and where its keys and values stand.

A row's prompts form a tree (trees.py), so that what its tasks begin with is computed once. The row has a slot of the pool
(kv.py) of its own; a prefix that the cache holds is copied into it, and one that another row is just computing is waited
for.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from motet.protocol.columns import CellError
from motet.protocol.manifest import Manifest
from workers.engine import OutOfMemory
from workers.engines.causal import kv
from workers.engines.causal.chat_tokens import ChatTokens
from workers.engines.causal.lora import Adapters
from workers.engines.causal.prefix_cache import LEAST_CACHED, PrefixCache, PrefixKey
from workers.engines.causal.row_prompts import PriorKey, RowPrompts, TaskPrompt
from workers.engines.causal.runs import Varlen
from workers.engines.causal.trees import Bools, Ints, Tree, tree
from workers.engines.newest import Newest
from workers.engines.telling import Teller
from workers.engines.trunk import onto, torch_errors
from workers.engines.writers import Grammar, Writer

#: Rows are let in beyond the decode slots by this share of them, so that none is ever free.
AHEAD = 1 / 8
#: Labels whose priors are kept for one model. Those pushed out are computed again. Rows that bring labels of their own
#: push out those of others; each label takes some hundred bytes.
PRIORS = 1 << 16
#: Tokens of the prefix cache, as a share of the tokens in flight, which it takes beside them. More holds more prefixes,
#: and leaves fewer rows room.
CACHE_SHARE = 1 / 8


def label_priors() -> Newest[tuple[str, PriorKey], tuple[float, ...]]:
    return Newest(PRIORS, size=lambda key: len(key[1][2]))


@dataclass(slots=True)
class LabelScore:
    """The likelihood of one label, added up as its tokens are seen."""

    task: str
    #: Of the prompt without any text: it goes into a label prior.
    empty: bool
    logp: float = 0.0


@dataclass(slots=True)
class ActiveRow:
    """A row inside the engine."""

    ticket: Hashable
    tenant: str
    urgent: bool
    asking: RowPrompts
    tree: Tree
    slot: int
    #: Places of the tree that are still to be computed, in order.
    todo: Ints
    #: Of each place of the tree, the adapter that computes it.
    adapters: list[str]
    #: Fixed prefixes that this row computes for the prefix cache, and their places in its tree.
    prefixes: dict[PrefixKey, Ints]
    #: Place of a prompt's last token -> the answers whose first token comes behind it.
    begins: dict[int, list[Writer]]
    scores: list[LabelScore]
    #: Place of the tree -> the labels whose next token comes behind it, each with that token.
    wanted: dict[int, list[tuple[LabelScore, int]]]
    #: Of each task, tokens of its prompts, and those of them that are computed for it.
    read: dict[str, int]
    computed: dict[str, int]
    #: The next free cell of the slot; cells of the tree's places are their numbers.
    cell: int
    #: Answers that decode -> what each attends to, by cell, and the position of its next token.
    decoding: dict[int, tuple[Writer, Bools, int]] = field(default_factory=dict)
    ended: list[Writer] = field(default_factory=list)
    #: Task -> the adapter that writes its answer.
    adapter_of: dict[str, str] = field(default_factory=dict)
    #: Task -> its label prior, where that was known before: it may be pushed out meanwhile.
    priors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    #: Tasks whose answer cannot be begun.
    failed: dict[str, CellError] = field(default_factory=dict)
    #: Answers that are told while they are written.
    told: list[Writer] = field(default_factory=list)
    seconds: float = 0.0

    def tell(self) -> None:
        """Have those answers told that are text. Before the first step."""
        self.told = [writer for begun in self.begins.values() for writer in begun if writer.schema is None]
        for writer in self.told:
            writer.teller = Teller(writer.stop)

    @property
    def behind(self) -> set[int]:
        """Places of the tree that something is wanted behind."""
        return self.wanted.keys() | self.begins.keys()

    @property
    def answers(self) -> int:
        """Answers that decode or will."""
        return len(self.decoding) + sum(map(len, self.begins.values()))

    @property
    def done(self) -> bool:
        return not len(self.todo) and not self.answers


@dataclass(slots=True)
class Causal:
    """A loaded language model, and the rows inside it."""

    manifest: Manifest
    device: str
    model: Any
    tokens: ChatTokens
    adapters: Adapters
    pool: kv.Pool
    #: Tokens that it gives logits for.
    vocabulary: int
    #: Query heads that share a key head.
    groups: int
    #: Of each layer the tokens that its sliding window holds; None: it attends to all tokens before.
    windows: tuple[int | None, ...]
    #: Answers that decode at once; more gain nothing.
    decode_slots: int
    #: Attends to all prompts of a step at once; None: one after the other.
    varlen: Varlen | None
    #: Tokens in flight at most: what its slots may have room for.
    room: int
    rows: dict[Hashable, ActiveRow] = field(default_factory=dict)
    #: What all rows of a task, or some rows of a sub-task, begin with.
    prefix_cache: PrefixCache = field(default_factory=PrefixCache)
    #: (tenant, what it depends on) -> a label prior: how likely the labels are without any text.
    priors: Newest[tuple[str, PriorKey], tuple[float, ...]] = field(default_factory=label_priors)
    grammar: Grammar | None = None

    @property
    def window(self) -> int | None:
        """Tokens of the window of all layers that have one."""
        return next((window for window in self.windows if window is not None), None)

    def mask(self, seen: Bools) -> torch.Tensor:
        """What is attended to, as attention takes it."""
        return kv.additive(seen, self.groups, self.model.dtype, self.device)

    def near(self, seen: Bools | None) -> torch.Tensor | None:
        """The same within a sliding window; None where no layer has one."""
        return None if seen is None else self.mask(seen)

    def bound_prefix_cache(self) -> None:
        """Let prefixes go that are more than the cache's share of the tokens in flight."""
        self.prefix_cache.shrink(self.room * CACHE_SHARE)

    def computes(self, tenant: str, prefix: PrefixKey) -> bool:
        """Whether a row inside is about to put this prefix into the cache."""
        return any(row.tenant == tenant and prefix in row.prefixes for row in self.rows.values())


def active_row(
    handle: Causal, tenant: str, asking: RowPrompts, ticket: Hashable, urgent: bool
) -> ActiveRow | None:
    """The row with a slot of its own; None where there is none, or where another one just computes what it needs."""
    sequences: list[list[int]] = []
    kinds: list[str] = []
    fixed: dict[PrefixKey, int] = {}
    for a in asking.tasks:
        prefix = a.prefix
        if a.prompt.fixed >= LEAST_CACHED and prefix not in fixed:
            if (tenant, prefix) not in handle.prefix_cache and handle.computes(tenant, prefix):
                return None
            fixed[prefix] = len(sequences)
            sequences.append(a.prompt.ids[: a.prompt.fixed])
            kinds.append(a.adapter)
    ends: list[tuple[TaskPrompt, str, int, int]] = []
    priors = {}
    for a in asking.tasks:
        if a.empty is not None and (prior := handle.priors.get((tenant, a.prior))) is not None:
            priors[a.name] = prior
        for kind, prompt in (("text", a.prompt), ("empty", a.empty)):
            if prompt is None or (kind == "empty" and a.name in priors):
                continue
            ends.append((a, kind, len(sequences), len(prompt.ids)))
            behind = [label[:-1] for label in a.labels] or [[]]
            sequences += [prompt.ids + label for label in behind]
            kinds += [a.adapter] * len(behind)
    grown = tree(sequences, kinds)
    written = sum(a.most for a in asking.tasks)
    slot = _slot(handle, len(grown) + written, spare=0 if urgent else 1)
    if slot is None:
        return None
    known = np.zeros(len(grown), bool)
    for a, kind, first, length in ends:
        if kind == "text":
            places = grown.paths[first][:length]
            count, cached = handle.prefix_cache.beginning(tenant, (a.adapter, tuple(a.prompt.ids)))
            if not known[places[:count]].all():
                handle.pool.write(slot, onto(places[:count], handle.device), cached)
                known[places[:count]] = True
    prefixes = {
        prefix: places for prefix, number in fixed.items() if not known[places := grown.paths[number]].all()
    }
    made = ActiveRow(
        ticket=ticket,
        tenant=tenant,
        urgent=urgent,
        asking=asking,
        tree=grown,
        slot=slot,
        todo=np.flatnonzero(~known),
        adapters=_adapters(grown, kinds),
        prefixes=prefixes,
        begins={},
        scores=[],
        wanted={},
        read={a.name: 0 for a in asking.tasks},
        computed={a.name: 0 for a in asking.tasks},
        cell=len(grown),
        priors=priors,
    )
    for a, kind, first, length in ends:
        paths = grown.paths[first : first + max(1, len(a.labels))]
        _expect(handle, made, a, kind == "empty", paths, length)
        mine = np.unique(np.concatenate(paths))
        made.read[a.name] += len(mine)
        made.computed[a.name] += int((~known[mine]).sum())
        known[mine] = True
    # What something comes behind runs in any case, known or not.
    made.todo = np.union1d(made.todo, np.array(sorted(made.behind), np.int64))
    return made


def _expect(
    handle: Causal, row: ActiveRow, a: TaskPrompt, empty: bool, paths: Sequence[Ints], length: int
) -> None:
    """Note what is wanted behind the tokens of a prompt: the first token of an answer, or the likelihoods of labels."""
    if a.refused is not None:
        row.failed[a.name] = a.refused
        return
    if not a.labels:
        schema = a.spec.get("schema")
        try:
            matcher = None if schema is None else _grammar(handle).matcher(schema)
        except ValueError:
            row.failed[a.name] = CellError("schema", "this schema cannot be kept while writing; simplify it")
            return
        thought = (handle.tokens.thought, a.prompt.thinks)
        writer = Writer.of(a.name, a.spec, a.most, row.asking.index, matcher, *thought, a.prompt.ids)
        row.begins.setdefault(int(paths[0][-1]), []).append(writer)
        row.adapter_of[a.name] = a.adapter
        return
    for path, label in zip(paths, a.labels, strict=True):
        score = LabelScore(a.name, empty)
        row.scores.append(score)
        for place, token in zip(path[length - 1 :].tolist(), label, strict=True):
            row.wanted.setdefault(place, []).append((score, token))


def _slot(handle: Causal, cells: int, spare: int) -> int | None:
    """A slot of so many cells or more; None where there is none now, or where but ``spare`` would be left."""
    pool, rows = handle.pool, list(handle.rows.values())
    taken = {row.slot for row in rows}
    free = [slot for slot in range(pool.slots) if slot not in taken]
    # Less room than before: then others need the memory, and it is given back once fewer rows are inside.
    allowed = not rows or (len(rows) + 1) * pool.cells <= handle.room
    if free and allowed and (len(free) > spare or not rows) and cells <= pool.cells:
        return free[0]
    # Other lengths than before: slots as long as the longest row needs, as many as there is memory for.
    longest = slot_cells(rows, cells)
    slots = max(1, min(handle.room // longest, int(handle.decode_slots * (1 + AHEAD)) + 1))
    if slots <= len(rows) + spare and rows:
        return None
    while True:
        try:
            with torch_errors():
                lay_out(handle, slots, longest)
            return len(rows)
        except OutOfMemory:
            # Fewer rows at once need less; a single one more is the least.
            if slots <= len(rows) + 1:
                raise
            slots = max(len(rows) + 1, slots // 2)


def lay_out(handle: Causal, slots: int, cells: int) -> None:
    """Slots of so many cells, and of these rows the first ones."""
    rows = list(handle.rows.values())
    handle.pool.lay_out(slots, cells, [row.slot for row in rows])
    for number, row in enumerate(rows):
        row.slot = number
        row.decoding = {
            key: (writer, sized(seen, cells), position)
            for key, (writer, seen, position) in row.decoding.items()
        }


def _grammar(handle: Causal) -> Grammar:
    if handle.grammar is None:
        handle.grammar = Grammar(handle.tokens.json, handle.vocabulary, sorted(handle.tokens.ends))
    return handle.grammar


def _adapters(grown: Tree, kinds: Sequence[str]) -> list[str]:
    """Of each place of a tree, what computes it."""
    found = [""] * len(grown)
    for path, kind in zip(grown.paths, kinds, strict=True):
        for place in path.tolist() if kind else ():
            found[place] = kind
    return found


def slot_cells(rows: Sequence[ActiveRow], cells: int = 1) -> int:
    """Cells that a slot must have for the longest of these rows, and for one of ``cells``."""
    longest = max([cells, *(len(r.tree) + sum(a.most for a in r.asking.tasks) for r in rows)])
    return -(-longest // kv.STEP) * kv.STEP


def sized(seen: Bools, cells: int) -> Bools:
    """What is attended to, for a slot of so many cells."""
    found = np.zeros(cells, bool)
    n = min(cells, len(seen))
    found[:n] = seen[:n]
    return found
