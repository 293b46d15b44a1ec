"""Sources of rows: any file, table or iterable, read strictly, one row after the other, in flat memory.

A source gives as many rows as it holds, in order, or it is refused: where its structure is broken (a quote that is
never closed, an archive that ends too soon, a file that grows) nothing behind that place can be trusted, so InvalidJob
ends the reading. What is wrong with one row alone is a ``Fault`` in its place. See ``motet.rows`` for what a row must be.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from motet.errors import InvalidJob, Problem, SetupError
from motet.protocol.values import EXPECTED, json_object
from motet.tasks import short
from motet.words import visible

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: What ``submit`` reads: a path, texts or mappings in a list or any iterable, a DataFrame, an Arrow table.
Source: TypeAlias = "str | os.PathLike[str] | Iterable[str | Mapping[str, Any]] | Any"
#: Rows as they are read: a str, a mapping or a ``Fault``, and its line where it stands in a text file.
Rows: TypeAlias = "Generator[tuple[Any, int | None], None, None]"
#: From the names of a table's columns those that are read.
ChooseColumns: TypeAlias = "Callable[[Sequence[str]], Sequence[str]]"

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_SUFFIXES = ".jsonl, .ndjson, .csv, .tsv, .txt (also with .gz), .parquet"
#: Rows of a table that are turned into Python's values at once.
_BATCH_ROWS = 1024
#: Bytes read from a file at once.
_READ_BYTES = 64 * 1024
#: Bytes of one line of a text file, fields that no task reads included: a guard against a file without line ends.
_MAX_LINE_BYTES = 16 * 1024 * 1024
#: Characters of one CSV field, also where no task reads it: how soon a quote that is never closed is found.
_MAX_FIELD = 1024 * 1024

#: The way out for whoever cannot mend the rows, in Python's words and in the shell's.
OR_ERROR = 'or get error cells for such rows with bad_rows="error" (--bad-rows error)'
SKIP = f"mend the row, {OR_ERROR}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row is no row, or a value no value. Says nothing of the user's text but its type and size."""

    #: The row's field, or "" where the row as a whole is wrong.
    field: str
    got: str
    #: "" where what was found says it all.
    expected: str
    remedy: str
    #: Class of the error that its cells become.
    error: str = "bad_row"

    def at(self, index: int, line: int | None) -> Problem:
        """The same, with its place."""
        got = self.got if line is None else f"{self.got} (line {line})"
        expected = self.expected or "a value that tasks can read"
        return Problem(f"rows.{self.field}" if self.field else "rows", got, expected, self.remedy, index)

    def __str__(self) -> str:
        what = f"got {self.got}; expected {self.expected}" if self.expected else self.got
        words = f"{self.field}: {what}" if self.field else what
        # Names of fields are the user's too: the server takes short and clean messages only.
        return visible(words[:400])


def read(source: Source, choose: ChooseColumns, *, gaps: bool = False) -> Rows:
    """Every row of a source. ``choose`` is asked once where the source is a table, and may refuse its columns.

    ``gaps``: a NaN of a DataFrame is read as the null that pandas writes so, and a column of floats that are whole but
    for gaps as the ints that pandas made floats of.

    A file must stay as it is while it is read: one that grows or shrinks is refused. Raises InvalidJob for what cannot
    be read at all or to its end, SetupError where a package is missing; what an iterable raises is passed on.
    """
    if isinstance(source, str | os.PathLike):
        yield from _read_path(Path(source), choose)
    elif (pandas := sys.modules.get("pandas")) is not None and isinstance(source, pandas.DataFrame):
        yield from _read_frame(source, choose, gaps)
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


def all_columns(names: Sequence[str]) -> Sequence[str]:
    """Every column that has a name, for ``read``. Raises InvalidJob for a name that stands twice."""
    doubled = next((name for name, n in Counter(names).items() if n > 1 and name), None)
    if doubled is not None:
        raise _unreadable(
            f"{names.count(doubled)} columns named {short(doubled)}", "a name for each", "rename one of them"
        )
    return [name for name in names if name or names.count(name) == 1]


# -- files


