"""Truth and answers, row beside row: labels from any source of rows, cells from a job. Decides nothing of figures.

A row of the labels belongs to the row of the job at the same place, or to the one whose index it names. A label that is
null or missing leaves its row out; NaN is no label and no null, and is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from motet.errors import InvalidJob, NotFound, Problem
from motet.evaluation.figures import Answered, AnswerKind
from motet.evaluation.measures import LabelReader, folded
from motet.protocol.columns import ERROR, OK, STATE_MASK
from motet.results import Answers, Block
from motet.rows import MAX_PROBLEMS, records
from motet.sources import Source
from motet.tasks import short

#: Task -> the field of its labels; names of tasks, whose fields are called alike; None for all that there are.
Fields: TypeAlias = "Mapping[str, str] | Sequence[str] | None"

#: What is written is taken for labels where the truth has at most so many different values, none of them longer than
#: so many characters, and each of them twice on average.
FEW_LABELS, SHORT_LABEL = 50, 50
#: Labels that a warning names, and fields that an error does.
_NAMED = 8
#: An index as a table holds it.
_DIGITS = re.compile(r"[0-9]{1,18}")
_NULL = "write null (None) where a row has no label"


class AnsweredJob(Protocol):
    """What an evaluation asks of a job."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def record(self) -> Mapping[str, Any]: ...

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]: ...

    def reading(self, tasks: Sequence[str]) -> AbstractContextManager[Iterator[Block]]:
        """Its blocks of answers to ``tasks``, as they come."""
        ...


def read(
    job: AnsweredJob,
    labels: Source,
    tasks: Fields,
    *,
    index: str | None,
    as_labels: Collection[str],
    as_text: Collection[str],
) -> tuple[dict[str, Answered], dict[str, str]]:
    """Task -> its answers beside the truth, and task -> the field that the truth stands in.

    Waits for the job. Raises InvalidJob for labels that do not fit, NotFound for a task that the job does not have,
    JobFailed as ``Job.results``.
    """
    _check_tasks(job, tasks, (*as_labels, *as_text))
    specs = job.tasks
    named = tasks is not None
    if tasks is None:
        # A vector has no label that it could be compared with, though a field may be called as its task is.
        tasks = [name for name, spec in specs.items() if spec["kind"] != "embed"]
    wanted = dict(tasks) if isinstance(tasks, Mapping) else {name: name for name in tasks}
    if not wanted:
        raise InvalidJob(Problem("tasks", "no task", "one that answers no vectors", "name a task"))
    table = _Labels(wanted, index)
    table.read(labels)
    fields = table.found(wanted, named=named)
    if job.record["state"] != "loading":
        table.check_rows(job, job.rows)

    columns: dict[str, _Column] = {}
    with job.reading(list(fields)) as blocks:
        for block in blocks:
            for task, answers in block.answers.items():
                if task not in columns:
                    columns[task] = _Column(task, specs[task], answers, table, fields[task])
                columns[task].add(block.first_row, answers)
    table.check_rows(job, job.rows)
    answered = {}
    for task in fields:
        found = columns[task].close()
        if found.kind in ("text", "json"):
            found = _read_labels(found, asked=task in as_labels, never=task in as_text)
        answered[task] = found
    return answered, fields


def _check_tasks(job: AnsweredJob, tasks: Fields, others: Collection[str]) -> None:
    """The job has all of them, and answers to ``tasks`` can be right or wrong. Raises NotFound, InvalidJob, TypeError."""
    if isinstance(tasks, str):
        raise TypeError(f"got tasks={tasks!r}; expected a list of task names, such as [{tasks!r}]")
    specs = job.tasks
    for name in (*(tasks or ()), *others):
        if name not in specs:
            raise NotFound(f"job {job.id} has no task {short(name)!r}; it has {', '.join(specs)}")
    for name in tasks or ():
        if specs[name]["kind"] == "embed":
            raise _vectors(name)


def _vectors(task: str) -> InvalidJob:
    return InvalidJob(
        Problem(f"tasks.{task}", "vectors", "answers that can be right or wrong", "leave this task out")
    )


