"""Rows on their way to the server: read any source, keep the fields that tasks read, cut them into parts.

A part is some whole blocks of the server, cut by the rows alone: the same rows give the same parts, so a
broken upload finds its place again and stored columns are found for reuse. Memory stays flat however long
the source is. Reading is pure but for the source itself; sending is the client's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from motet.errors import InvalidJob, Problem
from motet.media.medium import Medium
from motet.protocol.envelope import pack, packed_plain
from motet.protocol.values import (
    Doubled,
    NoValue,
    Value,
    byte_lengths,
    clean,
    is_text,
    json_value,
    kind_of,
    plain_text,
)
from motet.protocol.wire import by_reason
from motet.sources import OR_ERROR, SKIP, Fault, Rows, Source, all_columns, parse_json, read
from motet.tasks import short

#: The server's block: whichever of rows and UTF-8 bytes comes first. The same numbers as ``Settings.block_rows``
#: and ``block_bytes``; blocks of another size only make reuse rarer.
BLOCK_ROWS = 1024
BLOCK_BYTES = 1024 * 1024
#: Blocks of the first parts, then of every further one. A part costs the server a request and a commit, as much
#: as the rows of several blocks; but a bad source should be refused before much of it was read and sent.
PART_BLOCKS = (1, 1, 1, 1, 2, 4, 8, 16)
#: UTF-8 bytes that a part holds at most, where a block is not larger: what both sides keep in memory.
PART_BYTES = 4 * 1024 * 1024
#: Rows with pictures in the first parts, then in every further one, and bytes of these pictures: a part is sent when its
#: pictures are stored, so workers wait for the first one whole. Fewer: more requests and blocks for the same rows.
PART_PICTURE_ROWS = (32, 64, 128, 256)
PART_PICTURE_BYTES = 32 * 1024 * 1024
#: UTF-8 bytes of the fields that are read from one row.
MAX_ROW_BYTES = 256 * 1024
#: Problems that the refusal of a submission lists at most.
MAX_PROBLEMS = 20
#: Rows behind the first bad one in which others are looked for: so a refusal comes soon in a long source.
_LOOK_ON_ROWS = 65_536

BadRows = Literal["refuse", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some whole blocks of rows: columns of values, ready to be sent as ``PUT /v1/jobs/{id}/parts/{number}``."""

    number: int
    #: Index in the job of its first row.
    first_row: int
    #: Field -> a value per row; "" where the row or its value is bad.
    columns: Mapping[str, Sequence[Value]]
    #: Offset in the part -> (error class, message) of rows that are none: all their cells shall be errors.
    bad: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    #: Field -> offset -> (error class, message) of values that are none: so shall the cells of tasks that read it.
    bad_fields: Mapping[str, Mapping[int, tuple[str, str]]] = field(default_factory=dict)
    text_bytes: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def encode(self, *, squeeze: bool = True, beside: Mapping[str, Any] | None = None) -> bytes:
        """The body to send: msgpack, under zstd unless told otherwise. The same rows give the same bytes.

        ``beside``: what else stands in the body.
        """
        columns = {name: list(values) for name, values in self.columns.items()}
        body: dict[str, Any] = {"columns": columns, "first_row": self.first_row, **(beside or {})}
        if self.bad:
            body["bad"] = {offset: list(why) for offset, why in self.bad.items()}
        if self.bad_fields:
            body["bad_fields"] = {name: by_reason(bad) for name, bad in self.bad_fields.items()}
        # A server that knows nothing of bad fields must not take their places for empty texts.
        for name, bad in self.bad_fields.items():
            for offset in bad:
                columns[name][offset] = None
        return pack(body) if squeeze else packed_plain(body)

    def mean_bytes(self) -> dict[str, float]:
        """Field -> mean UTF-8 bytes of its texts, bad ones left out."""
        means = {}
        for name, values in self.columns.items():
            bad = self.bad.keys() | self.bad_fields.get(name, {}).keys()
            # What is bad has no text, and so no bytes.
            means[name] = round(sum(byte_lengths(values)) / max(1, len(self) - len(bad)), 1)
        return means

    @property
    def is_json(self) -> bool:
        """JSON can say its values with their types: none of them is, or holds, a decimal, a date or a time."""
        try:
            for values in self.columns.values():
                if not is_text(values):
                    json.dumps(values)
        except TypeError:
            return False
        return True

    def rows(self) -> list[dict[str, Value]]:
        """The same rows as mappings, for requests that carry a few rows inline; None where a value is bad."""
        return self._mappings(self.columns)

    def in_json(self) -> list[dict[str, Any]]:
        """The same rows as JSON can say them, without what is bad. Decimals, dates and times are their texts."""
        rows = self._mappings(
            {n: v if is_text(v) else list(map(_in_json, v)) for n, v in self.columns.items()}
        )
        for offset in self.bad:
            rows[offset].clear()
        for name, bad in self.bad_fields.items():
            for offset in bad:
                rows[offset].pop(name, None)
        return rows

    def _mappings(self, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [
            dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
        ]
        for offset in self.bad:
            rows[offset] = dict.fromkeys(self.columns)
        for name, bad in self.bad_fields.items():
            for offset in bad:
                rows[offset][name] = None
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a plan needs to know of a source: its size, and a sample that stands for it."""

    rows: int
    text_bytes: int
    #: Rows drawn evenly from the whole, always the same ones for the same source, as ``Part.in_json``: without what is
    #: bad. Rows without a good value are left out.
    sample: tuple[dict[str, Any], ...]


def _in_json(value: Value) -> Any:
    """The value, or its text where JSON has no such type. A medium is the object that refers to it."""
    if isinstance(value, list):
        return list(map(_in_json, value))
    if isinstance(value, dict):
        return {name: _in_json(one) for name, one in value.items()}
    return value.to_json() if type(value) is Medium else json_value(value)


#: Replaces what stands for media in rows by media, or by faults.
ReadsMedia: TypeAlias = "Callable[[Rows], Rows]"


def _no_media(rows: Rows) -> Rows:
    return rows


def cut(
    source: Source,
    fields: Sequence[str],
    *,
    dialogues: Collection[str] = (),
    bad_rows: BadRows = "refuse",
    media: ReadsMedia = _no_media,
) -> Iterator[Part]:
    """Read the source once and yield its parts, keeping only ``fields``.

    A field of ``dialogues`` holds a list of ``{"role": …, "content": …}``, or the JSON of one: it becomes JSON of
    those two keys. A row that is such a list is taken for the field ``messages``.

    ``media`` reads what stands for pictures in the rows (motet.media.reading).

    A row is bad in a field where that holds no value (motet.protocol.values): it is missing, NaN, an int beyond 64
    bits, bytes, an object of another kind, nested too deep, a text with a NUL or a lone surrogate, or makes the row
    longer than 256 KiB. It is bad as a whole where it is no row: a line that is not JSON, or has another number of
    fields. With ``bad_rows="refuse"`` the first bad row ends the parts, and InvalidJob lists
    up to 20 of them with row and line; with ``"error"`` it is sent as a mark, so that the cells of the tasks that read
    the field (of all tasks, where it is no row) become errors and all other rows keep their index.

    A source whose structure is broken, such as a CSV with a quote that is never closed, is refused in both modes:
    nothing behind that place can be trusted. Raises InvalidJob for such a source, and for one that cannot be read at
    all; SetupError where a package is missing.
    """
    problems: list[Problem] = []
    first_bad = 0
    part = _Filling(fields)
    found = media(read(source, partial(_check_names, fields=fields), gaps=True))
    with closing(_with_faults_before(problems, found)) as rows:
        for index, (row, line) in enumerate(rows):
            values, size, faults = _values(row, fields, dialogues)
            if faults and bad_rows == "refuse":
                first_bad = first_bad if problems else index
                problems += [fault.at(index, line) for fault in faults.values()]
            elif not problems:
                if part.is_full(size):
                    yield part.close()
                part.add(values, size, faults)
            if problems and (len(problems) >= MAX_PROBLEMS or index - first_bad >= _LOOK_ON_ROWS):
                break
    if problems:
        raise InvalidJob(problems[:MAX_PROBLEMS])
    if part.rows:
        yield part.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRow:
    """One row as its fields' values, for a part that is put together later."""

    values: Sequence[Value]
    #: UTF-8 bytes of its texts.
    size: int
    #: Field -> what is wrong there; "" stands for the row as a whole.
    faults: Mapping[str, Fault]


def check_row(
    row: object, fields: Sequence[str], *, dialogues: Collection[str] = (), bad_rows: BadRows = "refuse"
) -> CheckedRow:
    """A row by itself, as ``cut`` reads it. Raises InvalidJob for a bad one, unless it shall be sent as a mark."""
    values, size, faults = _values(row, fields, dialogues)
    if faults and bad_rows == "refuse":
        raise InvalidJob([replace(fault.at(0, None), row=None) for fault in faults.values()])
    return CheckedRow(values=values, size=size, faults=faults)


def as_part(rows: Iterable[CheckedRow], fields: Sequence[str]) -> Part:
    """Rows that were checked one by one, as one part."""
    part = _Filling(fields)
    for row in rows:
        part.add(row.values, row.size, row.faults)
    return part.close()


def survey(
    source: Source,
    fields: Sequence[str],
    *,
    dialogues: Collection[str] = (),
    bad_rows: BadRows = "refuse",
    media: ReadsMedia = _no_media,
    sample: int = 1000,
) -> Survey:
    """Read the whole source and draw an even sample from it. Raises as ``cut`` does.

    An iterator is used up by this: give a list or a path where the rows are to be submitted afterwards.
    """
    dice = random.Random(0)
    drawn: list[dict[str, Any]] = []
    seen = text_bytes = total = 0
    for part in cut(source, fields, dialogues=dialogues, bad_rows=bad_rows, media=media):
        total += len(part)
        text_bytes += part.text_bytes
        for row in part.in_json():
            if not row:
                continue
            seen += 1
            if len(drawn) < sample:
                drawn.append(row)
            elif (place := dice.randrange(seen)) < sample:
                drawn[place] = row
    return Survey(rows=total, text_bytes=text_bytes, sample=tuple(_first_that_fit(drawn, 8 * BLOCK_BYTES)))


def whole_rows(source: Source) -> Iterator[tuple[Any, int | None]]:
    """Every row of the source as it stands there, with all its fields, and its line in a text file.

    Raises InvalidJob for a row that cannot be read, and where rows may be missing; SetupError where a package is.
    """
    with closing(read(source, all_columns)) as rows:
        for index, (row, line) in enumerate(rows):
            if isinstance(row, Doubled):
                row = Fault("", "an object in which a key stands twice", "each key once", "")
            if isinstance(row, Fault):
                raise InvalidJob(replace(row, remedy="mend the row").at(index, line))
            yield row, line


def _with_faults_before(problems: Sequence[Problem], rows: Rows) -> Rows:
    """The rows; where they break off, what was found before is told as well."""
    try:
        yield from rows
    except InvalidJob as broken:
        raise InvalidJob([*problems[: MAX_PROBLEMS - 1], *broken.problems]) from None


def _first_that_fit(rows: Iterable[dict[str, Any]], budget_bytes: int) -> Iterator[dict[str, Any]]:
    for row in rows:
        budget_bytes -= sum(len(str(value).encode()) for value in row.values())
        if budget_bytes < 0:
            return
        yield row


class _Filling:
    """The part that is being filled."""

    def __init__(self, fields: Sequence[str]) -> None:
        self.fields = fields
        self.number = 0
        self.first_row = 0
        self._start()

    def _start(self) -> None:
        self.columns: list[list[Value]] = [[] for _ in self.fields]
        self.bad: dict[int, tuple[str, str]] = {}
        self.bad_fields: dict[str, dict[int, tuple[str, str]]] = {}
        self.rows = 0
        self.bytes = 0
        #: Of the pictures that its rows refer to.
        self._media_bytes = 0
        self._blocks_left = PART_BLOCKS[min(self.number, len(PART_BLOCKS) - 1)]
        self._start_block()

    def _start_block(self) -> None:
        self._blocks_left -= 1
        # Where the block in hand ends, in rows and bytes of the part. A row is always smaller than a block.
        self._last_row = self.rows + BLOCK_ROWS
        self._last_byte = self.bytes + BLOCK_BYTES

    def is_full(self, size: int) -> bool:
        """True where a row of ``size`` bytes belongs into the next part; begins the next block where it should."""
        if self._media_bytes and (
            self.rows >= PART_PICTURE_ROWS[min(self.number, len(PART_PICTURE_ROWS) - 1)]
            or self._media_bytes >= PART_PICTURE_BYTES
        ):
            return True
        if self.rows < self._last_row and self.bytes + size <= self._last_byte:
            return False
        if not self._blocks_left or self.bytes + BLOCK_BYTES > PART_BYTES:
            return True
        self._start_block()
        return False

    def add(self, values: Sequence[Value], size: int, faults: _Faults) -> None:
        for name, fault in faults.items():
            marks = self.bad_fields.setdefault(name, {}) if name else self.bad
            marks[self.rows] = (fault.error, str(fault))
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)
            if type(value) is Medium:
                self._media_bytes += value.bytes
        self.rows += 1
        self.bytes += size

    def close(self) -> Part:
        part = Part(
            number=self.number,
            first_row=self.first_row,
            columns=dict(zip(self.fields, self.columns, strict=True)),
            bad=self.bad,
            bad_fields=self.bad_fields,
            text_bytes=self.bytes,
        )
        self.number += 1
        self.first_row += self.rows
        self._start()
        return part


