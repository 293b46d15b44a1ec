from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet import rows as rows_module
from motet import sources
from motet.errors import InvalidJob
from motet.protocol.envelope import unpack
from motet.protocol.settings import Settings
from motet.rows import BLOCK_BYTES, BLOCK_ROWS, MAX_ROW_BYTES, PART_BYTES, Part, cut, survey
from scheduler import blocks

FIELDS = ["text"]


def texts(source: Any, fields: list[str] | None = None, **options: Any) -> list[list[str | None]]:
    """Every row of a source as the texts of its fields."""
    return [list(row.values()) for part in cut(source, fields or FIELDS, **options) for row in part.rows()]


def bad_in(part: Part) -> dict[int, tuple[str, str]]:
    """Offset -> why, of rows that are none and of those with a bad field."""
    return {i: why for bad in (part.bad, *part.bad_fields.values()) for i, why in bad.items()}


def test_blocks_are_the_blocks_of_the_server() -> None:
    server = Settings()
    assert (server.block_rows, server.block_bytes) == (BLOCK_ROWS, BLOCK_BYTES)
    assert server.max_row_bytes == MAX_ROW_BYTES
    assert server.max_part_bytes > 2 * PART_BYTES


def test_the_first_parts_end_at_1024_rows() -> None:
    parts = list(cut((str(i) for i in range(2500)), FIELDS))
    assert [(p.number, p.first_row, len(p)) for p in parts] == [(0, 0, 1024), (1, 1024, 1024), (2, 2048, 452)]


def test_a_part_ends_before_the_row_that_would_take_it_beyond_a_mebibyte() -> None:
    row = "é" * 100_000  # 200,000 bytes
    parts = list(cut([row] * 12, FIELDS))
    assert [len(p) for p in parts] == [5, 5, 2]
    assert all(p.text_bytes <= BLOCK_BYTES for p in parts)


def test_parts_grow_block_by_block_until_they_hold_sixteen() -> None:
    parts = list(cut((str(i) for i in range(52_000)), FIELDS))
    assert [len(p) / BLOCK_ROWS for p in parts[:-1]] == [1, 1, 1, 1, 2, 4, 8, 16, 16]
    assert (sum(map(len, parts)), parts[-1].first_row) == (52_000, 50 * BLOCK_ROWS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 900, 20_000, 262_144]), min_size=1, max_size=60), st.integers(1, 400))
