"""The lines of a batch's file: checked one by one in flat memory, then in the order in which they share most.

A file is read twice: once to check every line, where only digests and places are kept, and once line by line in order. That
is the order of the texts: of all lines of a model those that begin alike are neighbours, wherever they stand in the file.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from motet.errors import InvalidJob
from motet.protocol.values import byte_lengths, text_flaw
from motet.tasks import Task, short
from scheduler.api.bodies import clean_object
from scheduler.api.openai.beside import ANSWER, is_given_names, key_of, renamed, with_versions
from scheduler.api.openai.checks import Decoded
from scheduler.api.openai.naming import check_dimensions, check_model, unknown_model
from scheduler.api.openai.parameters import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES
from scheduler.api.openai.refusals import DoorError, as_door_error
from scheduler.api.openai.requests import SERVED, AskedRequest, asked_of, read_request, task_of
from scheduler.api.openai.sorting import Sorting
from scheduler.api.strict_json import BrokenJson, loads
from scheduler.store.registry import Registered

MOST_LINES = 200_000
#: A line holds a request; a longer one is refused before it is read whole.
MOST_LINE_BYTES = 8 * 1024 * 1024
#: A refused file is told so many of its faults.
MOST_ERRORS = 100
_MOST_ID = 512
#: Equal lines that one row answers: their places stand in that row.
_MOST_EQUAL = 1000
#: Code of a file whose lines need more tasks than a job may have: no line behind that one is looked at.
_TOO_MANY_TASKS = "too_many_models"

#: Characters of a task's name that are kept where it gets a number.
_CALL = 48

#: Name of a model in a line -> the model, or None.
Find = Callable[[str], Registered | None]
#: A model -> what reads its token ids.
TokenReaders = Callable[[Registered | None], Decoded]


@dataclass(frozen=True, slots=True)
class LineKind:
    """What lines have in common that one task of the job answers."""

    endpoint: str
    #: name@version
    model: str
    #: By a cross-encoder.
    pairs: bool
    #: ``key_of`` the tasks beside it.
    beside: str


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A checked line."""

    custom_id: str
    asked: AskedRequest


@dataclass(slots=True)
class FileSurvey:
    """What a look at every line of a file found."""

    lines: int = 0
    #: [{code, message, param, line}]: why the file is refused.
    errors: list[dict[str, Any]] = field(default_factory=list)
    #: Names of models -> name@version.
    models: dict[str, str] = field(default_factory=dict)
    #: What lines have in common that one task answers, in their order, with the tasks beside it.
    kinds: dict[LineKind, Mapping[str, Task]] = field(default_factory=dict)
    #: The place of each among them.
    numbers: dict[LineKind, int] = field(default_factory=dict)
    #: Some answers are drawn, and others each time.
    drawn: bool = False
    #: Places in the file of the lines that get rows of their own, in the order of what they ask.
    order: Sequence[int] = field(default_factory=lambda: array("Q"))
    #: Place of such a line -> places of the lines that ask the same.
    equal: dict[int, list[int]] = field(default_factory=dict)

    def noting(self, find: Find) -> Find:
        """Finds the same models, and notes which versions the names meant."""

        def noted(name: str) -> Registered | None:
            model = find(name)
            if model is not None:
                self.models.setdefault(name, model.manifest.ref)
            return model

        return noted

    def kind_of(self, asked: AskedRequest) -> LineKind:
        return LineKind(asked.endpoint, self.models[asked.model], asked.pairs, key_of(asked.tasks))

    @property
    def tasks(self) -> int:
        """Tasks of the job."""
        return sum(1 + len(beside) for beside in self.kinds.values())


