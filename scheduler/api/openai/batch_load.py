"""A batch becomes a job: its file is checked, and its lines land as rows in the order in which they share most.

All of it may be done again from the start, by any process: the same file gives the same parts, which land once.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from motet.messages.jobs import Submission
from motet.states import Skip
from motet.tasks import Task, condition_of
from scheduler.api.openai.lines import FileSurvey, Find, TokenReaders, line_at, read_again, tasks_of
from scheduler.api.openai.requests import ASKED, OPTIONS, SERVED, task_of
from scheduler.api.opening import models_of, planned_with
from scheduler.api.resources import Resources
from scheduler.api.submissions import CheckedSubmission, new_job
from scheduler.blocks import IncomingPart, blocks_of
from scheduler.policy.beginnings import common
from scheduler.store import landing, opening
from scheduler.store.batches import Owned

#: Field of a row that no task reads: on the first row of a request [its task, [places of the lines that ask it]] as JSON,
#: "" on its others.
LINE = "line"
#: Rows and bytes of a part: what this process holds at a time.
_PART_ROWS, _PART_BYTES = 4096, 8 * 1024 * 1024
#: What a cell says that is not asked of a row.
_OTHERS_ROW = (str(Skip.CONDITION), "the line asks for another model or endpoint")
#: Days for which the job is kept once it has ended, as its files are.
_KEPT_DAYS = 30.0


def load(
    use: Resources,
    owned: Owned,
    path: Path,
    found: FileSurvey,
    find: Find,
    reads: TokenReaders,
    goes_on: Callable[[], None],
) -> None:
    """Open the batch's job, land its rows and let it run.

    Raises Overloaded where no rows are taken now, Conflict where the job has ended meanwhile, NotMine.
    """
    batch = owned.batch
    names = list(tasks_of(found.models, found.tasks).values())
    job = _opened(use, owned, found)
    with use.database.transaction() as connection:
        owned.has_job(connection, job)
        facts = landing.loading(connection, batch.tenant_id, job)
    parts = rows = 0
    for number, (part, digest) in enumerate(_parts(path, found, find, reads, names, facts.fields)):
        goes_on()
        blocks = blocks_of(
            part,
            facts.readers,
            secret=facts.secret,
            block_rows=use.settings.block_rows,
            block_bytes=use.settings.block_bytes,
        )
        with use.database.transaction() as connection:
            landing.land_part(
                connection, facts, number, digest, blocks, first_row=rows, max_rows=use.settings.max_rows
            )
        parts, rows = parts + 1, rows + len(part)
    use.batch_jobs.put(job, True)
    with use.database.transaction() as connection:
        landing.close_job(connection, batch.tenant_id, job, parts=parts, rows=rows)
        owned.started(connection)


def _opened(use: Resources, owned: Owned, found: FileSurvey) -> UUID:
    """The batch's job, made now or by whoever worked on the batch before."""
    batch = owned.batch
    use.door.admit(interactive=False)
    several = len(found.tasks) > 1
    tasks: dict[str, Task] = {
        name: task_of(endpoint, ref, conditional=several)
        for (endpoint, ref), name in tasks_of(found.models, found.tasks).items()
    }
    said = Submission(
        tasks={},
        name=batch.id,
        priority=batch.priority,  # type: ignore[arg-type]
        # Where some answers are drawn, others are expected the next time.
        reuse=not found.drawn,
        bad_rows="error",
        deadline_s=max(1.0, batch.left_s),
        retention_days=_KEPT_DAYS,
    )
    digest = hashlib.sha256(batch.id.encode()).digest()
    asked = CheckedSubmission(said=said, tasks=tasks, digest=digest)
    made = new_job(
        uuid.uuid4(),
        batch.tenant_id,
        asked,
        planned_with(asked, None, models_of(use, asked)),
        f"openai {batch.id}",
    )
    with use.database.transaction() as connection:
        return opening.open_job(
            connection,
            replace(made, fields=(*made.fields, LINE)),
            max_active_jobs=use.settings.max_active_jobs,
        )


def _parts(
    path: Path,
    found: FileSurvey,
    find: Find,
    reads: TokenReaders,
    names: list[str],
    fields: tuple[str, ...],
) -> Iterator[tuple[IncomingPart, bytes]]:
    """The rows as parts, each with its digest. The same file gives the same parts."""
    written = frozenset(number for (endpoint, _), number in found.tasks.items() if SERVED[endpoint] == "text")
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    tasks: list[int] = []
    size = 0
    for task, values in _rows(path, found, find, reads):
        if tasks and (len(tasks) >= _PART_ROWS or size > _PART_BYTES):
            yield _part(columns, tasks, names, written)
            columns, tasks, size = {name: [] for name in fields}, [], 0
        tasks.append(task)
        for name, column in columns.items():
            column.append(values[name])
            size += len(values[name])
    if tasks:
        yield _part(columns, tasks, names, written)


def _rows(
    path: Path, found: FileSurvey, find: Find, reads: TokenReaders
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(task, field -> value) of every row, lines that begin alike side by side."""
    with path.open("rb") as file:
        for place in found.order:
            line = read_again(line_at(file, place), find, reads)
            asked = line.asked
            task = found.tasks[asked.endpoint, found.models[asked.model]]
            places = json.dumps([task, [place, *found.equal.get(place, ())]], separators=(",", ":"))
            for text, options in asked.rows():
                yield task, {ASKED: text, OPTIONS: options, LINE: places}
                places = ""


def _part(
    columns: Mapping[str, list[Any]], tasks: list[int], names: list[str], written: Collection[int]
) -> tuple[IncomingPart, bytes]:
    """``written``: the tasks that a language model answers; to others a common beginning is worth nothing."""
    asked, bad_fields = columns[ASKED], {}
    alike = [
        common(asked[row - 1], asked[row]) if row and task in written and tasks[row - 1] == task else 0
        for row, task in enumerate(tasks)
    ]
    if len(names) > 1:
        for number, name in enumerate(names):
            others = {row: _OTHERS_ROW for row, task in enumerate(tasks) if task != number}
            if others:
                bad_fields[condition_of(name)] = others
    digest = hashlib.sha256(json.dumps([tasks, columns], sort_keys=True).encode()).digest()
    return IncomingPart(columns=columns, bad_fields=bad_fields, alike=alike), digest