class _SteadyFile(io.FileIO):
    """A file that stays as long as it was when it was opened, or is refused.

    Of one that is being written the last row may be half a row, and of one that is cut nobody knows what is gone.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        about = os.fstat(self.fileno())
        #: None: a pipe, which has no length.
        self._bytes = about.st_size if stat.S_ISREG(about.st_mode) else None
        self._named = repr(short(path.name, 80))

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        n = super().readinto(buffer)
        # At every read, the last one included: whoever follows a growing file would never come to its end.
        if self._bytes is not None and (now := os.fstat(self.fileno()).st_size) != self._bytes:
            raise _unreadable(
                f"{self._named}, which had {self._bytes:,} bytes when reading began and has {now:,} now",
                "a file that nobody writes to meanwhile",
                "submit a copy of it, or wait until it is whole",
            )
        return n


#: A file of bytes, unpacked.
_Bytes: TypeAlias = "io.BufferedReader[_SteadyFile] | gzip.GzipFile"


def _read_path(path: Path, choose: ChooseColumns) -> Rows:
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
        with io.BufferedReader(_SteadyFile(path), _READ_BYTES) as file:
            if kind == ".parquet":
                yield from _read_parquet(path.name, file, choose)
            elif packed:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from _read_text(kind, unpacked, choose)
            else:
                yield from _read_text(kind, file, choose)
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise _unreadable(f"a broken archive {path.name!r}", "gzip", "pack the file again") from None
    except OSError as error:
        raise _unreadable(
            f"{short(str(path), 80)!r}: {(error.strerror or 'cannot be read').lower()}",
            "a file that can be read",
            "check the path",
        ) from None


def _read_text(kind: str, file: _Bytes, choose: ChooseColumns) -> Rows:
    start = file.peek(4)[:4]
    # Of two bytes a character, one is 0 in most scripts; a byte-order mark says it for the others.
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(start) == 4 and b"\0\0" in (start[::2], start[1::2])):
        raise _unreadable("a file in UTF-16 or UTF-32", "UTF-8", "save the file as UTF-8")
    match kind:
        case ".jsonl" | ".ndjson":
            yield from _read_jsonl(file)
        case ".txt":
            yield from ((_text(line), number) for number, line in _lines(file))
        case _:
            yield from _read_csv(file, choose, delimiter="\t" if kind == ".tsv" else ",")


def _lines(file: _Bytes) -> Iterator[tuple[int, bytes | Fault]]:
    """Lines by number from 1, without their ends and without a byte-order mark."""
    number = 0
    while raw := file.readline(_MAX_LINE_BYTES):
        number += 1
        line: bytes | Fault = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1 and isinstance(line, bytes):
            line = line.removeprefix(b"\xef\xbb\xbf")
            if b"\r" in line and not raw.endswith(b"\n"):
                raise _unreadable(
                    "lines that end with a carriage return alone",
                    "a row per line, each ended by a line feed",
                    r"convert the line ends, as with: tr '\r' '\n'",
                )
        if not raw.endswith(b"\n") and len(raw) == _MAX_LINE_BYTES:
            while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            line = Fault("", f"a line longer than {_MAX_LINE_BYTES:,} bytes", "a row per line", SKIP)
        yield number, line


def _text(line: bytes | Fault) -> str | Fault:
    if isinstance(line, Fault):
        return line
    try:
        return line.decode()
    except UnicodeDecodeError:
        return Fault("", "bytes that are not UTF-8", "UTF-8", "save the file as UTF-8")


# -- JSON lines


parse_json = json.JSONDecoder(object_pairs_hook=json_object).decode
# Python refuses to turn thousands of digits into a number, for that takes long; as a float they are infinite.
_parse_long_numbers = json.JSONDecoder(object_pairs_hook=json_object, parse_int=float).decode


def _read_jsonl(file: _Bytes) -> Rows:
    """A row per line; empty lines are no rows."""
    for number, line in _lines(file):
        text = _text(line)
        if isinstance(text, Fault):
            yield text, number
        elif text.strip():
            yield _json_row(text), number


def _json_row(text: str) -> Any:
    why = ""
    for parse in (parse_json, _parse_long_numbers):
        try:
            return parse(text)
        except json.JSONDecodeError as error:
            why = f": {error.msg} at column {error.colno}"
            break
        except (ValueError, RecursionError):
            continue
    return Fault("", f"broken JSON{why}", "a JSON object per line", SKIP)


# -- CSV


def _read_csv(file: _Bytes, choose: ChooseColumns, delimiter: str) -> Rows:
    """A row per record (RFC 4180). A quote opens a field only at its start, and closes it only at its end.

    Whatever leaves in doubt where a record ends makes all that follows doubtful, and ends the reading: see ``_Records``.
    An empty line is no row where the table has several columns. Where it has one, it could be a row of empty text or
    none, and is refused unless nothing follows it.
    """
    records = _Records(file, delimiter)
    header: list[str] = []
    while not header:
        record = records.next()
        if record is None:
            return
        header = record[0]
    names = choose(header)
    places = [(name, header.index(name)) for name in names]
    width, empty_line = len(header), 0
    while (record := records.next()) is not None:
        row, line = record
        if len(row) == width:
            if empty_line:
                raise _unreadable(
                    f"an empty line in a table of one column (line {empty_line})",
                    "a row per line",
                    'write "" for a row of empty text, or remove the line',
                )
            yield {name: row[place] for name, place in places}, line
        elif row:
            got = f"{len(row)} fields"
            if records.is_doubtful(row):
                raise _unreadable(
                    f"{got} in a row with quotes (line {line})",
                    f"{width}, as in the header",
                    'check the quotes: a field begins and ends with one, and holds "" for each of its own',
                )
            yield Fault("", got, f"{width}, as in the header", "check the quotes"), line
        elif width == 1:
            empty_line = empty_line or line


class _Records:
    """The records of a CSV file, each with its first line, as long as there is no doubt where they end.

    The csv module reads them, and is strict; the lines of the record in hand are kept to say where it broke.
    """

    def __init__(self, file: _Bytes, delimiter: str) -> None:
        # The module's default would refuse fields that the server takes. It is process-wide, so it only grows.
        csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
        self._line_end = _line_end(file, delimiter)
        # Bytes that are not UTF-8 become lone surrogates, which are found where every text is checked.
        self._text = io.TextIOWrapper(
            file, encoding="utf-8-sig", errors="surrogateescape", newline=self._line_end
        )
        self._delimiter = delimiter
        self._lines: list[str] = []
        self._table = csv.reader(self._read(), delimiter=delimiter, strict=True)

    def next(self) -> tuple[list[str], int] | None:
        """The fields of the next record, none for an empty line, and its first line. None at the end."""
        self._lines.clear()
        line = self._table.line_num + 1
        try:
            return next(self._table), line
        except StopIteration:
            return None
        except csv.Error:
            raise self._broken(line) from None

    def is_doubtful(self, row: Sequence[str]) -> bool:
        """The last record may have ended elsewhere: it has a quote within a field, or fields that span lines."""
        return len(self._lines) > 1 or any('"' in field for field in row)

    def _read(self) -> Iterator[str]:
        keep = self._lines.append
        for line in iter(partial(self._text.readline, _MAX_LINE_BYTES), ""):
            if "\0" in line or len(line) == _MAX_LINE_BYTES:
                raise self._no_line(line)
            keep(line)
            yield line

    def _no_line(self, line: str) -> InvalidJob:
        where = f"(line {self._table.line_num + 1})"
        if "\0" in line:
            return _unreadable(
                f"a NUL character {where}",
                "text without NUL",
                "check whether the file is whole and in UTF-8, and remove the bytes of value 0",
            )
        return _unreadable(
            f"a line of {_MAX_LINE_BYTES:,} characters or more {where}",
            "a row per line",
            "check the line ends",
        )

    def _broken(self, line: int) -> InvalidJob:
        """What is wrong with the record in hand, which begins in this line: of its fields the first that breaks it."""
        text, at, d = "".join(self._lines), 0, self._delimiter
        quoted = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
        bare = re.compile(rf"[^{d}\r\n]*+")
        while True:
            where = f"(line {line + text.count(self._line_end, 0, at)})"
            is_quoted = text.startswith('"', at)
            found = (quoted if is_quoted else bare).match(text, at)
            end = found.end() if found else len(text)
            if end - at > csv.field_size_limit():
                return _unreadable(
                    f"a field of more than {csv.field_size_limit():,} characters {where}",
                    "a shorter one",
                    "check whether its quote is closed; leave out what is no text",
                )
            if found is None:
                return _unreadable(
                    f"a quote that is never closed {where}",
                    'a quote at the end of the field, and "" for each within it',
                    "mend the quotes of this line",
                )
            if text[end : end + 1] not in ("", d, "\r", "\n"):
                return _unreadable(
                    f"a quoted field with text behind its closing quote {where}",
                    f"{'a tab' if d == chr(9) else 'a comma'} or the end of the line there",
                    'mend the quotes of this line: a quote within a field is written ""',
                )
            if text[end : end + 1] != d:
                break
            at = end + 1
        return _unreadable(
            f"a carriage return outside of quotes {where}",
            "one kind of line end",
            "write the file with all fields quoted (quoting=csv.QUOTE_ALL), or convert its line ends",
        )


def _line_end(file: _Bytes, delimiter: str) -> str:
    """What ends the lines of a CSV file: a carriage return where the header ends with one alone, else a line feed.

    So the one that does not end lines is never taken for an end of a row.
    """
    start = file.peek(1).removeprefix(b"\xef\xbb\xbf")
    field = rf'(?:"[^"]*+(?:""[^"]*+)*+"|[^{delimiter}"\r\n][^{delimiter}\r\n]*+)?+'
    header = re.match(rf"{field}(?:{delimiter}{field})*+(\r*+\n?)".encode(), start)
    if header is None or header.end() == len(start):
        # The look-ahead may end between a carriage return and its line feed: then nothing is known.
        return "\n"
    return "\r" if header[1] and not header[1].endswith(b"\n") else "\n"


# -- tables


def _read_frame(frame: Any, choose: ChooseColumns, gaps: bool) -> Rows:
    fields = choose([name for name in frame.columns if isinstance(name, str)])
    ints = {name for name in fields if gaps and _were_ints(frame[name])}
    for lo in range(0, len(frame), _BATCH_ROWS):
        window = frame.iloc[lo : lo + _BATCH_ROWS]
        columns = [window[name].tolist() for name in fields]
        if gaps:
            columns = [
                [_without_gap(value, name in ints) if type(value) is float else value for value in column]
                for name, column in zip(fields, columns, strict=True)
            ]
        for values in zip(*columns, strict=True):
            yield dict(zip(fields, values, strict=True)), None


def _were_ints(column: Any) -> bool:
    """A column of floats that has gaps, and whose other values are whole: ints, before pandas met the gaps."""
    if column.dtype.kind != "f":
        return False
    there = column.dropna()
    # Beyond 2^53 a float has no place for one more: nobody knows which int it was.
    return len(there) < len(column) and bool((there % 1 == 0).all() and (there.abs() <= 2**53).all())


def _without_gap(value: float, is_int: bool) -> float | int | None:
    return None if math.isnan(value) else int(value) if is_int else value


def _read_parquet(name: str, file: io.BufferedReader[_SteadyFile], choose: ChooseColumns) -> Rows:
    arrow = _arrow()
    import pyarrow.parquet

    rows = 0
    try:
        # Without ``pre_buffer``, which would hold the columns of the whole file.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
            fields = choose(table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=list(fields)):
                rows += batch.num_rows
                yield from _read_batch(batch, fields)
            told = table.metadata.num_rows
    except (arrow.ArrowException, OSError, ValueError) as error:
        # The text of such an error may hold a value.
        raise _unreadable(
            f"{name!r}: {type(error).__name__} behind row {rows:,}",
            "a whole Parquet file",
            "write the file again",
        ) from None
    if rows != told:
        raise _unreadable(
            f"{name!r}: {rows:,} rows of {told:,}", "a whole Parquet file", "write the file again"
        )


def _read_arrow(reader: Any, choose: ChooseColumns) -> Rows:
    fields = choose(reader.schema.names)
    for batch in reader:
        for lo in range(0, batch.num_rows, _BATCH_ROWS):
            yield from _read_batch(batch.slice(lo, _BATCH_ROWS), fields)


def _read_batch(batch: Any, fields: Sequence[str]) -> Rows:
    columns = [_values(name, batch.column(name)) for name in fields]
    for values in zip(*columns, strict=True):
        yield dict(zip(fields, values, strict=True)), None


def _values(name: str, column: Any) -> list[Any]:
    """A column as Python's values; a value that Python cannot hold is a ``Fault``."""
    try:
        found: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # bytes that are not UTF-8, times beyond Python's
        found = [_value(name, value) for value in column]
    return found


def _value(name: str, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Fault(name, "bytes that are not UTF-8", "UTF-8", f"mend the value, {OR_ERROR}")
    except (ValueError, OverflowError):
        return Fault(name, f"a value of type {value.type}", EXPECTED, f"make it text, {OR_ERROR}")


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise SetupError("Parquet and Arrow need pyarrow; pip install 'motet[arrow]'") from None
    return pyarrow


def _unreadable(got: str, expected: str, remedy: str) -> InvalidJob:
    return InvalidJob(Problem("source", got, expected, remedy))