# -- labels


class _Labels:
    """The labels as they stand in their source: a value for each row and field."""

    def __init__(self, wanted: Mapping[str, str], index: str | None) -> None:
        self._fields = list(dict.fromkeys(wanted.values()))
        self._index = index
        self.values: dict[str, list[Any]] = {name: [] for name in self._fields}
        #: The row of the job that each row of labels belongs to, and its line in a text file.
        self.rows: list[int] = []
        self.lines: list[int | None] = []
        self._present: set[str] = set()
        #: Fields of the first row, to be named where one is missing.
        self._first: list[str] = []

    def read(self, source: Source) -> None:
        """Read all of it. Raises InvalidJob for a row that is none, and for an index that is."""
        taken: set[int] = set()
        for number, (row, line) in enumerate(records(source)):
            if not isinstance(row, Mapping):
                if len(self._fields) != 1 or self._index is not None:
                    got = f"a value of type {short(type(row).__name__)}"
                    raise InvalidJob(
                        Problem(
                            "labels",
                            got,
                            "a mapping of field to label",
                            "name one task, or give mappings",
                            number,
                        )
                    )
                row = {self._fields[0]: row}
            self._first = self._first or [short(name) for name in row][:_NAMED]
            self._present.update(name for name in self._fields if name in row)
            for name, column in self.values.items():
                column.append(row.get(name))
            self.rows.append(number if self._index is None else self._row(row, number, taken))
            self.lines.append(line)

    def _row(self, row: Mapping[str, Any], number: int, taken: set[int]) -> int:
        """The index that a row of labels names."""
        name = str(self._index)
        value = _plain(row.get(name))
        place = int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value
        if isinstance(place, bool) or not isinstance(place, int) or place < 0 or place in taken:
            again = isinstance(place, int) and place in taken
            got = f"{place} again" if again else "no such field" if name not in row else short(value)
            raise InvalidJob(
                Problem(
                    f"labels.{short(name)}", got, "the index of a row, each once", "count rows from 0", number
                )
            )
        taken.add(place)
        return place

    def found(self, wanted: Mapping[str, str], *, named: bool) -> dict[str, str]:
        """Those tasks whose field is there. Raises InvalidJob where one that was named is not, or none is."""
        there = {task: name for task, name in wanted.items() if name in self._present}
        has = ", ".join(self._first) or "no fields at all"
        absent = [(task, name) for task, name in wanted.items() if name not in self._present]
        if not self.rows:
            raise InvalidJob(
                Problem("labels", "no rows", "a row for each row of the job", "check the source")
            )
        if absent and (named or not there):
            raise InvalidJob(
                [
                    Problem(
                        f"labels.{short(name)}",
                        "no such field in any row",
                        f"the labels of task {task!r} (the first row has {has})",
                        f"name the field, as in --task {task}=FIELD",
                    )
                    for task, name in absent
                ]
            )
        return there

    def check_rows(self, job: AnsweredJob, rows: int) -> None:
        """Raise InvalidJob unless every row of labels has its row of the job, and is its only one."""
        if self._index is None and len(self.rows) != rows:
            raise InvalidJob(
                Problem(
                    "labels",
                    f"{len(self.rows):,} rows",
                    f"{rows:,}, one for each row of job {job.id}, in order",
                    "give the labels of the rows that were submitted, or name the field of the rows' index (--index)",
                )
            )
        beyond = next((n for n, row in enumerate(self.rows) if row >= rows), None)
        if beyond is not None:
            raise InvalidJob(
                Problem(
                    f"labels.{short(str(self._index))}",
                    f"index {self.rows[beyond]:,}",
                    f"less than {rows:,}, the rows of job {job.id}",
                    "count rows from 0",
                    beyond,
                )
            )

    def truth(self, field: str, take: Callable[[Any], Any]) -> dict[int, Any]:
        """Row -> its true value, without those that have none. Raises InvalidJob with up to 20 problems."""
        found: dict[int, Any] = {}
        problems: list[Problem] = []
        for number, (row, value) in enumerate(zip(self.rows, self.values[field], strict=True)):
            try:
                taken = take(_plain(value))
            except _Wrong as wrong:
                line = self.lines[number]
                got = wrong.got if line is None else f"{wrong.got} (line {line})"
                problems.append(Problem(f"labels.{short(field)}", got, wrong.expected, _NULL, number))
                if len(problems) == MAX_PROBLEMS:
                    break
                continue
            if taken is not None:
                found[row] = taken
        if problems:
            raise InvalidJob(problems)
        if not found:
            raise InvalidJob(
                Problem(
                    f"labels.{short(field)}",
                    "null in every row",
                    "a label in one at least",
                    "check the field",
                )
            )
        return found