def survey(
    path: Path,
    find: Find,
    reads: TokenReaders,
    *,
    max_row_bytes: int,
    max_tasks: int,
    goes_on: Callable[[], None],
    check_tasks: Callable[[AskedRequest], None] = lambda asked: None,
) -> FileSurvey:
    """Look at every line. ``goes_on`` is called now and then, and may raise.

    ``max_tasks``: of one job. ``check_tasks``: raises InvalidJob where a chat and the tasks beside it cannot be asked together.
    """
    found = FileSurvey()
    find = found.noting(find)
    seen: set[bytes] = set()
    first_of: dict[bytes, int] = {}
    with path.open("rb") as file, Sorting(path.parent) as order:
        for number, offset, raw in lines_of(file):
            if number % 256 == 0:
                goes_on()
            found.lines += 1
            if found.lines > MOST_LINES:
                _told(
                    found,
                    None,
                    DoorError(f"more than {MOST_LINES:,} lines; split the file", code="too_many_tasks"),
                )
                break
            try:
                if raw is None:
                    raise DoorError(f"a line of more than {MOST_LINE_BYTES:,} bytes", code="line_too_long")
                line = read_line(raw, find, reads, max_row_bytes)
                name = _digest(line.custom_id)
                if name in seen:
                    raise DoorError(
                        "custom_id stands in an earlier line as well",
                        param="custom_id",
                        code="duplicate_custom_id",
                    )
                seen.add(name)
                _note(found, line, offset, first_of, order, max_tasks, check_tasks)
            except DoorError as error:
                _told(found, number, error)
                if len(found.errors) >= MOST_ERRORS or error.code == _TOO_MANY_TASKS:
                    break
        if not found.errors:
            found.order = order.places()
    if not found.lines:
        _told(found, None, DoorError("the file has no line", code="empty_file"))
    return found


def lines_of(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """(number from 1, place, bytes) of every line that is not empty; None instead of the bytes of one too long."""
    number = place = 0
    while raw := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        length = len(raw)
        whole: bytes | None = raw
        if length > MOST_LINE_BYTES:
            whole = None
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MOST_LINE_BYTES)
                length += len(raw)
        if whole is None or whole.strip(b" \t\r\n\xef\xbb\xbf"):
            yield number, place, whole
        place += length


def line_at(file: BinaryIO, place: int) -> bytes:
    """The line that begins there; it was checked before."""
    file.seek(place)
    return file.readline(MOST_LINE_BYTES + 1)


def read_again(raw: bytes, find: Find, reads: TokenReaders) -> BatchLine:
    """A line that was checked before. Raises DoorError where a model of it was removed meanwhile."""
    said = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    model = find(said["body"]["model"])
    if model is None:
        raise unknown_model(said["body"]["model"])
    asked = asked_of(read_request(said["url"], said["body"], reads(model)), model.manifest)
    return BatchLine(said["custom_id"], replace(asked, tasks=_with_versions(asked.tasks, find)))


def read_line(raw: bytes, find: Find, reads: TokenReaders, max_row_bytes: int) -> BatchLine:
    """Check a line. Raises DoorError."""
    try:
        said = clean_object(loads(raw.removeprefix(b"\xef\xbb\xbf")), "line")
    except BrokenJson as broken:
        raise DoorError(str(broken), code="invalid_json_line") from None
    except InvalidJob as wrong:
        raise DoorError(str(wrong), code="invalid_json_line") from None
    custom_id = said.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MOST_ID or text_flaw(custom_id):
        raise DoorError(
            f"custom_id: expected a text of 1 to {_MOST_ID} characters",
            param="custom_id",
            code="missing_required_parameter" if custom_id is None else "invalid_value",
        )
    if said.get("method") != "POST":
        raise DoorError('method: expected "POST"', param="method", code="invalid_method")
    url, body = said.get("url"), said.get("body")
    if not isinstance(url, str) or url not in SERVED:
        raise DoorError(
            f"url: got {short(url)}; expected one of {', '.join(SERVED)}", param="url", code="invalid_url"
        )
    if not isinstance(body, dict):
        raise DoorError("body: expected an object", param="body", code="missing_required_parameter")
    name = body.get("model")
    model = find(name) if isinstance(name, str) and name else None
    asked = read_request(url, body, reads(model))
    if asked.stream:
        raise DoorError(
            "stream is not served in a batch: leave it out", param="stream", code="unsupported_parameter"
        )
    if model is None:
        raise unknown_model(asked.model)
    check_model(url, asked.model, model.manifest)
    check_dimensions(asked.dimensions, model.manifest)
    asked = replace(asked_of(asked, model.manifest), tasks=_with_versions(asked.tasks, find))
    check_length(asked, max_row_bytes)
    return BatchLine(custom_id, asked)


def _with_versions(tasks: Mapping[str, Task], find: Find) -> Mapping[str, Task]:
    """The tasks with the versions of their models. Raises DoorError where there is no such model."""
    if not tasks:
        return tasks
    models = {}
    for name, task in tasks.items():
        for ref in task.registered:
            if len(ref) > 200 or (found := find(ref)) is None:
                raise unknown_model(ref, f"tasks.{name}.model")
            models[ref] = found.manifest
    return with_versions(tasks, models)


