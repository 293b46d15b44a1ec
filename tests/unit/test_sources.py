"""As many rows as a source holds, in order, or a refusal that says where it broke: never fewer, more or other ones."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from motet.errors import InvalidJob
from motet.rows import cut, whole_rows

Table = list[list[str]]


def rows_of(source: Any, fields: list[str], **options: Any) -> list[list[str] | None]:
    """The texts of every row of a source; None where the row is bad."""
    return [
        None if offset in part.bad or None in row.values() else [text or "" for text in row.values()]
        for part in cut(source, fields, **options)
        for offset, row in enumerate(part.rows())
    ]


def refusal(source: Any, fields: list[str], **options: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        list(cut(source, fields, **options))
    return str(caught.value.problems[-1])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


Write = Callable[[str, "bytes | str"], Path]


# -- CSV whose structure is broken

COMMENTS = (
    "Row,text\n" + '1,"i am an unclosed comment”\n' + "".join(f"{i},comment {i}\n" for i in range(2, 40))
)
GHOSTS = "text,n\nfirst,1\n" + f'"{"x" * 1_200_000}\nGHOST ONE,7\nGHOST TWO,8\n",2\nlast,3\n'


@pytest.mark.parametrize("bad_rows", ["refuse", "error"])
@pytest.mark.parametrize(
    ("content", "words", "line"),
    [
        pytest.param(COMMENTS, "a quote that is never closed", 2, id="an unclosed quote"),
        pytest.param(
            'text,label\n"unclosed,1\nrow two,2\nrow "three",3\nrow four,4\n',
            "text behind its closing quote",
            2,
            id="closed by a later stray quote",
        ),
        pytest.param('text,n\na,1\n"b\nc",2\nd,"3\ne,4\n', "never closed", 5, id="behind a quoted newline"),
        pytest.param('text,n\n"a\nb","c\nd,4\n', "never closed", 3, id="in the second line of a row"),
        pytest.param(
            'text,n\na,1\n"b" ,2\nc,3\n', "text behind its closing quote", 3, id="a space behind a quote"
        ),
        pytest.param('text,n\na,1\n"b"c"\n,2\nd,3\n', "text behind", 3, id="a quote that is not doubled"),
        pytest.param('"text,n\na,1\n', "never closed", 1, id="in the header"),
        pytest.param('text,n\r\n"a\r\nb,1\r\n', "never closed", 2, id="with line ends of Windows"),
        pytest.param('text,n\r"a\rb,1\r', "never closed", 2, id="with line ends of old Macs"),
        pytest.param(GHOSTS, "a field of more than 1,048,576 characters", 3, id="a field that hides rows"),
        pytest.param("text,n\na,1\nb\0,2\nc,3\n", "a NUL character", 3, id="NUL"),
        pytest.param(
            "text,n\na,1\nb\rc,2\nd,3\n", "a carriage return outside", 3, id="a lone carriage return"
        ),
        pytest.param(
            'text,n\n"a\nb",1,2\nc,3\n', "3 fields in a row with quotes", 2, id="too wide, over two lines"
        ),
        pytest.param(
            'text,n\n "a, b",2\nc,3\n', "3 fields in a row with quotes", 2, id="a space before a quote"
        ),
        pytest.param("text\na\n\n\nb\n", "an empty line in a table of one column", 3, id="an empty line"),
    ],
)
def test_a_csv_whose_structure_is_broken_is_refused_with_the_line_in_both_modes(
    write: Write, content: str, words: str, line: int, bad_rows: Any
) -> None:
    said = refusal(write("a.csv", content), ["text"], bad_rows=bad_rows)
    assert words in said
    assert f"(line {line})" in said
    assert not any(secret in said for secret in ("comment ", "GHOST", "unclosed,", "xxx"))


def test_rows_that_were_bad_before_the_structure_broke_are_told_too(write: Write) -> None:
    with pytest.raises(InvalidJob) as caught:
        list(cut(write("a.csv", 'id,text\n1\n2,b\n3,"c\n'), ["text"]))
    assert ["(line 2)" in p.got for p in caught.value.problems] == [True, False]
    assert "(line 4)" in caught.value.problems[1].got


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param('text,n\n"a\nb",1\nc,2\n', ["a\nb", "c"], id="a quoted newline"),
        pytest.param('text,n\r\n"a\nb",1\r\nc,2\r\n', ["a\nb", "c"], id="Excel's quoted newline"),
        pytest.param('text,n\n"say ""hi""",1\n"""",2\n', ['say "hi"', '"'], id="doubled quotes"),
        pytest.param('text,n\n5" pipe,1\n6" pipe,2\n', ['5" pipe', '6" pipe'], id="inches"),
        pytest.param('text,n\n,1\n"",2\n', ["", ""], id="empty texts"),
        pytest.param("text,n\na,1\nb,2", ["a", "b"], id="no newline at the end"),
        pytest.param('text,n\na,1\n"b",2\n"c","3"', ["a", "b", "c"], id="a quote at the end"),
        pytest.param("text,n\ra,1\rb,2\r", ["a", "b"], id="old Macs"),
        pytest.param('text,n\r"a\nb",1\rc,2\r', ["a\nb", "c"], id="old Macs' quoted newline"),
        pytest.param('text,n\n"a\rb",1\n"c\r\nd",2\n', ["a\rb", "c\r\nd"], id="quoted carriage returns"),
        pytest.param("text,n\n\na,1\n\n\nb,2\n\n", ["a", "b"], id="empty lines between rows"),
        pytest.param('text\na\n""\nb\n\n\n', ["a", "", "b"], id="one column, empty lines at its end"),
        pytest.param("\n\ntext,n\na,1\n", ["a"], id="empty lines before the header"),
        pytest.param("text,n,n\na,1,2\n", ["a"], id="a doubled column that nobody reads"),
        pytest.param("text,n\na\u2028b\x85c\x0bd,1\n", ["a\u2028b\x85c\x0bd"], id="other separators"),
        pytest.param("text,n\r\r\na,1\r\r\n", ["a"], id="line ends written twice"),
        pytest.param('"te\nxt",text\n1,a\n', ["a"], id="a header of two lines"),
        pytest.param("text\n", [], id="a header alone"),
        pytest.param("text", [], id="a header without a newline"),
    ],
)
def test_a_csv_that_keeps_the_rules_is_read_whole(write: Write, content: str, expected: list[str]) -> None:
    assert rows_of(write("a.csv", content), ["text"]) == [[text] for text in expected]


def test_a_row_of_another_width_is_a_bad_row_where_no_quote_leaves_its_end_in_doubt(write: Write) -> None:
    path = write("a.csv", 'text,n\na,1\nb\n"c, c",3,4\nd,5\n')
    assert rows_of(path, ["text"], bad_rows="error") == [["a"], None, None, ["d"]]


# -- any CSV that programs write

CHARACTERS = st.sampled_from("ab ,;\t\"'\n\u2028é\\5") | st.characters(
    exclude_characters="\0\r", codec="utf-8"
)
TEXTS = st.text(CHARACTERS, max_size=8)
#: Rows of text; the header says what the columns are called.
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(TEXTS, min_size=width, max_size=width), min_size=1, max_size=12)
)
FILES = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_text(
    content: str, fields: list[str], suffix: str = ".csv", **options: Any
) -> list[list[str] | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content.encode())
        return rows_of(path, fields, **options)


def written(table: Table, **options: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **options).writerows([[f"c{i}" for i in range(len(table[0]))], *table])
    return out.getvalue()


def names(table: Table) -> list[str]:
    return [f"c{i}" for i in range(len(table[0]))]


@FILES
@given(
    TABLES,
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([",", "\t"]),
    st.booleans(),
)
def test_what_pythons_csv_writes_is_read_back(
    table: Table, quoting: Any, line_end: str, delimiter: str, bom: bool
) -> None:
    content = written(table, quoting=quoting, lineterminator=line_end, delimiter=delimiter)
    suffix = ".tsv" if delimiter == "\t" else ".csv"
    assert read_text("\ufeff" * bom + content, names(table), suffix) == table


@pytest.mark.parametrize("size", [8192, 65_536, 131_072])
def test_a_look_ahead_that_ends_between_carriage_return_and_line_feed_takes_none_for_the_other(
    write: Write, size: int
) -> None:
    for more in range(-2, 3):
        header = "text," + "n" * (size - len("text,\r") + more)
        path = write("long.csv", f"{header}\r\na,1\r\nb,2\r\n")
        assert rows_of(path, ["text"]) == [["a"], ["b"]]


@FILES
@given(TABLES.map(lambda table: [[text.replace("é", "\r") for text in row] for row in table]))
def test_carriage_returns_in_quotes_are_read_back(table: Table) -> None:
    assert read_text(written(table, quoting=csv.QUOTE_ALL), names(table)) == table


@FILES
@given(TABLES, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from(["\n", "\r\n"]))
def test_what_pandas_writes_is_read_back(table: Table, quoting: Any, line_end: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table, columns=names(table))
    content = frame.to_csv(index=False, quoting=quoting, lineterminator=line_end)
    assert read_text(content, names(table)) == table


@FILES
@given(TABLES)
def test_what_excel_writes_is_read_back(table: Table) -> None:
    def cell(text: str) -> str:
        # A cell's newline stays a line feed, whatever ends the lines; of quotes there are as few as can be.
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text

    lines = [",".join(map(cell, row)) + "\r\n" for row in [names(table), *table]]
    empty = [row == [""] for row in table]
    if not any(empty):
        assert read_text("".join(lines), names(table)) == table
        return
    # Of a table of one column Excel writes an empty cell as an empty line: a row to it, and none to others.
    last = max((i for i, is_empty in enumerate(empty) if not is_empty), default=-1)
    if any(empty[: last + 1]):
        with pytest.raises(InvalidJob, match="an empty line in a table of one column"):
            read_text("".join(lines), names(table))
    else:
        assert read_text("".join(lines), names(table)) == table[: last + 1]


def strictly(content: str) -> list[list[str]] | None:
    """The records of a CSV by RFC 4180, with any text in an unquoted field; None where it is broken. [] is an empty line."""
    found: list[list[str]] = []
    row: list[str] = []
    i = 0
    while i < len(content):
        if content[i] == '"':
            text, i = "", i + 1
            while True:
                if i >= len(content):
                    return None
                if content[i] == '"' and content[i + 1 : i + 2] == '"':
                    text, i = text + '"', i + 2
                elif content[i] == '"':
                    i += 1
                    break
                else:
                    text, i = text + content[i], i + 1
            if i < len(content) and content[i] not in ",\n":
                return None
            row.append(text)
        else:
            end = min(e for e in (content.find(",", i), content.find("\n", i), len(content)) if e >= 0)
            text, i = content[i:end], end
            if text or row or content[i : i + 1] == ",":
                row.append(text)
        if i >= len(content) or content[i] == "\n":
            found.append(row)
            row = []
        elif i + 1 == len(content):
            found.append([*row, ""])
        i += 1
    return found


@settings(FILES, max_examples=600)
@given(TABLES, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.data())
def test_a_quote_more_or_less_or_a_cut_is_refused_or_read_as_the_rules_say(
    table: Table, quoting: Any, data: st.DataObject
) -> None:
    content = written(table, quoting=quoting, lineterminator="\n")
    header = content.index("\n") + 1
    at = data.draw(st.integers(header, len(content)))
    quotes = [i for i, c in enumerate(content) if c == '"' and i >= header]
    match data.draw(st.sampled_from(["insert", "delete", "cut"])):
        case "insert":
            content = content[:at] + '"' + content[at:]
        case "delete":
            assume(quotes)
            at = data.draw(st.sampled_from(quotes))
            content = content[:at] + content[at + 1 :]
        case _:
            content = content[:at]
    records_there = strictly(content)
    width = len(table[0])
    rows = [row for row in (records_there or [])[1:] if row]
    whole = records_there is not None and all(len(row) == width for row in rows)
    ambiguous = width == 1 and [] in (records_there or [])
    try:
        found = read_text(content, names(table), bad_rows="error")
    except InvalidJob:
        assert not whole or ambiguous
        return
    assert records_there is not None
    assert found == [row if len(row) == width else None for row in rows]


# -- archives


def test_an_archive_cut_anywhere_is_refused(write: Write) -> None:
    lines = "".join(f"row {i}\n" for i in range(2000)).encode()
    packed = gzip.compress(lines, mtime=0)
    for end in {*range(1, len(packed), 97), 1, 9, 10, 11, len(packed) - 9, len(packed) - 8, len(packed) - 1}:
        assert "a broken archive" in refusal(write("a.txt.gz", packed[:end]), ["text"], bad_rows="error"), end


def test_an_archive_with_a_changed_byte_is_refused(write: Write) -> None:
    packed = bytearray(gzip.compress(b"row\n" * 2000 + bytes(range(1, 9)), compresslevel=0, mtime=0))
    packed[len(packed) // 2] ^= 1
    assert "a broken archive" in refusal(write("a.txt.gz", bytes(packed)), ["text"], bad_rows="error")


def test_an_archive_of_several_members_is_read_to_its_end(write: Write) -> None:
    packed = gzip.compress(b'text,n\n"a\n') + gzip.compress(b'b",1\nc') + gzip.compress(b",2\n")
    assert rows_of(write("a.csv.gz", packed), ["text"]) == [["a\nb"], ["c"]]
    assert "a broken archive" in refusal(write("a.csv.gz", packed + b"more"), ["text"], bad_rows="error")


# -- files that change


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".txt.gz"])
@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_its_length_while_it_is_read_is_refused(
    write: Write, suffix: str, change: str
) -> None:
    line = {".jsonl": '{"text": "row"}\n', ".csv": "row\n"}.get(suffix, "row\n")
    whole = ("text\n" if suffix == ".csv" else "") + line * 200_000
    # Not packed smaller, so that the file is longer than what is read at once.
    content = gzip.compress(whole.encode(), compresslevel=0) if suffix.endswith(".gz") else whole.encode()
    path = write(f"a{suffix}", content)
    rows = whole_rows(path)
    assert len(list(islice(rows, 10))) == 10
    with path.open("r+b") as file:
        if change == "grows":
            file.seek(0, io.SEEK_END)
            file.write(content)
        else:
            file.truncate(100_000)
    with pytest.raises(InvalidJob, match="when reading began and has") as caught:
        list(rows)
    assert "nobody writes to" in str(caught.value)


def test_a_table_that_grows_while_it_is_read_is_refused(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write("a.parquet", b"")
    table = arrow.table({"text": [f"row {i} {'x' * 90}" for i in range(50_000)]})
    parquet.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="none")
    rows = whole_rows(path)
    next(rows)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InvalidJob, match="when reading began and has"):
        list(rows)


# -- Parquet and Arrow


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
def test_a_parquet_file_with_a_broken_page_is_refused(write: Write, compression: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    table = arrow.table({"text": [f"row {i}" for i in range(5000)]})
    parquet.write_table(table, out, compression=compression, use_dictionary=False)
    raw = out.getvalue()
    for broken in (raw[:100] + b"\xff" * 200 + raw[300:], raw[:100] + raw[1000:], raw[: len(raw) // 2]):
        said = refusal(write("a.parquet", broken), ["text"], bad_rows="error")
        assert "a whole Parquet file" in said
        assert "row 1" not in said.replace("behind row", "")


def test_a_page_whose_checksum_is_wrong_is_refused(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    table = arrow.table({"text": [f"row {i}" for i in range(500)]})
    parquet.write_table(table, out, compression="none", use_dictionary=False, write_page_checksum=True)
    raw = out.getvalue()
    at = raw.index(b"row 250")
    path = write("a.parquet", raw[:at] + b"cow" + raw[at + 3 :])
    assert "a whole Parquet file" in refusal(path, ["text"], bad_rows="error")


def test_a_value_that_python_cannot_hold_is_bad_by_itself() -> None:
    arrow = pytest.importorskip("pyarrow")
    raw = arrow.array([b"good", b"\xff\xfe", b"fine"])
    broken = arrow.Array.from_buffers(arrow.string(), 3, raw.buffers())
    assert rows_of(arrow.table({"text": broken}), ["text"], bad_rows="error") == [["good"], None, ["fine"]]
    assert "bytes that are not UTF-8" in refusal(arrow.table({"text": broken}), ["text"])
    late = arrow.array([0, 2**62], arrow.timestamp("s"))
    found = list(whole_rows(arrow.table({"at": late, "n": [1, 2]})))
    assert [row["n"] for row, _ in found] == [1, 2]


def test_a_column_that_stands_twice_is_refused_where_it_is_read(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    sources = [
        arrow.table([["a"], ["b"], [1]], names=["text", "text", "n"]),
        pandas.DataFrame([["a", "b", 1]], columns=["text", "text", "n"]),
        write("a.csv", "text,text,n\na,b,1\n"),
    ]
    for source in sources:
        assert "2 columns of that name" in refusal(source, ["text"], bad_rows="error")
        with pytest.raises(InvalidJob, match="2 columns named text"):
            list(whole_rows(source))
    # Excel names no column behind the last one, and often writes several of them.
    assert list(whole_rows(write("b.csv", "text,,\na,,\n"))) == [({"text": "a"}, 2)]


# -- encodings and line ends


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.csv.gz"])
def test_a_file_in_utf_16_is_refused_in_both_modes(write: Write, name: str, encoding: str) -> None:
    content = 'text\n"one"\ntwo\n'.encode(encoding)
    path = write(name, gzip.compress(content) if name.endswith(".gz") else content)
    assert "expected UTF-8; save the file as UTF-8" in refusal(path, ["text"], bad_rows="error")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_lines_that_end_with_a_carriage_return_alone_are_refused(write: Write, name: str) -> None:
    path = write(name, b'"one"\r"two"\r"three"\r')
    assert "a carriage return alone" in refusal(path, ["text"], bad_rows="error")


def test_the_last_line_needs_no_newline(write: Write) -> None:
    assert rows_of(write("a.txt", "a\nb"), ["text"]) == [["a"], ["b"]]
    assert rows_of(write("a.jsonl", '"a"\n"b"'), ["text"]) == [["a"], ["b"]]
    # A line that was cut is not taken for a row.
    assert rows_of(write("a.jsonl", '{"text": "a"}\n{"text": "b'), ["text"], bad_rows="error") == [
        ["a"],
        None,
    ]


# -- JSON lines


@pytest.mark.parametrize(
    ("line", "good"),
    [
        pytest.param('{"text": "a", "n": NaN}', True, id="NaN beside it"),
        pytest.param('{"text": "a", "n": ' + "9" * 5000 + "}", True, id="thousands of digits beside it"),
        pytest.param('{"text": "a", "n": 1, "n": 2}', True, id="another key twice"),
        pytest.param('{"text": "a", "text": "b"}', False, id="its key twice"),
        pytest.param('{"text": "a"} {"text": "b"}', False, id="two objects in one line"),
        pytest.param("7", False, id="a number"),
        pytest.param("NaN", False, id="NaN alone"),
        pytest.param("9" * 5000, False, id="thousands of digits alone"),
        pytest.param("null", False, id="null"),
        pytest.param('{"n": ' + "9" * 5000 + ', "text": "a"', False, id="broken behind thousands of digits"),
        pytest.param("[" + "9" * 5000 + "," + "[" * 100_000, False, id="deep behind thousands of digits"),
        pytest.param('["a"]', False, id="a list"),
    ],
)
def test_a_line_of_json_is_a_row_where_what_is_read_of_it_is_text(
    write: Write, line: str, good: bool
) -> None:
    path = write("a.jsonl", f'{{"text": "first"}}\n{line}\n{{"text": "last"}}\n')
    assert rows_of(path, ["text"], bad_rows="error") == [["first"], ["a"] if good else None, ["last"]]


def test_labels_with_a_key_twice_are_refused(write: Write) -> None:
    with pytest.raises(
        InvalidJob, match=r"^row 1, rows: got an object in which a key stands twice \(line 2\)"
    ):
        list(whole_rows(write("a.jsonl", '{"topic": "a"}\n{"topic": "a", "topic": "b"}\n')))


@FILES
@given(st.lists(st.dictionaries(TEXTS, TEXTS, max_size=3), max_size=6))
def test_what_json_writes_is_read_back(rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [row for row, _ in whole_rows(path)] == rows


def test_a_message_with_a_key_twice_is_none(write: Write) -> None:
    path = write("a.jsonl", '[{"role": "user", "content": "a", "content": "b"}]\n')
    said = refusal(path, ["messages"], dialogues={"messages"})
    assert "a message 0 that is none" in said


def numbers() -> Iterator[str]:
    yield from map(str, range(3))


def test_an_iterable_is_read_once_and_as_it_is() -> None:
    assert rows_of(numbers(), ["text"]) == [["0"], ["1"], ["2"]]
