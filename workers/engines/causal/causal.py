"""Language models: many prompts about one text cost one prefill, and answers of all rows are written together.

The engine keeps rows of several sub-tasks and jobs in flight. A row's prompts form a tree (trees.py), so that what its
tasks begin with is computed once; what all rows of a task begin with is in a prefix cache, for one tenant each. A step runs the next
token of every answer and, under a budget, pieces of prompts that come in (Yu et al., Orca, OSDI 2022; Agrawal et
al., Sarathi-Serve, OSDI 2024); an answer that has ended leaves at once. Why not transformers' own continuous batching:
docs/decisions/0010.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.columns import ERROR, OK, CellError, Column
from motet.manifest import KV_TOKENS, Manifest, decode_slots
from motet.wire import TaskOrder
from workers.engine import CannotLoad, DeviceBroken, Ended, OutOfMemory, Pass, Prepared, Step
from workers.engines.answers import label_column
from workers.engines.causal import kv
from workers.engines.causal.chat_tokens import ChatTokens, Prompt
from workers.engines.causal.choosing import outcome
from workers.engines.causal.lora import Adapters
from workers.engines.causal.runs import Runs, Varlen, flash, pieces
from workers.engines.causal.trees import Bools, Ints, Tree, tree
from workers.engines.newest import Newest
from workers.engines.prompts import BAD_MESSAGES, NOTHING, BadMessages, messages_of
from workers.engines.proof import among_others, not_in_one_line
from workers.engines.proved import check_language
from workers.engines.thoughts import switches
from workers.engines.trunk import embedding_rows, free_cache, load_transformer, onto, settle, torch_errors
from workers.engines.writers import Grammar, Writer

#: Rows are let in beyond the decode slots by this share of them, so that none is ever free.
AHEAD = 1 / 8
#: Tokens of the shortest prefix that is cached: a shorter one is computed faster than it is copied.
LEAST_CACHED = 8
#: Tokens of the prefix cache, as a share of the tokens in flight, which it takes beside them. More holds more prefixes,
#: and leaves fewer rows room.
CACHE_SHARE = 1 / 8
#: Share of a GPU's memory that keys and values leave free for a step. With less, long prompts run out of memory.
RESERVE_SHARE = 1 / 16
#: Label priors kept for one model. Those pushed out are computed again; each is a few numbers.
PRIORS = 1024
#: Room that is left for an answer where a text is cut to fit.
ANSWER_SHARE = 1 / 4

CONTEXT_LENGTH = "context_length"


#: What a label prior depends on: the adapter, the prompt without any text, the labels.
PriorKey = tuple[str, tuple[int, ...], tuple[tuple[int, ...], ...]]
#: A fixed prefix of prompts: the adapter that computes it, and its tokens.
PrefixKey = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """One task's prompt for one row."""

    name: str
    spec: Mapping[str, Any]
    prompt: Prompt
    #: Choose: the tokens of each label, and the prompt without any text.
    labels: tuple[list[int], ...] = ()
    empty: Prompt | None = None
    #: Tokens that may be written.
    most: int = 0
    #: Digest of the adapter that answers it; "" for the model itself.
    adapter: str = ""

    @property
    def own_tokens(self) -> int:
        """Tokens that are this row's own: its text, or its dialogue."""
        if self.spec["kind"] == "chat":
            return len(self.prompt.ids) - self.prompt.fixed
        lo, hi = self.prompt.text
        return hi - lo

    @property
    def prior(self) -> PriorKey:
        return (self.adapter, tuple(self.empty.ids if self.empty else ()), tuple(map(tuple, self.labels)))


@dataclass(frozen=True, slots=True)
class RowPrompts:
    """What a row asks: ``Prepared.inputs``."""

    tasks: tuple[TaskPrompt, ...]
    index: int


@dataclass(slots=True)
class _Score:
    """The likelihood of one label, added up as its tokens are seen."""

    task: str
    #: Of the prompt without any text: it goes into a label prior.
    empty: bool
    #: Place in the tree -> the label's token that comes behind it.
    wanted: dict[int, int]
    logp: float = 0.0


