"""Payloads: what a worker is sent for a leased sub-task. Keeps the blocks and passes that it read lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from motet.manifest import Manifest
from motet.tasks import render
from motet.wire import Assignment, TaskOrder
from scheduler.blocks import decode_block, row_order
from scheduler.fairness import INTERACTIVE
from scheduler.store import leases
from scheduler.store.database import Database
from scheduler.store.leases import Leased

#: Decoded blocks kept between payloads, in bytes of their texts: those of a step, and those that are carved on.
_CACHE_BYTES = 16 * 1024 * 1024
_PASSES_KEPT = 256
#: Blocks fetched and decoded at once: one query for most steps, and never a step's worth of large documents.
_BLOCKS_AT_ONCE = 64


@dataclass
class Payloads:
    """Builds assignments; keeps the blocks and passes it decoded lately."""

    database: Database

    def __post_init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], _Block] = OrderedDict()
        self._passes: OrderedDict[tuple[str, int], _Pass] = OrderedDict()

    def assignments(self, leased: Sequence[Leased]) -> dict[str, list[Assignment]]:
        """Worker -> the messages of its leased sub-tasks, in order; without those whose job was removed meanwhile."""
        by_worker: dict[str, list[Assignment]] = {}
        for group in _groups(leased):
            passes = self._passes_of({(item.job, item.pass_number) for item in group})
            blocks = self._blocks_of({(item.job, r.block) for item in group for r in item.carved.ranges})
            for item in group:
                a = _assignment(item, passes.get((item.job, item.pass_number)), blocks)
                if a is not None:
                    by_worker.setdefault(item.worker, []).append(a)
        return by_worker

    def _passes_of(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], _Pass]:
        missing = wanted - self._passes.keys()
        if missing:
            with self.database.transaction() as connection:
                found = {where: leases.pass_of(connection, *where) for where in missing}
            self._passes.update((where, _read_pass(*p)) for where, p in found.items() if p is not None)
        passes = {where: self._passes[where] for where in wanted if where in self._passes}
        for where in passes:
            self._passes.move_to_end(where)
        while len(self._passes) > _PASSES_KEPT:
            self._passes.popitem(last=False)
        return passes

    def _blocks_of(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], _Block]:
        missing = wanted - self._blocks.keys()
        if missing:
            with self.database.transaction() as connection:
                found = leases.block_texts(connection, missing)
            for where, (payload, order) in found.items():
                self._blocks[where] = _Block(decode_block(payload), row_order(order), len(payload) * 4)
        blocks = {where: self._blocks[where] for where in wanted if where in self._blocks}
        for where in blocks:
            self._blocks.move_to_end(where)
        held = sum(block.bytes for block in self._blocks.values())
        while held > _CACHE_BYTES and len(self._blocks) > len(wanted):
            held -= self._blocks.popitem(last=False)[1].bytes
        return blocks


def _groups(leased: Sequence[Leased]) -> Iterator[list[Leased]]:
    """Consecutive sub-tasks that read about as many blocks as may be decoded at once."""
    group: list[Leased] = []
    blocks: set[tuple[str, int]] = set()
    for item in leased:
        if len(blocks) >= _BLOCKS_AT_ONCE:
            yield group
            group, blocks = [], set()
        group.append(item)
        blocks.update((item.job, r.block) for r in item.carved.ranges)
    if group:
        yield group


def _assignment(
    leased: Leased, p: _Pass | None, blocks: Mapping[tuple[str, int], _Block]
) -> Assignment | None:
    """The message of a leased sub-task; None where its pass or a block of it is gone."""
    if p is None or any((leased.job, r.block) not in blocks for r in leased.carved.ranges):
        return None
    texts: list[str] = []
    for r in leased.carved.ranges:
        block = blocks[leased.job, r.block]
        texts += (
            render(p.input, {f: column[i] for f, column in block.columns.items()})
            for i in block.order[r.lo : r.hi]
        )
    return Assignment(
        subtask=leased.subtask,
        attempt=leased.attempt,
        nonce=leased.nonce,
        job=leased.job,
        tenant=p.tenant,
        pass_kind=p.kind,
        model=p.model,
        numerics=p.numerics,
        max_tokens=p.max_tokens,
        tasks=tuple(order for number, order in p.tasks if leased.carved.todo >> number & 1),
        texts=tuple(texts),
        exclusive=leased.carved.exclusive,
        interactive=p.priority == INTERACTIVE,
        predicted_s=leased.predicted_s,
    )


def _read_pass(row: Any, tasks: Sequence[Any]) -> _Pass:
    return _Pass(
        kind=row.kind,
        numerics=row.numerics,
        max_tokens=row.max_tokens,
        input=row.input,
        model=Manifest.from_json(row.manifest),
        tenant=str(row.tenant_id),
        priority=row.priority,
        tasks=tuple(
            (t.number, TaskOrder(name=t.name, spec=t.spec, manifest=Manifest.from_json(t.manifest)))
            for t in tasks
        ),
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """One block, decoded."""

    columns: Mapping[str, Sequence[str]]
    order: Sequence[int]
    #: About what it takes here.
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    kind: str
    numerics: Literal["fast", "exact"]
    max_tokens: int
    input: str
    model: Manifest
    tenant: str
    priority: int
    tasks: tuple[tuple[int, TaskOrder], ...]
