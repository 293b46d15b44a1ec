"""Payloads: what a worker is sent for a leased sub-task. Keeps the blocks, passes and answers that it read lately."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

from cachetools import LRUCache

from motet.protocol.values import Value, plain_text
from motet.protocol.wire import Assignment, TaskOrder, texts_of
from motet.tasks import KINDS, stored_task
from motet.templates import placeholders, render, sole_placeholder
from scheduler.blocks import decode_block, row_order
from scheduler.policy.fairness import INTERACTIVE
from scheduler.readable import Readable, UpstreamAnswer
from scheduler.store import payload_rows
from scheduler.store.database import Database
from scheduler.store.leases import Leased
from scheduler.store.manifests import Manifests

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
    manifests: Manifests

    def __post_init__(self) -> None:
        self._blocks: LRUCache[tuple[str, int], _Block] = LRUCache(_CACHE_BYTES, attrgetter("bytes"))
        self._passes: LRUCache[tuple[str, int], _Pass] = LRUCache(_PASSES_KEPT)
        #: Of places whose pass may have an order of its own, since it reads other tasks' answers or has a condition.
        self._upstream: LRUCache[_Place, _Upstream] = LRUCache(_CACHE_BYTES, attrgetter("bytes"))

    def assignments(self, leased: Sequence[Leased]) -> dict[str, list[Assignment]]:
        """Worker -> the messages of its leased sub-tasks, in order; without those whose job was removed meanwhile."""
        by_worker: dict[str, list[Assignment]] = {}
        for group in _groups(leased):
            passes, blocks = self._passes_and_blocks(
                {(item.job, item.pass_number) for item in group},
                {(item.job, r.block) for item in group for r in item.carved.ranges},
            )
            upstream = self._upstream_of(
                {
                    (item.job, item.pass_number, r.block)
                    for item in group
                    if (p := passes.get((item.job, item.pass_number)))
                    for r in item.carved.ranges
                    if p.stored.own_order or ((b := blocks.get((item.job, r.block))) and b.partly_bad)
                }
            )
            for item in group:
                a = _assignment(item, passes.get((item.job, item.pass_number)), blocks, upstream)
                if a is not None:
                    by_worker.setdefault(item.worker, []).append(a)
        return by_worker

    def _passes_and_blocks(
        self, passes: set[tuple[str, int]], blocks: set[tuple[str, int]]
    ) -> tuple[dict[tuple[str, int], _Pass], dict[tuple[str, int], _Block]]:
        """Those that exist: out of the caches, or read together and kept for the next time."""
        known_passes, known_blocks = _kept(self._passes, passes), _kept(self._blocks, blocks)
        new_passes, new_blocks = passes - known_passes.keys(), blocks - known_blocks.keys()
        if new_passes or new_blocks:
            with self.database.reading() as connection:
                read, texts = payload_rows.passes_and_blocks(
                    connection, new_passes, new_blocks, self.manifests
                )
            known_passes |= _keep(self._passes, {where: _read_pass(p) for where, p in read.items()})
            known_blocks |= _keep(self._blocks, {where: _read_block(b) for where, b in texts.items()})
        return known_passes, known_blocks

    def _upstream_of(self, wanted: set[_Place]) -> dict[_Place, _Upstream]:
        found = _kept(self._upstream, wanted)
        if missing := wanted - found.keys():
            found |= _keep(self._upstream, self._read_upstream(missing))
        return found

    def _read_upstream(self, wanted: set[_Place]) -> dict[_Place, _Upstream]:
        with self.database.reading() as connection:
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


def _kept(cache: LRUCache[_K, _V], wanted: set[_K]) -> dict[_K, _V]:
    """What of that is in the cache."""
    return {where: cache[where] for where in wanted if where in cache}


def _keep(cache: LRUCache[_K, _V], new: dict[_K, _V]) -> dict[_K, _V]:
    """The same, which is in the cache from now on."""
    for where, one in new.items():
        # The cache refuses an entry that is larger than the whole of it: that one is read each time.
        if cache.getsizeof(one) <= cache.maxsize:
            cache[where] = one
    return new


def _assignment(
    leased: Leased,
    p: _Pass | None,
    blocks: Mapping[tuple[str, int], _Block],
    upstream: Mapping[_Place, _Upstream],
) -> Assignment | None:
    """The message of a leased sub-task; None where its pass or a block of it is gone."""
    if p is None or any((leased.job, r.block) not in blocks for r in leased.carved.ranges):
        return None
    o, stored = p.order(leased.carved.todo), p.stored
    says = {blocks[leased.job, r.block].say for r in leased.carved.ranges}
    # Two processes cannot both be told; the answers are whole without it.
    say = says.pop() if len(says) == 1 and stored.model.answers == "text" else ""
    texts: list[str] = []
    fields: dict[str, list[str]] = {written: [] for written in (*o.beside, *o.listed)}
    indices: list[int] = []
    values: list[Value] = []
    is_typed = bool(o.inputs)
    for r in leased.carved.ranges:
        block = blocks[leased.job, r.block]
        answers: Mapping[str, UpstreamAnswer] = {}
        order = block.order
        if stored.own_order or block.partly_bad:
            own = upstream.get((leased.job, leased.pass_number, r.block))
            if own is None:
                return None
            answers, order = own.answers, block.order if own.order is None else own.order
        readable = Readable(block.columns, block.typed, answers)
        rows = order[r.lo : r.hi]
        if o.inputs:
            columns = [readable.values(written, rows) for written in o.inputs]
            values += (dict(zip(o.inputs, row, strict=True)) for row in zip(*columns, strict=True))
            texts += [""] * len(rows)
        elif o.whole is not None:
            # Another task's answer is text.
            if o.typed and not readable.is_answer(o.whole):
                is_typed = is_typed or o.media or readable.is_typed(o.whole)
                values += readable.values(o.whole, rows)
            texts += readable.texts(o.whole, rows)
        else:
            read = {written: readable.texts(written, rows) for written in o.reads}
            texts += (
                render(o.template, {written: column[i] for written, column in read.items()})
                for i in range(len(rows))
            )
        for written in o.beside:
            fields[written] += readable.texts(written, rows)
        for listed in o.listed:
            fields[listed] += map(_as_json, readable.compared(listed[1:-1], rows))
        if o.drawn or say:
            indices += (block.first_row + i for i in rows)
    return Assignment(
        subtask=leased.subtask,
        attempt=leased.attempt,
        nonce=leased.nonce,
        job=leased.job,
        tenant=stored.tenant,
        pass_kind=stored.kind,
        model=stored.model,
        numerics=stored.numerics,
        max_tokens=stored.max_tokens,
        tasks=o.tasks,
        texts=tuple(texts),
        values=tuple(values) if is_typed else (),
        fields={name: tuple(of_rows) for name, of_rows in fields.items()},
        indices=tuple(indices),
        say=say,
        exclusive=leased.carved.exclusive,
        interactive=stored.priority == INTERACTIVE,
        predicted_s=leased.predicted_s,
        measured=leased.measured,
    )


def _order(template: str, tasks: tuple[TaskOrder, ...]) -> _Order:
    """``template``: of all the texts that these tasks read."""
    is_function = bool(tasks) and all(t.spec["kind"] == "function" for t in tasks)
    inputs = stored_task(tasks[0].spec).valued if tasks else ()
    reads_media = any(t.manifest.reads != "text" for t in tasks)
    return _Order(
        tasks,
        template,
        reads=placeholders(template),
        beside=() if inputs else _placeholders_beside_input(tasks),
        listed=tuple(dict.fromkeys(one for t in tasks if isinstance(one := t.spec.get("labels"), str))),
        inputs=inputs,
        whole=sole_placeholder(template),
        typed=is_function or reads_media,
        media=reads_media,
        # What a row says of its options may be a temperature.
        drawn=any(
            t.spec.get("temperature", 0) or t.spec.get("options") or t.spec["kind"] == "fit" for t in tasks
        ),
    )


def _placeholders_beside_input(tasks: Sequence[TaskOrder]) -> tuple[str, ...]:
    """What the tasks' other templates name, in order of first use: the worker renders these, since they differ by task.

    So it is with several texts, and with the numbers that heads read.
    """
    of_options = (
        written
        for order in tasks
        for template in KINDS[order.spec["kind"]].templates[1:]
        for written in placeholders(order.spec.get(template, ""))
    )
    texts = texts_of(tasks)
    of_texts = (written for text in texts if len(texts) > 1 for written in placeholders(text))
    of_heads = (written for order in tasks for written in order.spec.get("numbers") or ())
    return tuple(dict.fromkeys((*of_options, *of_texts, *of_heads)))


def _as_json(value: Value) -> str:
    """A row's labels, or whatever stands in their place: the worker says what is wrong with it."""
    return json.dumps(value, ensure_ascii=False, default=plain_text)


