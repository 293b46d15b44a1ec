"""Payloads: what a worker is sent for a leased sub-task. Keeps the blocks, passes and answers that it read lately."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, TypeVar

from cachetools import LRUCache

from motet.protocol.manifest import Manifest
from motet.protocol.values import Value
from motet.protocol.wire import Assignment, TaskOrder
from motet.tasks import KINDS
from motet.templates import placeholders, render, sole_placeholder
from scheduler.blocks import decode_block, row_order
from scheduler.policy.fairness import INTERACTIVE
from scheduler.readable import Readable, UpstreamAnswer
from scheduler.store import payload_rows
from scheduler.store.database import Database
from scheduler.store.leases import Leased

#: Decoded blocks kept between payloads, in bytes of their texts: those of a step, and those that are carved on.
_CACHE_BYTES = 16 * 1024 * 1024
#: What an entry of a cache takes beside its texts: without it, entries without a text would never be dropped.
_ENTRY_BYTES = 256
_PASSES_KEPT = 256
#: Blocks fetched and decoded at once: one query for most steps, and never a step's worth of large documents.
_BLOCKS_AT_ONCE = 64


@dataclass
class Payloads:
    """Builds assignments; keeps the blocks, passes and answers that it decoded lately."""

    database: Database

    def __post_init__(self) -> None:
        self._blocks: LRUCache[tuple[str, int], _Block] = LRUCache(_CACHE_BYTES, attrgetter("bytes"))
        self._passes: LRUCache[tuple[str, int], _Pass] = LRUCache(_PASSES_KEPT)
        #: Of places whose pass may have an order of its own, since it reads other tasks' answers or has a condition.
        self._upstream: LRUCache[_Place, _Upstream] = LRUCache(_CACHE_BYTES, attrgetter("bytes"))

    def assignments(self, leased: Sequence[Leased]) -> dict[str, list[Assignment]]:
        """Worker -> the messages of its leased sub-tasks, in order; without those whose job was removed meanwhile."""
        by_worker: dict[str, list[Assignment]] = {}
        for group in _groups(leased):
            passes = self._passes_of({(item.job, item.pass_number) for item in group})
            blocks = self._blocks_of({(item.job, r.block) for item in group for r in item.carved.ranges})
            upstream = self._upstream_of(
                {
                    (item.job, item.pass_number, r.block)
                    for item in group
                    if (p := passes.get((item.job, item.pass_number)))
                    for r in item.carved.ranges
                    if p.own_order or ((b := blocks.get((item.job, r.block))) and b.partly_bad)
                }
            )
            for item in group:
                a = _assignment(item, passes.get((item.job, item.pass_number)), blocks, upstream)
                if a is not None:
                    by_worker.setdefault(item.worker, []).append(a)
        return by_worker

    def _passes_of(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], _Pass]:
        return _kept_or_read(self._passes, wanted, self._read_passes)

    def _blocks_of(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], _Block]:
        return _kept_or_read(self._blocks, wanted, self._read_blocks)

    def _upstream_of(self, wanted: set[_Place]) -> dict[_Place, _Upstream]:
        return _kept_or_read(self._upstream, wanted, self._read_upstream)

    def _read_passes(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], _Pass]:
        with self.database.transaction() as connection:
            found = {where: payload_rows.pass_of(connection, *where) for where in wanted}
        return {where: _read_pass(*p) for where, p in found.items() if p is not None}

    def _read_blocks(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], _Block]:
        with self.database.transaction() as connection:
            found = payload_rows.block_texts(connection, wanted)
        blocks = {}
        for where, (payload, order, first_row, partly_bad) in found.items():
            stored = decode_block(payload)
            typed = {name: stored.values[name] for name in stored.types}
            blocks[where] = _Block(
                stored.texts(), typed, row_order(order), first_row, partly_bad, len(payload) * 4
            )
        return blocks

    def _read_upstream(self, wanted: set[_Place]) -> dict[_Place, _Upstream]:
        with self.database.transaction() as connection:
            found = payload_rows.upstream_answers(connection, wanted)
        upstream = {}
        for where, (order, answers) in found.items():
            size = _ENTRY_BYTES + sum(len(text) for a in answers for text in a.texts)
            size += sum(len(array) for a in answers for array in a.column.arrays.values())
            size += len(order or b"")
            own = None if order is None else row_order(order)
            upstream[where] = _Upstream({a.name: a for a in answers}, own, size)
        return upstream


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


def _kept_or_read(
    kept: LRUCache[_K, _V], wanted: set[_K], read: Callable[[set[_K]], dict[_K, _V]]
) -> dict[_K, _V]:
    """What is wanted and exists: out of the cache, or read and kept there for the next time."""
    found = {where: kept[where] for where in wanted if where in kept}
    if missing := wanted - found.keys():
        new = read(missing)
        for where, one in new.items():
            # The cache refuses an entry that is larger than the whole of it: that one is read each time.
            if kept.getsizeof(one) <= kept.maxsize:
                kept[where] = one
        found |= new
    return found


def _assignment(
    leased: Leased,
    p: _Pass | None,
    blocks: Mapping[tuple[str, int], _Block],
    upstream: Mapping[_Place, _Upstream],
) -> Assignment | None:
    """The message of a leased sub-task; None where its pass or a block of it is gone."""
    if p is None or any((leased.job, r.block) not in blocks for r in leased.carved.ranges):
        return None
    tasks = tuple(order for number, order in p.tasks if leased.carved.todo >> number & 1)
    beside = _placeholders_beside_input(tasks)
    named = any(order.spec.get("temperature", 0) or order.spec["kind"] == "fit" for order in tasks)
    is_function = bool(tasks) and all(order.spec["kind"] == "function" for order in tasks)
    inputs: Sequence[str] = (is_function and tasks[0].spec.get("inputs")) or ()
    # A function whose whole input is one field of the row is given its values; another task's answer is text.
    sole = sole_placeholder(p.input) if is_function and not inputs else None
    texts: list[str] = []
    fields: dict[str, list[str]] = {written: [] for written in beside}
    indices: list[int] = []
    values: list[Value] = []
    is_typed = bool(inputs)
    for r in leased.carved.ranges:
        block = blocks[leased.job, r.block]
        answers: _Upstream | None = None
        if p.own_order or block.partly_bad:
            answers = upstream.get((leased.job, leased.pass_number, r.block))
            if answers is None:
                return None
        readable = Readable(block.columns, block.typed, answers.answers if answers else {})
        order = block.order if answers is None or answers.order is None else answers.order
        rows = order[r.lo : r.hi]
        if inputs:
            columns = [readable.values(one, rows) for one in inputs]
            values += (dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True))
            texts += [""] * len(rows)
        else:
            if sole is not None and not readable.is_answer(sole):
                is_typed = is_typed or readable.is_typed(sole)
                values += readable.values(sole, rows)
            read = {one: readable.texts(one, rows) for one in placeholders(p.input)}
            texts += (
                render(p.input, {one: column[i] for one, column in read.items()}) for i in range(len(rows))
            )
        for written, of_rows in fields.items():
            of_rows += readable.texts(written, rows)
        if named:
            indices += (block.first_row + i for i in rows)
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
        tasks=tasks,
        texts=tuple(texts),
        values=tuple(values) if is_typed else (),
        fields={name: tuple(of_rows) for name, of_rows in fields.items()},
        indices=tuple(indices),
        exclusive=leased.carved.exclusive,
        interactive=p.priority == INTERACTIVE,
        predicted_s=leased.predicted_s,
        measured=leased.measured,
    )


def _placeholders_beside_input(tasks: Sequence[TaskOrder]) -> tuple[str, ...]:
    """What the tasks' other templates name, in order of first use: the worker renders these, since they differ by task."""
    return tuple(
        dict.fromkeys(
            written
            for order in tasks
            for template in KINDS[order.spec["kind"]].templates[1:]
            for written in placeholders(order.spec[template])
        )
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
        own_order=bool(row.needs) or row.condition is not None,
        tasks=tuple(
            (t.number, TaskOrder(name=t.name, spec=t.spec, manifest=Manifest.from_json(t.manifest)))
            for t in tasks
        ),
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """One block, decoded."""

    #: Field -> texts, by offset in the block.
    columns: Mapping[str, Sequence[str]]
    #: Of the fields that are not text alone, the values themselves.
    typed: Mapping[str, Sequence[Value]]
    order: Sequence[int]
    first_row: int
    #: Some values of it came in broken: a pass may have to leave out rows that others do not.
    partly_bad: bool
    #: About what it takes here.
    bytes: int


@dataclass(frozen=True, slots=True)
class _Upstream:
    """What a pass has of its own in one block: its rows, and what it reads of other tasks."""

    #: Task name -> its answers, by offset in the block.
    answers: Mapping[str, UpstreamAnswer]
    #: The order of the rows that it has to do; None: the block's own.
    order: Sequence[int] | None
    bytes: int


#: Job, pass, block.
_Place = tuple[str, int, int]
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    kind: str
    numerics: Literal["fast", "exact"]
    max_tokens: int
    input: str
    model: Manifest
    tenant: str
    priority: int
    #: It reads other tasks' answers, or has a condition: some rows of a block may not be its own.
    own_order: bool
    tasks: tuple[tuple[int, TaskOrder], ...]