#: Who speaks in a dialogue.
_ROLES = ("system", "user", "assistant")


#: What is wrong with the fields of a row; "" stands for the row as a whole.
_Faults: TypeAlias = "Mapping[str, Fault]"
_NO_FAULTS: _Faults = {}


def _values(
    row: object, fields: Sequence[str], dialogues: Collection[str]
) -> tuple[list[Value], int, _Faults]:
    """The values of the fields, "" where there is none, the UTF-8 bytes of their texts, and what is wrong."""
    if isinstance(row, str):
        row = {"text": row}
    elif isinstance(row, list | tuple) and "messages" in dialogues:
        row = {"messages": row}
    elif isinstance(row, Fault):
        return [""] * len(fields), 0, {"": row}
    elif type(row) is not dict and not isinstance(row, Mapping):  # the first look is the cheap one
        fault = Fault("", kind_of(row), "text, or a mapping of field to value", SKIP)
        return [""] * len(fields), 0, {"": fault}
    values: list[Value] = []
    size = 0
    faults: dict[str, Fault] | None = None
    doubled = isinstance(row, Doubled)
    for name in fields:
        value = row.get(name)
        if type(value) is str and not doubled and name not in dialogues:
            text = value
        else:
            value = _value(name, row, dialogues)
            text = "" if isinstance(value, Fault) else plain_text(value)
        try:
            more = len(text) if text.isascii() else len(text.encode())
            is_broken = "\0" in text
        except UnicodeEncodeError:
            is_broken = True
        if is_broken:
            value = _clean(name, text)
        if isinstance(value, Fault):
            faults = faults or {}
            faults[name] = value
            values.append("")
        else:
            values.append(value)
            size += more
    if size > MAX_ROW_BYTES:
        faults = faults or {}
        size = _leave_out_the_longest(fields, values, size, faults)
    return values, size, faults or _NO_FAULTS