def test_the_server_cuts_the_same_blocks_out_of_parts_as_out_of_the_whole(
    sizes: list[int], times: int
) -> None:
    sizes = (sizes * times)[:9000]
    while sum(sizes) > 30 * BLOCK_BYTES:
        sizes = sizes[: len(sizes) // 2]
    parts = list(cut(["x" * size for size in sizes], FIELDS))
    assert all(p.text_bytes <= PART_BYTES for p in parts)
    of_parts = [
        (p.first_row + lo, p.first_row + hi)
        for p in parts
        for lo, hi in blocks.cut([len(text) for text in p.columns["text"]], BLOCK_ROWS, BLOCK_BYTES)
    ]
    assert of_parts == list(blocks.cut(sizes, BLOCK_ROWS, BLOCK_BYTES))


def test_the_same_rows_give_the_same_bytes_from_any_kind_of_source(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "other": i} for i in range(1500)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    expected = [p.encode() for p in cut(rows, FIELDS)]
    for source in (path, str(path), packed, [r["text"] for r in rows], (r for r in rows)):
        assert [p.encode() for p in cut(source, FIELDS)] == expected


def test_only_the_fields_that_tasks_read_are_kept() -> None:
    [part] = cut([{"body": "b", "title": "t", "secret": "s"}], ["title", "body"])
    assert unpack(part.encode()) == {"columns": {"title": ["t"], "body": ["b"]}, "first_row": 0}
    assert msgpack.unpackb(part.encode(squeeze=False)) == unpack(part.encode())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\n\ntwo\r\nlast", ["one", "", "two", "last"]),
        ("bom.txt", b"\xef\xbb\xbfone\n", ["one"]),
        ("a.ndjson", b'{"text": "one"}\n\n"two"\n', ["one", "two"]),
        ("a.csv", b'id,text\n1,"one, and\nmore"\n\n2,two\n', ["one, and\nmore", "two"]),
        ("bom.csv", b"\xef\xbb\xbftext\none\n", ["one"]),
        ("a.TSV", b"text\tid\none\t1\n", ["one"]),
        ("unicode.txt", "a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),
        ("empty.jsonl", b"", []),
        ("header.csv", b"text\n", []),
    ],
)
def test_files_of_text_are_read(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert texts(path) == [[text] for text in expected]


def test_a_csv_field_may_be_as_long_as_a_row_may_be(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "x" * 250_000 + "\n")
    before = csv.field_size_limit(1000)
    try:
        assert texts(path) == [["x" * 250_000]]
    finally:
        csv.field_size_limit(before)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "x"


BAD_ROWS = [
    pytest.param(3, "rows", "int", id="a number for a row"),
    pytest.param({"text": 2**63}, "rows.text", "int", id="2**63"),
    pytest.param({"text": math.nan}, "rows.text", "NaN", id="NaN"),
    pytest.param(
        {"text": [1, {"a": math.inf}]}, "rows.text", "infinite", id="infinity in an object in a list"
    ),
    pytest.param({"text": {1: "a"}}, "rows.text", "key is no text", id="an object with a number for a key"),
    pytest.param({"text": nested(40)}, "rows.text", "deeper than 32", id="too deep"),
    pytest.param({"text": object()}, "rows.text", "object", id="an unknown object"),
    pytest.param({"text": b"bytes"}, "rows.text", "bytes", id="bytes"),
    pytest.param({"body": "b"}, "rows.text", "no such field", id="a missing field"),
    pytest.param({}, "rows.text", "no such field", id="no field"),
    pytest.param("a\0b", "rows.text", "NUL", id="NUL"),
    pytest.param("a\ud800b", "rows.text", "surrogate", id="a lone surrogate"),
    pytest.param("x" * 300_000, "rows.text", "300,000 bytes", id="300 kB"),
    pytest.param("é" * (MAX_ROW_BYTES // 2 + 1), "rows.text", "bytes", id="too many bytes, not characters"),
]


@pytest.mark.parametrize(("row", "field", "got"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_place_and_never_repeated(row: Any, field: str, got: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        list(cut(["good", row, "good"], FIELDS))
    [problem] = caught.value.problems
    assert (problem.row, problem.field) == (1, field)
    assert got in problem.got
    assert problem.remedy
    assert len(str(problem)) < 300


@pytest.mark.parametrize(("row", "field", "got"), BAD_ROWS)
def test_a_bad_row_can_become_a_mark_instead_and_the_others_keep_their_index(
    row: Any, field: str, got: str
) -> None:
    [part] = cut(["good", row, "good"], FIELDS, bad_rows="error")
    assert part.columns == {"text": ["good", "", "good"]}
    [(offset, (error, message))] = bad_in(part).items()
    assert (offset, error) == (1, "bad_row")
    assert got in message
    sent = unpack(part.encode())
    if field == "rows":
        assert (sent["bad"], sent["columns"]) == ({1: ["bad_row", message]}, {"text": ["good", "", "good"]})
    else:
        assert sent["bad_fields"] == {"text": [["bad_row", message, [1]]]}
        assert sent["columns"] == {"text": ["good", None, "good"]}, (
            "an older server finds no empty text there"
        )
    assert message.isprintable()
    assert len(message) <= 500


@pytest.mark.parametrize(
    ("name", "content", "line", "got"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n', 3, "broken JSON"),
        ("deep.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", 2, "broken JSON"),
        ("digits.jsonl", b'{"text": "a"}\n' + b"9" * 5000 + b"\n", 2, "float"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', 2, "UTF-8"),
        ("latin.txt", b"a\n\xe9\n", 2, "UTF-8"),
        ("latin.csv", b"text\na\n\xe9\n", 3, "surrogate"),
        ("short.csv", b"id,text\n1,a\n2\n", 3, "1 fields"),
        ("surrogate.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
        ("nul.txt", b"a\nb\0c\n", 2, "NUL"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 9223372036854775808}\n', 2, "int"),
        ("nan.jsonl", b'{"text": "a"}\n{"text": NaN}\n', 2, "NaN"),
    ],
)
def test_a_bad_row_of_a_file_is_told_with_its_line(
    tmp_path: Path, name: str, content: bytes, line: int, got: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidJob) as caught:
        list(cut(path, FIELDS))
    [problem] = caught.value.problems
    assert problem.row == 1
    assert got in problem.got
    assert f"(line {line})" in problem.got
    [part] = cut(path, FIELDS, bad_rows="error")
    assert len(bad_in(part)) == 1


def test_a_line_without_end_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_LINE_BYTES", 64)
    path = tmp_path / "endless.txt"
    path.write_bytes(b"short\n" + b"x" * 1000 + b"\nshort again\n")
    [part] = cut(path, FIELDS, bad_rows="error")
    assert part.columns["text"] == ["short", "", "short again"]
    assert list(part.bad) == [1]


def test_the_first_twenty_problems_are_listed_and_nothing_is_yielded_after_the_first() -> None:
    source = ["good"] * 3000 + [1] * 50
    parts: list[Part] = []
    with pytest.raises(InvalidJob) as caught:
        parts.extend(cut(source, FIELDS))
    assert [p.row for p in caught.value.problems] == list(range(3000, 3020))


def test_a_refusal_comes_soon_in_a_source_that_never_ends() -> None:
    def endless() -> Iterator[Any]:
        yield 1
        while True:
            yield "good"

    with pytest.raises(InvalidJob) as caught:
        list(cut(endless(), FIELDS))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no-such-file.jsonl", "no such file"),
        ("picture.png", "ends in"),
        ("just some text", "put it into a list"),
        (b"bytes", "into a list"),
        ({"text": "one row"}, "into a list"),
        (42, "int"),
        (None, "NoneType"),
        (".", "ends in"),
    ],
)
def test_a_source_that_is_none_is_refused_with_a_remedy(source: Any, words: str) -> None:
    with pytest.raises(InvalidJob, match=words):
        list(cut(source, FIELDS))


def test_a_folder_and_broken_archives_are_refused_as_sources(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "not.txt.gz").write_bytes(b"plain")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text\n" * 1000)[:-10])
    for name in ("folder.jsonl", "not.txt.gz", "cut.txt.gz"):
        with pytest.raises(InvalidJob) as caught:
            list(cut(tmp_path / name, FIELDS))
        assert caught.value.problems[0].field == "source"


def test_a_table_without_the_field_is_refused_with_the_names_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,b\n")
    with pytest.raises(InvalidJob, match="one of id, body"):
        list(cut(path, FIELDS, bad_rows="error"))


def test_what_an_iterable_raises_is_not_hidden() -> None:
    def breaks() -> Iterator[str]:
        yield "good"
        raise RuntimeError("the database is gone")

    with pytest.raises(RuntimeError, match="the database is gone"):
        list(cut(breaks(), FIELDS))


def test_a_data_frame_is_read_by_position_whatever_its_index() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", "b"], "n": [1, 2]}, index=[7, 7])
    assert texts(frame) == [["a"], ["b"]]
    with pytest.raises(InvalidJob) as caught:
        list(cut(pandas.DataFrame({"text": ["a", b"b"]}), FIELDS))
    assert caught.value.problems[0].row == 1
    with pytest.raises(InvalidJob, match="no such column"):
        list(cut(frame, ["body"]))


def test_arrow_tables_and_parquet_files_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"n": [1, 2, 3], "text": ["a", "b", "c"]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    for source in (table, table.to_batches()[0], path):
        assert texts(source) == [["a"], ["b"], ["c"]]
    [part] = cut(table, ["n"], bad_rows="error")
    assert part.columns == {"n": [1, 2, 3]}
    with pytest.raises(InvalidJob, match="one of n, text"):
        list(cut(path, ["body"]))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InvalidJob, match="a whole Parquet file"):
        list(cut(tmp_path / "broken.parquet", FIELDS))


DIALOGUE = [{"role": "assistant", "content": 'Grüß "Gott"'}, {"role": "user", "content": "Hello", "seen": 1}]
AS_JSON = '[{"role":"assistant","content":"Grüß \\"Gott\\""},{"role":"user","content":"Hello"}]'


def test_a_dialogue_is_sent_as_json_of_its_messages_from_any_kind_of_source(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": DIALOGUE}) + "\n")
    sources: list[Any] = [
        [{"messages": DIALOGUE}],
        [DIALOGUE],
        [tuple(DIALOGUE)],
        [{"messages": AS_JSON}],
        [{"messages": json.dumps(DIALOGUE)}],
        path,
    ]
    for source in sources:
        assert texts(source, ["messages"], dialogues={"messages"}) == [[AS_JSON]]
    assert json.loads(AS_JSON)[0] == DIALOGUE[0]
    assert texts([{"past": DIALOGUE, "text": "t"}], ["text", "past"], dialogues={"past"}) == [["t", AS_JSON]]
    assert survey([DIALOGUE], ["messages"], dialogues={"messages"}).sample == ({"messages": AS_JSON},)
    # Where no chat reads it, a template may: {messages[-1]}.
    assert survey([{"messages": DIALOGUE}], ["messages"]).sample == ({"messages": DIALOGUE},)


def test_a_dialogue_in_a_table_is_read_as_well(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("pandas")
    table = arrow.table({"messages": [DIALOGUE]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for source in (table, tmp_path / "a.parquet", table.to_pandas()):
        assert texts(source, ["messages"], dialogues={"messages"}) == [[AS_JSON]]


@pytest.mark.parametrize(
    ("dialogue", "got"),
    [
        ("Hello", "no JSON list"),
        ('{"role": "user"}', "no JSON list"),
        ("[" * 100_000, "no JSON list"),
        ('["Hello"]', "message 0"),
        ([], "no message"),
        (["hello"], "message 0"),
        ([DIALOGUE[0], {"role": "user"}], "message 1"),
        ([{"role": "user", "content": None}], "message 0"),
        ([{"role": "bot", "content": "x"}], "message 0"),
        ([DIALOGUE[1], DIALOGUE[0]], "ends with the assistant"),
        ([{"role": "user", "content": "a\0b"}], "message 0"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": "x" * MAX_ROW_BYTES}], "bytes"),
        ({"role": "user", "content": "x"}, "dict"),
        (7, "int"),
    ],
)
def test_a_dialogue_that_is_none_is_a_bad_row(dialogue: Any, got: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        list(cut([{"messages": dialogue}], ["messages"], dialogues={"messages"}))
    [problem] = caught.value.problems
    assert problem.field == "rows.messages"
    assert got in problem.got
    [part] = cut([{"messages": dialogue}], ["messages"], dialogues={"messages"}, bad_rows="error")
    assert list(part.bad_fields["messages"]) == [0]


def test_a_list_of_messages_is_a_list_like_any_other_where_no_dialogue_is_read() -> None:
    [part] = cut([{"text": DIALOGUE}, DIALOGUE], FIELDS, dialogues={"messages"}, bad_rows="error")
    assert list(part.bad_fields["text"]) == [1]
    assert part.columns["text"] == [DIALOGUE, ""]


def test_mean_bytes_are_those_of_good_rows() -> None:
    [part] = cut([{"a": "é", "b": ""}, 3, {"a": "xxxx", "b": "y"}], ["a", "b"], bad_rows="error")
    assert part.mean_bytes() == {"a": 3.0, "b": 0.5}
    [none] = cut([3], ["a"], bad_rows="error")
    assert none.mean_bytes() == {"a": 0.0}


def partly_bad_sources(folder: Path, gone: str | None) -> dict[str, Any]:
    """The same three rows, of which the second has no title and the last no body."""
    rows = [{"title": "t0", "body": "b0"}, {"title": gone, "body": "b1"}, {"title": "t2", "body": gone}]
    sources: dict[str, Any] = {"rows": rows, "any iterable": iter(rows)}
    sources["jsonl"] = folder / "a.jsonl"
    sources["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    sources["pandas"] = pandas.DataFrame(rows)
    if gone is None:
        sources["pandas of NaN"] = (
            pandas.DataFrame(rows).astype(object).where(lambda frame: frame.notna(), math.nan)
        )
    sources["arrow"] = arrow.Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(sources["arrow"], folder / "a.parquet")
    return {**sources, "parquet": folder / "a.parquet"}


def test_a_null_is_a_value_in_any_kind_of_source(tmp_path: Path) -> None:
    for name, source in partly_bad_sources(tmp_path, None).items():
        [part] = cut(source, ["title", "body"])
        assert part.columns == {"title": ["t0", None, "t2"], "body": ["b0", "b1", None]}, name
        assert (part.bad_fields, part.text_bytes) == ({}, 8), name


def test_a_bad_value_in_one_field_leaves_the_other_fields_of_its_row_in_any_kind_of_source(
    tmp_path: Path,
) -> None:
    for name, source in partly_bad_sources(tmp_path, "\0").items():
        [part] = cut(source, ["title", "body"], bad_rows="error")
        assert part.columns == {"title": ["t0", "", "t2"], "body": ["b0", "b1", ""]}, name
        assert {field: list(bad) for field, bad in part.bad_fields.items()} == {"title": [1], "body": [2]}, (
            name
        )
        assert part.bad == {}, name
        assert part.text_bytes == 8, name
    for name, source in partly_bad_sources(tmp_path, "\0").items():
        [part] = cut(source, ["body"], bad_rows="error")
        assert list(part.bad_fields) == ["body"], name


def test_a_refusal_names_each_bad_field_of_a_row() -> None:
    with pytest.raises(InvalidJob) as caught:
        list(cut([{"a": "x"}, {"a": b"", "b": 3j}, {"b": "y"}], ["a", "b"]))
    assert [(p.row, p.field) for p in caught.value.problems] == [
        (0, "rows.b"),
        (1, "rows.a"),
        (1, "rows.b"),
        (2, "rows.a"),
    ]


def test_of_a_row_that_is_too_long_only_as_much_is_bad_as_makes_it_so() -> None:
    half = "x" * (MAX_ROW_BYTES // 2)
    rows = [{"a": "a", "b": "x" * (MAX_ROW_BYTES + 1)}, {"a": half, "b": half + "é"}, {"a": half, "b": half}]
    [part] = cut(rows, ["a", "b"], bad_rows="error")
    assert {field: list(bad) for field, bad in part.bad_fields.items()} == {"b": [0, 1]}
    assert "131,074 bytes of 262,146 in the row" in part.bad_fields["b"][1][1]
    assert [len(text) for text in part.columns["a"]] == [1, MAX_ROW_BYTES // 2, MAX_ROW_BYTES // 2]


def test_a_part_says_each_reason_once_however_many_rows_have_it() -> None:
    [part] = cut([{"a": "x", "b": math.nan}] * 1000, ["a", "b"], bad_rows="error")
    sent = unpack(part.encode())
    [[error, message, offsets]] = sent["bad_fields"]["b"]
    assert (error, offsets) == ("bad_row", list(range(1000)))
    assert message == "b: got NaN; expected a number or null"
    assert sent["columns"] == {"a": ["x"] * 1000, "b": [None] * 1000}
    assert part.columns["b"] == [""] * 1000, "encoding changes nothing"


def test_a_survey_keeps_rows_of_which_something_can_be_read() -> None:
    rows = [{"a": "x", "b": b""}, {"a": "x", "b": "y"}, {"a": 1j, "b": b""}, 7]
    found = survey(rows, ["a", "b"], bad_rows="error")
    assert (found.rows, found.text_bytes) == (4, 3)
    assert found.sample == ({"a": "x"}, {"a": "x", "b": "y"})


def test_a_survey_counts_all_rows_and_draws_the_same_sample_each_time() -> None:
    source = [f"row {i}" for i in range(5000)]
    first, again = (survey(source, FIELDS, sample=50) for _ in range(2))
    assert (first.rows, first.text_bytes) == (5000, sum(map(len, source)))
    assert first == again
    drawn = sorted(int(row["text"].split()[1]) for row in first.sample)
    assert len(set(drawn)) == 50
    assert drawn[0] < 1000 < 4000 < drawn[-1]


def test_a_survey_leaves_bad_rows_out_of_its_sample_but_counts_them() -> None:
    found = survey(["a", 1, "b"], FIELDS, bad_rows="error")
    assert found.rows == 3
    assert [row["text"] for row in found.sample] == ["a", "b"]


def test_whole_rows_are_rows_as_they_stand_in_their_source(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("text,topic\na,sport\nb,\n")
    rows = [{"text": "a", "topic": "sport"}, {"text": "b", "topic": ""}]
    assert list(rows_module.whole_rows(path)) == [(rows[0], 2), (rows[1], 3)]
    frame = pytest.importorskip("pandas").DataFrame(rows)
    assert [row for row, _ in rows_module.whole_rows(frame)] == rows
    assert [row for row, _ in rows_module.whole_rows([rows[0], "b", 3])] == [rows[0], "b", 3]
    assert texts(frame["text"]) == [["a"], ["b"]]
    path.with_suffix(".jsonl").write_text('{"topic": "sport"}\n{"topic"\n')
    with pytest.raises(InvalidJob, match=r"^row 1, rows: got broken JSON.* \(line 2\)"):
        list(rows_module.whole_rows(path.with_suffix(".jsonl")))