@dataclass(slots=True)
class _Row:
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
    scores: list[_Score]
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
    seconds: float = 0.0

    @property
    def behind(self) -> set[int]:
        """Places of the tree that something is wanted behind."""
        return {place for score in self.scores for place in score.wanted} | self.begins.keys()

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
    rows: dict[Hashable, _Row] = field(default_factory=dict)
    #: (tenant, prefix) -> its keys and values; the last used one is last.
    prefix_cache: OrderedDict[tuple[str, PrefixKey], list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=OrderedDict
    )
    #: (tenant, what it depends on) -> a label prior: how likely the labels are without any text.
    priors: Newest[tuple[str, PriorKey], tuple[float, ...]] = field(default_factory=lambda: Newest(PRIORS))
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


def free_memory(device: str) -> tuple[int, int] | None:
    """(free, all) bytes of a GPU, what torch keeps for itself counted as free; None of a CPU."""
    if device == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def tokens_in_flight(more_mb: int, token_bytes: int, free: int, held: int, total: int) -> int:
    """Tokens whose keys and values a model may hold, where ``more_mb`` are granted beside what KV_TOKENS take.

    Never more than there is room for: ``free`` and ``held`` by it, of ``total`` bytes, less a reserve. Pure.
    """
    each = token_bytes * (1 + CACHE_SHARE)
    granted = KV_TOKENS + more_mb * (1 << 20) / each
    there = (free + held - total * RESERVE_SHARE) / each
    return max(KV_TOKENS, int(min(granted, there)))


