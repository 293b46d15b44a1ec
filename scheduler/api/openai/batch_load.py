"""A batch becomes a job: its file is checked, and its lines land as rows in the order in which they share most.

All of it may be done again from the start, by any process: the same file gives the same parts, which land once.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from motet.errors import InvalidJob
from motet.messages.jobs import Submission
from motet.protocol.beginnings import common_prefix
from motet.protocol.values import Value, byte_lengths
from motet.states import Skip
from motet.tasks import condition_of
from scheduler.api.answer_schemas import schema_problems
from scheduler.api.openai.beside import ANSWER
from scheduler.api.openai.counted_lines import LineNote
from scheduler.api.openai.lines import (
    FileSurvey,
    Find,
    JobTasks,
    LineKind,
    TokenReaders,
    job_tasks,
    line_at,
    read_again,
)
from scheduler.api.openai.requests import ASKED, DOCUMENTS, SERVED, AskedRequest, task_of
from scheduler.api.opening import planned_with, with_models
from scheduler.api.resources import Resources
from scheduler.api.submissions import CheckedSubmission, new_job
from scheduler.blocks import IncomingPart, blocks_of
from scheduler.store import landing, opening
from scheduler.store.batches import Owned

#: Field of a row that no task reads: on the first row of a request `LineNote` as JSON, "" on its others.
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
    made = job_tasks(found)
    job = _opened(use, owned, found, made)
    with use.database.transaction() as connection:
        owned.has_job(connection, job)
        facts = landing.loading(connection, batch.tenant_id, job)
    parts = rows = 0
    for number, (part, digest) in enumerate(_parts(path, found, find, reads, made, facts.fields)):
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


def check_tasks(use: Resources, asked: AskedRequest) -> None:
    """Raises InvalidJob where a chat and the tasks beside it cannot be asked together, Overloaded."""
    if wrong := schema_problems(asked.tasks):
        raise InvalidJob(wrong)
    tasks = {ANSWER: task_of(asked.endpoint, asked.model, pairs=asked.pairs), **asked.tasks}
    together = CheckedSubmission(said=Submission(tasks={}), tasks=tasks, digest=b"")
    together, models = with_models(use, together)
    planned_with(together, None, models)


def _opened(use: Resources, owned: Owned, found: FileSurvey, made: JobTasks) -> UUID:
    """The batch's job, made now or by whoever worked on the batch before."""
    batch = owned.batch
    use.door.admit(interactive=False)
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
    asked = CheckedSubmission(said=said, tasks=made.tasks, digest=digest)
    asked, models = with_models(use, asked)
    planned = planned_with(asked, None, models)
    job = new_job(uuid.uuid4(), batch.tenant_id, asked, planned, f"openai {batch.id}")
    with use.database.transaction() as connection:
        return opening.open_job(
            connection,
            replace(job, fields=(*job.fields, LINE)),
            max_active_jobs=use.settings.max_active_jobs,
        )


def _parts(
    path: Path,
    found: FileSurvey,
    find: Find,
    reads: TokenReaders,
    made: JobTasks,
    fields: tuple[str, ...],
) -> Iterator[tuple[IncomingPart, bytes]]:
    """The rows as parts, each with its digest. The same file gives the same parts."""
    columns: dict[str, list[Value]] = {name: [] for name in fields}
    kinds: list[LineKind] = []
    size = 0
    for kind, values in _rows(path, found, find, reads, made):
        if kinds and (len(kinds) >= _PART_ROWS or size > _PART_BYTES):
            yield _part(columns, kinds, made)
            columns, kinds, size = {name: [] for name in fields}, [], 0
        kinds.append(kind)
        for name, column in columns.items():
            # Nothing of a task that is not this row's.
            value = values.get(name, [] if name == DOCUMENTS else "")
            column.append(value)
            size += sum(byte_lengths([value]))
    if kinds:
        yield _part(columns, kinds, made)


def _rows(
    path: Path, found: FileSurvey, find: Find, reads: TokenReaders, made: JobTasks
) -> Iterator[tuple[LineKind, Mapping[str, Value]]]:
    """(kind of its line, field -> value) of every row, lines that begin alike side by side."""
    with path.open("rb") as file:
        for place in found.order:
            line = read_again(line_at(file, place), find, reads)
            asked = line.asked
            kind = found.kind_of(asked)
            rows = asked.rows()
            numbers = made.numbers[kind]
            note = LineNote(numbers[0], (place, *found.equal.get(place, ())), len(numbers) - 1, len(rows))
            told = json.dumps(note, separators=(",", ":"))
            for row in rows:
                yield kind, {**row, LINE: told}
                told = ""


def _part(
    columns: Mapping[str, list[Value]], kinds: Sequence[LineKind], made: JobTasks
) -> tuple[IncomingPart, bytes]:
    names, asked = list(made.tasks), columns[ASKED]
    bad_fields = {}
    # To what no language model writes a common beginning is worth nothing.
    written = {kind for kind in made.numbers if "text" in SERVED[kind.endpoint]}
    alike = [
        common_prefix(str(asked[row - 1]), str(asked[row]))
        if row and kind in written and kinds[row - 1] == kind
        else 0
        for row, kind in enumerate(kinds)
    ]
    if len(made.numbers) > 1:
        for kind, numbers in made.numbers.items():
            others = {row: _OTHERS_ROW for row, its in enumerate(kinds) if its != kind}
            if others:
                bad_fields.update(dict.fromkeys((condition_of(names[number]) for number in numbers), others))
    tasks = [made.numbers[kind][0] for kind in kinds]
    digest = hashlib.sha256(json.dumps([tasks, columns], sort_keys=True).encode()).digest()
    return IncomingPart(columns=columns, bad_fields=bad_fields, alike=alike), digest