def check_length(asked: AskedRequest, max_row_bytes: int) -> None:
    """Raises DoorError where a text is longer than a row may be."""
    for row in asked.rows()[:: asked.choices]:
        if (size := sum(byte_lengths(list(row.values())))) > max_row_bytes:
            raise DoorError(
                f"{size:,} bytes are asked; expected at most {max_row_bytes:,} a text", code="too_long"
            )


def _note(
    found: FileSurvey,
    line: BatchLine,
    place: int,
    first_of: dict[bytes, int],
    order: Sorting,
    max_tasks: int,
    check_tasks: Callable[[AskedRequest], None],
) -> None:
    """Keep of a good line what its rows need to be found and ordered. Raises DoorError for tasks that cannot be asked."""
    asked = line.asked
    kind = found.kind_of(asked)
    if kind not in found.kinds:
        if found.tasks + 1 + len(asked.tasks) > max_tasks:
            raise DoorError(
                f"with this line the file needs more than {max_tasks} tasks: one for each model and endpoint, and one for "
                "each distinct task beside chats; split the file",
                param="model",
                code=_TOO_MANY_TASKS,
            )
        if asked.tasks:
            _check_set(found, asked, check_tasks)
        found.kinds[kind] = asked.tasks
    task = found.numbers.setdefault(kind, len(found.numbers))
    found.drawn = found.drawn or asked.drawn
    if not asked.drawn:
        rows = json.dumps([task, asked.rows(), asked.dimensions, asked.base64, asked.choices, asked.about])
        first = first_of.setdefault(_digest(rows), place)
        if first != place:
            equal = found.equal.setdefault(first, [])
            if len(equal) < _MOST_EQUAL:
                equal.append(place)
                return
            first_of[_digest(rows)] = place
    # With its options: the same lines in another order of the file have the same order, and so are found answered.
    told = "\0".join(str(value) for value in asked.rows()[0].values())
    order.add(task.to_bytes(2, "big") + told.encode("utf-8", "surrogatepass"), place)


def _check_set(found: FileSurvey, asked: AskedRequest, check_tasks: Callable[[AskedRequest], None]) -> None:
    """Raises DoorError where a new set of tasks cannot be asked beside its chat, or beside the other sets of the file."""
    if any(found.kinds.values()) and is_given_names(asked.tasks):
        raise DoorError(
            "a function is given other tasks' answers by their names, and these are another set's in this file; put lines "
            "with other tasks into a file of their own",
            param="tasks",
            code="unsupported_value",
        )
    try:
        check_tasks(asked)
    except InvalidJob as error:
        raise as_door_error(error) from None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _told(found: FileSurvey, number: int | None, error: DoorError) -> None:
    found.errors.append(
        {
            "code": error.code or "invalid_value",
            "message": error.message,
            "param": error.param,
            "line": number,
        }
    )


#: What a task is called by the endpoint of its lines.
_CALLED = {
    CHAT: "chat",
    COMPLETIONS: "completion",
    RESPONSES: "response",
    EMBEDDINGS: "embedding",
    RERANK: "ranking",
    CLASSIFY: "classification",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTasks:
    """The tasks of a batch's job."""

    #: In the job's order.
    tasks: Mapping[str, Task]
    #: Of each kind of line the numbers of its tasks: the one that answers, and those beside it by name.
    numbers: Mapping[LineKind, Sequence[int]]


def job_tasks(found: FileSurvey) -> JobTasks:
    """The tasks that the lines of a file need. The first set of tasks beside a chat keeps its names."""
    several = len(found.kinds) > 1
    tasks: dict[str, Task] = {}
    numbers: dict[LineKind, Sequence[int]] = {}
    kept = {ANSWER, *next(filter(None, found.kinds.values()), ())}
    for kind, beside in found.kinds.items():
        first = len(tasks)
        numbers[kind] = range(first, first + 1 + len(beside))
        olds = [ANSWER, *sorted(beside)]
        keeps = bool(beside) and kept == set(olds) and not kept & tasks.keys()
        called = [_CALLED[kind.endpoint], *sorted(beside)]
        names = {
            old: old if keeps else _free(f"{new[:_CALL]}-{number}", {*tasks, *kept})
            for old, new, number in zip(olds, called, numbers[kind], strict=True)
        }
        answering = task_of(kind.endpoint, kind.model, pairs=kind.pairs)
        for old in olds:
            task = answering if old == ANSWER else renamed(old, beside[old], names)
            tasks[names[old]] = replace(task, conditional=several)
    return JobTasks(tasks=tasks, numbers=numbers)


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name