def _leave_out_the_longest(
    fields: Sequence[str], values: list[Value], size: int, faults: dict[str, Fault]
) -> int:
    """Take the longest values out of a row that is too long, until it is not; its size then."""
    sizes = byte_lengths(values)
    while size > MAX_ROW_BYTES:
        place = max(range(len(sizes)), key=sizes.__getitem__)
        mine, name = sizes[place], fields[place]
        got = f"{mine:,} bytes" + (f" of {size:,} in the row" if size > mine else "")
        faults[name] = Fault(
            name, got, f"at most {MAX_ROW_BYTES:,} bytes a row", f"split the text, {OR_ERROR}"
        )
        values[place] = ""
        size -= mine
        sizes[place] = 0
    return size


def _value(name: str, row: Mapping[str, Any], dialogues: Collection[str]) -> Value | Fault:
    """The value of a field that is no plain text."""
    value = row.get(name)
    if isinstance(row, Doubled) and name in row.doubled:
        return Fault(name, "the same key twice", "an object whose keys stand there once", SKIP)
    if isinstance(value, Fault):
        return value
    if value is None and name not in row:
        has = ", ".join(short(key) for key in list(row)[:8]) or "no fields at all"
        whole, _, part = name.partition(".")
        # Of an answer {a.b} is a part; the names of fields may hold dots.
        remedy = f"write {{{whole}[{part}]}} for a part of the field {whole}" if part and whole in row else ""
        return Fault(
            name,
            "no such field",
            f"a value (the row has {has})",
            f"{remedy or 'name a field that rows have, or another task'}, {OR_ERROR}",
        )
    if name not in dialogues:
        return _clean(name, value)
    if _is_list(value) or isinstance(value, str):
        return _dialogue(name, value)
    what = "a list of messages"
    return Fault(name, kind_of(value), what, f"make it {what} or leave the row out, {OR_ERROR}")


