"""A job's rows as a queue: the newest ones, sorted by an answer, each with what was answered, in words."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from motet.errors import InvalidJob
from motet.messages.jobs import JobRecord
from motet.protocol.columns import Column
from motet.tasks import short
from motet.templates import Reference, Selector, is_placeholder, part_of, resolved
from scheduler.answers import as_values, told
from scheduler.api.records import describe
from scheduler.api.resources import Resources
from scheduler.blocks import decode_block, media_in, medium_key
from scheduler.store import media
from scheduler.store.jobs import job_entry
from scheduler.store.registry import secret_of
from scheduler.store.results import ShownTask, newest_blocks, read_columns, shown

#: Newest rows that are sorted: more take longer than the page's two seconds. And of these, those that it shows.
LOOKED, SHOWN = 1000, 100
#: Characters of an answer in words.
_TOLD = 160


@dataclass(frozen=True, slots=True)
class QueuedRow:
    """A row of the queue."""

    index: int
    #: What it is sorted by; None where it has none.
    place: Any
    #: Task -> its answer in words, or why there is none.
    answers: Mapping[str, str]
    #: Its pictures in small, each a JPEG in base64, where its sender made any.
    thumbs: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The newest rows of a job whose answers are all there, sorted."""

    job: JobRecord
    #: What it is sorted by; "": nothing, and the newest stand first.
    by: str
    tasks: Sequence[str]
    rows: Sequence[QueuedRow]
    #: Rows that were looked at.
    looked: int


def queue_of(use: Resources, tenant: UUID, job: UUID, by: str) -> Queue:
    """Raises NotFound, and InvalidJob where ``by`` names no answer."""
    with use.database.transaction() as connection:
        every = shown(connection, tenant, job)
        record = describe(job_entry(connection, tenant, job))
        # Vectors say nothing in words. A head has the dimension of its trunk's, and answers with none.
        names = [t.name for t in every.tasks if record.tasks[t.name]["column"]["kind"] != "vector"]
        meant = _meant(by, names)
        of = replace(every, tasks=tuple(task for task in every.tasks if task.name in names))
        blocks = newest_blocks(connection, of, LOOKED)
        columns = read_columns(connection, sorted({c for block in blocks for c in block.columns}))
    rows: list[QueuedRow] = []
    for block in blocks:
        # A block that was removed meanwhile has none.
        tasks = [(t, columns[c]) for t, c in zip(of.tasks, block.columns, strict=True) if c in columns]
        rows += list(reversed(_rows(block.first_row, block.n_rows, tasks, record.tasks, meant)))
    rows = rows[:LOOKED]
    if meant is not None:
        rows.sort(key=lambda row: _first(row.place))
    looked, rows = len(rows), rows[:SHOWN]
    small = _in_small(use, tenant, job, [row.index for row in rows])
    rows = [replace(row, thumbs=small.get(row.index, ())) for row in rows]
    return Queue(job=record, by=by, tasks=[t.name for t in of.tasks], rows=rows, looked=looked)


def _in_small(use: Resources, tenant: UUID, job: UUID, rows: Sequence[int]) -> dict[int, list[str]]:
    """Row -> its pictures in small, of the rows that have any."""
    wanted = set(rows)
    keys: dict[int, list[bytes]] = {}
    with use.database.transaction() as connection:
        blocks = media.blocks_with_media(connection, job, rows)
        secret = secret_of(connection, tenant) if blocks else b""
        for first_row, payload in blocks:
            columns = decode_block(payload).values
            for at, values in enumerate(zip(*columns.values(), strict=True), first_row):
                if at in wanted:
                    keys[at] = [medium_key(secret, one.sha256) for one in media_in(values)]
        found = media.thumbs(connection, tenant, {key for of_row in keys.values() for key in of_row})
    small = {key: base64.b64encode(data).decode() for key, data in found.items()}
    return {row: told for row, of_row in keys.items() if (told := [small[k] for k in of_row if k in small])}


def _meant(by: str, names: Sequence[str]) -> Reference | None:
    if not by:
        return None
    meant = resolved(by, names) if is_placeholder(by) else None
    if meant is None or meant.name not in names:
        raise InvalidJob.of(
            "by",
            short(by),
            f"an answer of this job, or a part of one: {', '.join(map(short, names[:8])) or 'it has none'}",
            "name one, such as by=urgency.points, or leave it out",
        )
    return meant


def _rows(
    first: int,
    n: int,
    tasks: Sequence[tuple[ShownTask, Column]],
    specs: Mapping[str, Mapping[str, Any]],
    meant: Reference | None,
) -> list[QueuedRow]:
    values = {task.name: as_values(column, task.labels) for task, column in tasks}
    kinds = {task.name: column.kind for task, column in tasks}
    found = []
    for at in range(n):
        place = None
        if meant is not None and meant.name in values:
            place = _place(values[meant.name][at], meant.steps, kinds[meant.name], specs[meant.name])
        answers = {
            task.name: _words(column, at, values[task.name][at], specs[task.name]) for task, column in tasks
        }
        found.append(QueuedRow(first + at, place, answers))
    return found


def _place(value: Any, steps: tuple[Selector, ...], kind: str, spec: Mapping[str, Any]) -> Any:
    """What a row is sorted by: a number or a text, which of a label is its name; None where it has neither."""
    found = part_of(value, steps) if steps else told(value, kind, spec)
    return found if isinstance(found, bool | int | float | str) else None


def _words(column: Column, at: int, value: Any, spec: Mapping[str, Any]) -> str:
    if value is None and (error := column.errors.get(at)):
        return error.error
    if column.kind == "spans" and value is not None:
        value = [one["label"] for one in value]
    text = _plain(told(value, column.kind, spec))
    return text if len(text) <= _TOLD else text[: _TOLD - 1] + "…"


def _plain(value: Any) -> str:
    """``level high · points 4``, ``a, b``, ``0.25``."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}"
        case Mapping():
            return " · ".join(
                f"{name} {_plain(one)}" for name, one in value.items() if one not in (None, [], "")
            )
        case list():
            return ", ".join(map(_plain, value))
    return str(value)


def _first(place: Any) -> tuple[int, float, str]:
    """The largest number first, then texts by letter, then rows without either."""
    if isinstance(place, bool | int | float):
        # Not as a float: an int of JSON may be larger than any.
        return (0, -place, "")
    return (1, 0.0, place) if isinstance(place, str) else (2, 0.0, "")
