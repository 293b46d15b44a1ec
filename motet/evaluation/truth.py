"""The true labels of an evaluation, from any source of rows; each as the kind of its answers asks.

A row of the labels belongs to the row of the job at the same place, or to the one whose index it names. A label that is
null or missing leaves its row out; NaN is no label and no null, and is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from motet.errors import InvalidJob, Problem
from motet.evaluation.answered import AnswerKind
from motet.rows import MAX_PROBLEMS, whole_rows
from motet.sources import Source
from motet.tasks import short

#: Labels that a warning names, and fields that an error does.
NAMED = 8
#: An index as a table holds it.
_DIGITS = re.compile(r"[0-9]{1,18}")
_NULL = "write null (None) where a row has no label"


class TrueLabels:
    """The labels as they stand in their source: a value for each row and field."""

    def __init__(self, wanted: Mapping[str, str], index: str | None, group: str | None = None) -> None:
        self._fields = list(dict.fromkeys(wanted.values()))
        self._index, self._group = index, group
        self.values: dict[str, list[Any]] = {name: [] for name in self._fields}
        #: The row of the job that each row of labels belongs to, and its line in a text file.
        self.rows: list[int] = []
        self.lines: list[int | None] = []
        #: Row of the job -> what it belongs to; empty where no group is asked for.
        self.groups: dict[int, str] = {}
        self._present: set[str] = set()
        #: Fields of the first row, to be named where one is missing.
        self._first: list[str] = []

    def read(self, source: Source) -> None:
        """Read all of it. Raises InvalidJob for a row that is none, and for an index that is."""
        taken: set[int] = set()
        for number, (row, line) in enumerate(whole_rows(source)):
            if not isinstance(row, Mapping):
                if len(self._fields) != 1 or self._index is not None or self._group is not None:
                    got = f"a value of type {short(type(row).__name__)}"
                    raise InvalidJob.of(
                        "labels",
                        got,
                        "a mapping of field to label",
                        "name one task, or give mappings",
                        number,
                    )
                row = {self._fields[0]: row}
            self._first = self._first or [short(name) for name in row][:NAMED]
            self._present.update(name for name in self._fields if name in row)
            for name, column in self.values.items():
                column.append(row.get(name))
            self.rows.append(number if self._index is None else self._row(row, number, taken))
            self.lines.append(line)
            if self._group is not None:
                self.groups[self.rows[-1]] = self._group_of(row, number)
        if self._group is not None and self.rows and len(set(self.groups.values())) < 2:
            name = f"labels.{short(self._group)}"
            raise InvalidJob.of(name, "one group", "two at least, since groups are drawn", "check the field")

    def _group_of(self, row: Mapping[str, Any], number: int) -> str:
        """What a row belongs to."""
        name = str(self._group)
        expected = "the group of each row: text or a whole number"
        try:
            value = _label(_plain(row.get(name)))
        except _Wrong as wrong:
            raise InvalidJob.of(
                f"labels.{short(name)}", wrong.got, expected, "name what it belongs to", number
            ) from None
        if value is None:
            got = "null" if name in row else "no such field"
            raise InvalidJob.of(f"labels.{short(name)}", got, expected, "name what it belongs to", number)
        return value

    def _row(self, row: Mapping[str, Any], number: int, taken: set[int]) -> int:
        """The index that a row of labels names."""
        name = str(self._index)
        value = _plain(row.get(name))
        place = int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value
        if isinstance(place, bool) or not isinstance(place, int) or place < 0 or place in taken:
            again = isinstance(place, int) and place in taken
            got = f"{place} again" if again else "no such field" if name not in row else short(value)
            raise InvalidJob.of(
                f"labels.{short(name)}", got, "the index of a row, each once", "count rows from 0", number
            )
        taken.add(place)
        return place

    def found(self, wanted: Mapping[str, str], *, named: bool) -> dict[str, str]:
        """Those tasks whose field is there. Raises InvalidJob where one that was named is not, or none is."""
        there = {task: name for task, name in wanted.items() if name in self._present}
        has = ", ".join(self._first) or "no fields at all"
        absent = [(task, name) for task, name in wanted.items() if name not in self._present]
        if not self.rows:
            raise InvalidJob.of("labels", "no rows", "a row for each row of the job", "check the source")
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

    def check_rows(self, job: str, rows: int) -> None:
        """Raise InvalidJob unless every row of labels has its row of the job, and is its only one."""
        if self._index is None and len(self.rows) != rows:
            raise InvalidJob.of(
                "labels",
                f"{len(self.rows):,} rows",
                f"{rows:,}, one for each row of job {job}, in order",
                "give the labels of the rows that were submitted, or name the field of the rows' index (--index)",
            )
        beyond = next((n for n, row in enumerate(self.rows) if row >= rows), None)
        if beyond is not None:
            raise InvalidJob.of(
                f"labels.{short(str(self._index))}",
                f"index {self.rows[beyond]:,}",
                f"less than {rows:,}, the rows of job {job}",
                "count rows from 0",
                beyond,
            )

    def labels(self, field: str) -> set[str]:
        """Different labels of a field, as text; values that are none are left out."""
        found = set()
        for value in self.values[field]:
            try:
                found.add(_label(_plain(value)))
            except _Wrong:
                continue
        return {label for label in found if label is not None}

    def flags(self, field: str) -> bool:
        """Whether every value of a field that is there is true or false, which a table holds as text."""
        values = [value for each in self.values[field] if (value := _plain(each)) not in (None, "")]
        return bool(values) and all(
            isinstance(value, bool) or (isinstance(value, str) and value.casefold() in ("true", "false"))
            for value in values
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
            raise InvalidJob.of(
                f"labels.{short(field)}", "null in every row", "a label in one at least", "check the field"
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


TAKE: Mapping[AnswerKind, Callable[[Any], Any]] = {
    "label": _label,
    "labels": _labels,
    "spans": _spans,
    "number": _number,
    "text": _text,
    "json": _json,
}