def _clean(name: str, value: object) -> Value | Fault:
    try:
        return clean(value)
    except NoValue as no:
        remedy = no.remedy or "make it text or leave the row out"
        return Fault(name, no.got, no.expected, f"{remedy}, {OR_ERROR}")


def _is_list(value: object) -> bool:
    """A list, or the array in which numpy and pandas hold one."""
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def _dialogue(name: str, messages: Any) -> str | Fault:
    """A list of messages, or the JSON of one, as JSON of their roles and contents; other keys stay here."""
    if isinstance(messages, str):
        try:
            messages = parse_json(messages)
        except (ValueError, RecursionError):
            messages = None
        if not isinstance(messages, list):
            return Fault(name, "text that is no JSON list", "a list of messages", f"mend it, {OR_ERROR}")
    said: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, Mapping) and not isinstance(message, Doubled)
            else (None, None)
        )
        if role not in _ROLES or not isinstance(content, str) or "\0" in content:
            return Fault(
                name,
                f"a message {number} that is none",
                f'messages {{"role": {" | ".join(_ROLES)}, "content": text}} without NUL',
                f"mend the dialogue, {OR_ERROR}",
            )
        said.append({"role": role, "content": content})
    if not said or said[-1]["role"] != "user":
        got = f"a dialogue that ends with the {said[-1]['role']}" if said else "no message"
        return Fault(name, got, "a last message of the user", f"leave the row out, {OR_ERROR}")
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"))


def _check_names(names: Sequence[str], fields: Sequence[str]) -> Sequence[str]:
    """The fields, where each of them stands once among a table's columns; InvalidJob otherwise."""
    for name in fields:
        if names.count(name) != 1:
            has = ", ".join(short(other) for other in names[:20])
            raise InvalidJob(
                Problem(
                    f"rows.{name}",
                    "no such column" if name not in names else f"{names.count(name)} columns of that name",
                    f"one of {has}" if has else "a table with columns",
                    "name a column in the task's template, such as '{"
                    + (names[0] if names else "text")
                    + "}'",
                )
            )
    return fields