class _Wrong(Exception):
    """A value that is no label of its kind."""

    def __init__(self, got: str, expected: str) -> None:
        self.got, self.expected = got, expected
        super().__init__(got)


def _plain(value: Any) -> Any:
    """The value as Python's own: numpy's scalars and arrays, and what pandas calls NA."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value


def _wrong(value: Any, expected: str) -> _Wrong:
    if isinstance(value, float) and not math.isfinite(value):
        return _Wrong("NaN" if math.isnan(value) else "infinity", expected)
    return _Wrong(f"a value of type {short(type(value).__name__)}", expected)


def _label(value: Any) -> str | None:
    """A label as text: numbers that are whole, true and false as JSON writes them."""
    match value:
        case None | "":
            return None
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float() if value.is_integer():
            return str(int(value))
    raise _wrong(value, "a label: text, a whole number, true or false")


def _labels(value: Any) -> frozenset[str] | None:
    """Several labels: a list, or in a table the JSON of one, or names with ``|`` between them."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = _json_text(value) if value.startswith("[") else value.split("|")
    if not isinstance(value, list | tuple | set | frozenset):
        raise _wrong(value, "a list of labels")
    found = [_label(_plain(each)) for each in value]
    if None in found:
        raise _Wrong("a list with null or an empty text", "a list of labels")
    return frozenset(label for label in found if label is not None)


def _spans(value: Any) -> frozenset[tuple[int, int, str]] | None:
    """Entities: a list of (start, end, label), or of objects with these keys, or the JSON of one."""
    if value is None or value == "":
        return None
    expected = "a list of [start, end, label]"
    if isinstance(value, str):
        value = _json_text(value)
    if not isinstance(value, list | tuple):
        raise _wrong(value, expected)
    found = set()
    for span in value:
        parts = (
            [span.get(key) for key in ("start", "end", "label")]
            if isinstance(span, Mapping)
            else _plain(span)
        )
        if not isinstance(parts, list | tuple) or len(parts) < 3:
            raise _wrong(span, expected)
        start, end, label = parts[:3]
        if type(start) is not int or type(end) is not int or not isinstance(label, str):
            raise _Wrong("a span that is none", expected)
        found.add((start, end, label))
    return frozenset(found)


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _Wrong("text that is no number", "a number") from None
    expected = "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(value, expected)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(number, expected)
    return number


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _label(value)


def _json(value: Any) -> Any:
    """Any JSON; text that looks like an object or a list is read as one, since a table can hold no other."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(value, "JSON")
    return _json_text(value) if isinstance(value, str) and value[:1] in ("{", "[") else value


def _json_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _Wrong("broken JSON", "JSON") from None


_TAKE: Mapping[AnswerKind, Callable[[Any], Any]] = {
    "label": _label,
    "labels": _labels,
    "spans": _spans,
    "number": _number,
    "text": _text,
    "json": _json,
}


# -- answers


class _Column:
    """One task's truth and answers, filled block by block."""

    def __init__(
        self, task: str, spec: Mapping[str, Any], answers: Answers, labels: _Labels, field: str
    ) -> None:
        self._kind = _kind(task, answers)
        self._known: tuple[str, ...] = (
            tuple(spec.get("labels") or ()) if self._kind in ("label", "labels", "spans") else ()
        )
        self._truth = labels.truth(field, _TAKE[self._kind])
        self._warnings = self._fit_to_model()
        self._rows: list[int] = []
        self._answers: list[Any] = []
        self._scores: list[Any] = []
        self._errors = self._skipped = self._unlabelled = 0

    def _fit_to_model(self) -> tuple[str, ...]:
        """Spell true labels as the model does, and tell those that it never gives."""
        if not self._known:
            return ()
        model = Counter(map(folded, self._known))
        spelt = {folded(label): label for label in self._known if model[folded(label)] == 1}
        never, respelt = Counter[str](), 0

        def fit(label: str) -> str:
            nonlocal respelt
            if label in self._known:
                return label
            if (own := spelt.get(folded(label))) is not None:
                respelt += 1
                return own
            never[label] += 1
            return label

        for row, value in self._truth.items():
            match self._kind:
                case "label":
                    self._truth[row] = fit(value)
                case "labels":
                    self._truth[row] = frozenset(map(fit, value))
                case _:
                    self._truth[row] = frozenset((start, end, fit(label)) for start, end, label in value)
        told = []
        if never:
            named = ", ".join(f"{short(label)} ({n:,})" for label, n in never.most_common(_NAMED))
            more = f" and {len(never) - _NAMED:,} more" if len(never) > _NAMED else ""
            which = "label" if never.total() == 1 else "labels"
            told.append(f"{never.total():,} {which} that the model never gives: {named}{more}")
        if respelt:
            which = "label was" if respelt == 1 else "labels were"
            told.append(
                f"{respelt:,} {which} spelt otherwise than by the model, in case or spaces; taken for the same"
            )
        return tuple(told)

    def add(self, first_row: int, answers: Answers) -> None:
        """Take the cells of one block."""
        for offset, status in enumerate(answers.column.status):
            row = first_row + offset
            if row not in self._truth:
                self._unlabelled += 1
                continue
            state = status & STATE_MASK
            self._errors += state == ERROR
            self._skipped += state not in (OK, ERROR)
            answer, score = _answer(self._kind, answers.decoded(offset)) if state == OK else (None, None)
            self._rows.append(row)
            self._answers.append(answer)
            self._scores.append(score)

    def close(self) -> Answered:
        """All of it; rows by index."""
        return Answered(
            kind=self._kind,
            rows=self._rows,
            truth=[self._truth[row] for row in self._rows],
            answers=self._answers,
            scores=self._scores if any(score is not None for score in self._scores) else (),
            labels=self._known,
            errors=self._errors,
            skipped=self._skipped,
            unlabelled=self._unlabelled,
            warnings=self._warnings,
        )


def _kind(task: str, answers: Answers) -> AnswerKind:
    match answers.column.kind:
        case "json":
            return "text" if answers.written else "json"
        case "vector":
            # A function may give vectors too.
            raise _vectors(task)
        case kind:
            return kind


def _answer(kind: AnswerKind, value: Any) -> tuple[Any, Any]:
    """An answer in the form of its truth, and its score or scores."""
    match kind:
        case "label":
            return value[0], value[1]
        case "labels":
            pairs, every = value if isinstance(value, tuple) else (value, None)
            return frozenset(label for label, _ in pairs), every
        case "spans":
            return frozenset((start, end, label) for start, end, label, _ in value), None
        case "text":
            return value["text"], None
        case _:
            return value, None


def _read_labels(found: Answered, *, asked: bool, never: bool) -> Answered:
    """What a language model wrote as labels, where it was asked for some."""
    texts = all(
        isinstance(value, str) for value in (*found.truth, *(a for a in found.answers if a is not None))
    )
    if not texts:
        return found
    found = replace(found, kind="text")
    labels = set(found.truth)
    few = len(labels) <= FEW_LABELS and 2 * len(labels) <= len(found.truth)
    if never or not (asked or (few and all(0 < len(label) <= SHORT_LABEL for label in labels))):
        return found
    reader = LabelReader(labels)
    answers = [None if answer is None else reader.read(answer) for answer in found.answers]
    return replace(
        found,
        kind="label",
        truth=[reader.read(label) for label in found.truth],
        answers=answers,
        labels=(),
        unread=answers.count(None) - found.errors - found.skipped,
    )
