"""Language models: many prompts about one text cost one prefill, and answers of all rows are written together.

The engine keeps rows of several sub-tasks and jobs in flight. A row's prompts form a tree (trees.py), so that what its
tasks begin with is computed once; what all rows of a task begin with is in a prefix cache, for one tenant each. A step
is a decode step of every answer and, under a budget, prefill of prompts that come in (Yu et al., Orca, OSDI 2022;
Agrawal et al., Sarathi-Serve, OSDI 2024); an answer that has ended leaves at once. Why not transformers' own continuous
batching: docs/decisions/0010.

This module is the engine's contract; row_prompts.py makes prompts of rows, rows.py lets them in, steps.py runs a step,
endings.py makes columns of a row that has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from motet.protocol.columns import CellError
from motet.protocol.manifest import KV_TOKENS, Manifest, decode_slots
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Pass, Prepared, Step
from workers.engines.causal import kv, steps
from workers.engines.causal.chat_tokens import ChatTokens, Prompt
from workers.engines.causal.endings import end
from workers.engines.causal.lora import Adapters
from workers.engines.causal.row_prompts import RowPrompts, TaskPrompt, prepared, sharing
from workers.engines.causal.rows import AHEAD, CACHE_SHARE, Causal, active_row, lay_out, slot_cells
from workers.engines.causal.runs import flash
from workers.engines.prompts import BAD_MESSAGES, BadMessages
from workers.engines.proof import among_others, not_in_one_line
from workers.engines.proved import check_language
from workers.engines.trunk import embedding_rows, free_cache, load_transformer, torch_errors

#: Share of a GPU's memory that keys and values leave free for a step. With less, long prompts run out of memory.
RESERVE_SHARE = 1 / 16


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
        key_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        heads = config.num_attention_heads
        handle = Causal(
            manifest=model,
            device=device,
            model=loaded,
            tokens=ChatTokens(files, embedding_rows(loaded)),
            adapters=Adapters(loaded, device),
            pool=kv.Pool([(key_heads, width, width)] * config.num_hidden_layers, loaded.dtype, device),
            vocabulary=int(loaded.get_input_embeddings().weight.shape[0]),
            groups=heads // key_heads,
            windows=_windows(config),
            decode_slots=decode_slots(device.partition(":")[0]),
            varlen=flash(device, loaded.dtype, heads, key_heads, width, width),
            room=KV_TOKENS,
        )
        try:
            try:
                self._warm_up(handle)
            except kv.UnsupportedByKernel:
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
        each, cached = pool.token_bytes, handle.prefix_cache.size
        handle.room = tokens_in_flight(more_mb, each, memory[0], (pool.tokens + cached) * each, memory[1])
        handle.bound_prefix_cache()
        if pool.tokens <= handle.room:
            return True
        rows = list(handle.rows.values())
        cells = slot_cells(rows)
        if len(rows) * cells > handle.room:
            return False
        try:
            with torch_errors():
                lay_out(handle, len(rows), cells)
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
                found.append(
                    prepared(handle.tokens, handle.manifest.max_tokens, pass_, row, text, ids, fields)
                )
            except BadMessages:
                found.append(BAD_MESSAGES)
        # Rows that bring their own prompts may be about one text; those of other tasks share what their task says.
        alone = len(pass_.tasks) == 1 and pass_.tasks[0].spec.get("options")
        return sharing(found) if alone else found

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
        made = active_row(handle, pass_.tenant, asking, ticket, urgent)
        if made is None:
            return False
        if pass_.deltas:
            made.tell()
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
            planned = steps.plan_step(handle, tokens)
            logits = steps.forward(handle, planned)
            found = steps.next_tokens(handle, planned, logits)
            steps.take(handle, planned, *found)
        took = time.perf_counter() - began
        for row, count in planned.shares:
            row.seconds += took * count / planned.tokens
        deltas = [delta for row in handle.rows.values() if row.told for delta in steps.deltas(handle, row)]
        ended = [end(handle, row) for row in list(handle.rows.values()) if row.done]
        return Step(
            ended, planned.tokens, min(1.0, decoding / handle.decode_slots) if asked else None, deltas
        )

    def _warm_up(self, handle: Causal) -> None:
        """One token through all of it: what allocates or compiles does so before a row waits for it."""
        prompt = Prompt([sorted(handle.tokens.ends)[0] if handle.tokens.ends else 0], 0, (0, 1))
        spec = {"kind": "generate", "max_tokens": 1}
        row = Prepared(0, 1, False, RowPrompts((TaskPrompt("", spec, prompt, most=1),), 0))
        self.admit(Pass(handle, (), 0), row, None, urgent=False)
        while handle.rows:
            self.step(handle, 16)
        handle.pool.lay_out(0, 0)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Of each layer the tokens of its sliding window, by a model's configuration."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
