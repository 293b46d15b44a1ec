"""The files of a batch that has ended: every line of its file once, with its answer in one or its error in the other."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from sqlalchemy import Connection

from motet.protocol.columns import Column, cut
from scheduler.api.blob_folder import NewBlob
from scheduler.api.openai.answers import UsedTokens, batch_usage, body_of, cells_of, told_beside
from scheduler.api.openai.batch_load import LINE
from scheduler.api.openai.counted_lines import LineNote
from scheduler.api.openai.lines import Find, TokenReaders, line_at, lines_of, read_again
from scheduler.api.openai.refusals import DoorError
from scheduler.api.resources import Resources
from scheduler.blocks import decode_block
from scheduler.store import blobs, files
from scheduler.store.batches import Owned, answered_blocks
from scheduler.store.results import ShownTask, read_columns, shown
from scheduler.store.tables.doors import BatchState

#: Blocks read at once.
_BLOCKS = 4
#: Seconds for which files of batches are kept where their users say nothing.
KEPT_S = 30 * 86_400.0
#: Final state -> code and message of a line that was not done.
_NOT_DONE = {
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    "cancelled": ("batch_cancelled", "This request was not executed before the batch was cancelled."),
    "failed": ("batch_failed", "This request was not executed before the batch failed."),
    "completed": ("batch_failed", "This request was not executed."),
}


@dataclass
class _Files:
    """What was written so far."""

    output: NewBlob
    errors: NewBlob
    #: Places of lines that are in one of them.
    done: set[int] = field(default_factory=set)
    completed: int = 0
    failed: int = 0
    used: UsedTokens = field(default_factory=UsedTokens)

    def put(self, line: dict[str, Any], *, ok: bool) -> None:
        raw = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        (self.output if ok else self.errors).write(raw)
        self.completed += ok
        self.failed += not ok


@dataclass(slots=True)
class _Request:
    """The rows of one request, as they are met."""

    note: LineNote
    #: Values or DoorErrors; None: not done.
    cells: list[Any] = field(default_factory=list)
    #: Of the tasks beside it, a column of its one row each; None: not done.
    beside: list[Column | None] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.cells) == self.note.rows and None not in (*self.cells, *self.beside)


def write_files(
    use: Resources,
    owned: Owned,
    path: Path,
    find: Find,
    reads: TokenReaders,
    state: BatchState,
    errors: Sequence[dict[str, Any]] | None,
    goes_on: Callable[[], None],
) -> None:
    """Write both files and end the batch, in one transaction. Raises NotMine."""
    batch = owned.batch
    with ExitStack() as stack:
        made = _Files(stack.enter_context(use.blobs.new()), stack.enter_context(use.blobs.new()))
        with path.open("rb") as lines:
            if batch.job_id is not None and batch.job_state is not None:
                with use.database.transaction() as connection:
                    tasks = shown(connection, batch.tenant_id, batch.job_id).tasks
                for request in _requests(use, batch.job_id, goes_on):
                    _write(use, owned, made, lines, request, tasks, find, reads, state)
            _write_rest(made, lines, batch.id, state, goes_on)
        for blob in (made.output, made.errors):
            if blob.size:
                blob.settle()
        with use.database.transaction() as connection:
            output = _named(connection, owned, made.output, "output")
            failed = _named(connection, owned, made.errors, "error")
            owned.end(
                connection,
                state,
                completed=made.completed,
                failed=made.failed,
                usage=batch_usage(made.used),
                errors=errors,
                output_file=output,
                error_file=failed,
            )


def _requests(use: Resources, job: UUID, goes_on: Callable[[], None]) -> Iterator[_Request]:
    """Every request whose rows landed, with what became of them."""
    request: _Request | None = None
    at = 0
    while True:
        goes_on()
        with use.database.transaction() as connection:
            found = answered_blocks(connection, job, at, _BLOCKS)
            columns = read_columns(connection, [one for _, _, of_block in found for one in of_block.values()])
        if not found:
            break
        for number, payload, of_block in found:
            at = number + 1
            values = decode_block(payload).values
            cells: dict[int, list[Any]] = {}
            for row, said in enumerate(values[LINE]):
                if said:
                    if request is not None:
                        yield request
                    request = _Request(LineNote(*json.loads(str(said))))
                assert request is not None, "the first row of a job begins a request"
                task = request.note.task
                if task not in cells:
                    column = columns.get(of_block.get(task, -1))
                    cells[task] = [None] * len(values[LINE]) if column is None else cells_of(column)
                request.cells.append(cells[task][row])
                for number in range(task + 1, task + 1 + request.note.beside):
                    column = columns.get(of_block.get(number, -1))
                    request.beside.append(None if column is None else cut(column, row, row + 1))
    if request is not None:
        yield request


def _write(
    use: Resources,
    owned: Owned,
    made: _Files,
    lines: BinaryIO,
    request: _Request,
    tasks: Sequence[ShownTask],
    find: Find,
    reads: TokenReaders,
    state: BatchState,
) -> None:
    """The lines that a request answers. Its rows may not all have landed: then none of it was done."""
    for place in request.note.places:
        raw, name = line_at(lines, place), _name(owned.batch.id, place)
        made.done.add(place)
        try:
            line = read_again(raw, find, reads)
        except DoorError as error:  # its model was removed meanwhile
            made.put(_line(name, _custom_id(raw), error.status, {"error": error.body()}), ok=False)
            continue
        if not request.done:
            made.put(_not_done(name, line.custom_id, state), ok=False)
            continue
        model = find(line.asked.model)
        lengths: Sequence[int] = ()
        if line.asked.options is None and model is not None:
            most = model.manifest.max_tokens
            lengths = [min(n, most or n) for n in use.counter.lengths(model.manifest, line.asked.texts)]
        try:
            body, used = body_of(line.asked, request.cells, lengths, name=name, created=int(time.time()))
        except DoorError as error:
            made.put(_line(name, line.custom_id, error.status, {"error": error.body()}), ok=False)
        else:
            made.used += used
            body |= told_beside(
                [
                    replace(tasks[number], name=old)
                    for number, old in enumerate(sorted(line.asked.tasks), request.note.task + 1)
                ],
                [column for column in request.beside if column is not None],
            )
            made.put(_line(name, line.custom_id, 200, body), ok=True)


def _write_rest(
    made: _Files, lines: BinaryIO, batch: str, state: BatchState, goes_on: Callable[[], None]
) -> None:
    """The lines of which no row landed."""
    lines.seek(0)
    for number, place, raw in lines_of(lines):
        if number % 1024 == 0:
            goes_on()
        if place not in made.done and raw is not None:
            made.put(_not_done(_name(batch, place), _custom_id(raw), state), ok=False)


def _custom_id(raw: bytes) -> str:
    return str(json.loads(raw.removeprefix(b"\xef\xbb\xbf"))["custom_id"])


def _name(batch: str, place: int) -> str:
    return hashlib.sha256(f"{batch}/{place}".encode()).hexdigest()[:24]


def _line(name: str, custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": name, "body": body}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": None}


def _not_done(name: str, custom_id: str, state: BatchState) -> dict[str, Any]:
    code, message = _NOT_DONE[state]
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": None, "error": error}


def _named(connection: Connection, owned: Owned, blob: NewBlob, what: str) -> str | None:
    """The id of a file of this content; None where it is empty."""
    if not blob.size:
        return None
    batch = owned.batch
    blobs.record_blob(connection, blob.sha256, blob.size)
    return files.add_file(
        connection,
        file=files.new_file_id(),
        tenant=batch.tenant_id,
        purpose="batch_output",
        filename=f"{batch.id}_{what}.jsonl",
        size=blob.size,
        sha256=blob.sha256,
        expires_s=batch.output_expires_s or KEPT_S,
    ).id