class CausalEngine:
    """Answers generate, chat, choose and extract. ``Provable``, ``Elastic``."""

    def __init__(self, memory: Callable[[str], tuple[int, int] | None] = free_memory) -> None:
        """``memory``: (free, all) bytes of a device; None where more than KV_TOKENS would gain nothing."""
        self._memory = memory

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Causal:
        kv.register()
        loaded = load_transformer(
            "AutoModelForCausalLM",
            files,
            device=device,
            in_format=in_format,
            attention=kv.ATTENTION,
            admit=lambda config: check_language(model, config),
        )
        config = loaded.config.get_text_config()
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        queries = config.num_attention_heads
        handle = Causal(
            manifest=model,
            device=device,
            model=loaded,
            tokens=ChatTokens(files, embedding_rows(loaded)),
            adapters=Adapters(loaded, device),
            pool=kv.Pool([(heads, width, width)] * config.num_hidden_layers, loaded.dtype, device),
            groups=queries // heads,
            windows=_windows(config),
            decode_slots=decode_slots(device.partition(":")[0]),
            varlen=flash(device, loaded.dtype, queries, heads, width, width),
            room=KV_TOKENS,
        )
        try:
            try:
                self._warm_up(handle)
            except kv.NotAtOnce:
                handle.varlen = None
                handle.rows.clear()
                self._warm_up(handle)
        except (CannotLoad, OutOfMemory, DeviceBroken):
            raise
        except Exception as error:
            raise CannotLoad(not_in_one_line(loaded, error)) from error
        return handle

    def attach(self, handle: Causal, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if task.manifest.trunk_model:
            with torch_errors():
                handle.adapters.add(task.manifest.digest, files)

    def unload(self, handle: Causal) -> None:
        handle.rows.clear()
        handle.prefix_cache.clear()
        handle.priors.clear()
        handle.pool.lay_out(0, 0)
        handle.adapters.release()
        handle.model = None
        free_cache(handle.device)

    @torch.inference_mode()
    def stretch(self, handle: Causal, more_mb: int) -> bool:
        """``Elastic``: more rows at once."""
        if (memory := self._memory(handle.device)) is None:
            return True
        pool = handle.pool
        each, cached = pool.token_bytes, _cached_tokens(handle)
        handle.room = tokens_in_flight(more_mb, each, memory[0], (pool.tokens + cached) * each, memory[1])
        self._forget_oldest(handle)
        if pool.tokens <= handle.room:
            return True
        rows = list(handle.rows.values())
        cells = _longest(rows)
        if len(rows) * cells > handle.room:
            return False
        try:
            with torch_errors():
                self._lay_out(handle, len(rows), cells)
                pool.shrink()
        except OutOfMemory:
            return False
        free_cache(handle.device)
        return True

    def among_others(self, handle: Causal, texts: Sequence[str]) -> float:
        """``Provable``: of the logits behind every token."""
        [ids] = handle.tokens.texts([" ".join(texts)])
        return among_others(handle, ids, handle.manifest.max_tokens)

    # -- from any thread

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        """Tokenise. Each text once, whatever asks about it."""
        handle: Causal = pass_.handle
        known = handle.tokens.texts(texts)
        found: list[Prepared | CellError] = []
        for row, (text, ids) in enumerate(zip(texts, known, strict=True)):
            fields = {name: column[row] for name, column in pass_.fields.items()}
            try:
                found.append(self._prepared(handle, pass_, row, text, ids, fields))
            except BadMessages:
                found.append(BAD_MESSAGES)
        return found

    def _prepared(
        self, handle: Causal, pass_: Pass, row: int, text: str, ids: list[int], fields: Mapping[str, str]
    ) -> Prepared | CellError:
        context = handle.manifest.max_tokens
        asked = [self._asked(handle, task, text, ids, fields) for task in pass_.tasks]
        # A text is cut where some prompt about it does not fit; for all of them, since they share it.
        over = max(_over(a, context) for a in asked)
        truncated = over > 0
        if truncated:
            shortest = min(a.prompt.text[1] - a.prompt.text[0] for a in asked)
            over = max(_over(a, context, answer=int(context * ANSWER_SHARE)) for a in asked)
            if pass_.tasks[0].spec["kind"] == "chat" or over >= shortest:
                longest = max(len(a.prompt.ids) for a in asked)
                return CellError(
                    CONTEXT_LENGTH, f"a prompt of {longest} tokens; the model's context has {context}"
                )
            cut = ids[: len(ids) - over]
            asked = [self._asked(handle, task, text, cut, fields) for task in pass_.tasks]
        index = pass_.indices[row] if row < len(pass_.indices) else row
        return Prepared(
            row, _own_tokens(asked), truncated, RowPrompts(tuple(_bounded(a, context) for a in asked), index)
        )

    def _asked(
        self, handle: Causal, task: TaskOrder, text: str, ids: list[int], fields: Mapping[str, str]
    ) -> TaskPrompt:
        spec, tokens = task.spec, handle.tokens
        adapter = task.manifest.digest if task.manifest.trunk_model else ""
        told = switches(spec)
        prompt = tokens.prompt(messages_of(spec, text, fields), {text: ids}, told)
        if spec["kind"] != "choose":
            return TaskPrompt(task.name, spec, prompt, most=int(spec["max_tokens"]), adapter=adapter)
        empty = None
        if spec.get("calibrate", True):
            nothing = dict.fromkeys(fields, NOTHING)
            empty = tokens.prompt(messages_of(spec, NOTHING, nothing), {}, told)
        labels = tuple(map(tokens.label, spec["labels"]))
        return TaskPrompt(task.name, spec, prompt, labels, empty, adapter=adapter)

    # -- on the device's thread

    def abort(self, handle: Causal, tickets: Collection[Hashable]) -> None:
        for ticket in tickets:
            handle.rows.pop(ticket, None)

    @torch.inference_mode()
    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        handle: Causal = pass_.handle
        asking: RowPrompts = row.inputs
        taken = sum(r.answers for r in handle.rows.values())
        if not urgent and taken >= handle.decode_slots * (1 + AHEAD):
            return False
        made = self._row(handle, pass_.tenant, asking, ticket, urgent)
        if made is None:
            return False
        handle.rows[ticket] = made
        return True

    def step(self, handle: Causal, tokens: int) -> Step:
        if not handle.rows:
            return Step()
        began = time.perf_counter()
        decoding = sum(len(row.decoding) for row in handle.rows.values())
        asked = any(row.answers for row in handle.rows.values())
        # Nothing of a row is changed before all that could run out of memory has been done.
        with torch_errors(), torch.inference_mode():
            load = self._load(handle, tokens)
            logits = self._forward(handle, load)
            told = self._told(handle, load, logits)
            self._take(handle, load, *told)
        took = time.perf_counter() - began
        for row, count in load.shares:
            row.seconds += took * count / load.tokens
        ended = [self._end(handle, row) for row in list(handle.rows.values()) if row.done]
        return Step(ended, load.tokens, min(1.0, decoding / handle.decode_slots) if asked else None)

    # -- letting in

    def _row(
        self, handle: Causal, tenant: str, asking: RowPrompts, ticket: Hashable, urgent: bool
    ) -> _Row | None:
        """The row with a slot of its own; None where there is none, or where another one just computes what it needs."""
        sequences: list[list[int]] = []
        kinds: list[str] = []
        fixed: dict[PrefixKey, int] = {}
        for a in asking.tasks:
            prefix = (a.adapter, tuple(a.prompt.ids[: a.prompt.fixed]))
            if a.prompt.fixed >= LEAST_CACHED and prefix not in fixed:
                if (tenant, prefix) not in handle.prefix_cache and _computed_by_another(
                    handle, tenant, prefix
                ):
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
        slot = self._slot(handle, len(grown) + written, spare=0 if urgent else 1)
        if slot is None:
            return None
        known = np.zeros(len(grown), bool)
        prefixes = {}
        for prefix, number in fixed.items():
            places = grown.paths[number]
            if (cached := handle.prefix_cache.get((tenant, prefix))) is not None:
                handle.prefix_cache.move_to_end((tenant, prefix))
                handle.pool.write(slot, onto(places, handle.device), cached)
                known[places] = True
            else:
                prefixes[prefix] = places
        made = _Row(
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
            read={a.name: 0 for a in asking.tasks},
            computed={a.name: 0 for a in asking.tasks},
            cell=len(grown),
            priors=priors,
        )
        for a, kind, first, length in ends:
            paths = grown.paths[first : first + max(1, len(a.labels))]
            self._expect(handle, made, a, kind == "empty", paths, length)
            mine = np.unique(np.concatenate(paths))
            made.read[a.name] += len(mine)
            made.computed[a.name] += int((~known[mine]).sum())
            known[mine] = True
        # What something comes behind runs in any case, known or not.
        made.todo = np.union1d(made.todo, np.array(sorted(made.behind), np.int64))
        return made

    def _expect(
        self, handle: Causal, row: _Row, a: TaskPrompt, empty: bool, paths: Sequence[Ints], length: int
    ) -> None:
        """Note what is wanted behind the tokens of a prompt: the first token of an answer, or the likelihoods of labels."""
        if not a.labels:
            schema = a.spec.get("schema")
            try:
                matcher = None if schema is None else self._grammar(handle).matcher(schema)
            except ValueError:
                row.failed[a.name] = CellError(
                    "schema", "this schema cannot be kept while writing; simplify it"
                )
                return
            thought = (handle.tokens.thought, a.prompt.thinks)
            writer = Writer.of(a.name, a.spec, a.most, row.asking.index, matcher, *thought)
            row.begins.setdefault(int(paths[0][-1]), []).append(writer)
            row.adapter_of[a.name] = a.adapter
            return
        for path, label in zip(paths, a.labels, strict=True):
            wanted = {int(place): token for place, token in zip(path[length - 1 :], label, strict=True)}
            row.scores.append(_Score(a.name, empty, wanted))

    def _slot(self, handle: Causal, cells: int, spare: int) -> int | None:
        """A slot of so many cells or more; None where there is none now, or where but ``spare`` would be left."""
        pool, rows = handle.pool, list(handle.rows.values())
        taken = {row.slot for row in rows}
        free = [slot for slot in range(pool.slots) if slot not in taken]
        # Less room than before: then others need the memory, and it is given back once fewer rows are inside.
        allowed = not rows or (len(rows) + 1) * pool.cells <= handle.room
        if free and allowed and (len(free) > spare or not rows) and cells <= pool.cells:
            return free[0]
        # Other lengths than before: slots as long as the longest row needs, as many as there is memory for.
        longest = _longest(rows, cells)
        slots = max(1, min(handle.room // longest, int(handle.decode_slots * (1 + AHEAD)) + 1))
        if slots <= len(rows) + spare and rows:
            return None
        while True:
            try:
                with torch_errors():
                    self._lay_out(handle, slots, longest)
                return len(rows)
            except OutOfMemory:
                # Fewer rows at once need less; a single one more is the least.
                if slots <= len(rows) + 1:
                    raise
                slots = max(len(rows) + 1, slots // 2)

    def _lay_out(self, handle: Causal, slots: int, cells: int) -> None:
        """Slots of so many cells, and of these rows the first ones."""
        rows = list(handle.rows.values())
        handle.pool.lay_out(slots, cells, [row.slot for row in rows])
        for number, row in enumerate(rows):
            row.slot = number
            row.decoding = {
                key: (writer, _sized(seen, cells), position)
                for key, (writer, seen, position) in row.decoding.items()
            }

    def _grammar(self, handle: Causal) -> Grammar:
        if handle.grammar is None:
            vocabulary = int(handle.model.get_input_embeddings().weight.shape[0])
            handle.grammar = Grammar(handle.tokens.json, vocabulary, sorted(handle.tokens.ends))
        return handle.grammar

    # -- one step

    def _load(self, handle: Causal, budget: int) -> _StepTokens:
        """Which tokens run: a decode step of each answer, and prefill as far as the budget goes."""
        load = _StepTokens()
        for row in handle.rows.values():
            for cell, (key, (writer, _, position)) in enumerate(row.decoding.items(), row.cell):
                load.decode.append((row, key, load.tokens))
                load.add([writer.ids[-1]], [position], row.slot, [cell])
                load.adapters.append(row.adapter_of[writer.name])
        left = max(budget - load.tokens, 1)
        waiting = sorted((r for r in handle.rows.values() if len(r.todo)), key=lambda r: not r.urgent)
        for row in waiting:
            places = row.todo[:left]
            left -= len(places)
            lo = load.tokens
            load.add(
                row.tree.tokens[places].tolist(),
                row.tree.positions[places].tolist(),
                row.slot,
                places.tolist(),
            )
            load.adapters += [row.adapters[place] for place in places.tolist()]
            load.prefill.append((row, places, lo))
            if left <= 0:
                break
        load.shares = [(row, 1) for row, _, _ in load.decode] + [
            (row, len(places)) for row, places, _ in load.prefill
        ]
        return load

    def _forward(self, handle: Causal, load: _StepTokens) -> torch.Tensor:
        """Run the tokens. (wanted, vocabulary) logits in fp32, of the tokens that something comes behind."""
        device = handle.device
        line = onto(np.array([load.ids, load.positions, load.slots, load.cells], np.int64), device)
        runs, prefills = None, []
        if handle.varlen is None:
            prefills = [
                b for row, places, lo in load.prefill for b in self._prefills(handle, row, places, lo)
            ]
        elif load.prefill:
            parts = [p for row, places, lo in load.prefill for p in pieces(row.tree, places, lo, row.slot)]
            runs = Runs.of(parts, handle.pool.cells, device, handle.varlen)
        layout = kv.StepLayout(
            pool=handle.pool,
            slots=line[2],
            cells=line[3],
            prefills=prefills,
            decode=self._decode(handle, load) if load.decode else None,
            windows=handle.windows,
            runs=runs,
        )
        for row, _, at in load.decode:
            load.wanted.append((row, at))
        for row, places, lo in load.prefill:
            behind = row.behind
            load.wanted += [(row, lo + i) for i, place in enumerate(places.tolist()) if place in behind]
        handle.adapters.tokens = [
            (name, onto(np.array([i for i, one in enumerate(load.adapters) if one == name]), device))
            for name in sorted(set(load.adapters) - {""})
        ]
        keep = onto(np.array([at for _, at in load.wanted], np.int64), device)
        found = handle.model(
            input_ids=line[:1],
            position_ids=line[1:2],
            use_cache=False,
            logits_to_keep=keep if len(keep) else 1,
            layout=layout,
        )
        logits: torch.Tensor = found.logits[0].float()
        return logits

    def _prefills(self, handle: Causal, row: _Row, places: Ints, lo: int) -> Iterator[kv.PrefillSpan]:
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

    def _decode(self, handle: Causal, load: _StepTokens) -> kv.DecodeTokens:
        by_slot: dict[int, list[tuple[int, Bools]]] = {}
        for row, key, at in load.decode:
            by_slot.setdefault(row.slot, []).append((at, row.decoding[key][1]))
        slots = max(by_slot) + 1
        answers = max(map(len, by_slot.values()))
        # To a multiple of eight, as kernels of a GPU want masks: slots have that many.
        eight = 1 if handle.device == "cpu" else 8
        cells = -(-(1 + max(load.cells[at] for _, _, at in load.decode)) // eight) * eight
        tokens = np.zeros((slots, answers), np.int64)
        seen = np.zeros((slots, answers, cells), bool)
        seen[:, :, 0] = True  # where there is no answer, something must be attended to
        places, targets = [], []
        near = np.zeros_like(seen) if handle.window is not None else None
        for slot, here in by_slot.items():
            for number, (at, sees) in enumerate(here):
                tokens[slot, number] = at
                seen[slot, number] = sees[:cells]
                seen[slot, number, load.cells[at]] = True
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

    def _told(
        self, handle: Causal, load: _StepTokens, logits: torch.Tensor
    ) -> tuple[list[tuple[Writer, int]], list[tuple[_Score, float]]]:
        """The next token of each answer that goes on or begins, and what is to be added to labels' scores."""
        number_of = {at: number for number, (_, at) in enumerate(load.wanted)}
        writing = [(number_of[at], row.decoding[key][0]) for row, key, at in load.decode]
        scored: list[tuple[int, int]] = []
        scores: list[_Score] = []
        for row, places, lo in load.prefill:
            for at, place in enumerate(places.tolist(), lo):
                if (number := number_of.get(at)) is None:
                    continue
                here = [score for score in row.scores if place in score.wanted]
                scores += here
                scored += [(number, score.wanted[place]) for score in here]
                writing += [(number, writer) for writer in row.begins.get(place, ())]
        if not writing and not scored:
            settle(handle.device)
            return [], []
        tokens, logps = outcome(logits, writing, scored, handle.grammar)
        return [(w, token) for (_, w), token in zip(writing, tokens, strict=True)], list(
            zip(scores, logps, strict=True)
        )

    def _take(
        self,
        handle: Causal,
        load: _StepTokens,
        written: Sequence[tuple[Writer, int]],
        scored: Sequence[tuple[_Score, float]],
    ) -> None:
        """Write the next token of each answer, begin those whose prompt has been read, and add up labels' scores."""
        for score, logp in scored:
            score.logp += logp
        for writer, token in written:
            writer.take(token, handle.tokens.ends, handle.tokens.words)
        for row, key, at in load.decode:
            writer, seen, position = row.decoding[key]
            seen[load.cells[at]] = True
            row.decoding[key] = (writer, seen, position + 1)
            row.cell = load.cells[at] + 1
            if writer.finish:
                row.ended.append(writer)
                del row.decoding[key]
        for row, places, _ in load.prefill:
            row.todo = row.todo[len(places) :]
            self._cache_prefixes(handle, row)
            for place in row.begins.keys() & set(places.tolist()):
                self._begin(handle, row, place)

    def _begin(self, handle: Causal, row: _Row, place: int) -> None:
        """The answers behind this place of the row's tree have their first token."""
        for writer in row.begins.pop(place):
            if writer.finish:
                row.ended.append(writer)
                continue
            seen = _sized(row.tree.seen(np.array([place]))[0], handle.pool.cells)
            row.decoding[id(writer)] = (writer, seen, int(row.tree.positions[place]) + 1)

    def _cache_prefixes(self, handle: Causal, row: _Row) -> None:
        """Put fixed prefixes that have been computed into the cache; the least used ones go."""
        next_place = int(row.todo[0]) if len(row.todo) else len(row.tree)
        for prefix, places in list(row.prefixes.items()):
            if int(places[-1]) < next_place:
                # Where there is no memory for it, it is computed again.
                with contextlib.suppress(OutOfMemory), torch_errors():
                    cells = onto(places, handle.device)
                    handle.prefix_cache[row.tenant, prefix] = handle.pool.read(row.slot, cells)
                del row.prefixes[prefix]
        self._forget_oldest(handle)

    def _forget_oldest(self, handle: Causal) -> None:
        while len(handle.prefix_cache) > 1 and _cached_tokens(handle) > handle.room * CACHE_SHARE:
            handle.prefix_cache.popitem(last=False)

    # -- the end of a row

    def _end(self, handle: Causal, row: _Row) -> Ended:
        del handle.rows[row.ticket]
        written = {writer.name: writer for writer in row.ended}
        for a in row.asking.tasks:
            if found := tuple(s.logp for s in row.scores if s.task == a.name and s.empty):
                row.priors[a.name] = found
                handle.priors.put((row.tenant, a.prior), found)
        weights = {a.name: row.computed[a.name] + _written(written.get(a.name)) for a in row.asking.tasks}
        total = sum(weights.values()) or 1
        columns = {}
        spent = {}
        for a in row.asking.tasks:
            columns[a.name] = self._column(handle, row, a, written)
            out = _written(written.get(a.name))
            cached = row.read[a.name] - row.computed[a.name]
            spent[a.name] = (row.read[a.name], cached, out, row.seconds * weights[a.name] / total)
        return Ended(row.ticket, columns, spent)

    def _column(self, handle: Causal, row: _Row, a: TaskPrompt, written: Mapping[str, Writer]) -> Column:
        if a.labels:
            found = [s.logp for s in row.scores if s.task == a.name and not s.empty]
            prior = row.priors.get(a.name)
            scores = np.array(found, np.float32) - (np.array(prior, np.float32) if prior else 0)
            return label_column(scores[None], every_score=bool(a.spec.get("scores")))
        return json_column(row.failed.get(a.name) or written[a.name].answer(handle.tokens.words))

    def _warm_up(self, handle: Causal) -> None:
        """One token through all of it: what allocates or compiles does so before a row waits for it."""
        prompt = Prompt([sorted(handle.tokens.ends)[0] if handle.tokens.ends else 0], 0, (0, 1))
        spec = {"kind": "generate", "max_tokens": 1}
        row = Prepared(0, 1, False, RowPrompts((TaskPrompt("", spec, prompt, most=1),), 0))
        self.admit(Pass(handle, (), 0), row, None, urgent=False)
        while handle.rows:
            self.step(handle, 16)
        handle.pool.lay_out(0, 0)


@dataclass(slots=True)
class _StepTokens:
    """The tokens of one step."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    #: (row, answer, where in the step).
    decode: list[tuple[_Row, int, int]] = field(default_factory=list)
    #: (row, places of its tree, where in the step the first of them stands).
    prefill: list[tuple[_Row, Ints, int]] = field(default_factory=list)
    #: (row, where in the step): tokens that something comes behind.
    wanted: list[tuple[_Row, int]] = field(default_factory=list)
    shares: list[tuple[_Row, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def add(self, ids: list[int], positions: list[int], slot: int, cells: list[int]) -> None:
        self.ids += ids
        self.positions += positions
        self.slots += [slot] * len(ids)
        self.cells += cells


def json_column(answer: bytes | CellError) -> Column:
    """A column of one row: a JSON value, or why there is none."""
    if isinstance(answer, CellError):
        return Column(kind="json", status=bytes([ERROR]), arrays=_json_arrays(b""), errors={0: answer})
    return Column(kind="json", status=bytes([OK]), arrays=_json_arrays(answer))


def _json_arrays(raw: bytes) -> dict[str, bytes]:
    return {"offsets": struct.pack("<2i", 0, len(raw)), "bytes": raw}


def _adapters(grown: Tree, kinds: Sequence[str]) -> list[str]:
    """Of each place of a tree, what computes it."""
    found = [""] * len(grown)
    for path, kind in zip(grown.paths, kinds, strict=True):
        for place in path.tolist() if kind else ():
            found[place] = kind
    return found


def _computed_by_another(handle: Causal, tenant: str, prefix: PrefixKey) -> bool:
    return any(row.tenant == tenant and prefix in row.prefixes for row in handle.rows.values())


def _over(a: TaskPrompt, context: int, answer: int = 0) -> int:
    """Tokens by which a prompt, its labels and an answer of at least one token (or ``answer``) are too many."""
    behind = max((len(label) - 1 for label in a.labels), default=max(1, min(answer, a.most)))
    return len(a.prompt.ids) + behind - context


def _bounded(a: TaskPrompt, context: int) -> TaskPrompt:
    """With no more tokens to write than the context has room for."""
    room = context - len(a.prompt.ids)
    return a if a.labels or a.most <= room else replace(a, most=room)


def _own_tokens(asked: Sequence[TaskPrompt]) -> int:
    """Those of the task with the most.

    What is the same for every row costs each of them the same, and says nothing of how much longer one takes.
    """
    return max(1, *(a.own_tokens for a in asked))


def _cached_tokens(handle: Causal) -> int:
    return sum(len(ids) for _, (_, ids) in handle.prefix_cache)


def _longest(rows: Sequence[_Row], cells: int = 1) -> int:
    """Cells that a slot must have for the longest of these rows, and for one of ``cells``."""
    longest = max([cells, *(len(r.tree) + sum(a.most for a in r.asking.tasks) for r in rows)])
    return -(-longest // kv.STEP) * kv.STEP


def _written(writer: Writer | None) -> int:
    return len(writer.ids) if writer is not None else 0


def _sized(seen: Bools, cells: int) -> Bools:
    sized = np.zeros(cells, bool)
    n = min(cells, len(seen))
    sized[:n] = seen[:n]
    return sized


def _last(seen: Bools, window: int) -> Bools:
    """Of the cells that are attended to, the newest so many: an answer's cells are in the order of its positions."""
    kept = np.flatnonzero(seen)[-window:]
    near = np.zeros_like(seen)
    near[kept] = True
    return near


def _windows(config: Any) -> tuple[int | None, ...]:
    """Of each layer the tokens of its sliding window, by a model's configuration."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