def _read_pass(stored: payload_rows.StoredPass) -> _Pass:
    tasks = ((t.number, TaskOrder(name=t.name, spec=t.spec, manifest=t.manifest)) for t in stored.tasks)
    return _Pass(stored, tuple(tasks))


def _read_block(stored: payload_rows.StoredBlock) -> _Block:
    columns = decode_block(stored.payload)
    return _Block(
        columns.texts(),
        typed={name: columns.values[name] for name in columns.types},
        order=row_order(stored.row_order),
        first_row=stored.first_row,
        partly_bad=stored.partly_bad,
        say=stored.say,
        bytes=len(stored.payload) * 4,
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
    #: The API process that reads along; "": none.
    say: str
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


@dataclass(frozen=True, slots=True)
class _Order:
    """Some tasks of a pass, and what their rows are sent as."""

    tasks: tuple[TaskOrder, ...]
    #: Their input; of heads that read several texts all of these.
    template: str
    #: Placeholders of their input, and of their other templates.
    reads: tuple[str, ...]
    beside: tuple[str, ...]
    #: Templates such as ``{candidates}``, which are one placeholder and list each row's labels: sent as JSON.
    listed: tuple[str, ...]
    #: What the model is given a dict of (``Task.valued``); (): it reads the input.
    inputs: tuple[str, ...]
    #: The placeholder that is the whole input; None: it is rendered.
    whole: str | None
    #: Functions and models that read media, which are given the values of such a field.
    typed: bool
    #: Only the latter: of every row, since none of their fields is text.
    media: bool
    #: An answer depends on where its row stands in the job.
    drawn: bool


#: Job, pass, block.
_Place = tuple[str, int, int]
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class _Pass:
    stored: payload_rows.StoredPass
    #: By number.
    tasks: tuple[tuple[int, TaskOrder], ...]
    #: By which of them are to be computed: mostly all of them, always.
    _orders: dict[int, _Order] = field(default_factory=dict)

    def order(self, todo: int) -> _Order:
        """What a sub-task with these tasks is made of."""
        known = self._orders.get(todo)
        if known is None:
            tasks = tuple(order for number, order in self.tasks if todo >> number & 1)
            known = self._orders[todo] = _order("".join(texts_of(tasks)) or self.stored.input, tasks)
        return known
