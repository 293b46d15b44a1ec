"""Rows on their way to the server: read any source, keep the fields that tasks read, cut them into parts.

A part is some whole blocks of the server, cut by the rows alone: the same rows give the same parts, so a
broken upload finds its place again and stored columns are found for reuse. Memory stays flat however long
the source is. Reading is pure but for the source itself; sending is the client's.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import msgpack

from motet.errors import InvalidJob, Problem, SetupError
from motet.tasks import short
from motet.wire import pack

#: The server's block: whichever of rows and UTF-8 bytes comes first. The same numbers as ``Settings.block_rows``
#: and ``block_bytes``; blocks of another size only make reuse rarer.
BLOCK_ROWS = 1024
BLOCK_BYTES = 1024 * 1024
#: Blocks of the first parts, then of every further one. A part costs the server a request and a commit, as much
#: as the rows of several blocks; but a bad source should be refused before much of it was read and sent.
PART_BLOCKS = (1, 1, 1, 1, 2, 4, 8, 16)
#: UTF-8 bytes that a part holds at most, where a block is not larger: what both sides keep in memory.
PART_BYTES = 4 * 1024 * 1024
#: UTF-8 bytes of the fields that are read from one row.
MAX_ROW_BYTES = 256 * 1024
#: A refused submission lists this many problems …
MAX_PROBLEMS = 20
#: … looking for them in this many rows beyond the first, so that a refusal comes soon in a long source.
_LOOK_ON_ROWS = 65_536
#: One line of a text file, fields that no task reads included: a guard against a file that has no line ends.
_MAX_LINE_BYTES = 16 * 1024 * 1024

BadRows = Literal["refuse", "error"]
#: What ``submit`` reads: a path, texts or mappings in a list or any iterable, a DataFrame, an Arrow table.
Source: TypeAlias = "str | os.PathLike[str] | Iterable[str | Mapping[str, Any]] | Any"

#: Rows as they are read: a str, a mapping or a ``_Bad``, and its line where it stands in a text file.
_Rows: TypeAlias = "Generator[tuple[Any, int | None], None, None]"
#: From the names of a table's columns those that are read.
_Choose: TypeAlias = "Callable[[Sequence[str]], Sequence[str]]"

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_SUFFIXES = ".jsonl, .ndjson, .csv, .tsv, .txt (also with .gz), .parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some whole blocks of rows: columns of text, ready to be sent as ``PUT /v1/jobs/{id}/parts/{number}``."""

    number: int
    #: Index in the job of its first row.
    first_row: int
    #: Field -> a text per row; "" where the row is bad.
    columns: Mapping[str, Sequence[str]]
    #: Offset in the part -> (error class, message) of rows whose cells shall be errors.
    bad: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    text_bytes: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def encode(self, *, squeeze: bool = True) -> bytes:
        """The body to send: msgpack, under zstd unless told otherwise. The same rows give the same bytes."""
        body: dict[str, Any] = {
            "columns": {name: list(texts) for name, texts in self.columns.items()},
            "first_row": self.first_row,
        }
        if self.bad:
            body["bad"] = {offset: list(why) for offset, why in self.bad.items()}
        return pack(body) if squeeze else msgpack.packb(body, use_bin_type=True)

    def mean_bytes(self) -> dict[str, float]:
        """Field -> mean UTF-8 bytes of its texts, bad rows left out."""
        good = [offset for offset in range(len(self)) if offset not in self.bad]
        return {
            name: round(sum(len(texts[offset].encode()) for offset in good) / max(1, len(good)), 1)
            for name, texts in self.columns.items()
        }

    def rows(self) -> list[dict[str, str]]:
        """The same rows as mappings, for requests that carry a few rows inline."""
        return [
            dict(zip(self.columns, texts, strict=True)) for texts in zip(*self.columns.values(), strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a plan needs to know of a source: its size, and a sample that stands for it."""

    rows: int
    text_bytes: int
    #: Rows drawn evenly from the whole, always the same ones for the same source.
    sample: tuple[dict[str, str], ...]


def cut(
    source: Source, fields: Sequence[str], *, dialogues: Collection[str] = (), bad_rows: BadRows = "refuse"
) -> Iterator[Part]:
    """Read the source once and yield its parts, keeping only ``fields``.

    A field of ``dialogues`` holds a list of ``{"role": …, "content": …}``, or the JSON of one: it becomes JSON of
    those two keys. A row that is such a list is taken for the field ``messages``.

    A bad row has no text where a task reads one: a missing field, a value that is not a string, a NUL, a
    lone surrogate, more than 256 KiB, a line that is not JSON. With ``bad_rows="refuse"`` the first bad row
    ends the parts, and InvalidJob lists up to 20 of them with row and line; with ``"error"`` it is sent as
    a mark, so that its cells become errors and all other rows keep their index.

    Raises InvalidJob for a source that cannot be read at all, SetupError where a package is missing.
    """
    problems: list[Problem] = []
    first_bad = 0
    part = _Filling(fields)
    with closing(_read(source, partial(_check_names, fields=fields))) as rows:
        for index, (row, line) in enumerate(rows):
            found = _texts(row, fields, dialogues)
            if isinstance(found, _Bad):
                if bad_rows == "refuse":
                    first_bad = first_bad if problems else index
                    problems.append(found.at(index, line))
                else:
                    if part.is_full(0):
                        yield part.close()
                    part.add_bad(found)
            elif not problems:
                texts, size = found
                if part.is_full(size):
                    yield part.close()
                part.add(texts, size)
            if problems and (len(problems) >= MAX_PROBLEMS or index - first_bad >= _LOOK_ON_ROWS):
                break
    if problems:
        raise InvalidJob(problems)
    if part.rows:
        yield part.close()


def survey(
    source: Source,
    fields: Sequence[str],
    *,
    dialogues: Collection[str] = (),
    bad_rows: BadRows = "refuse",
    sample: int = 1000,
) -> Survey:
    """Read the whole source and draw an even sample from it. Raises as ``cut`` does.

    An iterator is used up by this: give a list or a path where the rows are to be submitted afterwards.
    """
    dice = random.Random(0)
    drawn: list[dict[str, str]] = []
    seen = text_bytes = total = 0
    for part in cut(source, fields, dialogues=dialogues, bad_rows=bad_rows):
        total += len(part)
        text_bytes += part.text_bytes
        for offset, row in enumerate(part.rows()):
            if offset in part.bad:
                continue
            seen += 1
            if len(drawn) < sample:
                drawn.append(row)
            elif (place := dice.randrange(seen)) < sample:
                drawn[place] = row
    return Survey(rows=total, text_bytes=text_bytes, sample=tuple(_first_that_fit(drawn, 8 * BLOCK_BYTES)))


def records(source: Source) -> Iterator[tuple[Any, int | None]]:
    """Every row of the source as it stands there, with all its fields, and its line in a text file.

    Raises InvalidJob for a row that cannot be read, SetupError where a package is missing.
    """
    with closing(_read(source, list)) as rows:
        for index, (row, line) in enumerate(rows):
            if isinstance(row, _Bad):
                raise InvalidJob(replace(row, remedy="mend the row").at(index, line))
            yield row, line


def _first_that_fit(rows: Iterable[dict[str, str]], budget_bytes: int) -> Iterator[dict[str, str]]:
    for row in rows:
        budget_bytes -= sum(len(text.encode()) for text in row.values())
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
        self.columns: list[list[str]] = [[] for _ in self.fields]
        self.bad: dict[int, tuple[str, str]] = {}
        self.rows = 0
        self.bytes = 0
        self._blocks_left = PART_BLOCKS[min(self.number, len(PART_BLOCKS) - 1)]
        self._start_block()

    def _start_block(self) -> None:
        self._blocks_left -= 1
        # Where the block in hand ends, in rows and bytes of the part. A row is always smaller than a block.
        self._last_row = self.rows + BLOCK_ROWS
        self._last_byte = self.bytes + BLOCK_BYTES

    def is_full(self, size: int) -> bool:
        """True where a row of ``size`` bytes belongs into the next part; begins the next block where it should."""
        if self.rows < self._last_row and self.bytes + size <= self._last_byte:
            return False
        if not self._blocks_left or self.bytes + BLOCK_BYTES > PART_BYTES:
            return True
        self._start_block()
        return False

    def add(self, texts: Sequence[str], size: int) -> None:
        for column, text in zip(self.columns, texts, strict=True):
            column.append(text)
        self.rows += 1
        self.bytes += size

    def add_bad(self, bad: _Bad) -> None:
        self.bad[self.rows] = ("bad_row", str(bad))
        self.add([""] * len(self.columns), 0)

    def close(self) -> Part:
        part = Part(
            number=self.number,
            first_row=self.first_row,
            columns=dict(zip(self.fields, self.columns, strict=True)),
            bad=self.bad,
            text_bytes=self.bytes,
        )
        self.number += 1
        self.first_row += self.rows
        self._start()
        return part


@dataclass(frozen=True, slots=True)
class _Bad:
    """Why a row is no row. Says nothing of the user's text but its type and size."""

    #: The row's field, or "" where the row as a whole is wrong.
    field: str
    got: str
    expected: str
    remedy: str

    def at(self, index: int, line: int | None) -> Problem:
        got = self.got if line is None else f"{self.got} (line {line})"
        return Problem(f"rows.{self.field}" if self.field else "rows", got, self.expected, self.remedy, index)

    def __str__(self) -> str:
        what = f"got {self.got}; expected {self.expected}"
        words = f"{self.field}: {what}" if self.field else what
        # Names of fields are the user's too: the server takes short and clean messages only.
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words[:400])


#: The way out for whoever cannot mend the rows, in Python's words and in the shell's.
_OR_ERROR = 'or get error cells for such rows with bad_rows="error" (--bad-rows error)'
_SKIP = f"mend the row, {_OR_ERROR}"
#: Who speaks in a dialogue.
_ROLES = ("system", "user", "assistant")


def _texts(row: object, fields: Sequence[str], dialogues: Collection[str]) -> tuple[list[str], int] | _Bad:
    """The texts of the fields and their size in UTF-8 bytes, or what is wrong with the row."""
    if isinstance(row, str):
        row = {"text": row}
    elif isinstance(row, list | tuple) and "messages" in dialogues:
        row = {"messages": row}
    elif isinstance(row, _Bad):
        return row
    elif type(row) is not dict and not isinstance(row, Mapping):  # the first look is the cheap one
        return _Bad("", _kind(row), "text, or a mapping of field to text", _SKIP)
    texts: list[str] = []
    size = 0
    for name in fields:
        value = row.get(name)
        if name in dialogues and (_is_list(value) or isinstance(value, str)):
            told = _dialogue(name, value)
            if isinstance(told, _Bad):
                return told
            value = told
        if not isinstance(value, str):
            if value is None and name not in row:
                has = ", ".join(short(key) for key in list(row)[:8]) or "no fields at all"
                return _Bad(
                    name,
                    "no such field",
                    f"text (the row has {has})",
                    f"name a field that rows have, or another task, {_OR_ERROR}",
                )
            what = "a list of messages" if name in dialogues else "text"
            return _Bad(name, _kind(value), what, f"make it {what} or leave the row out, {_OR_ERROR}")
        try:
            size += len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            return _Bad(
                name, "a lone surrogate", "text that UTF-8 can hold", f"save the source as UTF-8, {_OR_ERROR}"
            )
        if "\0" in value:
            return _Bad(
                name,
                "a NUL character",
                "text without NUL",
                f"remove the NUL characters (bytes of value 0), {_OR_ERROR}",
            )
        texts.append(value)
    if size > MAX_ROW_BYTES:
        return _Bad(
            fields[0],
            f"{size:,} bytes",
            f"at most {MAX_ROW_BYTES:,} bytes a row",
            f"split the text, {_OR_ERROR}",
        )
    return texts, size


def _is_list(value: object) -> bool:
    """A list, or the array in which numpy and pandas hold one."""
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def _dialogue(name: str, messages: Any) -> str | _Bad:
    """A list of messages, or the JSON of one, as JSON of their roles and contents; other keys stay here."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            messages = None
        if not isinstance(messages, list):
            return _Bad(name, "text that is no JSON list", "a list of messages", f"mend it, {_OR_ERROR}")
    said: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        )
        if role not in _ROLES or not isinstance(content, str) or "\0" in content:
            return _Bad(
                name,
                f"a message {number} that is none",
                f'messages {{"role": {" | ".join(_ROLES)}, "content": text}} without NUL',
                f"mend the dialogue, {_OR_ERROR}",
            )
        said.append({"role": role, "content": content})
    if not said or said[-1]["role"] != "user":
        got = f"a dialogue that ends with the {said[-1]['role']}" if said else "no message"
        return _Bad(name, got, "a last message of the user", f"leave the row out, {_OR_ERROR}")
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"))


def _kind(value: object) -> str:
    """What a value is, in words, and never the value: it may be as private as a text."""
    if value is None:
        return "null (None)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return f"a value of type {short(type(value).__name__)}"


# -- sources


def _read(source: Source, choose: _Choose) -> _Rows:
    if isinstance(source, str | os.PathLike):
        yield from _read_path(Path(source), choose)
    elif (pandas := sys.modules.get("pandas")) is not None and isinstance(source, pandas.DataFrame):
        yield from _read_frame(source, choose)
    elif pandas is not None and isinstance(source, pandas.Series):
        # It offers an Arrow stream too, but one of values, not of rows.
        yield from ((value, None) for value in source.tolist())
    elif hasattr(source, "__arrow_c_stream__"):
        yield from _read_arrow(_arrow().RecordBatchReader.from_stream(source), choose)
    elif isinstance(source, bytes | bytearray | Mapping) or not isinstance(source, Iterable):
        raise _unreadable(
            f"a value of type {type(source).__name__}",
            "a path, or a list, iterable, DataFrame or Arrow table of rows",
            "put a single row into a list",
        )
    else:
        for row in source:
            yield row, None


def _read_path(path: Path, choose: _Choose) -> _Rows:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    kind = suffix[0] if suffix else ""
    if kind not in TEXT_SUFFIXES and (kind != ".parquet" or packed):
        raise _unreadable(
            repr(short(str(path), 80)),
            f"a path that ends in {_SUFFIXES}",
            "rename the file; to submit one text, put it into a list",
        )
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, choose)
            return
        with gzip.open(path) if packed else path.open("rb") as file:
            yield from _read_text(kind, file, choose)
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise _unreadable(f"a broken archive {path.name!r}", "gzip", "pack the file again") from None
    except OSError as error:
        raise _unreadable(
            f"{short(str(path), 80)!r}: {(error.strerror or 'cannot be read').lower()}",
            "a file that can be read",
            "check the path",
        ) from None


def _read_text(kind: str, file: IO[bytes] | gzip.GzipFile, choose: _Choose) -> _Rows:
    match kind:
        case ".jsonl" | ".ndjson":
            yield from _read_jsonl(file)
        case ".txt":
            yield from ((_text(line), number) for number, line in _lines(file))
        case _:
            yield from _read_csv(file, choose, delimiter="\t" if kind == ".tsv" else ",")


def _lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[tuple[int, bytes | _Bad]]:
    """Lines by number from 1, without their ends and without a byte-order mark."""
    number = 0
    while raw := file.readline(_MAX_LINE_BYTES):
        number += 1
        line: bytes | _Bad = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1 and isinstance(line, bytes):
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not raw.endswith(b"\n") and len(raw) == _MAX_LINE_BYTES:
            while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            line = _Bad("", f"a line longer than {_MAX_LINE_BYTES:,} bytes", "a row per line", _SKIP)
        yield number, line


def _text(line: bytes | _Bad) -> str | _Bad:
    if isinstance(line, _Bad):
        return line
    try:
        return line.decode()
    except UnicodeDecodeError:
        return _Bad("", "bytes that are not UTF-8", "UTF-8", "save the file as UTF-8")


def _read_jsonl(file: IO[bytes] | gzip.GzipFile) -> _Rows:
    """A row per line; empty lines are no rows."""
    for number, line in _lines(file):
        text = _text(line)
        if isinstance(text, _Bad):
            yield text, number
        elif text.strip():
            try:
                yield json.loads(text), number
            except (ValueError, RecursionError) as error:
                why = (
                    f": {error.msg} at column {error.colno}"
                    if isinstance(error, json.JSONDecodeError)
                    else ""
                )
                yield _Bad("", f"broken JSON{why}", "a JSON object per line", _SKIP), number


def _read_csv(file: IO[bytes] | gzip.GzipFile, choose: _Choose, delimiter: str) -> _Rows:
    # The module's default would refuse fields that the server takes. It is process-wide, so it only grows.
    csv.field_size_limit(max(csv.field_size_limit(), 4 * MAX_ROW_BYTES))
    # Bytes that are not UTF-8 become lone surrogates, which are found where every text is checked.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    table = csv.reader(text, delimiter=delimiter)
    try:
        header = next(table)
    except (StopIteration, csv.Error):
        return
    choose(header)
    while True:
        # A quoted field may span lines; its first one is told.
        line = table.line_num + 1
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Bad("", f"broken CSV: {error}", "a row per line", "check the quotes"), line
            continue
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True)), line
        elif row:
            yield (
                _Bad("", f"{len(row)} fields", f"{len(header)}, as in the header", "check the quotes"),
                line,
            )


def _read_frame(frame: Any, choose: _Choose) -> _Rows:
    fields = choose([name for name in frame.columns if isinstance(name, str)])
    for lo in range(0, len(frame), BLOCK_ROWS):
        window = frame.iloc[lo : lo + BLOCK_ROWS]
        columns = [window[name].tolist() for name in fields]
        for values in zip(*columns, strict=True):
            yield dict(zip(fields, values, strict=True)), None


def _read_parquet(path: Path, choose: _Choose) -> _Rows:
    arrow = _arrow()
    import pyarrow.parquet

    # Opened here, so that a missing file is told like any other.
    with path.open("rb") as raw:
        try:
            with pyarrow.parquet.ParquetFile(raw) as file:
                fields = choose(file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=list(fields)):
                    yield from _read_batch(batch, fields)
        except arrow.ArrowException as error:
            raise _unreadable(
                f"{path.name!r}: {type(error).__name__}", "a Parquet file", "write the file again"
            ) from None


def _read_arrow(reader: Any, choose: _Choose) -> _Rows:
    fields = choose(reader.schema.names)
    for batch in reader:
        for lo in range(0, batch.num_rows, BLOCK_ROWS):
            yield from _read_batch(batch.slice(lo, BLOCK_ROWS), fields)


def _read_batch(batch: Any, fields: Sequence[str]) -> _Rows:
    columns = [batch.column(name).to_pylist() for name in fields]
    for values in zip(*columns, strict=True):
        yield dict(zip(fields, values, strict=True)), None


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


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise SetupError("Parquet and Arrow need pyarrow; pip install 'motet[arrow]'") from None
    return pyarrow


def _unreadable(got: str, expected: str, remedy: str) -> InvalidJob:
    return InvalidJob(Problem("source", got, expected, remedy))
