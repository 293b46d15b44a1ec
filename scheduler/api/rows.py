"""Rows from strangers: the bodies of parts, read into columns of clean values with the bad rows marked. Pure.

Three forms give the same: columns in msgpack, rows as JSON lines, rows inline. Bad is a (row, field): what stands
there, and what should, without a word of the text. Only the tasks that read the field get an error for it; a row that is
none as a whole, such as broken JSON, is bad for all. A field holds a value (motet.protocol.values); where a chat reads
it, a list of messages, which is stored as JSON; where a model that reads pictures does, a medium that was sent before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from motet.errors import InvalidJob, Problem
from motet.folds import Fold
from motet.media.medium import Medium, reference
from motet.protocol.envelope import extension
from motet.protocol.values import (
    Doubled,
    Mark,
    NoValue,
    Value,
    clean,
    plain_text,
    text_flaw,
)
from motet.tasks import short
from motet.words import visible
from scheduler.api.dialogues import EXPECTED, NoDialogue, dialogue_text
from scheduler.api.strict_json import BrokenJson, loads
from scheduler.blocks import IncomingPart, media_in
from scheduler.policy.folds import misfits

#: Rows of one part at most: a guard for memory, far above any real part.
MAX_PART_ROWS = 1 << 20
#: Lists and maps in one msgpack body at most, as in JSON: empty ones cost a byte to send and sixty to hold.
_MAX_CONTAINERS = 1_000_000
#: A refusal names so many rows.
MAX_PROBLEMS = 20

#: Fields of a body of columns that tell its rows.
PART_FIELDS = frozenset({"columns", "first_row", "bad", "bad_fields"})

#: The way out for whoever cannot mend the rows, in Python's words and in the shell's.
_OR_ERROR = 'or get error cells for such rows with bad_rows="error" (--bad-rows error)'
_SKIP = f"mend the row, {_OR_ERROR}"
_CODE = re.compile(r"[a-z][a-z_]{0,39}")


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row is no row, or its value no value."""

    #: The row's field, or "" where the row as a whole is wrong.
    field: str
    got: str
    expected: str
    remedy: str = _SKIP
    #: Class of the error that its cells become.
    error: str = "bad_row"

    @property
    def message(self) -> str:
        """What its cells say."""
        what = f"got {self.got}; expected {self.expected}" if self.expected else self.got
        return f"{self.field}: {what}" if self.field else what

    def at(self, row: int) -> Problem:
        where = f"rows.{self.field}" if self.field else "rows"
        return Problem(where, self.got, self.expected or "a row that every task can read", self.remedy, row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A part as it was read, good and bad rows together."""

    columns: Mapping[str, Sequence[Value]]
    #: Rows that are none.
    bad: Mapping[int, BadRow] = field(default_factory=dict)
    #: Field -> rows whose value there is none.
    bad_fields: Mapping[str, Mapping[int, BadRow]] = field(default_factory=dict)
    #: Index of its first row, where the sender says it.
    first_row: int | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def has_media(self) -> bool:
        """Some row refers to a medium."""
        return any(True for values in self.columns.values() for _ in media_in(values))

    def part(self) -> IncomingPart:
        """What is stored: what is bad keeps its place, without text."""
        return IncomingPart(
            columns=self.columns,
            bad=_as_marks(self.bad),
            bad_fields={name: _as_marks(bad) for name, bad in self.bad_fields.items()},
        )

    def row(self, i: int) -> Incoming:
        """Row ``i`` alone."""
        return Incoming(
            columns={name: values[i : i + 1] for name, values in self.columns.items()},
            bad={0: self.bad[i]} if i in self.bad else {},
            bad_fields={name: {0: wrong[i]} for name, wrong in self.bad_fields.items() if i in wrong},
        )

    def refuse_bad_rows(self, first_row: int) -> None:
        """Raise InvalidJob that names the first bad rows and fields, if there are any."""
        found = [(i, b) for bad in (self.bad, *self.bad_fields.values()) for i, b in bad.items()]
        if found:
            found.sort(key=lambda mark: mark[0])
            raise InvalidJob.first([b.at(first_row + i) for i, b in found], MAX_PROBLEMS)


def _as_marks(bad: Mapping[int, BadRow]) -> dict[int, tuple[str, str]]:
    return {i: (b.error, b.message) for i, b in bad.items()}


def foldable(incoming: Incoming, folds: Mapping[str, Fold]) -> Incoming:
    """The rows with each marked that a fold cannot take: the fold's own name is bad there, as a field that tasks read."""
    passed_over = {name: {**incoming.bad, **incoming.bad_fields.get(name, {})} for name in incoming.columns}
    bad_fields = dict(incoming.bad_fields)
    for name, found in misfits(folds, incoming.columns, passed_over).items():
        bad_fields[name] = {
            i: BadRow(no.field, no.got, no.expected, f"which {name} folds: mend it, {_OR_ERROR}")
            for i, no in found.items()
        }
    for name, fold in folds.items():
        for i, why in (mark for read in fold.reads for mark in incoming.bad_fields.get(read, {}).items()):
            bad_fields[name] = {**bad_fields.get(name, {}), i: why}
    return replace(incoming, bad_fields=bad_fields)


def read_columns(
    raw: bytes,
    fields: Sequence[str],
    max_row_bytes: int,
    dialogues: Collection[str] = (),
    media: Collection[str] = (),
) -> Incoming:
    """``{"columns": {field: [value, …]}, "first_row"?: i, "bad"?: …, "bad_fields"?: …}`` in msgpack (docs/http.md).

    Raises InvalidJob where the body is not of that form.
    """
    return columns_in(unpacked(raw), fields, max_row_bytes, dialogues, media)


def unpacked(raw: bytes) -> Any:
    """A stranger's msgpack. Raises InvalidJob where it is none, or too much."""
    left = _MAX_CONTAINERS

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many lists and maps")
        return container

    try:
        # Bytes that are not UTF-8 become lone surrogates, which are found where every text is checked.
        return msgpack.unpackb(
            raw,
            strict_map_key=False,
            unicode_errors="surrogateescape",
            max_array_len=MAX_PART_ROWS,
            list_hook=count,
            object_hook=count,
            ext_hook=_extension,
        )
    except Exception as error:  # noqa: BLE001 - any stranger's bytes: every decoder error means the same thing
        raise _malformed(f"bytes that are no msgpack ({type(error).__name__})") from None


def columns_in(
    body: Any,
    fields: Sequence[str],
    max_row_bytes: int,
    dialogues: Collection[str] = (),
    media: Collection[str] = (),
) -> Incoming:
    """The rows of a body of that form that was unpacked before. Raises InvalidJob."""
    columns = body.get("columns") if isinstance(body, dict) else None
    if not isinstance(columns, dict) or not all(isinstance(c, list) for c in columns.values()):
        raise _malformed("no columns of rows")
    lengths = {len(c) for c in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise _malformed("columns of different lengths" if len(lengths) > 1 else "no row")
    first_row = body.get("first_row")
    if first_row is not None and not _is_index(first_row, 1 << 62):
        raise _malformed("a first_row that is no index")
    n = lengths.pop()
    bad = _told_bad(body.get("bad"), n)
    told = _told_bad_fields(body.get("bad_fields"), n)
    bad_fields = {name: told.get(name, {}) for name in fields}
    for name in fields:
        if name not in columns:
            bad_fields[name] = dict.fromkeys(range(n), _missing(name, columns)) | bad_fields[name]
    kept = {name: columns.get(name) or [""] * n for name in fields}
    return _checked(kept, bad, bad_fields, first_row, max_row_bytes, dialogues, media)


def _extension(code: int, raw: bytes) -> Any:
    try:
        return extension(code, raw)
    except ValueError as error:
        return Mark(str(error))


def read_lines(
    raw: bytes,
    fields: Sequence[str],
    max_row_bytes: int,
    dialogues: Collection[str] = (),
    media: Collection[str] = (),
) -> Incoming:
    """JSON lines: an object, or a string, which is ``{"text": …}``, per line. Empty lines are no rows.

    Raises InvalidJob for no row at all; anything wrong in a line is that row's.
    """
    return read_rows(_lines(raw, 8 * max_row_bytes), fields, max_row_bytes, dialogues, media)


def _lines(raw: bytes, max_line_bytes: int) -> Iterator[Any]:
    """One parsed row at a time, so that what a row holds beside its fields is soon forgotten."""
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line or line.isspace():
            continue
        if len(line) > max_line_bytes:
            limit = f"at most {max_line_bytes:,} bytes a line"
            yield BadRow(
                "", f"{len(line):,} bytes in line {number}", limit, "leave out fields that no task reads"
            )
            continue
        try:
            yield loads(line)
        except BrokenJson as broken:
            yield BadRow("", f"{broken} in line {number}", "a JSON object per line")


def read_rows(
    rows: Iterable[Any],
    fields: Sequence[str],
    max_row_bytes: int,
    dialogues: Collection[str] = (),
    media: Collection[str] = (),
) -> Incoming:
    """Rows that are parsed JSON already. Raises InvalidJob where there is none."""
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    bad: dict[int, BadRow] = {}
    bad_fields: dict[str, dict[int, BadRow]] = {name: {} for name in fields}
    n = 0
    for n, row in enumerate(rows, 1):
        if n > MAX_PART_ROWS:
            raise _malformed(f"more than {MAX_PART_ROWS:,} rows in one part")
        if isinstance(row, str):
            row = {"text": row}
        if type(row) is not dict and (why := _no_row(row)):
            bad[n - 1], row = why, dict.fromkeys(fields, "")
        for name, column in columns.items():
            if name not in row:
                bad_fields[name][n - 1] = _missing(name, row)
            elif isinstance(row, Doubled) and name in row.doubled:
                bad_fields[name][n - 1] = BadRow(
                    name, "the same key twice", "an object whose keys stand there once"
                )
            column.append(row.get(name))
    if not n:
        raise _malformed("no row")
    return _checked(columns, bad, bad_fields, None, max_row_bytes, dialogues, media)


def _no_row(row: Any) -> BadRow | None:
    """What is wrong with a row as a whole."""
    if isinstance(row, BadRow):
        return row
    return None if isinstance(row, dict) else BadRow("", _kind(row), "text, or an object of field to value")


def _checked(
    columns: Mapping[str, list[Any]],
    bad: Mapping[int, BadRow],
    bad_fields: Mapping[str, dict[int, BadRow]],
    first_row: int | None,
    max_row_bytes: int,
    dialogues: Collection[str],
    media: Collection[str],
) -> Incoming:
    """Check every value. Rows of clean text cost one look at each; a column with anything else is searched.

    ``bad_fields``: of every field the rows in which it is known to be bad; the others join them here.
    """
    #: Columns that may hold more than text.
    typed: set[str] = set()
    for name, values in columns.items():
        wrong = bad_fields[name]
        for offset in (*bad, *wrong):
            values[offset] = ""
        if name in dialogues:
            for i, value in enumerate(values):
                if i not in bad and i not in wrong:
                    try:
                        values[i] = dialogue_text(value)
                    except NoDialogue as no:
                        wrong[i] = BadRow(name, str(no), EXPECTED)
                        values[i] = ""
        if name in media:
            for i, value in enumerate(values):
                if type(value) is not Medium and i not in bad and i not in wrong:
                    values[i], why = _medium(name, value)
                    if why is not None:
                        wrong[i] = why
        if not _all_clean(values):
            typed.add(name)
            for i, value in enumerate(values):
                try:
                    values[i] = clean(value)
                except NoValue as no:
                    mend = no.remedy or "make it text or leave the row out"
                    wrong[i] = BadRow(name, no.got, no.expected, f"{mend}, {_OR_ERROR}")
                    values[i] = ""
    _refuse_long(columns, typed, bad_fields, max_row_bytes)
    # A row that is none has no fields that could be bad.
    found = {
        name: {i: why for i, why in wrong.items() if i not in bad}
        for name, wrong in bad_fields.items()
        if wrong
    }
    return Incoming(
        columns=columns,
        bad=bad,
        bad_fields={name: wrong for name, wrong in found.items() if wrong},
        first_row=first_row,
    )


def _medium(name: str, value: Any) -> tuple[Value, BadRow | None]:
    """What a field that holds media was sent as: a medium; or "", and why it is none."""
    found = reference(value)
    if found is not None:
        return found, None
    return "", BadRow(name, _kind(value), _PICTURE, f"{_SEND}, {_OR_ERROR}")


_PICTURE = 'a picture, {"medium": its sha256}: a model that reads pictures reads this field'
_SEND = "submit files with media_root, or bytes, so that the client sends them"


def _refuse_long(
    columns: Mapping[str, list[Any]],
    typed: Collection[str],
    bad_fields: Mapping[str, dict[int, BadRow]],
    max_row_bytes: int,
) -> None:
    """Mark the longest values of rows beyond the limit, until what is left of the row is within it.

    A character has at most four bytes, so most rows need no counting.
    """
    texts = {
        name: list(map(plain_text, columns[name])) if name in typed else v for name, v in columns.items()
    }
    if sum(max(map(len, column)) for column in texts.values()) * 4 <= max_row_bytes:
        return
    for i in range(len(next(iter(texts.values())))):
        if sum(len(column[i]) for column in texts.values()) * 4 <= max_row_bytes:
            continue
        sizes = {name: len(column[i].encode()) for name, column in texts.items()}
        while (size := sum(sizes.values())) > max_row_bytes:
            longest = max(sizes, key=sizes.__getitem__)
            got = f"{sizes[longest]:,} bytes" + (f" of {size:,} in the row" if size > sizes[longest] else "")
            limit = f"at most {max_row_bytes:,} bytes a row"
            bad_fields[longest][i] = BadRow(longest, got, limit, f"split the text, {_OR_ERROR}")
            columns[longest][i] = ""
            sizes[longest] = 0


def _all_clean(texts: Sequence[Any]) -> bool:
    try:
        whole = "".join(texts)
        if not whole.isascii():
            whole.encode()
    except (TypeError, UnicodeEncodeError):
        return False
    return "\0" not in whole


def _missing(name: str, row: Mapping[Any, Any]) -> BadRow:
    has = ", ".join(_shown(key) for key in list(row)[:8]) or "no fields at all"
    return BadRow(
        name, "no such field", f"a value (the row has {has})", f"name a field that rows have, {_OR_ERROR}"
    )


def _shown(key: object) -> str:
    """A stranger's name of a field, as it may stand in a message that is stored: short, and printable."""
    return visible(short(key))


def _kind(value: object) -> str:
    """What a value is, in words, and never the value: it may be as private as a text."""
    if value is None:
        return "null"
    if isinstance(value, Mark):
        return value.words
    if isinstance(value, float) and value != value:
        return "NaN"
    words = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        bytes: "bytes",
        str: "text",
    }
    return words.get(type(value), "an object" if isinstance(value, dict) else "a value that is no text")


def _told_bad(told: object, n: int) -> dict[int, BadRow]:
    """Rows that the sender found bad before us: ``{offset: [error, message]}``."""
    if told is None:
        return {}
    if not isinstance(told, dict) or len(told) > n:
        raise _malformed("marks of bad rows that are no object of offset to [error, message]")
    bad: dict[int, BadRow] = {}
    for offset, why in told.items():
        if not _is_index(offset, n) or not isinstance(why, list) or len(why) != 2:
            raise _malformed("a mark of a bad row that is not an offset with [error, message]")
        bad[offset] = _told(*why)
    return bad


def _told_bad_fields(told: object, n: int) -> dict[str, dict[int, BadRow]]:
    """Values that the sender found bad before us: ``{field: [[error, message, [offset, …]], …]}``."""
    if told is None:
        return {}
    if not isinstance(told, dict) or not all(isinstance(reasons, list) for reasons in told.values()):
        raise _malformed(
            "marks of bad fields that are no object of field to [[error, message, [offset, …]], …]"
        )
    found: dict[str, dict[int, BadRow]] = {}
    for name, reasons in told.items():
        marks = found.setdefault(name, {})
        for reason in reasons:
            if not isinstance(reason, list) or len(reason) != 3 or not isinstance(reason[2], list):
                raise _malformed("a mark of a bad field that is not [error, message, [offset, …]]")
            *why, offsets = reason
            if not all(_is_index(offset, n) for offset in offsets):
                raise _malformed("a mark of a bad field with an offset that is none")
            marks.update(dict.fromkeys(offsets, _told(*why)))
    return found


def _told(error: object, message: object) -> BadRow:
    """The sender's reason; its words stand as they are."""
    clean = isinstance(message, str) and text_flaw(message) is None and len(message) <= 500
    if not (isinstance(error, str) and _CODE.fullmatch(error) and clean):
        raise _malformed("a mark of a bad row without a short class and message")
    return BadRow("", str(message), "", error=error)


def _is_index(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _malformed(got: str) -> InvalidJob:
    return InvalidJob(
        Problem(
            "rows",
            got,
            "rows in one of the forms of docs/http.md",
            "send {field: [value, …]}, or a row a line",
        )
    )
